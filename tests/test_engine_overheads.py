"""What engines do beside their kernels: read from profiles, fitted to served runs, kept apart from the score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tensorcast.calibrate.engines import overheads as engines
from tensorcast.calibrate.engines import statistics as engine_fit
from tensorcast.calibrate.engines.left_out import ALL, LEFT_OUT, leave_out, page
from tensorcast.calibrate.generated_blocks import MARKER, read_engine, write_fit
from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.layout import Layout
from tensorcast.errors import InputError
from tensorcast.predict.error_causes import attribute
from tensorcast.predict.predict import predict
from tensorcast.predict.score import fitted_half, left_out, named, same_run, summarise
from tensorcast.profiles.engine import EngineFit, EngineProfile
from tensorcast.profiles.store import load_device, load_engine, load_model

SAMPLE = Path(__file__).parent / "data" / "serving_sample.csv"
PROFILES = Path(__file__).parent.parent / "profiles" / "engines"
FIT = EngineFit(
    source="by hand", rows=9, models=2, layer_s=2e-5, layer_error_s=5e-6, prefill_factor=1.3, first_token_s=0.05,
    prompt_token_s=2e-6, served={"h100-sxm": ("a",)},
)  # fmt: skip


def fitted(name: str = "vllm", fit: EngineFit | None = FIT) -> EngineProfile:
    return load_engine(name).model_copy(update={"fitted": fit})


def test_what_was_fitted_stands_beside_what_is_published() -> None:
    engine, published = fitted(), fitted(fit=None)
    assert (engine.overhead.layer_s, engine.overhead.prefill_factor) == (2e-5, 1.3)
    assert (published.overhead.layer_s, published.overhead.prefill_factor) == (0.0, 1.0)
    assert engine.overhead.step_s == published.overhead.step_s == float(published.step_overhead_s)
    assert engine.first_token_s(0) == 0.05 and engine.first_token_s(1000) == pytest.approx(0.052)
    assert published.first_token_s(1000) == published.hand_over_s == 0.0


@pytest.mark.parametrize("pp", [1, 4])
def test_a_step_takes_its_layers_overhead_once(pp: int) -> None:
    """32 layers, on one stage or on four after another."""
    model, device = load_model("llama-3.1-8b"), load_device("h100")
    one, other = (
        deploy(model, device, fitted(fit=fit), Layout(pp, pp=pp), "decode").step.price(8.0, 1.0, 1000.0)
        for fit in (None, FIT)
    )
    assert float(other.seconds - one.seconds) == pytest.approx(32 * 2e-5)
    assert float(other.overhead_s - one.overhead_s) == pytest.approx(32 * 2e-5)
    assert float(other.request_overhead_s) == pytest.approx(8 * float(load_engine("vllm").request_overhead_s or 0.0))


@pytest.mark.parametrize(
    "wrong", [{"layer_s": -1e-3}, {"served": {"h100-sxm": 3}}, {"source": ""}, {"steps": 1}]
)
def test_a_fit_that_cannot_be_is_refused_in_one_line(tmp_path: Path, wrong: dict[str, Any]) -> None:
    fields = yaml.safe_load((PROFILES / "vllm.yaml").read_text())
    fields["fitted"] = {**FIT.model_dump(mode="json"), **wrong}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(fields))
    with pytest.raises(InputError, match="fitted") as caught:
        load_engine(tmp_path / "mine.yaml")
    assert "\n" not in str(caught.value)


def test_a_steps_error_holds_that_of_the_overhead() -> None:
    """Errors of kernels and overhead are independent: their squares add up, in seconds."""
    model, device = load_model("llama-3.1-8b"), load_device("h100")
    sure = deploy(model, device, fitted(fit=FIT.model_copy(update={"layer_error_s": 0.0})), Layout(1), "decode")
    unsure = deploy(model, device, fitted(), Layout(1), "decode")
    one, other = (d.step.price(8.0, 1.0, 1000.0) for d in (sure, unsure))
    assert one.seconds == other.seconds
    errors = [float(price.error * price.seconds) for price in (one, other)]
    kernels_s = sum(float(p.seconds) * n for p, n in one.calls)
    scale = kernels_s + float(one.overhead_s)  # errors count kernels as if none ran beside others
    assert errors[1] ** 2 - errors[0] ** 2 == pytest.approx((32 * 5e-6 * float(one.seconds) / scale) ** 2)


RUN = st.tuples(st.floats(1, 9), st.floats(0.1, 2), st.floats(1, 20), st.floats(0.1, 3))


@given(st.lists(RUN, min_size=1, max_size=9))
def test_least_off_against_brute_force(runs: list[tuple[float, float, float, float]]) -> None:
    base, slope, measured, weight = np.array(runs).T

    def off(seconds: Any) -> Any:
        return np.abs((base + np.multiply.outer(seconds, slope)) / measured - 1) @ weight

    best = off(engine_fit.least_off(base, slope, measured, weight))
    assert best <= off(np.linspace(0, 200, 20001)).min() + 1e-9


TWO = st.tuples(st.floats(0.5, 9), st.floats(0.5, 9), st.floats(0.1, 2), st.floats(0.1, 2), st.floats(2, 20))


@given(st.lists(TWO, min_size=2, max_size=9))
def test_two_constants_together_against_brute_force(runs: list[tuple[float, ...]]) -> None:
    base, weight, slope, other, measured = np.array(runs).T

    def off(first: Any, second: Any) -> Any:
        added = base + np.multiply.outer(first, slope) + np.multiply.outer(second, other)
        return np.abs(added / measured - 1) @ weight

    grid = np.linspace(0, 40, 201)
    best = off(*engine_fit.least_off_by_two(base, slope, other, measured, weight))
    assert best <= min(off(grid, second).min() for second in grid) + 1e-6


def synthetic(layer_s: float, first_s: float, slower: float = 1.0) -> pd.DataFrame:
    """Runs of two models as they would be measured if an engine took so much more than its kernels.

    ``slower``: steps with prompts under load.
    """
    rows = [
        {"model": model, "device": device, "engine": "vllm", "tp": tp, "isl": isl, "osl": osl, "concurrency": users}
        for model, device in (("llama-3.1-8b", "h100"), ("llama-3.1-8b", "h200"), ("qwen3-30b-a3b", "h100"))
        for tp, isl, osl in (
            ("1", "1024", "512"), ("1", "128", "512"), ("2", "512", "128"), ("2", "2048", "128"), ("1", "2048", "128"),
            ("1", "512", "256"),
        )
        for users in ("1", "8", "64")
    ]
    table = pd.DataFrame(rows)
    fitted = {"layer_s": layer_s, "first_token_s": first_s, "prompt_token_s": 2e-5, "prefill_factor": slower}
    true = engines.with_fit(load_engine("vllm"), **fitted)
    times = engines.served_times(engines.read_runs(table), lambda name: true)
    return table.assign(measured_tpot_s=times["tpot_s"], measured_ttft_s=times["ttft_s"])


@pytest.fixture(scope="module")
def measured() -> pd.DataFrame:
    return synthetic(4e-5, 0.033, slower=1.4)


def told(table: pd.DataFrame) -> engines.Told:
    return engines.told(engines.read_runs(table), {"vllm": load_engine("vllm")})


def fit(table: pd.DataFrame) -> EngineFit:
    return engines.fit_engines(told(table), "synthetic")["vllm"]


def test_known_overheads_are_found(measured: pd.DataFrame) -> None:
    found = fit(measured)
    assert found.layer_s == pytest.approx(4e-5, rel=0.05)
    assert found.prefill_factor == pytest.approx(1.4, abs=0.02)
    assert found.layer_error_s < 2e-6 and found.prefill_error < 0.02
    assert found.first_token_s == pytest.approx(0.033, abs=5e-3) and found.hand_over_s is None
    assert set(found.served) == {"h100-sxm", "h200-sxm"} and found.served["h200-sxm"] == ("llama-3.1-8b",)
    assert found.left_out_before is not None and found.left_out_before > 0.1
    assert found.left_out_error is not None and found.left_out_error < 0.05
    assert found.unseen_error is not None and found.unseen_error < 0.05


def test_decode_steps_of_pools_are_told_by_pools_alone(measured: pd.DataFrame) -> None:
    """Steps of a decode server take 1.2 times as long; of runs that may have drafted only the slower of two alike tell,
    and what aggregated runs tell stays."""
    pools = pd.DataFrame([
        {"model": "llama-3.1-8b", "device": device, "engine": "vllm", "mode": "disagg", "tp": "1", "isl": isl,
         "osl": osl, "concurrency": users, "prefill_workers": "1", "decode_workers": "2"}
        for device in ("h100", "h200") for isl in ("256", "1024") for osl in ("128", "256", "512")
        for users in ("2", "8", "32", "64")
    ])  # fmt: skip
    true = engines.with_fit(load_engine("vllm"), layer_s=4e-5, first_token_s=0.033, prefill_factor=1.2, pool_factor=1.2)
    times = engines.served_times(engines.read_runs(pools), lambda name: true)
    pools = pools.assign(measured_tpot_s=times["tpot_s"], measured_ttft_s=times["ttft_s"])
    found, plain = fit(pd.concat([measured, pools], ignore_index=True)), fit(measured)
    assert found.pool_factor == pytest.approx(1.2, abs=0.03) and plain.pool_factor == 1.0
    assert found.hand_over_s is None  # behind the engine's own router
    behind = fit(pd.concat([measured, pools.assign(frontend="dynamo", measured_ttft_s=times["ttft_s"] + 0.25)]))
    assert behind.hand_over_s == pytest.approx(0.25, abs=0.02) and behind.pool_factor == found.pool_factor
    assert found.layer_s == pytest.approx(plain.layer_s) and found.prefill_factor == plain.prefill_factor
    other = measured.assign(engine="sglang")  # of whose pools nothing was measured
    known = engines.read_runs(pd.concat([measured, pools, other], ignore_index=True))
    fits = engines.told(known, {name: load_engine(name) for name in ("vllm", "sglang")}).fits("synthetic")
    assert fits["sglang"].pool_factor == fits["vllm"].pool_factor > 1.1
    table = pd.DataFrame({"steps_s": 1.0, "measured_tpot_s": [1.2] * 8 + [0.5] * 8, "drafting": True, "even": True,
                          "alike": [*range(8)] * 2, "same": range(16)})  # fmt: skip
    assert engines._slower_in_pools(table) == pytest.approx(0.2)
    assert engines._slower_in_pools(table[table["measured_tpot_s"] < 1]) == 0.0  # none is slower: all may have drafted


def test_a_model_left_out_is_served_by_what_the_others_tell(measured: pd.DataFrame) -> None:
    """Both models have the same constants here, so that each is told by the other; a wrong one misleads the other."""
    found = leave_out(told(measured), ("network",), engines.served_times)
    assert set(found["new"]) == {1}
    assert set(found["what"]) == {"llama-3.1-8b", "qwen3-30b-a3b"} and len(found) == len(measured)
    assert (found["tpot_s"] - 1).abs().median() < 0.03
    wrong = measured.assign(measured_tpot_s=measured["measured_tpot_s"] * 1.5)
    misled = wrong.where(wrong["model"] == "qwen3-30b-a3b", measured)
    by_model = leave_out(told(misled), ("network",), engines.served_times).groupby("what")["tpot_s"].median()
    assert abs(by_model["llama-3.1-8b"] - 1) > 0.1
    left = {column: leave_out(told(measured), (column,), engines.served_times) for column in ("network", "device")}
    assert leave_out(told(measured), tuple(LEFT_OUT), engines.served_times).empty  # one release: nothing is left
    within = leave_out(told(measured), (), engines.served_times)
    assert set(within["new"]) == {0} and len(within) == len(measured)
    left["release"] = left[ALL] = found
    text = page(left, {"vllm": load_engine("vllm")}, "runs")
    assert "## Devices left out" in text and "| h200-sxm | vllm | 18 |" in text


@pytest.mark.parametrize("form", ["agg", "disagg"])
def test_prompts_under_load_take_their_factor(form: str) -> None:
    """The first token of one user, alone, comes later by as much as prompts are slower; a token of a reply does not."""
    row = {"model": "llama-3.1-8b", "device": "h100", "engine": "vllm", "mode": form, "isl": "8000", "osl": "64",
           "concurrency": "1", "tp": "1", "prefill_tp": "1", "decode_tp": "1"}  # fmt: skip
    runs = engines.read_runs(pd.DataFrame([row]).assign(measured_tpot_s="1", measured_ttft_s="1"))
    plain, slow = (engines.with_fit(load_engine("vllm"), prefill_factor=factor) for factor in (1.0, 1.5))
    one, other = (engines.served_times(runs, {"vllm": engine}.__getitem__).iloc[0] for engine in (plain, slow))
    prefill = deploy(load_model("llama-3.1-8b"), load_device("h100"), plain, Layout(1), "prefill")
    step_s = float(prefill.step.price(1.0, 8000.0, 0.0).seconds)
    assert other["ttft_s"] - one["ttft_s"] == pytest.approx(0.5 * step_s, rel=2e-3)
    assert other["tpot_s"] == pytest.approx(one["tpot_s"], rel=0.01)  # decoding a smaller share of the time


def test_an_engine_is_drawn_towards_all_engines_networks() -> None:
    """By hand: the median of the engine's networks beside four times that of all; one left out counts in neither."""
    own = {
        ("vllm", "h100", 0): engine_fit.Own(4e-5, 0.2), ("vllm", "h200", 1): engine_fit.Own(2e-5, 0.4),
        ("sglang", "h100", 0): engine_fit.Own(1e-5, 0.1), ("sglang", "h100", 2): engine_fit.Own(3e-5, 0.9),
        ("trtllm", "h100", 3): engine_fit.Own(0.0, 0.3),
    }  # fmt: skip
    assert engine_fit.drawn(own, "vllm") == pytest.approx(((2 * 3e-5 + 4 * 2e-5) / 6, (2 * 0.2 + 4 * 0.3) / 6))
    assert engine_fit.drawn(own, "unheard of") == pytest.approx((2e-5, 0.3))
    left = engine_fit.without(own, network=0)
    assert engine_fit.drawn(left, "vllm") == pytest.approx(((2e-5 + 4 * 2e-5) / 5, 0.4))
    assert set(engine_fit.without(own, device="h100")) == {("vllm", "h200", 1)}
    assert engine_fit.drawn({}, "vllm") == (0.0, 0.0)


