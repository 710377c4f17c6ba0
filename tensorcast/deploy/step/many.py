"""Many steps, of any models, devices, engines and layouts, priced as one: their sums alone.

NumPy takes as long for a few numbers as for thousands, and a table of deployments has ten thousands of steps of some
dozen rows each. Every step is a run of *cases*, its batches at their sizes; rows whose kernels differ in sizes alone
are priced as one row at the cases of all of them, whatever they run on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from tensorcast.cost.formulas import Context
from tensorcast.cost.kernels.corrections import BatchedCorrections, SeveralCorrections
from tensorcast.cost.row_seconds import RowSeconds
from tensorcast.cost.work import Size
from tensorcast.deploy.plan.plan import Collective
from tensorcast.deploy.step.alike import Content, content_of, joined_op, numbered
from tensorcast.deploy.step.many_sums import Numbers, Places, StepCases, StepPrices
from tensorcast.deploy.step.price import RowPrice
from tensorcast.deploy.step.row_prices import FeedForward, RowPricer, side_by_side
from tensorcast.deploy.step.sizes import Batches
from tensorcast.deploy.step.step import Asked, Step, prices
from tensorcast.deploy.step.sums import Recipe
from tensorcast.trace.dims import Sizes
from tensorcast.trace.table import Op

PLAIN, ROUTED = ("B", "S", "P", "verify"), ("R", "E", "X", "hit", "capacity")
"""Sizes of a case: of every row, and of those that hang on how tokens fall on experts."""


MOSTLY_ONE = ("verify", "X")
"""Of these, sizes that are 1 where no step drafts, and no layout cuts experts: one number then, and no column."""

MOST = 1 << 20
"""Prices of rows at cases, from which on steps are priced before others ask: some hundred megabytes with what they are
made of."""


def sums_of_many(asked: Sequence[Asked]) -> StepPrices:
    """The price of each step as :func:`~tensorcast.deploy.step.step.prices` gives it, without those of its rows."""
    many, found = Many(), StepPrices()
    machines: dict[Hashable, int] = {}
    of = [machines.setdefault(_machine(step.pricer), len(machines)) for step, *_ in asked]
    for i in sorted(range(len(asked)), key=of.__getitem__):
        step, batch, new, past = asked[i]
        sizes = step.sizes.batches(batch, new, past)
        if sizes.whole.points is not None:  # layers that load their experts differently are priced apart
            found.add_one(next(prices([asked[i]])), i)
        else:
            many.ask(i, step, batch, sizes)
        if many.prices >= MOST:
            many.found(found)
            many = Many()
    many.found(found)
    return found


def _machine(pricer: RowPricer) -> tuple[Hashable, ...]:
    """What tells pricers apart beside a layout."""
    return id(pricer.device), id(pricer.engine), id(pricer.corrections), pricer.graph_tokens


@dataclass(eq=False)
class _Alike:
    """Rows whose kernels differ in sizes alone, or collectives that differ in bytes alone, at ``at`` beside these.

    Of each row its step, the case from which on its cases stand, its place among the prices of its step, and what it
    is: of an op its content's number, of a ``collective`` its bytes per unit.
    """

    at: Context
    pricer: RowPricer
    collective: Collective | None
    steps: Places
    cases: Places
    places: Places
    what: NDArray[Any]


class _Sheet(NamedTuple):
    """Ops of a recipe, those that are alike once, by their contents' ``numbers``: the kernels that they are ``like``,
    the number of the sizes that each is priced at, its ``kind`` (:func:`_kind`); which of them are ``experts``; of all
    rows the ``places`` among them, and which rows are ``collectives``."""

    numbers: Places
    like: Places
    sizes: Places
    kinds: Places
    places: Places
    experts: tuple[int, ...]
    collectives: tuple[int, ...]


def _kind(content: Content, where: int) -> int:
    """Which of the things that its step tells of itself an op's kernel hangs on, by number (:meth:`Many.ask`)."""
    return content.by_phase + 2 * content.routed + 4 * where


