"""Kernel times: never faster than physics, monotone in every size, and the right constants for the right kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorcast.cost import roofline, work
from tensorcast.profiles.device import Calibration, DeviceProfile, KernelConstants
from tensorcast.profiles.store import load_device


def figure(value: float) -> dict[str, Any]:
    return {"value": value, "source": "made up"}


def make_device(*kernels: KernelConstants, **peaks: float) -> DeviceProfile:
    """100 processors, 1 PFLOP/s bf16, 4 TB/s."""
    return DeviceProfile.model_validate({
        "name": "toy", "vendor": "none", "architecture": "none", "description": "round numbers", "sources": {},
        "processors": 100, "peak_flops": {k: figure(v) for k, v in (peaks or {"bf16": 1e15, "fp8": 2e15}).items()},
        "memory_bytes": figure(1e11), "memory_bandwidth_bytes_per_s": figure(4e12),
        "interconnect": [
            {"name": "link", "size": 8, "bandwidth_bytes_per_s": figure(4e11), "latency_s": figure(1e-6)},
        ],
        "calibration": {"provenance": "none", "date": "2026-01-01", "kernels": kernels} if kernels else None,
    })


def make_constants(**changes: Any) -> KernelConstants:
    values: dict[str, Any] = {
        "family": "gemm", "compute_efficiency": 0.8, "memory_efficiency": 0.9, "launch_s": 3e-6, "tile_s": 2e-7,
        "step_s": 1e-9, "split_s": 3e-6, "row_s": 1e-11, "element_s": 1e-14,
    }
    return KernelConstants.model_validate({**values, **changes})


CONSTANTS = st.builds(
    make_constants,
    compute_efficiency=st.floats(0.05, 1.0), memory_efficiency=st.floats(0.05, 1.0), launch_s=st.floats(0, 1e-5),
    tile_s=st.floats(0, 5e-6), step_s=st.floats(0, 1e-8), split_s=st.floats(0, 1e-5),
    smoothing=st.sampled_from([1.0, 2.0, 3.0, 4.0]),
)
SIZE = st.integers(1, 20_000)
DEVICE = make_device()


def seconds(found: work.Work, constants: KernelConstants) -> float:
    return float(roofline.kernel_time(found, constants, DEVICE).seconds)


@settings(max_examples=150, deadline=None)
@given(m=SIZE, n=SIZE, k=SIZE, constants=CONSTANTS)
def test_gemm_never_faster_than_peak_and_grows(m: int, n: int, k: int, constants: KernelConstants) -> None:
    found = work.gemm(m, n, k)
    time = seconds(found, constants)
    assert time >= max(found.flops / 1e15, found.bytes / 4e12) * (1 - 1e-9)
    for bigger in (work.gemm(m + 1, n, k), work.gemm(m, n + 1, k), work.gemm(m, n, k + 1), work.gemm(2 * m, n, k)):
        assert seconds(bigger, constants) >= time * (1 - 1e-9)


@settings(max_examples=100, deadline=None)
@given(rows=SIZE, hit=st.integers(1, 256), n=st.integers(64, 8192), constants=CONSTANTS)
def test_grouped_gemm_grows_with_rows_and_width(rows: int, hit: int, n: int, constants: KernelConstants) -> None:
    hit = min(hit, rows)
    time = seconds(work.grouped_gemm(rows, hit, n, 2048), constants)
    assert seconds(work.grouped_gemm(rows + 1, hit, n, 2048), constants) >= time * (1 - 1e-9)
    assert seconds(work.grouped_gemm(rows, hit, n + 1, 2048), constants) >= time * (1 - 1e-9)


@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(1, 512), new=st.integers(1, 5000), past=st.integers(0, 20_000), decode=st.booleans(),
    kv_heads=st.sampled_from([1, 2, 8, 32]), constants=CONSTANTS,
)
def test_attention_never_faster_than_peak_and_grows(
    batch: int, new: int, past: int, *, decode: bool, kv_heads: int, constants: KernelConstants
) -> None:
    if decode:
        new = 1

    def price(b: int, s: int, p: int) -> float:
        return seconds(work.attention(b, s, p, 32, kv_heads, qk_dim=128, v_dim=128, decode=decode), constants)

    found = work.attention(batch, new, past, 32, kv_heads, qk_dim=128, v_dim=128, decode=decode)
    time = price(batch, new, past)
    assert time >= max(found.flops / 1e15, found.bytes / 4e12) * (1 - 1e-9)
    assert price(batch + 1, new, past) >= time * (1 - 1e-9)
    assert price(batch, new, past + 64) >= time * (1 - 1e-9)
    if not decode:
        assert price(batch, new + 1, past) >= time * (1 - 1e-9)


def test_large_gemm_tends_to_peak_times_efficiency() -> None:
    constants = make_constants(launch_s=0, tile_s=0, step_s=0, row_s=0, element_s=0, smoothing=4.0)
    found = work.gemm(12_800, 25_600, 8192)  # 100 x 100 whole tiles of 128 x 256: no padding, no part wave
    assert seconds(found, constants) == pytest.approx(found.flops / 0.8e15, rel=0.01)


def test_small_gemm_is_weight_streaming_plus_launch() -> None:
    constants = make_constants(tile_s=0, step_s=0, row_s=0, element_s=0, smoothing=4.0)
    found = work.gemm(1, 16_384, 16_384)
    assert seconds(found, constants) == pytest.approx(3e-6 + found.bytes / (4e12 * 0.9), rel=0.01)


def test_a_part_wave_costs_a_whole_one() -> None:
    constants = make_constants(launch_s=0, tile_s=0, step_s=0, split_s=1.0, row_s=0, element_s=0, smoothing=4.0)
    one = work.Tiling(100.0, 1e9, 64.0)
    more = work.Tiling(101.0, 1e9, 64.0)
    first, second = (seconds(work.Work("gemm", "bf16", tilings=(t,)), constants) for t in (one, more))
    assert second == pytest.approx(2 * first)


def test_split_uses_idle_processors() -> None:
    constants = make_constants(launch_s=0, tile_s=0, split_s=0, row_s=0, element_s=0, smoothing=4.0)
    alone = work.Work("gemm", "bf16", tilings=(work.Tiling(10.0, 1e9, 1e4),))
    shared = work.Work("gemm", "bf16", tilings=(work.Tiling(10.0, 1e9, 1e4, split=True),))
    assert seconds(shared, constants) == pytest.approx(seconds(alone, constants) / 10)


def test_passes_over_rows_can_be_left_to_the_caller() -> None:
    constants = make_constants(row_s=1e-9, element_s=1e-12)
    experts, attention = work.grouped_gemm(64, 4, 128, 256), work.attention(2, 16, 0, 4, 4, qk_dim=64, v_dim=64)
    beside = [
        seconds(found, constants) - float(roofline.kernel_time(found, constants, DEVICE, passes=False).seconds)
        for found in (experts, attention)
    ]
    assert beside[0] == pytest.approx(64 * 1e-9 + 64 * 256 * 1e-12)
    assert beside[1] == 0


def test_arrays_equal_scalars() -> None:
    m = np.array([1, 64, 65, 4096])
    together = np.asarray(roofline.kernel_time(work.gemm(m, 7168, 4096), make_constants(), DEVICE).seconds)
    assert together.shape == (4,)
    for i, size in enumerate(m):
        assert together[i] == pytest.approx(seconds(work.gemm(int(size), 7168, 4096), make_constants()))


def test_constants_are_sought_in_the_documented_order() -> None:
    """Another engine's before another dtype's; what a narrow dtype reaches of its peak says nothing of bf16's."""
    def entry(family: str, dtype: str, engine: str) -> KernelConstants:
        return make_constants(family=family, dtype=dtype, engine=engine)

    own, anyone, other, fp8 = (
        entry("gemm", "bf16", "vllm"), entry("gemm", "bf16", "any"), entry("gemm", "bf16", "sglang"),
        entry("gemm", "fp8", "vllm"),
    )

    def found(*kernels: KernelConstants) -> KernelConstants:
        constants, evidence = roofline.constants_for(make_device(*kernels), "gemm", "bf16", "vllm")
        assert evidence == "calibrated"
        return constants

    assert found(fp8, other, anyone, own) == own
    assert found(fp8, other, anyone) == anyone
    assert found(fp8, other) == other
    lent = fp8.model_copy(update={"median_error": roofline.BORROWED_ERROR})
    assert roofline.constants_for(make_device(fp8), "gemm", "int8", "vllm") == (lent, "calibrated")
    assert roofline.constants_for(make_device(fp8), "gemm", "bf16", "vllm")[1] == "datasheet"
    constants, evidence = roofline.constants_for(make_device(fp8), "mla_decode", "bf16", "vllm")
    assert evidence == "datasheet"
    assert constants.median_error == roofline.DATASHEET_ERROR


