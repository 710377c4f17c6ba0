"""Copies of experts on ranks of equal size, as even as counts allow: the packing behind EPLB placement.

Starts from the published load balancer of DeepSeek (github.com/deepseek-ai/EPLB): one more copy for the expert with
most load per copy, then the heaviest copy to the lightest rank with room, by nodes where groups divide over them. Swaps
then improve it; the busiest rank is never busier than with the published algorithm.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

SMALLEST_GAIN = 1e-6
"""Relative drop of the busiest rank's load below which another swap is not worth having."""
SWAPS_PER_SLOT = 4
"""Bound on the swaps of one packing; seldom reached (they run out first)."""
ROUNDING = 1e-12
"""Two sums of the same loads in another order may differ by as much, relatively."""


def balance(load: np.ndarray, total: int, ranks: int, nodes: int, groups: int) -> np.ndarray:
    """Logical experts on each rank, ``[ranks, total / ranks]``: no rank busier than the published algorithm's busiest.

    Groups go to nodes as published, with its best swaps, and in order: the best outcome of these.
    """
    members = np.arange(len(load)).reshape(groups if nodes > 1 else 1, -1)
    group_load, names = load[members].sum(axis=1), np.arange(len(members))
    dealt = _deal(group_load, names, nodes, apart=False)
    arrangements = [dealt, _swap(dealt, group_load, names), names.reshape(nodes, -1)] if nodes > 1 else [dealt]
    floor, found = np.inf, []
    for arrangement in arrangements:
        experts = [members[row].ravel() for row in arrangement]  # of each node
        published = [_published(load[ids], ids, total // nodes, ranks // nodes) for ids in experts]
        if arrangement is dealt:
            floor = max(copies.busiest(rows) for copies, rows in published) * (1 + ROUNDING)
        top, parts = 0.0, []
        for ids, (greedy, packed) in zip(experts, published, strict=True):
            copies, rows = _within(load[ids], greedy, packed, floor)
            top = max(top, copies.busiest(rows))
            parts.append(ids[copies.logical[rows]])
        if top <= floor:
            placed = np.concatenate(parts)
            found.append((int((_holdings(placed, np.arange(len(load))) - 1).clip(0).sum()), top, placed))
    return min(found, key=lambda one: one[:2])[2]  # fewest copies beside another of their own, then most even


def _published(load: np.ndarray, ids: np.ndarray, total: int, ranks: int) -> tuple[_Copies, np.ndarray]:
    """One node as published. It leaves open who of equally loaded experts gets a copy: the best of four orders."""
    turns = np.arange(len(ids))
    greedy = [_Copies.greedy(load, total, order) for order in (turns, -turns, ids, -ids)]
    return min(((copies, copies.pack(ranks, apart=False)) for copies in greedy), key=lambda one: one[0].busiest(one[1]))


def _within(load: np.ndarray, greedy: _Copies, packed: np.ndarray, floor: float) -> tuple[_Copies, np.ndarray]:
    """Copies on the ranks of one node, apart from each other as far as the busiest rank stays within ``floor``."""
    ranks, total = len(packed), packed.size
    # a copy on every rank is as even as an expert gets: what more copies would take, others can use
    spread = _Copies.greedy(load, total, np.arange(len(load)), limit=max(ranks, -(-total // len(load))))
    plain = _Copies.of(load, np.arange(total) % len(load))  # linear placement may happen to be the best
    starts = [(spread, spread.pack(ranks, apart=True)), (greedy, packed), (plain, np.arange(total).reshape(ranks, -1))]
    apart = []
    for copies, rows in starts:
        rows = _swap(_part(rows, copies.share, copies.logical), copies.share, copies.logical)
        apart.append((copies.busiest(rows), copies, rows))
    top, copies, rows = min(apart, key=lambda one: one[0])
    if top > floor:
        copies, rows = greedy, _swap(packed, greedy.share, greedy.logical)
        rows = _part(rows, greedy.share, greedy.logical, ceiling=floor)
    return copies, rows


@dataclass(frozen=True)
class _Copies:
    """Physical experts before they have a place: ``logical`` [n], and the load that each takes, ``share`` [n]."""

    logical: np.ndarray
    share: np.ndarray

    @classmethod
    def of(cls, load: np.ndarray, logical: np.ndarray) -> _Copies:
        return cls(logical, (load / np.bincount(logical))[logical])

    @classmethod
    def greedy(cls, load: np.ndarray, total: int, order: np.ndarray, limit: int = 0) -> _Copies:
        """One copy of each expert; each further one to the expert with most load per copy (at most ``limit`` each).

        Ties go to the lowest in ``order``; with a limit, first to the expert with fewest copies.
        """
        copies, turn = [1] * len(load), order.tolist()
        queue = [(-value, 0, turn[expert], expert) for expert, value in enumerate(load.tolist())]
        heapq.heapify(queue)
        logical = list(range(len(load)))
        while len(logical) < total:
            expert = heapq.heappop(queue)[-1]
            if limit and copies[expert] >= limit:
                continue  # full: leaves the queue for good
            logical.append(expert)
            copies[expert] += 1
            share = float(load[expert]) / copies[expert]
            heapq.heappush(queue, (-share, copies[expert] if limit else 0, turn[expert], expert))
        return cls.of(load, np.array(logical))

    def pack(self, ranks: int, apart: bool) -> np.ndarray:
        return _deal(self.share, self.logical, ranks, apart)

    def busiest(self, rows: np.ndarray) -> float:
        return float(self.share[rows].sum(axis=1).max())


def _deal(weight: np.ndarray, kind: np.ndarray, bins: int, apart: bool) -> np.ndarray:
    """Items to ``bins`` of equal size, heaviest first, each to the lightest with room: indices ``[bins, n / bins]``.

    ``apart``: bins that hold the item's kind already come last.
    """
    size = len(weight) // bins
    rows: list[list[int]] = [[] for _ in range(bins)]
    load = np.zeros(bins)
    held = np.zeros((bins, int(kind.max()) + 1))
    shunned = float(weight.sum()) + 1.0 if apart else 0.0
    for item in np.argsort(-weight, kind="stable").tolist():
        target = int((load + shunned * held[:, kind[item]]).argmin())
        rows[target].append(item)
        held[target, kind[item]] += 1
        load[target] = np.inf if len(rows[target]) == size else load[target] + weight[item]
    return np.array(rows, dtype=np.int64)


def _holdings(rows: np.ndarray, kind: np.ndarray) -> np.ndarray:
    """Items of each kind in each bin, ``[bins, kinds]``."""
    held = np.zeros((len(rows), int(kind.max()) + 1), dtype=np.int64)
    np.add.at(held, (np.arange(len(rows))[:, None], kind[rows]), 1)
    return held


def _trade(held: np.ndarray, a: int, b: int, given: int, taken: int) -> None:
    """Book that bin ``a`` gives ``b`` an item of kind ``given`` for one of kind ``taken``."""
    for bin_, kind, change in ((a, given, -1), (b, given, 1), (b, taken, -1), (a, taken, 1)):
        held[bin_, kind] += change


def _part(rows: np.ndarray, weight: np.ndarray, kind: np.ndarray, ceiling: float = np.inf) -> np.ndarray:
    """Swap items until no bin holds two of a kind that some bin lacks; of the swaps that do it, the most even.

    One always does: a bin that lacks the kind holds something that the crowded bin lacks, or itself two of a kind.
    Swaps that lift a bin to ``ceiling`` or over are not made, though; then what they would part stays together.
    """
    rows, held = rows.copy(), _holdings(rows, kind)
    while True:
        load, other = weight[rows].sum(axis=1), kind[rows]
        twice = np.take_along_axis(held, other, axis=1) > 1  # [bins, slots]
        for a, double in np.argwhere((held > 1) & (held == 0).any(axis=0)).tolist():
            slot = int(np.flatnonzero(other[a] == double)[0])
            helps = (held[:, double] == 0)[:, None] & ((held[a][other] == 0) | twice)
            moved = weight[rows[a, slot]] - weight[rows]
            after = np.where(helps, np.maximum(load[a] - moved, load[:, None] + moved), np.inf)
            b, at = np.unravel_index(int(after.argmin()), after.shape)
            if after[b, at] < ceiling:
                break
        else:
            return rows
        _trade(held, a, int(b), double, int(other[b, at]))
        rows[a, slot], rows[b, at] = rows[b, at], rows[a, slot]


def _swap(rows: np.ndarray, weight: np.ndarray, kind: np.ndarray) -> np.ndarray:
    """Trade an item of the heaviest bin for one elsewhere while that lowers the maximum of the two, best trade first.

    No trade puts a second item of a kind into a bin, and the heaviest bin never gets heavier.
    """
    rows, held = rows.copy(), _holdings(rows, kind)
    for _ in range(SWAPS_PER_SLOT * rows.size):
        weights = weight[rows]
        load = weights.sum(axis=1)
        top = int(load.argmax())
        moved = weights[top][:, None, None] - weights  # [slots of top, bins, slots]
        after = np.maximum(load[top] - moved, load[:, None] + moved)
        barred = (held[:, kind[rows[top]]].T > 0)[:, :, None] | (held[top][kind[rows]] > 0)
        after[barred] = np.inf  # the heaviest bin itself is barred: it holds all its kinds
        slot, b, at = np.unravel_index(int(after.argmin()), after.shape)
        if not after[slot, b, at] < load[top] * (1 - SMALLEST_GAIN):
            break
        ours, theirs = rows[top, slot], rows[b, at]
        _trade(held, top, int(b), int(kind[ours]), int(kind[theirs]))
        rows[top, slot], rows[b, at] = theirs, ours
    return rows
