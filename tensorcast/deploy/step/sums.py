"""Sums over the rows of a step, of which its time is made: each is a weighted sum of rows' seconds, so that all of them
are one product of matrices."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorcast.cost.evidence import LEVELS
from tensorcast.cost.work import Array
from tensorcast.deploy.plan.plan import Collective, Row
from tensorcast.deploy.step.overlap import KIND_SUMS, PER_SEQUENCE
from tensorcast.deploy.step.pipeline_stages import place_of
from tensorcast.deploy.step.price import RowPrice, Where
from tensorcast.trace.moe import EXPERT_STAGES
from tensorcast.trace.table import Op, per_op

AMONG = ("seconds", "communication", "attention", "experts")
"""Sums of rows' seconds: of all, of collectives, of ops that run per sequence, of experts with dispatch and combine,
which take the tokens of all data-parallel ranks."""


Rows = NDArray[np.intp]
"""Positions."""


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
    """Of every row: in sums of seconds, in sums of busy seconds, and how often it runs in each part. One object for
    all recipes that add up alike."""


class _Role(NamedTuple):
    """What is added up of a row: where it runs, which of :data:`AMONG` it is in, whether it is inside the experts."""

    place: int
    among: tuple[bool, bool, bool, bool]
    chunked: bool


_roles: dict[_Role, int] = {}
"""Every role by its number: they are few."""


def _role_of(row: Row) -> int:
    """The number of a row's role."""
    if not isinstance(row, Collective):
        return _role_of_op(row)
    role = _Role(place_of(row), (True, True, False, row.group in ("dp", "ep")), bool(row.exchange))
    return _roles.setdefault(role, len(_roles))


@per_op
def _role_of_op(op: Op) -> int:
    inside = op.stage in EXPERT_STAGES
    role = _Role(place_of(op), (True, False, op.name in PER_SEQUENCE, inside), inside)
    return _roles.setdefault(role, len(_roles))


MOST_RECIPES = 4096
"""Ways to add rows up that are kept."""

_weights: dict[tuple[Hashable, ...], tuple[tuple[bool, ...], tuple[Array, Array, Array]]] = {}
"""Of a recipe's rows by what they are: which are inside the experts, and their weights."""


def recipe_of(
    rows: tuple[Row, ...], parts: tuple[RecipePart, ...], *, places: tuple[int, ...], planned: int,
    positions: Mapping[int, Mapping[str, Sequence[int]]],
) -> Recipe:
    """The recipe of ``rows``, of which the first ``planned`` are the plan's; ``positions``: as
    :class:`~tensorcast.deploy.step.overlap.Overlap` has them."""
    roles = tuple(map(_role_of, rows))
    overlapping = tuple([
        (kind, *((name, *where) for name, where in positions[kind].items())) for kind in sorted(positions)
    ])
    key = roles, tuple([part[1:] for part in parts]), places, planned, overlapping
    if (found := _weights.get(key)) is None:
        while len(_weights) >= MOST_RECIPES:
            del _weights[next(iter(_weights))]
        every, kinds, count = list(_roles), sorted(positions), len(rows)
        own = [every[number] for number in roles]
        by_place = np.zeros((len(places), count))
        by_place[[places.index(role.place) for role in own[:planned]], range(planned)] = 1.0
        by_layer, busy = np.zeros((len(kinds), len(KIND_SUMS), count)), np.zeros((len(kinds), 2, count))
        for j, kind in enumerate(kinds):
            for name, there in positions[kind].items():
                by_layer[j, KIND_SUMS.index(name), there] = 1.0
                busy[j, int(name == "shared"), there] = float(name not in ("rest", "before"))
        runs = np.zeros((len(parts), count))
        for k, part in enumerate(parts):
            runs[k, list(part.where)] = part.calls
        among = np.array([role.among for role in own], dtype=float).T
        seconds = [by_place, by_layer.reshape(-1, count), (runs[:, None] * among).reshape(-1, count)]
        weights = np.concatenate(seconds), busy.reshape(-1, count), runs
        found = _weights[key] = tuple([role.chunked for role in own]), weights
    return Recipe(rows, parts, places, len(positions), *found)


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
    squares: Array | None = None
    """Instead of the ``errors``, where all parts are at the same cases: of each pair of :func:`pairs_of` parts the
    product of their errors, added up over families."""

    def at(self, where: Where, parts: slice = slice(None)) -> Sums:
        """Those of some of the cases, where there is more than one, and of some of the ``parts``: of later ones alone
        nothing by place and layer."""
        every = where is None or self.places.ndim == 1 or self.places.shape[-1] == 1
        found = {}
        for name, values in vars(self).items():
            if values is not None:
                some = values[parts] if name in ("among", "levels", "errors") else values[:0] if parts.start else values
                found[name] = some if every else some[..., where]
        return Sums(**found)

    def squared(self) -> Sums:
        """With :attr:`squares` instead of errors: fewer numbers where few parts have errors of many families."""
        found = [(self.errors[i] * self.errors[j]).sum(axis=0) for i, j in pairs_of(len(self.errors))]
        return replace(self, errors=self.errors[:, :0], squares=np.array(found))


