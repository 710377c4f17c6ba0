"""Kinds of softmax attention that a description may name, as torch modules.

B sequences, S new tokens each, H the model's width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines ``[1,S,width]`` of the new tokens' positions."""


class RMSNorm(nn.Module):
    """``x / rms(x) * weight``, worked out in fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """``[...,width]`` -> the same."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * normed.to(x.dtype)


def rotary(positions: Tensor, width: int, base: float = 1e4) -> Rotary:
    """Angles of ``positions [1,S]`` for ``width`` numbers of a head; their base shapes no operation."""
    rates = base ** -(torch.arange(0, width, 2, device=positions.device).float() / width)
    angles = (positions.unsqueeze(-1).float() * rates).repeat(1, 1, 2)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, position: Rotary, width: int) -> Tensor:
    """``x [B,heads,S,D]`` with the first ``width`` numbers of every head turned by their positions."""
    turned, rest = x[..., :width], x[..., width:]
    cos, sin = (table[..., :width].unsqueeze(1).to(x.dtype) for table in position)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


class FullAttention(nn.Module):
    """Attention with keys and values of heads: grouped queries, perhaps a window, gates, sinks."""

    def __init__(
        self, config: Any, layer: int, *, num_heads: int, num_kv_heads: int, head_dim: int, window: int,
        q_lora_rank: int, rotary_dim: int, qk_norm: bool, output_gate: bool, head_gate: bool, sinks: bool, bias: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        hidden = config.hidden_size
        self.config, self.layer_idx = config, layer
        self.head_dim, self.rotary_dim = head_dim, rotary_dim
        self.num_key_value_groups, self.scaling, self.is_causal = num_heads // num_kv_heads, head_dim**-0.5, True
        self.sliding_window = window or None
        self.q_a_proj = nn.Linear(hidden, q_lora_rank, bias=bias) if q_lora_rank else nn.Identity()
        self.q_a_layernorm = RMSNorm(q_lora_rank) if q_lora_rank else nn.Identity()
        self.q_proj = nn.Linear(q_lora_rank or hidden, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, num_kv_heads * head_dim, bias=bias)
        self.g_proj = nn.Linear(hidden, num_heads * (1 if head_gate else head_dim), bias=False) if (
            output_gate or head_gate) else None  # fmt: skip
        self.q_norm, self.k_norm = (RMSNorm(head_dim) if qk_norm else nn.Identity() for _ in range(2))
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if sinks else None
        self.o_proj = nn.Linear(num_heads * head_dim, hidden, bias=bias)

    def forward(self, hidden: Tensor, position: Rotary | None, cache: Any) -> Tensor:
        """``[B,S,H]`` -> the same."""
        batch, new, _ = hidden.shape
        low = self.q_a_layernorm(self.q_a_proj(hidden))
        q, k, v = (
            proj(x).view(batch, new, -1, self.head_dim)
            for proj, x in ((self.q_proj, low), (self.k_proj, hidden), (self.v_proj, hidden))
        )
        q, k, v = (t.transpose(1, 2) for t in (self.q_norm(q), self.k_norm(k), v))
        if self.rotary_dim and position is not None:
            q, k = (rotated(t, position, self.rotary_dim) for t in (q, k))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        more = {} if self.sinks is None else {"s_aux": self.sinks}
        function = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = function(
            self, q, k, v, None, scaling=self.scaling, dropout=0.0, sliding_window=self.sliding_window, **more
        )
        if self.g_proj is not None:
            out = out * torch.sigmoid(self.g_proj(hidden)).view(batch, new, out.shape[2], -1)
        return self.o_proj(out.reshape(batch, new, -1))


class LatentAttention(nn.Module):
    """Multi-head latent attention: keys and values are made of a latent and of a part that all heads share."""

    def __init__(
        self, config: Any, layer: int, *, num_heads: int, q_lora_rank: int, kv_lora_rank: int, qk_nope_head_dim: int,
        qk_rope_head_dim: int, v_head_dim: int, rotary: bool, output_gate: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        hidden, width = config.hidden_size, qk_nope_head_dim + qk_rope_head_dim
        self.config, self.layer_idx = config, layer
        self.num_heads, self.kv_lora_rank, self.rotary = num_heads, kv_lora_rank, rotary
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.num_key_value_groups, self.scaling, self.is_causal = 1, width**-0.5, True
        if q_lora_rank:
            self.q_a_proj = nn.Linear(hidden, q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(q_lora_rank)
            self.q_b_proj = nn.Linear(q_lora_rank, num_heads * width, bias=False)
        else:
            self.q_proj = nn.Linear(hidden, num_heads * width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, kv_lora_rank + qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(kv_lora_rank)
        self.kv_b_proj = nn.Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.g_proj = nn.Linear(hidden, num_heads * v_head_dim, bias=False) if output_gate else None
        self.o_proj = nn.Linear(num_heads * v_head_dim, hidden, bias=False)

    def forward(self, hidden: Tensor, position: Rotary | None, cache: Any) -> Tensor:
        """``[B,S,H]`` -> the same."""
        batch, new, _ = hidden.shape
        split = [self.qk_nope_head_dim, self.qk_rope_head_dim]
        low = self.q_a_layernorm(self.q_a_proj(hidden)) if hasattr(self, "q_a_proj") else None
        q = self.q_proj(hidden) if low is None else self.q_b_proj(low)
        q = q.view(batch, new, -1, sum(split)).transpose(1, 2)
        latent, shared = self.kv_a_proj_with_mqa(hidden).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        latent, shared = self.kv_a_layernorm(latent).unsqueeze(1), shared.unsqueeze(1)
        if self.rotary and position is not None:
            nope, turned = q.split(split, dim=-1)
            q = torch.cat((nope, rotated(turned, position, self.qk_rope_head_dim)), dim=-1)
            shared = rotated(shared, position, self.qk_rope_head_dim)
        if cache is not None:
            latent, shared = cache.update(latent, shared, self.layer_idx)
        both = self.kv_b_proj(latent).view(batch, latent.shape[2], -1, self.qk_nope_head_dim + self.v_head_dim)
        k, v = both.transpose(1, 2).split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        keys = k.new_empty((*k.shape[:-1], sum(split)))
        keys[..., : self.qk_nope_head_dim].copy_(k)
        keys[..., self.qk_nope_head_dim :].copy_(shared.expand(-1, k.shape[1], -1, -1))
        function = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = function(self, q, keys, v, None, scaling=self.scaling, dropout=0.0)
        out = out.reshape(batch, new, -1)
        if self.g_proj is not None:
            out = out * torch.sigmoid(self.g_proj(hidden))
        return self.o_proj(out)
