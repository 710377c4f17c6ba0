"""Another placement of experts while the model serves: weights move between ranks, tables follow (EPLB).

Every rank of the group calls :func:`rearrange` with the same placement, between two forward passes. An expert that a
rank holds already is copied at home; others come from the ranks that hold them, their copies in turn.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tensorcast.errors import InputError
from tensorcast.modeling.moe.experts import FusedMoEBase
from tensorcast.modeling.moe.fused import FusedMoETensorCast
from tensorcast.modeling.moe.placement import Placement
from tensorcast.ops.collectives import bound_group

Moves = list[list[list[tuple[int, int]]]]
"""``[from][to]``: pairs of a slot there and a slot here, local to their ranks."""


def moves(before: Placement, after: Placement) -> Moves:
    """Which slot of which rank every slot of ``after`` is filled from.

    From the rank itself where it holds the expert, else from its holders in turn, so that no holder sends all copies.
    """
    found: Moves = [[[] for _ in range(after.ranks)] for _ in range(before.ranks)]
    turns = [0] * before.num_experts
    for rank in range(after.ranks):
        own = {before.physical_to_logical[slot]: slot for slot in before.slots(rank)}
        for place, slot in enumerate(after.slots(rank)):
            logical = after.physical_to_logical[slot]
            source = own.get(logical)
            if source is None:
                holders = before.replicas(logical)
                source = holders[turns[logical] % len(holders)]
                turns[logical] += 1
            giver = before.rank_of(source)
            found[giver][rank].append((source - before.slots(giver).start, place))
    return found


def rearrange(stage: FusedMoETensorCast, placement: Placement) -> int:
    """Move this rank's part of the experts' weights into ``placement``; returns how many experts came from elsewhere.

    Raises :class:`InputError` for another number of experts or ranks, for experts that are no stacked weights, and
    beside an external shared expert.
    """
    now, held = stage.placement, stage.local
    if (placement.num_experts, placement.ranks) != (now.num_experts, now.ranks):
        raise InputError(
            f"placement of {placement.num_experts} experts on {placement.ranks} ranks, "
            f"but the layer has {now.num_experts} on {now.ranks}"
        )
    if stage.external or not isinstance(held, FusedMoEBase):
        raise InputError("only stacked experts without an external shared expert can be placed anew")
    every, me = moves(now, placement), stage.groups.ep.rank
    new = {name: _moved(tensor.data, every, me, stage) for name, tensor in held.named_parameters(recurse=False)}
    for name, tensor in new.items():
        setattr(held, name, nn.Parameter(tensor, requires_grad=False))
    stage.place(placement)
    return sum(len(every[giver][me]) for giver in range(placement.ranks) if giver != me)


def _moved(tensor: Tensor, every: Moves, me: int, stage: FusedMoETensorCast) -> Tensor:
    """``[E_local, ...]`` of this rank as the new placement has it. Bytes travel, whatever the dtype."""
    ranks, flat = len(every), tensor.contiguous().view(torch.uint8).reshape(tensor.shape[0], -1)
    coming = [place for giver in range(ranks) for _, place in every[giver][me]]
    going = [slot for to in range(ranks) for slot, _ in every[me][to]]
    sent = flat[torch.tensor(going, dtype=torch.long, device=flat.device)]
    got = flat.new_empty((len(coming), flat.shape[1]))
    if ranks > 1:
        sizes = [len(every[me][to]) for to in range(ranks)], [len(every[giver][me]) for giver in range(ranks)]
        dist.all_to_all_single(got, sent, sizes[1], sizes[0], group=bound_group(stage.groups.ep.name, ranks))
    else:
        got = sent
    out = torch.empty_like(got)
    out[torch.tensor(coming, dtype=torch.long, device=got.device)] = got
    return out.view(tensor.dtype).reshape(len(coming), *tensor.shape[1:])
