"""The numbers that a comparison's answer starts with: chances of the limits, what all GPUs bring and cost."""

from __future__ import annotations

import re

import numpy as np
import pytest

import tensorcast as tc
from tensorcast.report import units
from tensorcast.report.compare import words
from tensorcast.report.compare.choices import View


def test_limits_are_kept_with_a_chance_and_all_gpus_are_told() -> None:
    """By sampling: four in five true values lie in the interval, evenly in logs."""
    found = tc.compare(
        "qwen3-30b-a3b", device="h100", world_size=5, input_len=1024, output_len=256, tpot_s=0.03,
        modes=["disaggregated"],
    )
    view = View(found)
    assert view.best is not None
    best, numbers = view.best, {number.name: number for number in words.conclusion(view).numbers}
    spread = np.log(best["tpot_high_s"] / best["tpot_s"]) / 1.2816
    drawn = best["tpot_s"] * np.exp(spread * np.random.default_rng(0).normal(size=200_000))
    said = re.search(r"30.0 ms kept with a chance of (\d+) %", numbers["time per output token"].note)
    assert said is not None and int(said[1]) == pytest.approx(100 * np.mean(drawn <= 0.03), abs=1)
    assert "chance" not in numbers["time to first token"].note  # no limit was asked for
    total = best["output_tokens_per_s"]
    assert f"{total / 256:.3g} requests/s" in numbers["tokens/s of all GPUs"].note
    assert total == pytest.approx(best["tokens_per_s_per_gpu"] * best["gpus"])
    hour = best["cost_per_million_tokens"] * total * 3600 / 1e6
    assert hour == pytest.approx(6.88 * best["gpus"])  # the profile's list price
    assert numbers["USD per hour"].value == units.digits(hour)
    assert numbers["idle GPUs"].value == str(5 - int(best["gpus"])) if best["gpus"] < 5 else "idle GPUs" not in numbers
