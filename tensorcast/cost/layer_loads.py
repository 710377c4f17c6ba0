"""Expert load where every layer has a popularity of its own: the busiest rank of each layer, not of a mean layer.

A step ends when every layer's busiest rank has ended, so its time is a sum over layers of maxima over ranks. Rows on a
rank are the sum of many independent choices: normal, with the ranks' total fixed. The expected maximum over ranks, and
the experts that the busiest one hits, are means over fixed draws at every half octave of tokens; between them
both are interpolated. Layers that load alike are priced together: :data:`POINTS` groups, by how busy their busiest
rank is, each at its mean, which leaves sums over layers of anything linear in rows or hit experts exact.

A pipeline ends with its slowest stage, so where there are stages the layers of the one whose busiest ranks have most to
do stand for all: the groups are the same, each as often as it has layers there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tensorcast.cost.rank_load import LayerPoints, RankLoad
from tensorcast.cost.stages import stage_layers
from tensorcast.cost.work import Array, Size
from tensorcast.profiles.engine import PipelineSplit

POINTS = 4
"""Groups of layers that a step is priced at."""

KNOTS = 2.0 ** np.arange(-2.0, 23.5, 0.5)
"""Tokens at which maxima are drawn."""

DRAWS, HIT_DRAWS = 1024, 8
"""Draws of all layers together (antithetic pairs); at least 16 of each. Of these, for experts hit, which vary less."""


@dataclass(frozen=True, eq=False)
class LayerLoads:
    """Expert load of one layout by layers; build with :func:`layer_loads`.

    ``busiest [layers]``: part of all choices on the busiest rank, on average. Tables have an axis of layers (in the
    order of ``busiest``, groups of which are priced) and one of :data:`KNOTS`.
    """

    top_k: float
    ranks: int
    local_experts: int
    fused: int
    order: NDArray[np.int64]
    busiest: Array
    lift: Array
    """Rows above the mean of the busiest rank, over the square root of the tokens."""
    hit: Array
    visits: Array
    """``[2, layers]``: tokens that reach the busiest rank, and the busiest node, over the mean."""
    error: float
    """Standard error of the drawn maxima, relative to a step's rows, where it is largest."""
    numbers: NDArray[np.int64]
    """The layers' numbers in the model, of ``every`` layers in all, which stages ``split`` among them."""
    every: int
    split: PipelineSplit

    @property
    def staged(self) -> bool:
        """Whether pipeline stages differ."""
        return len(self.busiest) > 1

    def at(self, tokens: Size, stages: Size = 1) -> RankLoad:
        """Load when ``tokens`` tokens in all (over the whole expert-parallel group) are routed, in the busiest of so
        many pipeline ``stages``: a number, or one for each of ``tokens``."""
        found = self.points(tokens, stages=stages)
        mean = np.asarray(tokens, dtype=float) * (self.top_k / self.ranks + self.fused)
        rows, hit = (np.einsum("...g,...g->...", loads, found.weights) for loads in (found.rows, found.hit))
        return RankLoad(rows, hit, mean, found)

    def points(self, tokens: Size, groups: int = POINTS, *, stages: Size = 1) -> LayerPoints:
        """Loads when ``tokens`` in all are routed: the axis of groups is behind those of ``tokens``."""
        tokens, groups = np.asarray(tokens, dtype=float), min(groups, len(self.busiest))
        shares, lift, hit, visits = self._grouped(groups)
        weights = self.weights(stages, groups)
        at = np.log2(np.clip(tokens, KNOTS[0], KNOTS[-1]))
        knots = np.log2(KNOTS)
        copies, local = (tokens * self.top_k)[..., None], float(self.local_experts - self.fused)
        lifted = np.stack([np.interp(at, knots, one) for one in lift], axis=-1)
        rows = tokens[..., None] * self.top_k * shares + np.sqrt(tokens)[..., None] * lifted
        rows = np.minimum(np.maximum(rows, np.minimum(copies, 1.0)), tokens[..., None] * min(local, self.top_k))
        hits = np.minimum(np.stack([np.interp(at, knots, one) for one in hit], axis=-1), rows)
        received = np.maximum(rows / np.maximum(copies / self.ranks, 1e-12), 1.0)
        if self.fused:
            own = self.fused * tokens[..., None]
            rows, hits = rows + own, hits + np.minimum(self.fused, own)
        reached = [np.broadcast_to(np.maximum(one, 1.0), rows.shape) for one in visits]
        return LayerPoints(rows, hits, received, reached[0], reached[1], weights)

    def _grouped(self, groups: int) -> tuple[Array, Array, Array, Array]:
        kept: dict[int, tuple[Array, Array, Array, Array]] = self.__dict__.setdefault("_kept", {})
        if groups not in kept:
            parts = np.array_split(np.arange(len(self.busiest)), groups)
            of = [np.stack([one[part].mean(axis=0) for part in parts]) for one in (self.busiest, self.lift, self.hit)]
            kept[groups] = of[0], of[1], of[2], np.stack([self.visits[:, part].mean(axis=1) for part in parts], axis=1)
        return kept[groups]

    def weights(self, stages: Size = 1, groups: int = POINTS) -> Array:
        """Which part of the layers of the busiest of so many pipeline stages is in each group, ``[..., groups]``."""
        known: dict[tuple[int, bytes], Array] = self.__dict__.setdefault("_known", {})
        key = groups, np.asarray(stages, dtype=float).tobytes()
        if key not in known:
            parts = np.array_split(np.arange(len(self.busiest)), min(groups, len(self.busiest)))
            several, where = np.unique(np.asarray(stages, dtype=int), return_inverse=True)
            found = []
            for count in several.tolist():
                every = stage_layers(self.every, count, self.split) if self.staged else [slice(0, self.every)]
                own = [(self.numbers >= one.start) & (self.numbers < one.stop) for one in every]
                busiest = max(own, key=lambda some: float(self.busiest[some].sum()))
                part_of = np.array([busiest[part].sum() for part in parts]) / busiest.sum()
                # tilted so that the stage's mean rows are exact: its layers are not the means of the groups
                shares = np.array([self.busiest[part].mean() for part in parts])
                tilt, off = shares - shares.mean(), self.busiest[busiest].mean() - part_of @ shares
                found.append(part_of + tilt * off / float(tilt @ tilt) if tilt @ tilt > 1e-12 else part_of)
            known[key] = np.stack(found)[where.reshape(np.shape(stages))]
        return known[key]


