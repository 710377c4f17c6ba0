"""Many deployments of one structure priced in one call: sizes that differ between them become an axis of their arrays.

A step's price is a sum over rows, and deployments that differ in dp, ep, what is dispatched or how many experts are
copied have the same rows. So a *fleet* is a :class:`Deployment` whose layout holds columns ``[members, 1]`` instead of
numbers; batches are the other axis. What changes no row but only the sizes of a step (the cache's dtype, drafted
tokens, half batches, micro-batches of pipeline stages) goes along the batches: sizes that come up again and again are
priced once. Rows that no member changes (attention, dense layers, norms) are priced once, too, and remembered for
other fleets: the memo is what makes options cheap.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from tensorcast.cost.activations import sees_cached_tokens
from tensorcast.cost.layer_loads import LayerLoads
from tensorcast.cost.rank_load import LayerPoints, RankLoad
from tensorcast.cost.routing import ExpertLoad, Routing
from tensorcast.cost.work import Size
from tensorcast.deploy.deployment import Deployment
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options, check_options
from tensorcast.deploy.plan.kernels import expert_sources
from tensorcast.deploy.plan.plan import Collective, Exchange, Row, exchange_of
from tensorcast.deploy.step.asked_rows import Collectives, Memo
from tensorcast.deploy.step.make import experts_of
from tensorcast.profiles.kept import same

Item = TypeVar("Item")

Rows = NDArray[np.int_]
"""Positions of members."""


@dataclass(frozen=True)
class Columns:
    """Layouts of the members: tp and pp are one number, the rest are columns ``[members, 1]``."""

    tp: int
    pp: int
    dp: np.ndarray
    ep: np.ndarray
    etp: np.ndarray
    stage_ranks: np.ndarray


FEW = 64
"""Numbers of tokens, up to which working out a load at all of them takes less than finding those that are there again.
"""


@dataclass(frozen=True)
class MemberLoads:
    """Expert loads of the members."""

    members: tuple[ExpertLoad | LayerLoads, ...]
    local_experts: np.ndarray
    staged: bool = False

    def at(self, tokens: Size, stages: Size = 1) -> RankLoad:
        """Loads at ``tokens [members, batches]`` (or ``[members, 1]``): every load is asked once for each number.

        ``stages``: of a pipeline, a number or one for each of the batches.
        """
        tokens = np.asarray(tokens)
        if np.size(stages) > 1:
            tokens = np.broadcast_to(tokens, (len(tokens), np.size(stages)))
        found = [np.empty(np.shape(tokens)) for _ in range(3)]
        points: LayerPoints | None = None
        for load, rows in _alike(self.members, list(map(id, self.members))):
            numbers = np.asarray(tokens)[rows]
            where = np.arange(numbers.size).reshape(numbers.shape)
            if numbers.size > FEW:
                numbers, place = np.unique(numbers, return_inverse=True)
                where = place.reshape(where.shape)
            at = load.at(numbers.ravel())
            for whole, part in zip(found, (at.rows, at.hit, at.mean_rows), strict=True):
                whole[rows] = np.asarray(part)[where]
            if at.points is not None:  # one law for all members: as many groups of layers
                shape = (*np.shape(tokens), len(at.points.weights))
                points = points or at.points.each(lambda _: np.empty(shape))  # noqa: B023
                if isinstance(load, LayerLoads) and np.any(np.greater(stages, 1)):
                    own = load.weights(np.ravel(stages))  # layers lie in other groups under another placement
                    weights = points.weights if points.weights.ndim == 3 else np.empty((len(tokens), *own.shape))
                    weights[rows] = own
                    points = points._replace(weights=weights)
                for whole, part in zip(points[:5], at.points[:5], strict=True):
                    whole[rows] = part[where]
        return RankLoad(found[0], found[1], found[2], points)


@dataclass(frozen=True)
class Fleet(Deployment):
    """Deployments as one. Its step's prices are arrays ``[members, batches]`` (or what broadcasts to that), its memory
    is, too.
    """

    size: int

    def in_pools(self) -> Fleet:
        """The same on servers of one phase, for their memory."""
        engine = self.engine.in_pools()
        if engine is self.engine:
            return self
        found = self._with_cache(engine=same(engine))
        if engine.reserve != self.engine.reserve:
            vars(found)["kept_beside"] = {}
        return found

    def _beside(self, batch: Size, new: Size, past: Size) -> tuple[Size, Size, Size]:
        # the same for all caches, and mostly however long: kept for a few steps
        asked = batch, new, past if sees_cached_tokens(self.step.table) else 0.0
        key = tuple([(one.shape, one.tobytes()) for one in (np.asarray(n, dtype=float) for n in asked)])
        kept: dict[Hashable, tuple[Size, Size, Size]] = vars(self).setdefault("kept_beside", {})
        if key not in kept:
            while len(kept) >= MOST_STEPS:
                del kept[next(iter(kept))]
            kept[key] = super()._beside(batch, new, past)
        return kept[key]

    def _with_cache(self, **changes: Any) -> Fleet:
        """The same but for ``changes`` of what its cache holds; all else that was found of it holds on."""
        found = replace(self, **changes)
        vars(found).update({name: vars(self)[name] for name in WITHOUT_CACHE if name in vars(self)})
        return found

    def at(self, kv_dtype: str, mtp_depth: int, members: Rows, pp: Rows) -> Fleet:
        """Some of the members, again and again if need be, each in so many pipeline stages, for their memory; prices
        need none. Kept, with what is the same for all loads."""
        known: dict[tuple[str, int, bytes, bytes], Fleet] = vars(self).setdefault("known", {})
        key = kv_dtype, mtp_depth, members.tobytes(), pp.tobytes()
        if key in known:
            return known[key]
        for other, like in known.items():
            if other[1:] == key[1:]:  # the same weights beside another cache
                known[key] = like._with_cache(quantization=replace(like.quantization, kv=kv_dtype))
                return known[key]
        step, plan, load = self.step, self.step.plan, cast(Any, self.step.sizes.load)
        columns: dict[str, Any] = {n: getattr(self.layout, n)[members] for n in ("dp", "ep", "etp", "stage_ranks")}
        if load is not None:
            load = replace(
                load, members=tuple([load.members[i] for i in members]), local_experts=load.local_experts[members]
            )
        columns["pp"] = pp[:, None]
        sizes = replace(
            step.sizes, dp=columns["dp"], etp=columns["etp"], load=load, mtp_depth=mtp_depth, pp=columns["pp"]
        )
        dispatch: Any = plan.dispatch.activation_bytes
        plan = replace(plan, dispatch=replace(plan.dispatch, activation_bytes=dispatch[members]))
        found = replace(
            self, layout=replace(self.layout, **columns), options=replace(self.options, mtp_depth=mtp_depth),
            quantization=replace(self.quantization, kv=kv_dtype), step=replace(step, plan=plan, sizes=sizes),
            size=len(members),
        )
        # a cached property: at every setting as many tokens are profiled
        profiled = (np.asarray(one) for one in self.profiled)
        vars(found)["profiled"] = tuple(one[members] if one.ndim else float(one) for one in profiled)
        vars(found)["kept_beside"] = {}
        known[key] = found
        return found


MOST_STEPS = 8
"""Steps of a fleet whose memory beside weights and cache is kept."""

WITHOUT_CACHE = ("profiled", "kept_beside", "stages", "context_bytes", "drafting")
"""What is found of a fleet's memory whatever its cache holds."""


