#!/usr/bin/env bash
# An FP8 matmul on MI300X that leaves aside the kernels which its own library measured for the shape.
#
# Packages: sglang 0.5.9 and 0.5.14 (Apache-2.0), srt/layers/quantization/fp8_utils.py, aiter_w8a8_block_fp8_linear;
# amd-aiter 0.1.7.post2.dev18 (MIT), configs/a8w8_blockscale_tuned_gemm.csv and ops/triton/configs/gemm/.
# Guess: where AMD's library is switched on, FP8 weights in blocks are multiplied by the kernel that it lists for the shape.
# Seen: SGLang takes the library's Triton kernel whatever the shape (0.5.14 on CDNA 3 alone). For MI300X that has one tile,
# 128 x 128 and not split, whatever the rows: 64 rows of DeepSeek-V3's [7168] x [7168, 4608], [2048] x [2048, 7168] and
# [1536] x [1536, 3072] take 122, 34 and 30 us in a public profile of SGLang 0.5.9 on MI325X (SemiAnalysisAI/InferenceX#863);
# the library lists 22.1, 11.5 and 7.7 us of CK's kernels for the same chip's 304 processors.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for package in sglang==0.5.9 sglang==0.5.14 amd-aiter==0.1.7.post2.dev18; do
  python3 -m pip download -q --no-deps --only-binary :all: --pre "$package" --python-version 3.11 \
    --platform manylinux_2_34_x86_64 --platform any -d "$folder" 2>/dev/null
done
python3 - "$folder" <<'PY'
import ast
import csv
import io
import json
import sys
import zipfile
from pathlib import Path

WANTED = "aiter_w8a8_block_fp8_linear"
SERVED = {(4608, 7168): 122.0, (7168, 2048): 34.0, (3072, 1536): 30.0}


class Rows:
    """Stands for a tensor: what the function asks of one."""

    dtype = "bfloat16"

    def __init__(self, *shape):
        self.shape = shape

    def view(self, *shape):
        return Rows(*(self.shape if shape[0] == -1 else shape))

    def to(self, dtype=None):
        return self


def called(wheel):
    """Which kernel the released function calls on MI300X for each shape."""
    tree = ast.parse(zipfile.ZipFile(wheel).read("sglang/srt/layers/quantization/fp8_utils.py"))
    own = next(one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == WANTED)
    own.returns, own.args.defaults = None, [ast.Constant(None) for _ in own.args.defaults]
    for argument in own.args.args:
        argument.annotation = None
    whose = {}  # names that the file gives to the library's kernels
    for one in ast.walk(tree):
        if isinstance(one, ast.ImportFrom) and one.module and one.module.split(".")[0] == "aiter":
            whose |= {name.asname or name.name: one.module for name in one.names}
    ran = []

    def kernel(name):
        return lambda q_input, weight, *scales, **options: ran.append(name) or Rows(q_input.shape[0], weight.shape[0])

    names = {name: kernel("Triton" if "triton" in module else "listed") for name, module in whose.items()}
    names["aiter_per1x128_quant"] = lambda given, **options: (given, None)
    switches = {"_use_aiter_gfx95": False, "_use_aiter_bpreshuffle_gfx95": False}  # CDNA 3
    stand_in = type("Anything", (), {"__getattr__": lambda self, name: self})()
    scope = {"torch": stand_in, "aiter": stand_in, **switches, **names}
    exec(compile(ast.fix_missing_locations(ast.Module([own], [])), "fp8_utils.py", "exec"), scope)
    for columns, depth in SERVED:
        scope[WANTED](Rows(64, depth), Rows(columns, depth), [128, 128], None)
    return ran


folder = Path(sys.argv[1])
for wheel in sorted(folder.glob("sglang-*.whl")):
    ran = called(wheel)
    print(f"sglang {wheel.name.split('-')[1]} on CDNA 3: {', '.join(ran)}")
    assert ran == ["Triton"] * len(SERVED), "which kernel runs has changed"
files = zipfile.ZipFile(next(folder.glob("amd_aiter-*.whl")))
tiles = json.loads(files.read("aiter/ops/triton/configs/gemm/MI300X-GEMM-A8W8_BLOCKSCALE.json"))
shapes = [name for name in files.namelist() if "gemm/MI300X-GEMM-A8W8_BLOCKSCALE-N" in name]
print(f"amd-aiter: tiles for MI300X: {len(tiles)}, of shapes of their own: {len(shapes)}; {tiles}")
assert list(tiles) == ["any"] and not shapes and tiles["any"]["BLOCK_SIZE_M"] == 128, "the tiles have changed"
listed = list(csv.DictReader(io.StringIO(files.read("aiter/configs/a8w8_blockscale_tuned_gemm.csv").decode())))
for (columns, depth), served in SERVED.items():
    row = next(r for r in listed if (r["cu_num"], r["M"], r["N"], r["K"]) == ("304", "64", str(columns), str(depth)))
    print(f"[64, {depth}] x [{depth}, {columns}]: listed {float(row['us']):.1f} us, served in {served:.0f}")
    assert float(row["us"]) < served / 2, "what the library lists has changed"
PY
