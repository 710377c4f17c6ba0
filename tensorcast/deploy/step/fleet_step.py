"""A step with one entry per deployment, rows remembered."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tensorcast.cost.formulas import Context
from tensorcast.cost.routing import ExpertLoad, RankLoad
from tensorcast.deploy.plan.moe_blocks import EXPERT_STAGES
from tensorcast.deploy.plan.plan import Collective, Row
from tensorcast.deploy.step.overlap import Overlap
from tensorcast.deploy.step.pipeline_stages import stages_of_each
from tensorcast.deploy.step.price import RowPrice, Spending, StepPrice, one_level, pick
from tensorcast.deploy.step.row_prices import content_of
from tensorcast.deploy.step.sizes import Batches
from tensorcast.deploy.step.step import Step
from tensorcast.trace.dims import Sizes
from tensorcast.trace.table import Op, OpTable, per_table

RECENT = 16
"""Loads and sizes whose routed rows are remembered: prefill, decode and drafts of the last few fleets."""

READS_CACHE = ("attention", "kv_cache_write", "kv_cache_read", "sparse_indexer")
"""Ops whose kernels or traffic depend on the cache's dtype."""

Memo = dict[tuple[Any, ...], Any]
"""Prices of rows by what they do and at which sizes; shared by the fleets of one model, device and engine."""


@dataclass(frozen=True)
class Layouts:
    """Layouts of the members: tp is one number, pp, too, or one per batch; the rest are columns ``[members, 1]``."""

    tp: int
    pp: Any
    dp: Any
    ep: Any
    etp: Any
    stage_ranks: Any


_VARYING = ("dp", "ep", "etp", "stage_ranks")


@dataclass(frozen=True)
class Loads:
    """Expert loads of the members."""

    members: tuple[ExpertLoad, ...]
    local_experts: Any

    def at(self, tokens: Any) -> RankLoad:
        """Loads at ``tokens [members, batches]`` (or ``[members, 1]``): every distinct load is asked once."""
        found: list[np.ndarray] = [np.empty(np.shape(tokens)) for _ in range(3)]
        for load, rows in _distinct(self.members):
            at = load.at(tokens[rows])
            for whole, part in zip(found, (at.rows, at.hit, at.mean_rows), strict=True):
                whole[rows] = part
        return RankLoad(*found)


def _together(loads: tuple[ExpertLoad, ...]) -> Any:
    """Loads of the members; even ones are plain arithmetic, so one load with columns stands for all."""
    names = ("num_physical", "ranks", "local_experts")
    columns: dict[str, Any] = {name: _column([getattr(one, name) for one in loads]) for name in names}
    if all(one.busiest is None for one in loads):
        return replace(loads[0], **columns)
    return Loads(loads, columns["local_experts"])


@dataclass(frozen=True)
class Dispatch:
    """What tokens are sent in: bytes per element, a column."""

    activation_bytes: Any


@dataclass(frozen=True)
class Collectives(Collective):
    """One row's collective of every member; what they share is in the fields of the first."""

    members: tuple[Collective, ...] = field(default=())


