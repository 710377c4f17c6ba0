"""From work to seconds: ``launch + pnorm(compute, traffic) + rows*row_s + elements*element_s``; ``reduce_s`` of a
kernel that reads a row before it writes is part of ``launch``.

``traffic = bytes / (bandwidth * memory_efficiency)``; ``compute`` is the fastest tiling's ``waves * (max(piece's FLOPs
at its processor's share of peak * compute_efficiency, depth * step_s) + tile_s)``, shared out over idle processors for
``split_s`` where the kernel can be split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, overload

import numpy as np

from tensorcast.cost.evidence import LEVELS, Evidence
from tensorcast.cost.kernels.reported import DATASHEET_ERROR, reported_constants
from tensorcast.cost.work import Size, Work, plain, some
from tensorcast.profiles.device import DeviceProfile, KernelConstants
from tensorcast.profiles.store import load_device

PEAK_OF = {
    "bf16": "bf16", "fp16": "bf16", "w4a16": "bf16", "fp8": "fp8", "fp8_block": "fp8", "int8": "int8",
    "w4a8": "fp8", "w4a4": "fp4", "mxfp4": "bf16", "nvfp4": "fp4", "w8a16": "bf16", "w4a16_nvfp4": "bf16",
    "fp32": "fp32",
}
"""Which arithmetic a kernel dtype runs in. ``mxfp4`` is weight-only (gpt-oss kernels unpack to bf16), ``w4a8`` mxfp4
weights with mxfp8 activations, ``w4a4`` with mxfp4 ones."""

SLOWER = {"fp4": "fp8", "fp8": "bf16", "int8": "bf16", "tf32": "bf16", "bf16": "fp16", "fp16": "bf16"}
"""What a device without that arithmetic falls back to (weights are unpacked and run one step up)."""

DATASHEET = {
    # family: (compute efficiency, memory efficiency, launch, tile, step, split seconds)
    "gemm": (0.80, 0.80, 3e-6, 2e-7, 1.2e-9, 4e-6),
    "grouped_gemm": (0.60, 0.85, 12e-6, 1e-6, 0.0, 0.0),
    "attention_prefill": (0.65, 0.60, 11e-6, 1e-6, 0.0, 0.0),
    "attention_decode": (0.60, 0.90, 9e-6, 1.5e-6, 0.0, 3e-6),
    "mla_prefill": (0.55, 0.75, 11e-6, 3e-6, 0.0, 0.0),
    "mla_decode": (0.80, 0.95, 6e-6, 5.5e-6, 0.0, 3.5e-6),
    "linear_prefill": (0.05, 0.60, 2.2e-5, 1e-6, 1.6e-6, 0.0),
    "linear_decode": (0.50, 0.80, 4e-6, 0.0, 0.0, 0.0),
    "conv_prefill": (0.50, 0.25, 6e-6, 0.0, 0.0, 0.0),
    "conv_decode": (0.50, 0.70, 2e-6, 0.0, 0.0, 0.0),
    "memory": (0.50, 0.85, 2e-6, 0.0, 0.0, 0.0),
}
"""Assumed where nothing was measured; evidence says so. Near the medians of the bf16 fits of A100, H100, H200, B200 and
GB200: an assumption for any other device."""

SPARSE = {
    # (family, dtype): (compute efficiency, memory efficiency, launch, row seconds)
    ("mla_sparse", "bf16"): (0.56, 0.8, 1e-5, 0.0),
    ("mla_sparse", "fp8"): (0.38, 0.8, 1e-5, 0.0),
    ("indexer_scores", "fp8"): (0.44, 0.8, 3.6e-6, 0.0),
    ("indexer_topk", "bf16"): (1.0, 0.6, 3.6e-6, 3.5e-8),
    ("mla_sparse_decode", "bf16"): (1.0, 0.9, 1.9e-5, 1.3e-9),
    ("mla_sparse_decode", "fp8"): (1.0, 0.8, 2e-5, 1.7e-9),
    ("indexer_decode", "fp8"): (0.84, 0.77, 1.1e-5, 0.0),
    ("compressed_decode", "fp8"): (0.7, 1.0, 6e-6, 6.9e-8),
    ("compressed_decode", "bf16"): (0.7, 1.0, 6e-6, 6.9e-8),
    ("compressed_prefill", "fp8"): (0.57, 1.0, 1e-5, 6e-8),
    ("compressed_prefill", "bf16"): (0.57, 1.0, 1e-5, 6e-8),
    ("blocks_decode", "bf16"): (0.63, 0.86, 0.0, 2.2e-9),
    ("blocks_decode", "fp8"): (0.23, 0.3, 6e-7, 1.2e-8),
    ("blocks_prefill", "bf16"): (0.24, 1.0, 5e-6, 0.0),
    ("blocks_prefill", "fp8"): (0.05, 0.75, 2.2e-5, 4.1e-9),
    ("block_scores_decode", "bf16"): (0.19, 0.85, 2.1e-6, 1.1e-8),
    ("block_scores_prefill", "bf16"): (0.18, 1.0, 2.9e-5, 2.6e-9),
}
"""Attention that chooses what it reads, on devices where none was timed. Sparse latent attention on prompts and its
indexer as aiconfigurator-core 0.12.0 timed their kernels alone on H100, H200, B200 and GB200 (``glm5_dsa_attn``,
``glm5_mqa_logits``, ``glm5_topk`` and ``dsa_context_module`` of SGLang 0.5.14, Apache-2.0): shares of the peak are 0.59
and 0.52 for attention in bf16, 0.46 and 0.41 for scores on Hopper and Blackwell; the selection takes 20 to 60 ns per
query, by where its largest scores lie. The others: medians of what whole modules say of devices and engines
(:mod:`tensorcast.calibrate.attention_modules`)."""

SPARSE_ERROR = 0.15

LIKE = {"mla_prefill": "attention_prefill"}
"""A family whose kernels are another's with other widths: where only that one was timed, its constants are nearer than
the datasheet's (expanded latents are attention with heads of 192 and 128, by the same library: ROCm/aiter,
``op_tests/cpp/mha``)."""

NEAREST = {
    "bf16": ("fp16",), "fp16": ("bf16",), "fp8": ("fp8_block", "int8"), "fp8_block": ("fp8",),
    "int8": ("fp8", "fp8_block"), "nvfp4": ("w4a8", "fp8"), "w4a8": ("fp8", "nvfp4"), "w4a4": ("nvfp4", "w4a8", "fp8"),
    "mxfp4": ("w4a16", "bf16"),
    "w4a16": ("mxfp4", "w8a16", "bf16"), "w8a16": ("w4a16", "bf16"), "w4a16_nvfp4": ("w4a16", "mxfp4", "w8a16", "bf16"),
}
"""Whose fitted fractions to borrow first when a family was not measured in a dtype; any other dtype comes after."""

BORROWED_ERROR = 0.17
"""Median relative error to state of borrowed fractions, at least: where both dtypes of a pair that computes and stores
alike were timed (86 pairs of FP8 with and without blocks and of 4-bit weights; aiconfigurator-core 0.12.0, aiter), one
dtype's time stands 17 % from the other's in the median, and 32 % at four of five shapes."""

WIDE = ("any", "bf16", "fp16", "fp32")
"""Dtypes whose fractions of the peak no quantised kernel's tell: AMD's FP8 in blocks reaches half of its GEMMs' in
bf16."""

UNMEASURED = ("w4a16_nvfp4",)
"""Dtypes that no table holds on any device: fractions are borrowed, and evidence and error say so. NVFP4 weights in
bf16 arithmetic run in the Marlin kernels of INT4 ones (vLLM 0.24.0, quantization/utils/marlin_utils_fp4.py)."""


OTHER_CHIP_ERROR = 0.2
"""Median relative error to state of kernels by fractions of peaks that another chip of the generation reaches. Where
both were timed they are of two generations, 14 to 25 % (L40S and RTX PRO 6000, MI300X and MI355X, by each other), or
nearly one chip, 4 to 7 % (H100 and H200; B200, B300, GB200, GB300): reports/accuracy.md, "Devices left out". Datasheet
fractions are 20 to 58 % off there."""

OWN_UNPACKING = ("hopper",)
"""Architectures with a kernel for INT4 weights that keeps the matrix units as busy as one without: Machete, which vLLM
takes before Marlin (0.24.0, model_executor/kernels/linear, ``_POSSIBLE_KERNELS``). Elsewhere, and for NVFP4 everywhere,
vLLM and SGLang run Marlin's (0.5.14, modelopt_quant.py, ``ModelOptNvFp4A16LinearMethod``), which no table timed alone:
300 TFLOP/s for experts of Kimi-K2 on H200, B200 and B300 alike, where GEMMs in bf16 reach 700 to 1,800. vLLM 0.33.0 has
its own for NVFP4 on SM100 (``FlashInferCuteDslNvFp4W4A16LinearKernel``), in no table either."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call and the parts that made them. Arrays where the work was."""

    seconds: Size
    compute_s: Size
    memory_s: Size
    launch_s: Size


