"""The search of one task: a model on so many GPUs of one device under one engine; all its candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from tensorcast.cost.evidence import NORMAL_90
from tensorcast.parallel import uncollected
from tensorcast.search.candidate_arrays import Points, among
from tensorcast.search.candidate_table import NONE, Candidates, candidates_of
from tensorcast.search.candidates import aggregated, disaggregated, steady, told
from tensorcast.search.refine import finer
from tensorcast.search.search_task import SearchTask
from tensorcast.search.selection import worth_a_row
from tensorcast.search.space import Variant, space
from tensorcast.search.variant_prices import VariantPrices
from tensorcast.search.workspace import CURRENT, MOST_SPACES, Parts
from tensorcast.serving.interval import served_interval
from tensorcast.serving.traffic import Array

NO_ROOM, NO_PACE = "batch fits memory", "prefill keeps pace"
"""Rules on candidates beside those on layouts: a sequence fits beside the weights; prompts are read as they come."""


@dataclass
class SearchResult:
    """Of one task: the candidates that may matter, the pools and variants behind them, and what fell away."""

    candidates: Candidates
    variants: list[tuple[Variant, Variant]]
    """(prefill, decode) of every row."""
    pruned: Counter[str]
    examined: int


@uncollected()
def search(task: SearchTask) -> SearchResult:
    """Evaluate every candidate of one task. Tops: a few seconds for a large model and 32 GPUs; what a process has
    priced for another question serves this one, too (:mod:`tensorcast.search.workspace`).

    Every candidate's step is priced at the very batch that it stands at.
    """
    named = task.base.routing, task.base.placement
    # what may say other things now
    changing = any(name.startswith("recorded:") or Path(name).is_file() for name in named)
    workspace = CURRENT.get()
    if changing:
        workspace.clear()
    workspace.trim()
    # whatever is kept is kept with its task, whose profiles stay alive, so that their ids stay their own
    pools = task.pools or (task,)
    keys = [
        (id(one.model), id(one.device), id(one.engine), (one.base, one.images), one.gpus, one.load, one.axes,
         one.layouts, one.runnable_only) for one in pools
    ]  # fmt: skip
    asked = (
        *keys, task.ttft_s, task.tpot_s, task.objective, task.modes, task.request_rate,
        *[one.price_per_hour for one in pools], task.users, task.budget, task.confidence,
    )  # fmt: skip
    if asked not in workspace.results:
        workspace.results[asked] = task, _search(task, keys)
    found: SearchResult = workspace.results[asked][1]
    return found


def _search(task: SearchTask, keys: Sequence[tuple[Hashable, ...]]) -> SearchResult:
    """Evaluate every candidate. ``keys``: for what prices hang on of a task, or of each of its pools."""
    workspace, pruned, shops = CURRENT.get(), Counter[str](), []
    for one, key in zip(task.pools or (task,), keys, strict=True):
        if key not in workspace.prices:
            _, parts = workspace.parts.setdefault(key[:4], (one, Parts()))
            searched = one.gpus, one.axes, one.layouts, one.runnable_only
            if searched not in parts.spaces:
                fell = Counter[str]()
                parts.spaces[searched] = space(one, fell), fell
            while len(parts.spaces) > MOST_SPACES:
                del parts.spaces[next(iter(parts.spaces))]
            tried, fell = parts.spaces[searched]
            shop = VariantPrices(one.scenario, tried, one.axes.chunk_tokens, parts) if tried else None
            workspace.prices[key] = one, shop, fell
        _, shop, fell = workspace.prices[key]
        pruned.update(fell)
        shops.append(shop)
    if any(shop is None for shop in shops):
        return SearchResult(NONE, [], pruned, 0)
    prices = shops[-1] if len(shops) == 1 else shops[-1].fed_by(shops[0])
    pruned[NO_ROOM] += prices.without_room
    points, examined = worth_showing(task, prices, pruned)
    examined += pruned[NO_PACE]
    every, fine = [(prices, points)], finer(task, prices, points)
    while fine is not None:
        between, more = worth_showing(task, fine, Counter(), every[-1][0].grid)
        every.append((fine, between))
        examined += more
        fine = finer(task, fine, between)
    tables, behind = [], []
    for shop, found in every:
        for mode, kept in found.items():
            tables.append(candidates_of(task, shop, mode, kept))
            prefill = kept.columns.get("prefill", kept.variant).astype(int)
            readers = shop.readers or shop
            behind += [(readers.variants[p], shop.variants[d]) for p, d in zip(prefill, kept.variant, strict=True)]
    return SearchResult(Candidates.joined(tables) if tables else NONE, behind, pruned, examined)


def _apart(task: SearchTask, shop: VariantPrices) -> Array | bool:
    """Which variants the engine runs on servers of replies alone."""
    serial = task.engine.serial_pipeline
    if serial is None or serial.drafts_in_pools or not task.runnable_only:
        return True
    return np.array([v.layout.pp == 1 or not v.decode.mtp_depth for v in shop.variants])


def worth_showing(
    task: SearchTask, prices: VariantPrices, pruned: Counter[str], known: Array | None = None
) -> tuple[dict[str, Points], int]:
    """Points worth a row by mode, and of how many; those at batches that are ``known``, ascending, left out."""
    found, examined = {}, 0
    sigmas = NormalDist().inv_cdf(task.confidence or 0.5) / NORMAL_90
    for mode in task.modes:
        # no candidate's times are surer than the serving model by itself
        least = served_interval(
            0.0, 0.0, 0.0, engine=task.engine, pools=mode == "disaggregated", new=task.unserved
        )
        ttft, tpot = (float(least[name]) ** sigmas for name in ("ttft_s", "tpot_s"))
        limits = (task.ttft_s and task.ttft_s / ttft, task.tpot_s and task.tpot_s / tpot)
        shop = prices if mode == "aggregated" else prices.in_pools()
        points, slow = (
            aggregated(shop, limits)
            if mode == "aggregated"
            else disaggregated(
                shop, task.paid_gpus, limits, task.pools_room() if task.pools else (), apart=_apart(task, shop)
            )
        )
        pruned[NO_PACE] += slow
        if not len(points.variant):
            continue
        if known is not None:
            points = points.where(~among(points.columns["batch"], known))
        examined += len(points.variant)
        kept = points.where(worth_a_row(task, prices, mode, points))
        if mode == "aggregated":
            inside = steady(prices, kept)
            pruned[NO_PACE] += int((~inside).sum())
            kept = kept.where(inside)
        if len(kept.variant):
            found[mode] = told(shop, kept)
    return found, examined