def pairs_of(parts: int) -> list[tuple[int, int]]:
    """Every two parts of a step, a part and itself among them."""
    return [(i, j) for i in range(parts) for j in range(i, parts)]


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
    recipes: Sequence[Recipe], prices: Sequence[RowPrice], places: Sequence[Rows], families: Mapping[str, int],
    members: Sequence[int],
) -> Sums:
    """Of the rows of several steps, of so many ``members`` each, whose recipes add up alike: members, one step's after
    another's, and cases together are the last axis. ``prices``: of all rows, each once, and at which ``places`` those
    of each step's rows stand. Those that are the same for all members are in a table that each step's sums are read
    from."""
    axes = [np.shape(price.seconds) for price in prices]
    width = max([1, *(shape[-1] for shape in axes if shape)])
    alike = np.array([len(shape) < 2 for shape in axes])
    column = np.cumsum(alike) - 1
    level_of = np.array([price.level if isinstance(price.level, int) else -1 for price in prices])
    family_of = np.array([families[price.family] for price in prices])
    first, kinds, number = recipes[0], len(families), len(LEVELS)
    parts, added = len(first.parts), len(first.weights[0])
    sizes = added + parts * number, len(first.weights[1]), parts * kinds
    found = [np.empty((size, sum(members), width)) for size in sizes]
    by_level = found[0][added:].reshape(parts, number, sum(members), width)
    table = _columns([prices[i] for i in np.flatnonzero(alike).tolist()], (width,))
    mixed, end = dict[int, Array](), 0
    for recipe, place, count in zip(recipes, places, members, strict=True):
        span, (weights, busy, calls) = slice(end, end := end + count), recipe.weights
        level, shared = level_of[place], alike[place]
        levels = calls[:, None] * (level == np.arange(number)[:, None])
        errors = calls[:, None] * (family_of[place] == np.arange(kinds)[:, None])
        all_weights = np.concatenate([weights, levels.reshape(-1, len(place))]), busy, errors.reshape(-1, len(place))
        for whole, part, values in zip(found, all_weights, table[:, column[place[shared]]], strict=True):
            whole[:, span] = (part[:, shared] @ values)[:, None]
        own = np.flatnonzero(~shared)
        columns = _columns([prices[i] for i in place[own].tolist()], (count, width)).reshape(3, len(own), count * width)
        for whole, part, values in zip(found, all_weights, columns, strict=True):
            counts = np.flatnonzero(part[:, own].any(axis=1))
            whole[counts, span] += (part[counts][:, own] @ values).reshape(-1, count, width)
        for i in np.flatnonzero(level < 0).tolist():  # of more than one level
            which, price = int(place[i]), prices[place[i]]
            if which not in mixed:
                mixed[which] = np.equal.outer(np.arange(number), price.level) * price.seconds
            for k in np.flatnonzero(calls[:, i]):
                by_level[k, :, span] += calls[k, i] * mixed[which].reshape(number, -1, mixed[which].shape[-1])
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
