#!/usr/bin/env bash
# Small NCCL collectives take longer on Blackwell than on Hopper.
#
# Package: aiconfigurator-core 0.12.0 (Apache-2.0), tables systems/data/*/comm/nccl/2.29.2.
# Guess: a newer generation's collectives are no slower at any size.
# Seen: the shortest half-precision all-reduce over 8 GPUs takes 15.6 us (H100), 16.0 (H200), 25.1 (B200), 24.6 (B300);
# over 4 GPUs 9.3, 9.4, 15.0, 14.3. At small batch a decode step with tensor parallelism waits for these, not for bandwidth.
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
shortest = {}
for device in ("h100_sxm", "h200_sxm", "b200_sxm", "b300_sxm"):
    table = pd.read_parquet(data / device / "comm" / "nccl" / "2.29.2" / "nccl_perf.parquet")
    rows = table[(table.op_name == "all_reduce") & (table.nccl_dtype == "half")]
    for gpus in (4, 8):
        shortest[device, gpus] = float(rows[rows.num_gpus == gpus].latency.min()) * 1e3
        print(f"{device}, {gpus} GPUs: {shortest[device, gpus]:.1f} us")
for gpus in (4, 8):
    for new in ("b200_sxm", "b300_sxm"):
        ratio = shortest[new, gpus] / shortest["h100_sxm", gpus]
        assert 1.45 < ratio < 1.7, f"{new} on {gpus} GPUs is {ratio:.2f} times H100 now"
PY
