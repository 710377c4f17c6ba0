"""Collectives by group name: traced with no process group at all, run on whatever group the name is bound to.

Fake kernels are shape arithmetic on the group's size, which the call carries. Real kernels look the name up in
:data:`_GROUPS` (see :func:`bind_group`); a group of one rank needs no binding. Token exchange takes counts instead of
splits: how many rows go where is data, so its fake kernel assumes balanced routing, as many rows in as out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake, maybe_get_fake_mode

from tensorcast.ops.library import define

_GROUPS: dict[str, Any] = {}


def bind_group(name: str, group: Any) -> None:
    """Let collectives on ``name`` run on a ``torch.distributed`` process group of this process (None: forget it)."""
    if group is None:
        _GROUPS.pop(name, None)
    else:
        _GROUPS[name] = group


def bound_group(name: str, size: int) -> Any:
    """The process group bound to ``name``. Raises ``RuntimeError`` if there is none, or of another size."""
    group = _GROUPS.get(name)
    if group is None:
        raise RuntimeError(f"group {name!r} of {size} ranks is not bound to a process group: call bind_group first")
    if dist.get_world_size(group) != size:
        raise RuntimeError(f"group {name!r} has {dist.get_world_size(group)} ranks, the layer was built for {size}")
    return group


def _all_reduce(x: Tensor, group: str, size: int) -> Tensor:
    out = x.clone()
    if size > 1:
        dist.all_reduce(out, group=bound_group(group, size))
    return out


define(
    "all_reduce(Tensor x, str group, SymInt size) -> Tensor",
    real=_all_reduce,
    fake=lambda x, group, size: torch.empty_like(x),
)


def _all_gather(x: Tensor, group: str, size: int) -> Tensor:
    if size == 1:
        return x.clone()
    parts = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(parts, x.contiguous(), group=bound_group(group, size))
    return torch.cat(parts)


# [n, ...] on every rank -> [size*n, ...], ranks in order
define(
    "all_gather(Tensor x, str group, SymInt size) -> Tensor",
    real=_all_gather,
    fake=lambda x, group, size: x.new_empty((x.shape[0] * size, *x.shape[1:])),
)


def _reduce_scatter(x: Tensor, group: str, size: int) -> Tensor:
    if size == 1:
        return x.clone()
    process_group = bound_group(group, size)
    total = x.clone()  # gloo has no reduce-scatter of uneven or CPU tensors on every build: sum, then take the slice
    dist.all_reduce(total, group=process_group)
    return total.chunk(size)[dist.get_rank(process_group)].clone()


# [size*n, ...] on every rank -> the sum's [n, ...] slice of this rank
define(
    "reduce_scatter(Tensor x, str group, SymInt size) -> Tensor",
    real=_reduce_scatter,
    fake=lambda x, group, size: x.new_empty((x.shape[0] // size, *x.shape[1:])),
)


def _exchange(x: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    out = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


def _rows(like: Tensor, balanced: int, expected: int) -> int:
    """Rows of a result whose number depends on data: ``expected`` if a trace states it, in a compiled graph a symbol.

    Meta tensors without a symbolic shape get ``balanced``.
    """
    if expected >= 0:
        return expected
    if is_fake(like) and (mode := maybe_get_fake_mode(like)) is not None and mode.shape_env is not None:
        symbol: Any = torch.library.get_ctx().new_dynamic_size()
        return symbol
    return balanced


def _dispatch(
    rows: Tensor, counts: Tensor, experts: list[int], rank: int, group: str, expected: int = -1
) -> tuple[Tensor, Tensor]:
    if len(experts) == 1:
        return rows.clone(), counts.clone().view(1, -1)
    process_group = bound_group(group, len(experts))
    sources = _exchange(counts, experts, [experts[rank]] * len(experts), process_group).view(len(experts), -1)
    sent = [int(part.sum()) for part in counts.split(experts)]
    return _exchange(rows, sent, sources.sum(1).tolist(), process_group), sources


def _dispatch_fake(
    rows: Tensor, counts: Tensor, experts: list[int], rank: int, group: str, expected: int = -1
) -> tuple[Tensor, Tensor]:
    received = rows.new_empty((_rows(rows, rows.shape[0], expected), *rows.shape[1:]))
    return received, counts.new_empty((len(experts), experts[rank]))


# Rows [R,H] ordered by global expert, counts [E] of them, experts per rank -> the rows of this rank's experts, source
# rank by source rank, and their counts [ranks, E_local]. expected: rows received under balanced routing, which only a
# trace on meta needs (-1: as many as sent; in a compiled graph as many as there will be).
define(
    "dispatch_rows(Tensor rows, Tensor counts, int[] experts, int rank, str group, SymInt expected=-1)"
    " -> (Tensor, Tensor)",
    real=_dispatch,
    fake=_dispatch_fake,
)


def _combine(rows: Tensor, counts: Tensor, sources: Tensor, experts: list[int], group: str, total: int = -1) -> Tensor:
    if len(experts) == 1:
        return rows.clone()
    back = [int(part.sum()) for part in counts.split(experts)]
    return _exchange(rows, sources.sum(1).tolist(), back, bound_group(group, len(experts)))


# The way back: rows in the order that dispatch_rows gave, counts [E] and sources [ranks, E_local] as there; total: rows
# that dispatch_rows was given (-1: as many as it gave), which only a trace needs.
define(
    "combine_rows(Tensor rows, Tensor counts, Tensor sources, int[] experts, str group, SymInt total=-1) -> Tensor",
    real=_combine,
    fake=lambda rows, counts, sources, experts, group, total=-1: rows.new_empty(
        (rows.shape[0] if total < 0 else total, *rows.shape[1:])
    ),
)


def _expert_major(sources: Tensor) -> Tensor:
    """Order that turns (rank, expert)-major rows into (expert, rank)-major ones; stable."""
    ranks, experts = sources.shape
    ids = torch.arange(experts, device=sources.device).repeat(ranks)
    return torch.argsort(ids.repeat_interleave(sources.reshape(-1)), stable=True)


define(
    "to_expert_major(Tensor rows, Tensor sources) -> Tensor",
    real=lambda rows, sources: rows[_expert_major(sources)],
    fake=lambda rows, sources: torch.empty_like(rows),
)


def _to_rank_major(rows: Tensor, sources: Tensor) -> Tensor:
    out = torch.empty_like(rows)
    out[_expert_major(sources)] = rows
    return out


define(
    "to_rank_major(Tensor rows, Tensor sources) -> Tensor",
    real=_to_rank_major,
    fake=lambda rows, sources: torch.empty_like(rows),
)


def _gather_rows(x: Tensor, group: str, size: int, total: int = -1) -> tuple[Tensor, Tensor]:
    own = torch.tensor([x.shape[0]], device=x.device)
    if size == 1:
        return x.clone(), own
    process_group = bound_group(group, size)
    sizes = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(sizes, own, group=process_group)
    counts = torch.cat(sizes)
    # every rank sends its rows to all: an all-gather of unequal parts
    copies = x.repeat(size, *[1] * (x.dim() - 1))
    return _exchange(copies, [x.shape[0]] * size, counts.tolist(), process_group), counts


# Rows of every rank of the group, ranks in order, and how many each had (real ranks may hold unequal numbers, or none).
# total: how many there are, where another call has told, of which only graphs need to know.
define(
    "gather_rows(Tensor x, str group, SymInt size, SymInt total=-1) -> (Tensor, Tensor)",
    real=_gather_rows,
    fake=lambda x, group, size, total=-1: (
        x.new_empty((x.shape[0] if size == 1 else _rows(x, x.shape[0] * size, total), *x.shape[1:])),
        x.new_empty((size,), dtype=torch.int64),
    ),
)


def _scatter_rows(x: Tensor, sizes: Tensor, group: str, size: int, own: int = -1) -> Tensor:
    if size == 1:
        return x.clone()
    process_group = bound_group(group, size)
    total = x.clone()
    dist.all_reduce(total, group=process_group)
    return total.split(sizes.tolist())[dist.get_rank(process_group)].clone()


# The way back: the sum over ranks, cut to this rank's own rows (-1: an equal share), of which only graphs need to know.
define(
    "scatter_rows(Tensor x, Tensor sizes, str group, SymInt size, SymInt own=-1) -> Tensor",
    real=_scatter_rows,
    fake=lambda x, sizes, group, size, own=-1: x.new_empty((x.shape[0] // size if own < 0 else own, *x.shape[1:])),
)


def _slice_experts(rows: Tensor, counts: Tensor, start: int, count: int, expected: int = -1) -> tuple[Tensor, Tensor]:
    first = int(counts[:start].sum())
    own = counts[start : start + count].clone()
    return rows[first : first + int(own.sum())].clone(), own


def _slice_experts_fake(
    rows: Tensor, counts: Tensor, start: int, count: int, expected: int = -1
) -> tuple[Tensor, Tensor]:
    own = _rows(rows, rows.shape[0] * count // counts.shape[0], expected)
    return rows.new_empty((own, rows.shape[1])), counts.new_empty((count,))


# Of rows ordered by expert, those of experts start ... start + count - 1, where every rank holds all tokens; expected:
# how many under balanced routing, which only a trace on meta needs (-1: this share of the rows; in a compiled graph as
# many as there will be).
define(
    "slice_experts(Tensor rows, Tensor counts, int start, int count, SymInt expected=-1) -> (Tensor, Tensor)",
    real=_slice_experts,
    fake=_slice_experts_fake,
)


def _place_experts(rows: Tensor, counts: Tensor, start: int, total: int) -> Tensor:
    out = rows.new_zeros((total, rows.shape[1]))
    first = int(counts[:start].sum())
    out[first : first + rows.shape[0]] = rows
    return out


# The way back: rows of other ranks' experts are zero, to be summed.
define(
    "place_experts(Tensor rows, Tensor counts, int start, SymInt total) -> Tensor",
    real=_place_experts,
    fake=lambda rows, counts, start, total: rows.new_empty((total, rows.shape[1])),
)
