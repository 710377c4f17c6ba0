"""Low-latency token exchange: messages of fixed size, so that no size depends on data and no host waits for counts.

Every rank reserves ``capacity`` rows per expert and source rank, as DeepEP's low-latency kernels do
(github.com/deepseek-ai/DeepEP: a receive buffer ``[experts, ranks * capacity, H]`` with a count per expert). DeepEP's
one-sided writes move only the rows there are; over collectives, which both sides size alike, the messages are padded to
the capacity. What an expert receives lies at the front of its buffer, as a masked grouped GEMM wants it.

Symbols: R rows, E experts over all ranks, E_local of this rank, H hidden.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tensorcast.ops.collectives import bound_group
from tensorcast.ops.library import define
from tensorcast.ops.moe import capacity_places, check_capacity, spread_to_capacity


def _exchange(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    """Rows of known numbers to and from every rank."""
    if len(sent) == 1:
        return x
    out = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=bound_group(group, len(sent)))
    return out


def _packed(sources: Tensor, capacity: int) -> Tensor:
    """Where row i from rank r for expert e lies in the flat buffer ``[E_local * ranks * capacity + 1]``.

    ``[ranks, E_local, capacity]``; rows beyond the count share the last place.
    """
    ranks, experts = sources.shape
    row = torch.arange(capacity, device=sources.device)
    first = sources.cumsum(0) - sources  # rows of lower ranks, per expert
    base = torch.arange(experts, device=sources.device) * (ranks * capacity)
    place = (base + first).unsqueeze(-1) + row
    return torch.where(row < sources.unsqueeze(-1), place, experts * ranks * capacity)


def _dispatch(
    rows: Tensor, counts: Tensor, experts: list[int], rank: int, capacity: int, group: str
) -> tuple[Tensor, Tensor]:
    ranks, local = len(experts), experts[rank]
    check_capacity("low_latency_dispatch", counts, capacity, wait=False)
    sources = _exchange(counts, experts, [local] * ranks, group).view(ranks, local)
    sent = spread_to_capacity(rows, counts, capacity).flatten(0, 1)
    got = _exchange(sent, [n * capacity for n in experts], [local * capacity] * ranks, group)
    out = rows.new_zeros((local * ranks * capacity + 1, *rows.shape[1:]))
    out[_packed(sources, capacity).reshape(-1)] = got
    out[-1] = 0
    return out[:-1].view(local, ranks * capacity, *rows.shape[1:]).clone(), sources.clone()


def _dispatch_fake(
    rows: Tensor, counts: Tensor, experts: list[int], rank: int, capacity: int, group: str
) -> tuple[Tensor, Tensor]:
    ranks, local = len(experts), experts[rank]
    return rows.new_empty((local, ranks * capacity, *rows.shape[1:])), counts.new_empty((ranks, local))


# Rows [R,H] ordered by global expert, counts [E] of them (each at most capacity), experts per rank -> this rank's
# buffer [E_local, ranks*capacity, H], an expert's rows at its front, source rank by source rank, zeros after them; and
# how many came from each rank [ranks, E_local].
define(
    "low_latency_dispatch(Tensor rows, Tensor counts, int[] experts, int rank, SymInt capacity, str group)"
    " -> (Tensor, Tensor)",
    real=_dispatch,
    fake=_dispatch_fake,
)


def _combine(
    x: Tensor, counts: Tensor, sources: Tensor, experts: list[int], capacity: int, total: int, group: str
) -> Tensor:
    ranks, local = sources.shape
    flat = torch.cat([x.flatten(0, 1), x.new_zeros((1, *x.shape[2:]))])
    back = flat[_packed(sources, capacity).reshape(-1)]
    got = _exchange(back, [local * capacity] * ranks, [n * capacity for n in experts], group)
    return got[capacity_places(counts, total, capacity)]


# The way back: the buffer as low_latency_dispatch gave it, counts [E] and sources [ranks, E_local] as there -> the
# rows [total,H] that were sent, in their order.
define(
    "low_latency_combine(Tensor x, Tensor counts, Tensor sources, int[] experts, SymInt capacity, SymInt total,"
    " str group) -> Tensor",
    real=_combine,
    fake=lambda x, counts, sources, experts, capacity, total, group: x.new_empty((total, *x.shape[2:])),
)
