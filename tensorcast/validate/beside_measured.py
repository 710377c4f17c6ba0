"""Predicted beside measured: seconds, interval, evidence, and for large errors the likely cause."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensorcast.cost.row_seconds import Prediction, RowSeconds
from tensorcast.cost.work import Work

BAND = 0.2
"""An op within this of its measurement is well predicted."""

FAR = 3.0
"""Times the prediction from which on another kernel must be running than the one that was thought of."""

CACHE_BYTES = {"cpu": 32e6, "cuda": 50e6}
"""What stays in a last cache: EPYC 7003-9005 32 MB per core complex (AMD), H100 and H200 50 MB of L2 (NVIDIA)."""


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


def add_predictions(row: dict[str, Any], priced: RowSeconds, works: Sequence[Work], kind: str) -> None:
    """Put predicted seconds, interval, evidence, error and cause into a measured row (in place).

    ``priced``: what the step that the row belongs to says of it; ``kind``: type of the device that measured.
    """
    found = Prediction.of(priced)
    row |= {
        "predicted_s": found.seconds, "predicted_low_s": found.low_s, "predicted_high_s": found.high_s,
        "evidence": found.evidence,
    }
    if row.get("seconds"):
        row["error"] = found.seconds / row["seconds"] - 1.0
        row["cause"] = likely_cause(row["seconds"], found, works, kind)
