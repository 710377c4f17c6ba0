"""From work to seconds: ``launch + pnorm(compute, traffic) + rows*row_s + elements*element_s``.

``traffic = bytes / (bandwidth * memory_efficiency)``; ``compute`` is the fastest tiling's ``waves * (max(piece's FLOPs
at its processor's share of peak * compute_efficiency, depth * step_s) + tile_s)``, shared out over idle processors for
``split_s`` where the kernel can be split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tensorcast.cost.work import Size, Work
from tensorcast.profiles.device import DeviceProfile, KernelConstants

PEAK_OF = {
    "bf16": "bf16", "fp16": "bf16", "w4a16": "bf16", "fp8": "fp8", "fp8_block": "fp8", "int8": "int8",
    "w4a8": "fp8", "mxfp4": "bf16", "nvfp4": "fp4", "w8a16": "bf16", "fp32": "fp32",
}
"""Which arithmetic a kernel dtype runs in. ``mxfp4`` is weight-only (gpt-oss kernels unpack to bf16), ``w4a8`` mxfp4
weights with mxfp8 activations."""

SLOWER = {"fp4": "fp8", "fp8": "bf16", "int8": "bf16", "tf32": "bf16", "bf16": "fp16", "fp16": "bf16"}
"""What a device without that arithmetic falls back to (weights are unpacked and run one step up)."""

DATASHEET = {
    "gemm": (0.70, 0.80), "grouped_gemm": (0.60, 0.75), "attention_prefill": (0.55, 0.75),
    "attention_decode": (0.50, 0.70), "mla_prefill": (0.55, 0.75), "mla_decode": (0.50, 0.70), "memory": (0.5, 0.75),
}
"""Fractions of peak assumed where nothing was measured; evidence says so."""


DATASHEET_LAUNCH_S = 4e-6
"""Floor of one kernel inside a captured graph where nothing was measured (fitted floors lie between 2 and 8 us)."""

DATASHEET_ERROR = 0.5
"""Median relative error to state where no constants were fitted (what these fractions get on the measured devices)."""

NEAREST = {
    "bf16": ("fp16",), "fp16": ("bf16",), "fp8": ("fp8_block", "int8"), "fp8_block": ("fp8",),
    "int8": ("fp8", "fp8_block"), "nvfp4": ("w4a8", "fp8"), "w4a8": ("fp8", "nvfp4"), "mxfp4": ("w4a16", "bf16"),
    "w4a16": ("mxfp4", "w8a16", "bf16"), "w8a16": ("w4a16", "bf16"),
}
"""Whose fitted fractions to borrow first when a family was not measured in a dtype; any other dtype comes after."""

Evidence = Literal["measured", "calibrated", "datasheet"]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call and the parts that made them. Arrays where the work was."""

    seconds: Size
    compute_s: Size
    memory_s: Size
    launch_s: Size


def peak_flops(device: DeviceProfile, dtype: str) -> float:
    """Peak FLOP/s of the arithmetic that ``dtype`` runs in on this device."""
    arithmetic = PEAK_OF.get(dtype, "bf16")
    for _ in range(len(SLOWER)):
        if arithmetic in device.peak_flops:
            return float(device.peak_flops[arithmetic])
        arithmetic = SLOWER.get(arithmetic, "bf16")
    raise KeyError(dtype)


def constants_for(
    device: DeviceProfile, family: str, dtype: str, engine: str = "any"
) -> tuple[KernelConstants, Evidence]:
    """Constants of one kernel family on one device, and where they come from.

    Order: this engine, then ``any``, then another engine with the same dtype; then the same for the nearest dtypes
    (:data:`NEAREST`, then whichever were fitted); else the datasheet fractions with :data:`DATASHEET_ERROR`.
    """
    fitted = [c for c in (device.calibration.kernels if device.calibration else ()) if c.family == family]
    if fitted:
        order = [dtype, "any", *NEAREST.get(dtype, ()), *sorted({c.dtype for c in fitted})]
        best = min(fitted, key=lambda c: (order.index(c.dtype), (engine, "any", c.engine).index(c.engine)))
        return best, "calibrated"
    compute, memory = DATASHEET.get(family, DATASHEET["memory"])
    assumed = KernelConstants(
        family=family, dtype=dtype, compute_efficiency=compute, memory_efficiency=memory, launch_s=DATASHEET_LAUNCH_S,
        median_error=DATASHEET_ERROR,
    )
    return assumed, "datasheet"


def _compute_time(work: Work, constants: KernelConstants, device: DeviceProfile) -> Size:
    """Time on the matrix units: the fastest of the kernel's tilings, with whole waves and, where it helps, a split."""
    rate = peak_flops(device, work.dtype) * constants.compute_efficiency
    if not work.tilings:
        return work.issued_flops / rate
    processors, best = float(device.processors), None
    for tiling in work.tilings:
        tiles = np.maximum(tiling.tiles, 1e-9)
        piece = tiling.flops * (processors / (rate * tiling.rate))
        if constants.step_s:
            piece = np.maximum(piece, tiling.depth * constants.step_s)
        piece = piece + constants.tile_s
        waves = np.ceil(tiles / processors) if tiling.whole else np.maximum(tiles / processors, tiling.longest)
        seconds = waves * piece
        if tiling.split:
            shares = np.floor(processors / tiles)
            shared = (piece - constants.tile_s) / np.maximum(shares, 1.0) + (constants.tile_s + constants.split_s)
            seconds = np.where(shares >= 2.0, np.minimum(seconds, shared), seconds)
        best = seconds if best is None else np.minimum(best, seconds)
    return best


def _joined(compute: Size, traffic: Size, p: float) -> Size:
    """p-norm of the two: 1 adds them, large p takes the longer. 1, 2 and 4 without a call to ``power``."""
    if p == 1.0:
        return compute + traffic
    if p == 2.0:
        return np.sqrt(compute * compute + traffic * traffic)
    if p == 4.0:
        compute, traffic = compute * compute, traffic * traffic
        return np.sqrt(np.sqrt(compute * compute + traffic * traffic))
    return np.power(np.power(compute, p) + np.power(traffic, p), 1.0 / p)


def kernel_time(work: Work, constants: KernelConstants, device: DeviceProfile) -> Timing:
    """Time of ``work`` with ``constants``. Never faster than the datasheet's peaks allow."""
    compute = _compute_time(work, constants, device)
    traffic = work.bytes / (float(device.memory_bandwidth_bytes_per_s) * constants.memory_efficiency)
    seconds = constants.launch_s + _joined(compute, traffic, constants.smoothing)
    if constants.row_s or constants.element_s:
        seconds = seconds + work.rows * constants.row_s + work.elements * constants.element_s
    return Timing(seconds, compute, traffic, constants.launch_s)
