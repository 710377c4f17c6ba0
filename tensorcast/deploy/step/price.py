"""Prices of a step's rows and of the step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple, TypeVar

import numpy as np

from tensorcast.cost.evidence import LEVELS
from tensorcast.cost.roofline import peak_flops
from tensorcast.cost.row_seconds import Call
from tensorcast.cost.work import Size
from tensorcast.deploy.plan.plan import Collective, Row
from tensorcast.profiles.device import DeviceProfile
from tensorcast.trace.moe import EXPERT_STAGES

PARTS = ("compute", "memory", "network", "latency")
"""What the seconds of a row are spent on."""

Key = TypeVar("Key", bound=Hashable)

Where = np.ndarray | int | None
"""Entries of the last axis; None: all of them, as they are."""


class Spending(NamedTuple):
    """What one call of a row moves and computes; ``parts`` splits its seconds by what bounds them (:data:`PARTS`)."""

    flops: Size = 0.0
    bytes: Size = 0.0
    wire_bytes: Size = 0.0
    ideal_compute_s: Size = 0.0
    parts: dict[str, Size] = dict.fromkeys(PARTS, 0.0)

    def each(self, change: Callable[[Size], Size]) -> Spending:
        """The same with every number changed."""
        flops, moved, wire, ideal_s = map(change, self[:4])
        return Spending(flops, moved, wire, ideal_s, {name: change(value) for name, value in self.parts.items()})


@dataclass(frozen=True, kw_only=True)
class RowPrice:
    """One call of one row; numbers are floats or arrays.

    ``waits_s``: of its seconds, those in which it keeps neither arithmetic nor memory busy. ``error``: relative median
    error of the seconds. ``level``: what stands behind them, an index into :data:`tensorcast.cost.evidence.LEVELS`, or
    an array of these where calls differ. ``spend`` tells what is computed and moved, for those who ask.
    """

    row: Row
    seconds: Size
    waits_s: Size
    family: str
    level: int | np.ndarray
    error: Size
    spend: Callable[[], Spending]
    has_formula: bool = True
    detail: str = ""

    @cached_property
    def spending(self) -> Spending:
        return self.spend()

    @property
    def flops(self) -> Size:
        return self.spending.flops

    @property
    def bytes(self) -> Size:
        return self.spending.bytes

    @property
    def wire_bytes(self) -> Size:
        return self.spending.wire_bytes

    @property
    def ideal_compute_s(self) -> Size:
        return self.spending.ideal_compute_s

    @property
    def parts(self) -> dict[str, Size]:
        return self.spending.parts

    @property
    def evidence(self) -> str | np.ndarray:
        """``measured``, ``calibrated`` or ``datasheet``; an array of these where calls differ."""
        level = one_level(self.level)
        return np.array(LEVELS)[level] if isinstance(level, np.ndarray) else LEVELS[level]

    def at(self, where: Where) -> RowPrice:
        """The price at some of the batches."""
        if where is None:
            return self
        return replace(
            self, seconds=pick(self.seconds, where), waits_s=pick(self.waits_s, where),
            level=one_level(pick(self.level, where)), error=pick(self.error, where),
            spend=lambda: self.spending.each(lambda value: pick(value, where)),
        )  # fmt: skip

    def times(self, count: Size) -> RowPrice:
        """The price of ``count`` such calls."""
        return replace(
            self, seconds=self.seconds * count, waits_s=self.waits_s * count,
            spend=lambda: self.spending.each(lambda value: value * count),
        )  # fmt: skip

def spending_of(calls: Sequence[Call], device: DeviceProfile) -> Spending:
    """What the kernels of a row compute and move, and what bounds them."""
    flops: Size = 0.0
    moved: Size = 0.0
    ideal_s: Size = 0.0
    compute_s: Size = 0.0
    memory_s: Size = 0.0
    latency_s: Size = 0.0
    for work, timing, factor, launch_s in calls:
        flops = flops + work.flops * work.calls
        moved = moved + work.bytes * work.calls
        ideal_s = ideal_s + work.flops / peak_flops(device, work.dtype) * work.calls
        compute_s = compute_s + timing.compute_s * factor * work.calls
        memory_s = memory_s + timing.memory_s * factor * work.calls
        latency_s = latency_s + launch_s * work.calls
    parts: dict[str, Size] = {"compute": compute_s, "memory": memory_s, "network": 0.0, "latency": latency_s}
    return Spending(flops, moved, 0.0, ideal_s, parts)


def joined(found: Sequence[tuple[np.ndarray, Callable[[], RowPrice]]], shape: tuple[int, ...]) -> RowPrice:
    """One price of this shape from those of parts of the first axis, each told when it is called."""
    prices = [(part, price()) for part, price in found]

    def gather(values: Iterable[Size]) -> np.ndarray:
        whole = np.empty(shape)
        for (part, _), value in zip(prices, values, strict=True):
            whole[part] = value
        return whole

    def spend() -> Spending:
        each = [price.spending for _, price in prices]
        flops, moved, wire, ideal_s = (gather(one[:4][i] for one in each) for i in range(4))
        return Spending(flops, moved, wire, ideal_s, {n: gather(one.parts[n] for one in each) for n in PARTS})

    seconds, waits, error, level = (
        gather(getattr(price, name) for _, price in prices) for name in ("seconds", "waits_s", "error", "level")
    )
    levels = one_level(level.astype(np.int8))
    return replace(prices[0][1], seconds=seconds, waits_s=waits, error=error, level=levels, spend=spend)


class Part(NamedTuple):
    """Rows of a step that run equally often up to their ``calls``: each ``calls * times``, where ``times`` may hang on
    the batch. Where batches have sizes in common, rows are priced once for each case, and ``at`` is every batch's case.
    ``prices`` may be those of equal rows, that stand elsewhere.
    """

    rows: tuple[Row, ...]
    prices: tuple[RowPrice, ...]
    calls: tuple[int, ...]
    times: Size = 1
    at: Where = None


@dataclass(frozen=True, kw_only=True)
class StepPrice:
    """A step: its rows' prices and the time of the slowest pipeline stage, of the whole step, and of its overheads.

    ``request_overhead_s``: of the overheads, what comes with sequences. ``hidden_s``: kernel seconds that pass while
    others run; ``hidden_comm_s`` of them are communication.
    """

    parts: tuple[Part, ...]
    seconds: Size
    overhead_s: Size
    request_overhead_s: Size
    overhead_error_s: Size
    micro_batches: Size
    hidden_s: Size = 0.0
    hidden_comm_s: Size = 0.0

    @cached_property
    def calls(self) -> tuple[tuple[RowPrice, Size], ...]:
        """Every row's price at every batch, and how often it runs in one pass over all stages."""
        every = ((part, *call) for part in self.parts for call in zip(part.rows, part.prices, part.calls, strict=True))
        return tuple((replace(price.at(part.at), row=row), calls * part.times) for part, row, price, calls in every)

    @property
    def rows(self) -> tuple[RowPrice, ...]:
        """Every row's price at every batch."""
        return tuple(row for row, _ in self.calls)

    @cached_property
    def tally(self) -> Tally:
        """Sums over all rows' calls in one pass over all stages: one product of matrices for rows of one shape."""
        names = sorted({price.family for part in self.parts for price in part.prices})
        sums, axes = np.zeros((len(names) + len(Tally._fields) + len(LEVELS) - 2, 1, 1)), 0
        for part in self.parts:
            found, ndim = _sums(part, names)
            one = isinstance(part.at, int | np.integer)  # of the cases, which is then no axis
            axes = max(axes, 0 if one and ndim == 1 else ndim, np.ndim(part.times))
            sums = sums + pick(found, np.array([part.at]) if one else part.at) * part.times
        whole = sums if axes == 2 else sums[:, 0] if axes else sums[:, 0, 0]
        seconds, communication, attention, experts = whole[len(names) : -len(LEVELS)]
        levels = whole[-len(LEVELS) :] / np.maximum(whole[-len(LEVELS) :].sum(axis=0), 1e-30)
        evidence: dict[str, Size] = dict(zip(LEVELS, levels, strict=True))
        return Tally(whole[: len(names)], seconds, communication, attention, experts, evidence)

    @cached_property
    def error(self) -> Size:
        """Median relative error of the sum: errors of one family move together, families and overhead independently."""
        squares = np.square(self.tally.errors).sum(axis=0) + self.overhead_error_s**2
        return np.sqrt(squares) / np.maximum(self.tally.seconds + self.overhead_s, 1e-30)

    @cached_property
    def exposed_comm_s(self) -> Size:
        """Communication that the step waits for."""
        return self.tally.communication - self.hidden_comm_s


