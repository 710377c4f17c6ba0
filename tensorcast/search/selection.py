"""Which candidates are worth a row, which no other beats, and which cannot be told apart."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist

import numpy as np

from tensorcast.cost.evidence import NORMAL_80, NORMAL_90
from tensorcast.search.candidate_arrays import Points, each_once, in_order
from tensorcast.search.search_task import SearchTask
from tensorcast.search.variant_prices import VariantPrices
from tensorcast.serving.interval import served_interval
from tensorcast.serving.objective import OBJECTIVES
from tensorcast.serving.traffic import Array, Number, Rows

LIMITS = ("ttft", "tpot", "gpus", "users", "requests", "budget")
"""What a candidate may miss: times, what there is and may be spent, and the least that must be served."""


def rated(
    task: SearchTask, prices: VariantPrices, mode: str, points: Points, *, intervals: bool = False
) -> dict[str, Array]:
    """The points' columns and what a task makes of them: the cluster that they take and what objectives look at.

    ``world_size``: GPUs of one replica, or of its two pools; ``output_tokens_per_s`` and ``concurrency`` are of all
    replicas; ``ttft_share`` and its like: how many times its limit each of :data:`LIMITS` is, where there is one;
    ``factor_*``: of the 80 % ``intervals`` (:func:`tensorcast.serving.interval.served_interval`), where they are asked
    for or decide; ``lower_bound``: what the objective looks at, as far as it is reached with the chance that the task
    asks for.
    """
    c, tokens = points.columns, points.columns["output_tokens_per_s"]
    pools, factors = mode == "disaggregated", dict[str, Number]()
    if intervals or task.confidence is not None:
        share = c["ttft_s"] / c["request_s"]
        factors = served_interval(
            c["ttft_error"], c["tpot_error"], share, engine=task.engine, pools=pools, new=task.unserved
        )
    # errors are even in logs: what is kept with a chance lies so many times the interval's end away
    sigmas = NormalDist().inv_cdf(task.confidence or 0.5) / NORMAL_90
    late = {name: factors.get(f"{name}_s", 1.0) ** sigmas for name in ("ttft", "tpot")}
    sure = np.asarray(factors.get("output_tokens_per_s", 1.0) ** -sigmas)
    size = prices.layouts["world_size"][points.variant]
    price: Number = np.nan if task.price is None else task.price
    if pools:
        prefill = (prices.readers or prices).layouts["world_size"][c["prefill"].astype(int)]
        read, written = prefill * c["prefill_workers"], size * c["decode_workers"]
        size = read + written
        if task.pools:  # of a GPU in the mean
            second = task.pools[-1].price
            price = (read * price + written * (np.nan if second is None else second)) / size
    replicas = np.maximum(task.paid_gpus // size, 1.0)
    if task.pools:  # of each device, and of the budget where GPUs of two prices share it, there may be less
        shares = np.array([(read * p + written * d) / most for most, p, d in task.pools_room()])
        replicas = np.maximum(np.floor((1 + 1e-12) / shares.max(axis=0)), 1.0)
    if task.objective == "gpus":
        rate = np.ceil((task.request_rate or 0.0) / (tokens * sure / task.load.output_len))
        replicas = np.maximum(np.maximum(rate, np.ceil((task.users or 0) / c["concurrency"])), 1.0)
    gpus, per_gpu = replicas * size, tokens / size
    asked = {
        "ttft": (c["ttft_s"] * late["ttft"], task.ttft_s), "tpot": (c["tpot_s"] * late["tpot"], task.tpot_s),
        "gpus": (gpus, task.gpus), "budget": (gpus * price, task.budget),
    }
    served = {"users": (c["concurrency"] * replicas, task.users),
              "requests": (tokens * sure * replicas / task.load.output_len, task.request_rate)}
    found = {
        **c,
        **{f"{name}_share": value / limit for name, (value, limit) in asked.items() if limit is not None},
        **{f"{name}_share": least / value for name, (value, least) in served.items() if least is not None},
        **{f"factor_{name}": np.asarray(value) for name, value in factors.items()},
        "output_tokens_per_s": tokens * replicas,
        "concurrency": c["concurrency"] * replicas,
        "replicas": replicas,
        "world_size": size,
        "gpus": gpus,
        "tokens_per_s_per_gpu": per_gpu,
        "cost_per_million_tokens": price / 3600.0 / per_gpu * 1e6,
        "usd_per_hour": gpus * price,
    }
    if task.pools:
        found["gpus_share"] = replicas * shares[: len(shares) - (task.budget is not None)].max(axis=0)
    objective = OBJECTIVES[task.objective]
    found["lower_bound"] = found[objective.column]
    if objective.column not in ("gpus", "concurrency"):
        found["lower_bound"] = found["lower_bound"] * sure ** (-1.0 if objective.less else 1.0)
    return found


def worth_a_row(task: SearchTask, prices: VariantPrices, mode: str, points: Points) -> Rows:
    """Positions worth a row: per layout and batch the best options, and the whole Pareto front."""
    c = rated(task, prices, mode, points)
    worst = np.max([c[f"{name}_share"] for name in LIMITS if f"{name}_share" in c], axis=0)
    _, batches = np.unique(np.log2(prices.grid).round(3), return_inverse=True)
    batch = batches[np.searchsorted(prices.grid, c["batch"])]
    group = prices.layout_of[points.variant] * (batches[-1] + 1) + batch
    order = in_order(group)
    begins = np.flatnonzero(np.diff(group[order], prepend=-1))
    sizes = np.diff(begins, append=len(order))
    score, off = OBJECTIVES[task.objective].score(c)[order], worst[order]
    met = np.repeat(np.minimum.reduceat(off, begins) <= 1, sizes)  # by some of the same layout and batch
    found = [np.flatnonzero(pareto(1.0 / c["tpot_s"], c["tokens_per_s_per_gpu"]))]
    for value in (np.where(met & (off > 1), np.inf, -score), off):  # best within the limits, and closest to them
        least = np.flatnonzero(value == np.repeat(np.minimum.reduceat(value, begins), sizes))
        found.append(order[least[np.searchsorted(least, begins)]])
    return each_once(*found)


REPEAT = 0.03
"""Repeating a measurement moves it by 3-5 % (aiconfigurator-core 0.12.0's tables hold repeats): nothing closer than
this is a difference."""


def pareto(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Mask of the points that no other beats in one of two quantities without losing in the other; more is better."""
    # nearly all are beaten by one with more of the first, in whatever order those with as much: few are left to sort
    rough = np.argsort(-first)
    some = rough[second[rough] >= np.maximum.accumulate(second[rough])]
    some.sort()
    order = some[np.lexsort((-second[some], -first[some]))]
    best = np.maximum.accumulate(np.concatenate([[-np.inf], second[order][:-1]]))
    mask = np.zeros(len(first), dtype=bool)
    mask[order] = second[order] > best
    return mask


def alike(
    one: Mapping[str, tuple[float, float]], other: Mapping[str, tuple[float, float]],
    apart: tuple[float, float] = (0.0, 0.0),
) -> bool:
    """Whether the difference of two sums lies within its own error, four times in five.

    ``one`` and ``other``: seconds and relative median error by kernel family. A family's error is that of its fitted
    constants, so it moves both sums the same way: what counts is how much *more* of that family one of them has. That
    is why two layouts can be told apart though their own intervals overlap widely. Families err independently. What
    is left where both spend alike is how well anything can be measured (:data:`REPEAT`, of the larger sum). ``apart``:
    what each sum errs by as a whole, by itself, as the end of an 80 % interval: of layouts that are served otherwise.
    """
    total = 0.0
    for family in {*one, *other}:
        a, b = one.get(family, (0.0, 0.0)), other.get(family, (0.0, 0.0))
        total += (a[0] * a[1] - b[0] * b[1]) ** 2
    first, second = (sum(seconds for seconds, _ in sums.values()) for sums in (one, other))
    own = (first * apart[0]) ** 2 + (second * apart[1]) ** 2
    off = np.sqrt(NORMAL_80**2 * total + (REPEAT * max(first, second)) ** 2 + own)
    return bool(abs(first - second) <= off)
