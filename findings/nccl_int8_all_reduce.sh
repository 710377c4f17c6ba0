#!/usr/bin/env bash
# An all-reduce of int8 is slower than one of half precision over as many bytes.
#
# Package: aiconfigurator-core 0.12.0 (Apache-2.0), tables systems/data/{h100,h200}_sxm/comm/nccl/2.29.2.
# Guess: NCCL's time depends on bytes, not on their type.
# Seen: at 8 GPUs and the largest common size the int8 all-reduce takes 1.27 (H100) and 1.31 (H200) times as long; the
# all-gather, which adds nothing up, takes the same (ratio 1.00). For whoever prices a quantised all-reduce by its bytes.
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
for device, expected in (("h100_sxm", 1.27), ("h200_sxm", 1.31)):
    table = pd.read_parquet(data / device / "comm" / "nccl" / "2.29.2" / "nccl_perf.parquet")
    ratios = {}
    for op in ("all_reduce", "all_gather"):
        rows = table[(table.op_name == op) & (table.num_gpus == 8)]
        by = {}
        for dtype, width in (("half", 2), ("int8", 1)):
            some = rows[rows.nccl_dtype == dtype]
            by[dtype] = dict(zip(some.message_size * width, some.latency))
        size = max(by["half"].keys() & by["int8"].keys())
        ratios[op] = by["int8"][size] / by["half"][size]
        print(f"{device} {op}: {size / 1e6:.0f} MB, int8 / half = {ratios[op]:.2f}")
    assert abs(ratios["all_reduce"] - expected) < 0.02, "the all-reduce's ratio has changed"
    assert abs(ratios["all_gather"] - 1.0) < 0.02, "the all-gather's ratio has changed"
PY
