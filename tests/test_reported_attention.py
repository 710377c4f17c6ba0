"""Decode's attention on AMD against the few public times of it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tensorcast.api import predict_kernels
from tensorcast.cost.roofline import constants_for
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
