"""Residual streams that are mixed around each part of a layer, and rows of tables that are added to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensorcast.modeling.described.csa2 import kept

EPSILON = 1e-6


class StreamMix(nn.Module):
    """What one product with all streams of a token weighs: the sum that the next part reads, the streams' shares of
    this part's output, and of one another (manifold-constrained hyper-connections, arXiv 2512.24880)."""

    def __init__(self, hidden: int, streams: int, rounds: int) -> None:
        super().__init__()
        self.streams, self.rounds = streams, rounds
        self.weight = nn.Parameter(torch.zeros((streams + 2) * streams, streams * hidden))
        self.base = nn.Parameter(torch.zeros((streams + 2) * streams))
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[B,S,n,H]`` -> ``[B,S,n]`` of the sum, the same of shares, ``[B,S,n,n]`` of shares of one another."""
        n, flat = self.streams, streams.flatten(2).float()
        flat = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPSILON)
        mixed = F.linear(flat, self.weight.float()).split((n, n, n * n), dim=-1)
        base = self.base.float().split((n, n, n * n))
        read, shares, among = (part * self.scale[i].float() + base[i] for i, part in enumerate(mixed))
        square = among.unflatten(-1, (n, n)).softmax(-1) + EPSILON
        square = square / (square.sum(-2, keepdim=True) + EPSILON)
        for _ in range(self.rounds - 1):
            square = square / (square.sum(-1, keepdim=True) + EPSILON)
            square = square / (square.sum(-2, keepdim=True) + EPSILON)
        return torch.sigmoid(read) + EPSILON, 2 * torch.sigmoid(shares), square


def collapsed(streams: Tensor, weights: Tensor) -> Tensor:
    """``[B,S,n,H]`` -> ``[B,S,H]``: their sum by ``weights [B,S,n]``."""
    return (weights.unsqueeze(-1) * streams.float()).sum(2).to(streams.dtype)


def expanded(added: Tensor, streams: Tensor, shares: Tensor, among: Tensor) -> Tensor:
    """``streams [B,S,n,H]``, mixed, with ``added [B,S,H]`` in each by its share."""
    mixed = torch.matmul(among.to(streams.dtype).transpose(-1, -2), streams)
    return shares.to(streams.dtype).unsqueeze(-1) * added.unsqueeze(-2) + mixed


class TableRows(nn.Module):
    """A table whose rows engines may keep in the host's memory: numbers in 8 bits, an exponent for 32 of them."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        """``[...]`` -> ``[...,width]``"""
        return F.embedding(ids, self.weight)


class Ngrams(nn.Module):
    """Rows that hashes of a token and those before it name, added to the streams as far as these agree with keys that
    are made of them (Engram, arXiv 2601.07372)."""

    def __init__(self, hidden: int, streams: int, *, rows: int, longest: int, heads: int, width: int) -> None:
        super().__init__()
        self.longest, self.heads = longest, heads
        columns = (longest - 1) * heads
        self.table = TableRows(rows, width)
        self.kv_proj = nn.Linear(columns * width, hidden * (streams + 1), bias=False)
        self.q_weight, self.k_weight = (nn.Parameter(torch.ones(streams, hidden)) for _ in range(2))

    def forward(self, streams: Tensor, ids: Tensor) -> Tensor:
        """``streams [B,S,n,H]``, places of rows ``[B,S,columns]`` -> the same."""
        n, hidden = streams.shape[2:]
        key, value = self.kv_proj(self.table(ids).flatten(-2)).split((n * hidden, hidden), dim=-1)
        key, own = key.float().unflatten(-1, (n, hidden)), streams.float()
        norms = (torch.rsqrt(t.square().mean(-1) + EPSILON) for t in (own, key))
        agree = (own * (self.q_weight.float() * self.k_weight.float()) * key).sum(-1) * next(norms) * next(norms)
        agree = agree * hidden**-0.5
        gate = torch.sigmoid(torch.copysign(agree.abs().clamp_min(EPSILON).sqrt(), agree))
        return (own + gate.unsqueeze(-1) * value.float().unsqueeze(-2)).to(streams.dtype)

    def places(self, tokens: Tensor, cache: Any) -> Tensor:
        """Places of rows ``[B,S,columns]`` for ``tokens [B,S]``, by a hash of ours: that of engines takes a tokenizer,
        and shapes no operation either."""
        new, columns = tokens.shape[1], (self.longest - 1) * self.heads
        if tokens.is_meta:
            return tokens.unsqueeze(-1).expand(-1, -1, columns).contiguous()
        every = F.pad(kept(cache, "tokens", tokens), (self.longest - 1, 0))
        shifted = [every[:, self.longest - 1 - i : every.shape[1] - i][:, -new:] for i in range(self.longest)]
        found, hashed = list[Tensor](), shifted[0]
        for i in range(1, self.longest):
            hashed = hashed * 1_000_003 + shifted[i]
            found += [(hashed * (2 * head + 1)) % self.table.weight.shape[0] for head in range(self.heads)]
        return torch.stack(found, dim=-1)
