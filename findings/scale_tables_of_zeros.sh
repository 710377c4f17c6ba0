#!/usr/bin/env bash
# A table of measured kernels that is all zeros, beside one of the same engine that is not.
#
# Package: aiconfigurator-core 0.12.0 (Apache-2.0), tables systems/data/*/quantize/sglang/0.5.14.
# Guess: rows of a measured table are times, and the two parts of a dynamic quantisation (scale, cast) are of one order.
# Seen: of the 1,628 rows of computescale_perf at least 1,610 are exactly 0 on each of the eight devices, and none takes
# more than 4 us, while scale_matrix_perf (the cast) reaches 12 to 67 ms. TensorRT-LLM's tables for the same shapes hold
# 5-10 us at least on Hopper and Blackwell servers. Whoever adds both parts up takes SGLang's scales for free.
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
folders = sorted(data.glob("*/quantize/sglang/0.5.14"))
for folder in folders:
    scale = pd.read_parquet(folder / "computescale_perf.parquet").latency
    cast = pd.read_parquet(folder / "scale_matrix_perf.parquet").latency
    print(f"{folder.parts[-4]}: {(scale == 0).sum()} of {len(scale)} scale rows are 0, longest {scale.max() * 1e3:.2f} us; "
          f"cast rows up to {cast.max():.1f} ms, none 0: {bool((cast > 0).all())}")
    assert len(scale) == 1628 and (scale == 0).sum() >= 1600 and scale.max() < 0.004, "the scale table has changed"
    assert (cast > 0).all() and cast.max() > 10, "the cast table has changed"
assert len(folders) == 8, "devices with these tables have changed"
PY
