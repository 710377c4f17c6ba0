#!/usr/bin/env bash
# Room that a server keeps for replies, by whether the client lets them end.
#
# Package: sglang 0.5.14 and 0.5.23 (Apache-2.0): srt/managers/schedule_policy.py (PrefillAdder), bench_serving.
# Guess: with the same prompts, replies and --max-concurrency a server runs as many requests at once, whether a reply ends
# by itself at its last token or is told to go on up to it (ignore_eos).
# Seen: to 0.5.14 both are kept the same room for, a share of what they may write that falls from 0.7 to 0.098. In 0.5.23
# replies with ignore_eos, which its own benchmark client sends unless told --disable-ignore-eos, are kept all of it: under
# load ten times as much. A benchmark that fills the cache runs fewer requests at once than the same traffic does, and than
# it did under 0.5.14.
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
import types
import zipfile
from pathlib import Path

NAME, LEAST, RUNNING, LEFT = "_get_running_request_total_token_offset", 0.098, 100, 2000


def kept(files: zipfile.ZipFile, fixed: bool) -> float:
    """Tokens that the released method keeps room for beside 100 replies which may write 2,000 more each, at the share
    that a server under load has."""
    tree = ast.parse(files.read("sglang/srt/managers/schedule_policy.py"))
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == NAME)
    scope: dict[str, object] = {"CLIP_MAX_NEW_TOKENS": 4096, "Req": object}
    exec(compile(ast.unparse(found), NAME, "exec"), scope)
    asked = types.SimpleNamespace(max_new_tokens=2 * LEFT, ignore_eos=fixed)
    one = types.SimpleNamespace(sampling_params=asked, output_ids=[0] * LEFT)
    return RUNNING * scope[NAME](types.SimpleNamespace(new_token_ratio=LEAST), one)


def sends_fixed(files: zipfile.ZipFile) -> bool:
    """Whether the benchmark client ignores the end unless told otherwise."""
    clients = [files.read(name).decode() for name in files.namelist()
               if name in ("sglang/bench_serving.py", "sglang/benchmark/serving.py")]
    return any(re.search(r'"ignore_eos": not args\.disable_ignore_eos', text) for text in clients)


for wheel in sorted(Path(sys.argv[1]).glob("sglang-*.whl")):
    files, release = zipfile.ZipFile(wheel), re.match(r"sglang-([^-]+)", wheel.name)[1]
    ends, fixed = kept(files, False), kept(files, True)
    print(f"sglang {release}: room kept for 100 replies half written, 2,000 tokens left of each: {ends:,.0f} tokens, with "
          f"ignore_eos {fixed:,.0f}; its client sends ignore_eos unasked: {sends_fixed(files)}")
    assert round(ends) == 19_600 and sends_fixed(files), "it keeps other room, or its client sends otherwise"
    assert round(fixed) == (200_000 if release == "0.5.23" else 19_600), "it keeps other room for fixed replies"
PY
