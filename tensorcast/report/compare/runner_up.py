"""The runner-up in a sentence, and what would make it win: another limit, more memory, a faster part of its step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorcast.report import units
from tensorcast.report.compare.choices import LIMITS, PARTS, View, step_parts, worth
from tensorcast.report.units import plural

if TYPE_CHECKING:
    import pandas as pd


def runner_up(view: View, best: dict[str, Any], second: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The runner-up in a sentence, and each thing that would make it win."""
    worse = second[view.objective.column] / best[view.objective.column] - 1
    gap = worse if view.objective.less else -worse  # as a share of the best's value
    text = f"Runner-up: {view.name(second)} with {worth(view, second)}, "
    text += f"{units.percent(gap)} {'more' if view.objective.less else 'less'}." if gap > 0.0005 else "the same."
    other_limits = [
        f"if {LIMITS[column]} up to {units.seconds(limit)} were allowed" if looser
        else f"if {LIMITS[column]} had to stay under {units.seconds(limit)}"
        for column, limit, looser in turning_points(view, second)
        if units.seconds(limit) != units.seconds(view.limits[column] or 0.0)
    ]
    ways = (*other_limits, *_memory(view, second), *_faster(view, second, gap))
    return (f"{text} It would win" if ways else text), ways


def turning_points(view: View, second: dict[str, Any]) -> list[tuple[str, float, bool]]:
    """Where another value of one limit makes ``second``'s layout the best of all, the other limit as asked.

    (column, limit in seconds, whether it is looser than asked): the least of the looser ones, from there on; and the
    most of the tighter ones, just under it.
    """
    objective = view.objective
    frame = view.frame.assign(own=view.frame.index.isin(view.of_layout(second).index))
    found = []
    for column, limit in view.limits.items():
        (other, most), *_ = (item for item in view.limits.items() if item[0] != column)
        allowed = frame if most is None else frame[frame[other] <= most]
        now = float("inf") if limit is None else limit
        leads = _leader_by_limit(allowed, column, objective.column, objective.less)
        looser = leads[leads["own"] & (leads[column] > now)]
        tighter = leads[leads["own"] & (leads[column] < now)]
        if not looser.empty:
            found.append((column, float(looser[column].iloc[0]), True))
        if not tighter.empty:
            following = leads.loc[leads[column] > tighter[column].iloc[-1], column]
            found.append((column, min(now, float(following.min())), False))
    return found


def _leader_by_limit(frame: pd.DataFrame, column: str, value: str, less: bool) -> pd.DataFrame:
    """The best candidate so far at each value of a limit, from tight to loose; rows where the leader changes."""
    ordered = frame.sort_values([column, value], ascending=[True, less], kind="stable")
    so_far = ordered[value].cummin() if less else ordered[value].cummax()
    return ordered[(ordered[value] == so_far) & (so_far != so_far.shift())]


def _memory(view: View, second: dict[str, Any]) -> list[str]:
    """More memory, where memory ends the runner-up's batch before a limit does and it still gains from load."""
    own = view.of_layout(second).sort_values("batch")
    column, less = view.objective.column, view.objective.less
    if not view.full(second) or column not in ("tokens_per_s_per_gpu", "cost_per_million_tokens"):
        return []
    smaller = own[own["batch"] < second["batch"]]
    if smaller.empty or (smaller[column].iloc[-1] < second[column]) == less:
        return []
    return [
        "with more room for its KV cache, if that lifts its batch far enough over "
        f"{plural(second['batch'], 'sequence')} per rank, all that fit now"
    ]


def _faster(view: View, second: dict[str, Any], gap: float) -> list[str]:
    """The parts of its decode step that alone could close the ``gap``, by how much they would have to shrink."""
    if view.objective.column == "gpus":
        return []
    choices = {choice.row["candidate"]: choice for choice in view.shown}
    if second["candidate"] not in choices:
        return []
    choice = choices[second["candidate"]]
    split = step_parts(choice.decode, view.decode_price(choice, max(1.0, second["batch"])))
    needed = gap / (1 + gap) if view.objective.less else gap
    wanted = needed * split.seconds
    able = sorted((wanted / split.parts[part], part) for part in PARTS if split.parts[part] > wanted)
    less = f"if its requests took {units.percent(needed)} less time at the same load"
    if not able:
        return [f"{less}, more than any one part of its step offers"]
    share, part = able[0]
    return [f"{less}, as with its time for {part} cut by {units.percent(share)}"]
