#!/usr/bin/env bash
# Whole experts on a rank (EP) that take four times as long as the same experts cut over as many ranks (TP), and more
# than every token together could cost.
#
# Package: aiconfigurator-core 0.12.0 (Apache-2.0), tables systems/data/{h100,h200}_sxm/moe/*/*/moe_perf (Mixtral's layer:
# 8 experts, top 2, bf16, 8,192 tokens).
# Guess: on a balanced load a rank does an eighth of the arithmetic either way, so EP 8 takes about as long as TP 8, as
# in TensorRT-LLM's table (0.8 times); on a skewed one its one expert gets 8,192 rows at most, one per token.
# Seen: in SGLang's (0.5.14, Triton) EP 8 takes 3.7 and 4.3 times as long balanced, and skewed (power_law_1.2) over twice
# what one GPU takes for 8,192 rows of all eight experts. Most other models of that table have it from 4,096 tokens
# on, 2 to 4 times; its rows of FlashInfer's kernels do not. Whoever prices prompts by them finds expert parallelism
# several times slower than it is served.
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
for system in ("h100_sxm", "h200_sxm"):
    for engine, release in (("sglang", "0.5.14"), ("trtllm", "1.3.0rc20")):
        rows = pd.read_parquet(data / system / "moe" / engine / release / "moe_perf.parquet")
        rows = rows[(rows.num_experts == 8) & (rows.topk == 2) & (rows.hidden_size == 4096) & (rows.moe_dtype == "bfloat16")]

        def ms(tp: int, ep: int, tokens: int, load: str) -> float:
            at = (rows.moe_tp_size == tp) & (rows.moe_ep_size == ep) & (rows.num_tokens == tokens)
            return float(rows[at & (rows.distribution == load)].latency.median())

        whole, cut = ms(1, 8, 8192, "balanced"), ms(8, 1, 8192, "balanced")
        skewed, every = ms(1, 8, 8192, "power_law_1.2"), ms(1, 1, 4096, "balanced")
        print(f"{system} {engine}: balanced EP 8 {whole:.2f} ms, TP 8 {cut:.2f}; skewed EP 8 {skewed:.2f}, "
              f"8,192 rows on one GPU {every:.2f}")
        if engine == "sglang":
            assert whole > 3 * cut and skewed > 2 * every, "SGLang's rows have changed"
        else:
            assert whole < cut and skewed < 1.1 * every, "TensorRT-LLM's rows have changed"
PY
