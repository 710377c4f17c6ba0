"""Many steps, of any models, devices, engines and layouts, priced as one: their sums alone.

NumPy takes as long for a few numbers as for thousands, and a table of deployments has ten thousands of steps of some
dozen rows each. Every step is a run of *cases*, its batches at their sizes; rows whose kernels differ in sizes alone
are priced as one row at the cases of all of them, whatever they run on.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from tensorcast.cost.formulas import Context
from tensorcast.cost.kernels.corrections import BatchedCorrections, SeveralCorrections
from tensorcast.cost.work import Array, Size
from tensorcast.deploy.plan.plan import Collective
from tensorcast.deploy.step.alike import Content, Contents, content_of, joined_op
from tensorcast.deploy.step.price import StepPrice, pick
from tensorcast.deploy.step.row_prices import Pending, RowPricer, Works, side_by_side
from tensorcast.deploy.step.sizes import Batches
from tensorcast.deploy.step.step import Asked, Step, prices
from tensorcast.deploy.step.sums import sums_at
from tensorcast.trace.dims import Sizes
from tensorcast.trace.table import Op, kept_beside

Places = NDArray[np.int_]

PLAIN, ROUTED = ("B", "S", "P", "verify"), ("R", "E", "X", "hit", "capacity")
"""Sizes of a case: of every row, and of those that hang on how tokens fall on experts."""


MOST = 3 << 19
"""Prices of rows at cases, from which on steps are priced before others ask: some hundred megabytes with what they are
made of."""


def sums_of_many(asked: Sequence[Asked]) -> list[StepPrice]:
    """The price of each step as :func:`~tensorcast.deploy.step.step.prices` gives it, without those of its rows."""
    many, found = Many(), dict[int, StepPrice]()
    machines: dict[Hashable, int] = {}
    of = [machines.setdefault(_machine(step.pricer), len(machines)) for step, *_ in asked]
    for i in sorted(range(len(asked)), key=of.__getitem__):
        step, batch, new, past = asked[i]
        sizes = step.sizes.batches(batch, new, past)
        if sizes.whole.points is not None:  # layers that load their experts differently are priced apart
            found[i] = next(prices([asked[i]]))
        else:
            many.ask(i, step, batch, sizes)
        if many.prices >= MOST:
            found |= many.found()
            many = Many()
    found |= many.found()
    return [found[i] for i in range(len(asked))]


def _machine(pricer: RowPricer) -> Hashable:
    """What tells pricers apart beside a layout."""
    return id(pricer.device), id(pricer.engine), id(pricer.corrections), pricer.graph_tokens


class _Row(NamedTuple):
    """Of a step a row that is priced as others are: so many ``cases`` from ``case`` on, its numbers to be put from
    ``place`` on."""

    content: Content
    pricer: RowPricer
    cases: int
    case: int
    place: int


@dataclass(eq=False)
class _Alike:
    """Rows whose kernels differ in sizes alone, at ``at`` beside these; ``family`` when they are priced."""

    at: Context
    rows: list[_Row] = field(default_factory=list)
    family: str = ""


class _Priced(NamedTuple):
    """Rows as one, whose corrections are asked for, and the places of its numbers."""

    alike: _Alike
    op: Op
    at: Context
    pricer: RowPricer
    works: Works
    places: Places


@dataclass(eq=False)
class _Step:
    """A step at cases of this ``shape``. Its rows of one price are priced once: ``prices`` are those, their numbers
    standing from ``place`` on, and ``rows`` says of each row of the recipe which of these it has."""

    step: Step
    batch: Size
    at: Batches
    shape: tuple[int, ...]
    place: int
    rows: list[int] = field(default_factory=list)
    prices: list[_Alike | Pending] = field(default_factory=list)


class Many:
    """Steps that ask one after another, and are priced together."""

    def __init__(self) -> None:
        self._steps: dict[int, _Step] = {}
        self._alike: dict[tuple[Hashable, ...], _Alike] = {}
        self._corrections: dict[int, BatchedCorrections] = {}
        self._sizes = list[tuple[int, tuple[int, ...], list[Size]]]()
        self._case = self.prices = 0
        """Cases, and prices of rows at these, of all that have asked."""

    def ask(self, number: int, step: Step, batch: Size, at: Batches) -> None:
        """A step at these sizes, called by a ``number``; steps on one machine ask one after another."""
        contexts = [at.whole] if at.chunk is at.whole else [at.whole, at.chunk]
        sizes = [[_size(context, name) for name in (*PLAIN, *ROUTED)] for context in contexts]
        shape = np.broadcast_shapes(*(np.shape(size) for one in sizes for size in one))
        cases, first = math.prod(shape), self._case
        for one in sizes:
            self._sizes.append((self._case, shape, one))
            self._case += cases
        recipe, known = step.recipe(at.draft is not None), kept_beside(step.table, Contents)
        keys = [_beside_ops(step.pricer, context) for context in contexts]
        mine, found = dict[Hashable, int](), _Step(step, batch, at, shape, self.prices)
        self._steps[number] = found
        for row, inside in zip(recipe.rows, recipe.chunked, strict=True):
            where = int(inside and len(contexts) > 1)
            content = None if isinstance(row, Collective) else content_of(row, known)
            name: Hashable = where, content.number if content is not None else _equal(cast(Collective, row))
            place = mine.setdefault(name, len(mine))
            found.rows.append(place)
            if place < len(found.prices):
                continue
            if isinstance(row, Collective):
                found.prices.append(step.pricer.collective(row, contexts[where], self._of(step.pricer)))
                continue
            assert content is not None
            key: tuple[Hashable, ...] = content.like, content.routed and (True, step.pricer.one_call), *keys[where]
            if row.name == "grouped_matmul":
                key = *key, *_of_experts(row, step.pricer, contexts[where])
            if key not in self._alike:
                self._alike[key] = _Alike(contexts[where])
            alike = self._alike[key]
            alike.rows.append(_Row(content, step.pricer, cases, first + where * cases, self.prices + place * cases))
            found.prices.append(alike)
        self.prices += cases * len(mine)

    def _of(self, pricer: RowPricer) -> BatchedCorrections:
        own = pricer.corrections
        if id(own) not in self._corrections:
            self._corrections[id(own)] = BatchedCorrections(own)
        return self._corrections[id(own)]

    def found(self) -> dict[int, StepPrice]:
        """What the steps that have asked cost, by their numbers."""
        columns = np.empty((len(PLAIN) + len(ROUTED), self._case))
        for first, shape, sizes in self._sizes:
            for column, size in zip(columns, sizes, strict=True):
                column[first : first + math.prod(shape)].reshape(shape)[...] = size
        cases = dict(zip((*PLAIN, *ROUTED), columns, strict=True))
        numbers = np.empty((4, self.prices))
        later = list[_Priced]()
        for alike in self._alike.values():
            one = self._asked(alike, cases)
            if any(known is not None for _, known in one.works):
                later.append(one)
            else:  # nothing to wait for
                _price(one, numbers)
        for corrections in self._corrections.values():
            corrections.find()
        while later:
            _price(later.pop(), numbers)
        return {number: _step_price(one, numbers) for number, one in self._steps.items()}

    def _asked(self, alike: _Alike, cases: Mapping[str, Array]) -> _Priced:
        """All rows as one, at all their cases."""
        first, lengths = alike.rows[0], np.array([row.cases for row in alike.rows])
        starts = np.cumsum(lengths) - lengths
        every = np.arange(lengths.sum())
        which = every + np.repeat(np.array([row.case for row in alike.rows]) - starts, lengths)
        table = np.array([row.content.coefs for row in alike.rows])
        same = (table == table[0]).all(axis=0)
        columns = [float(c[0]) if one else np.repeat(c, lengths) for c, one in zip(table.T, same, strict=True)]
        names = (*PLAIN, *ROUTED) if first.content.routed else PLAIN
        own: dict[str, Any] = {name: cases[name][which] for name in names}
        sizes = Sizes(**{name: own.pop(name) for name in ("B", "S", "P", "R", "E", "X") if name in own})
        at, op = replace(alike.at, sizes=sizes, stages=1, **own), joined_op(first.content, columns)
        corrections: BatchedCorrections | SeveralCorrections
        runs = [[*run] for _, run in groupby(alike.rows, lambda row: _machine(row.pricer))]
        calls = [sum(row.cases for row in run) for run in runs]
        pricers = [run[0].pricer for run in runs]
        pricer, corrections = pricers[0], self._of(pricers[0])
        if len(runs) > 1:
            pricer = side_by_side(pricers, calls)
            corrections = SeveralCorrections([self._of(one) for one in pricers], calls)
        if op.name == "grouped_matmul":
            each = {name: [getattr(row.pricer, name) for row in alike.rows] for name in ("ep", "etp")}
            sources = {name: [row.pricer.sources[name] for row in alike.rows] for name in first.pricer.sources}
            laid, from_whom = (
                {name: np.repeat(np.array(values, dtype=float), lengths) for name, values in some.items()}
                for some in (each, sources)
            )
            pricer = replace(pricer, **cast(Any, laid), sources=from_whom)
        places = every + np.repeat(np.array([row.place for row in alike.rows]) - starts, lengths)
        return _Priced(alike, op, at, pricer, pricer.works(op, at, corrections), places)


def _price(one: _Priced, numbers: Array) -> None:
    """Put what rows cost in their places."""
    took = one.pricer.seconds(one.op, one.at, one.works)
    one.alike.family = took.family
    for column, values in zip(numbers, (took.seconds, took.waits_s, took.error, took.level), strict=True):
        column[one.places] = values


def _step_price(one: _Step, numbers: Array) -> StepPrice:
    """From the numbers of a step's rows."""
    at, cases, families = one.at, math.prod(one.shape), list[str]()
    mine = numbers[:, one.place : one.place + cases * len(one.prices)].reshape(4, len(one.prices), *one.shape)
    for place, price in enumerate(one.prices):
        if isinstance(price, _Alike):
            families.append(price.family)
            continue
        found = price()
        families.append(found.family)
        for column, values in zip(mine, (found.seconds, found.waits_s, found.error, found.level), strict=True):
            column[place] = values
    recipe = one.step.recipe(at.draft is not None)
    own = mine[:, one.rows]
    if at.chunk is not at.whole:
        own[:2, recipe.chunked] *= at.chunks
    sums = sums_at(recipe, own.reshape(4, len(one.rows), cases), [families[place] for place in one.rows], one.shape)
    first = sum(not part.drafts for part in recipe.parts)
    here, draft = sums.at(at.own, slice(first)), sums.at(at.draft, slice(first, None))
    hidden = one.step.overlap.hidden(here.layers, here.busy, pick(at.whole.sizes.tokens, at.own), at.dual)
    return one.step.composed(here, draft, hidden, at, one.batch)


def _size(at: Context, name: str) -> Size:
    found: Size = getattr(at if name in ("verify", "hit", "capacity") else at.sizes, name)
    return found


def _beside_ops(pricer: RowPricer, at: Context) -> tuple[Hashable, ...]:
    """What kernels depend on beside ops and sizes."""
    return pricer.device.whole_tiles, at.decode, at.has_fp4, at.mxfp4, at.backend, at.masked_skips, float(at.kv_bytes)


def _of_experts(op: Op, pricer: RowPricer, at: Context) -> tuple[Hashable, ...]:
    """What fitted models of experts' kernels are asked by beside sizes of cases."""
    facts, dtype = pricer.table.facts, at.precision(op, op.outputs[0]).name
    return (
        pricer.corrections.variant("grouped_gemm", dtype, at.backend), pricer.balanced, pricer.gated, *pricer.sources,
        facts.moe_hidden_size, facts.top_k, facts.moe_intermediate_size, facts.num_experts, facts.fused_experts,
    )


def _equal(row: Collective) -> Hashable:
    """What collectives of one price have in common."""
    return row.op, row.group, row.ranks, row.extent, float(row.scale), row.per, *sorted(row.exchange.items())
