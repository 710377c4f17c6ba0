"""Steps whose rows are added up alike, composed as one from the prices of their rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tensorcast.cost.evidence import LEVELS
from tensorcast.cost.work import Array, Size
from tensorcast.deploy.step.pipeline_stages import launching
from tensorcast.deploy.step.price import Overheads, StepPrice, Tally, Where
from tensorcast.deploy.step.sizes import Batches, Place
from tensorcast.deploy.step.step import Step
from tensorcast.deploy.step.sums import AMONG, Recipe, Sums, sums_at

Places = NDArray[np.int_]


class StepPrices:
    """Prices of steps, of those that were composed as one side by side: a step's batches are some entries of theirs."""

    def __init__(self) -> None:
        self._together: list[tuple[StepPrice, int]] = []
        """Each with its number of entries, the last axis of its arrays."""
        self._places: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        """By number of a step: of which of these its price is a part, from which entry on, the shape of its batches."""

    def add(self, price: StepPrice, numbers: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> None:
        """Steps of these ``numbers`` with batches of these ``shapes``, one after another in a ``price``."""
        end = 0
        for number, shape in zip(numbers, shapes, strict=True):
            self._places[number] = len(self._together), end, shape
            end += math.prod(shape)
        self._together.append((price, end))

    def add_one(self, price: StepPrice, number: int) -> None:
        """A step by itself."""
        shape = np.shape(price.seconds)

        def flat(value: Any) -> Any:
            axes = np.shape(value)[: max(np.ndim(value) - len(shape), 0)]
            return np.broadcast_to(value, (*axes, *shape)).reshape(*axes, -1)

        self.add(_each(price, flat), [number], [shape])

    def __iter__(self) -> Iterator[StepPrice]:
        """Each step's own."""
        for _, (i, first, shape) in sorted(self._places.items()):
            some = slice(first, first + math.prod(shape))
            yield _each(self._together[i][0], partial(_cut, some=some, shape=shape))

    @property
    def first(self) -> Places:
        """Of each step its first entry among all."""
        starts = np.cumsum([0, *(count for _, count in self._together)])
        return np.array([starts[i] + first for _, (i, first, _) in sorted(self._places.items())], dtype=int)

    def at(self, entries: Places) -> StepPrice:
        """Some ``entries`` among all, in their shape; without errors by family."""
        return _each(self._whole, lambda value: value[..., entries])

    @cached_property
    def _whole(self) -> StepPrice:
        """All, when all are there."""
        prices, shapes = zip(*((price, (count,)) for price, count in self._together), strict=True)
        names = [field.name for field in fields(StepPrice) if field.name not in ("parts", "tally")]
        tally = {name: column([getattr(one.tally, name) for one in prices], shapes) for name in AMONG}
        evidence: dict[str, Size] = {
            kind: column([one.tally.evidence[kind] for one in prices], shapes) for kind in LEVELS
        }
        return StepPrice(
            parts=(), tally=Tally(errors=np.empty((0, sum(*zip(*shapes, strict=True)))), evidence=evidence, **tally),
            **{name: column([getattr(one, name) for one in prices], shapes) for name in names},
        )


def column(values: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> Array:
    """Values of these shapes, or that broadcast to them, one after another."""
    if not any(map(np.ndim, values)):
        return np.repeat(np.array(values), [math.prod(shape) for shape in shapes])
    every = zip(values, shapes, strict=True)
    return np.concatenate([
        np.ravel(v) if np.shape(v) == shape else np.full(math.prod(shape), v) if np.ndim(v) == 0
        else np.broadcast_to(v, shape).ravel() for v, shape in every
    ])


def _each(price: StepPrice, change: Callable[[Any], Any]) -> StepPrice:
    """A price with all of its numbers changed, without those of its rows."""
    numbers = {name: change(value) for name, value in vars(price).items() if name not in ("parts", "tally")}
    sums = {name: change(value) for name, value in price.tally._asdict().items() if name != "evidence"}
    evidence = {kind: change(share) for kind, share in price.tally.evidence.items()}
    tally = price.tally._replace(evidence=evidence, **sums)
    return replace(price, parts=(), tally=tally, **numbers)


def _cut(value: Any, some: slice, shape: tuple[int, ...]) -> Any:
    return value[..., some].reshape(*value.shape[:-1], *shape)[()] if np.ndim(value) else value


@dataclass(eq=False)
class StepCases:
    """A step, called by a ``number``, at cases of this ``shape``, from ``case`` on. Its rows of one price are priced
    once: there are so many ``prices``, and ``rows`` says of each row of the recipe which of them it has."""

    number: int
    step: Step
    batch: Size
    at: Batches
    recipe: Recipe
    shape: tuple[int, ...]
    case: int
    rows: Places = field(init=False)
    prices: int = field(init=False)
    cases: int = field(init=False)

    def __post_init__(self) -> None:
        self.cases = math.prod(self.shape)

    @property
    def alike(self) -> Hashable:
        """What steps have in common that are composed as one, whatever their rows and engines."""
        step, at, hides, engine = self.step, self.at, self.step.overlap, self.step.pricer.engine
        kinds = [(kind, "shared" in places) for kind, places in sorted(hides.positions.items())]
        halved = (hides.contention, hides.staged, hides.shared_last) if np.any(at.dual) else None
        drafts = None if at.draft is None else (id(step.drafter), id(engine.serial_drafts))
        return (
            step.sizes.decode, at.mtp_depth, drafts, tuple([part.drafts for part in self.recipe.parts]),
            step.table.layer_kinds, engine.pipeline_split, id(engine.serial_pipeline), hides.external, hides.inside,
            halved, *kinds,
        )

    def stand(self, where: Where) -> Places:
        """Of every batch the case at which it runs, or drafts, in the shape of the batches."""
        every, wide = np.arange(self.cases).reshape(self.shape), where is not None and self.shape
        found = every[..., cast(Any, where)] if wide and self.shape[-1] > 1 else every
        sizes = self.batch, self.at.micro, self.at.halves
        return np.broadcast_to(found, np.broadcast_shapes(np.shape(found), *map(np.shape, sizes)))


class Numbers:
    """Numbers of the prices of steps' rows, ``[4, prices x cases]`` of each step: seconds, those in which neither
    arithmetic nor memory is busy, relative errors and levels; and the family of each price."""

    def __init__(self, steps: Sequence[StepCases]) -> None:
        self._steps, self.widths = steps, np.array([one.cases for one in steps], dtype=int)
        """Of each step its cases."""
        prices = np.array([one.prices for one in steps], dtype=int)
        sizes = self.widths * prices
        self._from, self._prices_from = np.cumsum(sizes) - sizes, np.cumsum(prices) - prices
        self._values, self._families = np.empty((4, sizes.sum())), np.empty(prices.sum(), dtype=int)
        self._names: dict[str, int] = {}

    def places(self, steps: Sequence[int] | Places, prices: Sequence[int] | Places) -> Places:
        """Where the numbers of a price of each step stand, the first of its cases."""
        return self._from[steps] + np.asarray(prices) * self.widths[steps]

    def put(self, places: Places, *values: Size) -> None:
        """Seconds, waits, errors and levels."""
        for column, some in zip(self._values, values, strict=True):
            column[places] = some

    def of_family(self, family: str, steps: Sequence[int] | Places, prices: Sequence[int] | Places) -> None:
        """A price of each step is of this family."""
        self._families[self._prices_from[steps] + prices] = self._names.setdefault(family, len(self._names))

    def compose(self, cases: Mapping[str, Array], prices: StepPrices) -> None:
        """Add the ``prices`` of all steps. ``cases``: sizes of all cases."""
        tokens, groups = cases["B"] * cases["S"], dict[Hashable, list[int]]()
        for i, one in enumerate(self._steps):
            groups.setdefault(one.alike, []).append(i)
        families = [
            self._families[start : start + one.prices][one.rows]
            for one, start in zip(self._steps, self._prices_from.tolist(), strict=True)
        ]
        for members in groups.values():
            added: dict[Hashable, list[int]] = {}
            for i in members:  # rows of which all is added up alike
                added.setdefault((id(self._steps[i].recipe.weights), families[i].tobytes()), []).append(i)
            kinds, of = np.unique(np.concatenate([families[some[0]] for some in added.values()]), return_inverse=True)
            sums, end = list[Sums](), 0
            for some in added.values():
                start, end = end, end + len(families[some[0]])
                sums.append(self._sums(some, of[start:end], len(kinds)))
            order = [i for some in added.values() for i in some]
            _compose([self._steps[i] for i in order], Sums.joined(sums), tokens, prices)

    def _sums(self, some: Sequence[int], families: Places, kinds: int) -> Sums:
        """Those of some of the steps at their cases, one step's after another's."""
        steps = [self._steps[i] for i in some]
        where = np.concatenate([
            (start + one.rows * one.cases)[:, None] + np.arange(one.cases)
            for one, start in zip(steps, self._from[some].tolist(), strict=True)
        ], axis=1)
        numbers, end = self._values[:, where], 0
        for one in steps:
            start, end = end, end + one.cases
            for place in {place for place in one.at.apart if place & Place.EXPERTS}:
                here = np.flatnonzero([one.at.apart[stands] == place for stands in one.recipe.stand])
                numbers[:2, here, start:end] *= np.broadcast_to(one.at.chunks[place], one.shape).ravel()
        return sums_at(steps[0].recipe, numbers, families, kinds)


def _compose(steps: Sequence[StepCases], sums: Sums, tokens: Array, prices: StepPrices) -> None:
    """Steps that are composed alike; ``sums``: theirs, one step's cases after another's; ``tokens`` of all cases."""
    first = steps[0]
    starts = np.cumsum([0, *(one.cases for one in steps)])
    own = [one.stand(one.at.own) for one in steps]
    shapes = [one.shape for one in own]

    def joined(values: Sequence[Any]) -> Any:
        if not any(map(np.ndim, values)) and len({*values}) == 1:
            return values[0]
        return column(values, shapes)

    def placed(where: Sequence[Places]) -> Places:
        return np.concatenate([start + one.ravel() for start, one in zip(starts, where, strict=False)])

    later, standing = sum(not part.drafts for part in first.recipe.parts), placed(own)
    drafting = standing if first.at.draft is None else placed([one.stand(one.at.draft) for one in steps])
    here, drafts = sums.at(standing, slice(later)), sums.at(drafting, slice(later, None))
    tokens = np.concatenate([tokens[one.case : one.case + one.cases] for one in steps])[standing]
    parts = {name: joined([getattr(one.at, name) for one in steps]) for name in ("pp", "micro", "dual", "halves")}
    streams = joined([one.step.overlap.stream_tokens for one in steps])
    hidden = replace(first.step.overlap, stream_tokens=streams).hidden(here.layers, here.busy, tokens, parts["dual"])
    at = first.at._replace(**parts)
    totals = here.totals([*here.by_part(), *drafts.by_part()], first.step.times(at))
    spent = Overheads(*map(joined, zip(*[one.step.overheads for one in steps], strict=True)))
    which = np.repeat(np.arange(len(steps)), [math.prod(shape) for shape in shapes])
    host = launching([one.step.pricer for one in steps], [one.recipe.launches for one in steps], which, tokens)
    batch = joined([one.batch for one in steps])
    price = first.step.composed(totals, hidden, at, batch, host=host, spent=spent)
    prices.add(price, [one.number for one in steps], shapes)