@dataclass(frozen=True)
class Devices:
    """Devices of calls that are priced as one: so many ``calls`` of each, one device's after another's. All of them run
    matmuls in whole tiles, or none does."""

    each: tuple[DeviceProfile, ...]
    calls: tuple[int, ...]

    @property
    def whole_tiles(self) -> bool:
        return self.each[0].whole_tiles

    @property
    def processors(self) -> Size:
        return self.column([float(one.processors) for one in self.each])

    @property
    def memory_bandwidth_bytes_per_s(self) -> Size:
        return self.column([float(one.memory_bandwidth_bytes_per_s) for one in self.each])

    @property
    def graph_gap_s(self) -> Size:
        return self.column([float(one.graph_gap_s or 0.0) for one in self.each])

    def column(self, numbers: Sequence[float]) -> Size:
        """Of every device a number, for each of its calls; one number where all have the same."""
        return numbers[0] if numbers.count(numbers[0]) == len(numbers) else np.repeat(numbers, self.calls)


@overload
def peak_flops(device: DeviceProfile, dtype: str) -> float: ...
@overload
def peak_flops(device: DeviceProfile | Devices, dtype: str) -> Size: ...
def peak_flops(device: DeviceProfile | Devices, dtype: str) -> Size:
    """Peak FLOP/s of the arithmetic that ``dtype`` runs in on this device, or on that of each call."""
    if isinstance(device, Devices):
        return device.column([peak_flops(one, dtype) for one in device.each])
    arithmetic = PEAK_OF.get(dtype, "bf16")
    for _ in range(len(SLOWER)):
        if arithmetic in device.peak_flops:
            return float(device.peak_flops[arithmetic])
        arithmetic = SLOWER.get(arithmetic, "bf16")
    raise KeyError(dtype)


