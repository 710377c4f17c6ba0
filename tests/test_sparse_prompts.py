"""Sparse latent attention on prompts, as DeepSeek-V3.2's steps price it, against kernels that were timed alone.

Times: aiconfigurator-core 0.12.0 (Apache-2.0), tables ``glm5_dsa_attn``, ``glm5_mqa_logits``, ``glm5_topk`` and
``dsa_context_module`` of SGLang 0.5.14, in microseconds.
"""

from __future__ import annotations

from functools import cache

import pytest

from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.plan.plan import Collective
from tensorcast.profiles.store import load_device, load_engine, load_model


@cache
def prefill(device: str, tp: int, kv: str) -> Deployment:
    layout = Layout(8, tp=tp, dp=8 // tp, ep=8)
    return deploy(load_model("deepseek-v3.2"), load_device(device), load_engine("sglang"), layout, "prefill",
                  options=Options(kv_dtype=kv))


def block_us(one: Deployment, new: int, past: int, op: str = "") -> float:
    """Seconds of one attention block, or of one of its ops."""
    price = one.step.price(1, new, past)
    last = max(row.row.kind for row in price.rows)
    rows = [row for row in price.rows if row.row.kind == last and not isinstance(row.row, Collective)]
    block = [row for row in rows if "self_attn" in row.row.module and op in ("", getattr(row.row, "name", ""))]
    return 1e6 * float(sum(float(row.seconds) for row in block))


@pytest.mark.parametrize(("device", "kv", "new", "past", "us"), [
    ("h200", "bf16", 4096, 0, 2933), ("h200", "bf16", 8192, 0, 5908), ("h200", "bf16", 8192, 32768, 10397),
    ("b200", "bf16", 4096, 0, 2511), ("b200", "bf16", 8192, 8192, 6079), ("b200", "fp8", 8192, 0, 2781),
])
def test_blocks_of_16_heads(device: str, kv: str, new: int, past: int, us: float) -> None:
    """Of 128 heads on 8 ranks; priced at 0.2 to 0.7 of this while heads were not padded."""
    assert block_us(prefill(device, 8, kv), new, past) == pytest.approx(us, rel=0.2)


@pytest.mark.parametrize(("device", "us"), [("h200", 12052), ("b200", 6644)])
def test_blocks_of_all_heads(device: str, us: float) -> None:
    assert block_us(prefill(device, 1, "bf16"), 8192, 0) == pytest.approx(us, rel=0.2)


def test_scores_and_selection() -> None:
    """Of GLM-5's 32 heads, DeepSeek-V3.2 has twice as many: 2 x 438 us of scores and 177 to 520 us of selection."""
    us = block_us(prefill("h200", 8, "bf16"), 8192, 2048, "sparse_indexer")
    assert 2 * 438 + 177 < us < 2 * 438 + 520


def test_nothing_is_selected_where_all_is_seen() -> None:
    """Queries that see no more than 2,048 tokens have nothing to choose."""
    short, long = (block_us(prefill("h200", 8, "bf16"), 2048, past, "sparse_indexer") for past in (0, 2048))
    assert short < 2 * 25 * 1.3 and long > short + 37