def fleet(prototype: Deployment, members: Sequence[tuple[Layout, Options]], memo: Memo) -> Fleet:
    """``members`` as one; they have table, rows and options of ``prototype``, the one of them with most stages, but for
    what becomes a column."""
    step, plan = prototype.step, prototype.step.plan
    device, engine, table, config = prototype.device, prototype.engine, step.table, prototype.model.config
    dp, ep, etp, ranks = (_column([getattr(one, n) for one, _ in members]) for n in ("dp", "ep", "etp", "stage_ranks"))
    # a fleet's layout holds columns where a layout holds numbers
    layout = cast(Layout, Columns(
        tp=prototype.layout.tp, pp=prototype.layout.pp, dp=dp, ep=ep, etp=etp, stage_ranks=ranks
    ))
    exchanges, loads, spread = list[Exchange](), list[ExpertLoad | LayerLoads](), list[dict[str, float]]()
    # each once for all that it hangs on of a member
    lie: dict[tuple[object, ...], Exchange] = {}
    own: dict[str, Any] = dict(step.pricer.sources)
    kernels = {(prototype.layout.ep > 1, prototype.layout.dp > 1): own}
    routing = Routing.parse(prototype.options.routing, table.phase)
    for one, options in members:
        check_options(options, one, table.facts, plan.all2all)
        key = one.dp, one.ep, one.stage_ranks, one.pp > 1, options.dispatch, options.external_shared_experts > 0
        if key not in lie:
            lie[key] = exchange_of(table, one, device, engine, options=options, form=plan.form)
        exchanges.append(lie[key])
        held, distinct = experts_of(
            table, one, device, engine, options,
            routing=routing if options.routing == prototype.options.routing else None,
        )
        loads += [held] if held is not None else []
        spread.append(distinct)
        if (one.ep > 1, one.dp > 1) not in kernels:
            kernels[one.ep > 1, one.dp > 1] = expert_sources(engine, device, config, one)
    load: MemberLoads | None = None
    if loads:
        staged = any(one.staged for one in loads)
        load = MemberLoads(tuple(loads), _column([one.local_experts for one in loads]), staged)
    sources = [kernels[one.ep > 1, one.dp > 1] for one, _ in members]
    pricer = replace(
        step.pricer, ep=ep, etp=etp, tells=False,
        distinct={name: _column([each[name] for each in spread]) for name in step.pricer.distinct},
        sources={name: _column([each[name] for each in sources]) for name in step.pricer.sources},
    )
    if loads:
        memo = replace(memo, load=(dp.tobytes(), etp.tobytes(), *map(id, loads)), members=tuple(loads))
    named = {
        id(one): {(str(c.op), c.label): c for some in one.collectives.values() for c in some} for one in lie.values()
    }
    rows = list[Row]()
    for row in plan.rows:
        rows.append(row)
        if not isinstance(row, Collective):
            continue
        found = [named[id(one)].get((row.op, row.label)) for one in exchanges]
        if (first := next(filter(None, found), None)) is None:
            continue
        shared = [one or first for one in found]  # a layout of one stage hands nothing over, wherever it would lie
        merged = replace(shared[0], module=row.module, kind=row.kind)
        if row.exchange or any((one.extent, one.scale) != (merged.extent, merged.scale) for one in shared):
            groups = tuple([  # collectives of all members, those that lie alike together
                (where, replace(one, scale=_column([shared[i].scale for i in where])))
                for one, where in _alike(shared, [(one.extent, *sorted(one.exchange.items())) for one in shared])
            ])
            merged = Collectives(**vars(merged), members=len(shared), groups=groups)
        rows[-1] = merged
    sent: Any = _column([one.dispatch.activation_bytes for one in exchanges])
    priced = replace(
        step, plan=replace(plan, rows=tuple(rows), dispatch=replace(plan.dispatch, activation_bytes=sent)),
        pricer=pricer, memo=memo, sizes=replace(step.sizes, dp=dp, etp=etp, load=load),
    )
    known = {field.name: getattr(prototype, field.name) for field in fields(prototype)}
    return Fleet(**{**known, "layout": layout, "step": priced}, size=len(members))


def _column(values: Sequence[float]) -> np.ndarray:
    return np.array(values, dtype=float)[:, None]


def _alike(items: Sequence[Item], keys: Sequence[Hashable]) -> list[tuple[Item, np.ndarray]]:
    """The first item of every key, and where items of that key stand."""
    where: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        where.setdefault(key, []).append(i)
    return [(items[found[0]], np.array(found)) for found in where.values()]
