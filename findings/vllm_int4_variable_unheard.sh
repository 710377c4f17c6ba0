#!/usr/bin/env bash
# A variable that asks for faster INT4 experts, and a release in which none of its models may have them.
#
# Package: vllm 0.24.0 and 0.33.0 (Apache-2.0), fused_moe/experts/trtllm_mxint4_moe.py.
# Guess: with VLLM_USE_FLASHINFER_MOE_INT4=1, as InferenceX's scripts start Kimi-K2.5 on B200, its INT4 experts run in
# TensorRT-LLM's generated kernels.
# Seen: in 0.24.0 the class that holds these kernels refuses every activation but gpt-oss's (SWIGLUOAI), which no INT4
# model has: Kimi's plain SiLU falls to Marlin without a warning, 1.2 to 1.3 times as long a token at 8 to 64 users by
# tables of both. 0.33.0 accepts SiLU again, and says in a comment that SwiGLU meant it all along.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for release in 0.24.0 0.33.0; do
  python3 -m pip download -q --no-deps --only-binary :all: "vllm==$release" --python-version 3.11 -d "$folder" 2>/dev/null
done
python3 - "$folder" <<'PY'
import ast
import enum
import sys
import zipfile
from pathlib import Path

MoEActivation = enum.Enum("MoEActivation", ["SILU", "GELU", "SWIGLUOAI"])
seen = {}
for wheel in sorted(Path(sys.argv[1]).glob("vllm-*.whl")):
    release, files = wheel.name.split("-")[1].split("+")[0], zipfile.ZipFile(wheel)
    tree = ast.parse(files.read("vllm/model_executor/layers/fused_moe/experts/trtllm_mxint4_moe.py"))
    asked = next(one for one in ast.walk(tree) if isinstance(one, ast.FunctionDef) and one.name == "_supports_activation")
    asked.decorator_list = []
    scope = {"MoEActivation": MoEActivation}
    exec(compile(ast.Module([asked], []), wheel.name, "exec"), scope)
    seen[release] = {one.name for one in MoEActivation if scope["_supports_activation"](one)}
    print(f"vllm {release}: INT4 experts in TensorRT-LLM's kernels take {', '.join(sorted(seen[release]))}")
assert seen == {"0.24.0": {"SWIGLUOAI"}, "0.33.0": {"SILU", "SWIGLUOAI"}}, "what the releases accept has changed"
PY
