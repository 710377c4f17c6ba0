"""How unevenly tokens fall on experts: rows on the busiest rank, and how many of its experts are hit at all.

``balanced``: every expert gets the same. ``uniform``: every token picks k of E experts at random. ``zipf:S``: expert
popularity falls as ``rank**-S``, experts placed at random. ``recorded:``: popularity of every layer as counted
(:mod:`tensorcast.cost.recordings`), experts placed in order. Hit experts of independent picks:
``sum_e 1 - (1 - q_e)^T``. ``typical``: popularity as recordings of DeepSeek-R1 spread it in the median layer (of 32
tokens 140 experts hit, the busiest of 32 ranks at 2.3 times the mean), and tokens of a step, which are of requests that
have nothing to do with each other, pick on their own. ``alike``: the same of requests that resemble one another, as
benchmarks make them of random tokens: T hit as many experts as ``T**0.85`` independent ones do (:data:`LIKENESS`).
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from tensorcast.cost.layer_loads import LayerLoads, layer_loads
from tensorcast.cost.placing import balanced_by, place_layers
from tensorcast.cost.rank_load import RankLoad
from tensorcast.cost.work import Array, Size
from tensorcast.errors import InputError, unknown_name
from tensorcast.modeling.moe.placement import Placement, linear, round_robin
from tensorcast.profiles.engine import PipelineSplit

if TYPE_CHECKING:
    from tensorcast.cost.recordings.recording import LayerCounts

TYPICAL_EXPONENT = 0.6
"""Of ``typical``. Recordings published with SGLang's reproduction of DeepSeek's wide expert parallelism: experts hit by
32, 64 and 128 tokens are 145, 199 and 237 there and 140, 195 and 237 by this law."""

GROUP_EXPONENT = 0.5
"""Of ``typical``, where a router picks groups of experts first: a group's popularity falls as its rank to minus this.
In the recordings the busiest of 8 ranks, which hold a group each, gets 1.8 and 2.0 times the mean in the median layer
of decode, and the busiest of 32 ranks 2.3 and 2.7; by this law 1.8 and 2.4, as many experts hit as without groups. Were
experts strewn over ranks as they come, the busiest of 8 would get 1.2 times the mean."""

LIKENESS = 0.85
"""Of ``alike``: the power of the number of tokens that independent ones would need to hit as many experts. InferenceX's
client sends prompts of numbers that follow one another in the vocabulary (utils/bench_serving), and replies to these
are as alike; SGLang's own (bench_serving, ``random``) cuts and repeats conversations of ShareGPT, which are not. Chosen
on InferenceX's runs of five MoE models, for models that nothing was fitted to: times per token are 11.7 % off in the
mean of networks' medians where tokens pick at random, 10.3 % by that popularity alone and 9.2 % with this (1.0 and 0.8
of other exponents do no better). Rows of the busiest rank as uneven as those of so many fewer tokens would change no
median there."""

class _Said(dict[str, str]):
    def __missing__(self, law: str) -> str:
        return f"tokens fall on experts by --routing {law}"


SAID = _Said({
    "balanced": "tokens fall evenly on experts (routing balanced)",
    "uniform": "tokens pick experts at random, none more popular (routing uniform)",
    "typical": "tokens fall on experts as unevenly as recorded traffic does (routing typical)",
    "alike": "tokens fall on experts as recorded traffic does, those of a step alike (routing alike)",
})
"""What outputs say of a law: of each."""

PLACEMENTS = (64, 16)
"""Random orders of a popularity law whose median stands for it; fewer where each is balanced anew (EPLB)."""

KNOWING = ("eplb", "eplb_global", "balanced")
"""Policies that place experts by their popularity."""


@dataclass(frozen=True)
class Routing:
    """A law of expert popularity, by rank in a group of the router's and by the group's rank; ``likeness``: T tokens
    hit as many experts as ``T**likeness`` independent ones."""

    name: str = "balanced"
    exponent: float = 0.0
    group_exponent: float = 0.0
    counts: LayerCounts | None = None
    likeness: float = 1.0

    @classmethod
    def parse(cls, text: str, phase: str = "decode") -> Routing:
        """``typical``, ``alike``, ``balanced``, ``uniform``, ``zipf:S``, ``recorded:FILE`` or ``recorded:NAME`` (of
        ``phase``); a file alone is a recording, too."""
        if text in ("typical", "alike"):
            likeness = LIKENESS if text == "alike" else 1.0
            return cls(text, TYPICAL_EXPONENT, GROUP_EXPONENT, likeness=likeness)
        if text in ("balanced", "uniform"):
            return cls(text)
        if text.startswith("zipf:"):
            try:
                exponent = float(text[5:])
            except ValueError:
                exponent = -1.0
            if not 0 <= exponent < 10:
                raise InputError(f"--routing {text!r}: the exponent after zipf: must be a number from 0 to 10")
            return cls(text, exponent)
        from tensorcast.cost.recordings.formats import READABLE
        from tensorcast.cost.recordings.named import PREFIX, recording

        if text.startswith(PREFIX) or Path(text).exists() or text.lower().endswith(FILES) or os.sep in text:
            return cls(text, counts=recording(text.removeprefix(PREFIX)).of(phase))
        raise InputError(
            f"--routing {text!r}: use typical, alike, balanced, uniform, zipf:S, or {PREFIX}FILE, {READABLE}, or "
            f"{PREFIX}NAME"
        )


FILES = (".csv", ".json", ".pt")

MOST_KNOWN = 64
"""Arrays of tokens whose loads are kept, of each layout's load."""