def _sheet_of(recipe: Recipe, at: tuple[int, ...]) -> _Sheet:
    """The sheet of a recipe; ``at``: the number of the sizes of rows by the :class:`Place` where they stand."""
    known: dict[tuple[int, ...], _Sheet] = vars(recipe).setdefault("sheets", {})
    if at not in known:
        contents, places = dict[tuple[int, int], tuple[int, Content]](), list[int]()
        for op, stands in zip(recipe.ops, recipe.stand, strict=True):
            if op is None:
                places.append(-1)
            else:
                content = content_of(op)
                places.append(contents.setdefault((content.number, at[stands]), (len(contents), content))[0])
        each = [(where, content) for (_, where), (_, content) in contents.items()]
        numbers, like, sizes, kinds = np.array([
            (content.number, content.like, where, _kind(content, where)) for where, content in each
        ], dtype=int).reshape(-1, 4).T.copy()  # fmt: skip
        known[at] = _Sheet(
            numbers, like, sizes, kinds, np.array(places),
            experts=tuple([i for i, (_, one) in enumerate(each) if one.op.name == "grouped_matmul"]),
            collectives=tuple([i for i, place in enumerate(places) if place < 0]),
        )
    return known[at]


class _Waiting(NamedTuple):
    """Rows as one that have asked for their corrections: what tells their prices then, and the places of these."""

    alike: _Alike
    price: Callable[[], RowPrice | RowSeconds]
    places: Places


