"""Predicted beside measured: seconds, interval, evidence, and for large errors the likely cause."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorcast.cost.predict.model import NORMAL_80
from tensorcast.cost.predict.rows import corrections_for
from tensorcast.cost.roofline import constants_for, kernel_time
from tensorcast.cost.work import Work
from tensorcast.profiles.device import DeviceProfile

BAND = 0.2
"""An op within this of its measurement is well predicted."""

FAR = 3.0
"""Times the prediction from which on another kernel must be running than the one that was thought of."""

CACHE_BYTES = {"cpu": 32e6, "cuda": 50e6}
"""What stays in a last cache: EPYC 7003-9005 32 MB per core complex (AMD), H100 and H200 50 MB of L2 (NVIDIA)."""


@dataclass(frozen=True)
class Prediction:
    """Seconds of one row as a step prices it, and their 80 % interval from its kernels' held-out errors."""

    seconds: float
    low_s: float
    high_s: float
    evidence: str
    launch_s: float
    compute_s: float
    memory_s: float


def predict(works: Sequence[Work], device: DeviceProfile, engine: str) -> Prediction:
    """One row's kernels, one after another, without the gaps between them: what a device event or a replay sees."""
    total = launch = compute = memory = spread = 0.0
    evidence = "calibrated"
    corrections = corrections_for(device, engine)
    for work in works:
        # experts' models ask for a layout's load, which a row by itself does not have
        known = corrections.of(work) if work.family != "grouped_gemm" else None
        whose = known.engine if known else engine
        constants, found = constants_for(device, work.family, work.dtype, whose, work.kernel)
        timing = kernel_time(work, constants, device, passes=False)
        calls = float(work.calls)
        seconds = float(timing.seconds) * calls * (float(known.factor) if known else 1.0)
        total, launch = total + seconds, launch + float(timing.launch_s) * calls
        compute, memory = compute + float(timing.compute_s) * calls, memory + float(timing.memory_s) * calls
        spread += seconds * (float(known.error) if known else constants.median_error or 0.0)
        evidence = found if found == "datasheet" else evidence
    off = NORMAL_80 * spread / total if total else 0.0
    return Prediction(total, total * math.exp(-off), total * math.exp(off), evidence, launch, compute, memory)


def likely_cause(measured_s: float, predicted: Prediction, works: Sequence[Work], device_type: str) -> str:
    """Why a row may be off by more than :data:`BAND`: a guess from its sizes, for a reader to check."""
    ratio = measured_s / predicted.seconds
    if abs(predicted.seconds / measured_s - 1.0) <= BAND:
        return ""
    moved, flops = (sum(float(getattr(w, name)) for w in works) for name in ("bytes", "flops"))
    wasted = max((float(w.issued_flops) / float(w.flops) for w in works if float(w.flops) > 0), default=1.0)
    moving = max(predicted.compute_s, predicted.memory_s)
    if moving < predicted.launch_s and measured_s < FAR * predicted.launch_s:
        return "launch-bound: mostly the fixed cost of a call, which differs from op to op"
    if ratio < 1.0:
        if moved < CACHE_BYTES[device_type]:  # the output's place is used again by the next call
            return "cache-resident: part of its operands did not come from memory"
        return "faster kernel than the family's constants say"
    if flops and wasted > 1.5 and predicted.compute_s > predicted.memory_s:
        return f"tile quantisation: full tiles would hold {wasted:.1f} times the useful work"
    if ratio > FAR:
        return "fallback kernel: far from both compute and memory limits"
    return "slower kernel than the family's constants say"


def add_predictions(row: dict[str, Any], works: Sequence[Work], device: DeviceProfile, engine: str, kind: str) -> None:
    """Put predicted seconds, interval, evidence, error and cause into a measured row (in place)."""
    found = predict(works, device, engine)
    row |= {
        "predicted_s": found.seconds, "predicted_low_s": found.low_s, "predicted_high_s": found.high_s,
        "evidence": found.evidence,
    }
    if row.get("seconds"):
        row["error"] = found.seconds / row["seconds"] - 1.0
        row["cause"] = likely_cause(row["seconds"], found, works, kind)


def median_error(errors: Any) -> float:
    """Median of |predicted / measured - 1|; NaN where nothing was measured."""
    values = np.abs(np.asarray(errors, dtype=float))
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else float("nan")
