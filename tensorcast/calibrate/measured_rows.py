"""Rows of measured kernels as fits take them: kernel by kernel, sizes and seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from tensorcast.cost.kernels.vocabulary import Columns

Key = tuple[str, str, str, str]
"""Family, dtype, engine, variant."""


@dataclass
class MeasuredKernel:
    """Rows of one kernel: sizes, seconds, and the version of the engine that ran."""

    key: Key
    columns: Columns
    seconds: np.ndarray
    versions: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.seconds)

    def take(self, rows: np.ndarray) -> MeasuredKernel:
        """The named rows (a mask or positions)."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        return MeasuredKernel(self.key, columns, self.seconds[rows], self.versions)

    def fastest(self, without: Sequence[str] = ("source",)) -> MeasuredKernel:
        """The quickest row of each shape, sizes ``without`` which are no part of it."""
        frame = pd.DataFrame({name: values for name, values in self.columns.items() if name not in without})
        order = np.argsort(self.seconds, kind="stable")
        return self.take(order[~frame.iloc[order].duplicated().to_numpy()])


def joined(parts: Sequence[MeasuredKernel]) -> MeasuredKernel:
    """All rows of several kernels of one family, under the key of the first, with the sizes that all of them state."""
    names = [name for name in parts[0].columns if all(name in part.columns for part in parts)]
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in names}
    versions = tuple(sorted({version for part in parts for version in part.versions}))
    return MeasuredKernel(parts[0].key, columns, np.concatenate([part.seconds for part in parts]), versions)


@dataclass
class MeasuredSystem:
    """All kernels measured on one system, and how many rows each rule left out, by ``family: reason``.

    ``source``: whose measurements these are, for a reader. ``reduce_s``: what a kernel takes longer that reads a row
    before it writes any of it.
    """

    name: str
    kernels: dict[Key, MeasuredKernel] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    reduce_s: float = 0.0
    source: str = ""

    def family(self, name: str) -> Iterator[MeasuredKernel]:
        """The kernels of one family, in the order of their keys."""
        return (self.kernels[key] for key in sorted(self.kernels) if key[0] == name)

    def drop(self, family: str, reason: str, count: int) -> None:
        """Count rows that a rule left out."""
        if count:
            name = f"{family}: {reason}"
            self.dropped[name] = self.dropped.get(name, 0) + count
