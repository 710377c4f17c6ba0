"""A prompt's cache on its way between pools: bytes by hand, links, and rates that are stated instead of them."""

from __future__ import annotations

import math

import pandas as pd
import pytest

import tensorcast as tc
from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options
from tensorcast.errors import InputError
from tensorcast.predict.predict import predict
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.scheduling.requests import Length, drawn
from tensorcast.serving.hand_over import hand_over_s

GPT = {"full": 18, "windows": 18, "window": 128, "heads": 8, "width": 64}
"""openai/gpt-oss-120b, config.json: layers that see all and with a window of so many tokens, heads."""


def sent(engine: str, tokens: int, tp: int = 2, rate: float | None = 2.0) -> float:
    profile = load_engine(engine).in_pools("own")
    prefill = deploy(
        load_model("gpt-oss-120b"), load_device("h200"), profile, Layout(tp, tp, 1, 1), "prefill",
        options=Options(hand_over_gbs=rate),
    )
    return float(hand_over_s(prefill, tp, 2, tokens))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_stated_rate_is_of_each_gpu(tp: int) -> None:
    """Windows have a cache of their own since 0.5.8, which holds what they see."""
    tokens, a_token = 4096, 2 * 2 * GPT["heads"] * GPT["width"] / tp  # keys and values, two bytes each
    windows, full = GPT["windows"] * GPT["window"], GPT["full"] * tokens
    assert sent("sglang", tokens, tp) == pytest.approx((windows + full) * a_token / 2e9, rel=1e-6)
    whole = (GPT["windows"] * tokens + full) * a_token / 2e9
    assert sent("sglang==0.5.6.post2", tokens, tp) == pytest.approx(whole, rel=1e-6)


def test_links_are_faster_than_hosts() -> None:
    assert sent("sglang", 4096, rate=None) < sent("sglang", 4096, rate=4.1) / 20


def test_who_hands_over_slowly_keeps_first_tokens_waiting() -> None:
    row = {
        "model": "qwen3-30b-a3b", "device": "h100", "engine": "sglang", "mode": "disagg", "isl": 4000, "osl": 200,
        "prefill_tp": 1, "decode_tp": 1, "prefill_workers": 1, "decode_workers": 1, "concurrency": 2,
    }  # fmt: skip
    links, hosts = predict(pd.DataFrame([row, row | {"hand_over_gbs": 1.0}]))["ttft_s"]
    each = 2 * 2 * 48 * 4 * 128 * 4000 / 1e9  # qwen3-30b-a3b: 48 layers, 4 heads of 128
    assert hosts - links == pytest.approx(each, rel=0.05)
    asked = drawn(8, Length(4000), Length(20), rate=0.2, burstiness=math.inf)
    fast, slow = (
        tc.replay(
            "qwen3-30b-a3b", device="h100", layout="1 x tp1 > 1 x tp1", engine="sglang", requests=asked,
            hand_over_gbs=rate,
        ).summary()["ttft_mean_s"]
        for rate in (None, 1.0)
    )
    assert slow - fast == pytest.approx(each, rel=0.05)


@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_a_rate_is_more_than_nothing(rate: float) -> None:
    row = {"model": "qwen3-8b", "device": "h100", "hand_over_gbs": rate}
    assert "hand_over_gbs" in predict(pd.DataFrame([row]))["problem"][0]


def test_a_rate_that_no_pool_has_is_refused() -> None:
    asked = drawn(2, Length(400), Length(20), rate=1.0)
    with pytest.raises(InputError, match=r"hand_over_gbs.* no cache is handed over where servers read and write"):
        tc.replay("qwen3-8b", device="h100", layout="2 x tp1", requests=asked, hand_over_gbs=4.1)
