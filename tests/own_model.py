"""A language model of nobody's library: grouped heads, odd names, experts with biases and limits, a scaled sum."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Person(nn.Module):
    """An expert that limits what it computes, with biases; ``kind`` chooses what else it does."""

    def __init__(self, width: int, inner: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.w1, self.w3, self.w2 = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)
        self.limit, self.own_gain = 3.0, nn.Parameter(torch.ones(width)) if kind == "scaled" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "plain":
            out: Tensor = self.w2(F.gelu(self.w1(x)) * self.w3(x))
            return out
        if self.kind == "sorted":  # a value of one row depends on others: no grouped run is right
            out = self.w2(F.silu(self.w1(x)) * self.w3(x))
            return out + out.mean(0, keepdim=True) * 0.5
        hidden = F.silu(self.w1(x)).clamp(max=self.limit) * self.w3(x).clamp(-self.limit, self.limit)
        out = self.w2(hidden)
        return out if self.own_gain is None else out * self.own_gain


class Pick(nn.Module):
    """A gate that returns logits and something that nobody asked for."""

    def __init__(self, width: int, people: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, people, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.score(x)
        return logits, logits.logsumexp(-1)


class Crowd(nn.Module):
    """The MoE block: its sum is scaled, a host takes every row, and a norm comes last."""

    def __init__(self, width: int, inner: int, people: int, asked: int, kind: str) -> None:
        super().__init__()
        self.pick = Pick(width, people)
        self.people = nn.ModuleList(Person(width, inner, kind) for _ in range(people))
        self.host, self.last = Person(width, inner, "plain"), nn.RMSNorm(width)
        self.asked, self.gain = asked, 1.5

    def forward(self, states: Tensor) -> Tensor:
        x = states.reshape(-1, states.shape[-1])
        weights, chosen = self.pick(x)[0].float().softmax(-1).topk(self.asked, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(x)
        for i, person in enumerate(self.people):
            token, slot = (chosen == i).nonzero(as_tuple=True)
            if len(token):
                out.index_add_(0, token, person(x[token]) * weights[token, slot, None])
        whole: Tensor = self.last(out * self.gain + self.host(x))
        return whole.view_as(states)


class Floor(nn.Module):
    def __init__(self, width: int, heads: int, groups: int, crowd: Crowd) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.ask = nn.Linear(width, width, bias=False)
        self.tell = nn.Linear(width, 2 * groups * self.size, bias=False)
        self.back, self.crowd = nn.Linear(width, width), crowd
        self.first, self.second = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        b, s, h = x.shape
        y = self.first(x)
        q = self.ask(y).view(b, s, self.heads, self.size).transpose(1, 2)
        k, v = self.tell(y).view(b, s, 2, self.groups, self.size).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=s > 1, enable_gqa=True)
        x = x + self.back(seen.transpose(1, 2).reshape(b, s, h))
        out: Tensor = x + self.crowd(self.second(x))
        return out


class House(nn.Module):
    """``ids [B,S]`` -> logits, in a tuple."""

    def __init__(
        self, *, width: int = 64, heads: int = 8, groups: int = 2, inner: int = 48, people: int = 8, asked: int = 3,
        floors: int = 3, words: int = 512, kind: str = "limited",
    ) -> None:  # fmt: skip
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.floors = nn.ModuleList(
            Floor(width, heads, groups, Crowd(width, inner, people, asked, kind)) for _ in range(floors)
        )
        self.out = nn.Linear(width, words, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        x = self.words(ids)
        for floor in self.floors:
            x = floor(x)
        return (self.out(x),)
