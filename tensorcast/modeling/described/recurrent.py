"""Kinds of attention that keep a state in the place of a cache, as a description may name them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensorcast import ops  # noqa: F401  (registers the ops)
from tensorcast.modeling.described.attention import Rotary

TC = torch.ops.tensor_cast
CHUNK = 64
"""Tokens of a block in which its prefill kernels work (flash-linear-attention, ops/kda/chunk.py)."""


class GatedNorm(nn.Module):
    """RMS norm of every head, times the sigmoid of a gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """``[...,width]``, twice -> the same."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return (self.weight.float() * normed * torch.sigmoid(gate.float())).to(x.dtype)


class DeltaAttention(nn.Module):
    """Kimi delta attention: short convolutions, a delta rule with a decay for every channel, a gated norm."""

    def __init__(
        self, config: Any, layer: int, *, num_heads: int, head_dim: int, conv_kernel: int, full_rank_gate: bool
    ) -> None:
        super().__init__()
        hidden, width = config.hidden_size, num_heads * head_dim
        self.layer_idx, self.head_dim, self.conv_kernel = layer, head_dim, conv_kernel
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden, width, bias=False) for _ in range(3))
        self.conv1d = nn.Conv1d(3 * width, 3 * width, conv_kernel, groups=3 * width, bias=False)
        self.f_a_proj = nn.Linear(hidden, head_dim, bias=False)
        self.f_b_proj = nn.Linear(head_dim, width, bias=False)
        self.b_proj = nn.Linear(hidden, num_heads, bias=False)
        self.g_a_proj = None if full_rank_gate else nn.Linear(hidden, head_dim, bias=False)
        self.g_proj = nn.Linear(hidden if full_rank_gate else head_dim, width, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(width))
        self.A_log = nn.Parameter(torch.zeros(1, 1, num_heads, 1))
        self.o_norm = GatedNorm(head_dim)
        self.o_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, hidden: Tensor, position: Rotary | None, cache: Any) -> Tensor:
        """``[B,S,H]`` -> the same."""
        batch, new, _ = hidden.shape
        mixed = torch.cat([self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)], dim=-1).transpose(1, 2)
        mixed = self._convolved(mixed, cache).transpose(1, 2)
        q, k, v = (t.reshape(batch, new, -1, self.head_dim) for t in mixed.chunk(3, dim=-1))
        decay = (self.f_b_proj(self.f_a_proj(hidden)).float() + self.dt_bias.float()).view(q.shape)
        decay = -self.A_log.float().exp() * F.softplus(decay)
        beta = torch.sigmoid(self.b_proj(hidden))
        out = self._scanned((q, k, v), decay, beta, cache)
        gate = self.g_proj(hidden if self.g_a_proj is None else self.g_a_proj(hidden))
        return self.o_proj(self.o_norm(out, gate.view(out.shape)).reshape(batch, new, -1))

    def _convolved(self, x: Tensor, cache: Any) -> Tensor:
        """``x [B,C,S]`` -> the same; traced as one op, run by torch's own convolution."""
        if x.is_meta:
            return TC.causal_conv1d(x, self.conv1d.weight.squeeze(1), None)
        new = x.shape[-1]
        if cache is not None:
            x = cache.update_conv_state(x, self.layer_idx, conv_kernel_size=self.conv_kernel)
        x = F.conv1d(F.pad(x, (self.conv_kernel - 1, 0)), self.conv1d.weight, groups=x.shape[1])
        return F.silu(x[..., -new:])

    def _scanned(self, heads: tuple[Tensor, Tensor, Tensor], decay: Tensor, beta: Tensor, cache: Any) -> Tensor:
        """Queries, keys, values ``[B,S,heads,D]`` -> the same; the state goes into the cache."""
        q, k, v = heads
        state = None if cache is None else cache.layers[self.layer_idx].recurrent_states[0]
        if q.is_meta:
            out, state = TC.linear_attention(q, k, v, state, CHUNK)
        else:  # transformers' own code for machines without its kernels
            from transformers.models.kimi_linear import modeling_kimi_linear as kernels

            rule = kernels.chunk_kimi_delta_attention if q.shape[1] > 1 else kernels.recurrent_kimi_delta_attention
            out, state = rule(
                q, k, v, g=decay, beta=beta, initial_state=state, output_final_state=cache is not None,
                use_qk_l2norm_in_kernel=True,
            )  # fmt: skip
        if cache is not None:
            cache.update_recurrent_state(state.float(), self.layer_idx)
        return out
