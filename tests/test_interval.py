"""Every verb tells one interval of one deployment, and it holds four in five of what may be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import tensorcast as tc
from tensorcast.predict.predict import bound, predict
from tensorcast.profiles.engine import EngineFit, EngineProfile
from tensorcast.profiles.store import load_engine
from tensorcast.serving.interval import POOLS_ERROR, SERVING_ERROR, served_interval


def test_compare_and_predict_tell_the_same_interval_of_a_deployment() -> None:
    """One engine and pools, at the users that each candidate serves, in a measurement without an end."""
    found = tc.compare("llama-3.1-8b", device="h100", world_size=4, input_len=2000, output_len=300, layouts=["tp1"])
    frame = found.candidates[np.log2(found.candidates["batch"]) % 1 == 0]  # batches that predict prices, too
    some = pd.concat([frame[frame["mode"] == mode].iloc[[0, -1]] for mode in ("aggregated", "disaggregated")])
    rows = pd.DataFrame({
        "model": "llama-3.1-8b", "device": some["device"], "engine": some["engine"], "mode": some["mode"],
        "isl": 2000, "osl": 300, "concurrency": some["concurrency"] / some["replicas"], "rounds": 1e12,
        "tp": some["tp"], "kv_dtype": some["kv_dtype"],
        "chunk_tokens": some["chunk_tokens"].fillna(float(found.tasks[0].scenario.own_chunk)),
        "prefill_workers": some["prefill_workers"].fillna(1), "decode_workers": some["decode_workers"].fillna(1),
    })  # fmt: skip
    predicted = predict(rows)
    assert (predicted["problem"] == "").all()
    for column in ("ttft_s", "ttft_low_s", "ttft_high_s", "tpot_s", "tpot_low_s", "tpot_high_s"):
        assert predicted[column].to_numpy() == pytest.approx(some[column].to_numpy(), rel=1e-5), column


def test_steps_are_less_sure_on_another_vendors_devices(tmp_path: Path) -> None:
    """Only where the engine's own part was fitted, and not to runs there."""
    written = yaml.safe_load((Path(__file__).parent.parent / "profiles" / "engines" / "vllm.yaml").read_text())
    found = {}
    for vendor in ("NVIDIA", "AMD", None):
        fitted = {"fitted": {**written["fitted"], "vendor": vendor}} if vendor else {}
        path = tmp_path / f"{vendor}.yaml"
        path.write_text(yaml.safe_dump({**{k: v for k, v in written.items() if k != "fitted"}, **fitted}))
        found[vendor] = tc.simulate("llama-3.1-70b", device="mi300x", engine=str(path), world_size=8, tp=8, batch=16)
    width = {vendor: one.interval_s[1] / one.interval_s[0] for vendor, one in found.items()}
    assert found["NVIDIA"].step_s == pytest.approx(found["AMD"].step_s)
    assert width["NVIDIA"] > 1.15 * width["AMD"] and width[None] == pytest.approx(width["AMD"], rel=0.1)


def test_public_runs_on_amd_lie_in_their_intervals() -> None:
    """Three in four of 45, of dense models and of one hybrid; nothing was fitted to them."""
    out = predict(pd.read_csv(Path(__file__).parent.parent / "benchmarks" / "amd_runs.csv"))
    assert not out["problem"].any()
    name = np.where(out["measured_tpot_s"].notna(), "tpot_s", "output_tokens_per_s")
    ends = [
        [row[f"measured_{metric}"], row[bound(metric, "low")], row[bound(metric, "high")]]
        for metric, row in zip(name, out.to_dict("records"), strict=True)
    ]
    measured, low, high = np.array(ends, dtype=float).T
    assert ((low <= measured) & (measured <= high)).mean() > 0.75


PLAIN = load_engine("vllm").model_copy(update={"fitted": None})
WIDER = {"ttft_s": 0.5, "tpot_s": 0.2}
TOLD = PLAIN.model_copy(update={"fitted": EngineFit(
    source="by hand", rows=1, models=1, layer_s=0.0, layer_error_s=0.0, serving_error={**WIDER}
)})  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "pools", "own"), [(PLAIN, False, SERVING_ERROR), (TOLD, False, WIDER), (TOLD, True, POOLS_ERROR)]
)
def test_intervals_hold_four_in_five(engine: EngineProfile, pools: bool, own: dict[str, float]) -> None:
    """By drawing: normal errors with the stated medians; a request's time is the sum of two that err apart."""
    ttft_error, tpot_error, share = 0.1, 0.05, 0.3
    factors = served_interval(ttft_error, tpot_error, share, engine=engine, pools=pools)
    dice, n = np.random.default_rng(0), 400_000
    medians = {"ttft_s": np.hypot(ttft_error, own["ttft_s"])}
    medians["tpot_s"] = np.hypot(tpot_error, own["tpot_s"])
    off = {name: dice.normal(0, median / 0.67449, n) for name, median in medians.items()}
    off["output_tokens_per_s"] = share * off["ttft_s"] + (1 - share) * off["tpot_s"]
    for name, error in off.items():
        assert np.mean(np.abs(error) <= factors[name] - 1) == pytest.approx(0.8, abs=0.005), name
