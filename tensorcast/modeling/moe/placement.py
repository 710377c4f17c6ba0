"""Which rank holds which expert, how often, and which replica a token goes to.

A *logical* expert is one of the model's E experts; a *physical* expert is a slot on a rank that holds a copy of one.
Physical ids count slots rank after rank, so a rank's experts are one range of ids whatever the policy.

``linear`` and ``round_robin`` follow vLLM's two strategies; ``eplb`` starts from DeepSeek's published load balancer
(github.com/deepseek-ai/EPLB: replicate the hottest, then pack greedily, by nodes where groups divide over them) and
improves on it. A layout that the counts do not fit is an :class:`InputError`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from tensorcast.errors import InputError
from tensorcast.modeling.moe.balancing.balance import balance


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
        if sum(self.experts_per_rank) != len(self.physical_to_logical):
            raise InputError(
                f"placement: experts_per_rank adds up to {sum(self.experts_per_rank)},"
                f" physical_to_logical has {len(self.physical_to_logical)} entries"
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
        return np.bincount(self.physical_to_logical, minlength=self.num_experts)

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


@lru_cache(maxsize=256)
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
    if nodes < 1 or groups < 1:
        raise InputError(f"eplb: nodes {nodes} and groups {groups} must be at least 1")
    total = check_slots(num_experts, ranks, redundant)
    if groups % nodes:
        nodes = 1  # a node cannot hold whole groups: balance over all ranks, as the published policy does
    if ranks % nodes or (nodes > 1 and num_experts % groups):
        raise InputError(f"eplb: {ranks} ranks must divide by {nodes} nodes, {num_experts} experts by {groups} groups")
    rows = np.sort(balance(load, total, ranks, nodes, groups), axis=1)
    return Placement(num_experts, ranks, tuple(rows.ravel().tolist()), (total // ranks,) * ranks)


def check_slots(num_experts: int, ranks: int, redundant: int) -> int:
    """Experts and copies; raises :class:`InputError` where ranks cannot hold as many of them each."""
    _check_sizes(num_experts, ranks, redundant)
    total = num_experts + redundant
    if over := total % ranks:
        fixes = [r for r in (redundant - over, redundant - over + ranks) if r >= 0]
        raise InputError(
            f"eplb: {total} physical experts ({num_experts} + {redundant} redundant) do not divide by {ranks} ranks:"
            f" use {' or '.join(map(str, fixes))} redundant experts"
        )
    return total


def with_external(placement: Placement, n: int) -> Placement:
    """``n`` ranks before those of ``placement``, each with a copy of one expert more, the last: a shared expert.

    Every token visits it, so by :func:`choose_replica` each of the ``n`` gets an ``n``-th of a rank's tokens.
    """
    if n < 1:
        raise InputError(f"{n} external shared experts: at least 1")
    return Placement(
        placement.num_experts + 1,
        placement.ranks + n,
        (placement.num_experts,) * n + placement.physical_to_logical,
        (1,) * n + placement.experts_per_rank,
    )


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
