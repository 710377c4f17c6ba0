"""Times that never fall as a size grows, from a residual that was learnt on other devices.

Such a residual knows where the tiles of other devices end, not of this one: over the formula it may make a larger GEMM
the faster one. Between knots the formula says how time grows (its tiles and waves are this device's own); at the knots
the residual says how much, as the middle of the largest time before and the least time after.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tensorcast.cost.predict.shapes import Columns

GROWS = {"gemm": "m"}
"""The size in which a family's times are held to grow."""

KNOTS = np.unique(np.round(2.0 ** np.arange(0.0, 16.25, 0.5)))

LINES = 2048
"""Combinations of the other sizes at a time: few enough for memory."""

Times = Callable[[Columns], tuple[np.ndarray, np.ndarray]]
"""Seconds by the formula alone and with the residual."""


def growing(family: str, columns: Columns, formula_s: np.ndarray, times: Times) -> np.ndarray:
    """Seconds of every call, no shorter at a larger :data:`GROWS` than at a smaller one, all else equal.

    ``formula_s``: the formula's seconds of the calls; it must itself grow.
    """
    name = GROWS[family]
    others = [other for other in columns if other != name]
    table = np.stack([columns[other] for other in others], axis=1)
    lines, line = np.unique(table, axis=0, return_inverse=True)
    line, seconds = line.ravel(), np.empty(len(table))
    for start in range(0, len(lines), LINES):
        some = lines[start : start + LINES]
        grid = {other: np.repeat(some[:, i], len(KNOTS)) for i, other in enumerate(others)}
        formula, found = (
            np.log(values).reshape(len(some), len(KNOTS)) for values in times({**grid, name: np.tile(KNOTS, len(some))})
        )
        before = np.maximum.accumulate(found, axis=1)
        after = np.minimum.accumulate(found[:, ::-1], axis=1)[:, ::-1]
        at = np.flatnonzero((line >= start) & (line < start + LINES))
        seconds[at] = np.exp(_between(
            formula, (before + after) / 2.0, line[at] - start, np.log(formula_s[at]), columns[name][at]
        ))
    return seconds


def _between(
    formula: np.ndarray, found: np.ndarray, line: np.ndarray, formula_at: np.ndarray, size: np.ndarray
) -> np.ndarray:
    """log seconds of calls on ``line`` from the knots' logs ``[lines, knots]``: between two knots the same share of the
    way as the formula has gone; beyond the last ones as the formula goes."""
    left = np.clip(np.searchsorted(KNOTS, size, side="right") - 1, 0, len(KNOTS) - 2)
    low, high = formula[line, left], formula[line, left + 1]
    gone = formula_at - low
    share = np.clip(gone / np.maximum(high - low, 1e-12), 0.0, 1.0)
    beyond = np.where(left == len(KNOTS) - 2, np.maximum(formula_at - high, 0.0), 0.0) + np.minimum(gone, 0.0)
    return found[line, left] * (1.0 - share) + found[line, left + 1] * share + beyond