@pytest.mark.parametrize(("kernels_s", "left_s"), [(0.0, 10e-6), (6e-6, 8e-6), (12e-6, 0.0)])
def test_what_kernels_err_by_is_no_distance_between_networks(kernels_s: float, left_s: float) -> None:
    """By hand: each of four networks is 10 us per layer from what the other three say."""
    moves = engine_fit.Beside(kernels_s, 0.0)
    own = {("vllm", "h100", n): engine_fit.Own(s, 0.0, moves) for n, s in enumerate((1e-5, 2e-5, 2e-5, 1e-5))}
    assert engine_fit.distances(own).layer_s == pytest.approx(left_s)


def test_a_factor_that_kernels_errors_move_by_far_counts_for_nothing() -> None:
    """Of networks whose runs hold few prompts: others' factor is taken, and how far it lies from them is no news."""
    sure, anything = engine_fit.Beside(0.0, 0.01), engine_fit.Beside(0.0, 2.0)
    own = {
        ("vllm", "h100", 0): engine_fit.Own(1e-5, 0.2, sure), ("vllm", "h100", 1): engine_fit.Own(1e-5, 0.2, sure),
        ("vllm", "h100", 2): engine_fit.Own(1e-5, 6.0, anything),
        ("vllm", "h200", 3): engine_fit.Own(1e-5, 5.0, anything),
    }  # fmt: skip
    assert engine_fit.drawn(own, "vllm").slower == pytest.approx(0.2)
    assert engine_fit.drawn({key: one for key, one in own.items() if key[2] > 1}, "vllm").slower > 1
    assert engine_fit.distances(own).slower == 0.0


