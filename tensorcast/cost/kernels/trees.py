"""Gradient-boosted oblivious trees, evaluated with numpy: every level of a tree asks one question of all rows.

A tree of depth D has D questions ``feature > border`` and ``2**D`` leaves; the answers are the bits of the leaf's
index. Fitted elsewhere (CatBoost grows such trees); here they are arrays of small integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tensorcast.cost.work import Array

ROWS, BLOCK = 16384, 65536
"""Rows at a time, and answers (rows x trees) at a time: few enough to stay in the cache, many enough to be worth a
call."""

LEAF_STEP = 1e-3
"""Smallest step between leaves: over the trees of a kernel rounding to it comes to 0.2 %, and halves what is stored."""


def leaf_steps(leaves: NDArray[np.float32]) -> NDArray[np.float32]:
    """The step in which each tree's leaves ``[trees, leaves]`` are counted: at most 127 to the largest."""
    return np.maximum(np.abs(leaves).max(axis=1, initial=0.0) / 127.0, LEAF_STEP)


@dataclass(frozen=True)
class Trees:
    """``value = bias + sum over trees of leaves[tree, bits]``.

    ``borders`` per feature, ascending; ``feature``, ``border`` ``[trees, depth]`` index features and their borders;
    ``leaves`` ``[trees, 2**depth]``.
    """

    names: tuple[str, ...]
    borders: tuple[NDArray[np.float32], ...]
    feature: NDArray[np.uint8]
    border: NDArray[np.uint8]
    leaves: NDArray[np.float32]
    bias: float

    def values(self, columns: Mapping[str, Array], trees: int | None = None) -> Array:
        """One value per row from the named features; ``trees``: of the first so many alone."""
        count = len(self.feature) if trees is None else min(trees, len(self.feature))
        size = len(next(iter(columns.values()))) if columns else 0
        result = np.full(size, self.bias)
        if not count or not size:
            return result
        bins = np.empty((len(self.names), size), dtype=np.uint8)
        for i, (name, borders) in enumerate(zip(self.names, self.borders, strict=True)):
            bins[i] = np.searchsorted(borders, columns[name].astype(np.float32), side="left")
        # in double precision the sum does not hang on how many rows are asked for at once
        every = self.leaves[:count].astype(np.float64)
        for start in range(0, size, ROWS):
            part = bins[:, start : start + ROWS]
            together = max(BLOCK // part.shape[1], 1)
            for first in range(0, count, together):
                some = slice(first, min(first + together, count))
                feature, border, leaves = self.feature[some], self.border[some], every[some]
                index = np.zeros((len(leaves), part.shape[1]), dtype=np.uint8)
                for level in reversed(range(feature.shape[1])):
                    index += index
                    index |= (part[feature[:, level]] > border[:, level, None]).view(np.uint8)
                flat = index + (np.arange(len(leaves)) * leaves.shape[1])[:, None]
                result[start : start + ROWS] += leaves.ravel().take(flat).sum(0)
        return result
