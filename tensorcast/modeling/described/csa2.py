"""Compressed sparse attention whose layers share entries (CSA2 of DeepSeek-V4.1-Flash), as a description may name it.

Held to transformers' class of it (huggingface/transformers main at 0a2080b, models/deepseek_v41) and to vLLM 0.33.0
(``models/deepseek_v41/attention.py``). What the cache holds is rounded to 8 and 4 bits there; that shapes no operation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tensorcast import ops  # noqa: F401  (registers the ops)
from tensorcast.modeling.described.attention import RMSNorm, Rotary, rotary
from tensorcast.modeling.described.ffn import Plain

TC = torch.ops.tensor_cast


class Pass:
    """What all layers have in one pass, ``numbers [1,S]`` of the ``tokens [B,S]`` in their sequences among it, and what
    they hand on: entries and their keys, entries that were picked, blocks to choose among."""

    def __init__(self, tokens: Tensor, numbers: Tensor, position: Rotary, cache: Any) -> None:
        self.tokens, self.numbers, self.position, self.cache = tokens, numbers, position, cache
        self.entries: Tensor | None = None
        self.keys: Tensor | None = None
        self.picked: Tensor | None = None
        self.blocks: Tensor | None = None


def kept(cache: Any, name: str, rows: Tensor) -> Tensor:
    """``rows [B,S,...]`` behind those of earlier steps, which a real cache has under this name."""
    if cache is None or rows.is_meta:
        return rows
    known = vars(cache).setdefault("rows", {})
    known[name] = torch.cat((known[name], rows), dim=1) if name in known else rows
    return known[name]


def turned(x: Tensor, position: Rotary, *, back: bool = False) -> Tensor:
    """``x [B,S,...,D]`` with its last numbers turned in pairs by their positions, or ``back``."""
    width = position[0].shape[-1]
    cos, sin = (t[..., : width // 2].to(x.dtype) for t in position)
    if x.dim() == 4:
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    sin = -sin if back else sin
    rest, (one, two) = x[..., :-width], (x[..., i - width :: 2] for i in range(2))
    pairs = torch.stack((one * cos - two * sin, one * sin + two * cos), dim=-1).flatten(-2)
    return torch.cat((rest, pairs), dim=-1)


class Compressor(nn.Module):
    """Makes one entry of several tokens by weights that the tokens give themselves; of one token by a projection."""

    def __init__(self, hidden: int, width: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.kv_proj = Plain(hidden, width, bias=False)
        self.gate_proj = Plain(hidden, width, bias=False) if ratio > 1 else None
        self.norm = RMSNorm(width)

    def forward(self, hidden: Tensor, cache: Any, name: str) -> Tensor:
        """``[B,S,H]`` -> all entries so far ``[B,n,D]``; traced: a row for every token, as if each ended one."""
        rows = kept(cache, f"{name}.rows", self.kv_proj(hidden))
        if self.gate_proj is None:
            return self.norm(rows)
        gates = kept(cache, f"{name}.gates", self.gate_proj(hidden))
        if rows.is_meta:
            return self.norm(rows * gates.float().softmax(-1).to(rows.dtype))
        whole = rows.shape[1] // self.ratio * self.ratio
        grouped = (t[:, :whole].unflatten(1, (-1, self.ratio)) for t in (rows, gates))
        values, weights = grouped
        return self.norm((values.float() * weights.float().softmax(2)).sum(2).to(hidden.dtype))


class Indexer(nn.Module):
    """Scores entries by keys of their own, and picks those of the best scores for each query."""

    def __init__(
        self, hidden: int, *, low: int, heads: int, width: int, topk: int, owns: int, blocks: int, block: int,
        candidates: str,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.width, self.topk, self.blocks, self.block = heads, width, topk, blocks, block
        self.candidates = candidates
        self.q_b_proj = nn.Linear(low, heads * width, bias=False)
        self.weights_proj = Plain(hidden, heads, bias=False)
        if owns:
            self.k_proj = Plain(owns, width, bias=False)
            self.k_norm = RMSNorm(width)

    def keys(self, entries: Tensor, position: Rotary) -> Tensor:
        """``[B,n,D]`` -> ``[B,n,width]``"""
        return turned(self.k_norm(self.k_proj(entries)), position)

    def forward(self, hidden: Tensor, low: Tensor, shared: Pass, seen: Tensor) -> Tensor:
        """Entries that each query may read ``[B,S,n]``, true or not; ``seen [S]``: how many there are for it."""
        assert shared.keys is not None
        batch, new, _ = hidden.shape
        q = turned(self.q_b_proj(low).view(batch, new, self.heads, self.width), shared.position)
        weights = self.weights_proj(hidden).float()
        scores = torch.matmul(q.flatten(1, 2).float(), shared.keys.transpose(1, 2).float())
        scores = (scores.relu().unflatten(1, (new, self.heads)) * weights.unsqueeze(-1)).sum(2)
        if scores.is_meta:
            return scores.topk(1, dim=-1)[1]
        scores = scores.masked_fill(torch.arange(scores.shape[-1]) >= seen[:, None], float("-inf"))
        if self.candidates == "source":
            shared.blocks = self._best_blocks(scores, seen)
        elif self.candidates == "within" and shared.blocks is not None:
            scores = scores.masked_fill(~shared.blocks, float("-inf"))
        best = scores.topk(min(self.topk, scores.shape[-1]), dim=-1)
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best.indices, best.values > float("-inf"))

    def _best_blocks(self, scores: Tensor, seen: Tensor) -> Tensor:
        """Of blocks of entries those with the best ones, the newest among them: ``[B,S,n]``."""
        entries = scores.shape[-1]
        best = F.pad(scores, (0, -entries % self.block), value=float("-inf")).unflatten(-1, (-1, self.block)).amax(-1)
        newest = torch.arange(best.shape[-1]) == (seen[:, None] - 1) // self.block
        top = best.masked_fill(newest, float("inf")).topk(min(self.blocks, best.shape[-1]), dim=-1)
        chosen = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, top.indices, top.values > float("-inf"))
        return chosen.repeat_interleave(self.block, dim=-1)[..., :entries]


class SharedEntryAttention(nn.Module):
    """One vector as key and value of all heads, in a window of tokens and in entries that this or an earlier layer
    makes and picks."""

    def __init__(
        self, config: Any, layer: int, *, num_heads: int, head_dim: int, q_lora_rank: int, rotary_dim: int, window: int,
        o_groups: int, o_lora_rank: int, ratio: int, entries: bool, indexers: bool, candidates: str, index_heads: int,
        index_head_dim: int, index_topk: int, candidate_blocks: int, candidate_block_size: int,
    ) -> None:  # fmt: skip
        super().__init__()
        hidden = config.hidden_size
        self.config, self.layer_idx, self.is_causal = config, layer, True
        self.head_dim, self.rotary_dim, self.sliding_window, self.ratio = head_dim, rotary_dim, window, ratio
        self.num_key_value_groups, self.scaling, self.groups = num_heads, head_dim**-0.5, o_groups
        self.q_a_proj = nn.Linear(hidden, q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(q_lora_rank)
        self.q_b_proj = nn.Linear(q_lora_rank, num_heads * head_dim, bias=False)
        self.kv_proj = nn.Linear(hidden, head_dim, bias=False)
        self.kv_norm = RMSNorm(head_dim)
        self.o_a_proj = nn.Linear(num_heads * head_dim // o_groups, o_groups * o_lora_rank, bias=False)
        self.o_b_proj = nn.Linear(o_groups * o_lora_rank, hidden, bias=False)
        self.sinks = nn.Parameter(torch.zeros(num_heads))
        self.compressor = Compressor(hidden, head_dim, ratio) if entries else None
        self.indexer = Indexer(
            hidden, low=q_lora_rank, heads=index_heads, width=index_head_dim, topk=index_topk,
            owns=head_dim if entries else 0, blocks=candidate_blocks, block=candidate_block_size, candidates=candidates,
        ) if indexers else None  # fmt: skip

    def forward(self, hidden: Tensor, shared: Pass, *, writes: bool = True) -> Tensor:
        """``[B,S,H]`` -> the same. ``writes``: it fills the cache, too."""
        batch, new, _ = hidden.shape
        low = self.q_a_layernorm(self.q_a_proj(hidden))
        q = turned(self.q_b_proj(low).view(batch, new, -1, self.head_dim), shared.position)
        keys = self.window_keys(hidden, shared, writes=writes)
        if self.compressor is not None and writes:
            self.make_entries(hidden, shared)
        seen = (shared.numbers[0] + 1) // max(self.ratio, 1)
        if self.indexer is not None and shared.keys is not None:
            shared.picked = self.indexer(hidden, low, shared, seen)
        out = self._attended(q.transpose(1, 2), keys, shared)
        grouped = turned(out, shared.position, back=True).reshape(batch * new, self.groups, -1).transpose(0, 1)
        narrow = self.o_a_proj.weight.view(self.groups, -1, grouped.shape[-1]).transpose(1, 2)
        return self.o_b_proj(torch.bmm(grouped, narrow).transpose(0, 1).reshape(batch, new, -1))

    def window_keys(self, hidden: Tensor, shared: Pass, *, writes: bool = True) -> Tensor:
        """Keys ``[B,1,n,D]`` of the new tokens, and of those that the cache has."""
        keys = turned(self.kv_norm(self.kv_proj(hidden)), shared.position).unsqueeze(1)
        if shared.cache is None or not writes:
            return keys
        if not keys.is_meta:
            return kept(shared.cache, f"{self.layer_idx}.keys", keys.squeeze(1)).unsqueeze(1)
        found: Tensor = shared.cache.update(keys, keys, self.layer_idx)[0]
        return found

    def make_entries(self, hidden: Tensor, shared: Pass) -> None:
        """Entries of all tokens so far, and their keys."""
        assert self.compressor is not None
        latents = self.compressor(hidden, shared.cache, str(self.layer_idx))
        first = torch.arange(latents.shape[1], device=latents.device)[None] * self.ratio
        position = rotary(first, self.rotary_dim)
        shared.entries = turned(latents, position).unsqueeze(1)
        if self.indexer is not None:
            shared.keys = self.indexer.keys(latents, position)
        if latents.is_meta:
            TC.kv_cache_write(shared.entries, shared.entries, "entries")
            if shared.keys is not None:
                TC.kv_cache_write(shared.keys, shared.keys[..., :0], "indexer")

    def _attended(self, q: Tensor, keys: Tensor, shared: Pass) -> Tensor:
        """Queries ``[B,heads,S,D]`` -> ``[B,S,heads,D]``."""
        if q.is_meta:
            function, window = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation], self.sliding_window
            out: Tensor = function(
                self, q, keys, keys, None, scaling=self.scaling, dropout=0.0, sliding_window=window, s_aux=self.sinks
            )[0]
            return out
        ids = shared.numbers[0]
        places = torch.arange(keys.shape[2]) + int(ids[-1]) + 1 - keys.shape[2]
        ahead = ids[:, None] - places
        hidden = ((ahead < 0) | (ahead >= self.sliding_window)).expand(q.shape[0], -1, -1)
        if self.ratio and shared.entries is not None and shared.picked is not None:
            keys, hidden = torch.cat((keys, shared.entries), dim=2), torch.cat((hidden, ~shared.picked), dim=-1)
        scores = torch.matmul(q, keys.transpose(2, 3)) * self.scaling
        scores = scores.masked_fill(hidden.unsqueeze(1), float("-inf"))
        sinks: Tensor = self.sinks.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
        weights = torch.cat((scores, sinks.to(scores.dtype)), dim=-1).float().softmax(-1)[..., :-1].to(q.dtype)
        return torch.matmul(weights, keys).transpose(1, 2)
