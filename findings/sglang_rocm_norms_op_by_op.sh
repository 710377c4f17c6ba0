#!/usr/bin/env bash
# A norm that is one kernel on NVIDIA and eleven on AMD.
#
# Package: sglang 0.5.9 and 0.5.10.post1 (Apache-2.0), srt/layers/layernorm.py, GemmaRMSNorm: the norm by one plus its
# weight of Gemma, Qwen3-Next and Qwen3.5.
# Guess: a norm is one kernel on every device that the engine serves.
# Seen: in 0.5.9 the class takes torch's ops one by one where it finds ROCm, which a replayed graph launches one by one,
# too: of Qwen3.5-397B 120 norms of 11 kernels a step and 30 of 10. 0.5.10.post1 calls AITER's or vLLM's fused kernel.
# Public runs of Qwen3.5 in FP8 on eight MI355X under 0.5.8 (24 ms a token for 4 users) are told with them to 14 %, without
# to 39 %.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for release in 0.5.9 0.5.10.post1; do
  python3 -m pip download -q --no-deps --only-binary :all: "sglang==$release" --python-version 3.11 -d "$folder" 2>/dev/null
done
python3 - "$folder" <<'PY'
import ast
import sys
import zipfile
from pathlib import Path

seen = {}
for wheel in sorted(Path(sys.argv[1]).glob("sglang-*.whl")):
    release, files = wheel.name.split("-")[1], zipfile.ZipFile(wheel)
    tree = ast.parse(files.read("sglang/srt/layers/layernorm.py"))
    norm = next(one for one in tree.body if isinstance(one, ast.ClassDef) and one.name == "GemmaRMSNorm")
    methods = {one.name: one for one in norm.body if isinstance(one, ast.FunctionDef)}
    native = "forward_native" in ast.unparse(methods["__init__"])
    steps = [  # of a step with the residual
        one for one in ast.walk(methods["forward_native"])
        if isinstance(one, ast.BinOp)
        or (isinstance(one, ast.Call) and getattr(one.func, "attr", "") in ("float", "pow", "mean", "rsqrt", "to"))
    ]
    after = [one for one in steps if "post_residual_addition" not in ast.unparse(one)]
    seen[release] = native
    own = "forward_native on ROCm" if native else f"{'forward_hip' if 'forward_hip' in methods else 'none'} on ROCm"
    print(f"sglang {release}: GemmaRMSNorm runs {own}; forward_native has {len(after)} ops of torch")
assert seen == {"0.5.9": True, "0.5.10.post1": False}, "what the releases run has changed"
PY
