"""Rows, hit experts and tiles on the busiest rank of an expert-parallel group, as measured tables route their tokens.

``balanced``: choices go round the experts. ``uniform``: every choice falls on a random expert. ``power_law_ALPHA``:
expert popularity is drawn from a power law between 1 and 0.8 T (or 0.01 and 2 where there are fewer choices than
experts), scaled to T·k choices, and the busiest rank is timed. The published collector
(github.com/ai-dynamo/aiconfigurator, ``collector/helper.py``) says so; expectations here are over fixed draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tensorcast.cost.work import Array
from tensorcast.errors import InputError

TOKENS = 2.0 ** np.arange(0.0, 21.0)
"""Tokens at which skewed loads are drawn; between them loads are interpolated on a log scale."""

DRAWS = 16


@dataclass(frozen=True)
class TableRankLoad:
    """Expected load of the busiest rank: (token, choice) rows, experts with at least one, 64- and 128-row tiles, and
    the rows of its largest expert. Arrays, one entry per call."""

    rows: Array
    hit: Array
    tiles_64: Array
    tiles_128: Array
    largest: Array

    @classmethod
    def even(cls, rows: Array, hit: Array) -> TableRankLoad:
        """``rows`` spread evenly over ``hit`` experts."""
        hit = np.maximum(hit, 1.0)
        each = rows / hit
        return cls(rows, hit, hit * np.ceil(each / 64), hit * np.ceil(each / 128), each)


@lru_cache(maxsize=512)
def _popularity(experts: int, top_k: int, alpha: float) -> Array:
    """Rows per expert ``[tokens, draws, experts]`` of power-law routing."""
    tokens = TOKENS[:, None, None]
    uniform = np.random.default_rng(0).random((1, DRAWS, experts))
    many = tokens * top_k > experts
    low, high = np.where(many, 1.0, 0.01), np.where(many, np.maximum(0.8 * tokens, 1.001), 2.0)
    power = 1.0 - alpha if abs(1.0 - alpha) > 1e-6 else 1e-6
    drawn = ((high**power - low**power) * uniform + low**power) ** (1.0 / power)
    wanted = drawn / drawn.sum(-1, keepdims=True) * tokens * top_k
    whole = np.round(wanted)
    left = tokens * top_k - whole.sum(-1, keepdims=True)  # rounding's remainder goes to the most popular, one each
    order = (-wanted).argsort(-1)
    place = order.argsort(-1)
    whole = np.maximum(whole + np.sign(left) * (place < np.abs(left)), 0.0)
    # no token picks an expert twice: what is over T goes on to the next popular, a_i = min(T, w_i + what came over)
    wanted_so_far = np.take_along_axis(whole, order, -1).cumsum(-1)
    full = tokens * np.arange(1.0, experts + 1.0)
    given = full + np.minimum(np.minimum.accumulate(wanted_so_far - full, axis=-1), 0.0)
    return np.take_along_axis(np.diff(given, axis=-1, prepend=0.0), place, -1)


@lru_cache(maxsize=4096)
def _skewed(experts: int, top_k: int, ranks: int, alpha: float) -> Array:
    """``[tokens, 5]``: log2 of the busiest rank's rows, hit experts, tiles of 64 and 128, largest expert's rows."""
    rows = _popularity(experts, top_k, alpha)
    held = max(experts // ranks, 1)
    by_rank = rows[:, :, : held * min(ranks, experts)].reshape(*rows.shape[:2], -1, held)
    busiest = by_rank.sum(-1).argmax(-1)
    mine = np.take_along_axis(by_rank, busiest[..., None, None], axis=2)[:, :, 0]
    parts = (mine.sum(-1), (mine > 0).sum(-1), np.ceil(mine / 64).sum(-1), np.ceil(mine / 128).sum(-1), mine.max(-1))
    return np.log2(np.stack([np.maximum(part.mean(1), 0.5) for part in parts], axis=1))


def skew_of(distribution: str) -> float:
    """``balanced`` (and any ``_eplb``: experts placed to balance): 0, ``uniform``: -1, ``power_law_ALPHA``: ALPHA."""
    if distribution == "balanced" or distribution.endswith("_eplb"):
        return 0.0
    if distribution == "uniform":
        return -1.0
    try:
        return float(distribution.removeprefix("power_law_"))
    except ValueError:
        raise InputError(
            f"distribution {distribution!r}: balanced, uniform or power_law_ALPHA, with _eplb where experts are placed"
        ) from None


def rank_load(
    tokens: Array, experts: Array, top_k: Array, ranks: Array, *, skew: Array, slots: Array
) -> TableRankLoad:
    """Load of the busiest of ``ranks`` ranks when ``tokens`` tokens in all choose ``top_k`` of ``experts``, each array
    with one entry per call. ``skew`` as :func:`skew_of` says; ``slots``: experts with their redundant copies."""
    result = np.empty((5, len(tokens)))
    kinds, kind_of = np.unique(skew, return_inverse=True)
    sizes = np.stack([experts, top_k, ranks, slots, kind_of]).astype(np.int64)
    code = np.ravel_multi_index(tuple(sizes), tuple(sizes.max(axis=1) + 1)) if sizes.size else np.zeros(0, int)
    _, first, group = np.unique(code, return_index=True, return_inverse=True)
    order = np.argsort(group, kind="stable")
    edges = np.append(np.searchsorted(group[order], np.arange(len(first))), len(group))
    for i, example in enumerate(first):
        at = order[edges[i] : edges[i + 1]]
        expert_count, k, rank_count, slot_count, kind = (int(v) for v in sizes[:, example])
        alpha, wanted = float(kinds[kind]), tokens[at]
        held = max(slot_count / rank_count, 1.0)
        even_rows = np.ceil(wanted * k / rank_count)
        if alpha == 0:
            even = TableRankLoad.even(even_rows, np.minimum(held, even_rows))
        elif alpha < 0:
            even = TableRankLoad.even(even_rows, held * (1.0 - (1.0 - 1.0 / max(held, 1.0)) ** even_rows))
        else:
            table = _skewed(expert_count, k, rank_count, alpha)
            at_log = np.log2(np.maximum(wanted, 1.0))
            for row in range(5):
                result[row, at] = np.exp2(np.interp(at_log, np.log2(TOKENS), table[:, row]))
            continue
        result[:, at] = np.stack([even.rows, even.hit, even.tiles_64, even.tiles_128, even.largest])
    return TableRankLoad(*result)
