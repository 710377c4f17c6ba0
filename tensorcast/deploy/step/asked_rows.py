"""Rows of a step at one load: equal ones are asked and priced once, and remembered where a memo is shared."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from tensorcast.cost.formulas import Context
from tensorcast.deploy.plan.plan import Collective, Row
from tensorcast.deploy.step.alike import Content, Questions, content_of
from tensorcast.deploy.step.layer_points import loads_of, mean_over_layers, spread_out
from tensorcast.deploy.step.price import RowPrice, Where, joined, pick
from tensorcast.deploy.step.row_prices import Pending, RowPricer
from tensorcast.deploy.step.sizes import distinct
from tensorcast.trace.dims import Sizes

RECENT = 96
"""Loads and sizes whose routed rows are remembered: prefill, decode and drafts of the fleets of a few searches."""

READS_CACHE = ("attention", "kv_cache_write", "kv_cache_read", "sparse_indexer")
"""Ops whose kernels or traffic depend on the cache's dtype."""

Prices = dict[Hashable, RowPrice]
"""Prices at one load, by what rows do."""


class Named(NamedTuple):
    """A row by what it costs: at one load, rows of one ``name`` in one ``store`` have one price.

    ``store``: whose price it is. ``plain``, ``lasting``: that of all layouts, which cached tokens are told or are not;
    ``linked``: of a collective, of all layouts that join norms to theirs, or of all that do not; ``routed``: of those
    where tokens fall on experts alike; ``here``: of one step, not to be remembered.
    """

    row: Row
    content: Content | None
    store: str
    name: Hashable


def named(row: Row) -> Named:
    """The row with its name."""
    if isinstance(row, Collectives):
        return Named(row, None, "routed", ("members", id(row)))  # which its price keeps alive
    if isinstance(row, Collective):
        name = (row.op, row.group, row.ranks, row.extent, row.scale, row.per, *sorted(row.exchange.items()))
        return Named(row, None, "here" if row.exchange else "linked", name)
    content = content_of(row)
    if content.routed:
        return Named(row, content, "here" if content.cached else "routed", content.number)
    return Named(row, content, "plain" if content.cached else "lasting", content.number)


def store_keys(pricer: RowPricer, backend: str, memo: Memo) -> dict[str, tuple[Hashable, ...]]:
    """What tells stores of the same sizes apart, but for that of one step."""
    lasting = pricer.table.phase, pricer.graph_tokens
    return {
        "plain": lasting, "lasting": lasting, "linked": (*lasting, pricer.joins),
        "routed": (*lasting, pricer.held, backend, *memo.load),
    }


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
    """Of rows that depend on the expert load; large, so only those at the last :data:`RECENT` loads are kept."""
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


class SizesOfAll:
    """What the rows of one or several steps are priced at, all members together; found once for all."""

    def __init__(self, at: Context) -> None:
        self.at = at
        numbers = (at.sizes.P, at.sizes.B, at.sizes.S, at.verify, at.kv_bytes, at.stages)
        self.key = tuple([(one.shape, one.tobytes()) for one in (np.asarray(n, dtype=float) for n in numbers)])
        """Cached tokens, then all else."""
        few, where = at, None
        if np.ndim(at.sizes.B) == 1:
            first, inverse = distinct([at.sizes.B, at.sizes.S])
            if len(first) < len(inverse):
                sizes = {name: pick(getattr(at.sizes, name), first) for name in ("B", "S", "P", "R", "E", "X")}
                hit, capacity, verify, kv = (pick(one, first) for one in (at.hit, at.capacity, at.verify, at.kv_bytes))
                few = replace(at, sizes=Sizes(**sizes), hit=hit, capacity=capacity, verify=verify, kv_bytes=kv)
                where = inverse
                if at.points is not None:
                    few = replace(few, points=at.points.each(lambda loads: loads[..., first, :]))
        self.by_tokens: tuple[Context, Where] = few if few.points is None else spread_out(few), where
        """Every number of tokens once, and which of these each batch has: all that experts are told."""

    @cached_property
    def unstaged(self) -> tuple[SizesOfAll, Where]:
        """Where cases are told apart by their pipeline stages, all the sizes of rows that these leave as they are, each
        once, and which of them each case has."""
        at = self.at
        first, inverse = distinct([at.sizes.B, at.sizes.S, at.sizes.P, at.verify, at.kv_bytes])
        sizes = {name: pick(getattr(at.sizes, name), first) for name in ("B", "S", "P", "R", "E", "X")}
        hit, capacity, verify, kv = (pick(one, first) for one in (at.hit, at.capacity, at.verify, at.kv_bytes))
        one = replace(
            at, sizes=Sizes(**sizes), hit=hit, capacity=capacity, verify=verify, kv_bytes=kv, stages=1, points=None
        )
        return SizesOfAll(one), inverse

    @cached_property
    def by_dtype(self) -> dict[tuple[float, bool], SizesOfAll]:
        """Batches as if all caches held so many bytes per element."""
        return {}


