"""A closer look at the variants that may do best: every whole batch between those at which all variants are priced.

A step's time jumps where a tile more begins, so no candidate stands between priced batches. It may also fall by a few
percent, so that a batch beyond the first that is too slow is in time again: two priced batches further are looked at.
What a variant can win there is bounded: while requests take no less time as the batch grows, tokens per second grow by
no more than the batch does. Variants whose bound stays below the best candidate are left as they are, and of the others
all batches between two priced smaller ones whose bound does.
"""

from __future__ import annotations

import numpy as np

from tensorcast.search.candidate_arrays import Points, each_once
from tensorcast.search.search_task import SearchTask
from tensorcast.search.selection import rated
from tensorcast.search.variant_prices import VariantPrices
from tensorcast.serving.objective import OBJECTIVES
from tensorcast.serving.traffic import Array

LISTED = 12
"""Layouts that are looked at more closely even if they cannot do best: as many as are listed."""

MOST = 64
"""Batches between two priced ones that are tried at a time: beyond 512 some first, then those between the best."""


def finer(task: SearchTask, shop: VariantPrices, parts: dict[str, Points]) -> VariantPrices | None:
    """The most promising variants of ``parts`` (by mode), priced at more whole batches where they may do better.

    None where all such batches are priced.
    """
    best, hoped = -np.inf, []
    for mode, points in parts.items():
        batch = points.columns["batch"]
        # the last whole batch before the next priced one but one, of those that fit, and what at most may come of it
        after = np.append(shop.grid, [np.inf, np.inf])[np.searchsorted(shop.grid, batch, side="right") + 1]
        last = np.maximum(np.minimum(after - 1, np.floor(points.columns["largest_batch"])), batch)
        smaller = _smaller(shop, points)
        most = np.maximum(last / batch, smaller.max(axis=1, initial=0.0))
        more = {name: points.columns[name] * most for name in ("output_tokens_per_s", "concurrency")}
        scores = []
        for one in (points, Points(points.variant, points.columns | more)):
            c = rated(task, shop, mode, one)
            late = np.any([c[f"{name}_share"] > 1 for name in ("ttft", "tpot") if f"{name}_share" in c], axis=0)
            scores.append(np.where(late, -np.inf, OBJECTIVES[task.objective].score(c)))
        best = max(best, float(scores[0].max(initial=-np.inf)))
        prefill = points.columns.get("prefill", points.variant).astype(int)
        columns = {"hope": scores[1], "batch": batch, "last": last, "prefill": prefill, "smaller": smaller}
        hoped.append(Points(points.variant, columns))
    if best == -np.inf:
        return None
    hopes, readers = Points.joined(hoped), shop.readers or shop
    hope, batch, last, prefill = (hopes.columns[name] for name in ("hope", "batch", "last", "prefill"))
    order = np.argsort(-hope, kind="stable")
    layouts = shop.layout_of[hopes.variant] * (readers.layout_of.max() + 1) + readers.layout_of[prefill]
    _, first = np.unique(layouts[order], return_index=True)
    chosen = each_once(np.flatnonzero(hope >= best), order[np.sort(first)[:LISTED]])
    chosen = chosen[(hope > -np.inf)[chosen]]
    before = np.flatnonzero((hopes.columns["smaller"][hope >= best] > 1).any(axis=0))
    begins, ends = (np.concatenate(both) for both in (
        (batch[chosen], shop.grid[before]), (last[chosen], shop.grid[before + 1] - 1)
    ))  # fmt: skip
    spans = {*zip(begins, ends, strict=True)}
    whole = [np.linspace(low, high, 1 + int(min(high - low, MOST))).round() for low, high in spans]
    grid = each_once(shop.grid, *whole)
    if len(grid) == len(shop.grid):
        return None
    if shop.readers is None:
        return shop.closer(each_once(hopes.variant[chosen], prefill[chosen]), grid)
    found = shop.closer(each_once(hopes.variant[chosen]), grid)
    return found.fed_by(readers.closer(each_once(prefill[chosen]), readers.grid))


def _smaller(shop: VariantPrices, points: Points) -> Array:
    """Of each point and priced batch, how many times its tokens per second a batch from there to before the next priced
    one may bring, of those smaller than its own: steps jump. ``[points, grid]``; 0 elsewhere."""
    grid, c = shop.grid, points.columns
    rates = grid / shop.curves["seconds"][points.variant]
    for budget, ((*_, own), _) in shop.states.items() if "chunk_tokens" in c else ():
        mine = c["chunk_tokens"] == budget
        rates[mine] = own[points.variant[mine]]
    last = np.append(grid[1:] - 1, grid[-1])
    brings = rates[np.arange(len(rates)), np.searchsorted(grid, c["batch"])]
    # batches that are too slow whatever prompts take are not worked out, nor is a larger one in time
    return np.where(last < c["batch"][:, None], np.fmax(rates * (last / grid) / brings[:, None], 0.0), 0.0)
