"""Rows of a step at one load: equal ones are asked and priced once, and remembered where a memo is shared."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np

from tensorcast.cost.formulas import Context
from tensorcast.deploy.plan.plan import Collective, Row
from tensorcast.deploy.step.layer_points import mean_over_layers, of_members, spread_out
from tensorcast.deploy.step.price import RowPrice, Where, joined, pick
from tensorcast.deploy.step.row_prices import Asked, Contents, Pending, RowPricer, content_of
from tensorcast.deploy.step.sizes import distinct
from tensorcast.trace.dims import Sizes
from tensorcast.trace.table import Op, kept_beside

RECENT = 16
"""Loads and sizes whose routed rows are remembered: prefill, decode and drafts of the last few fleets."""

READS_CACHE = ("attention", "kv_cache_write", "kv_cache_read", "sparse_indexer")
"""Ops whose kernels or traffic depend on the cache's dtype."""

Prices = dict[Hashable, RowPrice]
"""Prices at one load, by what rows do."""

Waiting = dict[tuple[int, Hashable], tuple[Prices, Pending, Where]]
"""Rows that have asked and have no price yet, of all steps that ask together: by the prices that they belong to, kept
alive here, and their name there. ``Where``: which of a row's cases the batches are."""


@dataclass
class Memo:
    """Prices of rows by the sizes they were priced at; shared by the fleets of one model, device and engine.

    ``load`` tells the expert load of a fleet from that of others, by its ``members``' too, which are kept alive, so
    that their ids stay their own.
    """

    plain: dict[Hashable, Prices] = field(default_factory=dict)
    routed: dict[Hashable, tuple[object, Prices]] = field(default_factory=dict)
    """Of rows that depend on the expert load; large, so only those at the last few loads are kept: fleets that differ
    in their shared experts follow each other."""
    load: tuple[Hashable, ...] = ()
    members: tuple[object, ...] = ()
    most: int = 1 << 20
    """Sizes whose plain rows are remembered; a memo that outlives a search forgets the oldest."""


@dataclass(frozen=True, kw_only=True)
class Collectives(Collective):
    """One row's collective of every member of a fleet; what they share is in the fields of the first.

    ``groups``: members that lie alike, by position, with the bytes of each as a column.
    """

    members: int
    groups: tuple[tuple[np.ndarray, Collective], ...]