def test_a_network_counts_once_however_often_it_was_measured() -> None:
    rows = pd.DataFrame({"network": [0] * 30 + [1] * 3 + [2] * 3, "same": range(36), "even": True})
    meant = np.repeat([0.30, 0.10, 0.12], [30, 3, 3])  # seconds to a first token that the networks tell
    weights = engine_fit.evenly(rows)
    assert weights.groupby(rows["network"]).sum().tolist() == pytest.approx([1.0, 1.0, 1.0])
    even = engine_fit.least_off(np.full(36, 1.0), np.ones(36), 1.0 + meant, weights)
    each = engine_fit.least_off(np.full(36, 1.0), np.ones(36), 1.0 + meant, engine_fit.once(rows))
    assert even == pytest.approx(0.12)
    assert each == pytest.approx(0.30)


def test_runs_left_out_do_not_move_the_fit(measured: pd.DataFrame) -> None:
    """Whatever was measured on the other half, the fit is the same, and so is it if a run is recorded twice."""
    rows = engines.read_runs(measured)
    assert 0 < rows["even"].sum() < len(rows)
    wild = measured.copy()
    wild.loc[~rows["even"].to_numpy(), ["measured_tpot_s", "measured_ttft_s"]] *= 5.0
    scores = {"left_out_before", "left_out_error", "unseen_before", "unseen_error"}
    assert fit(wild).model_dump(exclude=scores) == fit(measured).model_dump(exclude=scores)
    odd = measured[~rows["even"].to_numpy()].assign(measured_tpot_s=9.0)
    assert fit(measured).layer_s == fit(pd.concat([measured, measured[rows["even"].to_numpy()], odd])).layer_s