class Tally(NamedTuple):
    """Seconds of a step's rows: of all, of collectives, of ops that run per sequence, of experts with dispatch and
    combine, which take the tokens of all data-parallel ranks; times their error ``[families, ...]``; and the share of
    them behind which each kind of evidence stands."""

    errors: np.ndarray
    seconds: Size
    communication: Size
    attention: Size
    experts: Size
    evidence: dict[str, Size]


PER_SEQUENCE = ("attention", "indexer_scores", "linear_attention", "ssm_scan", "causal_conv1d")
"""Ops that run per sequence: in a step with prompts they run once for the prompts and once for the decoding rows."""


def _sums(part: Part, families: Sequence[str]) -> tuple[np.ndarray, int]:
    """Of one part ``[families and sums of a tally, members, cases]``, each of its rows at its number of calls; and axes
    of its rows' prices."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, (price, calls) in enumerate(zip(part.prices, part.calls, strict=True)):
        if calls:
            alike.setdefault(np.broadcast(price.seconds, price.error, price.level).shape, []).append(i)
    size, sums = len(families) + 4, np.zeros((len(families) + 4 + len(LEVELS), 1, 1))
    for shape, rows in alike.items():
        seconds, errors = np.empty((len(rows), *shape)), np.empty((len(rows), *shape))
        weights = np.zeros((len(sums), len(rows)))
        mixed: list[tuple[int, np.ndarray]] = []  # calls of more than one level
        for j, i in enumerate(rows):
            price, row, calls = part.prices[i], part.prices[i].row, part.calls[i]
            seconds[j], errors[j] = price.seconds, price.error
            if isinstance(row, Collective):
                among = True, False, row.group in ("dp", "ep")
            else:
                among = False, row.name in PER_SEQUENCE, row.stage in EXPERT_STAGES
            weights[families.index(price.family), j] = calls
            weights[size - 4 : size, j] = calls, *(calls * inside for inside in among)
            if isinstance(price.level, int):
                weights[size + price.level, j] = calls
            else:
                mixed.append((j, price.level))
        flat, ends = seconds.reshape(len(rows), -1), (*(1,) * (2 - len(shape)), *shape)
        found = np.concatenate([
            weights[: size - 4] @ (flat * errors.reshape(flat.shape)), weights[size - 4 :] @ flat
        ]).reshape(len(sums), *ends)
        for j, level in mixed:
            of_level = np.equal.outer(np.arange(len(LEVELS)), np.broadcast_to(level, shape))
            found[size:] += (weights[size - 4, j] * seconds[j] * of_level).reshape(len(LEVELS), *ends)
        sums = sums + found
    return sums, max(map(len, alike), default=0)


def total(values: Iterable[Size]) -> Size:
    """The sum; numbers and narrow arrays first, so that few additions are over whole fleets."""
    return sum(sorted(values, key=np.ndim), 0.0)


seconds_of = attrgetter("seconds")


def one_level(levels: Size) -> int | np.ndarray:
    """Levels as one number where they are all the same."""
    if isinstance(levels, int):
        return levels
    levels = np.asarray(levels)
    first = levels.flat[0]
    return levels if levels.size > 1 and (levels != first).any() else int(first)


def pick(value: Size, where: Where) -> Size:
    """Entries ``where`` of the last axis; numbers as they are."""
    if where is None or not isinstance(value, np.ndarray) or value.ndim == 0 or value.shape[-1] == 1:
        return value
    return value[..., where]