class AskedRows:
    """Prices of rows of one step at one load: first each row asks for its corrections, then, when they are there, its
    price. ``members``: of all in ``sizes`` those of this step; None: they are."""

    def __init__(
        self, pricer: RowPricer, backend: str, sizes: SizesOfAll, members: slice | None, *, asked: Questions,
        memo: Memo, waiting: Waiting,
    ) -> None:
        self._pricer, self._backend, self._sizes, self._members = pricer, backend, sizes, members
        self._asked, self._memo, self._waiting, self._at = asked, memo, waiting, sizes.at
        own = store_keys(pricer, backend, memo)
        keys = {"plain": (*own["plain"], *sizes.key)}
        keys |= {name: (*own[name], *sizes.key[1:]) for name in ("lasting", "linked")}
        self._stores: dict[str, Prices] = {
            name: memo.plain.setdefault(key, memo.plain.pop(key, {})) for name, key in keys.items()
        }
        while len(memo.plain) > memo.most:
            del memo.plain[next(iter(memo.plain))]
        recent, key = memo.routed, (*own["routed"], *sizes.key[1:])
        recent[key] = found = recent.pop(key, (memo.members, {}))
        if len(recent) > RECENT:
            recent.pop(next(iter(recent)))
        self._stores |= {"routed": found[1], "here": {}}
        self._by_dtype: dict[tuple[float, bool], AskedRows] = {}
        self._place = asked.place((id(pricer.device), id(pricer.engine), self._at.decode, *sizes.key))

    def ask(self, asked: Named) -> tuple[Prices, Hashable]:
        """Ask for the corrections of a row, unless its price is known or an equal one has asked; where its price will
        be, and under which name."""
        row, content, store, name = asked
        prices = self._stores[store]
        key = id(prices), name
        if name in prices or key in self._waiting:
            return prices, name
        found: tuple[Pending, Where]
        at, pricer, cached = self._at, self._pricer, np.asarray(self._at.kv_bytes)
        if isinstance(row, Collective):
            found = self._collective(row, asked)
        elif content is not None and content.routed:
            few, where = self._by_tokens
            found = self._asked.op(pricer, content, row, few, id(few)), where
            if few.points is not None:
                found = self._meaned(*found)
        elif np.ndim(at.stages):
            rows, where = self._unstaged
            found = partial(rows.price, *rows.ask(asked)), where
        elif content is not None and not cached.ndim:
            found = self._asked.op(pricer, content, row, at, self._place), None
        elif row.name not in READS_CACHE:  # all the same to it
            found = self._of_dtype(asked, float(cached[0]), slice(None)), None
        else:  # kernels are chosen by what the cache holds: each dtype's batches are priced apart
            parts = [(np.flatnonzero(cached == kv), float(kv)) for kv in sorted({*cached.tolist()})]
            pending = [(where, self._of_dtype(asked, kv, where)) for where, kv in parts]
            found = partial(joined, pending, cached.shape), None
        self._waiting[key] = prices, *found
        return prices, name

    def price(self, prices: Prices, name: Hashable) -> RowPrice:
        """The price of a row that has asked; it may tell of an equal row."""
        if name not in prices:
            _, pending, where = self._waiting.pop((id(prices), name))
            found = pending()
            prices[name] = found if where is None else found.each(lambda value: pick(value, where))
        return prices[name]

    def _of_dtype(self, asked: Named, kv_bytes: float, where: np.ndarray | slice) -> Pending:
        """The row at the batches ``where`` as if all caches held ``kv_bytes`` per element."""
        key = kv_bytes, isinstance(where, slice)
        if key not in self._by_dtype:
            at, known = self._at, self._sizes.by_dtype
            if key not in known:
                width = np.size(at.kv_bytes)
                batch, new, past, verify = (
                    np.broadcast_to(value, width)[where] for value in (at.sizes.B, at.sizes.S, at.sizes.P, at.verify)
                )
                sizes = replace(at.sizes, B=batch, S=new, P=past)
                known[key] = SizesOfAll(replace(at, sizes=sizes, verify=verify, kv_bytes=kv_bytes, stages=1))
            self._by_dtype[key] = self.at(known[key])
        rows = self._by_dtype[key]
        return partial(rows.price, *rows.ask(asked))

    def at(self, sizes: SizesOfAll) -> AskedRows:
        """Rows of the same step at other sizes."""
        return AskedRows(
            self._pricer, self._backend, sizes, self._members, asked=self._asked, memo=self._memo, waiting=self._waiting
        )

    def _collective(self, row: Collective, asked: Named) -> tuple[Pending, Where]:
        corrections = self._asked.batched(self._pricer.corrections)
        if not isinstance(row, Collectives):
            if not row.exchange and np.ndim(self._at.stages):
                rows, where = self._unstaged
                return partial(rows.price, *rows.ask(asked)), where
            if self._at.points is None or not row.exchange:
                return self._pricer.collective(row, self._at, corrections), None
            few, where = self._by_tokens
            return self._meaned(self._pricer.collective(row, few, corrections), where)
        few, where = self._by_tokens
        parts: list[tuple[np.ndarray, Pending]] = []
        for members, one in row.groups:
            copies = {name: np.asarray(column)[members] for name, column in self._pricer.distinct.items()}
            pricer = replace(self._pricer, distinct=copies)
            at = few if few.points is None else loads_of(few, members)
            parts.append((members, pricer.collective(one, at, corrections)))
        every: Pending = partial(joined, parts, (row.members, np.size(few.sizes.B)), row)
        return (every, where) if few.points is None else self._meaned(every, where)

    def _meaned(self, pending: Pending, where: Where) -> tuple[Pending, Where]:
        """The mean over layers of what was asked at the loads of groups of them; ``where``: which of the numbers of
        tokens each case has."""
        points, single = self._at.points, not np.ndim(self._at.sizes.B)
        assert points is not None
        if points.weights.ndim == 1:
            return lambda: mean_over_layers(pending(), points.weights, single), where
        weights = points.weights if points.weights.ndim < 3 else points.weights[self._members or slice(None)]
        return lambda: mean_over_layers(pending(), weights, single, where), None

    @cached_property
    def _unstaged(self) -> tuple[AskedRows, Where]:
        """:attr:`SizesOfAll.unstaged` of this step."""
        sizes, where = self._sizes.unstaged
        return self.at(sizes), where

    @cached_property
    def _by_tokens(self) -> tuple[Context, Where]:
        """:attr:`SizesOfAll.by_tokens` of this step."""
        at, where = self._sizes.by_tokens
        if self._members is None:
            return at, where
        of_all: list[Any] = [at.sizes.R, at.sizes.E, at.sizes.X, at.hit, at.capacity]
        rows, held, cut, hit, capacity = (one if np.ndim(one) < 2 else one[self._members] for one in of_all)
        sizes = replace(at.sizes, R=rows, E=held, X=cut)
        at = replace(at, sizes=sizes, hit=hit, capacity=capacity, backend=self._backend)
        return (at if at.points is None else loads_of(at, self._members)), where
