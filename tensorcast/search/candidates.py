"""The two modes of serving, over all variants that have been priced: one engine for both phases, or two pools."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tensorcast.search.axes import LARGEST_BATCH
from tensorcast.search.candidate_arrays import (
    Points,
    batches,
    each_once,
    in_order,
    largest_where,
    last_of,
    number_within,
)
from tensorcast.search.search_task import Room
from tensorcast.search.variant_prices import VariantPrices
from tensorcast.serving.curves import DecodeCurve
from tensorcast.serving.entries import Entries
from tensorcast.serving.full_cache import FullCache, starts_over
from tensorcast.serving.hand_over import hand_over_s
from tensorcast.serving.prefill_costs import PrefillCosts
from tensorcast.serving.steady_state import HALVINGS, Aggregated, Disaggregated
from tensorcast.serving.traffic import Array, Mask, Rows

PREFILL_BUSY = 0.9
"""Share of its time that a prefill pool is planned to be busy at most: the queue before it grows as 1 / (1 - busy)."""

Limits = tuple[float | None, float | None]
"""Longest TTFT and TPOT."""

TOGETHER = 16_384
"""Entries that are worked out together: few enough to stay in the cache."""


@np.errstate(invalid="ignore", over="ignore")
def aggregated(shop: VariantPrices, limits: Limits = (None, None)) -> tuple[Points, int]:
    """Every variant at every chunk budget and batch that fits, and how many of those prompts would overrun.

    Batches are powers of two, and of those that were priced the largest that fits and, where prompts keep up and users
    wait no longer than the limits say, the largest and a smaller one that brings more: steps jump.
    """
    parts, orders, unstable, grid = list[Points](), list[Rows](), 0, shop.grid
    quick = _quick_enough(shop, limits[1])
    for budget in shop.chunks:
        most = np.minimum(shop.fits[budget], LARGEST_BATCH)
        if budget not in shop.states:
            shop.states[budget] = np.full((3, len(most), len(grid)), np.nan), np.zeros(len(most), dtype=int)
        (first_s, per_token, rates), reached = shop.states[budget]
        asked = np.minimum(np.searchsorted(grid, most, side="right"), quick)
        new = np.flatnonzero(asked > reached)
        several = np.array_split(new[np.argsort(-asked[new], kind="stable")], 1 + len(new) * len(grid) // TOGETHER)
        for mine in several if len(new) else ():  # those that are asked as many together
            held = slice(int(asked[mine[0]]))
            state = _engine(shop, budget, mine[:, None]).at(grid[None, held])
            # what never keeps up with its prompts is late whatever the limits are
            first_s[mine, held] = np.where(np.isfinite(state.concurrency), state.first_s, np.nan)
            per_token[mine, held] = state.generation_s / max(shop.scenario.load.output_len - 1, 1)
            rates[mine, held] = grid[None, held] / state.place_s
        reached[new] = asked[new]
        fits = grid <= most[:, None]
        kept = fits & (first_s <= (limits[0] or np.inf)) & (per_token <= (limits[1] or np.inf))
        largest = np.append(0.0, grid)[np.searchsorted(grid, most, side="right")]
        chosen = last_of(grid, kept)
        quickest = grid[np.where(kept, rates, 0.0).argmax(axis=1)]
        known = shop.whatever.get(budget)
        rows, batch = batches(largest, chosen, np.where(quickest < chosen, quickest, 0.0), new=known is not None)
        points = _served(shop, budget, rows, batch)
        if known is None:
            shop.whatever[budget] = points.where(slice(len(batches(largest)[0])))
        both = [points] if known is None else [known, points]  # those that limits choose come last
        stable = np.concatenate([np.isfinite(one.columns["concurrency"]) for one in both])
        unstable += int((~stable).sum())
        depths = shop.depths[np.concatenate([one.variant for one in both])]
        order = in_order(depths)
        orders.append(sum(len(one.variant) for one in parts) + order[stable[order]])
        parts += both
    return Points.joined(parts, np.concatenate(orders)), unstable


def _quick_enough(shop: VariantPrices, tpot_s: float | None) -> Rows:
    """Of the priced batches of each variant, up to which one tokens may come in time: later ones take too long even in
    steps without prompts. Where prompts run alone, replies that end together may take less: all of them."""
    scenario, count = shop.scenario, len(shop.grid)
    if tpot_s is None or scenario.engine.prefill_alone:
        return np.full(len(shop.depths), count)
    steps = scenario.load.decode_steps(shop.depths)[:, None]
    slow = ~(steps * shop.curves["seconds"] / max(scenario.load.output_len - 1, 1) <= tpot_s)
    return np.where(slow.all(axis=1), 0, count - (~slow[:, ::-1]).argmax(axis=1))


def _served(shop: VariantPrices, budget: int, rows: Rows, batch: Array) -> Points:
    """What variants ``rows`` serve at their batches, with prompts cut by this budget."""
    most, parts = np.minimum(shop.fits[budget], LARGEST_BATCH), list[Points]()
    for some in _blocks(len(rows)):
        engine, at = _engine(shop, budget, rows[some]), batch[some]
        state = engine.at(at)
        extra = {"chunk_tokens": np.full(len(at), float(budget)), "largest_batch": most[rows[some]]}
        parts.append(Points(rows[some], engine.times(at, state.concurrency, state) | extra))
    return Points.joined(parts)


def _blocks(count: int) -> list[slice]:
    """So many entries, :data:`TOGETHER` at a time; of none an empty block."""
    return [slice(start, start + TOGETHER) for start in range(0, max(count, 1), TOGETHER)]


def _engine(shop: VariantPrices, budget: int, rows: Rows) -> Aggregated:
    """Variants ``rows`` as engines that take ``budget`` prompt tokens per step."""
    return Aggregated(
        traffic=shop.scenario.load,
        engine=shop.scenario.engine,
        decode_ranks=shop.layouts["dp"][rows],
        depth=shop.depths[rows],
        decoding=DecodeCurve(shop.grid, shop.curves, rows),
        prompts=shop.prompts[budget].where(rows),
        full=_full(shop, budget, rows),
    )


def _full(shop: VariantPrices, budget: int, rows: Rows) -> FullCache | None:
    """Caches that replies fill beside prompts in steps of ``budget``, where the engine lets in more than stay: none
    where an exchange takes fewer sequences than fit."""
    scenario = shop.scenario
    if not starts_over(scenario.engine):
        return None
    if budget not in shop.full:
        fits, rule = shop.fits[budget], scenario.engine.step_tokens
        for sent in () if rule is None else rule.exchanges.values():
            fits = np.where(fits == sent // (1 + shop.depths), np.inf, fits)
        shop.full[budget] = FullCache.of(scenario.load, fits, scenario.load.decode_steps(shop.depths))
    return shop.full[budget].where(rows)


def told(shop: VariantPrices, points: Points) -> Points:
    """Points that were chosen, with all that there is to say of them."""
    c, rows = points.columns, points.variant
    models: list[tuple[Rows, Aggregated | Disaggregated]] = []
    if "chunk_tokens" in c:
        for budget in {*c["chunk_tokens"].tolist()}:
            mine = np.flatnonzero(c["chunk_tokens"] == budget)
            models.append((mine, _engine(shop, int(budget), rows[mine])))
    else:
        which = c["prefill"].astype(int)
        costs = (shop.readers or shop).own_prompts.where(which)
        pools = _Pools(which, costs, rows, c["prefill_workers"], c["decode_workers"], c["hand_over_s"])
        models.append((np.arange(len(rows)), pools.of(shop)))
    every: dict[str, Array] = {}
    for mine, model in models:
        for name, values in model.metrics(c["batch"][mine], c["concurrency"][mine]).columns().items():
            every.setdefault(name, np.empty(len(rows)))[mine] = values
    return Points(rows, every | c)


def steady(shop: VariantPrices, points: Points) -> Mask:
    """Mask of aggregated ``points`` whose users bring about their batch.

    Close to where prompts take all of a step the wait for them explodes, and as many users may be served at another,
    larger batch: nobody would find such a point in operation.
    """
    found = np.zeros(len(points.variant), dtype=bool)
    for budget in each_once(points.columns["chunk_tokens"]):
        every = np.flatnonzero(points.columns["chunk_tokens"] == budget)
        for mine in np.array_split(every, 1 + len(every) * HALVINGS // TOGETHER):
            rows, users, batch = (points.variant[mine], *(points.columns[n][mine] for n in ("concurrency", "batch")))
            most = np.minimum(users / shop.layouts["dp"][rows], points.columns["largest_batch"][mine])
            # all that bisection looks at on its way to the batch; where it decides otherwise it ends elsewhere
            low, high, middles = np.zeros(len(mine)), most, [most]
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                low, high = np.where(middle <= batch, middle, low), np.where(middle <= batch, high, middle)
                middles.append(middle)
            at = np.stack(middles, axis=1)
            close = np.isclose(at, batch[:, None], rtol=1e-6)
            asked = ~close  # where it has come so far, either answer will do
            asked[:, 0] = True
            below, there = asked.copy(), np.nonzero(asked)[0]
            below[asked] = _engine(shop, int(budget), rows[there]).at(
                at[asked], users[there]
            ).concurrency <= users[there]
            on_its_way = (close | (below == (at < batch[:, None])))[:, 1:].all(axis=1)
            found[mine] = np.where(below[:, 0], close[:, 0], on_its_way)
    return found


@np.errstate(invalid="ignore", over="ignore")
def disaggregated(
    shop: VariantPrices, gpus: int, limits: Limits = (None, None), room: Room = (), *, apart: Array | bool = True
) -> tuple[Points, int]:
    """Every decode variant (of those that run ``apart`` from what reads prompts) with prefill workers that keep up with
    it, on at most ``gpus`` GPUs, within ``room`` where that says more; and how many had none. Prompts are read by the
    ``shop``'s readers, if it has some.

    At each batch (powers of two; of those priced the largest that fits, the largest within the limit on TPOT) the pools
    that match at fewest GPUs per request; for each number of decode workers, prefill workers on all other GPUs. Of all
    these pools the largest batch that prompts keep up with, and a smaller one that brings more; and where these are
    late with a first token, the largest in time.
    """
    chosen, unstable = list[Array](), 0
    grid, decode_s = shop.grid, shop.curves["seconds"] * shop.scenario.engine.overhead.pool_factor
    steps = shop.scenario.load.decode_steps(shop.depths)
    per_token = (steps / max(shop.scenario.load.output_len - 1, 1))[:, None] * decode_s
    fits = (grid <= np.minimum(shop.room_decode, LARGEST_BATCH)[:, None]) & np.reshape(apart, (-1, 1))
    within = fits & (per_token <= (limits[1] or np.inf))
    rows, batch = batches(last_of(grid, fits), last_of(grid, within))
    # prompts per second that one decode worker asks for
    rates = grid * shop.layouts["dp"][:, None] / (steps[:, None] * decode_s)
    rate = rates[rows, np.searchsorted(grid, batch)]
    usable = np.where(within.any(axis=1, keepdims=True), within, fits)
    asked = np.where(usable, rates, np.inf)
    # the least of any usable batch from here on: unlike the rates themselves it never falls
    least = np.minimum.accumulate(asked[:, ::-1], axis=1)[:, ::-1]
    # rates in ascending order, of equal ones that of the smallest batch last, and whose they are
    ascending = len(grid) - 1 - np.argsort(asked[:, ::-1], axis=1, kind="stable")
    by_rate = np.take_along_axis(asked, ascending, axis=1)
    size, readers, room = shop.layouts["world_size"], shop.readers or shop, room or [(float(gpus), 1.0, 1.0)]
    for prefill in _prefill_choices(readers, gpus, limits[0]):
        variant = readers.variants[prefill]
        wide, most_per_s = variant.layout.world_size, float(readers.own_prompts.where(prefill).most_per_s)
        capacity = PREFILL_BUSY * float(readers.layouts["readers"][prefill]) * most_per_s
        same = shop.kv_dtypes == variant.decode.kv_dtype
        x, y = _matched(rate, capacity, wide, size[rows], room)
        unstable += int((x == 0)[same[rows]].sum())
        # their own largest batch, too: each once, by variant and workers
        _, once = np.unique((rows * (x.max(initial=0) + 1) + x) * (y.max(initial=0) + 1) + y, return_index=True)
        once = once[x[once] > 0]
        workers = np.array(_pool_sizes(int((gpus - wide) // size.min())), dtype=float)[:, None]
        left = [(most - workers * size * d, wide * p) for most, p, d in room]
        others = np.min([np.floor(n / each) if each else np.where(n < 0, n, np.inf) for n, each in left], axis=0)
        several, mine = np.nonzero(same & (others >= 1))
        own = np.concatenate([rows[once], mine])
        own_x = np.concatenate([x[once], others[several, mine]])
        own_y = np.concatenate([y[once], workers[several, 0]])
        limit = own_x * capacity / own_y
        most = number_within(least, own, limit)
        largest = np.append(0.0, grid)[most]
        # a step may jump: fewer sequences may then bring more tokens than the most that prompts keep up with
        quickest = grid[ascending[own, np.maximum(number_within(by_rate, own, limit) - 1, 0)]]
        quickest = np.where((most > 0) & (quickest < largest), quickest, 0.0)
        some, at = np.concatenate([rows, own, own]), np.concatenate([batch, largest, quickest])
        x, y = np.concatenate([x, own_x, own_x]), np.concatenate([y, own_y, own_y])
        took = hand_over_s(
            readers.scenario.deployment(variant.layout, "prefill", variant.prefill), size[some], x + y,
            int(shop.scenario.load.input_len), shop.scenario.device,
        )
        every = np.stack([np.full(len(some), prefill), some, x, y, at, took])
        chosen.append(every[:, same[some] & (x > 0) & (at >= 1)])
    if not any(one.size for one in chosen):
        return Points(np.zeros(0, dtype=int), {}), unstable
    prefills, rows, x, y, at, took = np.concatenate(chosen, axis=1)
    which = prefills.astype(int)
    matched = _Pools(which, readers.own_prompts.where(which), rows.astype(int), x, y, took)
    blocks = [(matched.where(some), at[some]) for some in _blocks(len(at))]
    served = [pools.serve(shop, batch) for pools, batch in blocks]
    if limits[0] is not None:
        late = zip(blocks, served.copy(), strict=True)
        served += [pools.sooner(shop, points, limits[0]) for (pools, _), points in late]
    order = np.flatnonzero(np.isfinite(np.concatenate([one.columns["concurrency"] for one in served])))
    # by what reads prompts, then by drafted tokens
    order = order[in_order(shop.depths[np.concatenate([one.variant for one in served])[order]])]
    reads = np.concatenate([one.columns["prefill"] for one in served])[order]
    return Points.joined(served, order[in_order(reads.astype(int))]), unstable


@dataclass(frozen=True)
class _Pools(Entries):
    """``x`` prefill workers of variants ``prefill`` and ``y`` decode workers of variants ``rows``, of each entry."""

    prefill: Rows
    costs: PrefillCosts
    rows: Rows
    x: Array
    y: Array
    hand_over_s: Array

    def of(self, shop: VariantPrices) -> Disaggregated:
        """What serves."""
        readers = shop.readers or shop
        return Disaggregated(
            traffic=shop.scenario.load,
            engine=shop.scenario.engine,
            decode_ranks=self.y * shop.layouts["dp"][self.rows],
            prefill_ranks=self.x * readers.layouts["readers"][self.prefill],
            depth=shop.depths[self.rows],
            hand_over_s=self.hand_over_s,
            decoding=DecodeCurve(shop.grid, shop.curves, self.rows),
            prompts=self.costs,
        )

    def serve(self, shop: VariantPrices, batch: Array) -> Points:
        """What they serve at their batches; infinitely many users where prompts come faster than they are read."""
        pools = self.of(shop)
        times = pools.times(batch, *pools.closed_loop(batch))
        extra = {
            "prefill": self.prefill, "prefill_workers": self.x, "decode_workers": self.y,
            "largest_batch": np.minimum(shop.room_decode[self.rows], LARGEST_BATCH), "hand_over_s": self.hand_over_s,
        }  # fmt: skip
        return Points(self.rows, times | extra)

    def sooner(self, shop: VariantPrices, points: Points, ttft_s: float) -> Points:
        """Of ``points`` that are late with a first token: the largest smaller batch in time, if there is any."""
        late = np.flatnonzero(points.columns["ttft_s"] > ttft_s)
        some = self.where(late)
        pools, grid = some.of(shop), np.concatenate([[1.0], shop.grid])  # positions count from 1
        last = np.searchsorted(shop.grid, points.columns["batch"][late]).astype(float)
        last = largest_where(
            lambda n: pools.ttft_s(grid[n.astype(int)], *pools.closed_loop(grid[n.astype(int)])) <= ttft_s, last
        )
        some, last = some.where(last >= 1), last[last >= 1]
        return some.serve(shop, grid[last.astype(int)])


def _prefill_choices(shop: VariantPrices, gpus: int, ttft_s: float | None) -> list[int]:
    """Of each KV dtype: the variant with most prompts per GPU, the same among those in time, the fastest for one."""
    every = shop.own_prompts
    size = shop.layouts["world_size"]
    fits = (shop.room_prefill >= 1) & (size < gpus)
    per_gpu = every.most_per_s * shop.layouts["readers"] / size
    alone = (every.fixed_s + every.prompt_s) / np.minimum(every.per_step, 1.0)
    chosen = set()
    for kv in {*shop.kv_dtypes}:
        mine = fits & (shop.kv_dtypes == kv)
        in_time = mine & (alone <= (ttft_s or np.inf) * 0.7)  # room for the queue
        for candidates, value in ((mine, per_gpu), (in_time, per_gpu), (mine, -alone)):
            if candidates.any():
                chosen.add(int(np.where(candidates, value, -np.inf).argmax()))
    return sorted(chosen)


def _matched(rate: Array, capacity: float, prefill_size: int, decode_size: Array, room: Room) -> tuple[Array, Array]:
    """Workers (prefill, decode) that keep up with each other at fewest GPUs per request, within ``room``; 0: none."""
    best = np.full(len(rate), np.inf)
    x, y = np.zeros(len(rate)), np.zeros(len(rate))
    for workers in _pool_sizes(int(room[0][0] // decode_size.min()) if len(rate) else 0):
        needed = np.ceil(workers * rate / capacity)
        taken = needed * prefill_size + workers * decode_size
        fits = np.all([needed * prefill_size * p + workers * decode_size * d <= most for most, p, d in room], axis=0)
        cost = np.where(fits, taken / (workers * rate), np.inf)
        better = cost < best * (1 - 1e-9)
        best = np.where(better, cost, best)
        x, y = np.where(better, needed, x), np.where(better, workers, y)
    return x, y


def _pool_sizes(most: int) -> list[int]:
    """Numbers of decode workers to try: all up to 16, then in steps of an eighth."""
    sizes, size = [], 1
    while size <= most:
        sizes.append(size)
        size += max(1, size // 8) if size >= 16 else 1
    return sizes
