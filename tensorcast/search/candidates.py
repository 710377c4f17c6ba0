"""The two modes of serving, over all variants that have been priced: one engine for both phases, or two pools."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tensorcast.search.axes import LARGEST_BATCH
from tensorcast.search.candidate_arrays import Points, batches, largest_where, last_of, points_of
from tensorcast.search.variant_prices import VariantPrices
from tensorcast.serving.curves import Array, CurvesAt, PromptsAt
from tensorcast.serving.hand_over import hand_over_s
from tensorcast.serving.load import Served
from tensorcast.serving.steady_state import Aggregated, Disaggregated, steady_batch

PREFILL_BUSY = 0.9
"""Share of its time that a prefill pool is planned to be busy at most: the queue before it grows as 1 / (1 - busy)."""

Limits = tuple[float | None, float | None]
"""Longest TTFT and TPOT."""


def aggregated(shop: VariantPrices, limits: Limits = (None, None)) -> tuple[Points, int]:
    """Every variant at every chunk budget and batch that fits, and how many of those prompts would overrun.

    Batches are powers of two, and of those that were priced the largest that fits and the largest at which prompts keep
    up and users wait no longer than the limits say.
    """
    parts, unstable = [], 0
    for budget in shop.chunks:
        for depth in np.unique(shop.depths):
            mine = np.flatnonzero(shop.depths == depth)
            most = np.minimum(shop.prompts[budget].fits[mine], LARGEST_BATCH)
            fits = shop.grid <= most[:, None]
            every = _engine(shop, budget, int(depth), mine[:, None])
            rows, at = batches(last_of(shop.grid, fits), last_of(shop.grid, fits & _keeps(every, shop.grid, limits)))
            some = mine[rows]
            users, served = _at(_engine(shop, budget, int(depth), some), at)
            stable = np.isfinite(users)
            unstable += int((~stable).sum())
            extra = {"chunk_tokens": np.full(len(some), float(budget)), "largest_batch": most[rows]}
            parts.append(points_of(some, served, extra).where(stable))
    return Points.joined(parts), unstable


def _engine(shop: VariantPrices, budget: int, depth: int, rows: Array) -> Aggregated:
    return Aggregated(
        shop.scenario.load, shop.scenario.engine, shop.layouts["dp"][rows], depth,
        CurvesAt(shop.grid, shop.curves, rows), PromptsAt(shop.prompts[budget], rows),  # type: ignore[arg-type]
    )  # fmt: skip


def _at(engine: Aggregated, batch: Array) -> tuple[Array, Served]:
    """Users in flight and what they meet; infinitely many where prompts come faster than they are read."""
    with np.errstate(invalid="ignore", over="ignore"):
        users = engine.in_flight(batch)
        return users, engine.served(batch, users)


def _keeps(engine: Aggregated, grid: Array, limits: Limits) -> Array:
    """Whether each row keeps up with prompts, and within the limits, at each batch: times fall as well as they rise."""
    with np.errstate(invalid="ignore", over="ignore"):
        step, first, generation = engine.times(grid[None, :])
    per_token = generation / max(engine.load.output_len - 1, 1)
    kept: Array = ~step.full & (first <= (limits[0] or np.inf)) & (per_token <= (limits[1] or np.inf))
    return kept


def steady(shop: VariantPrices, points: Points) -> Array:
    """Mask of aggregated ``points`` whose users bring about their batch.

    Close to where prompts take all of a step the wait for them explodes, and as many users may be served at another,
    larger batch: nobody would find such a point in operation.
    """
    found = np.zeros(len(points), dtype=bool)
    depth = shop.depths[points.variant]
    for budget in shop.chunks:
        for drafted in np.unique(depth):
            mine = np.flatnonzero((points.columns["chunk_tokens"] == budget) & (depth == drafted))
            if not len(mine):
                continue
            rows, users = points.variant[mine], points.columns["concurrency"][mine]
            engine = _engine(shop, budget, int(drafted), rows)
            limit = np.minimum(users / shop.layouts["dp"][rows], points.columns["largest_batch"][mine])
            batch = steady_batch(engine.in_flight, limit, users)
            found[mine] = np.isclose(batch, points.columns["batch"][mine], rtol=1e-6)
    return found


def disaggregated(shop: VariantPrices, gpus: int, limits: Limits = (None, None)) -> tuple[Points, int]:
    """Every decode variant with prefill workers that keep up with it, on at most ``gpus`` GPUs; and how many had none.

    At each batch (powers of two; of those priced the largest that fits, the largest within the limit on TPOT) the pools
    that match at fewest GPUs per request; for each number of decode workers, prefill workers on all other GPUs. Of all
    these pools the largest batch that prompts keep up with; and where that is late with a first token, the largest in
    time.
    """
    parts, unstable = [], 0
    grid, decode_s = shop.grid, shop.curves["seconds"]
    steps = shop.steps(shop.depths)
    per_token = (steps / max(shop.scenario.load.output_len - 1, 1))[:, None] * decode_s
    fits = grid <= np.minimum(shop.room_decode, LARGEST_BATCH)[:, None]
    within = fits & (per_token <= (limits[1] or np.inf))
    rows, batch = batches(last_of(grid, fits), last_of(grid, within))
    # prompts per second that one decode worker asks for
    rates = grid * shop.layouts["dp"][:, None] / (steps[:, None] * decode_s)
    rate = rates[rows, np.searchsorted(grid, batch)]
    usable = np.where(within.any(axis=1, keepdims=True), within, fits)
    # the least of any usable batch from here on: unlike the rates themselves it never falls
    least = np.minimum.accumulate(np.where(usable, rates, np.inf)[:, ::-1], axis=1)[:, ::-1]
    size = shop.layouts["world_size"]
    for prefill in _prefill_choices(shop, gpus, limits[0]):
        variant = shop.variants[prefill]
        wide, line = variant.layout.world_size, PromptsAt(shop.lines, np.array(prefill))
        capacity = PREFILL_BUSY * variant.layout.dp * float(line.most_per_s)
        same = np.array([v.decode.kv_dtype == variant.decode.kv_dtype for v in shop.variants])
        x, y = _matched(rate, capacity, wide, size[rows], gpus)
        found = [(rows, batch, x, y)]
        unstable += int((x == 0)[same[rows]].sum())
        # these pools' own largest batch, too
        one, some_x, some_y = np.unique(np.stack([rows, x, y])[:, x > 0], axis=1)
        one = one.astype(int)
        found.append((one, _keeping_up(grid, least[one], some_x * capacity / some_y), some_x, some_y))
        for workers in _pool_sizes(int((gpus - wide) // size.min())):
            others = np.floor((gpus - workers * size) / wide)
            mine = np.flatnonzero(same & (others >= 1))
            full = _keeping_up(grid, least[mine], others[mine] * capacity / workers)
            found.append((mine, full, others[mine], np.full(len(mine), float(workers))))
        some, at, x, y = (np.concatenate(column) for column in zip(*found, strict=True))
        chosen = same[some] & (x > 0) & (at >= 1)
        for depth in np.unique(shop.depths):
            if (there := chosen & (shop.depths[some] == depth)).any():
                pools = _Pools(shop, prefill, line, int(depth), some[there], x[there], y[there])
                parts.append(pools.points(at[there]))
                parts += pools.sooner(at[there], limits[0])
    return Points.joined(parts), unstable


def _keeping_up(grid: Array, least: Array, limit: Array) -> Array:
    """The largest batch of each row at which its decode workers ask for no more than ``limit``; 0: none."""
    rows = np.arange(len(least))
    # positions count from 1
    last = largest_where(lambda n: least[rows, n.astype(int) - 1] <= limit, np.full(len(least), float(len(grid))))
    return np.concatenate([[0.0], grid])[last.astype(int)]


@dataclass(frozen=True)
class _Pools:
    """``x`` prefill workers of one variant and ``y`` decode workers of each of ``rows``, all drafting ``depth``."""

    shop: VariantPrices
    prefill: int
    line: PromptsAt
    depth: int
    rows: Array
    x: Array
    y: Array

    def points(self, batch: Array) -> Points:
        """What they serve at their batches."""
        users, served = self._at(batch)
        extra = {
            "prefill": np.full(len(self.rows), self.prefill), "prefill_workers": self.x, "decode_workers": self.y,
            "largest_batch": np.minimum(self.shop.room_decode[self.rows], LARGEST_BATCH),
        }  # fmt: skip
        return points_of(self.rows, served, extra).where(np.isfinite(users))

    def sooner(self, batch: Array, ttft_s: float | None) -> list[Points]:
        """Smaller batches of those that are late with a first token: the largest in time."""
        if ttft_s is None:
            return []
        late = np.flatnonzero(self._at(batch)[1].ttft_s > ttft_s)
        some, grid = self._some(late), np.concatenate([[1.0], self.shop.grid])
        last = np.searchsorted(self.shop.grid, batch[late]).astype(float)
        last = largest_where(lambda n: some._at(grid[n.astype(int)])[1].ttft_s <= ttft_s, last)
        there = np.flatnonzero(last >= 1)
        return [some._some(there).points(grid[last[there].astype(int)])] if len(there) else []

    def _some(self, where: Array) -> _Pools:
        return replace(self, rows=self.rows[where], x=self.x[where], y=self.y[where])

    def _at(self, batch: Array) -> tuple[Array, Served]:
        """Users in flight and what they meet; infinitely many where prompts come faster than they are read."""
        shop, layout, scenario = self.shop, self.shop.variants[self.prefill].layout, self.shop.scenario
        gpus = (layout.world_size + shop.layouts["world_size"][self.rows]) * (self.x + self.y) / 2
        pool = Disaggregated(
            scenario.load, scenario.engine, self.y * shop.layouts["dp"][self.rows], self.x * layout.dp, self.depth,
            hand_over_s(shop.deployment(self.prefill, "prefill"), gpus, scenario.load.input_len),
            CurvesAt(shop.grid, shop.curves, self.rows), self.line,  # type: ignore[arg-type]
        )  # fmt: skip
        with np.errstate(invalid="ignore", over="ignore"):
            users = pool.users(batch)
            return users, pool.served(batch, users)


def _prefill_choices(shop: VariantPrices, gpus: int, ttft_s: float | None) -> list[int]:
    """Of each KV dtype: the variant with most prompts per GPU, the same among those in time, the fastest for one."""
    every = PromptsAt(shop.lines, np.arange(len(shop.variants)))
    size = shop.layouts["world_size"]
    fits = (shop.room_prefill >= 1) & (size < gpus)
    per_gpu = every.most_per_s * shop.layouts["dp"] / size
    alone = (every.fixed_s + every.prompt_s) / min(every.per_step, 1.0)
    chosen = set()
    for kv in {v.decode.kv_dtype for v in shop.variants}:
        mine = fits & np.array([v.decode.kv_dtype == kv for v in shop.variants])
        in_time = mine & (alone <= (ttft_s or np.inf) * 0.7)  # room for the queue
        for candidates, value in ((mine, per_gpu), (in_time, per_gpu), (mine, -alone)):
            if candidates.any():
                chosen.add(int(np.where(candidates, value, -np.inf).argmax()))
    return sorted(chosen)


def _matched(rate: Array, capacity: float, prefill_size: int, decode_size: Array, gpus: int) -> tuple[Array, Array]:
    """Workers (prefill, decode) that keep up with each other at fewest GPUs per request, at most ``gpus``; 0: none."""
    best = np.full(len(rate), np.inf)
    x, y = np.zeros(len(rate)), np.zeros(len(rate))
    for workers in _pool_sizes(int(gpus // decode_size.min()) if len(rate) else 0):
        needed = np.ceil(workers * rate / capacity)
        taken = needed * prefill_size + workers * decode_size
        cost = np.where(taken <= gpus, taken / (workers * rate), np.inf)
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
