"""Corrections asked for one by one and found all at once: fitted models answer many sizes as fast as one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorcast.cost.predict.rows import Corrections
from tensorcast.cost.work import Size, Work


@dataclass(eq=False)
class Awaited:
    """A :class:`~tensorcast.cost.predict.rows.Correction` whose numbers are there after :meth:`Later.find`."""

    engine: str
    variant: str
    factor: Size = 1.0
    error: Size = 0.0
    level: Size = 0


Question = tuple[Awaited, list[np.ndarray]]


class Later:
    """Stands in for :class:`Corrections` where prices are read only after :meth:`find`."""

    def __init__(self, corrections: Corrections) -> None:
        self._corrections = corrections
        self._asked: dict[tuple[Any, ...], list[Question]] = defaultdict(list)

    def of(self, work: Work, variant: str = "") -> Awaited | None:
        """As :meth:`Corrections.of`."""
        return self.at(work.family, work.dtype, variant, work.sizes) if work.sizes else None

    def at(self, family: str, dtype: str, variant: str, sizes: Mapping[str, Size]) -> Awaited | None:
        """As :meth:`Corrections.at`."""
        name, belongs, columns = self._corrections.question(family, dtype, variant, sizes)
        if belongs is None:
            return None
        found = Awaited(*belongs)
        self._asked[(*name, belongs, *columns)].append((found, list(columns.values())))
        return found

    def find(self) -> None:
        """Ask each kernel's model once, and hand the numbers out."""
        for (family, dtype, variant, belongs, *names), questions in self._asked.items():
            shapes = [np.broadcast_shapes(*(value.shape for value in values)) for _, values in questions]
            ends = np.cumsum([math.prod(shape) for shape in shapes])
            parts = [slice(end - math.prod(shape), end) for end, shape in zip(ends, shapes, strict=True)]
            columns = np.empty((len(names), ends[-1]))
            for (_, values), part, shape in zip(questions, parts, shapes, strict=True):
                for column, value in zip(columns, values, strict=True):
                    column[part].reshape(shape)[...] = value
            sizes = dict(zip(names, columns, strict=True))
            together = self._corrections.ask(belongs, (family, dtype, variant), sizes)
            numbers = [np.asarray(x) for x in (together.factor, together.error, together.level)]
            for (found, _), part, shape in zip(questions, parts, shapes, strict=True):
                found.factor, found.error, found.level = (x[part].reshape(shape)[()] for x in numbers)
        self._asked.clear()
