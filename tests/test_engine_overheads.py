"""What engines do beside their kernels: read from profiles, fitted to served runs, kept apart from the score."""

from __future__ import annotations

import math
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
from tensorcast.calibrate.generated_blocks import MARKER, read_engine, write_fit
from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.layout import Layout
from tensorcast.errors import InputError
from tensorcast.predict.error_causes import attribute
from tensorcast.predict.predict import predict
from tensorcast.predict.score import fitted_half, left_out, named, same_run, summarise
from tensorcast.profiles.engine import DeviceFit, EngineFit, EngineProfile
from tensorcast.profiles.store import load_device, load_engine, load_model

SAMPLE = Path(__file__).parent / "data" / "serving_sample.csv"
PROFILES = Path(__file__).parent.parent / "profiles" / "engines"
FIT = EngineFit(
    source="by hand", rows=9, models=2, step_s=1e-3, step_error_s=2e-4, first_token_s=0.05, prompt_token_s=2e-6,
    devices={"h100-sxm": DeviceFit(step_s=2e-3, rows=9, models=("a",))},
)  # fmt: skip


def fitted(name: str = "vllm", fit: EngineFit | None = FIT) -> EngineProfile:
    return load_engine(name).model_copy(update={"fitted": fit})


def test_overhead_of_a_device_comes_before_the_engines_and_the_published_one() -> None:
    engine = fitted()
    request_s = float(engine.request_overhead_s or 0.0)
    here = engine.overhead("h100-sxm")
    assert (here.step_s, here.request_s) == pytest.approx((2e-3, request_s))
    assert engine.overhead("gb200").step_s == 1e-3 and engine.overhead("gb200").error_s == 2e-4
    published = fitted(fit=None)
    assert published.overhead("h100-sxm").step_s == float(published.step_overhead_s)
    assert engine.first_token_s(0) == 0.05 and engine.first_token_s(1000) == pytest.approx(0.052)
    assert published.first_token_s(1000) == published.hand_over_s == 0.0


