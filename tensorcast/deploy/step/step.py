"""Pricing a plan: seconds of every row and of the whole step, for one candidate or for arrays of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorcast.cost.evidence import LEVELS
from tensorcast.cost.work import Array, Size
from tensorcast.deploy.plan.plan import Plan, Row
from tensorcast.deploy.step.alike import Questions
from tensorcast.deploy.step.asked_rows import AskedRows, Memo, Named, SizesOfAll, Waiting, named, store_keys
from tensorcast.deploy.step.drafter import NOTHING, Beside, Drafter, beside
from tensorcast.deploy.step.overlap import Overlap
from tensorcast.deploy.step.pipeline_stages import (
    FIRST,
    HAND_OVER,
    HOST_ERROR,
    LAST,
    launching,
    place_of,
    serial_rounds,
    stages_of,
)
from tensorcast.deploy.step.price import OTHER_VENDOR_ERROR, Overheads, Part, RowPrice, StepPrice, Tally, pick
from tensorcast.deploy.step.row_prices import RowPricer
from tensorcast.deploy.step.sizes import Batches, Place, StepSizes
from tensorcast.deploy.step.sums import Recipe, RecipePart, Sums, Totals, TotalsOfSteps, recipe_of, sums_of_steps
from tensorcast.trace.table import OpTable

Rows = NDArray[np.intp]

@dataclass(frozen=True, kw_only=True)
class Step:
    """A plan, ready to be priced for any batch, new tokens and cached tokens.

    ``sizes`` say what a batch's rows are priced at, ``pricer`` what one costs there, ``overlap`` what of that passes
    unseen. ``captured``: the step is replayed from a graph. ``memo``: where prices of rows are kept from call to call.
    ``drafter``: what drafts tokens, if it is not the model's own layers. ``serial_s``: what a step without drafts takes
    longer, as its scheduler plans none ahead.
    """

    table: OpTable
    plan: Plan
    sizes: StepSizes
    pricer: RowPricer
    overlap: Overlap
    captured: bool
    memo: Memo | None = None
    drafter: Drafter | None = None
    serial_s: float = 0.0

    def price(self, batch: Size, new: Size, past: Size) -> StepPrice:
        """Price ``batch`` sequences per data-parallel rank, ``new`` tokens each after ``past`` cached ones.

        With pipeline stages the batch runs as ``min(pp, batch)`` micro-batches: a decode step ends when every
        micro-batch has passed every stage; prefill adds the bubble, ``(m + pp - 1)`` turns of the slowest stage.
        Under dual-batch overlap every stage runs two halves, each priced as the half it is. With drafted tokens a
        decode step checks ``1 + mtp_depth`` tokens per sequence and then drafts anew.
        """
        return next(prices([(self, batch, new, past)]))

    def seconds(self, batch: Size, new: Size, past: Size) -> Size:
        """Step time alone."""
        return self.price(batch, new, past).seconds

    @cached_property
    def undivided(self) -> Step:
        """Of prompts the step that an engine's scheduler composes where there are pipeline stages: one micro-batch."""
        return self if self.sizes.decode else replace(self, sizes=replace(self.sizes, divided=False))

    def rows(self, drafting: bool) -> tuple[Row, ...]:
        """What is asked of a step that drafts tokens, or drafts none: the plan's rows, and behind them what drafts."""
        return (*self.plan.rows, *self._beside.rows) if drafting else self.plan.rows

    def recipe(self, drafting: bool) -> Recipe:
        """What is added up of these, one object for all steps whose plans have one frame."""
        table, positions, more = self.table, self.overlap.positions, self._beside if drafting else NOTHING
        ends = table.ends if self.sizes.ends else frozenset[int]()
        key = table.layer_kinds, id(positions), ends, more.parts, *map(id, more.rows)
        known: dict[Hashable, tuple[Recipe, Any]] = vars(self.plan.frame).setdefault("recipes", {})
        if key not in known:
            layers, rows = Counter(table.layer_kinds), self.plan.rows
            end = len(rows) - (place_of(rows[-1]) == HAND_OVER)
            calls = tuple([layers[row.kind] if row.kind >= 0 else 1 for row in rows[:end]])
            own = RecipePart(tuple(range(end)), calls)
            handed_on = RecipePart(tuple(range(end, len(rows))), (1,) * (len(rows) - end))
            made = recipe_of(
                (*rows, *more.rows), (own, handed_on, *more.parts), places=(*layers, FIRST, LAST, HAND_OVER),
                planned=len(rows), positions=positions, ends=ends,
            )
            known[key] = made, (positions, more)  # which stay alive, so that their ids stay their own
        return known[key][0]

    @cached_property
    def _beside(self) -> Beside:
        return beside(self.plan.rows, self.table, self.drafter, self.pricer.engine.state_copies)

    def times(self, at: Batches) -> list[Size]:
        """How often each part of the rows runs at every batch."""
        times: list[Size] = [at.halves, (at.pp - 1) * at.halves]
        if at.draft is not None:
            times += [at.mtp_depth] if self.drafter is None else self.drafter.times(at.mtp_depth, at.halves)
            if len(times) < len(self.recipe(drafting=True).parts):  # accepted states are copied once
                times.append(np.greater(at.mtp_depth, 0) * 1.0)
        return times

    @cached_property
    def overheads(self) -> Overheads:
        """Those of the engine in its steps."""
        engine, spent = self.pricer.engine, self.pricer.engine.overhead
        each = spent.layer_s
        if self.sizes.decode and engine.decode_graphs == "piecewise" and engine.graph_break_s is not None:
            each += float(engine.graph_break_s)
        other = bool(spent.vendor) and self.pricer.device.vendor != spent.vendor
        return Overheads(
            spent.step_s, each, spent.request_s, spent.layer_error_s, OTHER_VENDOR_ERROR if other else 0.0,
            self.serial_s,
        )

    def composed(
        self, sums: Totals, hidden: Array, at: Batches, batch: Size, *, host: Mapping[int, Size],
        found: Sequence[RowPrice] = (), spent: Overheads | None = None,
    ) -> StepPrice:
        """The step from the sums of its rows at every batch; ``hidden``: by layer kind; ``host``: as
        :func:`~tensorcast.deploy.step.pipeline_stages.launching` tells it; ``found``: the rows' prices, where they are
        told; ``spent``: by the engine at every batch, if not by the step's own alone."""
        recipe, among, levels, errors = self.recipe(at.draft is not None), sums.among, sums.levels, sums.errors
        taken = dict(zip(recipe.places, sums.places * at.halves, strict=True))
        layers, kinds = Counter(self.table.layer_kinds), sorted(self.overlap.positions)
        for kind, each in zip(kinds, hidden, strict=True):
            taken[kind] = taken[kind] - each[0]
        saved = sum((layers[kind] * each for kind, each in zip(kinds, hidden, strict=True)), np.zeros(hidden.shape[1:]))
        every = stages_of(self.table.layer_kinds, at.pp, self.pricer.engine.pipeline_split)
        stages = [sum((calls * taken[place] for place, calls in stage), 0.0) for stage in every]
        stages[-1] = stages[-1] + sums.drafts
        depth = at.mtp_depth
        passes = len(self.table.layer_kinds) + (depth if self.drafter is None else self.drafter.layer_passes(depth))
        turns, spent = at.pp if self.sizes.decode else at.micro + at.pp - 1, spent or self.overheads
        passes, engine = passes * turns / at.pp, self.pricer.engine
        per_sequence = spent.request_s * np.asarray(batch, dtype=float)
        overhead = spent.step_s + spent.layer_s * passes + per_sequence
        if at.draft is None:  # a pipeline's schedule is told of below
            overhead = overhead + spent.serial_s * np.equal(at.pp, 1)
        serial, method = engine.serial_drafts, "mtp" if self.drafter is None else self.drafter.method
        if at.draft is not None and serial is not None and method in serial.methods:
            waits = np.greater(depth, 0) * serial.sequence_s * np.asarray(batch, dtype=float)
            per_sequence = per_sequence + waits
            overhead = overhead + waits + np.greater(depth, 0) * serial.step_s
        if engine.serial_pipeline is not None:
            turns, waits = serial_rounds(engine.serial_pipeline, turns, at.pp, depth if at.draft is not None else 0)
            overhead = overhead + waits
        slowest, unsure = reduce(np.maximum, stages), spent.layer_error_s * passes
        host_s: Size = 0.0
        least_s: Size = 0.0
        if host:  # it runs ahead of the device, or keeps it waiting
            launched = [sum((calls * host[place] for place, calls in stage), 0.0) * at.halves for stage in every]
            held = reduce(np.maximum, launched)
            host_s, least_s = np.maximum(held - slowest, 0.0) * turns, np.where(held > 0, held * turns + overhead, 0.0)
            overhead, unsure = overhead + host_s, np.hypot(unsure, HOST_ERROR * host_s)
        off = np.square(errors).sum(axis=0)
        if np.any(spent.kernels_error):
            unsure = np.hypot(unsure, spent.kernels_error * among[0])
        shares = levels / np.maximum(levels.sum(axis=0), 1e-30)
        return StepPrice(
            parts=self._parts(found, at) if found else (),
            tally=Tally(
                errors, among[0], among[1], among[2], among[3], dict(zip(LEVELS, shares, strict=True))
            ),
            seconds=slowest * turns + overhead, overhead_s=overhead,
            request_overhead_s=per_sequence, host_s=host_s, least_s=least_s,
            overhead_error_s=unsure,
            micro_batches=at.micro if np.ndim(at.micro) else int(at.micro), hidden_s=saved[0],
            hidden_comm_s=saved[1], exposed_comm_s=among[1] - saved[1],
            error=np.sqrt(off + unsure**2) / np.maximum(among[0] + overhead, 1e-30),
        )

    def _parts(self, found: Sequence[RowPrice], at: Batches) -> tuple[Part, ...]:
        """The prices ``found`` of the rows by part."""
        drafting = at.draft is not None
        rows, parts = self.rows(drafting), self.recipe(drafting).parts
        drafts = self._beside.named if drafting else {}
        return tuple([
            Part(tuple([(part.drafts and drafts.get(j)) or rows[j] for j in part.where]),
                 tuple([found[j] for j in part.where]), part.calls, n, at.draft if part.drafts else at.own)
            for part, n in zip(parts, self.times(at), strict=True)
        ])