class FleetStep(Step):
    """The prototype's step with every size that differs between ``members`` as a column."""

    def __init__(self, prototype: Step, members: Sequence[Step], memo: Memo) -> None:
        # the prototype in all but what is set below; its own making would ask for one layout
        self.__dict__.update(prototype.__dict__)
        layouts = [member.layout for member in members]
        columns = {name: _column([getattr(one, name) for one in layouts]) for name in _VARYING}
        self.layout = Layouts(prototype.layout.tp, prototype.layout.pp, **columns)  # type: ignore[assignment]
        self._loads: tuple[ExpertLoad, ...] = ()
        self._load_key: tuple[Any, ...] = ()
        if prototype.load is not None:
            loads = tuple(member.load for member in members if member.load is not None)
            self.load, self._loads = _together(loads), loads
            sizes = [getattr(self.layout, name).tobytes() for name in ("dp", "etp")]
            self._load_key = (*sizes, *map(id, loads))
        self.distinct = {name: _column([one.distinct[name] for one in members]) for name in prototype.distinct}
        # whose experts' kernels run may hang on the spread of experts
        self.sources = {dtype: _column([one.sources[dtype] for one in members]) for dtype in prototype.sources}
        named = _named(prototype.table)
        rows = tuple(
            _merged(row, [(*member.plan.rows, row)[i] for member in members], named)  # no stages: never handed over
            for i, row in enumerate(prototype.plan.rows)
        )
        sent = Dispatch(_column([member.plan.dispatch.activation_bytes for member in members]))
        self.plan = replace(prototype.plan, rows=rows, dispatch=sent)  # type: ignore[arg-type]
        self.size, self._memo = len(members), memo
        self._keys: dict[int, tuple[Context, tuple[bytes, ...]]] = {}
        self._contexts: dict[tuple[int, float, bool], tuple[Context, Context]] = {}
        self._tokens: dict[int, tuple[Context, Context, Any]] = {}

    def vary(self, kv_bytes: Any, mtp_depth: Any, dual_batch_overlap: Any, pp: Any) -> None:
        """Take, batch by batch, what rows do not depend on or only few of them."""
        self.kv_bytes, self.layout = kv_bytes, replace(self.layout, pp=pp)
        self.options = replace(self.options, mtp_depth=mtp_depth, dual_batch_overlap=dual_batch_overlap)
        self.overlap = Overlap(self.plan, self.table, self.engine, self.options, self.captured)
        self._stages = stages_of_each(self.table.layer_kinds, pp)

    def _at(self, batch: Any, new: Any, past: Any) -> Batches:
        """Every case once: parts of many batches, and what they draft, are of the same sizes."""
        micro, whole = self._micro(batch)
        sizes = [(whole / self._halves, new, past, self._verify, self.kv_bytes)]
        if self._speculates:
            sizes.append((whole, 1.0, past, 1.0, self.kv_bytes))
        every = [_in_a_row(values, len(whole)) for values in zip(*sizes, strict=True)]
        first, where = _cases(every)
        own, *draft = np.split(where, len(sizes))
        return Batches(micro, self._sizes(*(pick(value, first) for value in every)), None, own, *draft)

    def _rows(self, at: Batches) -> tuple[tuple[RowPrice, ...], tuple[RowPrice, ...]]:
        rows = tuple(self._row(row, at.rows) for row in self.plan.rows)
        if at.draft_at is None:
            return rows, ()
        return rows, (self._row(self._project, at.rows), *(rows[i] for i in self._drafted))

    def _kernel(self, op: Op, at: Context) -> RowPrice:
        content = op.attrs.get("memo")
        if content is None:
            return super()._kernel(op, at)
        key = (self.table.phase, content, self.graph_tokens, self._key(at))
        known = self._at_load(at) if op.attrs["routed"] else self._memo
        if key not in known:
            known[key] = self._unknown(op, at)
        price: RowPrice = known[key]
        return price

    def _at_load(self, at: Context) -> Memo:
        """Prices of routed rows at these loads and sizes. Large, so only the last few of them are kept: fleets that
        differ in their shared experts follow each other."""
        recent: dict[Any, Any] = self._memo.setdefault(("recent",), {})
        key = (self.table.phase, self.plan.backend, *self._load_key, self._key(at))
        loads, found = recent.pop(key, (self._loads, {}))  # loads stay alive, so their ids stay their own
        recent[key] = loads, found
        if len(recent) > RECENT:
            recent.pop(next(iter(recent)))
        prices: Memo = found
        return prices

    def _unknown(self, op: Op, at: Context) -> RowPrice:
        if op.attrs["routed"]:
            few, where = self._by_tokens(at)
            return super()._kernel(op, few).at(where)
        if not np.ndim(at.kv_bytes):
            return super()._kernel(op, at)
        if op.name in READS_CACHE:
            return self._by_cache_dtype(op, at)
        return self._kernel(op, self._with(at, float(at.kv_bytes[0])))  # all the same to it

    def _by_cache_dtype(self, op: Op, at: Context) -> RowPrice:
        """Kernels are chosen by what the cache holds: each dtype's batches are priced apart."""
        parts = [(np.flatnonzero(at.kv_bytes == kv), float(kv)) for kv in np.unique(at.kv_bytes)]
        prices = [(where, self._kernel(op, self._with(at, kv, where))) for where, kv in parts]
        return _joined(prices, (len(at.kv_bytes),))

    def _with(self, at: Context, kv_bytes: float, where: Any = slice(None)) -> Context:
        """``at`` for one cache dtype, at some of its batches."""
        key = (id(at), kv_bytes, isinstance(where, slice))
        if key not in self._contexts:
            width = len(at.kv_bytes)
            some = {n: np.broadcast_to(getattr(at.sizes, n), width)[where] for n in ("B", "S", "P")}
            verify = np.broadcast_to(at.verify, width)[where]
            one = replace(at, sizes=replace(at.sizes, **some), verify=verify, kv_bytes=kv_bytes)
            self._contexts[key] = (at, one)
        return self._contexts[key][1]

    def _by_tokens(self, at: Context) -> tuple[Context, Any]:
        """``at`` with every number of tokens once, and which of these each batch has: all that experts are told."""
        if id(at) not in self._tokens:
            few, where = at, None
            if np.ndim(at.sizes.B) == 1:
                first, inverse = _cases([at.sizes.B, at.sizes.S])
                if len(first) < len(inverse):
                    sizes = {name: pick(getattr(at.sizes, name), first) for name in ("B", "S", "P", "R", "E", "X")}
                    names = ("hit", "capacity", "verify", "kv_bytes")
                    loads = {name: pick(getattr(at, name), first) for name in names}
                    few, where = replace(at, sizes=Sizes(**sizes), **loads), inverse
            self._tokens[id(at)] = at, few, where
        return self._tokens[id(at)][1:]

    def _key(self, at: Context) -> tuple[Any, ...]:
        """What the price of a row that routing does not touch depends on."""
        if id(at) not in self._keys:
            numbers = (at.sizes.B, at.sizes.S, at.sizes.P, at.verify, at.kv_bytes)
            self._keys[id(at)] = (at, tuple(np.asarray(x, dtype=float).tobytes() for x in numbers))
        return self._keys[id(at)][1]

    def price(self, batch: Any, new: Any, past: Any) -> StepPrice:
        self._keys.clear()
        self._contexts.clear()
        self._tokens.clear()
        return super().price(batch, new, past)

    def _collective(self, row: Collective, at: Context) -> RowPrice:
        if not isinstance(row, Collectives):
            return super()._collective(row, at)
        first = row.members[0]
        alone = replace(first, module=row.module)
        if all(m.extent == first.extent and m.scale == first.scale for m in row.members) and not row.exchange:
            key = (row.op, row.group, first.extent, first.scale, row.per, self.graph_tokens, self._key(at))
            if key not in self._memo:
                self._memo[key] = super()._collective(alone, at)
            price: RowPrice = self._memo[key]
            return price
        few, where = self._by_tokens(at)
        kinds = [(m.extent, *sorted(m.exchange.items())) for m in row.members]
        found: list[tuple[np.ndarray, RowPrice]] = []
        for _, members in _distinct(kinds):
            some = copy.copy(self)
            some.distinct = {name: column[members] for name, column in self.distinct.items()}
            scale = _column([row.members[i].scale for i in members])
            one = replace(row.members[members[0]], scale=scale, module=row.module)
            found.append((members, Step._collective(some, one, few)))
        return self._gathered(alone, found).at(where)

    def _gathered(self, row: Collective, found: list[tuple[np.ndarray, RowPrice]]) -> RowPrice:
        """One price from those of groups of members."""
        width = max(np.shape(price.seconds)[-1] for _, price in found)
        return replace(_joined(found, (self.size, width)), row=row)


