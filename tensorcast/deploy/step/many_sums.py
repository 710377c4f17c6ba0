"""Steps whose rows are added up alike, composed as one from the prices of their rows."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tensorcast.cost.work import Array, Size
from tensorcast.deploy.step.price import StepPrice, Tally, Where
from tensorcast.deploy.step.sizes import Batches, Place
from tensorcast.deploy.step.step import Overheads, Step
from tensorcast.deploy.step.sums import Recipe, Sums, sums_at

Places = NDArray[np.int_]


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

    def composed(self, cases: Mapping[str, Array]) -> Iterator[tuple[int, StepPrice]]:
        """Steps by their numbers. ``cases``: sizes of all cases."""
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
            yield from _composed([self._steps[i] for i in order], Sums.joined(sums), tokens)

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


def _composed(steps: Sequence[StepCases], sums: Sums, tokens: Array) -> Iterator[tuple[int, StepPrice]]:
    """Steps that are composed alike; ``sums``: theirs, one step's cases after another's; ``tokens`` of all cases."""
    first = steps[0]
    starts = np.cumsum([0, *(one.cases for one in steps)])
    own = [one.stand(one.at.own) for one in steps]
    shapes = [one.shape for one in own]

    def column(values: Sequence[Any]) -> Any:
        if not any(map(np.ndim, values)) and len({*values}) == 1:
            return values[0]
        return np.concatenate([np.broadcast_to(v, shape).ravel() for v, shape in zip(values, shapes, strict=True)])

    def placed(where: Sequence[Places]) -> Places:
        return np.concatenate([start + one.ravel() for start, one in zip(starts, where, strict=False)])

    later, standing = sum(not part.drafts for part in first.recipe.parts), placed(own)
    drafting = standing if first.at.draft is None else placed([one.stand(one.at.draft) for one in steps])
    here, drafts = sums.at(standing, slice(later)), sums.at(drafting, slice(later, None))
    tokens = np.concatenate([tokens[one.case : one.case + one.cases] for one in steps])[standing]
    parts = {name: column([getattr(one.at, name) for one in steps]) for name in ("pp", "micro", "dual", "halves")}
    streams = column([one.step.overlap.stream_tokens for one in steps])
    hidden = replace(first.step.overlap, stream_tokens=streams).hidden(here.layers, here.busy, tokens, parts["dual"])
    at = first.at._replace(**parts)
    totals = here.totals([*here.by_part(), *drafts.by_part()], first.step.times(at))
    spent = Overheads(*map(column, zip(*[one.step.overheads for one in steps], strict=True)))
    price, end = first.step.composed(totals, hidden, at, column([one.batch for one in steps]), spent=spent), 0
    for one, shape in zip(steps, shapes, strict=True):
        some = slice(end, end := end + math.prod(shape))
        yield one.number, _some(price, some, shape)


def _some(price: StepPrice, some: slice, shape: tuple[int, ...]) -> StepPrice:
    """Some batches of a price, in a shape of their own."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cut(one) for name, one in value.items()}
        return value[..., some].reshape(*value.shape[:-1], *shape)[()] if np.ndim(value) else value

    numbers = {name: cut(value) for name, value in vars(price).items() if name not in ("parts", "tally")}
    return replace(price, tally=Tally(*map(cut, price.tally)), **numbers)