Asked = tuple[Step, Size, Size, Size]
"""A step, and the batch, new and cached tokens to price it at: numbers, or arrays that broadcast."""


@dataclass(frozen=True)
class _Sheet:
    """Rows of several steps, each of one price once: of which step, at which of a step's sizes, its name; and where
    each step's rows stand. ``steps`` are kept alive, so that their ids stay their own."""

    steps: tuple[Step, ...]
    asked: tuple[tuple[int, int, Named], ...]
    places: tuple[Rows, ...]


MOST_SHEETS = 8
"""Of a step, as the first of others."""


def _sheet_of(steps: Sequence[Step], drafting: bool, apart: tuple[int, ...]) -> _Sheet:
    """The rows of ``steps``, whatever the sizes; ``apart``: as :attr:`Batches.apart` says it."""
    known: dict[Hashable, _Sheet] = vars(steps[0]).setdefault("sheets", {})
    key = drafting, apart, *map(id, steps)
    if key not in known:
        numbers, asked, places = dict[Hashable, int](), list[tuple[int, int, Named]](), list[Rows]()
        for i, step in enumerate(steps):
            recipe, memo = step.recipe(drafting), step.memo
            stores: dict[str, Hashable] = {**store_keys(
                step.pricer, step.sizes.backend, Memo() if memo is None else memo
            ), "here": i}
            kept = i if memo is None else (id(memo.plain), id(memo.routed))
            place = list[int]()
            for row, stands in zip(step.rows(drafting), recipe.stand, strict=True):
                one, where = named(row), apart[stands]
                own = (where, i) if where & Place.EXPERTS else where  # every step has as many chunks as it needs
                number = numbers.setdefault((own, kept, one.store, stores[one.store], one.name), len(asked))
                if number == len(asked):
                    asked.append((i, where, one))
                place.append(number)
            places.append(np.array(place))
        while len(known) >= MOST_SHEETS:
            del known[next(iter(known))]
        known[key] = _Sheet(tuple(steps), tuple(asked), tuple(places))
    return known[key]


