"""Decode steps of deployments as curves over the batch, and on what evidence steps stand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tensorcast.deploy.step.price import StepPrice
from tensorcast.serving.traffic import Array


@dataclass
class DecodeCurve:
    """Decode steps of many deployments over sequences per data-parallel rank, read at one batch per entry of ``rows``.

    ``columns``: of :func:`decode_columns`, each ``[deployments, grid]``; ``grid``: the batches they are priced at.
    """

    grid: Array
    columns: dict[str, Array]
    rows: Any
    _found: tuple[Array, Array, Array] | None = field(default=None, init=False, repr=False)

    def at(self, column: str, batch: Array) -> Array:
        """Linear between the grid's batches, flat beyond its ends, as ``numpy.interp``."""
        if np.ndim(self.rows) == 2 and np.array_equal(batch, self.grid[None, : batch.shape[-1]]):
            found: Array = self.columns[column][:, : batch.shape[-1]][self.rows[:, 0]]  # all of them priced themselves
            return found
        if self._found is None or self._found[0] is not batch:  # most batches are read in several columns
            inside = np.clip(batch, self.grid[0], self.grid[-1])
            right = np.clip(np.searchsorted(self.grid, inside, side="right"), 1, len(self.grid) - 1)
            before = self.grid[right - 1]
            share = (inside - before) / (self.grid[right] - before)
            self._found = batch, self.rows * len(self.grid) + right - 1, share
        _, left, share = self._found
        values = self.columns[column].ravel()
        low: Array = values[left]
        return low + (values[left + 1] - low) * share


def decode_columns(price: StepPrice) -> dict[str, Any]:
    """What decode curves hold, from decode steps of one deployment priced over batches."""
    return {
        "seconds": price.seconds,
        "attention_s": price.tally.attention + price.request_overhead_s,
        "error": price.error,
        "exposed_comm_s": price.exposed_comm_s,
        "hidden_comm_s": price.hidden_comm_s,
        **price.tally.evidence,
    }
