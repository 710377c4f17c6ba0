"""Attention over a context that is dealt out to ranks, in decode and for prompts.

The running side of context parallelism, over any process group; the collectives are those that
:mod:`tensorcast.deploy.plan.context` prices. In decode each rank attends over its part of the cache, and log-sum-exps
weigh the parts. Of a prompt each rank has an early and a late part of the tokens, and gathers all keys and values.
Symbols: B sequences, H query heads of a rank, Hkv of keys and values, N ranks, D head size, P tokens of a rank's part,
S of a whole prompt.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def part_of_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``[B,H,D]`` over ``[B,Hkv,P,D]``: the attention over a part ``[B,H,D]``, in fp32, and its log-sum-exp ``[B,H]``.

    A part without tokens weighs nothing: its log-sum-exp is minus infinity.
    """
    each = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(each, dim=1).float() for x in (k, v))
    scores = torch.einsum("bhd,bhpd->bhp", q.float(), keys) * q.shape[-1] ** -0.5
    sums = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - sums.unsqueeze(-1))
    return torch.einsum("bhp,bhpd->bhd", weights, values), sums


def weighted(part: Tensor, sums: Tensor, own: int) -> Tensor:
    """A part's share of the whole attention. ``sums [N,B,H]``: log-sum-exps of all parts, ``own`` that of this one."""
    share = torch.exp(sums[own] - torch.logsumexp(sums, dim=0))
    return part * share.unsqueeze(-1)


def context_attention(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """This rank's heads ``[B,H,D]`` over the tokens of all ranks of a group, of which it holds ``k, v [B,Hkv,P,D]``."""
    ranks, own = dist.get_world_size(group), dist.get_rank(group)
    queries = [torch.empty_like(q) for _ in range(ranks)]
    dist.all_gather(queries, q.contiguous(), group=group)
    part, sums = part_of_attention(torch.cat(queries, dim=1), k, v)
    every = [torch.empty_like(sums) for _ in range(ranks)]
    dist.all_gather(every, sums, group=group)
    shares = weighted(part, torch.stack(every), own)
    dist.all_reduce(shares, group=group)  # gloo has no reduce-scatter of tensors: each rank keeps its heads
    return shares.chunk(ranks, dim=1)[own].to(q.dtype)


def prompt_part(tokens: int, rank: int, ranks: int) -> Tensor:
    """Positions of a rank's part of a prompt, ascending: of ``2 N`` even stretches the ``rank``-th from either end, so
    that all ranks have as many pairs of queries and keys. Stretches are one token longer at the beginning where the
    tokens do not divide."""
    stretches = torch.arange(tokens).tensor_split(2 * ranks)
    return torch.cat([stretches[rank], stretches[2 * ranks - 1 - rank]])


def prompt_attention(q: Tensor, k: Tensor, v: Tensor, tokens: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Causal attention ``[B,H,P,D]`` of a rank's part of prompts of S = ``tokens``: ``q [B,H,P,D]`` and ``k, v
    [B,Hkv,P,D]`` at the positions of :func:`prompt_part`."""
    ranks, own = dist.get_world_size(group), dist.get_rank(group)
    parts = [prompt_part(tokens, rank, ranks) for rank in range(ranks)]
    longest = max(map(len, parts))
    mine = torch.nn.functional.pad(torch.stack([k, v]), (0, 0, 0, longest - k.shape[2]))  # gloo wants equal shapes
    every = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(every, mine.contiguous(), group=group)
    keys, values = torch.cat([one[:, :, :, : len(part)] for one, part in zip(every, parts, strict=True)], dim=3)
    sees = parts[own].unsqueeze(1) >= torch.cat(parts).unsqueeze(0)
    return torch.nn.functional.scaled_dot_product_attention(
        q, keys, values, attn_mask=sees.to(q.device), enable_gqa=True
    )
