"""Prices of a step's rows and of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from tensorcast.cost.evidence import LEVELS
from tensorcast.cost.roofline import Timing, peak_flops
from tensorcast.cost.work import Work
from tensorcast.deploy.plan.plan import Collective, Row
from tensorcast.profiles.device import DeviceProfile

PARTS = ("compute", "memory", "network", "latency")
"""What the seconds of a row are spent on."""


class Spending(NamedTuple):
    """What one call of a row moves and computes; ``parts`` splits its seconds by what bounds them (:data:`PARTS`)."""

    flops: Any = 0.0
    bytes: Any = 0.0
    wire_bytes: Any = 0.0
    ideal_compute_s: Any = 0.0
    parts: dict[str, Any] = dict.fromkeys(PARTS, 0.0)

    def each(self, change: Callable[[Any], Any]) -> Spending:
        """The same with every number changed."""
        flops, moved, wire, ideal_s = map(change, self[:4])
        return Spending(flops, moved, wire, ideal_s, {name: change(value) for name, value in self.parts.items()})


@dataclass(frozen=True)
class RowPrice:
    """One call of one row; numbers are floats or arrays.

    ``waits_s``: of its seconds, those in which it keeps neither arithmetic nor memory busy. ``error``: relative median
    error of the seconds. ``level``: what stands behind them, an index into :data:`tensorcast.cost.evidence.LEVELS`, or
    an array of these where calls differ. ``spend`` tells what is computed and moved, for those who ask.
    """

    row: Row
    seconds: Any
    waits_s: Any
    family: str
    level: Any
    error: Any
    spend: Callable[[], Spending]
    has_formula: bool = True
    detail: str = ""

    @cached_property
    def spending(self) -> Spending:
        return self.spend()

    @property
    def flops(self) -> Any:
        return self.spending.flops

    @property
    def bytes(self) -> Any:
        return self.spending.bytes

    @property
    def wire_bytes(self) -> Any:
        return self.spending.wire_bytes

    @property
    def ideal_compute_s(self) -> Any:
        return self.spending.ideal_compute_s

    @property
    def parts(self) -> dict[str, Any]:
        return self.spending.parts

    @property
    def evidence(self) -> Any:
        """``measured``, ``calibrated`` or ``datasheet``; an array of these where calls differ."""
        level = one_level(self.level)
        return np.array(LEVELS)[level] if np.ndim(level) else LEVELS[level]

    def at(self, where: Any) -> RowPrice:
        """The price at some of the batches."""
        return RowPrice(
            self.row, pick(self.seconds, where), pick(self.waits_s, where), self.family,
            pick(self.level, where), pick(self.error, where),
            lambda: self.spending.each(lambda value: pick(value, where)), self.has_formula, self.detail,
        )  # fmt: skip

    def times(self, count: Any) -> RowPrice:
        """The price of ``count`` such calls."""
        return replace(
            self, seconds=self.seconds * count, waits_s=self.waits_s * count,
            spend=lambda: self.spending.each(lambda value: value * count),
        )  # fmt: skip

    @property
    def busy_s(self) -> Any:
        """Seconds in which the row keeps the device's arithmetic or memory busy."""
        return self.seconds - self.waits_s


class Call(NamedTuple):
    """A kernel of a row: its work and time before correction, the factor that corrects it, seconds of launching."""

    work: Work
    timing: Timing
    factor: Any
    launch_s: Any


def spending_of(calls: list[Call], device: DeviceProfile) -> Spending:
    """What the kernels of a row compute and move, and what bounds them."""

    def of_all(of: Callable[[Call], Any]) -> Any:
        return sum((of(call) * call.work.calls for call in calls), 0.0)

    return Spending(
        of_all(lambda c: c.work.flops), of_all(lambda c: c.work.bytes), 0.0,
        of_all(lambda c: c.work.flops / peak_flops(device, c.work.dtype)),
        {
            "compute": of_all(lambda c: c.timing.compute_s * c.factor),
            "memory": of_all(lambda c: c.timing.memory_s * c.factor),
            "network": 0.0,
            "latency": of_all(lambda c: c.launch_s),
        },
    )  # fmt: skip


class Part(NamedTuple):
    """Rows of a step that run equally often up to their ``calls``: each ``calls * times``, where ``times`` may hang on
    the batch. Where batches have sizes in common, rows are priced once for each case, and ``at`` is every batch's case.
    """

    rows: tuple[RowPrice, ...]
    calls: tuple[int, ...]
    times: Any = 1
    at: Any = None

    def sum(self, of: Callable[[RowPrice], Any], wanted: Callable[[RowPrice], bool] = lambda row: True) -> Any:
        """As :meth:`StepPrice.sum`."""
        found: dict[int, list[Any]] = {}  # by calls, so that few arrays are multiplied
        for row, calls in zip(self.rows, self.calls, strict=True):
            if calls and wanted(row):
                found.setdefault(calls, []).append(of(row))
        every = total(total(values) * calls for calls, values in found.items())
        return pick(every, self.at) * self.times if found else 0.0


@dataclass(frozen=True)
class StepPrice:
    """A step: its rows' prices and the time of the slowest pipeline stage, of the whole step, and of its overheads.

    ``hidden_s``: kernel seconds that pass while others run; ``hidden_comm_s`` of them are communication.
    """

    parts: tuple[Part, ...]
    seconds: Any
    overhead_s: Any
    overhead_error_s: float
    micro_batches: Any
    hidden_s: Any = 0.0
    hidden_comm_s: Any = 0.0

    @property
    def rows(self) -> tuple[RowPrice, ...]:
        return tuple(row for part in self.parts for row in part.rows)

    @property
    def counts(self) -> tuple[Any, ...]:
        """How often each of the rows runs in one pass over all stages."""
        return tuple(calls * part.times for part in self.parts for calls in part.calls)

    def sum(self, of: Callable[[RowPrice], Any], wanted: Callable[[RowPrice], bool] = lambda row: True) -> Any:
        """``of`` each row that is ``wanted``, over all its calls in one pass over all stages."""
        return total(part.sum(of, wanted) for part in self.parts)

    @cached_property
    def error(self) -> Any:
        """Median relative error of the sum: errors of one family move together, families and overhead independently."""
        families = dict.fromkeys(row.family for row in self.rows)
        errors = [self.sum(lambda p: p.seconds * p.error, lambda p: p.family == family) for family in families]  # noqa: B023
        squares = total(map(np.square, errors)) + self.overhead_error_s**2
        return np.sqrt(squares) / np.maximum(self.sum(seconds_of) + self.overhead_s, 1e-30)

    @cached_property
    def exposed_comm_s(self) -> Any:
        """Communication that the step waits for."""
        return self.sum(seconds_of, lambda p: isinstance(p.row, Collective)) - self.hidden_comm_s


def total(values: Iterable[Any]) -> Any:
    """The sum; numbers and narrow arrays first, so that few additions are over whole fleets."""
    return sum(sorted(values, key=_axes), 0.0)


def _axes(value: Any) -> int:
    return getattr(value, "ndim", 0)


seconds_of = attrgetter("seconds")


def one_level(levels: Any) -> Any:
    """Levels as one number where they are all the same."""
    if isinstance(levels, int):
        return levels
    levels = np.asarray(levels)
    first = levels.flat[0]
    return levels if levels.size > 1 and (levels != first).any() else int(first)


def pick(value: Any, where: Any) -> Any:
    """Entries ``where`` of the last axis; numbers as they are."""
    if where is None or not isinstance(value, np.ndarray) or value.ndim == 0 or value.shape[-1] == 1:
        return value
    return value[..., where]
