"""The two forms of serving, over all variants that a workshop has priced: one engine for both phases, or two pools."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tensorcast.deploy.evaluate import Workshop
from tensorcast.deploy.points import Array, CurvesAt, Points, PromptsAt, batches, largest_where, points_of
from tensorcast.deploy.serving import Aggregated, Disaggregated, Served, hand_over_s, steady_batch
from tensorcast.deploy.space import LARGEST_BATCH

PREFILL_BUSY = 0.9
"""Share of its time that a prefill pool is planned to be busy at most: the queue before it grows as 1 / (1 - busy)."""

Limits = tuple[float | None, float | None]
"""Longest TTFT and TPOT."""


def aggregated(shop: Workshop, limits: Limits = (None, None)) -> tuple[Points, int]:
    """Every variant at every chunk budget and batch that fits, and how many of those prompts would overrun.

    Beside powers of two and the largest that fits: the largest batch that keeps within the limits.
    """
    parts, unstable = [], 0
    for budget in shop.chunks:
        for depth in np.unique(shop.depths):
            mine = np.flatnonzero(shop.depths == depth)
            most = np.minimum(shop.prompts[budget].fits[mine], LARGEST_BATCH)
            kept = largest_where(_keeps(_engine(shop, budget, int(depth), mine), limits), most)
            rows, at = batches(most, kept)
            some = mine[rows]
            users, served = _at(_engine(shop, budget, int(depth), some), at)
            stable = np.isfinite(users)
            unstable += int((~stable).sum())
            extra = {"chunk_tokens": np.full(len(some), float(budget)), "largest_batch": most[rows]}
            parts.append(points_of(some, served, extra).where(stable))
    return Points.joined(parts), unstable


def _engine(shop: Workshop, budget: int, depth: int, rows: Array) -> Aggregated:
    return Aggregated(
        shop.scene.load, shop.scene.engine, shop.layouts["dp"][rows], depth,
        CurvesAt(shop.grid, shop.curves, rows), PromptsAt(shop.prompts[budget], rows),  # type: ignore[arg-type]
    )  # fmt: skip


def _at(engine: Aggregated, batch: Array) -> tuple[Array, Served]:
    """Users in flight and what they meet; infinitely many where prompts come faster than they are read."""
    with np.errstate(invalid="ignore", over="ignore"):
        users = engine.in_flight(batch)
        return users, engine.served(batch, users)


def _keeps(engine: Aggregated, limits: Limits) -> Callable[[Array], Array] | None:
    """Whether a batch keeps within the limits; None where there are none."""
    if limits == (None, None):
        return None

    def keeps(batch: Array) -> Array:
        users, served = _at(engine, batch)
        within = (served.ttft_s <= (limits[0] or np.inf)) & (served.tpot_s <= (limits[1] or np.inf))
        return np.isfinite(users) & within

    return keeps


def steady(shop: Workshop, points: Points) -> Array:
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


def disaggregated(shop: Workshop, gpus: int, limits: Limits = (None, None)) -> tuple[Points, int]:
    """Every decode variant with prefill workers that keep up with it, on at most ``gpus`` GPUs; and how many had none.

    At each batch (powers of two, the largest that fits, the largest within the limit on TPOT) the pools that match at
    fewest GPUs per request; and for each number of decode workers the largest batch with which prefill workers on all
    other GPUs keep up.
    """
    parts, unstable = [], 0
    every = CurvesAt(shop.grid, shop.curves, np.arange(len(shop.variants)))
    steps = shop.steps(shop.depths)
    per_token = steps / max(shop.scene.load.output_len - 1, 1)
    room = np.minimum(shop.room_decode, LARGEST_BATCH)
    within = None if limits[1] is None else lambda b: per_token * every.at("seconds", b) <= limits[1]
    kept = largest_where(within, room)
    rows, batch = batches(room, kept)
    # prompts per second that one decode worker asks for
    asks = CurvesAt(shop.grid, shop.curves, rows).at("seconds", batch)
    rate = batch * shop.layouts["dp"][rows] / (steps[rows] * asks)
    size = shop.layouts["world_size"]
    for prefill in _prefill_choices(shop, gpus, limits[0]):
        variant = shop.variants[prefill]
        wide, line = variant.layout.world_size, PromptsAt(shop.lines, np.array(prefill))
        capacity = PREFILL_BUSY * variant.layout.dp * float(line.most_per_s)
        same = np.array([v.decode.kv_dtype == variant.decode.kv_dtype for v in shop.variants])
        x, y = _matched(rate, capacity, wide, size[rows], gpus)
        found = [(rows, batch, x, y)]
        unstable += int((x == 0)[same[rows]].sum())
        most = np.where(kept > 0, kept, room) if within else room
        for workers in _pool_sizes(int((gpus - wide) // size.min())):
            others = np.floor((gpus - workers * size) / wide)
            keep_up = others * capacity / workers
            mine = np.flatnonzero(same & (others >= 1))
            full = largest_where(_slower(shop, mine, steps, keep_up), most[mine])
            mine, full = mine[full >= 1], full[full >= 1]
            found.append((mine, full, others[mine], np.full(len(mine), float(workers))))
        some, at, x, y = (np.concatenate(column) for column in zip(*found, strict=True))
        chosen = same[some] & (x > 0)
        parts += [
            _pools(shop, prefill, line, depth, some[there], at[there], x[there], y[there])
            for depth in np.unique(shop.depths)
            if (there := chosen & (shop.depths[some] == depth)).any()
        ]
    return Points.joined(parts), unstable


def _slower(shop: Workshop, rows: Array, steps: Array, limit: Array) -> Callable[[Array], Array]:
    """Whether decode workers of ``rows`` at a batch ask for no more prompts per second than their ``limit``."""
    curves, ranks = CurvesAt(shop.grid, shop.curves, rows), shop.layouts["dp"][rows]
    return lambda batch: batch * ranks / (steps[rows] * curves.at("seconds", batch)) <= limit[rows]


def _pools(
    shop: Workshop, prefill: int, line: PromptsAt, depth: int, rows: Array, batch: Array, x: Array, y: Array
) -> Points:
    """``x`` prefill workers of one variant and ``y`` decode workers of each of ``rows``, at their batches."""
    layout = shop.variants[prefill].layout
    gpus = (layout.world_size + shop.layouts["world_size"][rows]) * (x + y) / 2
    pool = Disaggregated(
        shop.scene.load, shop.scene.engine, y * shop.layouts["dp"][rows], x * layout.dp, int(depth),
        hand_over_s(shop.deployment(prefill, "prefill"), gpus, shop.scene.load.input_len),
        CurvesAt(shop.grid, shop.curves, rows), line,  # type: ignore[arg-type]
    )  # fmt: skip
    with np.errstate(invalid="ignore", over="ignore"):  # where prompts come faster than they are read
        users = pool.users(batch)
        served = pool.served(batch, users)
    extra = {
        "prefill": np.full(len(rows), prefill), "prefill_workers": x, "decode_workers": y,
        "largest_batch": np.minimum(shop.room_decode[rows], LARGEST_BATCH),
    }  # fmt: skip
    return points_of(rows, served, extra).where(np.isfinite(users))


def _prefill_choices(shop: Workshop, gpus: int, ttft_s: float | None) -> list[int]:
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
