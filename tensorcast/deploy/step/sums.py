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


def sums_of_steps(
    recipes: Sequence[Recipe], prices: Sequence[Sequence[RowPrice]], families: Mapping[str, int], members: Sequence[int]
) -> Sums:
    """Of the prices of the rows of several steps, of so many ``members`` each, whose recipes add up alike: members, one
    step's after another's, and cases together are the last axis. Rows that cost all members the same, most of them
    those of other steps, too, stand once in a table that each step's sums are read from."""
    places, plain, width = dict[int, int](), list[RowPrice](), 1
    for price in (price for some in prices for price in some):
        axes = np.shape(price.seconds)
        width = max(width, axes[-1] if axes else 1)
        if len(axes) < 2 and id(price) not in places:
            places[id(price)] = len(plain)
            plain.append(price)
    first, kinds, number = recipes[0], len(families), len(LEVELS)
    parts, added = len(first.parts), len(first.weights[0])
    sizes = added + parts * number, len(first.weights[1]), parts * kinds
    found = [np.empty((size, sum(members), width)) for size in sizes]
    by_level = found[0][added:].reshape(parts, number, sum(members), width)
    table, mixed, end = _columns(plain, (width,)), dict[int, Array](), 0
    for recipe, some, count in zip(recipes, prices, members, strict=True):
        span, (weights, busy, calls) = slice(end, end := end + count), recipe.weights
        place = np.array([places.get(id(price), -1) for price in some])
        level = np.array([price.level if isinstance(price.level, int) else -1 for price in some])
        family = np.array([families[price.family] for price in some])
        levels = calls[:, None] * (level == np.arange(number)[:, None])
        errors = calls[:, None] * (family == np.arange(kinds)[:, None])
        all_weights = np.concatenate([weights, levels.reshape(-1, len(some))]), busy, errors.reshape(-1, len(some))
        alike, own = np.flatnonzero(place >= 0), np.flatnonzero(place < 0).tolist()
        for whole, part, column in zip(found, all_weights, table[:, place[alike]], strict=True):
            whole[:, span] = (part[:, alike] @ column)[:, None]
        columns = _columns([some[i] for i in own], (count, width)).reshape(3, len(own), count * width)
        for whole, part, column in zip(found, all_weights, columns, strict=True):
            counts = np.flatnonzero(part[:, own].any(axis=1))
            whole[counts, span] += (part[counts][:, own] @ column).reshape(-1, count, width)
        for i in np.flatnonzero(level < 0).tolist():  # of more than one level
            price = some[i]
            if id(price) not in mixed:
                mixed[id(price)] = np.equal.outer(np.arange(number), price.level) * price.seconds
            for k in np.flatnonzero(calls[:, i]):
                by_level[k, :, span] += calls[k, i] * mixed[id(price)].reshape(number, -1, mixed[id(price)].shape[-1])
    every, layers = len(first.places), len(first.places) + first.layers * len(KIND_SUMS)
    return Sums(
        places=found[0][:every].reshape(every, -1),
        layers=found[0][every:layers].reshape(first.layers, len(KIND_SUMS), sum(members) * width),
        busy=found[1].reshape(first.layers, 2, sum(members) * width),
        among=found[0][layers:added].reshape(parts, len(AMONG), sum(members) * width),
        levels=found[0][added:].reshape(parts, number, sum(members) * width),
        errors=found[2].reshape(parts, kinds, sum(members) * width),
    )


def _columns(prices: Sequence[RowPrice], shape: tuple[int, ...]) -> Array:
    """``[3, prices, *shape]``: seconds, those in which arithmetic or memory is busy, seconds of error."""
    columns = np.empty((3, len(prices), *shape))
    for j, price in enumerate(prices):
        columns[0, j], columns[1, j], columns[2, j] = price.seconds, price.waits_s, price.error
    columns[1] = columns[0] - columns[1]
    columns[2] *= columns[0]
    return columns
