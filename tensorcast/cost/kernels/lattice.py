"""Times outside the data: priced on a lattice of sizes where they never fall, and between its nodes.

What carries over to other sizes, models or groups of ranks are ratios (rows per expert, full waves, bytes per FLOP),
and trees over ratios step up and down as a size grows. So they are asked at few sizes alone, mostly powers of two. A
node takes as long as the middle (of logs) between the longest of the nodes of no larger sizes and the shortest of those
of no smaller ones, which both never fall; and between nodes the log of the time goes linearly over the logs of sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorcast.cost.kernels.vocabulary import UNRELATED, Columns
from tensorcast.cost.work import Array

_POWERS = 2.0 ** np.arange(44.0)
"""Powers of two without an end that is asked for."""

_HEADS = {"batch": _POWERS, "new": _POWERS, "past": _POWERS, "q_heads": _POWERS}
_KINDS = {"head_dim": np.array([64.0, 128, 256, 512, 1024]), "window": np.array([128.0, 1024, 8192, 1 << 40])}
_PAYLOAD = {"payload_bytes": 64 * _POWERS}

SIDES: Mapping[str, Mapping[str, Array]] = {
    "gemm": {"m": _POWERS, "n": 64 * _POWERS, "k": 64 * _POWERS, "batch": _POWERS},
    "grouped_gemm": {"tokens": _POWERS, "hidden": 1024 * _POWERS, "inter": 512 * _POWERS, "topk": _POWERS},
    "attention_prefill": _HEADS | _KINDS, "attention_decode": _HEADS | _KINDS,
    "mla_prefill": _HEADS, "mla_decode": _HEADS, "mla_prefill_module": _HEADS, "mla_decode_module": _HEADS,
    "quantize": {"m": _POWERS, "k": 64 * _POWERS},
    "all_reduce": _PAYLOAD, "all_gather": _PAYLOAD, "reduce_scatter": _PAYLOAD, "all_to_all": _PAYLOAD,
    "moe_exchange": {"tokens": _POWERS, "hidden": 256 * _POWERS, "topk": _POWERS},
}
"""The sizes in which a family's times grow (top-k where routing is not skewed: skewed loads are means over draws), and
where the lattice's nodes lie; smaller ones take as long as the first. Head sizes and windows have nodes where some were
measured: they pick their kernels."""

WEIGHTS = UNRELATED
"""Under which every combination of the other sizes has a sum of its own."""

MOST_NODES = 1 << 21
"""Nodes that are kept."""

Price = Callable[[Columns], Array]
"""log of the seconds of every call, from its sizes."""


Places = NDArray[np.int_]
"""Of a node on every side."""


class _Grid(NamedTuple):
    """Nodes of one combination of other sizes: ``priced`` from the node ``start`` on, NaN where none was needed, and
    ``times`` between the nodes ``low`` and ``high``, that were asked for."""

    start: Places
    priced: Array
    low: Places
    high: Places
    times: Array


class Lattice:
    """The nodes of one kernel, kept by the sizes that are no ``sides`` of the lattice (experts, ranks, routing).

    ``sides``: as in :data:`SIDES`; ``box``: the ends between which a size was measured, beyond the upper of which nodes
    only get longer. ``reach``: how many nodes beside the asked ones are looked at (default: all that matter).
    """

    def __init__(
        self, sides: Mapping[str, Array], box: Mapping[str, tuple[float, float]], price: Price,
        reach: int | None = None,
    ) -> None:
        self.sides, self.price, self.reach = sides, price, reach
        self._last = np.array([len(nodes) - 1 for nodes in sides.values()])
        self._box = {name: box[name][1] for name in sides}
        # beyond a single measured node times only get longer: there nodes need none but their neighbours
        self._alone = np.array([self._box[name] <= nodes[0] for name, nodes in sides.items()])
        self._grids: dict[tuple[float, ...], _Grid] = {}
        self._held = 0

    def log_seconds(self, columns: Columns) -> Array:
        """log seconds of every call."""
        if self._held > MOST_NODES:
            self._grids, self._held = {}, 0
        if "window" in self.sides:  # none is zero, and no small one
            columns = columns | {"windowed": np.sign(columns["window"])}
        at = self._places(columns)
        others = [name for name in columns if name not in self.sides]
        table = np.array([*(columns[name] for name in others), *np.floor(at[self._alone])])
        table = table.reshape(-1, at.shape[1])
        codes = sum((w * values for w, values in zip(WEIGHTS, table, strict=False)), np.zeros(at.shape[1]))
        _, first, group = np.unique(codes, return_index=True, return_inverse=True)
        order, groups = np.argsort(group, kind="stable"), table[:, first].T
        parts = np.split(order, np.searchsorted(group[order], np.arange(1, len(first))))
        ends = ((at[:, part].min(axis=1), at[:, part].max(axis=1)) for part in parts)
        bounds = [(np.floor(low).astype(int), np.ceil(high).astype(int)) for low, high in ends]
        self._fill(others, groups, bounds)
        result = np.empty(len(order))
        for values, part in zip(groups, parts, strict=True):
            grid = self._grids[tuple(values)]
            result[part] = _between(grid.times, at[:, part] - grid.low[:, None])
        return result

    def _places(self, columns: Columns) -> Array:
        """``[sides, calls]``: between which nodes the sizes lie. Top-k's last one is all experts; query heads count by
        cached head."""
        places = []
        for name, nodes in self.sides.items():
            size = columns[name]
            if name == "q_heads" and "kv_heads" in columns:
                size = size / columns["kv_heads"]
            if name == "topk":
                below = np.exp2(np.floor(np.log2(columns["experts"])))
                left = np.log2(np.maximum(columns["experts"] / below, 1.01))
                size = np.where(size > below, below * (size / below) ** (1.0 / left), size)
            at = np.interp(np.log2(np.maximum(size, nodes[0])), np.log2(nodes), np.arange(len(nodes)))
            places.append(np.round(at, 12))
        return np.stack(places)

    def _fill(self, others: Sequence[str], groups: Array, bounds: Sequence[tuple[Places, Places]]) -> None:
        """Price the nodes that are asked for and missing, of all groups at once."""
        asked, nodes = list[tuple[tuple[float, ...], _Grid, Places]](), list(self.sides.values())
        for values, (low, high) in zip(groups, bounds, strict=True):
            key, known = tuple(values), self._grids.get(tuple(values))
            if known is not None:
                if (low >= known.low).all() and (high <= known.high).all():
                    continue
                low, high = np.minimum(low, known.low), np.maximum(high, known.high)
            first, last = np.maximum(low - (self.reach or 0), 0), np.minimum(high + (self.reach or 0), self._last)
            if self.reach is None:
                most = dict(self._box)  # per side the size beyond which times only grow
                if "q_heads" in most and "kv_heads" in others:
                    most["q_heads"] /= values[others.index("kv_heads")]
                ends = [np.searchsorted(side, size) for side, size in zip(nodes, most.values(), strict=True)]
                first, last = np.where(self._alone, low, 0), np.maximum(high, np.minimum(ends, self._last))
            if known is not None:
                first = np.minimum(first, known.start)
                last = np.maximum(last, known.start + known.priced.shape - 1)
            priced = np.full(tuple(last - first + 1), np.nan)
            if known is not None:
                there = zip(known.start - first, known.priced.shape, strict=True)
                priced[tuple(slice(a, a + count) for a, count in there)] = known.priced
            # no larger than all that is asked in any size, or no smaller
            axes = np.ogrid[tuple(slice(a, b + 1) for a, b in zip(first, last, strict=True))]
            below = reduce(np.logical_and, [axis <= end for axis, end in zip(axes, high, strict=True)])
            above = reduce(np.logical_and, [axis >= end for axis, end in zip(axes, low, strict=True)])
            new = np.flatnonzero(np.isnan(priced) & (below | above))
            asked.append((key, _Grid(first, priced, low, high, priced), new))
        if not asked:
            return
        places = [
            grid.start[:, None] + np.array(np.unravel_index(new, grid.priced.shape)) for _, grid, new in asked
        ]
        every, sizes = np.concatenate(places, axis=1), [len(new) for _, _, new in asked]
        columns = {name: side[at] for (name, side), at in zip(self.sides.items(), every, strict=True)}
        table = np.repeat(np.array([key for key, _, _ in asked]), sizes, axis=0)
        seconds = self.price(_possible(columns | dict(zip(others, table.T, strict=False))))
        found = np.split(seconds, np.cumsum(sizes)[:-1])
        for (key, grid, new), values in zip(asked, found, strict=True):
            grid.priced.ravel()[new] = values
            self._held += len(new)
            missing = np.isnan(grid.priced)
            longest, shortest = np.where(missing, -np.inf, grid.priced), np.where(missing, np.inf, grid.priced)
            for axis, (low, high) in enumerate(zip(grid.low - grid.start, grid.high - grid.start, strict=True)):
                # what was asked is all that is needed once an axis has been passed
                some = (slice(None),) * axis + (slice(low, high + 1),)
                longest = np.maximum.accumulate(longest, axis=axis)[some]
                shortest = np.flip(np.minimum.accumulate(np.flip(shortest, axis), axis=axis), axis)[some]
            self._grids[key] = grid._replace(times=(shortest + longest) / 2.0)


def _possible(columns: Columns) -> Columns:
    """Nodes as calls that can be: no more choices than experts."""
    if "topk" in columns and "experts" in columns:
        columns["topk"] = np.minimum(columns["topk"], columns["experts"])
    if "kv_heads" in columns:
        columns["q_heads"] = columns["q_heads"] * columns["kv_heads"]
    if "windowed" in columns:
        columns["window"] = columns["window"] * columns.pop("windowed")
    return columns


def _between(grid: Array, at: Array) -> Array:
    """``grid`` at places ``at [axes, calls]`` (in nodes), linearly along every axis."""
    low, last = at.astype(int), np.array(grid.shape)[:, None] - 1
    share, steps = at - low, np.append(np.cumprod(grid.shape[:0:-1])[::-1], 1).astype(int)[:, None]
    first = np.minimum(low, last) * steps  # in the flat grid
    up = np.minimum(low + 1, last) * steps - first
    values, start, result = grid.ravel(), first.sum(axis=0), np.zeros(at.shape[1])
    axes = [axis for axis in range(len(at)) if share[axis].any()]
    for corner in product((0, 1), repeat=len(axes)):
        place, weight = start, np.ones(at.shape[1])
        for axis, one in zip(axes, corner, strict=True):
            place, weight = (place + up[axis], weight * share[axis]) if one else (place, weight * (1.0 - share[axis]))
        result += weight * values[place]
    return result