def inclusion(popularity: Array, top_k: float) -> np.ndarray:
    """Chance that a token picks each expert, ``[E]``, summing to k: ``min(1, c * popularity)``, as no token picks an
    expert twice."""
    share = popularity / popularity.sum()
    free = np.ones(len(share), dtype=bool)
    q = np.minimum(1.0, top_k * share)
    for _ in range(len(share)):
        over = free & (q >= 1.0)
        if not over.any():
            break
        free &= ~over
        left = share[free].sum()
        q[~free] = 1.0
        if left <= 0:
            break
        q[free] = (top_k - (~free).sum()) * share[free] / left
    return np.clip(q, 0.0, 1.0)


@dataclass(frozen=True)
class ExpertLoad:
    """Expert load of one layout; build with :func:`expert_load`, then ask :meth:`at` for any number of tokens."""

    share: float
    """Part of all rows that the busiest rank gets while every expert is chosen alike; its copies halve an expert's."""
    top_k: float
    ranks: int
    busiest: np.ndarray | None
    """Distinct chances that a token picks an expert of the busiest rank (None: balanced)."""
    alike: np.ndarray | None
    """How many of that rank's experts have each of these chances."""
    noise: float
    """Expected maximum over ranks of a standard normal: how far sampling lifts the busiest rank."""
    local_experts: int
    """Experts on the fullest rank, shared ones among them."""
    fused: int = 0
    """Shared experts among them, which every token visits on every rank."""
    likeness: float = 1.0
    """T tokens hit as many experts as ``T**likeness`` that pick independently."""
    _known: dict[tuple[tuple[int, ...], bytes], RankLoad] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    staged = False
    """Whether pipeline stages differ."""

    @functools.cached_property
    def _of_a_token(self) -> tuple[float, float, Array]:
        """Rows of a token on the busiest rank in the mean, their variance, and by chance of its experts the logarithm
        of the chance that the token picks another."""
        assert self.busiest is not None
        each = self.alike * self.busiest
        missing = np.log1p(-np.minimum(self.busiest, 1.0 - 1e-12))
        return float(each.sum()), float((each * (1.0 - self.busiest)).sum()), missing

    def at(self, tokens: Size, stages: Size = 1) -> RankLoad:
        """Load when ``tokens`` tokens in all (over the whole expert-parallel group) are routed, the same in all stages.
        """
        tokens = np.asarray(tokens, dtype=float)
        key = tokens.shape, tokens.tobytes()
        if key in self._known:  # layouts that differ in other things ask for the same again
            return self._known[key]
        copies = tokens * self.top_k
        mean = copies / self.ranks
        local = 1.0 * self.local_experts - self.fused
        if self.busiest is None or self.alike is None:
            rows = np.maximum(copies * self.share, np.minimum(copies, 1.0))
            hit = np.minimum(local, rows)
        else:
            each, variance, missing = self._of_a_token
            expected, spread = tokens * each, np.sqrt(tokens * variance)
            rows = np.minimum(
                np.maximum(expected + self.noise * spread, np.minimum(copies, 1.0)), tokens * min(local, self.top_k)
            )
            # the lift is extra tokens that pick this rank: as if that many more had come
            effective = tokens * np.maximum(rows / np.maximum(expected, 1e-12), 1.0)
            if self.likeness < 1:
                effective = np.minimum(effective, np.maximum(effective, 1e-12) ** self.likeness)
            missed = np.exp(np.multiply.outer(effective, missing))
            hit = np.minimum((self.alike * (1.0 - missed)).sum(-1), rows)
        if self.fused:
            own = self.fused * tokens
            rows, hit, mean = rows + own, hit + np.minimum(self.fused, own), mean + own
        while len(self._known) >= MOST_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[key] = RankLoad(rows, hit, mean)
        return self._known[key]