def prices(asked: Sequence[Asked]) -> Iterator[StepPrice]:
    """The price of each step, in order, as :meth:`Step.price` gives it: their kernels' fitted models are asked once."""
    every, waiting = Questions(), dict[Any, Any]()
    steps = [Together([step], at, every, waiting) for step, *at in asked]
    every.find()
    for together in steps:
        (step,), (place,), at, each = together.steps, together.places, together.at, together.found()
        families = dict.fromkeys(price.family for price in each)
        recipe, kinds = step.recipe(at.draft is not None), dict(zip(families, range(len(families)), strict=True))
        shape = np.broadcast_shapes(*(np.shape(price.seconds) for price in each))
        several = sums_of_steps([recipe], each, [place], kinds, [shape[0] if len(shape) > 1 else 1]).of_members()
        sums = Sums(**{name: values.reshape(*values.shape[:-1], *shape) for name, values in vars(several).items()})
        found = [each[number] for number in place.tolist()]
        first = sum(not part.drafts for part in recipe.parts)
        own, draft = sums.at(at.own, slice(first)), sums.at(at.draft, slice(first, None))
        totals = own.totals([*own.by_part(), *draft.by_part()], step.times(at))
        hidden = step.overlap.hidden(own.layers, own.busy, pick(at.whole.sizes.tokens, at.own), at.dual)
        host = launching([step.pricer], [recipe.launches], np.zeros((), dtype=int), pick(at.whole.sizes.tokens, at.own))
        yield step.composed(totals, hidden, at, together.batch, host=host, found=found)


