"""Decode steps of deployments as curves over the batch, and on what evidence steps stand."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

from tensorcast.deploy.step.price import StepPrice
from tensorcast.deploy.step.sizes import GRID
from tensorcast.serving.traffic import Array, Number


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


MOST_STAGES = 128

BEYOND = np.array([0.0, *(NormalDist().inv_cdf(0.5264 ** (1 / count)) for count in range(2, MOST_STAGES + 1))])
"""By how many standard deviations the largest of 1, 2, ... normal numbers is beyond their mean, on average: 3 % off."""

BETWEEN = (GRID[1:] + GRID[:-1]) / 2

LEFT_TOGETHER = 5.0
"""Sequences of a micro-batch, about, below which it dies out: a reply's place is taken by a prompt that the next
micro-batch reads, so that their numbers wander, and one that has none is never filled again. ``n`` of Poisson's
numbers are 0 once in ``exp(n)`` rounds of replies."""


def lasting(per_step: Number, *, reads: bool = True) -> Any:
    """Sequences with which a micro-batch lasts where so many prompts share a step: any with chunks of prompts, which
    begin new ones again and again; none but the only one where prompts are not read."""
    return np.where(np.less(per_step, 1), 0.0, LEFT_TOGETHER) if reads else np.inf


def unevenly(batch: Array, stages: Number, least: Number) -> Array:
    """The batch whose micro-batches, all of one size, take as long as those of ``batch`` sequences of pipelines with
    so many ``stages``; ``least``: sequences that a micro-batch lasts with (:func:`lasting`). All of them broadcast.

    A sequence decodes with the micro-batch that read the end of its prompt, the one that came next: they fall on
    micro-batches by chance, and the largest one, which holds up the others, has as many as the largest number of a
    multinomial draw (vllm#57433 counts 7, 13, 2 and 10). Another micro-batch begins only with prompts for which there
    is no room in one, as with each in chunks: few sequences end up together (vllm#41682, vllm#50853).
    """
    if not np.any(np.greater(stages, 1)):
        return batch
    there = np.clip(batch / np.maximum(least, 1e-9), 1.0, stages)
    mean = batch / there
    most = mean + np.interp(there, np.arange(1, MOST_STAGES + 1), BEYOND) * np.sqrt(mean * (1 - 1 / there))
    even = stages * np.clip(most, 1.0, np.maximum(batch, 1.0))
    # one that is priced for others, too, of which there are sixteen in an octave
    found: Array = np.where(np.greater(stages, 1), GRID[np.searchsorted(BETWEEN, even)], batch)
    return found


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
