"""Which candidates no other beats, and which cannot be told apart."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tensorcast.cost.evidence import NORMAL_80

REPEAT = 0.03
"""Repeating a measurement moves it by 3-5 % (aiconfigurator-core 0.12.0's tables hold repeats): nothing closer than
this is a difference."""


def pareto(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Mask of the points that no other beats in one of two quantities without losing in the other; more is better."""
    order = np.lexsort((-second, -first))
    best = np.maximum.accumulate(np.concatenate([[-np.inf], second[order][:-1]]))
    mask = np.zeros(len(first), dtype=bool)
    mask[order] = second[order] > best
    return mask


def alike(one: Mapping[str, tuple[float, float]], other: Mapping[str, tuple[float, float]]) -> bool:
    """Whether the difference of two sums lies within its own error, four times in five.

    ``one`` and ``other``: seconds and relative median error by kernel family. A family's error is that of its fitted
    constants, so it moves both sums the same way: what counts is how much *more* of that family one of them has. That
    is why two layouts can be told apart though their own intervals overlap widely. Families err independently. What
    is left where both spend alike is how well anything can be measured (:data:`REPEAT`, of the larger sum).
    """
    total = 0.0
    for family in {*one, *other}:
        a, b = one.get(family, (0.0, 0.0)), other.get(family, (0.0, 0.0))
        total += (a[0] * a[1] - b[0] * b[1]) ** 2
    first, second = (sum(seconds for seconds, _ in sums.values()) for sums in (one, other))
    off = np.sqrt(NORMAL_80**2 * total + (REPEAT * max(first, second)) ** 2)
    return bool(abs(first - second) <= off)