def test_missing_arithmetic_falls_back_one_step() -> None:
    device = make_device(bf16=1e15)
    assert roofline.peak_flops(device, "fp8") == 1e15
    assert roofline.peak_flops(make_device(), "nvfp4") == 2e15
    assert roofline.peak_flops(make_device(), "w4a16") == 1e15


def test_profile_with_calibration_round_trips() -> None:
    device = make_device(make_constants())
    assert DeviceProfile.model_validate(device.model_dump()) == device
    assert isinstance(device.calibration, Calibration)


@pytest.mark.parametrize(("engine", "each_s"), [("vllm", 10.4e-6), ("sglang", 4.0e-6)])
def test_int4_experts_on_amd_run_in_tritons_kernel(engine: str, each_s: float) -> None:
    """Kimi-K2.5's experts at tp 8, 3 x 7168 x 256 weights with scales in groups of 32, by the processors of MI355X, on
    which they were timed (vllm-project/vllm#35093, sgl-project/sglang#22208 and #34460)."""
    mi300x = load_device("mi300x")
    found, evidence = roofline.constants_for(mi300x, "grouped_gemm", "w4a16", engine)
    read = found.memory_efficiency * float(mi300x.memory_bandwidth_bytes_per_s) / mi300x.processors
    assert 3 * 7168 * 256 * (0.5 + 2 / 32) / (256 * read) == pytest.approx(each_s, rel=0.05)
    assert evidence == "datasheet"
    own = roofline.constants_for(load_device("mi355x"), "grouped_gemm", "w4a16", engine)
    assert own[1] == "calibrated"  # AITER's
