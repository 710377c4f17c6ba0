"""Errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tensorcast.cost import roofline
from tensorcast.cost.work import Work
from tensorcast.profiles.device import DeviceProfile, KernelConstants


def median_error(errors: Any) -> float:
    """Median of |predicted / measured - 1|; NaN where nothing was measured."""
    values = np.abs(np.asarray(errors, dtype=float))
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else float("nan")


def errors(predicted: np.ndarray, seconds: np.ndarray) -> dict[str, float]:
    """Median, mean and 90th percentile of |predicted / measured - 1|."""
    off = np.abs(predicted / seconds - 1.0)
    return {
        "median_error": round(float(np.median(off)), 4), "mean_error": round(float(np.mean(off)), 4),
        "p90_error": round(float(np.quantile(off, 0.9)), 4),
    }


def kernel_seconds(
    works: Sequence[Work], constants: KernelConstants, others: KernelConstants, device: DeviceProfile
) -> np.ndarray:
    """Seconds of works that run one after another; those of another family than ``constants`` use ``others``."""
    return np.asarray(sum(
        roofline.kernel_time(work, constants if work.family == constants.family else others, device).seconds
        for work in works
    ))
