#!/usr/bin/env bash
# A minor release renames the argument that nearly every decoder's cache is handed over by.
#
# Packages: transformers 5.23.0 and 5.24.0 (Apache-2.0), read as source, never imported.
# Guess: an argument whose old name is only deprecated (removal announced for 5.40) stays in signatures until then.
# Seen: in 5.23.0 165 causal language models' forward methods take `past_key_values` and none `cache`; in 5.24.0 none takes
# the old name and 173 take `cache`, of which a decorator lets 168 hear the old one. Calls go on working with a warning;
# whoever asks a signature whether a class keeps a cache is told by 5.24.0 that none does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for release in 5.23.0 5.24.0; do
  python3 -m pip download -q --no-deps --only-binary :all: "transformers==$release" -d "$folder" 2>/dev/null
done
python3 - "$folder" <<'PY'
import ast
import re
import sys
import zipfile
from pathlib import Path

found = {}
for wheel in sorted(Path(sys.argv[1]).glob("transformers-*.whl")):
    files = zipfile.ZipFile(wheel)
    release = re.match(r"transformers-([^-]+)", wheel.name)[1]
    taken, heard = {"past_key_values": 0, "cache": 0}, 0
    for name in files.namelist():
        if not re.match(r"transformers/models/\w+/modeling_\w+\.py$", name):
            continue
        for kind in ast.parse(files.read(name)).body:
            if not isinstance(kind, ast.ClassDef) or not kind.name.endswith("ForCausalLM"):
                continue
            for method in kind.body:
                if isinstance(method, ast.FunctionDef) and method.name == "forward":
                    names = {one.arg for one in (*method.args.args, *method.args.kwonlyargs)}
                    for said in taken:
                        taken[said] += said in names
                    heard += any('"past_key_values"' in ast.unparse(d).replace("'", '"') for d in method.decorator_list)
    found[release] = (taken["past_key_values"], taken["cache"], heard)
    print(f"transformers {release}: of the causal language models' forward methods {found[release][0]} take "
          f"past_key_values, {found[release][1]} take cache, {heard} hear the old name by a decorator")
old, new = found["5.23.0"], found["5.24.0"]
assert old[0] > 100 and old[1] < 5, old
assert new[0] < 5 and new[1] > 100 and new[2] > 100, new
PY
