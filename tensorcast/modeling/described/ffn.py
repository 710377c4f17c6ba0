"""Feed-forward parts that a description may name: one MLP for all tokens, or routed experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from tensorcast.modeling.described.attention import RMSNorm


def _situ(gate: Tensor, beta: float = 4.0) -> Tensor:
    """Kimi's smooth gate: ``beta tanh(x / beta) sigmoid(x)`` (vLLM 0.33.0, layers/activation.py, SituAndMul)."""
    return beta * torch.tanh(gate / beta) * torch.sigmoid(gate)


def activation(name: str) -> Any:
    """The function of an activation's name."""
    return _situ if name == "situ" else ACT2FN[name]


class Mlp(nn.Module):
    """A gated MLP."""

    def __init__(self, hidden: int, *, intermediate_size: int, activation: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, intermediate_size, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(intermediate_size, hidden, bias=False)
        self.act_fn = activation

    def forward(self, x: Tensor) -> Tensor:
        """``[...,H]`` -> the same."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}


class Router(nn.Module):
    """Scores of the experts in fp32, and the choice among them: of all, or of the best groups."""

    e_score_correction_bias: Tensor

    def __init__(
        self, hidden: int, *, num_experts: int, top_k: int, scoring: str, correction_bias: bool, norm_topk_prob: bool,
        n_group: int, topk_group: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.top_k, self.num_experts, self.scoring, self.normed = top_k, num_experts, scoring, norm_topk_prob
        self.n_group, self.topk_group = n_group, topk_group
        self.weight, self.corrected = nn.Parameter(torch.zeros(num_experts, hidden)), correction_bias
        if correction_bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[T,H]`` -> logits ``[T,E]``, weights and indices ``[T,k]``."""
        logits = F.linear(x.float(), self.weight.float())
        scores = SCORES[self.scoring](logits)
        seen = scores + self.e_score_correction_bias if self.corrected else scores
        if self.n_group > 1:
            groups = seen.view(-1, self.n_group, self.num_experts // self.n_group)
            best = groups.topk(2, dim=-1)[0].sum(-1).topk(self.topk_group, dim=-1, sorted=False)[1]
            mask = torch.zeros_like(groups[..., 0]).scatter_(1, best, 1).unsqueeze(-1).expand(groups.shape)
            seen = seen.masked_fill(~mask.reshape(seen.shape).bool(), float("-inf"))
        indices = seen.topk(self.top_k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, indices)
        if self.normed:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights, indices


class Experts(nn.Module):
    """Weights of all experts in two tensors, as transformers stacks them."""

    def __init__(self, hidden: int, *, num_experts: int, width: int, activation: Any) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.act_fn = activation

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[T,H]`` -> the same: one expert after another, each on the tokens that chose it."""
        out = torch.zeros_like(x)
        for expert in top_k_index.unique().tolist():
            tokens, place = torch.where(top_k_index == expert)
            gate, up = F.linear(x[tokens], self.gate_up_proj[expert]).chunk(2, dim=-1)
            rows = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            out.index_add_(0, tokens, (rows * top_k_weights[tokens, place, None]).to(out.dtype))
        return out


class Plain(nn.Linear):
    """A projection that no checkpoint quantises, whatever its entry says of linear layers."""


class Moe(nn.Module):
    """Routed experts, perhaps in a narrower stream of their own, beside shared ones."""

    def __init__(
        self, hidden: int, *, num_experts: int, num_experts_per_tok: int, moe_intermediate_size: int, activation: Any,
        scoring: str, correction_bias: bool, norm_topk_prob: bool, n_group: int, topk_group: int,
        shared_expert_intermediate_size: int, shared_expert_gate: bool, latent_size: int, latent_norm: bool,
        latent_quantized: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.gate = Router(
            hidden, num_experts=num_experts, top_k=num_experts_per_tok, scoring=scoring, n_group=n_group,
            correction_bias=correction_bias, norm_topk_prob=norm_topk_prob, topk_group=topk_group,
        )  # fmt: skip
        self.experts = Experts(
            latent_size or hidden, num_experts=num_experts, width=moe_intermediate_size, activation=activation
        )
        linear = nn.Linear if latent_quantized else Plain
        if latent_size:
            self.latent_down_proj = linear(hidden, latent_size, bias=False)
            self.latent_up_proj = linear(latent_size, hidden, bias=False)
        self.routed_norm = RMSNorm(latent_size) if latent_size and latent_norm else None
        width = shared_expert_intermediate_size
        self.shared_experts = Mlp(hidden, intermediate_size=width, activation=activation) if width else None
        self.shared_experts_gate = nn.Linear(hidden, 1, bias=False) if width and shared_expert_gate else None
        self.latent = bool(latent_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[B,S,H]`` -> the same."""
        x = hidden.reshape(-1, hidden.shape[-1])
        _, weights, indices = self.gate(x)
        out = self.experts(self.latent_down_proj(x) if self.latent else x, indices, weights)
        if self.routed_norm is not None:
            out = self.routed_norm(out)
        if self.latent:
            out = self.latent_up_proj(out)
        if self.shared_experts is not None:
            shared = self.shared_experts(x)
            gate = self.shared_experts_gate
            out = out + (shared if gate is None else torch.sigmoid(gate(x)) * shared)
        return out.reshape(hidden.shape)
