"""Seconds of one row's kernels: formula x correction; the only such loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tensorcast.cost.evidence import NORMAL_80
from tensorcast.cost.kernels.corrections import corrections_for
from tensorcast.cost.roofline import constants_for, kernel_time
from tensorcast.cost.work import Work
from tensorcast.profiles.device import DeviceProfile


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
