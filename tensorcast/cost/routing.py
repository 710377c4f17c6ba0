"""How unevenly tokens fall on experts: rows on the busiest rank, and how many of its experts are hit at all.

``balanced``: every expert gets the same. ``uniform``: every token picks k of E experts at random. ``zipf:S``: expert
popularity falls as ``rank**-S``, experts placed at random. A CSV of counts: popularity as measured, experts placed in
order. Hit experts of independent picks: ``sum_e 1 - (1 - q_e)^T``.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from tensorcast.cost.work import Size
from tensorcast.errors import InputError, unknown_name
from tensorcast.modeling.moe.placement import Placement, eplb, linear, round_robin

PLACEMENTS = (64, 16)
"""Random orders of a popularity law whose median stands for it; fewer where each is balanced anew (EPLB)."""


@dataclass(frozen=True)
class RankLoad:
    """Work of the busiest expert-parallel rank in one MoE layer: (token, choice) rows and experts with at least one."""

    rows: Size
    hit: Size
    mean_rows: Size


@dataclass(frozen=True)
class Routing:
    """A law of expert popularity. ``inclusion`` is None for balanced, else the chance q_e that a token picks e."""

    name: str = "balanced"
    exponent: float = 0.0
    counts: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Routing:
        """``balanced``, ``uniform``, ``zipf:S`` or a CSV file with a ``count`` column (``expert``, ``layer``)."""
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
        if Path(text).is_file():
            return cls(text, counts=_read_counts(Path(text)))
        if text.lower().endswith(".csv") or os.sep in text:
            what = "is a directory" if Path(text).is_dir() else "no such file"
            raise InputError(f"--routing {text}: {what}; give a CSV file of per-expert counts")
        raise InputError(f"--routing {text!r}: use balanced, uniform, zipf:S, or a CSV file of per-expert counts")

    def inclusion(self, num_experts: int, top_k: float) -> np.ndarray:
        """Chance that a token picks each expert, ``[E]``, summing to k: ``min(1, c * popularity)``, as no token
        picks an expert twice. A wrong length raises :class:`InputError`."""
        if self.counts:
            if len(self.counts) != num_experts:
                raise InputError(
                    f"--routing {self.name}: {len(self.counts)} counts, but the model has {num_experts} experts a layer"
                )
            popularity = np.asarray(self.counts, dtype=float)
        else:
            popularity = np.arange(1, num_experts + 1, dtype=float) ** -self.exponent
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


def _read_counts(path: Path) -> tuple[float, ...]:
    import pandas as pd

    try:
        frame = pd.read_csv(path, comment="#")
    except Exception as reason:
        raise InputError(f"--routing {path}: not a CSV file ({str(reason).splitlines()[0]})") from None
    if "count" not in frame.columns:
        raise InputError(f"--routing {path}: needs a column 'count', found {', '.join(map(str, frame.columns))}")
    said = pd.to_numeric(frame["count"], errors="coerce")
    counts = said.groupby(frame["expert"]).sum() if "expert" in frame.columns else said
    if not (np.isfinite(said).all() and (said >= 0).all() and said.sum() > 0):
        raise InputError(f"--routing {path}: counts must be numbers of at least 0, not all 0")
    return tuple(float(c) for c in counts)


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

    def at(self, tokens: Size) -> RankLoad:
        """Load when ``tokens`` tokens in all (over the whole expert-parallel group) are routed."""
        tokens = np.asarray(tokens, dtype=float)
        copies = tokens * self.top_k
        mean = copies / self.ranks
        local = 1.0 * self.local_experts - self.fused
        if self.busiest is None or self.alike is None:
            rows = np.maximum(copies * self.share, np.minimum(copies, 1.0))
            hit = np.minimum(local, rows)
        else:
            expected = tokens * (self.alike * self.busiest).sum()
            spread = np.sqrt(tokens * (self.alike * self.busiest * (1.0 - self.busiest)).sum())
            rows = np.minimum(
                np.maximum(expected + self.noise * spread, np.minimum(copies, 1.0)), tokens * min(local, self.top_k)
            )
            # the lift is extra tokens that pick this rank: as if that many more had come
            effective = tokens * np.maximum(rows / np.maximum(expected, 1e-12), 1.0)
            missed = np.exp(np.multiply.outer(effective, np.log1p(-np.minimum(self.busiest, 1.0 - 1e-12))))
            hit = np.minimum((self.alike * (1.0 - missed)).sum(-1), rows)
        if self.fused:
            own = self.fused * tokens
            rows, hit, mean = rows + own, hit + np.minimum(self.fused, own), mean + own
        return RankLoad(rows, hit, mean)


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
) -> ExpertLoad:
    """The load model of ``num_experts`` experts, and ``redundant`` copies of some, over ``ranks`` ranks, each of which
    holds ``fused`` shared experts beside.

    ``policy`` places them: ``linear``, ``round_robin``, or ``eplb``, which knows the popularity that it balances.
    """
    if policy not in POLICIES:
        raise unknown_name("--placement", policy, POLICIES)
    if redundant < 0:
        raise InputError(f"--redundant-experts {redundant}: must be at least 0")
    place = POLICIES[policy]
    if routing.name == "balanced":
        even = place(np.ones(num_experts), ranks, redundant)
        return ExpertLoad(
            share=float(even.loads(np.ones(num_experts)).max()) / num_experts, top_k=top_k, ranks=ranks, busiest=None,
            alike=None, noise=0.0, local_experts=max(even.experts_per_rank) + fused, fused=fused,
        )
    q = routing.inclusion(num_experts, top_k)
    noise = NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) if ranks > 1 else 0.0
    if routing.counts or routing.exponent == 0:
        popularities = [q]
    else:
        generator = np.random.default_rng(seed)
        popularities = [generator.permutation(q) for _ in range(PLACEMENTS[policy == "eplb"])]
    found = []
    for popularity in popularities:
        placement = place(popularity, ranks, redundant)
        logical = np.asarray(placement.physical_to_logical)
        share = (popularity / placement.replica_counts)[logical]
        held = np.split(share, np.cumsum(placement.experts_per_rank)[:-1])
        busiest = max(held, key=lambda experts: float(experts.sum()))
        found.append((float(busiest.sum()), busiest, placement))
    found.sort(key=lambda one: one[0])
    _, busiest, placement = found[len(found) // 2]
    chances, alike = np.unique(busiest, return_counts=True)
    return ExpertLoad(
        share=float(busiest.sum()) / top_k, top_k=top_k, ranks=ranks, busiest=chances, alike=alike, noise=noise,
        local_experts=max(placement.experts_per_rank) + fused, fused=fused,
    )


def _round_robin(popularity: np.ndarray, ranks: int, redundant: int) -> Placement:
    if redundant:
        raise InputError(f"--redundant-experts {redundant}: round_robin places no copies; use --placement eplb")
    return round_robin(len(popularity), ranks)


POLICIES: dict[str, Callable[[np.ndarray, int, int], Placement]] = {
    "linear": lambda popularity, ranks, redundant: linear(len(popularity), ranks, redundant),
    "round_robin": _round_robin,
    "eplb": lambda popularity, ranks, redundant: eplb(popularity, ranks, redundant),
}
"""Placement by name, from the popularity of each expert."""


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