@pytest.mark.parametrize(
    "wrong", [{"step_s": -1e-3}, {"devices": {"h100-sxm": {"step_s": 1e-3, "row": 3}}}, {"source": ""}, {"steps": 1}]
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
    sure = deploy(model, device, fitted(fit=FIT.model_copy(update={"step_error_s": 0.0})), Layout(1), "decode")
    unsure = deploy(model, device, fitted(), Layout(1), "decode")
    one, other = (d.step.price(8.0, 1.0, 1000.0) for d in (sure, unsure))
    assert one.seconds == other.seconds
    errors = [float(price.error * price.seconds) for price in (one, other)]
    kernels_s = sum(float(p.seconds) * n for p, n in one.calls)
    scale = kernels_s + float(one.overhead_s)  # errors count kernels as if none ran beside others
    assert errors[1] ** 2 - errors[0] ** 2 == pytest.approx((2e-4 * float(one.seconds) / scale) ** 2)


RUN = st.tuples(st.floats(1, 9), st.floats(0.1, 2), st.floats(1, 20), st.floats(0.1, 3))


@given(st.lists(RUN, min_size=1, max_size=9))
def test_least_off_against_brute_force(runs: list[tuple[float, float, float, float]]) -> None:
    base, slope, measured, weight = np.array(runs).T

    def off(seconds: Any) -> Any:
        return np.abs((base + np.multiply.outer(seconds, slope)) / measured - 1) @ weight

    best = off(engine_fit.least_off(base, slope, measured, weight))
    assert best <= off(np.linspace(0, 200, 20001)).min() + 1e-9


def synthetic(step_s: float, first_s: float, slower: float = 1.0) -> pd.DataFrame:
    """Runs of two models as they would be measured if an engine took so much more than its kernels.

    ``slower``: prompts under load on an H100.
    """
    rows = [
        {"model": model, "device": device, "engine": "vllm", "tp": tp, "isl": isl, "osl": osl, "concurrency": users}
        for model, device in (("llama-3.1-8b", "h100"), ("llama-3.1-8b", "h200"), ("qwen3-30b-a3b", "h100"))
        for tp, isl, osl in (("1", "128", "1024"), ("1", "256", "1024"), ("2", "128", "512"), ("2", "192", "1024"))
        for users in ("1", "4", "16", "64")
    ]
    table = pd.DataFrame(rows)
    devices = {"h100-sxm": DeviceFit(step_s=step_s, rows=1, models=(), prefill_factor=slower)}
    fitted = {"step_s": step_s, "first_token_s": first_s, "prompt_token_s": 2e-5, "devices": devices}
    true = engines.with_fit(load_engine("vllm"), **fitted)
    times = engines.served_times(engines.read_runs(table), lambda name: true)
    return table.assign(measured_tpot_s=times["tpot_s"], measured_ttft_s=times["ttft_s"])


@pytest.fixture(scope="module")
def measured() -> pd.DataFrame:
    return synthetic(1.7e-3, 0.033)


def fit(table: pd.DataFrame) -> EngineFit:
    return engines.fit_engines(engines.read_runs(table), {"vllm": load_engine("vllm")}, "synthetic")["vllm"]


def test_known_overheads_are_found(measured: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_fit, "WEIGHTS", (engine_fit.Weights(0.0, 0.0),))
    found = fit(measured)
    assert found.step_s == pytest.approx(1.7e-3, rel=0.02)
    assert {name for name in found.devices} == {"h100-sxm", "h200-sxm"}
    assert all(one.step_s == pytest.approx(1.7e-3, rel=0.02) for one in found.devices.values())
    assert found.first_token_s == pytest.approx(0.033, abs=1e-3) and found.hand_over_s is None
    assert found.prompt_token_s == pytest.approx(2e-5, abs=2e-6)
    assert found.left_out_before is not None and found.left_out_before > 0.1
    assert found.left_out_error is not None and found.left_out_error < 0.005
    assert found.unseen_error is not None and found.unseen_error < 0.005 and found.step_error_s < 5e-5


def test_slower_prompts_are_found_per_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 whose steps with prompts take 1.4 times their kernels, beside an H200 that takes what they say."""
    monkeypatch.setattr(engine_fit, "WEIGHTS", (engine_fit.Weights(0.0, 0.0),))
    found = fit(synthetic(1.7e-3, 0.033, slower=1.4))
    assert found.devices["h100-sxm"].prefill_factor == pytest.approx(1.4, abs=0.05)
    assert found.devices["h200-sxm"].prefill_factor == pytest.approx(1.0, abs=0.02)
    assert found.devices["h100-sxm"].prefill_error < 0.05
    assert found.left_out_error is not None and found.left_out_error < 0.01


@pytest.mark.parametrize("form", ["agg", "disagg"])
def test_prompts_under_load_take_their_factor(form: str) -> None:
    """The first token of one user, alone, comes later by as much as prompts are slower; a token of a reply does not."""
    row = {"model": "llama-3.1-8b", "device": "h100", "engine": "vllm", "mode": form, "isl": "8000", "osl": "64",
           "concurrency": "1", "tp": "1", "prefill_tp": "1", "decode_tp": "1"}  # fmt: skip
    runs = engines.read_runs(pd.DataFrame([row]).assign(measured_tpot_s="1", measured_ttft_s="1"))
    plain, slow = (
        engines.with_fit(
            load_engine("vllm"), devices={"h100-sxm": DeviceFit(step_s=1e-4, rows=1, models=(), prefill_factor=factor)}
        )
        for factor in (1.0, 1.5)
    )
    one, other = (engines.served_times(runs, {"vllm": engine}.__getitem__).iloc[0] for engine in (plain, slow))
    prefill = deploy(load_model("llama-3.1-8b"), load_device("h100"), plain, Layout(1), "prefill")
    step_s = float(prefill.step.price(1.0, 8000.0, 0.0).seconds)
    assert other["ttft_s"] - one["ttft_s"] == pytest.approx(0.5 * step_s, rel=2e-3)
    assert other["tpot_s"] == pytest.approx(one["tpot_s"], rel=0.01)  # decoding a smaller share of the time


def test_few_networks_are_drawn_towards_what_is_published(
    measured: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_fit, "WEIGHTS", (engine_fit.Weights(8.0, 2.0),))
    found, published = fit(measured), float(load_engine("vllm").step_overhead_s)
    # two networks beside eight published ones; one network on an H200 beside two of the engine's value
    assert found.step_s == pytest.approx((2 * 1.7e-3 + 8 * published) / 10, rel=0.03)
    assert found.devices["h200-sxm"].step_s == pytest.approx((1.7e-3 + 2 * found.step_s) / 3, rel=0.03)


def synthetic_small(own_s: dict[str, float]) -> pd.DataFrame:
    """Runs at small batch of networks whose steps take 4 ms and so much more, on one device each."""
    rows = [
        {"engine": "vllm", "device": f"d{i % 2}", "network": i, "even": True, "same": 100 * i + n, "base_s": base_s,
         "slope": 1.0, "measured_tpot_s": base_s + seconds}
        for i, seconds in enumerate(own_s.values()) for n, base_s in enumerate((4e-3, 5e-3, 6e-3))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_weights_are_those_that_serve_networks_not_fitted_to() -> None:
    """Networks that agree are believed; of networks that disagree wildly none says anything about the next."""
    agreed = synthetic_small(dict.fromkeys("abcd", 2e-3))
    assert engine_fit.choose(agreed, 1e-4) == engine_fit.WEIGHTS[-1]
    torn = synthetic_small({"a": 0.0, "b": 8e-3, "c": 0.0, "d": 0.0, "e": 0.0, "f": 0.0})
    assert math.isinf(engine_fit.choose(torn, 0.0).published)
    assert engine_fit.choose(agreed[agreed["network"] == 0], 1e-4) == engine_fit.WEIGHTS[0]


def test_runs_left_out_do_not_move_the_fit(measured: pd.DataFrame) -> None:
    """Whatever was measured on the other half, the fit is the same, and so is it if a run is recorded twice."""
    rows = engines.read_runs(measured)
    assert 0 < rows["even"].sum() < len(rows)
    wild = measured.copy()
    wild.loc[~rows["even"].to_numpy(), ["measured_tpot_s", "measured_ttft_s"]] *= 5.0
    scores = {"left_out_before", "left_out_error", "unseen_before", "unseen_error"}
    assert fit(wild).model_dump(exclude=scores) == fit(measured).model_dump(exclude=scores)
    odd = measured[~rows["even"].to_numpy()].assign(measured_tpot_s=9.0)
    assert fit(measured).step_s == fit(pd.concat([measured, measured[rows["even"].to_numpy()], odd])).step_s


def test_a_few_strange_runs_do_not_drag_the_fit(measured: pd.DataFrame) -> None:
    even = np.flatnonzero(engines.read_runs(measured)["even"])
    strange = measured.copy()
    strange.loc[even[::6], "measured_tpot_s"] *= 0.4  # as if these drafted tokens
    assert fit(strange).step_s == pytest.approx(fit(measured).step_s, rel=0.15)


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
    beside = load_engine("vllm").overhead("h100-sxm")
    kernels = 1 - (beside.step_s + beside.request_s * frame["mean_batch"]) / frame["tpot_s"]
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