@functools.lru_cache(maxsize=4096)
def expert_load(
    routing: Routing,
    num_experts: int,
    top_k: float,
    ranks: int,
    *,
    redundant: int = 0,
    policy: str = "linear",
    seed: int = 0,
    fused: int = 0,
    nodes: int = 1,
    groups: int = 1,
    layers: tuple[int, ...] = (),
    stages: tuple[int, PipelineSplit] = (0, "first"),
) -> ExpertLoad | LayerLoads:
    """The load model of ``num_experts`` experts, and ``redundant`` copies of some, over ``ranks`` ranks, each of which
    holds ``fused`` shared experts beside.

    ``policy`` places them: ``linear``, ``round_robin``, ``eplb``, which knows the popularity that it balances and keeps
    the router's ``groups`` on ``nodes`` where they divide, or ``balanced``, which improves on it. ``layers``: numbers
    of the model's MoE layers, which a recording must be of; ``stages``: how many layers there are in all, and how
    pipeline stages split them.
    """
    if redundant < 0:
        raise InputError(f"--redundant-experts {redundant}: must be at least 0")
    if routing.counts is not None:
        return _recorded(
            routing.counts.for_model(num_experts, layers), top_k, ranks, policy, redundant=redundant, fused=fused,
            nodes=nodes, groups=groups, likeness=routing.likeness, numbers=layers, stages=stages,
        )
    if policy not in POLICIES:
        raise unknown_name("--placement", policy, POLICIES)
    place = POLICIES[policy]
    if routing.name == "balanced":
        even = place(np.ones(num_experts), ranks, redundant, nodes, groups)
        return ExpertLoad(
            share=float(even.loads(np.ones(num_experts)).max()) / num_experts, top_k=top_k, ranks=ranks, busiest=None,
            alike=None, noise=0.0, local_experts=max(even.experts_per_rank) + fused, fused=fused,
        )
    if not routing.group_exponent or num_experts % groups:
        groups = 1
    noise = NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) if ranks > 1 else 0.0
    popularities = _popularities(
        routing.exponent, routing.group_exponent, num_experts, top_k, groups, drawn=PLACEMENTS[policy in KNOWING],
        seed=seed,
    )
    # each order is placed by itself where the policy knows it, else one placement is for all
    orders = [[one] for one in popularities] if policy in KNOWING else [popularities]
    found: list[tuple[float, Array, Placement]] = []
    for some in orders:
        placement = place(some[0], ranks, redundant, nodes, groups)
        share = (np.array(some) / placement.replica_counts)[:, np.asarray(placement.physical_to_logical)]
        ends = np.cumsum(placement.experts_per_rank)
        until = np.pad(np.cumsum(share, axis=1), ((0, 0), (1, 0)))[:, [0, *ends]]
        for own, rank in zip(share, np.diff(until, axis=1).argmax(axis=1), strict=True):
            held = own[ends[rank] - placement.experts_per_rank[rank] : ends[rank]]
            found.append((float(held.sum()), held, placement))
    found.sort(key=lambda one: one[0])
    _, busiest, placement = found[len(found) // 2]
    chances, alike = np.unique(busiest, return_counts=True)
    return ExpertLoad(
        share=float(busiest.sum()) / top_k, top_k=top_k, ranks=ranks, busiest=chances, alike=alike, noise=noise,
        local_experts=max(placement.experts_per_rank) + fused, fused=fused, likeness=routing.likeness,
    )


@functools.lru_cache(maxsize=256)
def _popularities(
    exponent: float, group_exponent: float, num_experts: int, top_k: float, groups: int, *, drawn: int, seed: int
) -> list[Array]:
    """Chances that a token picks each expert, in so many orders ``drawn`` where they differ; whatever the ranks."""
    popular = np.arange(1, num_experts // groups + 1, dtype=float) ** -exponent
    of_groups = np.arange(1, groups + 1, dtype=float) ** -group_exponent
    q = inclusion(np.outer(of_groups, popular).ravel(), top_k)
    if not exponent:
        return [q]
    generator = np.random.default_rng(seed)
    return [
        generator.permutation(generator.permuted(q.reshape(groups, -1), axis=1)).ravel()
        if groups > 1 else generator.permutation(q) for _ in range(drawn)
    ]  # fmt: skip


def _recorded(
    counts: LayerCounts, top_k: float, ranks: int, policy: str, *, redundant: int, fused: int, nodes: int, groups: int,
    likeness: float, numbers: tuple[int, ...], stages: tuple[int, PipelineSplit],
) -> LayerLoads:
    """Loads of every layer, placed by what ``policy`` knows: these counts, or older ones (``eplb:RECORDING``)."""
    from tensorcast.cost.recordings.named import recording

    base, _, seen = policy.partition(":")
    known = recording(seen).of("decode") if seen and base in ("eplb", "eplb_global", "balanced") else counts
    if known is not counts:
        known = known.for_model(counts.num_experts, counts.layers)
        policy = base
    placed, per_rank = place_layers(policy, known.counts, ranks, redundant, nodes=nodes, groups=groups)
    if len(placed) > len(counts.counts) and counts.layers and counts.layers[-1] < len(placed):
        placed = placed[list(counts.layers)]  # of all layers, dense ones too
    if len(placed) not in (1, len(counts.counts)):
        raise InputError(f"--placement {policy}: {len(placed)} layers, but {counts.name} has {len(counts.counts)}")
    chances = np.stack([inclusion(row, top_k) for row in counts.counts])
    whole = np.broadcast_to(placed, (len(chances), placed.shape[1]))
    return layer_loads(
        chances, whole, per_rank, top_k=top_k, nodes=nodes, fused=fused, likeness=likeness, numbers=numbers,
        every=stages[0], split=stages[1],
    )


def _round_robin(popularity: np.ndarray, ranks: int, redundant: int, nodes: int, groups: int) -> Placement:
    if redundant:
        raise InputError(f"--redundant-experts {redundant}: round_robin places no copies; use --placement eplb")
    return round_robin(len(popularity), ranks)


POLICIES: dict[str, Callable[[np.ndarray, int, int, int, int], Placement]] = {
    "linear": lambda popularity, ranks, redundant, nodes, groups: linear(len(popularity), ranks, redundant),
    "round_robin": _round_robin,
    "trivial": lambda q, ranks, redundant, nodes, groups: linear(len(q), ranks, redundant),
    "eplb": lambda q, ranks, redundant, nodes, groups: balanced_by(
        "eplb", q, ranks, redundant, nodes=nodes, groups=groups
    ),
    "eplb_global": lambda q, ranks, redundant, nodes, groups: balanced_by(
        "eplb_global", q, ranks, redundant, nodes=1, groups=1
    ),
    "balanced": lambda q, ranks, redundant, nodes, groups: balanced_by(
        "balanced", q, ranks, redundant, nodes=nodes, groups=groups
    ),
}
"""Placement by name, from the popularity of each expert, ranks, copies, nodes and the router's groups."""


def _none_of(pool: float, avoided: float, picks: int) -> float:
    """Chance that ``picks`` distinct items of ``pool`` contain none of ``avoided``: C(pool-avoided, k) / C(pool, k)."""
    chance = 1.0
    for i in range(picks):
        chance *= max(pool - avoided - i, 0.0) / (pool - i)
    return chance


@functools.cache
def expected_distinct(num_experts: int, top_k: int, parts: int, groups: int = 1, chosen: int = 1) -> float:
    """How many of ``parts`` equal shares of the experts a token's k choices touch, on average.

    Parts are nodes or ranks; with group-limited routing the k come from ``chosen`` of ``groups`` groups.
    Source: DeepEP's ``get_theoretical_num_sms``; DeepSeek-V3 (arXiv 2412.19437) section 2.1.2 for the limit.
    """
    if groups <= 1 or chosen >= groups:
        groups = chosen = 1
    pool = num_experts * chosen / groups
    per_group = num_experts / groups
    if parts > groups:  # a part is a piece of one group
        missed = 1.0 - chosen / groups * (1.0 - _none_of(pool, num_experts / parts, top_k))
    else:
        held = groups // parts  # groups on one part; sum over how many of them were chosen
        missed = sum(
            math.comb(held, j)
            * math.comb(groups - held, chosen - j)
            / math.comb(groups, chosen)
            * _none_of(pool, j * per_group, top_k)
            for j in range(min(held, chosen) + 1)
            if chosen - j <= groups - held
        )
    return parts * (1.0 - missed)
