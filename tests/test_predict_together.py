"""Rows that are served together have the numbers that each of them has alone."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from one_deployment import One, aggregated, disaggregated

from tensorcast.cost.kernels.corrections import BatchedCorrections, corrections_for
from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.step.many import sums_of_many
from tensorcast.deploy.step.step import Asked, prices
from tensorcast.errors import InputError
from tensorcast.predict import serve_runs
from tensorcast.predict.predict import predict
from tensorcast.predict.run_columns import Run, read_run
from tensorcast.predict.serve_runs import serve
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.serving.traffic import Traffic

ROWS = 60
LAYOUTS = {
    "deepseek-v3": ("8 1 8 1", "8 2 16 1", "1 16 16 1", "4 4 1 2", "16 1 16 1"),
    "gpt-oss-120b": ("1 1 1 1", "2 1 1 1", "1 4 4 1", "2 1 2 2", "5 1 1 1"),
    "llama-3.1-8b": ("1 1 1 1", "2 1 1 1", "1 2 1 2", "8 1 1 1"),
}


def layout(dice: random.Random, model: str, role: str = "") -> dict[str, str]:
    sizes = dice.choice(LAYOUTS[model]).split()
    return {f"{role}{name}": size for name, size in zip(("tp", "dp", "ep", "pp"), sizes, strict=True)}


def some_row(dice: random.Random) -> dict[str, Any]:
    """A row of few deployments, now and then one that cannot be."""
    model = dice.choice(list(LAYOUTS))
    row: dict[str, Any] = {
        "model": model, "device": dice.choice(("h200", "mi300x")), "engine": dice.choice(("vllm", "sglang")),
        "isl": int(2 ** dice.uniform(0, 15)), "osl": int(2 ** dice.uniform(0, 12)),
        "concurrency": round(2 ** dice.uniform(-7, 12), 3), "length_ratio": dice.choice((0.5, 1)),
        "prefix_cached": dice.choice((0, 0, 100)), "replicas": 1, "kv_dtype": dice.choice(("", "fp8")),
    }  # fmt: skip
    if model == "deepseek-v3":
        row |= {"mtp_depth": dice.choice((0, 0, 1, 2)), "routing": dice.choice(("uniform", "balanced", "zipf:0.5"))}
    if dice.random() < 0.6:
        return {**row, **layout(dice, model), "replicas": dice.choice((1, 2)), "chunk_tokens": dice.choice(("", 512))}
    pools = {"prefill_workers": dice.randint(1, 3), "decode_workers": dice.randint(1, 3)}
    return {**row, "mode": "disagg", **pools, **layout(dice, model, "prefill_"), **layout(dice, model, "decode_")}


def alone(run: Run) -> One:
    """The run by the functions that serve one load."""
    mean = (1 + run.length_ratio) / 2
    engine = load_engine(run.engine)
    profiles = load_model(run.model), load_device(run.device), engine if run.mode == "aggregated" else engine.in_pools()
    traffic = Traffic(
        input_len=max(1, round(run.isl * mean)), output_len=max(1, round(run.osl * mean)),
        concurrency=run.concurrency / run.replicas, prefix_cached=run.prefix_cached,
        mtp_acceptance=run.mtp_acceptance, spread=(1 - run.length_ratio) / (1 + run.length_ratio),
        rounds=run.rounds, wait_steps=run.wait_steps,
    )  # fmt: skip
    decode = deploy(*profiles, run.decode, "decode", options=run.options)
    plain = Options(**{**vars(run.options), "mtp_depth": 0})
    prefill = deploy(*profiles, run.prefill, "prefill", options=plain)
    if run.mode == "aggregated":
        return aggregated(prefill, decode, traffic, run.chunk_tokens)
    return disaggregated(prefill, decode, *run.workers, traffic)


def test_together_as_alone() -> None:
    """Random rows, served in one call and each by itself; as records, which say how many may run."""
    dice = random.Random(5)
    read = (read_run({k: v for k, v in some_row(dice).items() if v != ""}) for _ in range(ROWS))
    runs = [replace(run, unlimited=True) for run in read]
    problems = 0
    for run, served in zip(runs, serve(runs), strict=True):
        try:
            one = alone(run)
        except InputError as error:
            assert served.problem == str(error)
            problems += 1
            continue
        assert served.problem == one.problem
        for name in ("ttft_s", "tpot_s", "output_tokens_per_s", "batch", "ttft_error", "tpot_error", "decode_step_s"):
            assert getattr(served, name) == pytest.approx(getattr(one, name), rel=1e-12, nan_ok=True), (name, run)
        assert served.evidence == pytest.approx(one.evidence, rel=1e-12, abs=1e-15)
    assert 0 < problems < ROWS / 2


def test_a_row_does_not_depend_on_the_others() -> None:
    dice = random.Random(7)
    rows = pd.DataFrame([some_row(dice) for _ in range(12)]).astype(object).where(lambda f: f.notna(), "")
    whole = predict(rows)
    for i in (0, 5, 11):
        one, same = predict(rows.iloc[[i]]).iloc[0], whole.iloc[i]
        assert one["problem"] == same["problem"]
        for name in ("ttft_s", "tpot_high_s", "output_tokens_per_s", "mean_batch", "share_measured"):
            assert one[name] == pytest.approx(same[name], rel=1e-12, nan_ok=True)


def test_rows_are_served_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deployments are held for so many rows alone, of which none may be served; the numbers stay."""
    dice, together = random.Random(9), list[int]()
    runs = [read_run({k: v for k, v in some_row(dice).items() if v != ""}) for _ in range(12)]
    whole, served = serve(runs), serve_runs._served

    def counted(rows: Any, fits: Any) -> Any:
        together.append(len(rows))
        return served(rows, fits)

    monkeypatch.setattr(serve_runs, "_served", counted)
    monkeypatch.setattr(serve_runs, "TOGETHER", 1)
    for one, other in zip(serve(runs), whole, strict=True):
        assert one.problem == other.problem
        assert one.request_s == pytest.approx(other.request_s, rel=1e-12, nan_ok=True)
    assert together == [1] * sum(not one.problem for one in whole) and len(together) < len(runs)