def sparse_constants(family: str, dtype: str, *, engine: str = "any", error: float = SPARSE_ERROR) -> KernelConstants:
    """Those of :data:`SPARSE`, with the error of kernels that were timed alone unless another is given."""
    compute, memory, launch, row_s = SPARSE[family, dtype]
    return KernelConstants(
        family=family, dtype=dtype, engine=engine, compute_efficiency=compute, memory_efficiency=memory,
        launch_s=launch, row_s=row_s, median_error=error,
    )


MOST_CONSTANTS = 4096
"""Constants that are kept as they were found."""

_constants: dict[tuple[int | str, ...], tuple[DeviceProfile, tuple[KernelConstants, Evidence]]] = {}
"""By identity of the device, which stays alive here, so that its id stays its own."""


def _unpacking(
    best: KernelConstants, dtype: str, device: DeviceProfile, known: Sequence[KernelConstants]
) -> KernelConstants:
    """Constants of a GEMM whose weights are unpacked to bf16, ``best`` but for the rate of its arithmetic where these
    are of another: that of the slowest engine's experts, which are Marlin's in every table that has it."""
    weight_only = (*UNMEASURED, "w4a16", "w8a16", "mxfp4")
    rates = [one.compute_efficiency for one in known if one.family == "grouped_gemm" and one.dtype == "w4a16"]
    others = dtype not in UNMEASURED and device.architecture.lower() in OWN_UNPACKING
    if dtype not in weight_only or others or best.dtype in weight_only or not rates:
        return best
    return best.model_copy(update={"compute_efficiency": min(*rates, best.compute_efficiency)})


