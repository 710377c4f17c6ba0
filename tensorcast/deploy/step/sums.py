"""Sums over the rows of a step, of which its time is made: each is a weighted sum of rows' seconds, so that all of them
are one product of matrices."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorcast.cost.evidence import LEVELS
from tensorcast.cost.work import Array, Size
from tensorcast.deploy.plan.plan import Row
from tensorcast.deploy.step.overlap import KIND_SUMS, PER_SEQUENCE
from tensorcast.deploy.step.pipeline_stages import launches_of, place_of
from tensorcast.deploy.step.price import RowPrice, Where, pick
from tensorcast.deploy.step.sizes import Place
from tensorcast.trace.moe import EXPERT_STAGES
from tensorcast.trace.table import EVERY_TOKEN, Op, per_op

AMONG = ("seconds", "communication", "attention", "experts")
"""Sums of rows' seconds: of all, of collectives, of ops that run per sequence, of experts with dispatch and combine,
which take the tokens of all data-parallel ranks."""


Rows = NDArray[np.intp]
"""Positions."""


class RecipePart(NamedTuple):
    """Rows that run equally often up to their ``calls``, by position; ``drafts``: at the sizes of drafts."""

    where: tuple[int, ...]
    calls: tuple[int, ...]
    drafts: bool = False


@dataclass(frozen=True, eq=False)
class Recipe:
    """What is added up of the prices of a step's rows: by place in the plan, as a layer of each kind overlaps, and of
    each of the ``parts``."""

    parts: tuple[RecipePart, ...]
    places: tuple[int, ...]
    """Layer kinds, and places outside the layers."""
    layers: int
    """Kinds of layers that overlap."""
    stand: tuple[int, ...]
    """Of each row its :class:`~tensorcast.deploy.step.sizes.Place`."""
    weights: tuple[Array, Array, Array]
    """Of every row: in sums of seconds, in sums of busy seconds, and how often it runs in each part. One object for
    all recipes that add up alike."""
    ops: tuple[Op | None, ...]
    """Of every row; none of collectives."""
    launches: dict[int, float]
    """Kernels that the host launches in one pass over the plan, by place."""


class _Role(NamedTuple):
    """What is added up of a row: where it runs, which of :data:`AMONG` it is in, whether it is inside the experts, and
    the kernels that the host launches for it."""

    place: int
    among: tuple[bool, bool, bool, bool]
    chunked: bool
    launches: float


_roles: dict[_Role, int] = {}
"""Every role by its number: they are few."""


def _role_of(row: Row) -> int:
    """The number of a row's role."""
    if isinstance(row, Op):
        return _role_of_op(row)
    among = True, True, False, row.group in ("dp", "ep")
    role = _Role(place_of(row), among, bool(row.exchange), launches_of(row))
    return _roles.setdefault(role, len(_roles))


@per_op
def _role_of_op(op: Op) -> int:
    inside = op.stage in EXPERT_STAGES
    role = _Role(place_of(op), (True, False, op.name in PER_SEQUENCE, inside), inside, launches_of(op))
    return _roles.setdefault(role, len(_roles))


MOST_RECIPES = 4096
"""Ways to add rows up that are kept."""

_weights: dict[tuple[Hashable, ...], tuple[tuple[int, ...], tuple[Array, Array, Array], dict[int, float]]] = {}
"""Of a recipe's rows by what they are: where they stand but for prompts' ends, their weights and their launches."""


def recipe_of(
    rows: tuple[Row, ...], parts: tuple[RecipePart, ...], *, places: tuple[int, ...], planned: int,
    positions: Mapping[int, Mapping[str, Sequence[int]]], ends: frozenset[int] = frozenset(),
) -> Recipe:
    """The recipe of ``rows``, of which the first ``planned`` are the plan's; ``positions``: as
    :class:`~tensorcast.deploy.step.overlap.Overlap` has them; ``ends``: kinds of layers that run on prompts' ends."""
    roles = tuple(map(_role_of, rows))
    overlapping = tuple([
        (kind, *((name, *where) for name, where in positions[kind].items())) for kind in sorted(positions)
    ])
    key = roles, parts, places, planned, overlapping
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
        launches = dict.fromkeys(places, 0.0)
        for role in own[:planned]:
            launches[role.place] += role.launches
        found = _weights[key] = tuple([int(role.chunked) for role in own]), weights, launches
    stand, weights, launches = found
    if ends:
        stand = tuple([
            inside | Place.ENDS * (row.kind in ends and EVERY_TOKEN not in row.module)
            for inside, row in zip(stand, rows, strict=True)
        ])
    ops = tuple([row if isinstance(row, Op) else None for row in rows])
    return Recipe(parts, places, len(positions), stand, weights, ops, launches)


