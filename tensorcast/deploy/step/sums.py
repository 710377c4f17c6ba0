"""Sums over the rows of a step, of which its time is made: each is a weighted sum of rows' seconds, so that all of them
are one product of matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tensorcast.cost.evidence import LEVELS
from tensorcast.cost.work import Array
from tensorcast.deploy.plan.plan import Row
from tensorcast.deploy.step.overlap import KIND_SUMS
from tensorcast.deploy.step.price import RowPrice, Where

AMONG = ("seconds", "communication", "attention", "experts")
"""Sums of rows' seconds: of all, of collectives, of ops that run per sequence, of experts with dispatch and combine,
which take the tokens of all data-parallel ranks."""


class RecipePart(NamedTuple):
    """Rows that run equally often up to their ``calls``, by position; ``drafts``: at the sizes of drafts."""

    rows: tuple[Row, ...]
    where: tuple[int, ...]
    calls: tuple[int, ...]
    drafts: bool = False


@dataclass(frozen=True)
class Recipe:
    """What is added up of the prices of ``rows``: by place in the plan, as a layer of each kind overlaps, and of each
    of the ``parts``."""

    rows: tuple[Row, ...]
    parts: tuple[RecipePart, ...]
    places: tuple[int, ...]
    """Layer kinds, and places outside the layers."""
    layers: int
    """Kinds of layers that overlap."""
    chunked: tuple[bool, ...]
    """Of each row, whether it is inside the experts."""
    weights: tuple[Array, Array, Array]
    """Of every row: in sums of seconds, in sums of busy seconds, and how often it runs in each part."""


@dataclass(frozen=True)
class Sums:
    """Sums of the rows of steps, the last axis of cases, those before of members. Of one pass over the plan by place,
    and of a layer of each kind with experts ``layers [kinds, 6]`` and ``busy [kinds, 2]``; and by part of the rows
    ``among`` (:data:`AMONG`), ``levels`` and ``errors`` (by kernel family)."""

    places: Array
    layers: Array
    busy: Array
    among: Array
    levels: Array
    errors: Array

    def at(self, where: Where, parts: slice = slice(None)) -> Sums:
        """Those of some of the cases, where there is more than one, and of some of the ``parts``: of later ones alone
        nothing by place and layer."""
        every = where is None or self.places.ndim == 1 or self.places.shape[-1] == 1
        found = {}
        for name, values in vars(self).items():
            some = values[parts] if name in ("among", "levels", "errors") else values[:0] if parts.start else values
            found[name] = some if every else some[..., where]
        return Sums(**found)


def sums_at(recipe: Recipe, numbers: Array, families: Sequence[str], shape: tuple[int, ...]) -> Sums:
    """Of a recipe's rows at cases of this ``shape``: ``numbers [4, rows, cases]`` are seconds, those in which neither
    arithmetic nor memory is busy, relative errors and levels."""
    weights, busy, calls = recipe.weights
    seconds, waits, errors, levels = numbers
    parts, rows = calls.shape
    of_row = {name: i for i, name in enumerate(dict.fromkeys(families))}
    of_family = np.zeros((parts, len(of_row), rows))
    of_family[:, [of_row[name] for name in families], range(rows)] = calls
    by_level = np.concatenate([calls @ np.where(levels == level, seconds, 0.0) for level in range(len(LEVELS))])
    every, kinds, places = weights @ seconds, recipe.layers, len(recipe.places)
    layers = places + kinds * len(KIND_SUMS)
    return Sums(
        places=every[:places].reshape(places, *shape),
        layers=every[places:layers].reshape(kinds, len(KIND_SUMS), *shape),
        busy=(busy @ (seconds - waits)).reshape(kinds, 2, *shape),
        among=every[layers:].reshape(parts, len(AMONG), *shape),
        levels=by_level.reshape(len(LEVELS), parts, *shape).swapaxes(0, 1),
        errors=(of_family.reshape(-1, rows) @ (errors * seconds)).reshape(parts, len(of_row), *shape),
    )


def sums_of(recipe: Recipe, prices: Sequence[RowPrice], families: Mapping[str, int]) -> Sums:
    """Of the prices of a recipe's rows; the axes of cases and members are those of the prices."""
    weights, busy, calls = recipe.weights
    seconds, parts = [np.asarray(price.seconds) for price in prices], len(recipe.parts)
    shape = np.broadcast_shapes(*(one.shape for one in seconds))
    flat = *(1,) * (2 - len(shape)), *shape
    levels, of_family = np.zeros((parts, len(LEVELS), len(prices))), np.zeros((parts, len(families), len(prices)))
    mixed: list[int] = []  # of more than one level
    for i, price in enumerate(prices):
        of_family[:, families[price.family], i] = calls[:, i]
        if isinstance(price.level, int):
            levels[:, price.level, i] = calls[:, i]
        else:
            mixed.append(i)
    weights = np.concatenate([weights, levels.reshape(-1, len(prices))])
    errors, sizes = of_family.reshape(-1, len(prices)), (len(weights), len(busy), parts * len(families))
    found = [np.zeros((size, *flat)) for size in sizes]
    wide = [one.ndim > 1 for one in seconds]
    for some in (np.flatnonzero(wide).tolist(), np.flatnonzero(np.logical_not(wide)).tolist()):
        if not some:
            continue
        columns = np.empty((3, len(some), *(flat if wide[some[0]] else (1, flat[1]))))
        for j, i in enumerate(some):
            price = prices[i]
            columns[0, j], columns[1, j], columns[2, j] = price.seconds, price.waits_s, price.error
        columns[1] = columns[0] - columns[1]
        columns[2] *= columns[0]
        ends = columns.shape[2:]
        for whole, part, column in zip(found, (weights, busy, errors), columns, strict=True):
            counts = np.flatnonzero(part[:, some].any(axis=1))
            whole[counts] += (part[counts][:, some] @ column.reshape(len(some), -1)).reshape(-1, *ends)
    ends_at = len(weights) - parts * len(LEVELS)
    by_level = found[0][ends_at:].reshape(parts, len(LEVELS), *flat)
    for i in mixed:
        of_level = np.equal.outer(np.arange(len(LEVELS)), np.broadcast_to(prices[i].level, flat))
        by_level += calls[:, i].reshape(-1, 1, 1, 1) * (of_level * seconds[i])
    kinds, places = recipe.layers, len(recipe.places)
    cuts = {
        "places": found[0][:places].reshape(places, *shape),
        "layers": found[0][places : places + kinds * len(KIND_SUMS)].reshape(kinds, len(KIND_SUMS), *shape),
        "busy": found[1].reshape(kinds, 2, *shape),
        "among": found[0][places + kinds * len(KIND_SUMS) : ends_at].reshape(parts, len(AMONG), *shape),
        "levels": by_level.reshape(parts, len(LEVELS), *shape),
        "errors": found[2].reshape(parts, len(families), *shape),
    }
    return Sums(**cuts)
