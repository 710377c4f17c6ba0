"""Parallel groups by name: the same calls trace on meta, with no process group, and run on gloo or NCCL.

Ranks of a pipeline stage are numbered tensor-parallel first, then data-parallel. Experts live on all of them: ``etp``
neighbours cut each expert, ``ep`` such teams hold different experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensorcast import ops  # noqa: F401  (registers the ops)
from tensorcast.errors import InputError
from tensorcast.ops.collectives import bind_group

TC = torch.ops.tensor_cast


@dataclass(frozen=True)
class ParallelGroup:
    """A named group as one of its ranks sees it. All methods take and return tensors; one rank is a no-op."""

    name: str
    size: int = 1
    rank: int = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks."""
        return x if self.size == 1 else TC.all_reduce(x, self.name, self.size)

    def all_gather(self, x: Tensor) -> Tensor:
        """``[n, ...]`` of each rank -> ``[size*n, ...]``."""
        return x if self.size == 1 else TC.all_gather(x, self.name, self.size)

    def slice(self, x: Tensor) -> Tensor:
        """This rank's ``n/size`` rows of ``[n, ...]``; n must divide."""
        rows = x.shape[0] // self.size
        return x if self.size == 1 else x[self.rank * rows : (self.rank + 1) * rows]

    def gather_rows(self, x: Tensor, total: int = -1) -> tuple[Tensor, Tensor]:
        """Rows of all ranks, which may hold unequal numbers, and those numbers ``[size]``; ``total``: if known."""
        gathered: tuple[Tensor, Tensor] = TC.gather_rows(x, self.name, self.size, total)
        return gathered

    def scatter_rows(self, x: Tensor, sizes: Tensor, own: int) -> Tensor:
        """The sum over ranks, cut to this rank's ``own`` rows."""
        return TC.scatter_rows(x, sizes, self.name, self.size, own)


@dataclass(frozen=True)
class MoEGroups:
    """The groups that a MoE layer works on, as one rank sees them."""

    tp: ParallelGroup = ParallelGroup("tp")
    dp: ParallelGroup = ParallelGroup("dp")
    ep: ParallelGroup = ParallelGroup("ep")
    etp: ParallelGroup = ParallelGroup("etp")

    @classmethod
    def of(cls, tp: int = 1, dp: int = 1, ep: int = 1, rank: int = 0, pcp: int = 1) -> MoEGroups:
        """Groups of ``rank`` among ``tp * dp * pcp`` ranks. Raises :class:`InputError` if ep does not divide them.

        ``pcp``: ranks of prefill context parallelism hold different tokens of the same prompts; to a MoE layer, which
        knows no prompts, they are data-parallel ranks (vLLM 0.24.0, fused_moe/config.py: ep is over tp, dp and pcp).
        """
        dp *= pcp
        ranks = tp * dp
        if ranks % ep:
            raise InputError(f"ep = {ep} does not divide tp*dp = {ranks}")
        if not 0 <= rank < ranks:
            raise InputError(f"rank {rank} is not one of tp*dp = {ranks} ranks")
        etp = ranks // ep
        return cls(
            ParallelGroup("tp", tp, rank % tp),
            ParallelGroup("dp", dp, rank // tp),
            ParallelGroup("ep", ep, rank // etp),
            ParallelGroup("etp", etp, rank % etp),
        )

    def members(self) -> dict[str, list[list[int]]]:
        """Ranks of every group of each kind; all ranks list them alike, as creating process groups needs."""
        tp, dp, ep, etp = (g.size for g in (self.tp, self.dp, self.ep, self.etp))
        return {
            "tp": [[d * tp + t for t in range(tp)] for d in range(dp)],
            "dp": [[d * tp + t for d in range(dp)] for t in range(tp)],
            "ep": [[e * etp + t for e in range(ep)] for t in range(etp)],
            "etp": [[e * etp + t for t in range(etp)] for e in range(ep)],
        }

    def bind(self, distributed: Any) -> None:
        """Create and bind the process groups; ``distributed`` is ``torch.distributed`` with tp*dp ranks."""
        for name, lists in self.members().items():
            for ranks in lists:
                group = distributed.new_group(ranks)
                if distributed.get_rank() in ranks:
                    bind_group(name, group)