def layer_loads(
    chances: Array, placed: NDArray[np.int64], experts_per_rank: tuple[int, ...], *, top_k: float, nodes: int = 1,
    fused: int = 0, likeness: float = 1.0, numbers: Sequence[int] = (), every: int = 0, split: PipelineSplit = "first",
) -> LayerLoads:
    """Loads of a placement. ``chances [layers, experts]``: that a token picks each expert; ``placed [layers, slots]``:
    the expert in each slot, rank after rank, -1 where no token comes. Copies of an expert share its tokens evenly.
    ``likeness``: T tokens hit as many experts as ``T**likeness`` that pick independently. ``numbers``: of the layers in
    the model, of ``every`` layers in all, which pipeline stages ``split``; these layers alone unless given."""
    layers, experts = chances.shape
    ranks, starts = len(experts_per_rank), np.concatenate([[0], np.cumsum(experts_per_rank)[:-1]])
    copies = np.zeros((layers, experts))
    np.add.at(copies, (np.arange(layers)[:, None], placed), placed >= 0)
    share = np.where(placed < 0, 0.0, np.take_along_axis(chances / copies, placed, axis=1))
    filled = np.array(experts_per_rank) > 0
    first = starts[filled]
    mean = np.zeros((layers, ranks))
    variance, skew, apart = mean.copy(), mean.copy(), mean.copy()
    mean[:, filled] = np.add.reduceat(share, first, axis=1)
    varies = share * (1.0 - np.minimum(share, 1.0))
    variance[:, filled] = np.add.reduceat(varies, first, axis=1)
    skew[:, filled] = np.add.reduceat(varies * (1.0 - 2.0 * share), first, axis=1)
    missed = np.log1p(-np.minimum(share, 1.0 - 1e-12))
    apart[:, filled] = np.add.reduceat(missed, first, axis=1)
    held = np.zeros((layers, ranks, max(experts_per_rank)))  # chances by rank, padded with 0
    slot = np.concatenate([np.arange(count) for count in experts_per_rank])
    held[:, np.repeat(np.arange(ranks), experts_per_rank), slot] = share
    lift, hit, error = _drawn(mean, np.sqrt(variance), skew / np.maximum(variance, 1e-12), held=held, likeness=likeness)
    reached = 1.0 - np.exp(apart)  # a token reaches the rank at all
    of_nodes = 1.0 - np.exp(apart.reshape(layers, nodes, -1).sum(-1)) if ranks % nodes == 0 else reached
    visits = np.stack([one.max(1) / np.maximum(one.mean(1), 1e-12) for one in (reached, of_nodes)])
    order = np.argsort(mean.max(axis=1), kind="stable")
    return LayerLoads(
        top_k=top_k, ranks=ranks, local_experts=max(experts_per_rank) + fused, fused=fused, order=order,
        busiest=mean.max(axis=1)[order] / top_k, lift=lift[order], hit=hit[order], visits=visits[:, order], error=error,
        numbers=np.array(numbers if len(numbers) == layers else range(layers))[order],
        every=every if len(numbers) == layers else layers, split=split,
    )


