"""Decode's attention on AMD against the few public times of it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tensorcast.api import predict_kernels
from tensorcast.cost.roofline import constants_for
from tensorcast.profiles.device import KernelConstants
from tensorcast.profiles.store import list_devices, load_device

PUBLISHED_US = {  # facebookexperimental/triton#2040, "aiter us" of MI355X: sequences, tokens of each
    (8, 1024): 30.9, (16, 1024): 38.6, (32, 1024): 63.2, (64, 1024): 98.9, (128, 1024): 195.2, (256, 1024): 325.3,
    (8, 8192): 110.6, (16, 8192): 195.1, (32, 8192): 391.4, (64, 8192): 815.6, (128, 8192): 1565.0, (256, 8192): 3189.5,
    (8, 32768): 383.8, (16, 32768): 744.3, (32, 32768): 1499.5, (64, 32768): 3042.3,
}  # fmt: skip


def seconds(device: str, q_heads: int = 64, kv_heads: int = 8) -> pd.DataFrame:
    return predict_kernels(pd.DataFrame([
        {"family": "attention_decode", "batch": batch, "new": 1, "past": past, "q_heads": q_heads, "kv_heads": kv_heads,
         "head_dim": 128, "window": 0, "kv_bytes": 2, "dtype": "bf16"}
        for batch, past in PUBLISHED_US
    ]), device=device, engine="sglang")  # fmt: skip


def test_decode_on_mi355x_takes_what_was_published() -> None:
    found = seconds("mi355x")
    ratio = found.seconds.to_numpy() * 1e6 / np.array([*PUBLISHED_US.values()])
    assert abs(np.median(ratio) - 1) < 0.1 and np.all((ratio > 0.7) & (ratio < 1.35)), ratio
    assert set(found.evidence) == {"datasheet"}


@pytest.mark.parametrize("device", [name for name in list_devices() if load_device(name).vendor == "AMD"])
def test_no_amd_device_reads_quicker_than_its_memory(device: str) -> None:
    profile = load_device(device)
    read = 2.0 * 2 * 8 * 128 * np.array([batch * past for batch, past in PUBLISHED_US], dtype=float)
    least = read / float(profile.memory_bandwidth_bytes_per_s)
    assert np.all(seconds(device).seconds.to_numpy() > least)


def test_other_vendors_are_not_touched() -> None:
    constants, _ = constants_for(load_device("gaudi3"), "attention_decode", "bf16")
    assert constants.memory_efficiency == 0.9


LATENT_US = {  # device, query heads, cache: sequences, tokens of each
    ("mi355x", 32, "bf16"): {(16, 4096): 34.7793, (32, 4096): 47.2596, (64, 4096): 75.7614, (128, 4096): 130.537,
                             (16, 16384): 73.4773, (64, 16384): 230.744, (128, 131072): 3246.21},  # ROCm/aiter#5456
    ("mi355x", 32, "fp8"): {(16, 4096): 26.8914, (32, 4096): 35.2533, (64, 4096): 48.9394, (128, 4096): 78.1666},
    ("mi355x", 128, "fp8"): {(16, 8192): 52.138, (16, 23333): 109.965, (64, 23333): 403.895,
                             (256, 23333): 1422.0},  # ROCm/aiter#3072
    # the trace states 55 and 11.5 us for 64 requests of 1,024 tokens in and as many out, 1,536 of them halfway
    ("mi325x", 16, "fp8"): {(64, 1536): 66.5},  # SemiAnalysisAI/InferenceX#863
}  # fmt: skip


@pytest.mark.parametrize(("device", "heads", "cache"), LATENT_US)
def test_latent_attention_on_amd_takes_what_was_published(device: str, heads: int, cache: str) -> None:
    table = LATENT_US[device, heads, cache]
    found = predict_kernels(pd.DataFrame([
        {"family": "mla_decode", "batch": batch, "new": 1, "past": past, "q_heads": heads,
         "kv_bytes": 1 if cache == "fp8" else 2, "dtype": cache}
        for batch, past in table
    ]), device=device, engine="sglang")  # fmt: skip
    ratio = found.seconds.to_numpy() * 1e6 / np.array([*table.values()])
    assert np.all((ratio > 0.85) & (ratio < 1.2)), ratio
    assert set(found.evidence) == {"datasheet"}


def test_latent_attention_of_cdna_3_reaches_what_was_reported() -> None:
    """64 heads, 128 sequences of 32,768 tokens in FP8: at most 367 TFLOP/s (ROCm/aiter#3188)."""
    found = predict_kernels(pd.DataFrame([{
        "family": "mla_decode", "batch": 128, "new": 1, "past": 32768, "q_heads": 64, "kv_bytes": 1, "dtype": "fp8",
    }]), device="mi300x", engine="sglang")  # fmt: skip
    rate = 128 * 32768 * 64 * 2 * (576 + 512) / float(found.seconds.iloc[0])
    assert rate == pytest.approx(367e12, rel=0.2)


def test_a_device_whose_latent_attention_was_timed_goes_by_that() -> None:
    profile = load_device("mi300x")
    assert profile.calibration is not None
    fitted = KernelConstants(
        family="mla_decode", dtype="fp8", compute_efficiency=0.5, memory_efficiency=0.5, launch_s=1e-5
    )
    kernels = (*profile.calibration.kernels, fitted)
    timed = profile.model_copy(update={"calibration": profile.calibration.model_copy(update={"kernels": kernels})})
    assert constants_for(timed, "mla_decode", "fp8") == (fitted, "calibrated")
    assert constants_for(profile, "mla_decode", "fp8")[1] == "datasheet"