PartSums = tuple[Array, Array, Array]
"""Of one part of the rows ``among`` (:data:`AMONG`), ``levels`` and ``errors`` (by kernel family)."""


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

    @classmethod
    def joined(cls, each: Sequence[Sums]) -> Sums:
        """Of several steps, one's cases after another's."""
        if len(each) == 1:
            return each[0]
        every = zip(*(vars(one).values() for one in each), strict=True)
        return cls(*(np.concatenate(values, axis=-1) for values in every))

    def by_part(self) -> list[PartSums]:
        """``among``, ``levels`` and ``errors`` of each part."""
        return list(zip(self.among, self.levels, self.errors, strict=True))

    def totals(self, parts: Sequence[PartSums], times: Sequence[Size]) -> Totals:
        """With the sums of all ``parts``, each as often as it runs."""
        among, levels, errors = (
            reduce(np.add, (each[i] * n for each, n in zip(parts, times, strict=True))) for i in range(3)
        )
        drafts = sum((each[0][0] * n for each, n in zip(parts[OF_PLAN:], times[OF_PLAN:], strict=True)), 0.0)
        return Totals(self.places, self.layers, self.busy, among, levels, errors, drafts)


OF_PLAN = 2
"""Parts of a recipe that are the plan's own: what every pass runs, and what hands on to the next stage."""


class Totals(NamedTuple):
    """Sums of a step's rows at every batch: by place and layer as in :class:`Sums`, the others of all parts as often as
    these run there; and the seconds of parts beside the plan, ``drafts``."""

    places: Array
    layers: Array
    busy: Array
    among: Array
    levels: Array
    errors: Array
    drafts: Size


def sums_at(recipe: Recipe, numbers: Array, families: Sequence[int] | Rows, kinds: int) -> Sums:
    """Of a recipe's rows at cases: ``numbers [4, rows, cases]`` are seconds, those in which neither arithmetic nor
    memory is busy, relative errors and levels; ``families``: which of so many ``kinds`` each row is of."""
    weights, busy, calls = recipe.weights
    seconds, waits, errors, levels = numbers
    (parts, rows), cases = calls.shape, seconds.shape[-1]
    of_family = np.zeros((parts, kinds, rows))
    of_family[:, families, range(rows)] = calls
    by_level = np.where(levels == np.arange(len(LEVELS))[:, None, None], seconds, 0.0)
    every, layered, places = weights @ seconds, recipe.layers, len(recipe.places)
    layers = places + layered * len(KIND_SUMS)
    return Sums(
        places=every[:places], layers=every[places:layers].reshape(layered, len(KIND_SUMS), cases),
        busy=(busy @ (seconds - waits)).reshape(layered, 2, cases),
        among=every[layers:].reshape(parts, len(AMONG), cases), levels=(calls @ by_level).swapaxes(0, 1),
        errors=of_family @ (errors * seconds),
    )


class _What(NamedTuple):
    """How many places, kinds of layers, parts and kernel families rows are added up by."""

    places: int
    kinds: int
    parts: int
    families: int

    def apart(self, values: NDArray[Any]) -> Sums:
        """``values [sums, ...]`` by what they are."""
        (count, kinds, parts, families), shape = self, values.shape[1:]
        sizes = count, kinds * len(KIND_SUMS), parts * len(AMONG), parts * len(LEVELS), kinds * 2
        places, layers, among, levels, busy, errors = np.split(values, np.cumsum(sizes))
        return Sums(
            places, layers.reshape(kinds, len(KIND_SUMS), *shape), busy.reshape(kinds, 2, *shape),
            among.reshape(parts, len(AMONG), *shape), levels.reshape(parts, len(LEVELS), *shape),
            errors.reshape(parts, families, *shape),
        )


