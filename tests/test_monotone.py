"""On devices that were not measured times grow with every size: swept finely, far below and far above the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_sweeps import DTYPES, ENGINES, price, sweeps

from tensorcast.cost.kernels.formula import formula_of
from tensorcast.cost.kernels.lattice import SIDES
from tensorcast.cost.kernels.monotone import FREE, MONOTONE, coordinates
from tensorcast.cost.kernels.predictor import Predictor, from_other_devices, predictor_for
from tensorcast.profiles.store import list_devices, load_device

WITHOUT_DATA = tuple(name for name in list_devices() if load_device(name).calibration is None)


@given(data=st.data(), family=st.sampled_from(sorted(MONOTONE)), device=st.sampled_from(["l20", "mi300a", "l4"]))
@settings(max_examples=120, deadline=None)
def test_what_rising_trees_are_told_never_falls(data: st.DataObject, family: str, device: str) -> None:
    profile = load_device(device)
    _, columns = data.draw(sweeps(family))
    physics = formula_of(family, "bf16", "", columns, profile, engine="vllm")
    told = coordinates(family, columns, physics, profile)
    for name in told.keys() - {*FREE, "windowed"}:
        assert (np.diff(told[name]) >= -1e-9).all(), name
    assert (np.diff(physics.seconds) >= -1e-9 * physics.seconds[1:]).all()


@given(
    data=st.data(), family=st.sampled_from(sorted(SIDES)), device=st.sampled_from(sorted(WITHOUT_DATA)),
    engine=st.sampled_from(ENGINES), predictor_of=st.sampled_from([predictor_for, from_other_devices]),
)
@settings(max_examples=200, deadline=None)
def test_without_own_data_time_grows_with_every_size(
    data: st.DataObject, family: str, device: str, engine: str, predictor_of: Callable[..., Predictor]
) -> None:
    profile = load_device(device)
    dtype = data.draw(st.sampled_from(DTYPES.get(family, ("bf16", "fp8"))))
    _, columns = data.draw(sweeps(family))
    if "ranks" in columns:
        columns["ranks"] = np.minimum(columns["ranks"], float(profile.interconnect[0].size))
    found = price(predictor_of(profile, engine), family, dtype, columns)
    floor = formula_of(family, dtype, "low_latency:dispatch", columns, profile, engine=engine).floor
    assert set(found.evidence) == {"datasheet"}
    assert (found.seconds >= floor * (1 - 1e-9)).all()
    assert (np.diff(found.seconds) >= -1e-9 * found.seconds[1:]).all()


def test_trees_that_were_grown_to_rise_never_fall() -> None:
    pytest.importorskip("catboost", reason="needs catboost")
    from tensorcast.calibrate.kernel_models.boosting import grow

    rng = np.random.default_rng(3)
    features: dict[str, Any] = {name: rng.normal(size=800) for name in ("a", "b", "skew")}
    target = np.sin(3.0 * features["a"]) + features["b"] + np.cos(features["skew"])
    trees = grow(features, target, 60, 4, 0.15, monotone=True)
    free = np.ptp(trees.values({"a": np.zeros(50), "b": np.zeros(50), "skew": np.linspace(-2, 2, 50)}))
    for name in ("a", "b"):
        still = {"a": np.zeros(50), "b": np.zeros(50), "skew": np.zeros(50)}
        found = trees.values({**still, name: np.linspace(-3, 3, 50)})
        assert (np.diff(found) >= 0.0).all()
    assert free > 0.3
