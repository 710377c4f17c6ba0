"""What a decider asks, in sentences and in US dollars, against the frame of candidates."""

from __future__ import annotations

import re

import numpy as np
import pytest

import tensorcast as tc
from tensorcast.report import units
from tensorcast.report.compare import choices
from tensorcast.report.compare.choices import View
from tensorcast.report.compare.sentences import sentences


@pytest.fixture(scope="module")
def view() -> View:
    return View(tc.compare(
        "qwen3-30b-a3b", device="h100", world_size=4, input_len=1024, output_len=256, ttft_s=2.0, tpot_s=0.03,
        engine="sglang",
    ), price=2.5)


def test_prompts_and_replies_pay_the_whole_bill(view: View) -> None:
    """Tokens in and out at their own prices are what the GPUs cost; of pools each pays for its own."""
    rows = view.kept.frame()[view.kept.frame()["meets"]].groupby("mode").head(3).to_dict("records")
    assert {row["mode"] for row in rows} == {"aggregated", "disaggregated"}
    for row in rows:
        share, read, written = choices.cost_apart(view, row)  # type: ignore[arg-type]
        requests_per_s = row["output_tokens_per_s"] / 256
        usd_per_s = (1024 * read + 256 * written) / 1e6 * requests_per_s
        assert usd_per_s == pytest.approx(row["gpus"] * 2.5 / 3600) and 0 < share < 1
        if row["mode"] == "disaggregated":
            (prefill,) = re.findall(r"tp(\d+)-dp(\d+)(?:-ep\d+)?(?:-pp(\d+))?", row["prefill_layout"])
            readers = np.prod([int(size or 1) for size in prefill]) * row["prefill_workers"] * row["replicas"]
            assert share == pytest.approx(readers / row["gpus"])
        else:  # 255 steps for a batch of replies, and as many prompts
            prompts_s = row["batch"] * row["prefill_step_s"] * -(-1024 // row["chunk_tokens"])
            assert share == pytest.approx(prompts_s / (prompts_s + 255 * row["decode_step_s"]))


def test_sentences_are_what_the_candidates_say(view: View) -> None:
    """Against the frame: the gain without each limit, and the best with and without expert parallelism."""
    said, frame = sentences(view), view.kept.frame()
    best = frame[frame["meets"]]["tokens_per_s_per_gpu"].max()
    for text, free in zip(said, ("tpot_s", "ttft_s"), strict=False):
        limit = {"tpot_s": 0.03, "ttft_s": 2.0}[free]
        gain = frame[frame[free] <= limit]["tokens_per_s_per_gpu"].max() / best - 1
        assert ("does not bind" in text) == (gain < 0.005)
        assert gain < 0.005 or f"{100 * gain:.1f}% better" in text
    spread = (frame["ep"] > 1) | frame["prefill_layout"].astype(str).str.contains("-ep")
    for has in (spread, ~spread):
        top = frame[frame["meets"] & has]["tokens_per_s_per_gpu"].max()
        assert units.rate(top) in said[-1]