@cache
def _in_totals(what: _What, count: int) -> tuple[list[int], list[list[int]], list[tuple[int, ...]]]:
    """Of each of so many sums, which part of the rows it is of (0: of one pass over the plan) and in which totals it
    is; and the shapes of totals, one after another."""
    numbers = what.apart(np.arange(count))
    part_of, totals_of = [0] * count, [list[int]() for _ in range(count)]
    shapes, end = list[tuple[int, ...]](), 0
    for values in (numbers.places, numbers.layers, numbers.busy):
        for total, i in enumerate(values.ravel().astype(int).tolist(), end):
            totals_of[i].append(total)
        shapes.append(values.shape)
        end += values.size
    for values in (numbers.among, numbers.levels, numbers.errors):
        for part, each in enumerate(values.astype(int).tolist(), 1):
            for total, i in enumerate(each, end):
                part_of[i], totals_of[i] = part, [total]
        shapes.append(values.shape[1:])
        end += values.shape[1]
    for i in numbers.among[OF_PLAN:, 0].astype(int).tolist():
        totals_of[i].append(end)
    return part_of, totals_of, [*shapes, ()]


@dataclass(frozen=True)
class SumsOfSteps:
    """Sums of the rows of several steps, of so many ``members`` each, whose recipes add up alike: ``shared [sums,
    steps, cases]`` of rows that cost all members of a step the same, ``own [varied, members, cases]`` of the others,
    where there are any: ``varied`` says which sums these are. :meth:`_What.apart` takes them apart."""

    recipe: Recipe
    families: int
    members: Sequence[int]
    shared: Array
    own: Array
    varied: Rows

    @property
    def what(self) -> _What:
        """How many of what these are sums of."""
        return _What(len(self.recipe.places), self.recipe.layers, len(self.recipe.parts), self.families)

    def of_members(self) -> Sums:
        """Of all members, one step's after another's, and cases together as the last axis."""
        every = np.repeat(self.shared, self.members, axis=1)
        every[self.varied] += self.own
        return self.what.apart(every.reshape(len(every), -1))


class TotalsOfSteps:
    """Totals of members of several steps, at batches that each run every part of the rows at one of the part's
    ``cases`` and so many ``times``: numbers, or arrays of as many batches."""

    def __init__(self, sums: SumsOfSteps, cases: Sequence[Where], times: Sequence[Size]) -> None:
        self._width = sums.shared.shape[-1]
        part_of, totals_of, self._shapes = _in_totals(sums.what, len(sums.shared))
        every = [np.arange(self._width) if case is None else np.atleast_1d(case) * (self._width > 1) for case in cases]
        # what is of one pass over the plan runs once, where its first part does
        self._cases, self._times = [every[0], *every], [1.0, *times]
        self._batches, steps = len(every[0]), np.arange(len(sums.members))[:, None]
        self._step_of = np.repeat(np.arange(len(steps)), sums.members)
        found = np.zeros((sum(map(math.prod, self._shapes)), len(steps), self._batches))
        some = np.flatnonzero(sums.shared.any(axis=(1, 2))).tolist()
        shared = [(sums.shared[i].ravel(), part_of[i], totals_of[i]) for i in some]
        self._add(found, shared, steps, np.arange(self._batches))
        self._shared = found.reshape(len(found), -1)
        own = zip(sums.varied.tolist(), sums.own, strict=True)
        self._own = [(values.ravel(), part_of[i], totals_of[i]) for i, values in own]

    def _add(
        self, found: Array, sums: Sequence[tuple[Array, int, list[int]]], first: NDArray[np.intp], batch: Rows
    ) -> None:
        """To totals ``found`` the ``sums`` of several steps or members, each of a part of the rows and in some totals:
        of the ``first`` of these, at batches."""
        where = [first * self._width + case[batch] for case in self._cases]
        often = [pick(n, batch) for n in self._times]
        for values, part, totals in sums:
            there = values[where[part]] * often[part]
            for total in totals:
                found[total] += there

    def at(self, member: Rows, batch: Rows) -> Totals:
        """Of members ``[entries, 1]`` at batches ``[entries, n]``."""
        found = self._shared.take(self._step_of[member] * self._batches + batch, axis=1)
        self._add(found, self._own, member, batch)
        ends = np.cumsum([math.prod(shape) for shape in self._shapes])[:-1]
        each = zip(np.split(found, ends), self._shapes, strict=True)
        return Totals(*(values.reshape(*shape, *found.shape[1:]) for values, shape in each))


