"""Which candidates are worth a row."""

from __future__ import annotations

from typing import Any

import numpy as np

from tensorcast.search.candidate_arrays import Points
from tensorcast.search.pareto import pareto
from tensorcast.search.search_task import SearchTask
from tensorcast.search.variant_prices import VariantPrices


def cluster_sizes(task: SearchTask, prices: VariantPrices, mode: str, points: Points) -> tuple[Any, Any, Any]:
    """(replicas, GPUs of one replica or pool, GPUs) of every point."""
    size = prices.layouts["world_size"][points.variant]
    if mode == "disaggregated":
        prefill = prices.layouts["world_size"][points.columns["prefill"].astype(int)]
        size = prefill * points.columns["prefill_workers"] + size * points.columns["decode_workers"]
    replicas = np.maximum(task.gpus // size, 1.0)
    if task.objective == "gpus" and task.request_rate:
        rate = points.columns["output_tokens_per_s"] / task.load.output_len
        replicas = np.ceil(task.request_rate / rate)
    return replicas, size, replicas * size


def limit_ratios(task: SearchTask, ttft_s: Any, tpot_s: Any, gpus: Any) -> dict[str, Any]:
    """How many times its limit each number is, by the limit's name."""
    asked = {"ttft": (ttft_s, task.ttft_s), "tpot": (tpot_s, task.tpot_s), "gpus": (gpus, task.gpus)}
    return {name: value / limit for name, (value, limit) in asked.items() if limit is not None}


def score_of(task: SearchTask, prices: VariantPrices, mode: str, points: Points) -> Any:
    """What the objective makes of every point: more is better."""
    _, size, gpus = cluster_sizes(task, prices, mode, points)
    per_gpu = points.columns["output_tokens_per_s"] / size
    if task.objective == "latency":
        return -points.columns["request_s"]
    return -gpus + 1e-9 * per_gpu if task.objective == "gpus" else per_gpu


def score_in_time(task: SearchTask, prices: VariantPrices, mode: str, points: Points) -> Any:
    """The score; -inf where users wait too long."""
    c = points.columns
    late = (c["ttft_s"] > (task.ttft_s or np.inf)) | (c["tpot_s"] > (task.tpot_s or np.inf))
    return np.where(late, -np.inf, score_of(task, prices, mode, points))


def worth_a_row(task: SearchTask, prices: VariantPrices, mode: str, points: Points) -> Any:
    """Positions worth a row: per layout and batch the best options, and the whole Pareto front."""
    c = points.columns
    _, size, gpus = cluster_sizes(task, prices, mode, points)
    worst = np.max(list(limit_ratios(task, c["ttft_s"], c["tpot_s"], gpus).values()), axis=0)
    layout_of = {layout: i for i, layout in enumerate(dict.fromkeys(v.layout for v in prices.variants))}
    of_variant = np.array([layout_of[v.layout] for v in prices.variants])
    keys = [of_variant[points.variant], np.log2(c["batch"]).round(3)]
    score = score_of(task, prices, mode, points)
    order = np.lexsort((-score, worst > 1, *keys))
    found = [order[_firsts([key[order] for key in keys])]]
    order = np.lexsort((worst, *keys))  # the closest to the limits
    found.append(order[_firsts([key[order] for key in keys])])
    found.append(np.flatnonzero(pareto(1.0 / c["tpot_s"], c["output_tokens_per_s"] / size)))
    return np.unique(np.concatenate(found))


def _firsts(keys: list[Any]) -> Any:
    """Mask of sorted entries that differ from the one before."""
    changed = np.ones(len(keys[0]), dtype=bool)
    changed[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return changed