class Many:
    """Steps that ask one after another, and are priced together."""

    def __init__(self) -> None:
        self._steps: list[StepCases] = []
        self._sheets: list[_Sheet] = []
        self._codes: list[Places] = []
        """Of each step's ops, those that are alike once: what tells them from others beside sizes, as a number."""
        self._machines = list[int]()
        """Of each step the number of what it runs on."""
        self._numbers: dict[Hashable, int] = {}
        self._collectives: dict[Hashable, tuple[Context, RowPricer, Collective, list[tuple[Any, ...]]]] = {}
        """By what tells them from others beside bytes, with step, first case, place and bytes of each."""
        self._corrections: dict[int, BatchedCorrections] = {}
        self._variants: dict[tuple[int, str, str], str] = {}
        self._sizes = list[tuple[int, tuple[int, ...], list[Size]]]()
        self._case = self.prices = 0
        """Cases, and prices of rows at these, of all that have asked."""

    def ask(self, number: int, step: Step, batch: Size, at: Batches) -> None:
        """A step at these sizes, called by a ``number``; steps on one machine ask one after another."""
        apart, contexts = at.apart, list({id(one): one for one in at.contexts}.values())
        numbers = tuple([next(i for i, one in enumerate(contexts) if one is at.contexts[place]) for place in apart])
        sizes = [[_size(context, name) for name in (*PLAIN, *ROUTED)] for context in contexts]
        shape = np.broadcast_shapes(*{np.shape(size) for one in sizes for size in one})
        drafting = at.draft is not None
        recipe, rows = step.recipe(drafting), step.rows(drafting)
        one = StepCases(number, step, batch, at, recipe, shape, self._case)
        for own in sizes:
            self._sizes.append((self._case, shape, own))
            self._case += one.cases
        pricer, last, sheet = step.pricer, len(self._steps), _sheet_of(recipe, numbers)
        held = pricer.held
        told = [
            self._number((beside, routed))
            for context in contexts for routed in (None, held) for beside in _beside_ops(pricer, context)
        ]
        codes = (sheet.like << 32) + np.array(told)[sheet.kinds]
        for i in sheet.experts:
            context, content = contexts[sheet.sizes[i]], numbered(sheet.numbers[i])
            more = self._of_experts(content.op, pricer, context)
            codes[i] = (content.like << 32) + self._number((told[sheet.kinds[i]], *more))
        one.rows, mine = sheet.places.copy(), dict[Hashable, int]()
        for i in sheet.collectives:
            row, where = cast(Collective, rows[i]), numbers[recipe.stand[i]]
            key, many = _of_collective(row, pricer), len(mine)
            one.rows[i] = place = mine.setdefault((*key, float(row.scale), where), len(codes) + many)
            if len(mine) > many:
                *_, every = self._collectives.setdefault(key, (contexts[where], pricer, row, []))
                every.append((last, one.case + where * one.cases, place, row.scale))
        one.prices = len(codes) + len(mine)
        self._steps.append(one)
        self._sheets.append(sheet)
        self._codes.append(codes)
        self._machines.append(self._number(_machine(pricer)))
        self.prices += one.cases * one.prices

    def _number(self, what: Hashable) -> int:
        return self._numbers.setdefault(what, len(self._numbers))

    def _of(self, pricer: RowPricer) -> BatchedCorrections:
        own = pricer.corrections
        if id(own) not in self._corrections:
            self._corrections[id(own)] = BatchedCorrections(own)
        return self._corrections[id(own)]

    def _of_experts(self, op: Op, pricer: RowPricer, at: Context) -> tuple[Hashable, ...]:
        """What fitted models of experts' kernels are asked by beside sizes of cases."""
        dtype = at.precision(op, op.outputs[0]).name
        asked = id(pricer.corrections), dtype, at.backend
        if asked not in self._variants:
            self._variants[asked] = pricer.corrections.variant("grouped_gemm", dtype, at.backend)
        return at.backend, at.masked_skips, self._variants[asked], pricer.balanced, *pricer.sources

    def found(self, prices: StepPrices) -> None:
        """Add the ``prices`` of the steps that have asked."""
        columns = np.empty((len(PLAIN) + len(ROUTED), self._case))
        for start, shape, sizes in self._sizes:
            for column, size in zip(columns, sizes, strict=True):
                column[start : start + math.prod(shape)].reshape(shape)[...] = size
        cases, numbers = dict[str, Any](zip((*PLAIN, *ROUTED), columns, strict=True)), Numbers(self._steps)
        for name in MOSTLY_ONE:
            if self._case and (cases[name] == 1.0).all():
                cases[name] = 1.0
        later = list[_Waiting]()
        for alike in (*self._ops_alike(), *self._collectives_alike()):
            one, asks = self._asked(alike, cases, numbers)
            if asks:
                later.append(one)
            else:
                _price(one, numbers)
        for corrections in self._corrections.values():
            corrections.find()
        while later:
            _price(later.pop(), numbers)
        numbers.compose(cases, prices)

    def _ops_alike(self) -> Iterator[_Alike]:
        """Ops of all steps by their codes."""
        if not self._steps:
            return
        steps = np.repeat(np.arange(len(self._steps)), [len(codes) for codes in self._codes])
        places = np.concatenate([np.arange(len(codes)) for codes in self._codes])
        sizes, contents = (
            np.concatenate([getattr(sheet, name) for sheet in self._sheets]) for name in ("sizes", "numbers")
        )
        first, widths = np.array([(one.case, one.cases) for one in self._steps]).T
        cases, codes = first[steps] + sizes * widths[steps], np.concatenate(self._codes)
        order = np.argsort(codes, kind="stable")
        ends = np.flatnonzero(np.diff(codes[order])) + 1
        for some in np.split(order, ends):
            one = self._steps[steps[some[0]]]
            contexts = list({id(context): context for context in one.at.contexts}.values())
            yield _Alike(
                contexts[sizes[some[0]]], one.step.pricer, None, steps[some], cases[some], places[some], contents[some]
            )

    def _collectives_alike(self) -> Iterator[_Alike]:
        for at, pricer, row, every in self._collectives.values():
            steps, cases, places, scales = map(np.array, zip(*every, strict=True))
            yield _Alike(at, pricer, row, steps, cases, places, scales)

    def _asked(self, alike: _Alike, cases: Mapping[str, Any], numbers: Numbers) -> tuple[_Waiting, bool]:
        """All rows as one, at all their cases; and whether they asked for corrections."""
        widths = numbers.widths[alike.steps]
        starts = np.cumsum(widths) - widths
        every = np.arange(widths.sum())

        def spread(values: Any) -> Any:
            return np.repeat(values, widths)

        which = every + spread(np.array(alike.cases) - starts)
        places = every + spread(numbers.places(alike.steps, alike.places) - starts)
        if (row := alike.collective) is not None:
            sizes = Sizes(cases["B"][which], cases["S"][which], 0.0)
            at, pricer = replace(alike.at, sizes=sizes), alike.pricer
            graphs = [self._steps[i].step.pricer.graph_tokens for i in alike.steps]
            if graphs.count(graphs[0]) < len(graphs):
                most: Any = spread(graphs)  # a joined pricer holds a column where a pricer holds a number
                pricer = replace(pricer, graph_tokens=most)
            row = replace(row, scale=spread(alike.what))
            pending = pricer.collective(row, at, self._of(pricer), steps=starts)
            return _Waiting(alike, pending, places), True
        each, which_content = np.unique(alike.what, return_inverse=True)
        contents = [numbered(number) for number in each.tolist()]
        first, table = contents[which_content[0]], np.array([content.coefs for content in contents])
        same = (table == table[0]).all(axis=0).tolist()
        columns = [
            float(c[0]) if one else spread(c[which_content]) for c, one in zip(table.T, same, strict=True)
        ]
        op, names = joined_op(first, columns), (*PLAIN, *ROUTED) if first.routed else PLAIN
        own = {name: value[which] if np.ndim(value) else value for name, value in cases.items() if name in names}
        sizes = Sizes(**{name: own.pop(name) for name in ("B", "S", "P", "R", "E", "X") if name in own})
        at = replace(alike.at, sizes=sizes, stages=1, **own)
        machine = np.array(self._machines)[alike.steps]
        runs = np.flatnonzero(np.append(True, machine[1:] != machine[:-1])).tolist()  # where those of each begin
        calls, machines = np.add.reduceat(widths, runs).tolist(), [
            self._steps[i].step.pricer for i in np.asarray(alike.steps)[runs].tolist()
        ]
        pricer, corrections = machines[0], self._of(machines[0])
        asked: BatchedCorrections | SeveralCorrections = corrections
        if len(runs) > 1:
            pricer = side_by_side(machines, calls)
            asked = SeveralCorrections([self._of(one) for one in machines], calls)
        if op.name == "grouped_matmul":
            pricers = [self._steps[i].step.pricer for i in alike.steps]
            laid: Any = {name: spread([float(getattr(one, name)) for one in pricers]) for name in ("ep", "etp")}
            sources = {name: spread([float(one.sources[name]) for one in pricers]) for name in pricers[0].sources}
            own_sizes = FeedForward(*map(spread, zip(*[one.feed_forward for one in pricers], strict=True)))
            pricer = replace(pricer, **laid, sources=sources, feed_forward=own_sizes)
        works = pricer.works(op, at, asked)
        asks = any(known is not None for _, known in works)
        return _Waiting(alike, partial(pricer.seconds, op, at, works), places), asks


