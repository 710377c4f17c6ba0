"""Corrections asked for one by one and found all at once: fitted models answer many sizes as fast as one."""

from __future__ import annotations

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


Question = tuple[Awaited, tuple[int, ...], list[np.ndarray]]


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
        shape = np.broadcast_shapes(*(value.shape for value in columns.values()))
        flat = [np.broadcast_to(value, shape).ravel() for value in columns.values()]
        self._asked[(*name, belongs, *columns)].append((found, shape, flat))
        return found

    def find(self) -> None:
        """Ask each kernel's model once, and hand the numbers out."""
        for (family, dtype, variant, belongs, *names), questions in self._asked.items():
            columns = (np.concatenate(parts) for parts in zip(*(flat for _, _, flat in questions), strict=True))
            together = self._corrections.ask(
                belongs, (family, dtype, variant), dict(zip(names, columns, strict=True))
            )
            ends = np.cumsum([len(flat[0]) for _, _, flat in questions])[:-1]
            split = [np.split(np.asarray(x), ends) for x in (together.factor, together.error, together.level)]
            for (found, shape, _), factor, error, level in zip(questions, *split, strict=True):
                found.factor, found.error, found.level = (x.reshape(shape)[()] for x in (factor, error, level))
        self._asked.clear()
