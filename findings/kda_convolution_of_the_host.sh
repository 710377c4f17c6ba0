#!/usr/bin/env bash
# The same short convolution, of one token, in two engines' tables of one layer: 8 us and 400 to 1,000 us.
#
# Package: aiconfigurator-core 0.12.0 (Apache-2.0), tables systems/data/*/kda/{sglang,vllm}/*/kda_perf (Kimi-K3's layer).
# Guess: a convolution over four inputs takes about as long whoever calls it, and a few microseconds for one token.
# Seen: in SGLang 0.5.16's tables 6-10 us on each of eight devices; in vLLM's (0.1.dev19262) 380 us and more, also on
# GPUs of which one is twice as fast as the other: what is timed there is the host that launches it, not the kernel. Its
# decode convolution and its recurrence beside it are of a few microseconds again. Whoever adds up the table's rows for
# short prompts finds a convolution that costs twenty times its recurrence.
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
devices = sorted(data.glob("*/kda/vllm/0.1.dev19262/kda_perf.parquet"))
for table in devices:
    other = table.parents[2] / "sglang" / "0.5.16" / "kda_perf.parquet"
    shortest = {}
    for name, file in (("vllm", table), ("sglang", other)):
        rows = pd.read_parquet(file)
        prompt = rows[(rows.phase == "context") & (rows.num_tokens == 1)]
        for kind in ("conv1d", "kda"):
            some = prompt[prompt.kernel_source.str.contains(kind)]
            shortest[name, kind] = 1e3 * some.latency.median()
    print(f"{table.parts[-5]}: " + "; ".join(f"{name} {kind} {us:.1f} us" for (name, kind), us in shortest.items()))
    assert shortest["vllm", "conv1d"] > 350 and shortest["sglang", "conv1d"] < 12, "the convolutions have changed"
    assert shortest["vllm", "kda"] < 60, "vLLM's recurrence has changed"
assert len(devices) == 8, "devices with these tables have changed"
PY
