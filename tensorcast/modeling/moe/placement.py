"""Which rank holds which expert, how often, and which replica a token goes to.

A *logical* expert is one of the model's E experts; a *physical* expert is a slot on a rank that holds a copy of one.
Physical ids count slots rank after rank, so a rank's experts are one range of ids whatever the policy.

``linear`` and ``round_robin`` follow vLLM's two strategies; ``eplb`` starts from DeepSeek's published load balancer
(github.com/deepseek-ai/EPLB: replicate the hottest, then pack greedily, by nodes where groups divide over them) and
improves on it. A layout that the counts do not fit is an :class:`InputError`.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from tensorcast.errors import InputError

SMALLEST_GAIN = 1e-6
"""Relative drop of the busiest rank's load below which another swap is not worth having."""
SWAPS_PER_SLOT = 4
"""Bound on the swaps of one packing; seldom reached (they run out first)."""
ROUNDING = 1e-12
"""Two sums of the same loads in another order may differ by as much, relatively."""


def assign_experts(num_experts: int, world_size: int, rank: int) -> tuple[int, int]:
    """First expert of ``rank`` and how many it holds: contiguous, one more on the first ``num_experts % world_size``.

    Ranks beyond the experts hold none.
    """
    if num_experts < 0 or world_size < 1:
        raise InputError(f"num_experts {num_experts} over world_size {world_size}: need at least 0 and at least 1")
    if not 0 <= rank < world_size:
        raise InputError(f"rank {rank}: must be from 0 to {world_size - 1} (world_size {world_size})")
    share, left = divmod(num_experts, world_size)
    return rank * share + min(rank, left), share + (rank < left)


@dataclass(frozen=True)
class Placement:
    """Copies of ``num_experts`` logical experts on the slots of ``ranks`` ranks.

    ``physical_to_logical``: the expert in each slot, rank after rank. ``experts_per_rank``: slots of each rank.
    """

    num_experts: int
    ranks: int
    physical_to_logical: tuple[int, ...]
    experts_per_rank: tuple[int, ...]

    def __post_init__(self) -> None:
        held = set(self.physical_to_logical)
        if len(self.experts_per_rank) != self.ranks:
            raise InputError(f"placement: {len(self.experts_per_rank)} experts_per_rank for {self.ranks} ranks")
        if self.ranks < 1 or min(self.experts_per_rank) < 0:
            raise InputError("placement: needs at least one rank, and no rank with fewer than 0 experts")
        if sum(self.experts_per_rank) != self.num_physical:
            raise InputError(
                f"placement: experts_per_rank adds up to {sum(self.experts_per_rank)},"
                f" physical_to_logical has {self.num_physical} entries"
            )
        if strange := held - set(range(self.num_experts)):
            raise InputError(f"placement: expert {min(strange)} is not one of 0..{self.num_experts - 1}")
        if missing := set(range(self.num_experts)) - held:
            raise InputError(f"placement: expert {min(missing)} is on no rank ({len(missing)} missing)")

    @property
    def num_physical(self) -> int:
        """Slots over all ranks: logical experts and their extra copies."""
        return len(self.physical_to_logical)

    @cached_property
    def _bounds(self) -> tuple[int, ...]:
        """First slot of each rank, and the end."""
        return (0, *accumulate(self.experts_per_rank))

    @cached_property
    def _replicas(self) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for physical, logical in enumerate(self.physical_to_logical):
            found[logical].append(physical)
        return tuple(tuple(slots) for slots in found)

    def rank_of(self, physical: int) -> int:
        """The rank that holds slot ``physical``."""
        if not 0 <= physical < self.num_physical:
            raise InputError(f"physical expert {physical}: must be from 0 to {self.num_physical - 1}")
        return bisect_right(self._bounds, physical) - 1

    def slots(self, rank: int) -> range:
        """Physical ids on ``rank``."""
        if not 0 <= rank < self.ranks:
            raise InputError(f"rank {rank}: must be from 0 to {self.ranks - 1}")
        return range(self._bounds[rank], self._bounds[rank + 1])

    def replicas(self, logical: int) -> tuple[int, ...]:
        """Physical ids of the copies of expert ``logical``, ascending."""
        if not 0 <= logical < self.num_experts:
            raise InputError(f"expert {logical}: must be from 0 to {self.num_experts - 1}")
        return self._replicas[logical]

    @property
    def replica_counts(self) -> np.ndarray:
        """Copies of each logical expert, ``[E]``."""
        return np.array([len(slots) for slots in self._replicas], dtype=np.int64)

    def logical_to_physical(self) -> np.ndarray:
        """Physical ids of each logical expert's copies, ``[E, most copies]``, padded with -1."""
        table = np.full((self.num_experts, max(map(len, self._replicas), default=0)), -1, dtype=np.int64)
        for logical, slots in enumerate(self._replicas):
            table[logical, : len(slots)] = slots
        return table

    def loads(self, counts: Sequence[float] | np.ndarray) -> np.ndarray:
        """Load of each rank, ``[ranks]``, when expert e gets ``counts[e]`` rows and its copies share them evenly."""
        share = _checked_counts(counts, self.num_experts) / self.replica_counts
        owner = np.repeat(np.arange(self.ranks), self.experts_per_rank)
        return np.bincount(owner, weights=share[list(self.physical_to_logical)], minlength=self.ranks)

    def balancedness(self, counts: Sequence[float] | np.ndarray) -> float:
        """Mean load of the ranks over the largest: 1 is even. No load at all counts as even."""
        loads = self.loads(counts)
        return float(loads.mean() / loads.max()) if loads.max() > 0 else 1.0


