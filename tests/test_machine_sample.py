"""Measured kernels of every machine beside the first five, of shapes that no fit has seen, as they are priced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tensorcast.calibrate.measured_tables import held_out
from tensorcast.cost.kernels.predictor import predictor_for
from tensorcast.cost.kernels.vocabulary import SIZES
from tensorcast.profiles.store import load_device

SAMPLE = Path(__file__).parent / "data" / "machine_sample.csv"

DEEPGEMM = (  # M, N, K and TFLOPS on H800: DeepGEMM's README of 2025-03-25 (55ab91f, MIT), which no fit has seen
    (64, 2112, 7168, 206), (64, 24576, 1536, 289), (64, 7168, 16384, 336), (64, 4096, 7168, 287), (64, 7168, 2048, 295),
    (128, 2112, 7168, 352), (128, 24576, 1536, 535), (128, 7168, 16384, 645), (128, 4096, 7168, 533),
    (128, 7168, 2048, 510), (4096, 2112, 7168, 1009), (4096, 24576, 1536, 1125), (4096, 7168, 16384, 1426),
    (4096, 4096, 7168, 1265), (4096, 7168, 2048, 1168),
)


@pytest.fixture(scope="module")
def priced() -> pd.DataFrame:
    """The sample with ``error`` and ``evidence``."""
    parts = []
    for names, rows in pd.read_csv(SAMPLE, comment="#").groupby(["device", "engine", "family", "dtype"]):
        device, engine, family, dtype = (str(name) for name in names)
        known = [*SIZES[family], *(["source"] if rows["source"].notna().all() else [])]
        columns = {name: rows[name].to_numpy(float) for name in known}
        assert held_out(family, columns).all()
        found = predictor_for(load_device(device), engine).price(family, dtype, "", columns)
        error = np.abs(found.seconds / rows["seconds"].to_numpy() - 1.0)
        parts.append(rows.assign(error=error, evidence=found.evidence))
    return pd.concat(parts)


def test_every_machine_that_was_measured_is_priced_by_it(priced: pd.DataFrame) -> None:
    assert set(priced["evidence"]) == {"measured"}
    errors = priced.groupby(["family", "device"])["error"].median()
    assert errors["gemm"].median() < 0.06 and errors["gemm"].max() < 0.12, errors["gemm"]
    assert errors["grouped_gemm"].median() < 0.12 and errors["grouped_gemm"].max() < 0.25, errors["grouped_gemm"]
    assert errors["attention_decode"].max() < 0.06, errors["attention_decode"]


def test_deepgemm_on_h800_beside_its_authors_own_times() -> None:
    """At 4096 rows as they timed it; at few rows InferSim's, which prices follow, took 1.1 to 1.9 times as long."""
    m, n, k, rate = np.array(DEEPGEMM, dtype=float).T
    found = predictor_for(load_device("h800"), "sglang").estimate("gemm", "fp8_block", m=m, n=n, k=k).seconds
    ratio = found * rate * 1e12 / (2 * m * n * k)
    large = ratio[m == 4096]
    assert large.min() > 0.85 and large.max() < 1.05, large.round(2)
    assert ratio[m < 4096].min() > 1.0 and ratio.max() < 2.0, ratio.round(2)