class AskedRows:
    """Prices of rows at one context: first each row asks for its corrections, then, when they are there, its price."""

    def __init__(self, pricer: RowPricer, at: Context, asked: Asked, memo: Memo, *, waiting: Waiting) -> None:
        self._pricer, self._at, self._asked, self._memo, self._waiting = pricer, at, asked, memo, waiting
        numbers = (at.sizes.B, at.sizes.S, at.sizes.P, at.verify, at.kv_bytes, at.stages)
        shapes = (np.asarray(number, dtype=float) for number in numbers)
        self._key = (pricer.table.phase, pricer.graph_tokens, *((value.shape, value.tobytes()) for value in shapes))
        self._plain = memo.plain.setdefault(self._key, {})
        if len(memo.plain) > memo.most:
            del memo.plain[next(iter(memo.plain))]
        # of rows that depend on the expert load
        recent, key = memo.routed, (*self._key, at.backend, *memo.load)
        recent[key] = found = recent.pop(key, (memo.members, {}))
        if len(recent) > RECENT:
            recent.pop(next(iter(recent)))
        self._routed = found[1]
        self._here: Prices = {}  # not to be remembered: what differs between members
        self._by_dtype: dict[tuple[float, bool], AskedRows] = {}
        self._contents = kept_beside(pricer.table, Contents)

    def ask(self, row: Row) -> tuple[Prices, Hashable]:
        """Ask for the corrections of a row, unless its price is known or an equal one has asked; where its price will
        be, and under which name."""
        name: Hashable  # what is equal for rows of one price, in the prices where that is remembered
        if not isinstance(row, Collective):
            name, routed = content_of(row, self._contents)
            prices = self._routed if routed else self._plain
        elif isinstance(row, Collectives):
            prices, name = self._here, id(row)
        else:
            name = (row.op, row.group, row.ranks, row.extent, row.scale, row.per, *sorted(row.exchange.items()))
            prices = self._here if row.exchange else self._plain
        key = id(prices), name
        if name not in prices and key not in self._waiting:
            found = self._collective(row) if isinstance(row, Collective) else self._op(row)
            self._waiting[key] = prices, *found
        return prices, name

    def price(self, prices: Prices, name: Hashable) -> RowPrice:
        """The price of a row that has asked; it may tell of an equal row."""
        if name not in prices:
            _, pending, where = self._waiting.pop((id(prices), name))
            prices[name] = pending().at(where)
        return prices[name]

    def _op(self, op: Op) -> tuple[Pending, Where]:
        at, pricer = self._at, self._pricer
        if content_of(op, self._contents).routed:
            few, where = self._by_tokens
            one: Pending = partial(pricer.kernels, op, few, pricer.works(op, few, self._asked))
            return (one, where) if few.points is None else self._meaned(one, where)
        if np.ndim(at.stages):
            rows, where = self._unstaged
            return partial(rows.price, *rows.ask(op)), where
        cached = np.asarray(at.kv_bytes)
        if not cached.ndim:
            return partial(pricer.kernels, op, at, pricer.works(op, at, self._asked)), None
        if op.name not in READS_CACHE:  # all the same to it
            return self._of_dtype(op, float(cached[0]), slice(None)), None
        # kernels are chosen by what the cache holds: each dtype's batches are priced apart
        parts = [(np.flatnonzero(cached == kv), float(kv)) for kv in np.unique(cached)]
        pending = [(where, self._of_dtype(op, kv, where)) for where, kv in parts]
        return partial(joined, pending, cached.shape), None

    def _of_dtype(self, op: Op, kv_bytes: float, where: np.ndarray | slice) -> Pending:
        """The op at the batches ``where`` as if all caches held ``kv_bytes`` per element."""
        key = kv_bytes, isinstance(where, slice)
        if key not in self._by_dtype:
            at = self._at
            width = np.size(at.kv_bytes)
            batch, new, past, verify = (
                np.broadcast_to(value, width)[where] for value in (at.sizes.B, at.sizes.S, at.sizes.P, at.verify)
            )
            sizes = replace(at.sizes, B=batch, S=new, P=past)
            one = replace(at, sizes=sizes, verify=verify, kv_bytes=kv_bytes, stages=1)
            self._by_dtype[key] = AskedRows(self._pricer, one, self._asked, self._memo, waiting=self._waiting)
        rows = self._by_dtype[key]
        return partial(rows.price, *rows.ask(op))

    def _collective(self, row: Collective) -> tuple[Pending, Where]:
        if not isinstance(row, Collectives):
            if not row.exchange and np.ndim(self._at.stages):
                rows, where = self._unstaged
                return partial(rows.price, *rows.ask(row)), where
            if self._at.points is None or not row.exchange:
                return self._pricer.collective(row, self._at, self._asked), None
            few, where = self._by_tokens
            return self._meaned(self._pricer.collective(row, few, self._asked), where)
        few, where = self._by_tokens
        parts: list[tuple[np.ndarray, Pending]] = []
        for members, one in row.groups:
            copies = {name: np.asarray(column)[members] for name, column in self._pricer.distinct.items()}
            pricer = replace(self._pricer, distinct=copies)
            own = few if few.points is None else of_members(few, members)
            parts.append((members, pricer.collective(one, own, self._asked)))
        every: Pending = partial(joined, parts, (row.members, np.size(few.sizes.B)))
        return (every, where) if few.points is None else self._meaned(every, where)

    def _meaned(self, pending: Pending, where: Where) -> tuple[Pending, Where]:
        """The mean over layers of what was asked at the loads of groups of them; ``where``: which of the numbers of
        tokens each case has."""
        points, single = self._at.points, not np.ndim(self._at.sizes.B)
        assert points is not None
        if points.weights.ndim == 1:
            return lambda: mean_over_layers(pending(), points.weights, single), where
        return lambda: mean_over_layers(pending(), points.weights, single, where), None

    @cached_property
    def _unstaged(self) -> tuple[AskedRows, Where]:
        """Where cases are told apart by their pipeline stages, all the sizes of rows that these leave as they are, each
        once, and which of them each case has."""
        at = self._at
        first, inverse = distinct([at.sizes.B, at.sizes.S, at.sizes.P, at.verify, at.kv_bytes])
        sizes = {name: pick(getattr(at.sizes, name), first) for name in ("B", "S", "P", "R", "E", "X")}
        hit, capacity, verify, kv = (pick(one, first) for one in (at.hit, at.capacity, at.verify, at.kv_bytes))
        one = replace(
            at, sizes=Sizes(**sizes), hit=hit, capacity=capacity, verify=verify, kv_bytes=kv, stages=1, points=None
        )
        return AskedRows(self._pricer, one, self._asked, self._memo, waiting=self._waiting), inverse

    @cached_property
    def _by_tokens(self) -> tuple[Context, Where]:
        """Every number of tokens once, and which of these each batch has: all that experts are told."""
        at = self._at
        if np.ndim(at.sizes.B) != 1:
            return at if at.points is None else spread_out(at), None
        first, inverse = distinct([at.sizes.B, at.sizes.S])
        if len(first) == len(inverse):
            return at if at.points is None else spread_out(at), None
        sizes = {name: pick(getattr(at.sizes, name), first) for name in ("B", "S", "P", "R", "E", "X")}
        hit, capacity, verify, kv = (pick(one, first) for one in (at.hit, at.capacity, at.verify, at.kv_bytes))
        few = replace(at, sizes=Sizes(**sizes), hit=hit, capacity=capacity, verify=verify, kv_bytes=kv)
        if at.points is not None:
            few = spread_out(replace(few, points=at.points.each(lambda loads: loads[..., first, :])))
        return few, inverse