@functools.lru_cache(maxsize=16)
def _normals(layers: int, draws: int, ranks: int) -> Array:
    """Standard normals ``[layers, draws, ranks]`` in antithetic pairs, their sum over ranks 0."""
    drawn = np.random.default_rng(0).standard_normal((layers, draws // 2, ranks))
    drawn = np.concatenate([drawn, -drawn], axis=1)
    if ranks == 1:
        return np.zeros_like(drawn)
    drawn -= drawn.mean(axis=-1, keepdims=True)
    return np.asarray(drawn * np.sqrt(ranks / (ranks - 1.0)))


def _drawn(
    mean: Array, spread: Array, skew: Array, *, held: Array, likeness: float
) -> tuple[Array, Array, float]:
    """``[layers, knots]`` each: lift and hit experts of the busiest rank; and the relative error of the rows.

    ``held``: chances by rank, ``[layers, ranks, slots]``.
    ``skew``: the third moment over the second, which lifts the tail of few rows (the first term of Cornish and Fisher).
    """
    layers, ranks = mean.shape
    draws = 2 if ranks == 1 else max(16, DRAWS // layers)
    standard = _normals(layers, draws, ranks)
    normals, tail = spread[:, None, :] * standard, skew[:, None, :] * (standard**2 - 1.0) / 6.0 * (ranks > 1)
    lift, hit, worst = np.empty((layers, len(KNOTS))), np.empty((layers, len(KNOTS))), 0.0
    every = np.arange(layers)[:, None]
    top = mean.max(axis=1)[:, None]
    for i, tokens in enumerate(KNOTS):
        rows = tokens * mean[:, None, :] + np.sqrt(tokens) * normals + tail
        busiest = rows.argmax(axis=-1)
        largest = np.take_along_axis(rows, busiest[..., None], -1)[..., 0]
        lift[:, i] = ((largest - tokens * top) / np.sqrt(tokens)).mean(axis=1)
        few = np.r_[0 : HIT_DRAWS // 2, draws // 2 : draws // 2 + HIT_DRAWS // 2] if draws > HIT_DRAWS else slice(None)
        chosen = held[every, busiest[:, few]]  # [layers, draws, slots of a rank]
        # the lift is extra tokens that pick this rank: as if that many more had come
        came = largest[:, few] / np.maximum(mean[every, busiest[:, few]], 1e-12)
        came = np.minimum(came, np.maximum(came, 1e-12) ** likeness)
        hit[:, i] = (1.0 - np.exp(came[..., None] * np.log1p(-np.minimum(chosen, 1.0 - 1e-12)))).sum(-1).mean(axis=1)
        pairs = (largest[:, : draws // 2] + largest[:, draws // 2 :]) / 2.0
        if tokens >= ranks and draws > 2:
            off = np.sqrt((pairs.var(axis=1, ddof=1) / (draws // 2)).sum())
            worst = max(worst, float(off / largest.mean(axis=1).sum()))
    return lift, hit, worst
