"""Serving numbers of many candidates at once: variants are priced in fleets, loads follow in whole arrays.

Nothing is approximated that pricing one candidate alone does not approximate: the same rows, the same curves and the
same steady state, only with more than one entry per array (``tests/test_compare.py`` holds it to that).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np

from tensorcast.cost.evidence import EVIDENCE
from tensorcast.deploy.deployment import Deployment
from tensorcast.deploy.fleet import Fleet, fleet
from tensorcast.deploy.layout import Layout, attention_dp
from tensorcast.deploy.options import Options
from tensorcast.deploy.plan.plan import block_form, choose_all2all
from tensorcast.deploy.step.asked_rows import Memo
from tensorcast.deploy.step.sizes import COARSE, KV_BYTES
from tensorcast.search.axes import LARGEST_BATCH
from tensorcast.search.candidate_arrays import Points
from tensorcast.search.search_task import Scenario
from tensorcast.search.space import Variant
from tensorcast.serving.capacity import decode_budget, prefill_budget, room, sequence_bytes
from tensorcast.serving.curves import decode_columns
from tensorcast.serving.prefill_costs import PrefillCosts, cut_prompts, prefill_columns, prefill_costs
from tensorcast.serving.traffic import Array
from tensorcast.trace.cache import whole_model
from tensorcast.trace.moe import BlockForm

GRID = COARSE[(COARSE >= 1) & (COARSE <= LARGEST_BATCH)]
"""Batches of decode steps that every variant is priced at."""


@dataclass(frozen=True)
class _Structure:
    """What the members of a fleet share, in both phases."""

    tp: int
    graph_tokens: int
    exchange: tuple[str, str]
    blocks: tuple[BlockForm, BlockForm]
    common: tuple[Options, Options]


class _Setting(NamedTuple):
    """What fleets take as further batches: it changes few rows, or the tokens of a step."""

    kv_dtype: str | None
    mtp_depth: int
    dual_batch_overlap: bool
    pp: int


def _put(values: Array, rows: list[int], others: Array) -> Array:
    """``values`` with ``others`` at ``rows``."""
    values = values.copy()
    values[rows] = others
    return values


_Member = tuple[Layout, Options, Options]
"""A layout, of those that differ in pp the one with most stages, and what is not a setting of prefill's and decode's
options."""


class VariantPrices:
    """Decode curves, prefill lines and room in memory of every variant of one scenario, and what they share.

    ``chunks``: chunked-prefill budgets to try; ``grid``: batches of decode steps to price. All is priced at once; the
    methods are arithmetic. ``layouts`` and ``depths``: sizes of the variants' layouts, tokens that they draft.
    """

    def __init__(
        self, scenario: Scenario, variants: list[Variant], chunks: tuple[int, ...], memo: Memo | None = None,
        grid: Array = GRID,
    ) -> None:  # fmt: skip
        self.scenario, self.variants, self.chunks, self.grid = scenario, variants, chunks, grid
        self.memo = Memo() if memo is None else memo
        self._whole = whole_model(scenario.model, "prefill", variants[0].prefill.quant)
        self.budgets = sorted({*chunks, scenario.own_chunk})
        sizes = np.array([(v.layout.world_size, v.layout.dp) for v in variants], dtype=float)
        self.layouts: dict[str, Array] = dict(zip(("world_size", "dp"), sizes.T, strict=True))
        self.depths = np.array([v.decode.mtp_depth for v in variants])
        count = len(variants)
        names = ("seconds", "attention_s", "error", "exposed_comm_s", "hidden_comm_s", *EVIDENCE)
        self.curves = {name: np.empty((count, len(self.grid))) for name in names}
        # sequences that fit beside a full prefill step
        self.fits = {budget: np.zeros(count) for budget in self.budgets}
        costs: dict[int, list[tuple[Array, PrefillCosts]]] = {budget: [] for budget in self.budgets}
        self.room_decode, self.room_prefill = np.zeros(count), np.zeros(count)
        # by variant: which fleet at one setting, as which member; overlap changes no memory, so pairs share a fleet
        self._fleet_of, self._member_of = np.zeros(count, dtype=int), np.zeros(count, dtype=int)
        self._fleets: list[Fleet] = []
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._bases: dict[tuple[Layout, str, Options], Deployment] = {}
        self._made: dict[tuple[Any, ...], Fleet] = {}
        self._left: dict[tuple[Any, ...], Any] = {}
        self.own_kv_dtype = ""
        for members in self._groups().values():
            every = {setting for found in members.values() for setting in found}
            settings = sorted(every, key=lambda s: (s.pp, str(s.kv_dtype), s.mtp_depth, s.dual_batch_overlap))
            rows = np.array([[found.get(s, -1) for s in settings] for found in members.values()])
            left = self._price_prefill(list(members), settings, rows, costs)
            self._price_decode(list(members), settings, rows, left)
        self.prompts = {}
        for budget, parts in costs.items():
            positions = np.concatenate([rows for rows, _ in parts])
            self.prompts[budget] = PrefillCosts.joined([part for _, part in parts]).where(np.argsort(positions))
        self.own_prompts = self.prompts[scenario.own_chunk]  # in steps as the engine cuts them unasked

    def in_pools(self) -> VariantPrices:
        """The variants as pools of disaggregated serving run them: those whose prompts are captured only where one
        server has both phases are priced again."""
        engine = self.scenario.engine.in_pools()
        if engine is self.scenario.engine:
            return self
        scenario = replace(self.scenario, engine=engine)
        rows = [i for i, v in enumerate(self.variants) if self._graph_tokens(v.layout)]
        pools = copy.copy(self)
        pools.scenario = scenario
        if rows:
            # of prompts and room alone: one batch of decode steps is the least that can be priced
            again = VariantPrices(scenario, [self.variants[i] for i in rows], (scenario.own_chunk,), grid=self.grid[:1])
            where = np.arange(len(self.variants))
            where[rows] = len(where) + np.arange(len(rows))
            pools.own_prompts = PrefillCosts.joined([self.own_prompts, again.own_prompts]).where(where)
            pools.room_decode = _put(self.room_decode, rows, again.room_decode)
            pools.room_prefill = _put(self.room_prefill, rows, again.room_prefill)
        return pools

    def _fleet(self, members: list[_Member], phase: str) -> tuple[Fleet, tuple[Any, ...]]:
        """The members as one deployment, and what its memory hangs on: overlap changes none, and no member's plan."""
        made = []
        for layout, *options in members:
            key = (layout, phase, options[phase == "decode"])
            if key not in self._bases:
                self._bases[key] = self.scenario.deployment(*key)
            made.append(self._bases[key])
        held = (phase, *map(id, made))
        if held not in self._made:
            self._made[held] = fleet(made, self.memo)
        return self._made[held], held

    def _price_decode(
        self, members: list[_Member], settings: list[_Setting], rows: Array, left: dict[int, Array]
    ) -> None:
        load, grid = self.scenario.load, self.grid
        decode, held = self._fleet(members, "decode")
        self.own_kv_dtype = decode.quantization.kv  # no member asks for another
        kv = [s.kv_dtype or decode.quantization.kv for s in settings]
        bytes_each, depth = [KV_BYTES[name] for name in kv], [s.mtp_depth for s in settings]
        dual, pp = [s.dual_batch_overlap for s in settings], [s.pp for s in settings]
        step = decode.varied(*(np.repeat(values, len(grid)) for values in (bytes_each, depth, dual, pp)))
        price = step.price(np.tile(grid, len(settings)), 1.0, load.context)
        shape = (len(members), len(settings), len(grid))
        there = rows >= 0
        for name, values in decode_columns(price).items():
            whole = np.broadcast_to(values, (shape[0], shape[1] * shape[2])).reshape(shape)
            self.curves[name][rows[there]] = whole[there]
        steps, buffers, each, most = np.empty((4, *rows.shape))
        for i, setting in enumerate(settings):
            key = (*held, setting.kv_dtype, setting.mtp_depth, setting.pp)
            number = self._numbers.setdefault(key, len(self._fleets))
            if number == len(self._fleets):
                self._fleets.append(decode.at(kv[i], setting.mtp_depth, setting.pp))
            one = self._fleets[number]
            # the cache's dtype moves what is left for it only where stages are weighed
            key = (*held, setting.mtp_depth, setting.pp, kv[i] if setting.pp > 1 else "")
            if key not in self._left:
                self._left[key] = decode_budget(one, load.input_len)
            steps[:, i : i + 1], buffers[:, i : i + 1] = self._left[key]
            each[:, i : i + 1] = sequence_bytes(one, load.input_len, load.output_len)
            most[:, i] = one.most_sequences
            mine = there[:, i]
            self._fleet_of[rows[mine, i]], self._member_of[rows[mine, i]] = number, np.flatnonzero(mine)
        fits = room(decode, steps, each + buffers, most)
        self.room_decode[rows[there]] = fits[there]
        for budget, prefilling in left.items():
            self.fits[budget][rows[there]] = np.minimum(fits, room(decode, prefilling, each, most))[there]

    def _price_prefill(
        self, members: list[_Member], settings: list[_Setting], rows: Array,
        costs: dict[int, list[tuple[Array, PrefillCosts]]],
    ) -> dict[int, Array]:
        """Adds to ``costs``; what a full step of each budget leaves for the cache, ``[members, settings]``."""
        load = self.scenario.load
        prefill, held = self._fleet(members, "prefill")
        kinds = list(dict.fromkeys((s.kv_dtype, s.dual_batch_overlap, s.pp) for s in settings))
        cuts = [cut_prompts(load, budget) for budget in self.budgets]
        sizes = [(batch, cut.tokens, cut.past) for cut in cuts for batch in cut.batches]
        batch, new, past = np.tile(np.array(sizes), (len(kinds), 1)).T
        dtypes, dual, pp = zip(*kinds, strict=True)
        kv = [dtype or prefill.quantization.kv for dtype in dtypes]
        bytes_each, depth = [KV_BYTES[name] for name in kv], [0] * len(kinds)
        step = prefill.varied(*(np.repeat(values, len(sizes)) for values in (bytes_each, depth, dual, pp)))
        price = step.price(batch, new, past)
        shape, there = (len(members), len(kinds), len(cuts), 3), rows >= 0
        columns = {
            name: np.broadcast_to(values, (shape[0], len(batch))).reshape(shape)
            for name, values in prefill_columns(price, prefill).items()
        }
        kind_of = [kinds.index((s.kv_dtype, s.dual_batch_overlap, s.pp)) for s in settings]
        ones = [prefill.at(name, 0, stages) for name, stages in zip(kv, pp, strict=True)]
        column, left = (len(members), 1), dict[int, Array]()
        for i, (budget, cut) in enumerate(zip(self.budgets, cuts, strict=True)):
            mine = {name: values[:, kind_of, i] for name, values in columns.items()}
            costs[budget].append((rows[there], prefill_costs(mine, cut.tokens, cut.per_step).where(there)))
            asked = []
            for one, name in zip(ones, kv, strict=True):
                key = (*held, budget, one.layout.pp, name if one.layout.pp > 1 else "")
                if key not in self._left:
                    self._left[key] = prefill_budget(one, cut)
                asked.append(np.broadcast_to(self._left[key], column))
            left[budget] = np.hstack(asked)[:, kind_of]
        own = left[self.scenario.own_chunk]
        held_each = [sequence_bytes(one, load.input_len, 0) for one in ones]
        each = np.hstack([np.broadcast_to(one, column) for one in held_each])[:, kind_of]
        self.room_prefill[rows[there]] = room(prefill, own, each)[there]
        return left

    def _groups(self) -> dict[_Structure, dict[_Member, dict[_Setting, int]]]:
        """Positions of the variants by structure, member and setting."""
        members: dict[tuple[Any, ...], dict[_Setting, int]] = {}
        plain: dict[int, Options] = {}  # by identity: many variants, few options
        made: dict[Options, Options] = {}
        for i, variant in enumerate(self.variants):
            for options in (variant.prefill, variant.decode):
                if id(options) not in plain:
                    one = replace(options, kv_dtype=None, mtp_depth=0, dual_batch_overlap=False)
                    plain[id(options)] = made.setdefault(one, one)
            layout, own = variant.layout, variant.decode
            kept = id(plain[id(variant.prefill)]), id(plain[id(own)])
            key = (layout.tp, layout.dp, layout.ep, self._graph_tokens(layout), *kept)
            setting = _Setting(own.kv_dtype, own.mtp_depth, own.dual_batch_overlap, layout.pp)
            members.setdefault(key, {})[setting] = i
        found: dict[_Structure, dict[_Member, dict[_Setting, int]]] = {}
        for positions in members.values():
            most = self.variants[positions[max(positions, key=lambda setting: setting.pp)]]
            member = (most.layout, plain[id(most.prefill)], plain[id(most.decode)])
            found.setdefault(self._structure(*member), {})[member] = positions
        return found

    @cached_property
    def _graph_tokens(self) -> Callable[[Layout], int]:
        """Tokens of the largest captured prefill step of a layout."""
        model, device, engine = self.scenario.model, self.scenario.device, self.scenario.engine
        experts = self._whole.facts.num_experts
        largest = cache(lambda dp, pp: engine.prefill_graph_tokens(device, dp, pp, model.config))
        return lambda layout: largest(attention_dp(layout, experts), layout.pp)

    def _structure(self, layout: Layout, prefill: Options, decode: Options) -> _Structure:
        options = {"prefill": prefill, "decode": decode}
        exchange = [choose_all2all(o.all2all, layout, self.scenario.engine, phase) for phase, o in options.items()]
        one = self.scenario
        known: dict[str, Any] = {"device": one.device, "config": one.model.config, "whole": self._whole}
        blocks = [
            block_form(o, layout, kind, one.engine, **known)
            for o, kind in zip(options.values(), exchange, strict=True)
        ]
        # what becomes a column of the fleet's arrays may differ
        common = [
            replace(
                o, dispatch=None, redundant_experts=0, placement="linear",
                external_shared_experts=min(1, o.external_shared_experts),
            )
            for o in options.values()
        ]
        return _Structure(
            layout.tp, self._graph_tokens(layout), (exchange[0], exchange[1]), (blocks[0], blocks[1]),
            (common[0], common[1]),
        )  # fmt: skip

    def without_room(self) -> int:
        """Variants that hold no sequence, in either mode of serving."""
        room = np.max([self.room_decode, *(self.fits[budget] for budget in self.chunks)], axis=0)
        return int((room < 1).sum())

    def memory(self, points: Points) -> dict[str, Array]:
        """Bytes on the fullest GPU of every point while its batch decodes, each reply half done."""
        names = ("weights", "kv_cache", "activations", "total")
        found = {name: np.full(len(points.variant), np.nan) for name in names}
        batch, number = points.columns["batch"], self._fleet_of[points.variant]
        order = np.argsort(number, kind="stable")
        for mine in np.split(order, np.flatnonzero(np.diff(number[order])) + 1) if len(points.variant) else ():
            values, column = np.unique(batch[mine], return_inverse=True)
            decode, member = self._fleets[number[mine[0]]], self._member_of[points.variant[mine]]
            memory = decode.memory(values[None, :], 1, int(self.scenario.load.context) - 1)
            for name in names:
                whole = np.broadcast_to(getattr(memory, name), (decode.size, len(values)))
                found[name][mine] = whole[member, column]
        return found