def sums_of_steps(
    recipes: Sequence[Recipe], prices: Sequence[RowPrice], places: Sequence[Rows], families: Mapping[str, int],
    members: Sequence[int],
) -> SumsOfSteps:
    """Of the rows of several steps, of so many ``members`` each, whose recipes add up alike. ``prices``: of all rows,
    each once, and at which ``places`` those of each step's rows stand."""
    axes = [np.shape(price.seconds) for price in prices]
    width = max([1, *(shape[-1] for shape in axes if shape)])
    alike = np.array([len(shape) < 2 for shape in axes])
    column = np.cumsum(alike) - 1
    level_of = np.array([price.level if isinstance(price.level, int) else -1 for price in prices])
    family_of = np.array([families[price.family] for price in prices])
    first, kinds, number = recipes[0], len(families), len(LEVELS)
    parts, added = len(first.parts), len(first.weights[0])
    ends = np.cumsum([0, added + parts * number, len(first.weights[1]), parts * kinds]).tolist()
    spans, weights, which = list(pairwise(ends)), list[tuple[Array, ...]](), np.zeros(ends[-1], dtype=bool)
    by_level = added + np.arange(parts * number).reshape(parts, number)
    for recipe, place in zip(recipes, places, strict=True):
        (of_rows, busy, calls), level, own = recipe.weights, level_of[place], ~alike[place]
        levels = calls[:, None] * (level == np.arange(number)[:, None])
        errors = calls[:, None] * (family_of[place] == np.arange(kinds)[:, None])
        weights.append((
            np.concatenate([of_rows, levels.reshape(-1, len(place))]), busy, errors.reshape(-1, len(place))
        ))
        for span, part in zip(spans, weights[-1], strict=True):
            which[slice(*span)] |= part[:, own].any(axis=1)
        which[by_level[calls[:, own & (level < 0)].any(axis=1)]] = True
    varied = np.flatnonzero(which)
    shared, own_sums = np.empty((ends[-1], len(recipes), width)), np.empty((len(varied), sum(members) * width))
    table = _columns([prices[i] for i in np.flatnonzero(alike).tolist()], (width,))
    # seconds by level, where a row's are of more than one
    mixed = {i: np.equal.outer(np.arange(number), prices[i].level) * prices[i].seconds
             for i in np.flatnonzero(level_of < 0).tolist()}
    end = 0
    for step, (recipe, place, count) in enumerate(zip(recipes, places, members, strict=True)):
        of_members, same = slice(end, end := end + count * width), alike[place]
        own = np.flatnonzero(~same)
        columns = _columns([prices[i] for i in place[own].tolist()], (count, width)).reshape(3, len(own), count * width)
        both = zip(spans, weights[step], table[:, column[place[same]]], columns, strict=True)
        for (start, stop), part, values, own_values in both:
            shared[start:stop, step] = part[:, same] @ values
            here = slice(*np.searchsorted(varied, (start, stop)))
            np.matmul(part[varied[here] - start][:, own], own_values, out=own_sums[here, of_members])
        calls, several = recipe.weights[2], level_of[place] < 0
        for some, shape in ((several & same, (number, width)), (several & ~same, (number, count, width))):
            if not some.any():
                continue
            runs, each = calls[:, some].any(axis=1), [np.broadcast_to(mixed[i], shape) for i in place[some].tolist()]
            found = np.tensordot(calls[runs][:, some], np.stack(each).reshape(len(each), number, -1), 1)
            if len(shape) == 2:
                shared[by_level[runs], step] += found
            else:
                own_sums[np.searchsorted(varied, by_level[runs]), of_members] += found
    return SumsOfSteps(first, kinds, members, shared, own_sums.reshape(len(varied), sum(members), width), varied)


def _columns(prices: Sequence[RowPrice], shape: tuple[int, ...]) -> Array:
    """``[3, prices, *shape]``: seconds, those in which arithmetic or memory is busy, seconds of error."""
    columns = np.empty((3, len(prices), *shape))
    for j, price in enumerate(prices):
        columns[0, j], columns[1, j], columns[2, j] = price.seconds, price.waits_s, price.error
    columns[1] = columns[0] - columns[1]
    columns[2] *= columns[0]
    return columns
