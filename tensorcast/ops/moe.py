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


def _grouped_gating(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    groups: int = 1,
    chosen_groups: int = 1,
    sigmoid: bool = True,
    renormalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    scores = logits.float().sigmoid() if sigmoid else logits.float().softmax(-1)
    ranked = scores if bias is None else scores + bias
    if groups > 1:
        by_group = ranked.unflatten(-1, (groups, -1))
        # a group is worth its two best experts with a bias (DeepSeek-V3), its best one without (DeepSeek-V2)
        worth = by_group.topk(2 if bias is not None else 1, dim=-1).values.sum(-1)
        kept = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, worth.topk(chosen_groups, dim=-1).indices, True)
        ranked = by_group.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
    indices = ranked.topk(k, dim=-1).indices
    weights = scores.gather(-1, indices)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return (weights * scale).to(logits.dtype), indices


# The router of DeepSeek-V3 and its kin (arXiv 2412.19437, section 2.1.2): the bias steers the choice, not the weight;
# experts come from the best groups only. logits [T,E], bias [E] -> weights and indices [T,k].
define(
    "moe_gating_grouped_top_k(Tensor logits, Tensor? bias, SymInt k, int groups=1, int chosen_groups=1, "
    "bool sigmoid=True, bool renormalize=True, float scale=1.0) -> (Tensor weights, Tensor indices)",
    real=_grouped_gating,
    fake=lambda logits, bias, k, *_, **__: _gating_fake(logits, k),
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