def _as_of_kin(best: KernelConstants, dtype: str, device: DeviceProfile) -> KernelConstants:
    """Constants that another dtype lent, as much better or worse as this dtype's are by its on the device's kin."""
    kin = load_device(device.kin).calibration if device.kin else None
    own, lent = (
        next((c for c in (kin.kernels if kin else ()) if (c.family, c.dtype) == (best.family, one)), None)
        for one in (dtype, best.dtype)
    )
    if own is None or lent is None:
        return best
    efficiencies = ("compute_efficiency", "memory_efficiency")
    return best.model_copy(update={
        name: min(1.0, getattr(best, name) * getattr(own, name) / getattr(lent, name)) for name in efficiencies
    })  # fmt: skip


def constants_for(
    device: DeviceProfile, family: str, dtype: str, engine: str = "any", kernel: str = ""
) -> tuple[KernelConstants, Evidence]:
    """Constants of one kernel family on one device, and where they come from.

    Order: this engine, then ``any``, then another engine with the same dtype; then the same for the nearest dtypes
    (:data:`NEAREST`, then whichever were fitted; for :data:`WIDE` ones those alone), with :data:`BORROWED_ERROR`; else
    those of a family that is :data:`LIKE` it, else the datasheet fractions, both with :data:`DATASHEET_ERROR`.
    Constants of this one ``kernel`` of the family, fitted as ``family/kernel``, come before those of the family.
    """
    key = id(device), family, dtype, engine, kernel
    if key in _constants and _constants[key][0] is device:
        return _constants[key][1]
    if len(_constants) >= MOST_CONSTANTS:
        _constants.clear()
    peak = peak_flops(device, dtype)
    if (reported := reported_constants(device, family, dtype, engine, kernel, peak_flops=peak)) is not None:
        _constants[key] = device, reported
        return reported
    known = device.calibration.kernels if device.calibration else ()
    fitted = [c for c in known if kernel and c.family == f"{family}/{kernel}"]
    fitted = fitted or [c for c in known if c.family == family and (dtype not in WIDE or c.dtype in WIDE)]
    if fitted:
        order = [dtype, "any", *NEAREST.get(dtype, ()), *sorted({c.dtype for c in fitted})]
        best = min(fitted, key=lambda c: (order.index(c.dtype), (engine, "any", c.engine).index(c.engine)))
        if best.dtype not in (dtype, "any"):
            best = best.model_copy(update={"median_error": max(best.median_error or 0.0, BORROWED_ERROR)})
            best = _as_of_kin(best, dtype, device)
        best = _unpacking(best, dtype, device, known) if family == "gemm" else best
        found: tuple[KernelConstants, Evidence] = best, "calibrated"
        if dtype in UNMEASURED or device.timed_on_other_chip:
            error = DATASHEET_ERROR if dtype in UNMEASURED else OTHER_CHIP_ERROR
            found = best.model_copy(update={"median_error": max(best.median_error or 0.0, error)}), "datasheet"
        _constants[key] = device, found
        return found
    if (family, dtype) in SPARSE:
        _constants[key] = device, (sparse_constants(family, dtype, error=DATASHEET_ERROR), "datasheet")
        return _constants[key][1]
    if alike := [c for c in known if c.family == LIKE.get(family)]:
        near = min(alike, key=lambda c: (c.dtype != dtype, (engine, "any", c.engine).index(c.engine)))
        near = near.model_copy(update={"family": family, "dtype": dtype, "median_error": DATASHEET_ERROR})
        _constants[key] = device, (near, "datasheet")
        return near, "datasheet"
    compute, memory, launch, tile, step, split = DATASHEET.get(family, DATASHEET["memory"])
    assumed = KernelConstants(
        family=family, dtype=dtype, compute_efficiency=compute, memory_efficiency=memory, launch_s=launch, tile_s=tile,
        step_s=step, split_s=split, median_error=DATASHEET_ERROR,
    )
    _constants[key] = device, (assumed, "datasheet")
    return assumed, "datasheet"


