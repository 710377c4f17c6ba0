"""What a decider asks of a comparison, in a sentence each: which limit binds, and which forms are worth it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tensorcast.cost.work import Mask
from tensorcast.report import units
from tensorcast.report.compare.choices import LIMITS, Choice, View, step_parts
from tensorcast.report.compare.words import AMOUNTS

if TYPE_CHECKING:
    from tensorcast.search.candidate_table import Candidates

LEAST = 0.005
"""A difference that is worth a word."""


def sentences(view: View) -> list[str]:
    """What each limit costs, and whether pools and expert parallelism are worth it; of a comparison with a best."""
    kept, found, less = view.kept, [], view.objective.less
    sure = view.comparison.tasks[0].confidence if view.comparison.tasks else None
    keeps: dict[str, Mask] = {"": ~np.isin(kept["limit"].astype(str), ["gpus", *AMOUNTS])}
    for column, limit in view.limits.items():
        if limit is not None:
            keeps[column] = kept[column] <= limit if sure is None else kept[f"{column[:-2]}_chance"] >= sure
    for column in [name for name in keeps if name]:
        name, limit = LIMITS[column], view.limits[column] or 0.0
        best = _best(view, kept.where(np.all([mask for one, mask in keeps.items() if one != column], axis=0)))
        ratio = 1.0 if best is None else best[view.objective.column] / view.best[view.objective.column]  # type: ignore[index]
        gain = 1 / ratio - 1 if less else ratio - 1
        if best is None or gain < LEAST:
            found.append(f"The limit on {name} does not bind: without it the best would be no better.")
            continue
        found.append(
            f"The limit on {name} binds: without it {view.name(best)} would give "
            f"{view.write(best[view.objective.column])} {view.objective.words}, {units.percent(gain)} better, at "
            f"{units.seconds(best[column])} instead of {units.seconds(limit)}."
        )
    inside = np.all(list(keeps.values()), axis=0)
    prompts_spread = np.array(["-ep" in str(layout) for layout in kept["prefill_layout"]], dtype=bool)
    forms = {
        "Serving from two pools, one for prompts and one for replies,": kept["mode"] == "disaggregated",
        "Spreading whole experts over GPUs (EP)": (kept["ep"] > 1) | prompts_spread,
    }
    for what, has in forms.items():
        with_it, without = _best(view, kept.where(inside & has)), _best(view, kept.where(inside & ~has))
        if with_it is not None and without is not None:
            found.append(_worth(view, what, with_it, without))
    return found


def _best(view: View, some: Candidates) -> dict[str, Any] | None:
    """The best of ``some`` candidates, whatever limits they break."""
    if not len(some):
        return None
    first = view.objective.order(some.columns | {"meets": np.ones(len(some), dtype=bool)})[:1]
    return some.where(first).records()[0]


def _worth(view: View, what: str, best: dict[str, Any], without: dict[str, Any]) -> str:
    """Whether the best that has something beats the best that has not."""
    column = view.objective.column
    numbers = (
        f"{view.write(best[column])} {view.objective.words} with {view.name(best)} against "
        f"{view.write(without[column])} with {view.name(without)}"
    )
    ratio = (without[column] / best[column]) ** (1 if view.objective.less else -1)  # over 1: it is better with it
    gain = ratio - 1
    if abs(gain) < LEAST:
        return f"{what} changes nothing: {numbers}."
    pair = (best, without) if gain > 0 else (without, best)
    share = units.percent(gain if gain > 0 else 1 / ratio - 1)
    # one pool and two err by themselves; else errors are shared, and small differences can be told
    ends = [row["output_tokens_high_per_s"] / row["output_tokens_per_s"] - 1 for row in pair]
    if best["mode"] != without["mode"] and abs(gain) < float(np.hypot(*ends)):
        return f"{what} is too near to call: {numbers}, closer than predictions of one pool and of two err."
    said = "is worth it here" if gain > 0 else "is not worth it here"
    return f"{what} {said}: {numbers} ({share} {'better' if gain > 0 else 'worse'}){_because(view, *pair)}."


PER_TIME = ("tokens_per_s_per_gpu", "cost_per_million_tokens", "output_tokens_per_s")
"""Objectives that GPU time per token decides."""


def _because(view: View, better: dict[str, Any], worse: dict[str, Any]) -> str:
    """What saves the better one most GPU time per token; empty where the objective is another than that.

    GPU seconds per token of a reply: of its decode step by part, and all else, its prompt's share, idle ranks and
    pools. They add up to one over tokens per second and GPU.
    """
    if view.objective.column not in PER_TIME or better["device"] != worse["device"]:
        return ""
    times = []
    for row in (better, worse):
        choice = Choice(row, view.name(row), *view.comparison.deployments(row["candidate"]))
        load = view.comparison.behind[row["candidate"]][0].load
        steps = float(load.decode_steps(row["mtp_depth"])) / max(1, view.comparison.output_len - 1)
        each = row["tp"] * row["pp"] / row["batch"] * steps
        split = step_parts(choice.decode, view.decode_price(choice, row["batch"]))
        parts = {part: seconds * each for part, seconds in split.parts.items()}
        times.append(parts | {"prompts and waiting": 1.0 / row["tokens_per_s_per_gpu"] - sum(parts.values())})
    good, bad = times
    part = max(good, key=lambda name: bad[name] - good[name])
    if bad[part] - good[part] <= 0:
        return ""
    return (
        f", mostly because with {view.name(worse)} a reply's token takes {units.seconds(bad[part])} of GPU time for "
        f"{part}, with {view.name(better)} {units.seconds(good[part])}"
    )
