"""Curves of many variants read at arrays of batches, and the candidates that come of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tensorcast.deploy.curves import EVIDENCE, PrefillLine
from tensorcast.deploy.serving import Load, Served
from tensorcast.deploy.space import LARGEST_BATCH

Array = np.ndarray
LINE = ("fixed_s", "prompt_s", "token_s", "expert_s", "step_s", "error")
"""Numbers of a prefill line."""


@dataclass(frozen=True)
class Points:
    """Candidates as arrays of one length: which variant, at which batch, and the numbers of :class:`Served`."""

    variant: Array
    columns: dict[str, Array]

    def __len__(self) -> int:
        return len(self.variant)

    def where(self, chosen: Array) -> Points:
        return Points(self.variant[chosen], {name: values[chosen] for name, values in self.columns.items()})

    @staticmethod
    def joined(parts: Sequence[Points]) -> Points:
        if not parts:
            return Points(np.zeros(0, dtype=int), {})
        names = parts[0].columns
        columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in names}
        return Points(np.concatenate([part.variant for part in parts]), columns)


class CurvesAt:
    """Decode curves of many variants, read at one batch per entry of ``rows``. Stands in for a :class:`DecodeCurve`."""

    def __init__(self, grid: Array, columns: dict[str, Array], rows: Array) -> None:
        self.grid, self.columns, self.rows = grid, columns, rows
        self._found: tuple[Array, Array, Array] | None = None

    def at(self, column: str, batch: Array) -> Array:
        """Linear between the grid's batches, flat beyond its ends, as ``numpy.interp``."""
        if self._found is None or self._found[0] is not batch:  # most batches are read in several columns
            inside = np.clip(batch, self.grid[0], self.grid[-1])
            right = np.clip(np.searchsorted(self.grid, inside, side="right"), 1, len(self.grid) - 1)
            before = self.grid[right - 1]
            share = (inside - before) / (self.grid[right] - before)
            self._found = batch, self.rows * len(self.grid) + right - 1, share
        _, left, share = self._found
        values = self.columns[column].ravel()
        low = values[left]
        return low + (values[left + 1] - low) * share


class PromptsAt(PrefillLine):
    """Prefill lines of many variants, one per entry of ``rows``."""

    def __init__(self, lines: Prompts, rows: Array) -> None:
        self.per_step, self.tokens, self.past = lines.line.per_step, lines.line.tokens, lines.line.past
        for name in LINE:
            setattr(self, name, lines.columns[name][rows])
        self.evidence = {kind: lines.columns[kind][rows] for kind in EVIDENCE}


class Line(PrefillLine):
    """A prefill line whose prices are still to be read."""

    def __init__(self, new: int, prefix: int, chunk: int) -> None:
        self.asked = self._cut(new, prefix, chunk)


@dataclass
class Prompts:
    """Prefill lines of all variants at one chunk size, and sequences that fit beside a full step."""

    line: Line
    columns: dict[str, Array]
    fits: Array

    @classmethod
    def of(cls, load: Load, chunk: int, count: int) -> Prompts:
        columns = {name: np.empty(count) for name in (*LINE, *EVIDENCE)}
        return cls(Line(load.new, load.prefix_cached, chunk), columns, np.zeros(count))

    def keep(self, line: Line, rows: Array) -> None:
        """Take over the ``line`` of a fleet; ``rows``: the members' positions, -1: none."""
        there = rows >= 0
        for name in LINE:
            self.columns[name][rows[there]] = getattr(line, name)[there]
        for kind in EVIDENCE:
            self.columns[kind][rows[there]] = line.evidence[kind][there]


def last_of(grid: Array, holds: Array) -> Array:
    """The largest batch of ``grid`` for which each row ``holds``, ``[rows, grid]``; 0: none."""
    return np.where(holds, grid, 0.0).max(axis=1)


def batches(largest: Array, also: Array | None = None) -> tuple[Array, Array]:
    """(row, batch) of every power of two up to ``largest`` of each row, of the largest itself and of ``also``."""
    powers = 2.0 ** np.arange(np.log2(LARGEST_BATCH) + 1)
    rows, at = np.nonzero(powers[None, :] <= largest[:, None])
    found = [(rows, powers[at])]
    for extra in (largest, also):
        if extra is None:
            continue
        odd = (extra >= 1) & ~np.isin(extra, powers)
        if extra is also:
            odd &= extra != largest
        found.append((np.flatnonzero(odd), extra[odd]))
    return np.concatenate([rows for rows, _ in found]), np.concatenate([batch for _, batch in found])


def largest_where(holds: Callable[[Array], Array], largest: Array) -> Array:
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


def points_of(rows: Array, served: Served, extra: dict[str, Array]) -> Points:
    names = (
        "concurrency", "batch", "ttft_s", "tpot_s", "request_s", "output_tokens_per_s", "ttft_error", "tpot_error",
        "decode_step_s", "prefill_step_s", "exposed_comm_s", "hidden_comm_s",
    )
    columns = {name: np.broadcast_to(getattr(served, name), len(rows)) for name in names}
    shares = {f"share_{kind}": np.broadcast_to(values, len(rows)) for kind, values in served.evidence.items()}
    return Points(rows, {**columns, **shares, **extra})