def _joined(found: Sequence[tuple[np.ndarray, RowPrice]], shape: tuple[int, ...]) -> RowPrice:
    """One price from those of parts of the first axis."""

    def gather(values: Sequence[Any]) -> np.ndarray:
        whole = np.empty(shape)
        for (part, _), value in zip(found, values, strict=True):
            whole[part] = value
        return whole

    def spend() -> Spending:
        each = [price.spending for _, price in found]
        flops, moved, wire, ideal_s = (gather([one[i] for one in each]) for i in range(4))
        return Spending(flops, moved, wire, ideal_s, {n: gather([one.parts[n] for one in each]) for n in each[0].parts})

    prices = [price for _, price in found]
    numbers = ("seconds", "waits_s", "error")
    whole: dict[str, Any] = {name: gather([getattr(price, name) for price in prices]) for name in numbers}
    level = one_level(gather([price.level for price in prices]).astype(np.int8))
    return replace(prices[0], **whole, level=level, spend=spend)


@per_table
def _named(table: OpTable) -> dict[int, tuple[Op, Op]]:
    """Ops by identity, and as :func:`_merged` has them; the table's plans share most of their rows."""
    return {}


def _merged(row: Row, members: list[Row], named: dict[int, tuple[Op, Op]]) -> Row:
    """The row as a fleet has it: collectives of all members; an op with a memo's name and whether it is routed."""
    if not isinstance(row, Collective):
        if id(row) not in named:
            named[id(row)] = row, row.but(attrs={**row.attrs, "memo": content_of(row), "routed": _is_routed(row)})
        return named[id(row)][1]
    shared = tuple(m for m in members if isinstance(m, Collective) and (m.op, m.label) == (row.op, row.label))
    assert len(shared) == len(members), "members of a fleet have the same rows"
    values = {name: getattr(row, name) for name in Collective.__dataclass_fields__}
    return Collectives(**values, members=shared)


def _is_routed(op: Op) -> bool:
    """Whether a row's sizes depend on how tokens fall on experts, and so on the layout."""
    dims = [dim for tensor in (*op.inputs, *op.outputs) for dim in tensor.dims]
    return op.stage in EXPERT_STAGES or any(dim.R or dim.E or dim.X for dim in dims)


def _in_a_row(values: Sequence[Any], width: int) -> Any:
    """One after another, each as wide as all batches; a number where all are this number."""
    if not any(map(np.ndim, values)) and len(set(values)) == 1:
        return values[0]
    return np.concatenate([np.broadcast_to(value, width) for value in values])


def _cases(columns: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Where every combination of the columns' values first stands, and which combination every entry is."""
    code: Any = 0
    for values in columns:
        if np.ndim(values):
            found, where = np.unique(values, return_inverse=True)
            code = code * len(found) + where
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    return first, inverse


def _column(values: Sequence[Any]) -> np.ndarray:
    return np.array(values, dtype=float)[:, None]


def _distinct(items: Sequence[Any]) -> list[tuple[Any, np.ndarray]]:
    """Distinct items (by identity of unhashable ones) and where they stand."""
    where: dict[Any, list[int]] = {}
    first: dict[Any, Any] = {}
    for i, item in enumerate(items):
        key = item if isinstance(item, tuple) else id(item)
        where.setdefault(key, []).append(i)
        first.setdefault(key, item)
    return [(first[key], np.array(found)) for key, found in where.items()]
