"""Prices of a step's rows and of the step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from tensorcast.cost.predict import LEVELS
from tensorcast.cost.predict.model import NORMAL_80
from tensorcast.deploy.plan import Collective, Row

WITHIN_80 = NORMAL_80
"""Half an 80 % interval in median errors: of a normal error, 80 % lie within 1.9 times the median."""

PARTS = ("compute", "memory", "network", "latency")
"""What the seconds of a row are spent on."""


@dataclass(frozen=True)
class RowPrice:
    """One call of one row; numbers are floats or arrays. ``parts`` splits the seconds by what bounds them.

    ``error``: relative median error of the seconds. ``level``: what stands behind them, an index into
    :data:`tensorcast.cost.predict.LEVELS`, or an array of these where calls differ.
    """

    row: Row
    seconds: Any
    flops: Any
    bytes: Any
    wire_bytes: Any
    ideal_compute_s: Any
    parts: dict[str, Any]
    family: str
    level: Any
    error: Any
    has_formula: bool = True
    detail: str = ""

    @property
    def evidence(self) -> Any:
        """``measured``, ``calibrated`` or ``datasheet``; an array of these where calls differ."""
        level = one_level(self.level)
        return np.array(LEVELS)[level] if np.ndim(level) else LEVELS[level]

    def at(self, where: slice, row: Row | None = None) -> RowPrice:
        """The price at some of the batches, perhaps as that of another ``row`` that does the same."""
        return RowPrice(
            self.row if row is None else row, pick(self.seconds, where), pick(self.flops, where),
            pick(self.bytes, where), pick(self.wire_bytes, where), pick(self.ideal_compute_s, where),
            {name: pick(value, where) for name, value in self.parts.items()}, self.family, pick(self.level, where),
            pick(self.error, where), self.has_formula, self.detail,
        )  # fmt: skip

    def times(self, count: Any) -> RowPrice:
        """The price of ``count`` such calls."""
        numbers = ("seconds", "flops", "bytes", "wire_bytes", "ideal_compute_s")
        more: dict[str, Any] = {name: getattr(self, name) * count for name in numbers}
        return replace(self, **more, parts={part: seconds * count for part, seconds in self.parts.items()})

    @property
    def busy_s(self) -> Any:
        """Seconds in which the row keeps the device's arithmetic or memory busy."""
        return self.seconds - self.parts["latency"] - self.parts["network"]


class Spent(NamedTuple):
    """Seconds of all calls of a row in one pass over all stages; ``error`` and ``level`` as in :class:`RowPrice`."""

    row: Row
    family: str
    seconds: Any
    error: Any
    level: Any


@dataclass(frozen=True)
class StepPrice:
    """A step: its rows' prices and the time of the slowest pipeline stage, of the whole step, and of its overheads.

    ``hidden_s``: kernel seconds that pass while others run; ``hidden_comm_s`` of them are communication.
    ``draft_at``: where several batches draft the same, the last ``drafts`` rows hold each case once, and this is which
    of them every batch is.
    """

    rows: tuple[RowPrice, ...]
    counts: tuple[Any, ...]
    seconds: Any
    overhead_s: Any
    overhead_error_s: float
    micro_batches: Any
    hidden_s: Any = 0.0
    hidden_comm_s: Any = 0.0
    drafts: int = 0
    draft_at: Any = None

    @cached_property
    def spent(self) -> list[Spent]:
        """What the rows that run take."""
        own = len(self.rows) - self.drafts
        calls = zip(self.rows[:own], self.counts[:own], strict=True)
        found = [
            Spent(p.row, p.family, p.seconds * n, p.error, p.level) for p, n in calls if not isinstance(n, int) or n
        ]
        for p, n in zip(self.rows[own:], self.counts[own:], strict=True):
            seconds, error, level = (pick(value, self.draft_at) for value in (p.seconds, p.error, p.level))
            found.append(Spent(p.row, p.family, seconds * n, error, level))
        return found

    @cached_property
    def error(self) -> Any:
        """Median relative error of the sum: errors of one family move together, families and overhead independently."""
        by_family: dict[str, Any] = {}
        total = self.overhead_s
        for spent in self.spent:
            by_family[spent.family] = by_family.get(spent.family, 0.0) + spent.seconds * spent.error
            total = total + spent.seconds
        squares = sum((np.square(error) for error in by_family.values()), self.overhead_error_s**2)
        return np.sqrt(squares) / np.maximum(total, 1e-30)

    @cached_property
    def exposed_comm_s(self) -> Any:
        """Communication that the step waits for."""
        moved = sum((spent.seconds for spent in self.spent if isinstance(spent.row, Collective)), 0.0)
        return moved - self.hidden_comm_s


class Stage(NamedTuple):
    """A pipeline stage: how often it runs the rows of each place (a layer's kind, or a place outside the layers)."""

    calls: tuple[tuple[int, int], ...]

    def of(self, per_place: dict[int, Any]) -> Any:
        """Seconds per place, summed over the stage."""
        return sum((count * per_place[place] for place, count in self.calls if count and place in per_place), 0.0)


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