def test_a_few_strange_runs_do_not_drag_the_fit(measured: pd.DataFrame) -> None:
    """Least squares find less than nothing per layer with these (-79 %); of six choices like this one two matter."""
    even = np.flatnonzero(engines.read_runs(measured)["even"])
    strange = measured.copy()
    strange.loc[even[::6], "measured_tpot_s"] *= 0.4  # as if these drafted tokens
    assert fit(strange).layer_s == pytest.approx(fit(measured).layer_s, rel=0.2)


def test_too_few_runs_are_one_line(tmp_path: Path, measured: pd.DataFrame) -> None:
    path = tmp_path / "runs.csv"
    measured.head(3).to_csv(path, index=False)
    with pytest.raises(InputError, match="no engine has 8 measured runs"):
        engines.main(["--table", str(path), "--profiles", str(PROFILES.parent)])


@pytest.fixture(scope="module")
def sample() -> pd.DataFrame:
    return predict(pd.read_csv(SAMPLE, comment="#", dtype=str, keep_default_na=False).iloc[::3])


def test_no_run_is_both_fitted_to_and_scored(sample: pd.DataFrame) -> None:
    """Of the sample of the runs that the shipped overheads were fitted to."""
    frame = named(sample)
    fresh = left_out(frame)
    assert fresh.any() and not fresh.all()
    assert not (fitted_half(frame) & fresh).any()  # every model, device and engine of the sample was fitted to
    assert not set(same_run(frame)[fresh]) & set(same_run(frame)[~fresh])
    summary = summarise(sample)
    assert summary["left_out"]["tpot_s"]["rows"] == int(fresh.sum())
    # of another model nothing was fitted to, whatever its hash
    assert left_out(frame.assign(model="somebody/else")).all()
    assert not summarise(sample.assign(model_path="somebody/else"))["left_out"]
    # a copy of a run that was fitted to, under a name of the other half, is not fresh
    copy = frame[~fresh].assign(isl=frame["isl"].astype(str) + "0")
    both = pd.concat([frame, copy], ignore_index=True)
    assert not left_out(both)[len(frame) :].any()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_writing_a_fit_keeps_every_other_byte(tmp_path: Path, end: str) -> None:
    path = tmp_path / "vllm.yaml"
    hand = (PROFILES / "vllm.yaml").read_text().partition(MARKER)[0].rstrip() + "\n"
    path.write_bytes(hand.replace("\n", end).encode())
    write_fit(path, FIT)
    assert path.read_bytes().startswith(hand.replace("\n", end).encode()) and read_engine(path).fitted == FIT
    once = path.read_bytes()
    write_fit(path, FIT)
    assert path.read_bytes() == once
    path.write_text(hand + "fitted: {source: mine}\n")
    with pytest.raises(InputError, match="did not write"):
        write_fit(path, FIT)


