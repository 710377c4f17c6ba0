#!/usr/bin/env bash
# Measured tables named after a layer that hold everything of it but the layer.
#
# Package: aiconfigurator-core 0.12.0 (Apache-2.0), tables systems/data/*/linear_attention/trtllm/*/mamba2_perf.
# Guess: a table called mamba2, with state sizes, heads and chunk sizes as columns, times the selective scan.
# Seen: on every device that has it, it holds two kernels, the short convolution of prompts and of decode steps; no scan.
# The neighbouring gdn tables hold both, convolution and recurrence. Whoever sums the mamba2 table for a hybrid model
# leaves out the part that reads and writes the states, which are the most of a decode step's bytes there.
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
tables = sorted(data.glob("*/linear_attention/trtllm/*/mamba2_perf.parquet"))
for table in tables:
    rows = pd.read_parquet(table)
    kernels = sorted(rows.kernel_source.unique())
    beside = sorted(pd.read_parquet(table.with_name("gdn_perf.parquet")).kernel_source.unique())
    print(f"{table.parts[-5]}: mamba2 {len(rows)} rows of {', '.join(kernels)}; gdn has {', '.join(beside)}")
    assert {"d_state", "nheads", "chunk_size"} <= set(rows.columns), "the columns have changed"
    assert kernels == ["causal_conv1d_fn", "causal_conv1d_update"], "the mamba2 table has changed"
    assert any("delta_rule" in name for name in beside), "the gdn table has changed"
assert len(tables) == 8, "devices with these tables have changed"
PY
