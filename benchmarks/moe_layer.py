"""A rewritten MoE layer beside transformers' own block on its `grouped_mm` backend: time of one call on this CPU.

``python benchmarks/moe_layer.py``: three families, 16, 512 and 4,096 tokens, calls of the two in turn; the ratio of
their medians, and how far it moves over thirds of the calls.
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 64, "num_experts_per_tok": 8},
    "deepseek_v3": {
        "hidden_size": 512, "moe_intermediate_size": 256, "n_routed_experts": 64, "num_experts_per_tok": 8,
        "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 0,
    },
}  # fmt: skip
TOKENS = (16, 512, 4096)
SECONDS = float(os.environ.get("SECONDS_EACH", "12"))


def blocks(family: str, sizes: dict[str, Any]) -> tuple[Any, Any]:
    """The stock block with random weights, on `grouped_mm`, and what takes its place."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tensorcast.modeling.moe.apply import moe_blocks
    from tensorcast.modeling.moe.parallel import MoEOptions
    from tensorcast.modeling.moe.rewrite import rewrite

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, num_hidden_layers=1, vocab_size=128, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    model.set_experts_implementation("grouped_mm")
    stock = next(moe_blocks(model))[1]
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_(0.0, 0.02)
    return stock, rewrite(copy.deepcopy(stock), options=MoEOptions(backend="grouped_mm"), model=family)


def ratio(stock: Any, ours: Any, tokens: int) -> tuple[float, float, float, float, float]:
    """Medians of both in seconds, their ratio, and the ratio's range over thirds of the calls."""
    import torch

    x = torch.randn(1, tokens, 512)
    each: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + SECONDS
    with torch.inference_mode():
        stock(x), ours(x)
        while time.perf_counter() < end or len(each[0]) < 9:
            for block, seconds in zip((stock, ours), each, strict=True):
                start = time.perf_counter()
                block(x)
                seconds.append(time.perf_counter() - start)
    size = len(each[0]) // 3
    thirds = [
        statistics.median(each[1][i * size : (i + 1) * size]) / statistics.median(each[0][i * size : (i + 1) * size])
        for i in range(3)
    ]
    theirs, mine = (statistics.median(seconds) for seconds in each)
    return theirs, mine, mine / theirs, min(thirds), max(thirds)


def run() -> None:
    import torch

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32; transformers' grouped_mm / ours")
    for family, sizes in FAMILIES.items():
        stock, ours = blocks(family, sizes)
        for tokens in TOKENS:
            theirs, mine, found, low, high = ratio(stock, ours, tokens)
            print(
                f"{family:12} {tokens:5} tokens  {theirs * 1e3:8.2f} ms  {mine * 1e3:8.2f} ms"
                f"  x{found:.2f} ({low:.2f}-{high:.2f})"
            )


if __name__ == "__main__":
    run()
