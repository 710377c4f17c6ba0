"""Gated delta rule and its convolution as steps price them, against kernels that were timed alone.

Times: aiconfigurator-core 0.12.0 (Apache-2.0), tables ``gdn`` of SGLang 0.5.14, vLLM 0.24.0 and TensorRT-LLM
1.3.0rc20, in microseconds, of Qwen3.5-397B-A17B (64 value and 16 key heads of 128).
"""

from __future__ import annotations

import pytest

from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.layout import Layout
from tensorcast.profiles.store import load_device, load_engine, load_model


def op_us(engine: str, device: str, tp: int, *, phase: str, batch: int, new: int, op: str) -> float:
    parts = load_model("qwen3.5-397b-a17b"), load_device(device), load_engine(engine), Layout(tp, tp), phase
    price = deploy(*parts).step.price(batch, new, 1000 if phase == "decode" else 0)
    return 1e6 * next(float(row.seconds) for row in price.rows if getattr(row.row, "name", "") == op)


@pytest.mark.parametrize(("tp", "batch", "new", "us"), [(4, 1, 8192, 439.0), (8, 8, 1024, 134.7), (4, 1, 1024, 76.0)])
def test_prompts(tp: int, batch: int, new: int, us: float) -> None:
    """Priced at 0.1 of this while a prompt's chunks were taken to run side by side."""
    found = op_us("sglang", "b200", tp, phase="prefill", batch=batch, new=new, op="linear_attention")
    assert found == pytest.approx(us, rel=0.2)


@pytest.mark.parametrize(("batch", "us", "conv_us"), [(8, 5.8, 2.3), (64, 23.6, 3.3), (256, 90.8, 7.5)])
def test_decode(batch: int, us: float, conv_us: float) -> None:
    found, conv = (
        op_us("sglang", "b200", 4, phase="decode", batch=batch, new=1, op=op)
        for op in ("linear_attention", "causal_conv1d")
    )
    assert found == pytest.approx(us, rel=0.2) and conv == pytest.approx(conv_us, rel=0.25)


def test_a_longer_prompt_takes_longer_than_as_many_tokens_in_two() -> None:
    """Chunks of one head wait for one another (vLLM's kernel on Hopper: nothing else counts)."""
    one, two = (
        op_us("vllm", "h200", 8, phase="prefill", batch=batch, new=new, op="linear_attention")
        for batch, new in ((1, 16384), (2, 8192))
    )
    assert one > 1.5 * two
