"""What must be served, may be spent and is to be sure: held against every candidate's own numbers."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

import tensorcast as tc
from tensorcast.profiles.store import load_engine
from tensorcast.search.compare import Comparison, NoLayoutMeets
from tensorcast.search.selection import alike, pareto
from tensorcast.serving.interval import served_interval

ASKED: dict[str, Any] = {
    "device": "h100", "world_size": 8, "input_len": 1024, "output_len": 256, "ttft_s": 2.0, "tpot_s": 0.03,
}  # fmt: skip


def compared(**more: Any) -> Comparison:
    return tc.compare("qwen3-30b-a3b", **ASKED | more)


@pytest.fixture(scope="module")
def plain() -> Comparison:
    return compared()


def test_the_most_of_all_gpus_and_the_most_users(plain: Comparison) -> None:
    for objective, column in (("throughput", "output_tokens_per_s"), ("users", "concurrency")):
        best = compared(objective=objective).best
        assert best is not None and plain.best is not None
        assert best[column] >= plain.candidates.loc[plain.candidates["meets"], column].max()
        assert best["ttft_s"] <= 2.0 and best["tpot_s"] <= 0.03


def test_the_least_that_must_be_served(plain: Comparison) -> None:
    assert plain.best is not None
    frame = plain.candidates[plain.candidates["meets"]]
    users = int(0.9 * frame["concurrency"].max())
    rate = float(0.9 * frame["output_tokens_per_s"].max() / 256)
    for asked, served in (({"users": users}, "concurrency"), ({"request_rate": rate}, "output_tokens_per_s")):
        found = compared(**asked)
        least = users if served == "concurrency" else rate * 256
        enough = frame[frame[served] >= least]
        assert found.best is not None and found.best[served] >= least
        assert found.best["tokens_per_s_per_gpu"] >= enough["tokens_per_s_per_gpu"].max()
        missed = found.candidates[found.candidates["limit"].isin(["users", "requests"])]
        assert len(missed) and (missed[served] < least).all()
    with pytest.raises(NoLayoutMeets, match=r"100000 users at once on 8 GPUs: the limit on users binds; .* serves"):
        compared(users=100000)


def test_fewest_gpus_for_users() -> None:
    found = compared(objective="gpus", users=200)
    frame = found.candidates[found.candidates["meets"]]
    assert found.best is not None and found.best["gpus"] == frame["gpus"].min()
    assert (frame["concurrency"] >= 200).all() and (found.candidates["idle_gpus"] == 0).all()


def test_a_budget_buys_so_many_gpus(plain: Comparison) -> None:
    found = compared(budget=21.0)  # three at the list price of 6.88
    kept = found.candidates[found.candidates["meets"]]
    assert (kept["usd_per_hour"] <= 21.0).all() and kept["gpus"].max() <= 3
    np.testing.assert_allclose(kept["usd_per_hour"], 6.88 * kept["gpus"])
    assert (kept["idle_gpus"] == 3 - kept["gpus"]).all()
    assert (plain.candidates["idle_gpus"] == 8 - plain.candidates["gpus"]).all()


def test_limits_are_kept_with_the_chance_asked_for(plain: Comparison) -> None:
    found = compared(confidence=0.8)
    frame = found.candidates
    kept = frame[frame["meets"]]
    assert found.best is not None and found.best["tpot_chance"] >= 0.8
    assert (kept[["ttft_chance", "tpot_chance"]] >= 0.8 - 1e-9).all(axis=None)
    late = frame[~frame["meets"] & frame["limit"].isin(["ttft", "tpot"])]
    assert (late[["ttft_chance", "tpot_chance"]].min(axis=1) < 0.8 + 1e-9).all()
    assert found.best["lower_bound"] == kept["lower_bound"].max()
    # the quantile of what four in five values lie within, drawn
    row = frame.iloc[0]
    spread = np.log(row["output_tokens_high_per_s"] / row["output_tokens_per_s"]) / NormalDist().inv_cdf(0.9)
    drawn = row["tokens_per_s_per_gpu"] * np.exp(spread * np.random.default_rng(1).normal(size=400_000))
    assert row["lower_bound"] == pytest.approx(np.quantile(drawn, 0.2), rel=2e-3)
    # nothing that would be kept by the plain search's candidates is missed by far
    sure = plain.candidates[(plain.candidates["ttft_chance"] >= 0.8) & (plain.candidates["tpot_chance"] >= 0.8)]
    assert found.best["tokens_per_s_per_gpu"] >= 0.98 * sure["tokens_per_s_per_gpu"].max()


def test_chances_are_those_of_the_intervals(plain: Comparison) -> None:
    frame = plain.candidates
    for what, limit in (("ttft", 2.0), ("tpot", 0.03)):
        high = frame[f"{what}_high_s"]
        assert ((frame[f"{what}_chance"] >= 0.9) == (high <= limit)).mean() > 0.999
        at = frame[np.isclose(frame[f"{what}_s"], limit, rtol=1e-4)]
        np.testing.assert_allclose(at[f"{what}_chance"], 0.5, atol=0.01)
    assert compared(tpot_s=None).candidates["tpot_chance"].isna().all()
    width = frame["output_tokens_high_per_s"] / frame["output_tokens_per_s"]
    assert width.min() >= served_interval(0.0, 0.0, 0.2, engine=load_engine("vllm"))["output_tokens_per_s"] * 0.95


def test_engines_are_compared_together() -> None:
    both = compared(engine=["vllm", "sglang"])
    alone = {name: compared(engine=name) for name in ("vllm", "sglang")}
    values = {name: one.best["tokens_per_s_per_gpu"] for name, one in alone.items() if one.best is not None}
    assert both.best is not None and both.best["tokens_per_s_per_gpu"] == pytest.approx(max(values.values()))
    assert both.engine.name == both.best["engine"] == max(values, key=lambda name: values[name])
    for name, value in values.items():
        mine = both.candidates[(both.candidates["engine"] == name) & both.candidates["meets"]]
        assert mine["tokens_per_s_per_gpu"].max() == pytest.approx(value)


@pytest.mark.parametrize(("asked", "says"), [
    ({"request_rate": -5.0}, "request_rate -5.0: must be a number more than 0"),
    ({"users": 0}, "users 0: must be a number more than 0"),
    ({"budget": 3.0}, "budget 3: pays for no h100-sxm at 6.88 USD per GPU hour"),
    ({"budget": 300.0, "device": "h20"}, "budget 300: no price per GPU hour is known for h20; use prices"),
    ({"confidence": 1.0}, "confidence 1: must be a chance of at least 0.5 and less than 1"),
    ({"engine": ["vllm", "vllm==0.24.0"]}, "engine vllm,vllm: one release of vllm at a time"),
])  # fmt: skip
def test_what_cannot_be_asked_is_one_line(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(tc.InputError, match=f"^{says}"):
        compared(**asked)


def test_what_is_served_otherwise_errs_by_itself() -> None:
    """Sums that differ by a third are told apart where errors are shared, not where each may be a third off."""
    one, other = {"gemm": (1.0, 0.02)}, {"gemm": (1.3, 0.02)}
    assert not alike(one, other) and alike(one, other, (0.3, 0.3)) and not alike(one, other, (0.1, 0.1))


@pytest.mark.parametrize("kinds", [2, 5, 1000])
def test_the_front_is_what_no_other_beats(kinds: int) -> None:
    draw = np.random.default_rng(kinds)
    for size in (0, 1, 2, 7, 60):
        first, second = draw.integers(0, kinds, size) * 1.0, draw.integers(0, kinds, size) * 1.0
        points = list(zip(first, second, strict=True))
        beaten = [any(a >= x and b >= y and (a, b) != (x, y) for a, b in points) for x, y in points]
        again = [point in points[:i] for i, point in enumerate(points)]  # of equal ones the first stands
        assert pareto(first, second).tolist() == [not one and not two for one, two in zip(beaten, again, strict=True)]
