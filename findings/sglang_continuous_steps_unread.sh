#!/usr/bin/env bash
# An option that is declared, described and set by public launch scripts, and that no code reads.
#
# Package: sglang 0.5.14 and 0.5.23 (Apache-2.0): srt/server_args.py, srt/arg_groups/fields/schedule.py.
# Guess: --num-continuous-decode-steps 4 makes the scheduler run four decode steps between two looks for prompts, as its
# help says: more throughput, later first tokens; a simulator of the scheduler has to know it.
# Seen: the number is stored, and nothing in srt asks for it. Both servers run as with 1. InferenceX launches DeepSeek-R1
# on MI300X, MI325X and MI355X with 4 or 8.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for release in 0.5.14 0.5.23; do
  python3 -m pip download -q --no-deps --only-binary :all: "sglang==$release" --python-version 3.11 -d "$folder" 2>/dev/null
done
python3 - "$folder" <<'PY'
import ast
import re
import sys
import zipfile
from pathlib import Path

NAME = "num_continuous_decode_steps"
wheels = sorted(Path(sys.argv[1]).glob("sglang-*.whl"))
assert len(wheels) == 2, wheels
for wheel in wheels:
    files = zipfile.ZipFile(wheel)
    declared, read = [], []
    for name in files.namelist():
        if not name.startswith("sglang/srt/") or not name.endswith(".py"):
            continue
        text = files.read(name).decode()
        if NAME not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == NAME:
                declared.append(f"{name}: default {ast.unparse(node.value)}")
            if isinstance(node, ast.Attribute) and node.attr == NAME:
                read.append(f"{name}:{node.lineno}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and NAME in ast.unparse(node):
                read.append(f"{name}:{node.lineno}")
    print(f"sglang {re.match(r'sglang-([^-]+)', wheel.name)[1]}: declared in {declared}, read in {read}")
    assert len(declared) == 1, "declared elsewhere, or gone"
    assert not read, "it is read: the option does something now"
PY
