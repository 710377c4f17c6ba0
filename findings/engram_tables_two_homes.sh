#!/usr/bin/env bash
# Tables that were made to lie in the host's memory, and where two engines put them.
#
# Packages: vllm 0.33.0 (Apache-2.0), config/engram.py; sglang 0.5.23 (Apache-2.0), srt/environ.py, srt/layers/engram.py.
# Guess: DeepSeek-V4.1-Flash's two tables of n-grams, 768 M rows of 256 numbers in 8 bits with an exponent for 32 of them,
# are read from the host's memory by both engines, which is what a table of hashes is for.
# Seen: vLLM keeps them there unasked (cpu_offload); SGLang deals them out to the GPUs of a tensor-parallel group, 203 GB in
# all and 25 on each of eight, unless an environment variable that no argument of its server stands for says otherwise. One
# model so leaves other room for a cache, and a smallest machine in one engine that is none in the other.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for wheel in vllm==0.33.0 sglang==0.5.23; do
  python3 -m pip download -q --no-deps --only-binary :all: "$wheel" --python-version 3.11 -d "$folder" 2>/dev/null
done
python3 - "$folder" <<'PY'
import ast
import sys
import zipfile
from pathlib import Path


def released(package: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(Path(sys.argv[1]).glob(f"{package}-*.whl")))


def tree(files: zipfile.ZipFile, name: str) -> ast.AST:
    return ast.parse(files.read(name))


fields = [node for node in ast.walk(tree(released("vllm"), "vllm/config/engram.py")) if isinstance(node, ast.AnnAssign)]
vllm = next(ast.unparse(node.value) for node in fields if ast.unparse(node.target) == "cpu_offload")
sglang, name = released("sglang"), "SGLANG_ENABLE_DSV41_ENGRAM_HOST_TABLE"
switches = [node for node in ast.walk(tree(sglang, "sglang/srt/environ.py")) if isinstance(node, ast.Assign)]
unasked = next(ast.unparse(node.value) for node in switches if ast.unparse(node.targets[0]) == name)
arguments = [
    file for file in sglang.namelist()
    if file.startswith(("sglang/srt/server_args", "sglang/srt/arg_groups/")) and file.endswith(".py")
    and b"ENGRAM_HOST_TABLE" in sglang.read(file)
]
rows = 384_006_168 + 384_016_682
size = rows * (256 + 256 // 32) / 1e9
print(f"two tables: {size:.1f} GB; vLLM 0.33.0 cpu_offload: {vllm}; SGLang 0.5.23 {name}: {unasked}")
print(f"files of SGLang's arguments that name it: {arguments or 'none'}; on each of eight GPUs {size / 8:.1f} GB")
assert vllm == "True" and unasked == "EnvBool(False)" and not arguments, "the defaults have changed"
PY