def _price(one: _Waiting, numbers: Numbers) -> None:
    """Put what rows cost in their places."""
    took = one.price()
    numbers.put(one.places, took.seconds, took.waits_s, took.error, took.level)
    numbers.of_family(took.family, one.alike.steps, one.alike.places)


def _size(at: Context, name: str) -> Size:
    found: Size = getattr(at if name in ("verify", "hit", "capacity") else at.sizes, name)
    return found


def _beside_ops(pricer: RowPricer, at: Context) -> tuple[Hashable, Hashable]:
    """What kernels depend on beside ops and sizes: those that do not, and those that do hang on the phase."""
    plain = pricer.device.whole_tiles, at.mxfp4
    return plain, (*plain, at.decode, at.has_fp4, float(at.kv_bytes))


def _of_collective(row: Collective, pricer: RowPricer) -> tuple[Hashable, ...]:
    """What collectives have in common that differ in bytes alone, and in which steps are replayed from graphs."""
    own = row.op == "all_reduce" and pricer.own_all_reduce(row.ranks)
    plain = *_machine(pricer)[:3], row.op, row.ranks, row.extent, row.per, own
    if not row.exchange:
        return plain
    facts, distinct = pricer.table.facts, map(float, pricer.distinct.values())
    return *plain, *sorted(row.exchange.items()), pricer.tp, facts.moe_hidden_size, facts.num_experts, *distinct