@dataclass(frozen=True, kw_only=True)
class ConstantColumns:
    """:class:`KernelConstants` of calls on several devices: numbers, or one for each call."""

    compute_efficiency: Size
    memory_efficiency: Size
    launch_s: Size
    tile_s: Size
    step_s: Size
    split_s: Size
    row_s: Size
    element_s: Size
    reduce_s: Size
    smoothing: Size


Constants = KernelConstants | ConstantColumns


def constants_of_each(devices: Devices, work: Work, engines: Sequence[str]) -> tuple[ConstantColumns, Any, Size]:
    """:func:`constants_for` a kernel on each device under an engine of its own: as columns, with what stands behind
    them (levels) and their relative median errors."""
    found = [
        constants_for(one, work.family, work.dtype, engine, work.kernel)
        for one, engine in zip(devices.each, engines, strict=True)
    ]
    columns = {
        field.name: devices.column([getattr(one, field.name) for one, _ in found]) for field in fields(ConstantColumns)
    }
    levels, errors = [LEVELS.index(evidence) for _, evidence in found], [one.median_error or 0.0 for one, _ in found]
    return ConstantColumns(**columns), devices.column(levels), devices.column(errors)


def _compute_time(work: Work, constants: Constants, device: DeviceProfile | Devices) -> Size:
    """Time on the matrix units: the fastest of the kernel's tilings, with whole waves and, where it helps, a split."""
    rate = peak_flops(device, work.dtype) * constants.compute_efficiency
    if not work.tilings or not device.whole_tiles:
        return (work.issued_flops if device.whole_tiles else work.flops) / rate
    processors = device.processors
    best: Size = math.inf
    for tiling in work.tilings:
        inner = tiling.flops * (processors / (rate * tiling.rate))
        if some(constants.step_s):
            inner = np.maximum(inner, tiling.depth * constants.step_s)
        piece = inner + constants.tile_s
        tiles = np.maximum(tiling.tiles, 1e-9)
        waves = np.ceil(tiles / processors) if tiling.whole else np.maximum(tiles / processors, tiling.longest)
        if tiling.split:
            shares = np.maximum(np.floor(processors / tiles), 1.0)
            piece = np.minimum(piece, inner / shares + (constants.tile_s + constants.split_s))
        seconds = waves * piece
        best = np.minimum(best, seconds)
    return best


def _joined(compute: Size, traffic: Size, p: Size) -> Size:
    """p-norm of the two: 1 adds them, large p takes the longer. 1, 2 and 4 without a call to ``power``."""
    if isinstance(p, np.ndarray):
        compute, traffic, _ = np.broadcast_arrays(compute, traffic, p)
        result = np.empty(p.shape)
        for one in np.unique(p):
            some = p == one
            result[some] = _joined(compute[some], traffic[some], float(one))
        return result
    if p == 1.0:
        return compute + traffic
    if p == 2.0:
        return np.sqrt(compute * compute + traffic * traffic)
    if p == 4.0:
        compute, traffic = compute * compute, traffic * traffic
        return np.sqrt(np.sqrt(compute * compute + traffic * traffic))
    return np.power(np.power(compute, p) + np.power(traffic, p), 1.0 / p)


def kernel_time(
    work: Work, constants: Constants, device: DeviceProfile | Devices, *, passes: bool = True
) -> Timing:
    """Time of ``work`` with ``constants``. Never faster than the datasheet's peaks allow.

    ``passes=False`` leaves out what an engine's expert call does to its rows beside the products (permuting and
    combining them), for callers that price those as operations of their own.
    """
    compute = _compute_time(work, constants, device)
    traffic = work.bytes / (plain(device.memory_bandwidth_bytes_per_s) * constants.memory_efficiency)
    launch = constants.launch_s + (constants.reduce_s if work.reduces else 0.0)
    seconds = launch + _joined(compute, traffic, constants.smoothing)
    beside = passes or work.family != "grouped_gemm"  # an attention's softmax rows always count
    if beside and (some(constants.row_s) or some(constants.element_s)):
        seconds = seconds + work.rows * constants.row_s + work.elements * constants.element_s
    return Timing(seconds, compute, traffic, launch)
