"""What no served load may do, on every kind of device and under every engine: bring fewer tokens for more users, answer
sooner under more load or to longer prompts, or beat the peaks of its device. Also in pipelines, under data-parallel
attention, with drafts and in pools."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from tensorcast.predict.predict import predict
from tensorcast.profiles.store import load_device, load_model

DEVICES = ("h100", "b200", "gb300", "l40s", "h20", "mi355x")
USERS = (1, 2, 4, 8, 32, 128, 512)
LENGTHS = ((128, 512), (1024, 512), (8192, 512), (30000, 512))
"""Replies of one length: of shorter ones prompts come more often, and wait for each other."""
SERVERS: dict[str, dict[str, Any]] = {
    "cut": {"tp": 8}, "spread": {"tp": 8, "ep": 8}, "pipeline": {"tp": 4, "pp": 2}, "attention dp": {"dp": 8, "ep": 8},
    "drafts": {"tp": 8, "ep": 8, "mtp_depth": 2},
    "pools": {"tp": 8, "mode": "disagg", "prefill_workers": 1, "decode_workers": 2},
}
MODELS = {"qwen3-30b-a3b": ("vllm", "sglang", "trtllm"), "deepseek-v3": ("sglang",)}


@pytest.fixture(scope="module")
def served() -> pd.DataFrame:
    """Every load that a device can serve."""
    rows = pd.DataFrame([
        {"model": model, "device": device, "engine": engine, "server": server, "isl": isl, "osl": osl,
         "concurrency": users, "tp": 1, "dp": 1, "ep": 1, "pp": 1, "mode": "agg", "mtp_depth": 0,
         "prefill_workers": "", "decode_workers": "", **sizes}
        for model, engines in MODELS.items() for engine in engines for device in DEVICES
        for server, sizes in SERVERS.items() for isl, osl in LENGTHS for users in USERS
    ])  # fmt: skip
    found = predict(rows)
    found = found[found["problem"] == ""]
    assert len(found) > len(rows) / 2 and set(found["server"]) == set(SERVERS)
    return found


def falls(served: pd.DataFrame, what: str, along: str) -> pd.Series[float]:
    """How far below an earlier value the time or rate ever is, relative, by case."""
    case = ["model", "device", "engine", "server", *{"isl", "concurrency"} - {along}]
    case += ["osl"] if along == "concurrency" else []
    ordered = served.sort_values(along)
    return 1 - (ordered[what] / ordered.groupby(case)[what].cummax()).groupby([ordered[name] for name in case]).min()


def worst(found: pd.Series[float]) -> str:
    return str(found.nlargest(3).round(3).to_dict())


def test_more_users_never_bring_fewer_tokens(served: pd.DataFrame) -> None:
    found = falls(served, "output_tokens_per_s", "concurrency")
    assert found.max() < 0.06, worst(found)


def test_a_full_house_serves_no_more(served: pd.DataFrame) -> None:
    """Users beyond those whom the cache holds wait; their waiting reads no prompts."""
    case = ["model", "device", "engine", "server", "isl", "osl", "mean_batch"]
    full = served.assign(mean_batch=served["mean_batch"].round(6)).groupby(case)
    rise = full["output_tokens_per_s"].max() / full["output_tokens_per_s"].min() - 1
    assert (full.size() > 1).any() and rise[full.size() > 1].max() < 0.01, worst(rise)


def test_more_load_never_answers_sooner(served: pd.DataFrame) -> None:
    found = falls(served, "ttft_s", "concurrency")
    assert found.max() < 0.03, worst(found)


def test_longer_prompts_are_never_answered_sooner(served: pd.DataFrame) -> None:
    found = falls(served, "ttft_s", "isl")
    assert found.max() < 0.03, worst(found)


def test_nobody_beats_the_devices_peaks(served: pd.DataFrame) -> None:
    """Two operations per parameter that a token passes, at the most that the device has in any precision."""
    params = served["model"].map({name: float(load_model(name).active_params or np.nan) for name in MODELS})
    peak = served["device"].map({name: max(map(float, load_device(name).peak_flops.values())) for name in DEVICES})
    tokens_per_s = served["output_tokens_per_s"] * (1 + served["isl"] / served["osl"])
    share = 2 * params * tokens_per_s / (peak * served["gpus"])
    assert share.min() > 0 and share.max() < 0.9, share.max()
