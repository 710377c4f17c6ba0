#!/usr/bin/env bash
# One system's all-reduce tables that are of two machines: eight times apart over eight GPUs, and the other way round over
# two.
#
# Package: aiconfigurator-core 0.12.0 (Apache-2.0), tables systems/data/l40s/comm/sglang/{0.5.12,0.5.14}/
# custom_allreduce_perf and comm/nccl/2.27.3/nccl_perf (2 MB in bf16, graph replay).
# Guess: two releases of one engine measured on one system differ by percents, as those of other systems do.
# Seen: over 8 L40S release 0.5.14 takes 2.23 ms and 0.5.12 takes 0.27, over 4 GPUs 0.82 and 0.20; over 2 GPUs 0.5.14 is
# the faster one, 0.12 to 0.15. NCCL's table goes with the slow machine (2.62 ms over 8), as do vLLM's and TensorRT-LLM's.
# 0.5.12 moves 14 GB/s and GPU over 8, which PCIe 4.0 does where GPUs reach one another; the others move 1.6, presumably
# through the host. Whoever takes the newest table of each prices long prompts over 8 L40S eight times too high for a
# server of the first kind, or, from 0.5.12, too low for one of the second.
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

comm = Path(importlib.util.find_spec("aiconfigurator_core").origin).parent / "systems" / "data" / "l40s" / "comm"


def ms(table: str, gpus: int) -> float:
    rows = pd.read_parquet(comm / table)
    at = (rows.num_gpus == gpus) & (rows.message_size == 1048576)
    at &= rows.kernel_source.str.contains("graph") if "sglang" in table else (rows.op_name == "all_reduce") & (rows.nccl_dtype == "half")
    return float(rows[at].latency.median())


for gpus in (2, 4, 8):
    early, late = (ms(f"sglang/{release}/custom_allreduce_perf.parquet", gpus) for release in ("0.5.12", "0.5.14"))
    nccl = ms("nccl/2.27.3/nccl_perf.parquet", gpus)
    print(f"{gpus} L40S: SGLang 0.5.12 {early:.2f} ms, 0.5.14 {late:.2f}, NCCL 2.27.3 {nccl:.2f}")
    assert late < early if gpus == 2 else late > 3 * early, "the tables have changed"
PY