def linear(num_experts: int, ranks: int, redundant: int = 0) -> Placement:
    """Contiguous experts; the redundant copies are of experts 0, 1, ... in turn and follow after the last expert."""
    _check_sizes(num_experts, ranks, redundant)
    total = num_experts + redundant
    return Placement(
        num_experts,
        ranks,
        tuple(physical % num_experts for physical in range(total)),
        tuple(assign_experts(total, ranks, rank)[1] for rank in range(ranks)),
    )


def round_robin(num_experts: int, ranks: int) -> Placement:
    """Expert e on rank ``e % ranks``, in its slot ``e // ranks``; the first ``num_experts % ranks`` hold one more."""
    _check_sizes(num_experts, ranks, 0)
    rows = [range(rank, num_experts, ranks) for rank in range(ranks)]
    return Placement(num_experts, ranks, tuple(e for row in rows for e in row), tuple(map(len, rows)))


def eplb(
    counts: Sequence[float] | np.ndarray, ranks: int, redundant: int = 0, nodes: int = 1, groups: int = 1
) -> Placement:
    """Placement balanced for the load ``counts`` [E] of one layer; every rank gets the same number of slots.

    Where ``groups`` (of the router's group-limited top-k; contiguous experts) divide over more than one node, a group
    stays on one node and each node balances within itself; otherwise over all ranks at once. The busiest rank is
    never busier than under the published greedy algorithm. Copies of one expert lie on different ranks, except where
    it has more copies than there are ranks or where no arrangement found that keeps them apart is as balanced.
    """
    if np.ndim(counts) != 1:
        raise InputError(f"eplb: counts must be one layer's loads [experts], got shape {list(np.shape(counts))}")
    num_experts = len(counts)
    load = _checked_counts(counts, num_experts)
    _check_sizes(num_experts, ranks, redundant)
    if nodes < 1 or groups < 1:
        raise InputError(f"eplb: nodes {nodes} and groups {groups} must be at least 1")
    total = num_experts + redundant
    if over := total % ranks:
        fixes = [r for r in (redundant - over, redundant - over + ranks) if r >= 0]
        raise InputError(
            f"eplb: {total} physical experts ({num_experts} + {redundant} redundant) do not divide by {ranks} ranks:"
            f" use {' or '.join(map(str, fixes))} redundant experts"
        )
    if groups % nodes:
        nodes = 1  # a node cannot hold whole groups: balance over all ranks, as the published policy does
    if ranks % nodes or (nodes > 1 and num_experts % groups):
        raise InputError(f"eplb: {ranks} ranks must divide by {nodes} nodes, {num_experts} experts by {groups} groups")
    rows = np.sort(_balance(load, total, ranks, nodes, groups), axis=1)
    return Placement(num_experts, ranks, tuple(rows.ravel().tolist()), (total // ranks,) * ranks)


def physical_choice(indices: Any, placement: Placement, first_token: int = 0) -> Any:
    """Physical experts ``[T, k]`` for logical ones ``[T, k]`` (numpy array or tensor on any device, meta included).

    A token takes the replica with its number modulo the expert's replica count, so consecutive tokens share a hot
    expert's replicas evenly. ``first_token`` is the number of this rank's first token: ranks that all counted from 0
    would, with a token each, all pick the same replica.
    """
    if placement.physical_to_logical == tuple(range(placement.num_experts)):
        return indices
    table, replica_counts = placement.logical_to_physical(), placement.replica_counts
    if isinstance(indices, np.ndarray):
        return choose_replica(indices, table, replica_counts, first_token)
    import torch

    def like(array: np.ndarray) -> Any:
        return torch.tensor(array.tolist(), dtype=indices.dtype, device=indices.device)

    return choose_replica(indices, like(table), like(replica_counts), first_token)


def choose_replica(indices: Any, table: Any, replica_counts: Any, first_token: int = 0) -> Any:
    """:func:`physical_choice` with the tables ``[E, most copies]`` and ``[E]`` in the caller's hands (module buffers).

    Tensors share one integer dtype and one device. Only lookups: no branch depends on a value.
    """
    if table.shape[1] == 1:
        return table[indices, 0]
    end = first_token + indices.shape[0]
    if isinstance(indices, np.ndarray):
        tokens: Any = np.arange(first_token, end)
    else:
        import torch

        tokens = torch.arange(first_token, end, dtype=indices.dtype, device=indices.device)
    return table[indices, tokens[:, None] % replica_counts[indices]]


def _checked_counts(counts: Sequence[float] | np.ndarray, num_experts: int) -> np.ndarray:
    load = np.asarray(counts, dtype=float)
    if load.shape != (num_experts,):
        raise InputError(f"expert counts have shape {list(load.shape)}, expected [{num_experts}]")
    if not (np.isfinite(load).all() and (load >= 0).all()):
        raise InputError("expert counts must be finite numbers of at least 0")
    return load


def _check_sizes(num_experts: int, ranks: int, redundant: int) -> None:
    if num_experts < 1 or ranks < 1 or redundant < 0:
        raise InputError(
            f"{num_experts} experts + {redundant} redundant on {ranks} ranks: at least 1 expert, 0 redundant and 1 rank"
        )
    if num_experts + redundant < ranks:
        raise InputError(
            f"{ranks} expert-parallel ranks, but only {num_experts + redundant} experts to place: use at most"
            f" {num_experts + redundant} ranks or at least {ranks - num_experts} redundant experts"
        )


def _balance(load: np.ndarray, total: int, ranks: int, nodes: int, groups: int) -> np.ndarray:
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
