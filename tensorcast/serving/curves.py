"""Decode steps of deployments as curves over the batch, and on what evidence steps stand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tensorcast.cost.evidence import EVIDENCE, LEVELS
from tensorcast.deploy.step.price import StepPrice, seconds_of, total
from tensorcast.serving.traffic import Array

PER_SEQUENCE = ("attention", "indexer_scores", "linear_attention", "ssm_scan", "causal_conv1d")
"""Ops that run per sequence: in a step with prompts they run once for the prompts and once for the decoding rows."""


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
    attention_s = price.sum(seconds_of, lambda p: getattr(p.row, "name", "") in PER_SEQUENCE)
    return {
        "seconds": price.seconds,
        "attention_s": attention_s + price.request_overhead_s,
        "error": price.error,
        "exposed_comm_s": price.exposed_comm_s,
        "hidden_comm_s": price.hidden_comm_s,
        **evidence_shares(price),
    }


def evidence_shares(price: StepPrice) -> dict[str, Any]:
    """Share of kernel seconds behind which each kind of evidence stands."""
    # of arrays, levels are per candidate, or per member of a fleet that spans more or fewer tiers
    by_level = price.sums(seconds_of, lambda p: p.level if isinstance(p.level, int) else None)
    seconds: dict[str, Any] = dict.fromkeys(EVIDENCE, 0.0)
    for level, kind in enumerate(LEVELS):
        seconds[kind] = by_level.get(level, 0.0)
        if None in by_level:
            seconds[kind] = seconds[kind] + price.sum(
                lambda p: p.seconds * (p.level == level), lambda p: not isinstance(p.level, int)  # noqa: B023
            )
    whole = np.maximum(total(seconds.values()), 1e-30)
    return {kind: value / whole for kind, value in seconds.items()}
