#!/usr/bin/env bash
# One engine's FP8 matmul takes longer for one row than for two, on one generation of GPUs.
#
# Package: aiconfigurator-core 0.12.0 (Apache-2.0), tables systems/data/*/gemm/{vllm,sglang,trtllm}/*/gemm_perf, FP8.
# Guess: a matmul of one row takes as long as one of two: both read the same weights.
# Seen: in vLLM 0.24.0's tables of B200, B300, GB200 and GB300 one row takes 2.2 to 2.8 times as long in the median, 13 to
# 16 us more whatever the matrix; 32 x 32 on a B300 as well. On H100 and H200, and under SGLang and TensorRT-LLM
# everywhere, the two take the same. The kernel's authors published 6 us for 1 and for 16 rows of 6144 x 4096 on a B200
# (github.com/vllm-project/vllm/pull/18778). Whoever prices a decode step of one user by these rows adds some 4 ms to a
# model of 80 layers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pandas==3.1.1 pyarrow==26.0.1
"$folder/venv/bin/pip" install -q --no-deps aiconfigurator-core==0.12.0
"$folder/venv/bin/python" - <<'PY'
import importlib.util
from pathlib import Path
import pandas as pd

data = Path(importlib.util.find_spec("aiconfigurator_core").origin).parent / "systems" / "data"
newest = {"vllm": "0.24.0", "sglang": "0.5.14", "trtllm": "1.3.0rc20"}
for system in ("b200_sxm", "b300_sxm", "gb200", "gb300", "h100_sxm", "h200_sxm"):
    for engine, version in newest.items():
        rows = pd.read_parquet(data / system / "gemm" / engine / version / "gemm_perf.parquet")
        rows = rows[(rows.gemm_dtype == "fp8") & rows.m.isin([1, 2])]
        both = rows.groupby(["n", "k", "m"]).latency.median().unstack("m").dropna()
        ratio, more_us = (both[1] / both[2]).median(), 1000 * (both[1] - both[2]).median()
        print(f"{system} {engine} {version}: one row over two {ratio:.2f}, {more_us:+.1f} us, {len(both)} matrices")
        apart = engine == "vllm" and system[0] != "h"
        assert (2.0 < ratio < 3.0 and 12 < more_us < 17) if apart else 0.9 < ratio < 1.1, "the tables have changed"
        if apart and system == "b300_sxm":
            assert both.loc[(32, 32), 1] > 2 * both.loc[(32, 32), 2], "the smallest matrix has changed"
PY