def table_of_errors(kind: str, seed: int, rows: int = 160) -> pd.DataFrame:
    """A predicted table whose measured times differ for one known cause."""
    draw = np.random.default_rng(seed)
    frame = pd.DataFrame({
        "model": draw.choice(["llama-3.1-8b", "qwen3-30b-a3b"], rows), "device": "h100", "engine": "vllm",
        "mode": "aggregated", "layout": draw.choice(["tp1", "tp2"], rows), "isl": draw.choice(["512", "2048"], rows),
        "osl": "256", "concurrency": draw.integers(1, 200, rows), "assumed": "", "step_error": 0.02,
        "tpot_s": np.exp(draw.uniform(np.log(2e-3), np.log(0.1), rows)),
    })  # fmt: skip
    frame["mean_batch"] = draw.uniform(1, 100, rows)
    frame["decode_step_s"] = frame["tpot_s"] * draw.uniform(0.3, 1.0, rows)
    prompts = 1 - frame["decode_step_s"] / frame["tpot_s"]
    beside = load_engine("vllm").overhead
    layers = frame["model"].map({"llama-3.1-8b": 32, "qwen3-30b-a3b": 48})
    kernels = 1 - (beside.step_s + beside.layer_s * layers + beside.request_s * frame["mean_batch"]) / frame["tpot_s"]
    change: Any = {
        "step": 1e-3 / frame["tpot_s"], "batch": 2e-5 * frame["mean_batch"] / frame["tpot_s"], "prompts": prompts,
        "kernels": 0.3 * kernels * (frame["model"] == "llama-3.1-8b") * (frame["layout"] == "tp2"),
        "rest": draw.normal(0, 0.3, rows),
    }[kind]  # fmt: skip
    return frame.assign(measured_tpot_s=frame["tpot_s"] * np.exp(change))


