"""Serving numbers of many candidates at once: variants are priced in fleets, loads follow in whole arrays.

Nothing is approximated that pricing one candidate alone does not approximate: the same rows, the same curves and the
same steady state, only with more than one entry per array (``tests/test_compare.py`` holds it to that).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorcast.cost.evidence import EVIDENCE
from tensorcast.cost.work import Size
from tensorcast.deploy.fleet import Fleet, fleet
from tensorcast.deploy.layout import Layout, attention_dp
from tensorcast.deploy.options import Options
from tensorcast.deploy.plan.plan import block_form, choose_all2all
from tensorcast.deploy.plan.switches import served_with
from tensorcast.deploy.step.alike import Questions
from tensorcast.deploy.step.sizes import COARSE, KV_BYTES
from tensorcast.deploy.step.step import Together
from tensorcast.profiles.kept import same
from tensorcast.profiles.memory import unasked_cache
from tensorcast.search.axes import LARGEST_BATCH
from tensorcast.search.candidate_arrays import Points, among
from tensorcast.search.search_task import Scenario
from tensorcast.search.space import Group, Setting, Structure, Variant
from tensorcast.search.workspace import MOST_FLEETS, MOST_SPACES, Parts
from tensorcast.serving.capacity import (
    decode_budget,
    prefill_budget,
    prompts_that_fit,
    room,
    sequence_bytes,
    sequences_that_fit,
)
from tensorcast.serving.curves import decode_columns, lasting, unevenly
from tensorcast.serving.prefill_costs import PrefillCosts, cut_prompts, prefill_columns, prefill_costs
from tensorcast.serving.traffic import Array, Rows
from tensorcast.trace.cache import whole_model

GRID = COARSE[(COARSE >= 1) & (COARSE <= LARGEST_BATCH)]
"""Batches of decode steps that every variant is priced at."""


def _shortened(values: Array) -> Array:
    """To twelve digits (Dekker's splitting): variants that cost the same then do so to the last digit, whatever order
    their rows are added up in, and of equal ones the first stands."""
    large = 4097.0 * values
    return large - (large - values)


PHASES = ("prefill", "decode")

OF_VARIANTS = (
    "layouts", "depths", "kv_dtypes", "layout_of", "own_kv_dtype", "told", "_captured", "_setting_of", "_settings",
    "_kinds",
)  # fmt: skip
"""What is found of variants once, whatever the load."""

TOGETHER = 400_000
"""Steps of members at settings and batches that are priced together, about: more take more memory at once."""


class VariantPrices:
    """Decode curves, prefill lines and room in memory of every variant of one scenario, and what they share.

    ``chunks``: chunked-prefill budgets to try; ``grid``: batches of decode steps to price. All is priced at once; the
    methods are arithmetic. ``layouts``, ``layout_of``, ``depths`` and ``kv_dtypes``: of each variant the sizes of its
    layout and which layout of all it is, tokens that it drafts, what it decodes with.
    """

    readers: VariantPrices | None = None
    """What reads prompts for pools of these, where that is another device."""

    def __init__(
        self, scenario: Scenario, variants: list[Variant], chunks: tuple[int, ...], parts: Parts | None = None,
        grid: Array = GRID,
    ) -> None:  # fmt: skip
        self.scenario, self.variants, self.chunks, self.grid = scenario, variants, chunks, grid
        self.parts = Parts() if parts is None else parts
        self._whole = whole_model(scenario.model, "prefill", variants[0].prefill.quant)
        self.budgets = sorted({*chunks, scenario.own_chunk})
        count = len(variants)
        names = ("seconds", "attention_s", "error", "exposed_comm_s", "hidden_comm_s", *EVIDENCE)  # NaN: does not fit
        self.curves = {name: np.full((count, len(self.grid)), np.nan) for name in names}
        # sequences that fit beside a full prefill step, and on servers of one phase
        self.fits = {budget: np.zeros(count) for budget in self.budgets}
        self._costs: dict[int, list[tuple[Rows, PrefillCosts]]] = {budget: [] for budget in self.budgets}
        self.room_decode, self.room_prefill = np.zeros(count), np.zeros(count)
        # by variant: which fleet at one setting, as which member
        self.fleet_of, self.member_of = np.zeros(count, dtype=int), np.zeros(count, dtype=int)
        self.fleets: list[Fleet] = []
        # first token's and each other token's seconds and replies per second of a place, at every batch, by chunk
        # budget; and how many batches of each variant are worked out
        self.states: dict[int, tuple[Array, Rows]] = {}
        self.whatever: dict[int, Points] = {}  # candidates there whatever the limits are, by chunk budget
        self.full: dict[int, Any] = {}  # caches that replies fill, by chunk budget
        self._pools: VariantPrices | None = None
        self._encoded: dict[int, Any] = {}  # images of a prompt, by tp
        self._cuts = [cut_prompts(scenario.load, budget) for budget in self.budgets]
        if id(variants) not in self.parts.structures:
            self._look_at_variants()
            own = {name: getattr(self, name) for name in OF_VARIANTS}
            self.parts.structures[id(variants)] = variants, (own, self._groups())
        while len(self.parts.structures) > MOST_SPACES:
            del self.parts.structures[next(iter(self.parts.structures))]
        own, of_all = self.parts.structures[id(variants)][1]
        vars(self).update(own)
        groups = list(of_all.values())
        entries = np.cumsum([sum(map(len, members.values())) for members in groups]) * len(grid)
        read_in = [next(iter(members))[1].pcp for members in groups]  # parts
        blocks = list(zip((entries // TOGETHER).tolist(), read_in, strict=True))
        for block in dict.fromkeys(blocks):
            self._price([groups[i] for i, one in enumerate(blocks) if one == block], grid)
        self.prompts = {}
        for budget, found in self._costs.items():
            order = np.argsort(np.concatenate([rows for rows, _ in found]))
            self.prompts[budget] = PrefillCosts.joined([part for _, part in found], order)
        self.own_prompts = self.prompts[scenario.own_chunk]  # in steps as the engine cuts them unasked
        while len(self.parts.fleets) > MOST_FLEETS:
            del self.parts.fleets[next(iter(self.parts.fleets))]
        apart = np.array([v.prefill.pcp > 1 for v in variants]) * self.room_prefill
        room = np.max([self.room_decode, apart, *(self.fits[budget] for budget in chunks)], axis=0)
        self.without_room = int((room < 1).sum())
        """Variants that hold no sequence, in either mode of serving."""

    def _look_at_variants(self) -> None:
        """What variants are, whatever the load: :data:`OF_VARIANTS`."""
        scenario, variants = self.scenario, self.variants
        sizes = np.array([(v.layout.world_size, v.layout.dp, v.layout.dp // v.prefill.pcp) for v in variants])
        self.layouts: dict[str, Array] = dict(zip(("world_size", "dp", "readers"), sizes.T.astype(float), strict=True))
        self.depths = np.array([v.decode.mtp_depth for v in variants])
        self.kv_dtypes = np.array([v.decode.kv_dtype for v in variants], dtype=object)
        numbers: dict[Layout, int] = {}
        self.layout_of = np.array([numbers.setdefault(v.layout, len(numbers)) for v in variants])
        # tokens of the largest captured prefill step of each
        largest = cache(partial(scenario.engine.prefill_graph_tokens, scenario.device, config=scenario.model.config))
        experts, engine = self._whole.facts.num_experts, scenario.engine
        self._captured, captured = list[int](), dict[tuple[int, int], int]()  # by identity: many variants, few options
        for v in variants:
            if (key := (id(v.prefill), id(v.layout))) not in captured:
                kind = choose_all2all(v.prefill.all2all, v.layout, engine, "prefill")
                served = served_with(v.prefill, kind)
                captured[key] = largest(attention_dp(v.layout, experts), v.layout.pp, served=served)
            self._captured.append(captured[key])
        rules, config = scenario.engine.cache_dtypes, scenario.model.config
        self.own_kv_dtype = unasked_cache(rules, config, scenario.device.architecture, self._whole.stored.kv)
        own = self.own_kv_dtype
        self._setting_of = [
            Setting(v.decode.kv_dtype or own, v.decode.mtp_depth, v.decode.dual_batch_overlap, v.layout.pp)
            for v in variants
        ]
        # all groups are priced at all settings, so that rows that they have in common are priced once
        self._settings = sorted({*self._setting_of})
        self._kinds = list(dict.fromkeys(setting._replace(mtp_depth=0) for setting in self._settings))  # of prompts
        self.told: dict[str, NDArray[Any]] = {}  # what tables say of each variant, once they do

    def in_pools(self) -> VariantPrices:
        """The variants as pools of disaggregated serving run them: those whose prompts are captured only where one
        server has both phases are priced again."""
        engine = self.scenario.engine.in_pools()
        if engine is self.scenario.engine:
            return self
        if self._pools is not None:
            return self._pools
        scenario = replace(self.scenario, engine=same(engine))
        rows = [i for i, tokens in enumerate(self._captured) if tokens]
        self._pools = pools = copy.copy(self)
        pools.scenario = scenario
        if rows:
            # of prompts alone: one batch of decode steps is the least that can be priced
            some, chunks = [self.variants[i] for i in rows], (scenario.own_chunk,)
            again = VariantPrices(scenario, some, chunks, grid=self.grid[:1])
            where = np.arange(len(self.variants))
            where[rows] = len(where) + np.arange(len(rows))
            pools.own_prompts = PrefillCosts.joined([self.own_prompts, again.own_prompts]).where(where)
        return pools

    def fed_by(self, readers: VariantPrices) -> VariantPrices:
        """The same as decode pools alone, whose prompts ``readers`` read."""
        found, pools = copy.copy(self), self.in_pools()
        found.readers = readers
        if pools is not self:
            found._pools = copy.copy(pools)
            found._pools.readers = readers.in_pools()
        found.without_room = int((self.room_decode < 1).sum() + (readers.room_prefill < 1).sum())
        return found

    def closer(self, rows: Rows, grid: Array) -> VariantPrices:
        """Variants ``rows`` alone, with decode steps at more batches: ``grid`` holds those that are priced already."""
        found, more = copy.copy(self), grid[~among(grid, self.grid)]
        curves = {name: np.full((len(rows), len(grid)), np.nan) for name in self.curves}
        for name, values in self.curves.items():
            curves[name][:, np.searchsorted(grid, self.grid)] = values[rows]
        found._pools = None if self._pools is None else copy.copy(self._pools)
        for one in (found, found._pools):
            if one is None:
                continue
            one.grid, one.curves, one.states, one.whatever, one.full = grid, curves, {}, {}, {}
            one.variants, one._captured = [self.variants[i] for i in rows], [self._captured[i] for i in rows]
            one._setting_of = [self._setting_of[i] for i in rows]
            one._settings = sorted({*one._setting_of})
            one.layouts = {name: sizes[rows] for name, sizes in self.layouts.items()}
            one.told = {name: values[rows] for name, values in self.told.items()}
            one.fits = {budget: fits[rows] for budget, fits in self.fits.items()}
            one.prompts = {budget: costs.where(rows) for budget, costs in self.prompts.items()}
            one.own_prompts = one.own_prompts.where(rows)
            for name in ("depths", "kv_dtypes", "layout_of", "room_decode", "room_prefill", "fleet_of", "member_of"):
                setattr(one, name, getattr(one, name)[rows])
        if len(more):
            found._price(list(found._groups().values()), more, ("decode",))
        return found

    def _price(self, groups: Sequence[Group], grid: Array, phases: Sequence[str] = PHASES) -> None:
        """Costs of prompts and curves at ``grid``, of these ``phases``: priced together, so that kernels' fitted models
        are asked once."""
        each = np.array([(batch, cut.tokens, cut.past) for cut in self._cuts for batch in cut.batches])
        prompts = tuple(np.tile(each, (len(self._kinds), 1)).T)
        stages = np.repeat([float(one.pp) for one in self._settings], len(grid))
        least = lasting(self._cuts[self.budgets.index(self.scenario.own_chunk)].per_step)
        replies = unevenly(np.tile(grid, len(self._settings)), stages, least), 1.0, self.scenario.load.context
        loads: dict[str, tuple[Any, ...]] = {"prefill": prompts, "decode": replies}
        questions, waiting = Questions(), dict[Any, Any]()
        fleets: dict[str, list[Fleet]] = {phase: [] for phase in phases}
        asked: dict[str, Together] = {}
        for phase in phases:
            for group in groups:
                most = max(group, key=lambda member: member[0].pp)
                members = tuple([(layout, reads if phase == "prefill" else writes) for layout, reads, writes in group])
                if (phase, members) not in self.parts.fleets:
                    prototype = self.scenario.deployment(most[0], phase, most[1] if phase == "prefill" else most[2])
                    self.parts.fleets[phase, members] = fleet(prototype, members, self.parts.memo)
                fleets[phase].append(self.parts.fleets[phase, members])
            at = self._kinds if phase == "prefill" else self._settings
            width = len(loads[phase][0]) // len(at)
            kv, depth, dual, pp = (np.repeat(values, width) for values in zip(*at, strict=True))
            kv_bytes: Size = KV_BYTES[kv[0]] if len({*kv}) == 1 else np.array([KV_BYTES[name] for name in kv])
            asked[phase] = Together(
                [one.step.undivided for one in fleets[phase]], loads[phase], questions, waiting,
                kv_bytes=kv_bytes, mtp_depth=depth, dual=dual, pp=pp,
            )
        questions.find()
        numbers = {setting: i for i, setting in enumerate(self._settings)}
        every = [positions for group in groups for positions in group.values()]
        where = [(at, i, numbers[setting]) for i, positions in enumerate(every) for setting, at in positions.items()]
        position, member, setting = np.array(where).T
        if "prefill" in asked:
            kind = np.array([self._kinds.index(one._replace(mtp_depth=0)) for one in self._settings])[setting]
            stages = np.array([float(one.pp) for one in self._settings])[setting]
            for some, price in asked["prefill"].each(member, kind[:, None] * len(each) + np.arange(len(each))):
                spent = fleets["prefill"][0].engine.overhead
                found = prefill_columns(price, spent.prefill_factor, spent.prefill_error).items()
                columns = {name: _shortened(values).reshape(len(some), len(self._cuts), 3) for name, values in found}
                for i, (budget, cut) in enumerate(zip(self.budgets, self._cuts, strict=True)):
                    mine = {name: values[:, i] for name, values in columns.items()}
                    costs = prefill_costs(mine, cut.tokens, cut.per_step, cut.rises, stages[some])
                    self._costs[budget].append((position[some], self._with_images(costs, position[some])))
            for group, reading, decoding in zip(groups, fleets["prefill"], fleets["decode"], strict=True):
                self._take_room(group, reading, decoding)
        at_batches, entries = np.searchsorted(self.grid, grid), setting[:, None] * len(grid) + np.arange(len(grid))
        # batches that fit, and the next, up to which lines go
        most = np.maximum(self.room_decode, np.max(list(self.fits.values()), axis=0))
        fit = np.searchsorted(grid, most[position], side="right")
        for some, price in asked["decode"].each(member, entries, np.minimum(fit + 1, len(grid))):
            rows, columns = position[some], decode_columns(price)
            held = slice(columns["seconds"].shape[-1])  # NumPy is quicker where all batches are new
            into = (rows, held) if len(grid) == len(self.grid) else (rows[:, None], at_batches[held])
            for name, values in columns.items():
                self.curves[name][into] = _shortened(values)

    def _with_images(self, costs: PrefillCosts, variants: Rows) -> PrefillCosts:
        """Prompts of ``variants`` with their images, if any, encoded on the GPUs that read them."""
        if (images := (where := self.scenario).images) is None or images.apart:
            return costs
        from tensorcast.serving.encoder import with_images

        widths = [self.variants[i].layout.tp for i in variants]
        for tp in {*widths} - self._encoded.keys():
            self._encoded[tp] = images.of_prompt(where.model, where.device, where.engine, tp)
        return with_images(costs, [self._encoded[tp] for tp in widths])

    def _take_room(self, group: Group, reading: Fleet, decoding: Fleet) -> None:
        """Sequences of a group's variants that fit: beside what a full prefill step of each budget takes, and in pools,
        on servers of one phase."""
        load, chunk = self.scenario.load, self.budgets.index(self.scenario.own_chunk)
        cut, scheduler = self._cuts[chunk], self.scenario.engine.scheduler
        leaves_room = scheduler is not None and scheduler.room_first is not None
        lengths = load.input_len, load.output_len
        prompts: dict[tuple[str, bytes, bytes], tuple[Array, Array]] = {}  # whatever is drafted
        for kv, depth, member, stages, where, position in group.of_caches:
            if (key := (kv, member.tobytes(), stages.tobytes())) not in prompts:
                prefill = reading.at(kv, 0, member, stages)
                budgets = np.asarray(prefill_budget(prefill, *self._cuts))
                alone = prefill.in_pools()
                budget = budgets[:, chunk : chunk + 1] if alone is prefill else prefill_budget(alone, cut)
                prompts[key] = budgets, prompts_that_fit(alone, budget, load.input_len)
            (prefilling, read), decode = prompts[key], decoding.at(kv, depth, member, stages)
            apart = decode.in_pools()
            (steps, buffers), each = decode_budget(decode, load.input_len), sequence_bytes(decode, *lengths)
            fits = room(decode, steps, each + buffers)
            beside = np.minimum(fits, room(decode, prefilling, each))
            if apart is not decode or leaves_room:
                fits = sequences_that_fit(decode, apart, None, *lengths)
            if next(iter(group))[1].pcp > 1:
                fits, beside = 0.0 * fits, 0.0 * beside  # pools of prompts alone read them in parts
            self.room_decode[position], self.room_prefill[position] = fits[where, 0], read[where, 0]
            for budget, fits in zip(self.budgets, beside[where].T, strict=True):
                self.fits[budget][position] = fits
            self.fleet_of[position], self.member_of[position] = len(self.fleets), where
            self.fleets.append(decode)

    def _groups(self) -> dict[Structure, Group]:
        """Positions of the variants by structure, member and setting."""
        members: dict[tuple[Any, ...], dict[Setting, int]] = {}
        graphs = self.scenario.engine.prefill_graphs
        apart = graphs is not None and graphs.whole_steps  # halved steps are launched otherwise, too
        plain: dict[int, Options] = {}  # by identity: many variants, few options
        made: dict[Options, Options] = {}
        for i, variant in enumerate(self.variants):
            for options in (variant.prefill, variant.decode):
                if id(options) not in plain:
                    dual = apart and options.dual_batch_overlap
                    one = replace(options, kv_dtype=None, mtp_depth=0, dual_batch_overlap=dual)
                    plain[id(options)] = made.setdefault(one, one)
            layout, own = variant.layout, variant.decode
            kept = id(plain[id(variant.prefill)]), id(plain[id(own)])
            key = (layout.tp, layout.dp, layout.ep, self._captured[i], *kept)
            members.setdefault(key, {})[self._setting_of[i]] = i
        found: dict[Structure, Group] = {}
        engine, where = self.scenario.engine, self.scenario
        known: dict[str, Any] = {"device": where.device, "config": where.model.config, "whole": self._whole}
        plainer: dict[str, Any] = {"dispatch": None, "redundant_experts": 0, "placement": "linear"}
        common: dict[int, Options] = {}
        for positions in members.values():
            number = positions[max(positions, key=lambda setting: setting.pp)]
            most = self.variants[number]
            layout, both = most.layout, (plain[id(most.prefill)], plain[id(most.decode)])
            phases = list(zip(both, ("prefill", "decode"), strict=True))
            exchange = [choose_all2all(o.all2all, layout, engine, phase) for o, phase in phases]
            blocks = [block_form(o, layout, kind, engine, **known) for o, kind in zip(both, exchange, strict=True)]
            for o in both:
                if id(o) not in common:  # what becomes a column of the fleet's arrays may differ
                    external = min(o.external_shared_experts, 1)
                    common[id(o)] = replace(o, **plainer, external_shared_experts=external)
            structure = Structure(
                layout.tp, self._captured[number], (exchange[0], exchange[1]), (blocks[0], blocks[1]),
                (common[id(both[0])], common[id(both[1])]),
            )  # fmt: skip
            found.setdefault(structure, Group())[layout, both[0], both[1]] = positions
        return found
