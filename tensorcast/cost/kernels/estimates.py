"""What is said of calls: seconds, an interval, where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tensorcast.cost.evidence import LEVELS, NORMAL_80
from tensorcast.cost.kernels.formula import KernelFormula
from tensorcast.cost.roofline import BORROWED_ERROR, OTHER_CHIP_ERROR
from tensorcast.cost.work import Array

PARTS = ("seconds", "low", "high", "level", "factor")

Level = NDArray[np.int_]
"""Indices into :data:`~tensorcast.cost.evidence.LEVELS`."""


LENT_ERROR = 0.25
"""Median relative error to state of experts by another engine's table of the same library: on B200 SGLang's Triton is
17 % (bf16) and 33 % (FP8 blocks, most above 64 tokens) from vLLM 0.22.0's own, 31,590 rows that no fit has seen
(aiconfigurator-core 0.12.0); the library that vLLM runs now is 37 % and 56 % from them."""

UNPACKS_ERROR = 0.2
"""The same of Marlin's experts in MXFP4 by those in INT4, one kernel: of one model by the other's they take 0.8 to 1.4
times as long in four of five rows (:data:`~tensorcast.cost.kernels.device_model.UNPACKS`)."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of every call, the ends of an 80 % interval, where they come from (an index into :data:`LEVELS`), and
    ``factor``, by which the fitted residual changed the formula's seconds."""

    seconds: Array
    low: Array
    high: Array
    level: Level
    factor: Array

    @property
    def evidence(self) -> NDArray[np.object_]:
        """``measured``, ``calibrated`` or ``datasheet`` per call."""
        return np.array(LEVELS, dtype=object)[self.level]

    def at_least(self, seconds: Array) -> Estimate:
        """Calls that take these seconds at least, with intervals and factors as wide and as large over them."""
        return self.times(np.maximum(seconds / self.seconds, 1.0))

    def times(self, factor: Array | float) -> Estimate:
        """Calls that take so many times as long, with intervals and factors as wide and as large over them."""
        return replace(self, **{name: getattr(self, name) * factor for name in ("seconds", "low", "high", "factor")})


def in_order(parts: Sequence[Estimate], places: Sequence[NDArray[np.int_]]) -> Estimate:
    """Calls that were priced apart, as they stood."""
    order = np.argsort(np.concatenate(places))
    return Estimate(**{name: np.concatenate([getattr(part, name) for part in parts])[order] for name in PARTS})


def estimated(
    seconds: Array, formula: KernelFormula, ends: tuple[Array | float, Array | float], level: Level
) -> Estimate:
    """With an interval by the logs of its ``ends`` over ``seconds``, that goes no lower than the formula's floor."""
    low, high = (seconds * np.exp(end) for end in ends)
    lowest = np.maximum(low, np.minimum(formula.floor, seconds))
    return Estimate(seconds, lowest, high, level, seconds / formula.seconds)


def borrowed(
    found: Estimate, formula: KernelFormula, error: float = BORROWED_ERROR, *, whole: bool = False
) -> Estimate:
    """Another dtype's or engine's kernel as this one's: never ``measured``, and no surer than such loans are.
    ``whole``: the error is of such models by such others, so that what the lender says of other models is in it."""
    width = NORMAL_80 * error
    low, high = found.seconds * np.exp(-width), found.seconds * np.exp(width)
    if not whole:
        low, high = np.minimum(found.low, low), np.maximum(found.high, high)
    return Estimate(
        found.seconds, np.maximum(low, np.minimum(formula.floor, found.seconds)), high,
        np.minimum(found.level, LEVELS.index("calibrated")), found.seconds / formula.seconds,
    )


def of_other_chip(found: Estimate, floor: Array) -> Estimate:
    """Another chip's kernels as a device's own: ``datasheet``, and no surer than such loans are. ``floor``: seconds
    under which none can lie."""
    width = NORMAL_80 * OTHER_CHIP_ERROR
    low = np.minimum(found.low, found.seconds * np.exp(-width))
    return replace(
        found, low=np.maximum(low, np.minimum(floor, found.seconds)),
        high=np.maximum(found.high, found.seconds * np.exp(width)), level=np.zeros_like(found.level),
    )


def without_residual(formula: KernelFormula) -> Estimate:
    """The formula as it is."""
    width = NORMAL_80 * formula.error
    level = np.full(len(formula.seconds), LEVELS.index(formula.evidence))
    found = estimated(np.maximum(formula.seconds, formula.floor), formula, (-width, width), level)
    return replace(found, factor=np.ones(len(level)))
