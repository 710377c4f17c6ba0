"""A kernel's correction tabulated over one or two sizes: what pricing many candidates of one step asks again and again.

A step's row has fixed widths; only tokens (or batch and context) change from candidate to candidate. Evaluating trees
costs 1-2 us a row and a quarter of a millisecond a call; interpolating a table of them 0.1 us a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tensorcast.cost.work import Size

if TYPE_CHECKING:
    from tensorcast.cost.predict import Predictor

PER_OCTAVE = {1: 8, 2: 3}
"""Knots per factor of two, by the number of axes; below 16 every whole number is one."""

Sizes = Callable[..., Mapping[str, Size]]
"""From the axes' values (arrays) to the kernel's sizes."""


@dataclass(frozen=True)
class Correction:
    """What to multiply the formula's seconds by; the 80 % interval's ends over the result; the level of evidence."""

    factor: Size
    low: Size
    high: Size
    level: Size


def knots(low: float, high: float, per_octave: int) -> np.ndarray:
    """Whole numbers up to 16, then evenly spaced on a log scale."""
    few = np.arange(np.floor(low), min(high, 16.0) + 1.0)
    steps = max(int(np.ceil(np.log2(max(high / 16.0, 1.0)) * per_octave)), 0)
    many = 16.0 * np.exp2(np.arange(1, steps + 1) / per_octave)
    return np.unique(np.maximum(np.concatenate([few, many]), max(low, 1.0)))


class Surface:
    """Corrections over one or two axes, interpolated on a log scale; beyond the axes' ends as at the ends."""

    def __init__(
        self, predictor: Predictor, family: str, dtype: str, sizes: Sizes, *axes: tuple[float, float],
        variant: str = "",
    ) -> None:
        """``axes``: least and largest value of each argument that ``sizes`` takes (one or two, at least 1)."""
        self.axes = tuple(knots(low, high, PER_OCTAVE[len(axes)]) for low, high in axes)
        grid = [values.ravel() for values in np.meshgrid(*self.axes, indexing="ij")]
        found = predictor.estimate(family, dtype, variant, **sizes(*grid))
        parts = (np.log(found.factor), np.log(found.low / found.seconds), np.log(found.high / found.seconds))
        shape = tuple(len(axis) for axis in self.axes)
        self.values = np.stack([*parts, found.level.astype(float)], axis=-1).reshape(*shape, 4)
        self.logs = tuple(np.log2(axis) for axis in self.axes)

    def at(self, *values: Size) -> Correction:
        """Corrections at scalars or arrays, one argument per axis."""
        places = []
        for value, log in zip(values, self.logs, strict=True):
            x = np.log2(np.maximum(np.asarray(value, dtype=float), 1.0))
            position = np.interp(x, log, np.arange(len(log)))
            left = np.minimum(position.astype(int), max(len(log) - 2, 0))
            places.append((left, position - left, np.minimum(left + 1, len(log) - 1)))
        if len(places) == 1:
            (left, share, right), = places
            corner = self.values[left] * (1.0 - share)[..., None] + self.values[right] * share[..., None]
        else:
            (i, u, i2), (j, v, j2) = places
            near = self.values[i, j] * (1 - v)[..., None] + self.values[i, j2] * v[..., None]
            far = self.values[i2, j] * (1 - v)[..., None] + self.values[i2, j2] * v[..., None]
            corner = near * (1 - u)[..., None] + far * u[..., None]
        factor, low, high = (np.exp(corner[..., part])[()] for part in range(3))
        return Correction(factor, low, high, np.floor(corner[..., 3] + 1e-9).astype(int)[()])
