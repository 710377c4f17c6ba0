"""Curves of many variants read at arrays of batches, and the candidates that come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorcast.search.axes import LARGEST_BATCH
from tensorcast.serving.entries import Entries
from tensorcast.serving.traffic import Array, Mask, Rows


@dataclass(frozen=True)
class Points(Entries):
    """Candidates as arrays of one length: which variant, at which batch, and what they serve."""

    variant: Rows
    columns: dict[str, Array]


def batches(largest: Array, *also: Array, new: bool = False) -> tuple[Rows, Array]:
    """(row, batch) of every power of two up to ``largest`` of each row, of the largest itself and of ``also``, each
    another. ``new``: only what ``also`` adds."""
    found = list[tuple[Rows, Array]]()
    if not new:
        powers = 2.0 ** np.arange(np.log2(LARGEST_BATCH) + 1)
        rows, at = np.nonzero(powers[None, :] <= largest[:, None])
        found.append((rows, powers[at]))
    for extra in (largest, *also)[int(new) :]:
        odd = (extra >= 1) & (np.frexp(extra)[0] != 0.5)  # no power of two
        if extra is not largest:
            odd &= extra != largest
        found.append((np.flatnonzero(odd), extra[odd]))
    return np.concatenate([rows for rows, _ in found]), np.concatenate([batch for _, batch in found])


def each_once(*parts: NDArray[Any]) -> NDArray[Any]:
    """All values, each once, ascending. ``numpy.unique`` would do, but reads masked arrays' module for it."""
    values = np.sort(np.concatenate(parts))
    first = np.ones(len(values), dtype=bool)
    first[1:] = values[1:] != values[:-1]
    return values[first]


def among(values: NDArray[Any], ascending: NDArray[Any]) -> Mask:
    """Which of the values are among those ``ascending`` ones."""
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    found: Mask = ascending[at] == values if len(ascending) else np.zeros(len(values), dtype=bool)
    return found


def last_of(grid: Array, kept: Mask) -> Array:
    """Of each row the last of ``grid`` that is ``kept [rows, n]``; 0: none is."""
    last = len(grid) - 1 - kept[:, ::-1].argmax(axis=1)
    return np.where(kept[np.arange(len(kept)), last], grid[last], 0.0)


def in_order(numbers: Rows) -> Rows:
    """Where whole numbers from 0 on stand in ascending order, equal ones as they stood. Of two bytes NumPy counts them
    instead of comparing."""
    return np.argsort(numbers.astype(np.uint16) if numbers.max(initial=0) < 1 << 16 else numbers, kind="stable")


def number_within(ascending: Array, rows: Rows, limit: Array) -> Rows:
    """How many entries of each of some ``rows`` of ``ascending [rows, n]`` are no more than its limit."""
    found, end = np.zeros(len(rows), dtype=int), ascending.shape[1]
    for step in 2 ** np.arange(end.bit_length())[::-1]:
        further = np.minimum(found + step, end)
        found = np.where(ascending[rows, further - 1] <= limit, further, found)
    return found


def largest_where(holds: Callable[[Array], Mask], largest: Array) -> Array:
    """The largest whole number of each row, up to ``largest``, for which ``holds``; 0: none.

    ``holds(number)`` is true up to some number and false beyond.
    """
    low = np.zeros_like(largest)
    high = np.floor(largest) + 1
    while (high - low > 1).any():
        middle = np.maximum(np.floor((low + high) / 2), 1.0)
        inside, wide = holds(middle), high - low > 1  # a bracket that has closed stays closed
        low, high = np.where(wide & inside, middle, low), np.where(wide & ~inside, middle, high)
    return low
