"""What a decider asks of a comparison, in a sentence each: which limit binds, and which forms are worth it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tensorcast.report import units
from tensorcast.report.compare.choices import LIMITS, Choice, View, step_parts
from tensorcast.report.compare.words import AMOUNTS

if TYPE_CHECKING:
    import pandas as pd

LEAST = 0.005
"""A difference that is worth a word."""


def sentences(view: View) -> list[str]:
    """Those that a comparison with a best candidate answers."""
    found = [*_binding(view), _worth(view, "Serving from two pools, one for prompts and one for replies,", _pools),
             _worth(view, "Spreading whole experts over GPUs (EP)", _spread)]
    return [text for text in found if text]


def _binding(view: View) -> list[str]:
    """What each limit costs: the best of the candidates that keep all others."""
    found = []
    for column, limit in view.limits.items():
        if limit is None:
            continue
        name, best = LIMITS[column], _best(view, _allowed(view, without=column))
        gain = _gain(view, best, view.best)
        if gain < LEAST:
            found.append(f"The limit on {name} does not bind: without it the best would be no better.")
            continue
        assert best is not None
        found.append(
            f"The limit on {name} binds: without it {view.name(best)} would give "
            f"{view.write(best[view.objective.column])} {view.objective.words}, {units.percent(gain)} better, at "
            f"{units.seconds(best[column])} instead of {units.seconds(limit)}."
        )
    return found


def _pools(frame: pd.DataFrame) -> pd.Series[bool]:
    return frame["mode"] == "disaggregated"


def _spread(frame: pd.DataFrame) -> pd.Series[bool]:
    return (frame["ep"] > 1) | frame["prefill_layout"].astype(str).str.contains("-ep")


def _worth(view: View, what: str, has: Callable[[pd.DataFrame], pd.Series[bool]]) -> str:
    """Whether the best that has something beats the best that has not; empty where one of them is not there."""
    frame = view.frame[_allowed(view)]
    best, without = _best_of(view, frame[has(frame)]), _best_of(view, frame[~has(frame)])
    if best is None or without is None:
        return ""
    gain, loss = _gain(view, best, without), _gain(view, without, best)
    column = view.objective.column
    numbers = (
        f"{view.write(best[column])} {view.objective.words} with {view.name(best)} against "
        f"{view.write(without[column])} with {view.name(without)}"
    )
    if max(gain, loss) < LEAST:
        return f"{what} changes nothing: {numbers}."
    said = "is worth it here" if gain > loss else "is not worth it here"
    pair = (best, without) if gain > loss else (without, best)
    better = "better" if gain > loss else "worse"
    return f"{what} {said}: {numbers} ({units.percent(max(gain, loss))} {better}){_because(view, *pair)}."


PER_TIME = ("tokens_per_s_per_gpu", "cost_per_million_tokens", "output_tokens_per_s")
"""Objectives that GPU time per token decides."""


def _because(view: View, better: dict[str, Any], worse: dict[str, Any]) -> str:
    """What saves the better one most GPU time per token; empty where the objective is another than that."""
    if view.objective.column not in PER_TIME or better["device"] != worse["device"]:
        return ""
    good, bad = _gpu_time(view, better), _gpu_time(view, worse)
    part = max(good, key=lambda name: bad[name] - good[name])
    if bad[part] - good[part] <= 0:
        return ""
    return (
        f", mostly because a reply's token takes {units.seconds(good[part])} of GPU time for {part} instead of "
        f"{units.seconds(bad[part])}"
    )


def _gpu_time(view: View, row: dict[str, Any]) -> dict[str, float]:
    """GPU seconds per token of a reply: of its decode step by part, and all else: its prompt's share, idle ranks and
    pools. They add up to one over tokens per second and GPU."""
    choice = Choice(row, view.name(row), *view.comparison.deployments(row["candidate"]))
    load = view.comparison.behind[row["candidate"]][0].load
    steps = float(load.decode_steps(row["mtp_depth"])) / max(1, view.comparison.output_len - 1)
    each = row["tp"] * row["pp"] / row["batch"] * steps
    split = step_parts(choice.decode, view.decode_price(choice, row["batch"]))
    found = {part: seconds * each for part, seconds in split.parts.items()}
    return found | {"prompts and waiting": 1.0 / row["tokens_per_s_per_gpu"] - sum(found.values())}


def _allowed(view: View, without: str = "") -> pd.Series[bool]:
    """Candidates that keep every limit but ``without``."""
    tasks = view.comparison.tasks
    sure = tasks[0].confidence if tasks else None
    kept = ~view.frame["limit"].isin(["gpus", *AMOUNTS])
    for column, limit in view.limits.items():
        if limit is not None and column != without:
            kept &= view.frame[column] <= limit if sure is None else view.frame[f"{column[:-2]}_chance"] >= sure
    return kept


def _best(view: View, mask: pd.Series[bool]) -> dict[str, Any] | None:
    return _best_of(view, view.frame[mask])


def _best_of(view: View, frame: pd.DataFrame) -> dict[str, Any] | None:
    if not len(frame):
        return None
    ranked = view.objective.ranked(frame.assign(meets=True))
    return {str(key): value for key, value in ranked.iloc[0].to_dict().items()}


def _gain(view: View, one: dict[str, Any] | None, other: dict[str, Any] | None) -> float:
    """By how much ``one`` is better, as a share of ``other``."""
    if one is None or other is None:
        return 0.0
    column = view.objective.column
    a, b = float(one[column]), float(other[column])
    return b / a - 1 if view.objective.less else a / b - 1