class Together:
    """Steps of one phase and model at the same batches, priced as one: fleets, of which the sizes of all members are
    columns, or one step alone. First all rows are asked for, then, once these have been found, prices.

    ``asked_at``: batch, new and cached tokens; ``varied``: sizes of the steps that are others here.
    """

    def __init__(
        self, steps: Sequence[Step], asked_at: Sequence[Size], asked: Questions, waiting: Waiting, **varied: Any
    ) -> None:
        (batch, new, past), ends = asked_at, [0]
        self.steps, self.batch = steps, batch
        sizes = replace(steps[0].sizes, **varied)
        several = len(steps) > 1
        if several:
            every: list[Any] = [step.sizes for step in steps]
            ends = np.cumsum([0, *(len(one.dp) for one in every)]).tolist()
            dp, etp = (np.concatenate([getattr(one, name) for one in every]) for name in ("dp", "etp"))
            load: Any = sizes.load
            if load is not None:
                load = replace(
                    load, members=tuple([member for one in every for member in one.load.members]),
                    local_experts=np.concatenate([one.load.local_experts for one in every]),
                )
            sizes = replace(sizes, dp=dp, etp=etp, load=load)
        self.at = at = sizes.batches(batch, new, past)
        apart = at.apart
        each = {i: SizesOfAll(at.contexts[i]) for i in sorted({*apart})}
        self.members = [slice(*ends[i : i + 2]) if several else None for i in range(len(steps))]
        askers = list[dict[int, AskedRows]]()
        for step, members in zip(steps, self.members, strict=True):
            memo = Memo() if step.memo is None else step.memo
            rows = AskedRows(
                step.pricer, step.sizes.backend, each[0], members, asked=asked, memo=memo, waiting=waiting
            )
            askers.append({i: rows.at(one) if i else rows for i, one in each.items()})
        sheet = _sheet_of(steps, at.draft is not None, apart)
        self.places = sheet.places
        """Of each step's rows, their numbers among all that are asked for."""
        self._asked = [
            (i, where, askers[i][where], *askers[i][where].ask(row)) for i, where, row in sheet.asked
        ]

    def found(self) -> list[RowPrice]:
        """Prices of all rows, each once; those inside the experts of all chunks."""
        found = list[RowPrice]()
        for i, where, rows, prices, name in self._asked:
            price = rows.price(prices, name)
            if where & Place.EXPERTS:
                members, chunks = self.members[i], self.at.chunks[where]
                own = chunks if members is None or np.ndim(chunks) < 2 else np.asarray(chunks)[members]
                price = price.times(own)
            found.append(price)
        return found

    def each(self, member: Rows, batch: Rows, wanted: Rows | None = None) -> Iterator[tuple[Rows, StepPrice]]:
        """Prices of members ``[entries]`` at batches ``[entries, n]``, both by position: some of the entries at a time,
        which, and their price ``[some, m]``: at the first ``m`` of their batches, no fewer than are ``wanted`` of any.
        """
        at, first = self.at, self.steps[0]
        found = self.found()
        names = dict.fromkeys(price.family for price in found)
        families = dict(zip(names, range(len(names)), strict=True))
        recipes = [step.recipe(at.draft is not None) for step in self.steps]
        pricers, launches = [step.pricer for step in self.steps], [recipe.launches for recipe in recipes]
        sizes = [np.size(step.sizes.dp) for step in self.steps]
        step_of = np.repeat(np.arange(len(sizes)), sizes)[member]
        begins = np.cumsum(sizes) - sizes
        cases = [at.draft if part.drafts else at.own for part in recipes[0].parts]
        tokens = pick(of_cases := np.asarray(at.whole.sizes.tokens), at.own)
        alike: dict[Hashable, list[int]] = {}
        for i, step in enumerate(self.steps):
            own = step.overlap  # what overlaps that hide the same have in common, wherever the rows stand
            shared = [kind for kind, places in own.positions.items() if "shared" in places]
            alike.setdefault((own.external, own.contention, own.stream_tokens, *shared), []).append(i)
        for steps in self._blocks(alike.values(), sizes, of_cases.shape[-1]):
            asked = [self.places[i] for i in steps]
            mine, rows = np.flatnonzero(np.isin(step_of, steps)), np.flatnonzero(np.bincount(np.concatenate(asked)))
            sums = sums_of_steps(
                [recipes[i] for i in steps], [found[i] for i in rows.tolist()], [rows.searchsorted(i) for i in asked],
                families, [sizes[i] for i in steps],
            )
            totals = TotalsOfSteps(sums, cases, first.times(at))
            moved = np.zeros(len(sizes), dtype=int)  # from where a step's members stand to where they do among these
            moved[steps] = np.cumsum([0, *(sizes[i] for i in steps[:-1])]) - begins[steps]
            among = member + moved[step_of]
            if wanted is not None:  # those that want as many batches together
                mine = mine[np.argsort(-wanted[mine], kind="stable")]
            for some in np.array_split(mine, -(-len(mine) * batch.shape[1] // TOGETHER)) if len(mine) else ():
                entries = batch[some] if wanted is None else batch[some, : wanted[some[0]]]
                parts: dict[str, Any] = {
                    name: pick(getattr(at, name), entries) for name in ("micro", "dual", "halves")
                } | {name: pick(getattr(at, name), entries[:, :1]) for name in ("pp", "mtp_depth")}
                here = totals.at(among[some][:, None], entries)
                hidden = self.steps[steps[0]].overlap.hidden(
                    here.layers, here.busy, pick(tokens, entries), parts["dual"]
                )
                parted, sequences = at._replace(**parts), pick(self.batch, entries)
                host = launching(pricers, launches, step_of[some][:, None], pick(tokens, entries))
                yield some, first.composed(here, hidden, parted, sequences, host=host)

    @staticmethod
    def _blocks(alike: Iterable[list[int]], members: Sequence[int], cases: int) -> Iterator[list[int]]:
        """Steps that are ``alike``, so many at a time as have :data:`SUMMED` members at cases."""
        for steps in alike:
            number = np.cumsum([members[i] * cases for i in steps]) // SUMMED
            for one in sorted({*number.tolist()}):
                yield [i for i, own in zip(steps, number, strict=True) if own == one]


TOGETHER, SUMMED = 16_384, 32_768
"""Entries that are composed together, few enough to stay in the cache; and members at cases whose rows are added up
together: their sums take some MB."""
