"""Micro-batches, halves, drafts, chunks: the sizes a step is priced at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tensorcast.cost.formulas import Context


def _batches(per_octave: Callable[[int], int]) -> np.ndarray:
    """From 1/64 to 2^24; so many between 2^k and 2^(k+1), whole ones from 1 on."""
    every = {k: per_octave(k) if k < 0 else min(2**k, per_octave(k)) for k in range(-6, 24)}
    return np.concatenate([2.0**k * (1 + np.arange(many) / many) for k, many in every.items()])


GRID = _batches(lambda k: 16 if 0 <= k < 9 else 8 if 9 <= k < 13 else 4)
"""Batches at which decode steps are priced; between them lines, as tiles make steps of it. Fixed, so that a batch's
price does not depend on what else is asked. Every whole batch up to 32 is there, then one every 6 % up to 512."""

COARSE = _batches(lambda k: 8 if 0 <= k < 13 else 4)
"""Those of :data:`GRID` at which every variant of a search is priced."""


class _Sizes(NamedTuple):
    """What rows are priced at: the step's context, and how many chunks of which context pass the experts."""

    whole: Context
    chunks: tuple[Any, Context]


class Batches(NamedTuple):
    """Micro-batches, and what the rows of one of them (or of half of it) are priced at.

    ``drafts``: what drafting is priced at, if the step drafts. Where batches have sizes in common, ``rows`` holds each
    case once; ``own_at`` and ``draft_at`` say at which of them every batch runs and drafts.
    """

    micro: Any
    rows: _Sizes
    drafts: _Sizes | None = None
    own_at: Any = None
    draft_at: Any = None
