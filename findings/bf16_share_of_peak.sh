#!/usr/bin/env bash
# How much of its bf16 peak a GPU's large matmuls reach depends on the GPU, and on whose table is read.
#
# Package: aiconfigurator-core 0.12.0 (Apache-2.0), systems/*.yaml and the tables systems/data/*/gemm.
# Guess: matmuls of 2 TFLOP and more, vendor libraries' in every engine, reach three quarters to nine tenths of the
# datasheet's peak, about the same in each engine's table.
# Seen (medians under SGLang, TensorRT-LLM, vLLM): L40S 0.49, 0.54, 0.67; H100 0.72, 0.75, 0.82; RTX PRO 6000 0.82, 0.85,
# 0.88; GB200 0.56, 0.61, 0.46, though GB300, the same machine with the next chip, reaches 0.70, 0.74, 0.77. One engine's
# calls of one library differ by a third from another's on L40S and GB200.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pandas==3.1.1 pyarrow==26.0.1 pyyaml==6.0.3
"$folder/venv/bin/pip" install -q --no-deps aiconfigurator-core==0.12.0
"$folder/venv/bin/python" - <<'PY'
import importlib.util
import re
from pathlib import Path

import pandas as pd
import yaml

systems = Path(importlib.util.find_spec("aiconfigurator_core").origin).parent / "systems"
share = {}
for device in ("a100_sxm", "h100_sxm", "l40s", "rtx_pro_6000_server", "gb200", "gb300"):
    peak = yaml.safe_load((systems / f"{device}.yaml").read_text())["gpu"]["bfloat16_tc_flops"]
    for engine in ("sglang", "trtllm", "vllm"):
        tables = (systems / "data" / device / "gemm" / engine).rglob("gemm_perf.parquet")
        newest = max(tables, key=lambda table: [int(part) for part in re.findall(r"\d+", table.parent.name)])
        rows = pd.read_parquet(newest)
        rows = rows[rows.gemm_dtype == "bfloat16"]
        flops = 2.0 * rows.m * rows.n * rows.k
        large = flops >= 2e12
        share[device, engine] = float((flops / (rows.latency / 1e3) / peak)[large].median())
        print(f"{device}, {engine} ({newest.parent.name}): {share[device, engine]:.2f} of the peak, {large.sum()} shapes")
l40s, gb200 = ([share[device, engine] for engine in ("sglang", "trtllm", "vllm")] for device in ("l40s", "gb200"))
assert max(l40s) < 0.75 and max(l40s) / min(l40s) > 1.25, f"L40S now {l40s}"
assert max(gb200) < 0.7 and max(gb200) / min(gb200) > 1.2, f"GB200 now {gb200}"
assert min(share["rtx_pro_6000_server", engine] for engine in ("sglang", "trtllm", "vllm")) > 0.75
assert min(share["gb300", engine] / share["gb200", engine] for engine in ("sglang", "trtllm", "vllm")) > 1.15
PY
