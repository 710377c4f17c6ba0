"""Attention ops over a paged cache.

A traced step carries only the *new* tokens' keys and values; ``past`` is the number of cached tokens per sequence.
Symbols: B sequences, S new tokens each, P past, L = P + S, Hq and Hkv heads, D and Dv head widths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tensorcast.ops.library import define

_ATTENTION = (
    "attention(Tensor q, Tensor k, Tensor v, SymInt past=0, float scale=1.0, bool causal=True, int window=0, "
    "int chunk=0, int selected=0, int latent=0, int rope=0, Tensor? sinks=None) -> Tensor"
)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: int = 0,
    scale: float = 1.0,
    causal: bool = True,
    window: int = 0,
    chunk: int = 0,
    selected: int = 0,
    latent: int = 0,
    rope: int = 0,
    sinks: Tensor | None = None,
) -> Tensor:
    """``k``/``v`` hold all ``past + S`` tokens here: a real run keeps its cache in tensors.

    torch's fused attention, which has no sinks: with those, the textbook formula.
    """
    total, new = k.shape[2], q.shape[2]
    if total != past + new:
        raise ValueError(f"attention: keys hold {total} tokens, expected past + new = {past} + {new}")
    if selected:
        raise ValueError("attention: token selection needs the indexer's mask; run sparse attention with sdpa")
    hidden = _hidden(past, new, causal, window, chunk, q.device)
    if sinks is not None:
        return _with_sinks(q, k, v, scale, hidden, sinks)
    whole = causal and past == 0 and not (window and window < total) and not (chunk and chunk < total)
    seen = None if whole or hidden is None else ~hidden
    if new == 1:  # heads that share keys are rows of one product, as in every decode kernel: keys are read once
        rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
        out = F.scaled_dot_product_attention(rows, k, v, seen, scale=scale)
        return out.reshape(q.shape[0], 1, q.shape[1], -1)
    out = F.scaled_dot_product_attention(
        q, k, v, seen, is_causal=whole, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).contiguous()


def _hidden(past: int, new: int, causal: bool, window: int, chunk: int, device: torch.device) -> Tensor | None:
    """Which of ``past + new`` keys each new query may not see ``[S,L]``; None where it sees them all."""
    total = past + new
    every = (not causal or new == 1) and not (window and window < total) and not (chunk and chunk < total)
    if every:
        return None
    query_at = torch.arange(past, total, device=device)[:, None]
    key_at = torch.arange(total, device=device)[None]
    hidden = torch.zeros_like(query_at == key_at)
    if causal:
        hidden = hidden | (key_at > query_at)
    if window:
        hidden = hidden | (query_at - key_at >= window)
    if chunk:
        hidden = hidden | (query_at // chunk != key_at // chunk)
    return hidden


def _with_sinks(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor | None, sinks: Tensor) -> Tensor:
    """Each head's sink takes a share of the softmax and has no value (gpt-oss)."""
    groups, total = q.shape[1] // k.shape[1], k.shape[2]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    column = sinks.float().reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
    weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :total]
    return (weights.to(v.dtype) @ v).transpose(1, 2).contiguous()


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[-1]))


# q [B,Hq,S,D], k [B,Hkv,S,D], v [B,Hkv,S,Dv] -> [B,S,Hq,Dv]. window: sliding window in tokens. chunk: keys of the
# query's own chunk only. selected: sparse attention, tokens read per query. latent, rope: MLA's cached widths.
define(_ATTENTION, real=_attention, fake=_attention_fake)

# Writes the new tokens' cache entries. k [B,Hkv,S,D] and v [B,Hkv,S,Dv] as cached (MLA: latent and rope parts).
define(
    "kv_cache_write(Tensor k, Tensor v, str kind) -> Tensor",  # returns the slot ids [B,S]
    real=lambda k, v, kind: torch.arange(k.shape[0] * k.shape[-2], device=k.device).view(k.shape[0], k.shape[-2]),
    fake=lambda k, v, kind: k.new_empty((k.shape[0], k.shape[-2]), dtype=torch.int64),
)


def _cache_read(new: Tensor, past: int) -> Tensor:
    if past:
        raise ValueError("kv_cache_read: the traced cache holds no data; a real run reads its own cache")
    return new.clone()


def _cache_read_fake(new: Tensor, past: int) -> Tensor:
    return new.new_empty((new.shape[0], new.shape[1] + past, *new.shape[2:]))


# All L = P + S cached entries of an indexer, [B,S,D] -> [B,L,D].
define("kv_cache_read(Tensor new, SymInt past) -> Tensor", real=_cache_read, fake=_cache_read_fake)
