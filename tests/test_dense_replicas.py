"""Data-parallel ranks of a dense model are servers of their own: whoever asks, dp4 serves what four servers do."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

import tensorcast as tc
from tensorcast.predict.predict import predict
from tensorcast.scheduling.requests import Length, drawn

ASKED: dict[str, Any] = {"device": "h100", "world_size": 4, "input_len": 2000, "output_len": 200}
SERVED = ("ttft_s", "tpot_s", "output_tokens_per_s")


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_ranks_serve_what_as_many_replicas_do(engine: str) -> None:
    requests = drawn(200, Length(2000, 0.5), Length(200, 0.5), users=64)
    together, apart, one = (
        tc.replay("llama-3.1-8b", device="h100", layout=layout, requests=sent, engine=engine).summary()
        for layout, sent in (
            ("tp1-dp4", requests), ("4 x tp1", requests),
            ("tp1", drawn(50, Length(2000, 0.5), Length(200, 0.5), users=16)),
        )
    )
    assert together == apart
    assert together["output_tokens_per_s"] == pytest.approx(4 * one["output_tokens_per_s"], rel=0.15)
    rows = pd.DataFrame({
        "model": "llama-3.1-8b", "device": "h100", "engine": engine, "isl": 2000, "osl": 200,
        "tp": 1, "dp": [4, 1, 1], "replicas": [1, 4, 1], "concurrency": [64, 64, 16],
    })
    found = predict(rows)
    assert found["problem"].eq("").all()
    for name in SERVED:
        assert found[name][0] == found[name][1]
        assert found[name][0] == pytest.approx(found[name][2] * (4 if name == "output_tokens_per_s" else 1))


def test_a_comparison_counts_ranks_as_replicas() -> None:
    free = tc.compare("llama-3.1-8b", **ASKED, modes=["aggregated"])
    assert (free.candidates["dp"] == 1).all()
    assert free.best is not None and free.best["replicas"] * free.best["world_size"] == 4
    asked, same = (
        tc.compare("llama-3.1-8b", **ASKED, modes=["aggregated"], layouts=[name]).candidates
        for name in ("tp1-dp4", "tp1")
    )
    pd.testing.assert_frame_equal(asked, same)
    with pytest.raises(tc.InputError, match="layout tp1-dp8 takes 8 GPUs, which does not divide world_size 4"):
        tc.compare("llama-3.1-8b", **ASKED, layouts=["tp1-dp8"])
    experts = tc.compare("qwen3-30b-a3b", **ASKED, layouts=["tp1-dp4-ep4"]).candidates
    assert set(experts["dp"]) == {4}  # ranks that share experts step together


def test_pools_of_ranks_are_pools_of_replicas() -> None:
    requests = drawn(60, Length(1000, 0.5), Length(100, 0.5), rate=20.0)
    together, apart = (
        tc.replay("llama-3.1-8b", device="h100", layout=layout, requests=requests).summary()
        for layout in ("tp1-dp2 > tp1-dp2", "2 x tp1 > 2 x tp1")
    )
    assert together == apart
    row = {"model": "llama-3.1-8b", "device": "h100", "isl": 2000, "osl": 200, "concurrency": 64, "mode": "disagg"}
    found = predict(pd.DataFrame([
        {**row, "prefill_dp": 2, "decode_dp": 2, "prefill_workers": 1, "decode_workers": 1},
        {**row, "prefill_dp": 1, "decode_dp": 1, "prefill_workers": 2, "decode_workers": 2},
    ]))
    assert found["problem"].eq("").all()
    assert [found[name][0] for name in SERVED] == [found[name][1] for name in SERVED]