def test_steps_priced_ahead_are_priced_the_same() -> None:
    """Layers of several kinds, pipeline stages, drafts and chunks: every row's seconds, and the rows themselves."""
    model, device = load_model("deepseek-v3"), load_device("h200")
    asked: list[Asked] = []
    for sizes, options in (
        (Layout(16, 8, 1, 8, 2), Options()),
        (Layout(16, 1, 16, 16), Options(mtp_depth=2)),
        (Layout(16, 2, 8, 16), Options(chunk_tokens=64)),
    ):
        step = deploy(model, device, load_engine("sglang"), sizes, "decode", options=options).step
        asked.append((step, np.array([[1.0, 7.5, 300.0]]), 1.0, np.array([[100.0], [5000.0]])))
    for (step, *at), found in zip(asked, prices(asked), strict=True):
        wanted = step.price(*at)
        assert [p.row.module for p in found.rows] == [p.row.module for p in wanted.rows]
        for one, other in zip(found.rows, wanted.rows, strict=True):
            # rows that are no longer for more cached tokens may stand once, or once for each of their numbers
            own, alone = np.broadcast_arrays(one.seconds, other.seconds)
            np.testing.assert_allclose(own, alone, rtol=1e-13)
        np.testing.assert_allclose(found.seconds, wanted.seconds, rtol=1e-13)


def test_corrections_found_later_are_those_asked_at_once() -> None:
    corrections = corrections_for(load_device("h200"), "vllm")
    later, random_sizes = BatchedCorrections(corrections), np.random.default_rng(0)
    waiting = []
    for n in (1024, 4096, 1024):
        for m in (17.0, random_sizes.uniform(1, 9000, 5), random_sizes.uniform(1, 99, (2, 3))):
            sizes = {"m": m, "n": float(n), "k": 7168.0, "batch": 1.0}
            waiting.append((later.at("gemm", "bf16", "", sizes), corrections.at("gemm", "bf16", "", sizes)))
    later.find()
    for found, wanted in waiting:
        assert found is not None and wanted is not None
        assert (found.engine, found.variant) == (wanted.engine, wanted.variant)
        np.testing.assert_allclose(found.factor, wanted.factor, rtol=1e-14)
        assert np.array_equal(found.level, wanted.level) and np.shape(found.error) == np.shape(wanted.error)
    assert later.at("gemm", "no such dtype", "", {"m": 1.0, "n": 1.0, "k": 1.0}) is None


def test_rows_of_all_models_and_both_phases_are_priced_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []

    def counted(asked: Any) -> Any:
        passes.append(len(asked))
        return sums_of_many(asked)

    monkeypatch.setattr(serve_runs, "sums_of_many", counted)
    dice = random.Random(3)
    found = predict(pd.DataFrame([some_row(dice) for _ in range(12)]), jobs=1)
    served = found[found["problem"] == ""]
    assert len(passes) == 1 and passes[0] > len(served["layout"].unique())
