"""Seconds of one row's kernels, formula x correction: the one loop for steps, validation and calibration alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from tensorcast.cost.evidence import LEVELS, NORMAL_80
from tensorcast.cost.roofline import Constants, Devices, Timing, constants_for, constants_of_each, kernel_time
from tensorcast.cost.work import Size, Work
from tensorcast.profiles.device import DeviceProfile


class Factor(Protocol):
    """What a fitted model makes of a kernel: a :class:`~tensorcast.cost.kernels.corrections.Correction`."""

    @property
    def engine(self) -> str | Sequence[str]: ...
    @property
    def factor(self) -> Size: ...
    @property
    def error(self) -> Size: ...
    @property
    def level(self) -> Any: ...
    @property
    def silent(self) -> Any: ...


class Call(NamedTuple):
    """A kernel of a row: its work and time before correction, the factor that corrects it, seconds of launching."""

    work: Work
    timing: Timing
    factor: Size
    launch_s: Size


@dataclass(frozen=True)
class RowSeconds:
    """A row's kernels, one after another: ``waits_s`` of the seconds are launches; ``error`` is relative, a median."""

    seconds: Size
    waits_s: Size
    family: str
    level: Size
    error: Size
    calls: tuple[Call, ...]


def row_seconds(
    kernels: Iterable[tuple[Work, Factor | None]],
    device: DeviceProfile | Devices,
    engine: str | Sequence[str],
    launched: Callable[[Size, Size], Size] = lambda kernel_s, launch_s: launch_s,
    *,
    passes: bool = False,
) -> RowSeconds:
    """Seconds of a row from its kernels, each with its correction if a model speaks for it. Of calls on several devices
    ``engine`` is that of each device.

    Constants are those of ``engine``, or of the engine that a kernel's correction is of. ``launched``: seconds that
    launching a kernel takes, from its own seconds and the part of them that kernel times measured in graph replay hold.
    ``passes``: experts' products come with what their call does to its rows, which else are rows of their own.
    """
    seconds: Size = 0.0
    waits: Size = 0.0
    level: Size = LEVELS.index("measured")
    error: Size = 0.0
    family = "memory"
    calls = []
    for work, known in kernels:
        whose = known.engine if known is not None else engine
        fitted: Constants
        if isinstance(device, Devices):
            fitted, mine, off = constants_of_each(device, work, whose)
        else:
            fitted, evidence = constants_for(device, work.family, work.dtype, str(whose), work.kernel)
            mine, off = LEVELS.index(evidence), fitted.median_error or 0.0
        timing = kernel_time(work, fitted, device, passes=passes)
        factor = known.factor if known is not None else 1.0
        kernel_s, launch_s = timing.seconds * factor, timing.launch_s * factor
        launch = launched(kernel_s, launch_s)
        seconds = seconds + (kernel_s - launch_s + launch) * work.calls
        waits = waits + launch * work.calls
        calls.append(Call(work, timing, factor, launch))
        family = work.family
        if known is not None and known.silent is None:
            mine, off = known.level, known.error
        elif known is not None:  # where it says nothing the formula's hold
            mine, off = np.where(known.silent, mine, known.level), np.where(known.silent, off, known.error)
        level = min(level, mine) if isinstance(mine, int) and isinstance(level, int) else np.minimum(level, mine)
        error = np.maximum(error, off)
    return RowSeconds(seconds=seconds, waits_s=waits, family=family, level=level, error=error, calls=tuple(calls))


@dataclass(frozen=True)
class Prediction:
    """Seconds of one row without the gaps between its kernels: what a device event or a replay sees.

    Their 80 % interval is from the kernels' held-out errors; ``launch_s``, ``compute_s`` and ``memory_s`` made them.
    """

    seconds: float
    low_s: float
    high_s: float
    evidence: str
    launch_s: float
    compute_s: float
    memory_s: float

    @classmethod
    def of(cls, row: RowSeconds) -> Prediction:
        """What ``row`` says of kernels one after another, at one size."""

        def of_all(name: str) -> float:
            return sum(float(getattr(call.timing, name) * call.factor * call.work.calls) for call in row.calls)

        seconds, off = of_all("seconds"), NORMAL_80 * float(row.error)
        return cls(
            seconds, low_s=seconds * math.exp(-off), high_s=seconds * math.exp(off), evidence=LEVELS[int(row.level)],
            launch_s=of_all("launch_s"), compute_s=of_all("compute_s"), memory_s=of_all("memory_s"),
        )


def predict(works: Sequence[Work], device: DeviceProfile, engine: str) -> Prediction:
    """Kernels by their formulas alone, with ``engine``'s constants on ``device``: what a fit of constants sees."""
    return Prediction.of(row_seconds([(work, None) for work in works], device, engine))
