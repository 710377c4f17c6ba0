"""Prices of a step's rows and of the step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from tensorcast.cost.evidence import LEVELS
from tensorcast.cost.roofline import Devices, peak_flops
from tensorcast.cost.row_seconds import Call
from tensorcast.cost.work import Size
from tensorcast.deploy.plan.plan import Row
from tensorcast.profiles.device import DeviceProfile

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

    def each(self, change: Callable[[Any], Any], row: Row | None = None) -> RowPrice:
        """The price with every number changed, of another row where one is given."""
        return RowPrice(
            row=self.row if row is None else row, seconds=change(self.seconds), waits_s=change(self.waits_s),
            family=self.family, level=self.level if isinstance(self.level, int) else one_level(change(self.level)),
            error=change(self.error), has_formula=self.has_formula,
            spend=untold if self.spend is untold else lambda: self.spending.each(change),
            detail=self.detail,
        )

    def times(self, count: Size) -> RowPrice:
        """The price of ``count`` such calls."""
        return replace(
            self, seconds=self.seconds * count, waits_s=self.waits_s * count,
            spend=untold if self.spend is untold else lambda: self.spending.each(lambda value: value * count),
        )  # fmt: skip

def untold() -> Spending:
    """Stands in where nobody asks what rows compute and move: that would hold the sizes of all in memory."""
    raise AssertionError("what these rows spend is not told")


def spending_of(calls: Sequence[Call], device: DeviceProfile | Devices) -> Spending:
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


def joined(
    found: Sequence[tuple[np.ndarray, Callable[[], RowPrice]]], shape: tuple[int, ...], row: Row | None = None
) -> RowPrice:
    """One price of this shape, of this row, from those of parts of the first axis, each told when it is called."""
    prices = [(part, price()) for part, price in found]
    standing = np.concatenate([part for part, _ in prices])
    order = slice(None) if np.all(standing[1:] > standing[:-1]) else np.argsort(standing)

    def spend() -> Spending:
        def gather(values: Iterable[Size]) -> np.ndarray:
            pairs = zip(prices, values, strict=True)
            every = [np.broadcast_to(value, (len(part), *shape[1:])) for (part, _), value in pairs]
            return np.concatenate(every)[order]

        each = [price.spending for _, price in prices]
        flops, moved, wire, ideal_s = (gather(one[:4][i] for one in each) for i in range(4))
        return Spending(flops, moved, wire, ideal_s, {n: gather(one.parts[n] for one in each) for n in PARTS})

    joined_up: dict[str, Any] = {}
    for name in ("seconds", "waits_s", "error", "level"):
        values = [getattr(price, name) for _, price in prices]
        if name in ("error", "level") and not any(map(np.ndim, values)) and len({*values}) == 1:
            joined_up[name] = values[0]
            continue
        whole = joined_up[name] = np.empty(shape, dtype=int if name == "level" else float)
        for (part, _), value in zip(prices, values, strict=True):
            whole[part] = value
    joined_up |= {"level": one_level(joined_up["level"]), "row": row or prices[0][1].row}
    return replace(prices[0][1], **joined_up, spend=untold if prices[0][1].spend is untold else spend)


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


class Tally(NamedTuple):
    """Seconds of a step's rows in one pass over all stages: of all, of collectives, of ops that run per sequence, of
    experts with dispatch and combine, which take the tokens of all data-parallel ranks; times their error ``[families,
    ...]``; and the share of them behind which each kind of evidence stands."""

    errors: np.ndarray
    seconds: Size
    communication: Size
    attention: Size
    experts: Size
    evidence: dict[str, Size]


OTHER_VENDOR_ERROR = 0.18
"""Median error of a step's kernels, together, where an engine's own part was fitted on another vendor's devices: what
its other build runs there is in no table. As far off is the median of 45 public runs of vLLM and SGLang on MI300X and
MI355X (``make amd``)."""


class Overheads(NamedTuple):
    """Seconds that an engine spends on a step, a layer and a sequence, the error of those on layers, and a relative one
    of the kernels where these were fitted on another vendor's devices; numbers, or one for every batch."""

    step_s: Size
    layer_s: Size
    request_s: Size
    layer_error_s: Size
    kernels_error: Size
    serial_s: Size
    """Of a step without drafts whose scheduler plans none ahead."""


@dataclass(frozen=True, kw_only=True)
class StepPrice:
    """A step: its rows' prices and sums, and the time of the slowest pipeline stage, of the whole step, and of its
    overheads. Of steps that are priced as one there are sums alone.

    ``request_overhead_s``: of the overheads, what comes with sequences; ``host_s``: in which kernels wait for the host
    that launches them, so that a step takes no less than ``least_s``. ``hidden_s``: kernel seconds that pass while
    others run; ``hidden_comm_s`` of them are communication, and for ``exposed_comm_s`` of it the step waits.
    ``error``: relative, a median; errors of one family move together, families and overhead independently.
    """

    parts: tuple[Part, ...]
    tally: Tally
    seconds: Size
    overhead_s: Size
    request_overhead_s: Size
    host_s: Size
    least_s: Size
    overhead_error_s: Size
    micro_batches: Size
    hidden_s: Size
    hidden_comm_s: Size
    exposed_comm_s: Size
    error: Size

    @cached_property
    def calls(self) -> tuple[tuple[RowPrice, Size], ...]:
        """Every row's price at every batch, and how often it runs in one pass over all stages."""
        every = ((part, *call) for part in self.parts for call in zip(part.rows, part.prices, part.calls, strict=True))
        return tuple(
            (price.each(partial(pick, where=part.at), row), calls * part.times)
            for part, row, price, calls in every
        )

    @property
    def rows(self) -> tuple[RowPrice, ...]:
        """Every row's price at every batch."""
        return tuple(row for row, _ in self.calls)


def one_level(levels: Size) -> int | np.ndarray:
    """Levels as one number where they are all the same."""
    if isinstance(levels, int):
        return levels
    levels = np.asarray(levels)
    first = levels.flat[0]
    return levels if levels.size > 1 and (levels != first).any() else int(first)


def pick(value: Size, where: Where) -> Size:
    """Entries ``where`` of the last axis; numbers as they are."""
    if where is None or not isinstance(value, np.ndarray) or value.ndim == 0:
        return value
    if value.shape[-1] == 1:  # the same at all of them
        return value[..., 0] if isinstance(where, int) else value
    return value[..., where]
