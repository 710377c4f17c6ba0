"""Where nothing was measured, times grow with every size: swept finely, far below and far above the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tensorcast.cost.predict import Estimate, Predictor, predictor_for
from tensorcast.cost.predict.physics import physics_of
from tensorcast.cost.predict.rising import FREE, GROWS, coordinates
from tensorcast.cost.predict.shapes import SIZES
from tensorcast.profiles.store import list_devices, load_device

ENGINES = ("vllm", "sglang", "trtllm", "any")

WITHOUT_DATA = tuple(name for name in list_devices() if load_device(name).calibration is None)

MEASURED = ("a100-sxm", "h100-sxm", "h200-sxm", "b200-sxm", "gb200")

RANGES: dict[str, tuple[float, float]] = {
    "m": (1, 65536), "n": (64, 65536), "k": (64, 65536), "batch": (1, 512), "tokens": (1, 65536),
    "hidden": (512, 16384), "inter": (128, 32768), "new": (1, 16384), "past": (1, 262144), "q_heads": (1, 16),
    "payload_bytes": (64, 1 << 30),
}
"""Sizes that a shape is drawn from."""

CHOICES: dict[str, tuple[float, ...]] = {
    "topk": (1, 2, 4, 8), "experts": (8, 64, 256), "moe_tp": (1, 2), "moe_ep": (1, 8), "gated": (0, 1), "skew": (0, -1),
    "kv_heads": (1, 2, 8), "head_dim": (64, 80, 128, 256), "window": (0, 128, 4096), "kv_bytes": (1, 2),
    "ranks": (2, 4, 8), "nodes": (1,), "sms": (20,), "copy_bytes": (1.03125, 2.0),
}

DTYPES = {
    "gemm": ("bf16", "fp8", "fp8_block", "nvfp4", "int8", "w4a16"), "grouped_gemm": ("bf16", "fp8", "mxfp4", "w4a8"),
}


@st.composite
def sweeps(draw: st.DrawFn, family: str) -> tuple[str, dict[str, np.ndarray]]:
    """One size of a random shape, from a sixteenth to 64 times as large in steps of 2 %."""
    shape: dict[str, float] = {}
    for name in SIZES[family]:
        if name in CHOICES:
            shape[name] = float(draw(st.sampled_from(CHOICES[name])))
        elif name != "slots":
            low, high = RANGES[name]
            shape[name] = float(round(np.exp(draw(st.floats(np.log(low), np.log(high))))))
    grown = draw(st.sampled_from([n for n in GROWS[family] if n != "window" or shape["window"]]))
    if "kv_heads" in shape:
        shape["q_heads"] *= shape["kv_heads"]
    if "experts" in shape:
        shape["slots"] = shape["experts"]
    steps = np.unique(np.maximum(np.round(shape[grown] * 1.02 ** np.arange(-140.0, 210.0)), 1.0))
    if grown == "topk":
        steps = steps[steps <= shape["experts"]]
    if grown == "q_heads" and "kv_heads" in shape:
        steps = np.unique(np.ceil(steps / shape["kv_heads"])) * shape["kv_heads"]
    return grown, {name: np.full(len(steps), value) for name, value in shape.items()} | {grown: steps}


def price(predictor: Predictor, family: str, dtype: str, columns: dict[str, np.ndarray]) -> Estimate:
    """Prices, and what holds of every estimate."""
    found = predictor.price(family, dtype, "low_latency:dispatch" if family == "moe_exchange" else "", columns)
    assert np.isfinite(found.high).all() and (found.low > 0).all()
    assert (found.low <= found.seconds * (1 + 1e-9)).all() and (found.seconds <= found.high * (1 + 1e-9)).all()
    return found


@given(data=st.data(), family=st.sampled_from(sorted(GROWS)), device=st.sampled_from(["h20", "mi300x", "l4"]))
@settings(max_examples=120, deadline=None)
def test_what_rising_trees_are_told_never_falls(data: st.DataObject, family: str, device: str) -> None:
    profile = load_device(device)
    _, columns = data.draw(sweeps(family))
    if "ranks" in columns:
        columns["ranks"] = np.minimum(columns["ranks"], float(profile.interconnect[0].size))
    physics = physics_of(family, "bf16", "low_latency:dispatch", columns, profile, "vllm")
    told = coordinates(family, columns, physics, profile)
    for name in told.keys() - {*FREE, "windowed"}:
        assert (np.diff(told[name]) >= -1e-9).all(), name
    assert (np.diff(physics.seconds) >= -1e-9 * physics.seconds[1:]).all()


@given(
    data=st.data(), family=st.sampled_from(sorted(GROWS)), device=st.sampled_from(sorted(WITHOUT_DATA)),
    engine=st.sampled_from(ENGINES),
)
@settings(max_examples=200, deadline=None)
def test_without_own_data_time_grows_with_every_size(
    data: st.DataObject, family: str, device: str, engine: str
) -> None:
    profile = load_device(device)
    dtype = data.draw(st.sampled_from(DTYPES.get(family, ("bf16", "fp8"))))
    _, columns = data.draw(sweeps(family))
    if "ranks" in columns:
        columns["ranks"] = np.minimum(columns["ranks"], float(profile.interconnect[0].size))
    found = price(predictor_for(profile, engine), family, dtype, columns)
    floor = physics_of(family, dtype, "low_latency:dispatch", columns, profile, engine).floor
    assert set(found.evidence) == {"datasheet"}
    assert (found.seconds >= floor * (1 - 1e-9)).all()
    assert (np.diff(found.seconds) >= -1e-9 * found.seconds[1:]).all()


@given(
    data=st.data(), device=st.sampled_from(MEASURED), engine=st.sampled_from(ENGINES[:3]), steps=st.integers(1, 400),
)
@settings(max_examples=150, deadline=None)
def test_above_the_measured_sizes_time_grows_and_does_not_fall_at_the_edge(
    data: st.DataObject, device: str, engine: str, steps: int
) -> None:
    """From a measured shape at the edge of the data upwards: no shorter than there, and never falling."""
    predictor = predictor_for(load_device(device), engine)
    assert predictor.model is not None
    kernels = [k for k in predictor.model.kernels.values() if k.engine == engine and k.rising is not None]
    kernel = data.draw(st.sampled_from(kernels))
    sizes = [n for n in GROWS[kernel.family] if n not in ("head_dim", "window", "q_heads") and kernel.box[n][1] > 0]
    grown, probe = data.draw(st.sampled_from(sizes)), kernel.report["probe"]
    ladder = kernel.box[grown][1] * 1.02 ** np.arange(float(steps + 1))
    columns = {name: np.full(steps + 1, value) for name, value in probe.items()} | {grown: ladder}
    found = predictor.price(kernel.family, kernel.dtype, kernel.variant, columns)
    assert found.evidence[0] == "measured" and set(found.evidence[1:]) <= {"calibrated"}
    assert (np.diff(found.seconds) >= -1e-9 * found.seconds[1:]).all()


@given(
    data=st.data(), device=st.sampled_from(MEASURED), engine=st.sampled_from(ENGINES[:3]),
    family=st.sampled_from(["attention_prefill", "attention_decode"]),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_a_head_size_that_was_not_measured_grows_with_the_sequence(
    data: st.DataObject, device: str, engine: str, family: str
) -> None:
    predictor = predictor_for(load_device(device), engine)
    grown, columns = data.draw(sweeps(family))
    if grown == "head_dim":
        return
    assert predictor.model is not None
    kernel = predictor.model.find(family, "bf16", engine, "")
    assert kernel is not None
    assume(kernel.box["head_dim"][0] < 72.0 < kernel.box["head_dim"][1])
    columns = kernel.inside(columns | {"head_dim": np.full_like(columns["batch"], 72.0)})
    found = price(predictor, family, "bf16", columns)
    assert set(found.evidence) == {"calibrated"}
    assert (np.diff(found.seconds) >= -1e-9 * found.seconds[1:]).all()


def test_trees_that_were_grown_to_rise_never_fall() -> None:
    pytest.importorskip("catboost", reason="needs catboost")
    from tensorcast.validate.grow import grow

    rng = np.random.default_rng(3)
    features: dict[str, Any] = {name: rng.normal(size=800) for name in ("a", "b", "ranks")}
    target = np.sin(3.0 * features["a"]) + features["b"] + np.cos(features["ranks"])
    trees = grow(features, target, 60, 4, 0.15, rises=True)
    free = np.ptp(trees.values({"a": np.zeros(50), "b": np.zeros(50), "ranks": np.linspace(-2, 2, 50)}))
    for name in ("a", "b"):
        still = {"a": np.zeros(50), "b": np.zeros(50), "ranks": np.zeros(50)}
        found = trees.values({**still, name: np.linspace(-3, 3, 50)})
        assert (np.diff(found) >= 0.0).all()
    assert free > 0.3


def test_more_ranks_than_were_measured_keep_the_links_shares_of_the_measured_ones() -> None:
    """A formula that is slower over several nodes is not made quicker again by trees that saw one."""
    predictor = predictor_for(load_device("h200"), "vllm")
    tokens = np.array([64.0, 512.0, 4096.0])
    shape = {"hidden": 7168.0, "topk": 8.0, "experts": 256.0, "ranks": 32.0, "nodes": 4.0, "sms": 20.0,
             "copy_bytes": 1.03125}
    columns = {name: np.full(3, value) for name, value in shape.items()} | {"tokens": tokens}
    found = predictor.price("moe_exchange", "any", "low_latency:dispatch", columns)
    assert (np.abs(np.log(found.factor)) < 0.2).all()
