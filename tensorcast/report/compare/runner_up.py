"""The runner-up in a sentence, and what would make it win: another limit, more memory, a faster part of its step."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorcast.report import units
from tensorcast.report.compare.choices import LIMITS, PARTS, View, step_parts, worth
from tensorcast.report.units import plural

if TYPE_CHECKING:
    from tensorcast.search.candidate_table import Candidates


def runner_up(view: View, best: dict[str, Any], second: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The runner-up in a sentence, and each thing that would make it win."""
    worse = second[view.objective.column] / best[view.objective.column] - 1
    gap = worse if view.objective.less else -worse  # as a share of the best's value
    text = f"Runner-up: {view.name(second)} with {worth(view, second)}, "
    more, less = ("less", "more") if view.objective.less else ("more", "less")
    if gap < -0.0005:  # where a bound that is reached with a chance ranks
        return f"{text}{units.percent(-gap)} {more}, but it may do worse: {view.name(best)} is the surer one.", ()
    text += f"{units.percent(gap)} {less}." if gap > 0.0005 else "the same."
    other_limits = [
        f"if {LIMITS[column]} up to {units.seconds(limit)} were allowed" if looser
        else f"if {LIMITS[column]} had to stay under {units.seconds(limit)}"
        for column, limit, looser in turning_points(view, second)
        if units.seconds(limit) != units.seconds(view.limits[column] or 0.0)
    ]
    ways = (*other_limits, *_ways(view, second, gap))
    return (f"{text} It would win" if ways else text), ways


def turning_points(view: View, second: dict[str, Any]) -> list[tuple[str, float, bool]]:
    """Where another value of one limit makes ``second``'s layout the best of all, the other limit as asked.

    (column, limit in seconds, whether it is looser than asked): the least of the looser ones, from there on; and the
    most of the tighter ones, just under it.
    """
    objective = view.objective
    kept = replace(view.kept, columns=view.kept.columns | {"own": view.of_layout(second)})
    found = []
    for column, limit in view.limits.items():
        (other, most), *_ = (item for item in view.limits.items() if item[0] != column)
        allowed = kept if most is None else kept.where(kept[other] <= most)
        now = float("inf") if limit is None else limit
        leads = _leader_by_limit(allowed, column, objective.column, objective.less)
        at, own = leads[column], leads["own"]
        looser, tighter = at[own & (at > now)], at[own & (at < now)]
        if len(looser):
            found.append((column, float(looser[0]), True))
        if len(tighter):
            found.append((column, min([now, *at[at > tighter[-1]].tolist()]), False))
    return found


def _leader_by_limit(kept: Candidates, column: str, value: str, less: bool) -> Candidates:
    """The best candidate so far at each value of a limit, from tight to loose; rows where the leader changes."""
    sign = 1.0 if less else -1.0
    ordered = kept.where(np.lexsort((sign * kept[value], kept[column])))
    amount = sign * ordered[value]
    so_far = np.fmin.accumulate(amount)  # where a value is not known, it leads nothing
    changes = np.append(True, so_far[1:] != so_far[:-1])[: len(so_far)]
    return ordered.where((amount == so_far) & changes)


def _ways(view: View, second: dict[str, Any], gap: float) -> list[str]:
    """More memory, where that ends the runner-up's batch before a limit does and it still gains from load; then the
    parts of its decode step that alone could close the ``gap``, by how much they would have to shrink."""
    column, less, found = view.objective.column, view.objective.less, list[str]()
    if view.full(second) and column in ("tokens_per_s_per_gpu", "cost_per_million_tokens"):
        own = view.kept.where(view.of_layout(second))
        own = own.where(np.argsort(own["batch"], kind="stable"))
        smaller = own[column][own["batch"] < second["batch"]]
        if len(smaller) and (smaller[-1] < second[column]) != less:
            found.append(
                "with more room for its KV cache, if that lifts its batch far enough over "
                f"{plural(second['batch'], 'sequence')} per rank, all that fit now"
            )
    choice = next((one for one in view.shown if one.row["candidate"] == second["candidate"]), None)
    if column == "gpus" or choice is None or gap <= 0:
        return found
    split = step_parts(choice.decode, view.decode_price(choice, max(1.0, second["batch"])))
    needed = gap / (1 + gap) if less else gap
    wanted = needed * split.seconds
    able = sorted((wanted / split.parts[part], part) for part in PARTS if split.parts[part] > wanted)
    faster = f"if its requests took {units.percent(needed)} less time at the same load"
    if not able:
        return [*found, f"{faster}, more than any one part of its step offers"]
    share, part = able[0]
    return [*found, f"{faster}, as with its time for {part} cut by {units.percent(share)}"]
