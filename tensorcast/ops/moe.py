"""Mixture-of-experts ops: gate, permute, grouped matmul, unpermute.

Symbols: T tokens, E experts, k chosen per token, H hidden, N and K a projection's output and input width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tensorcast.ops.library import define


def _gating(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    weights, indices = torch.softmax(logits.float(), dim=-1).topk(k, dim=-1)
    return weights.to(logits.dtype), indices


def _gating_fake(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*logits.shape[:-1], k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


define(
    "moe_gating_top_k_softmax(Tensor logits, SymInt k) -> (Tensor weights, Tensor indices)",
    real=_gating,
    fake=_gating_fake,
)


def _order(expert_indices: Tensor) -> Tensor:
    """Positions in the flattened ``[T*k]`` choices, ordered by expert id; stable, so tokens keep their order."""
    return torch.argsort(expert_indices.reshape(-1), stable=True)


def _init_routing(x: Tensor, expert_indices: Tensor) -> Tensor:
    return x[_order(expert_indices) // expert_indices.shape[-1]]


define(
    "init_routing_v2(Tensor x, Tensor expert_indices) -> Tensor",  # [T,H], [T,k] -> [T*k,H]
    real=_init_routing,
    fake=lambda x, expert_indices: x.new_empty((expert_indices.numel(), x.shape[-1])),
)


def _unpermute(x: Tensor, expert_indices: Tensor) -> Tensor:
    order = _order(expert_indices)
    out = torch.empty_like(x)
    out[order] = x
    return out.view(*expert_indices.shape, x.shape[-1])


define(
    "unpermute_tokens(Tensor x, Tensor expert_indices) -> Tensor",  # [T*k,H], [T,k] -> [T,k,H]
    real=_unpermute,
    fake=lambda x, expert_indices: x.new_empty((*expert_indices.shape, x.shape[-1])),
)


def _expert_counts(expert_indices: Tensor, num_experts: int) -> Tensor:
    return torch.bincount(expert_indices.reshape(-1), minlength=num_experts)


define(
    "expert_counts(Tensor expert_indices, SymInt num_experts) -> Tensor",  # [T,k] -> rows per expert [E]
    real=_expert_counts,
    fake=lambda expert_indices, num_experts: expert_indices.new_empty((num_experts,)),
)


def _grouped_matmul(
    x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None, transposed: bool = False
) -> Tensor:
    stacked = weight if transposed else weight.transpose(-2, -1)  # [E,K,N]
    out = F.grouped_mm(x, stacked, offs=counts.cumsum(0).to(torch.int32))
    if bias is not None:
        out = out + bias.repeat_interleave(counts, dim=0, output_size=x.shape[0])
    return out


def _grouped_matmul_fake(
    x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None, transposed: bool = False
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[-1] if transposed else weight.shape[-2]))


define(
    # rows [R,K] ordered by expert; weight [E,N,K], or [E,K,N] when transposed; counts [E] sum to R; bias [E,N]
    "grouped_matmul(Tensor x, Tensor weight, Tensor counts, Tensor? bias=None, bool transposed=False) -> Tensor",
    real=_grouped_matmul,
    fake=_grouped_matmul_fake,
)