@pytest.mark.parametrize("kind", ["step", "batch", "prompts", "kernels", "rest"])
def test_a_known_cause_is_named(kind: str) -> None:
    found = attribute(table_of_errors(kind, seed=7))
    shares = {name: part["share"] for name, part in found["parts"].items()} | {"rest": found["rest"]}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert max(shares, key=shares.__getitem__) == kind
    if kind == "rest":
        assert shares["rest"] > 0.8  # columns of noise get nothing
    else:
        assert found["parts"][kind]["alone"] > 0.95 and abs(shares["rest"]) < 0.05


def test_runs_that_do_not_say_what_ran_are_told_apart() -> None:
    frame = table_of_errors("rest", 1)
    open_rows = np.arange(len(frame)) < 24
    frame.loc[open_rows, "assumed"] = "workers 1 prefill, 2 decode"
    frame.loc[open_rows, "measured_tpot_s"] = frame["tpot_s"] * 5.0
    found = attribute(frame)
    others = np.abs(np.log(frame["measured_tpot_s"] / frame["tpot_s"]))[~open_rows]
    expected = 24 * (np.log(5.0) - others.mean()) / (24 * np.log(5.0) + others.sum())
    assert found["parts"]["record"]["share"] == pytest.approx(expected) and found["open_rows"] == 24
    assert attribute(frame.head(50)) == {}
