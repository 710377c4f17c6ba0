"""What a decider asks of a comparison, in a sentence each: which limit binds, and which forms are worth it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tensorcast.report import units
from tensorcast.report.compare.choices import LIMITS, View

if TYPE_CHECKING:
    import pandas as pd

LEAST = 0.005
"""A difference that is worth a word."""


def sentences(view: View) -> list[str]:
    """Those that a comparison with a best candidate answers."""
    found = [*_binding(view), _worth(view, "Two pools of servers, one for prompts and one for replies,", _pools),
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
    return f"{what} {said}: {numbers} ({units.percent(max(gain, loss))} {'better' if gain > loss else 'worse'})."


def _allowed(view: View, without: str = "") -> pd.Series[bool]:
    """Candidates that keep every limit but ``without``."""
    kept = ~view.frame["limit"].isin(["gpus", "users", "requests"])
    for column, limit in view.limits.items():
        if limit is not None and column != without:
            kept &= view.frame[column] <= limit
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
