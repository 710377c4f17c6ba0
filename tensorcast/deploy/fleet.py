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

from tensorcast.cost.layer_loads import LayerLoads
from tensorcast.cost.rank_load import LayerPoints, RankLoad
from tensorcast.cost.routing import ExpertLoad
from tensorcast.cost.work import Size
from tensorcast.deploy.deployment import Deployment
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.plan.plan import Collective, Row
from tensorcast.deploy.step.asked_rows import Collectives, Memo

Item = TypeVar("Item")


@dataclass(frozen=True)
class Columns:
    """Layouts of the members: tp and pp are one number, the rest are columns ``[members, 1]``."""

    tp: int
    pp: int
    dp: np.ndarray
    ep: np.ndarray
    etp: np.ndarray
    stage_ranks: np.ndarray


@dataclass(frozen=True)
class MemberLoads:
    """Expert loads of the members."""

    members: tuple[ExpertLoad | LayerLoads, ...]
    local_experts: np.ndarray

    def at(self, tokens: Size) -> RankLoad:
        """Loads at ``tokens [members, batches]`` (or ``[members, 1]``): every distinct load is asked once."""
        found = [np.empty(np.shape(tokens)) for _ in range(3)]
        points: LayerPoints | None = None
        for load, rows in _alike(self.members, list(map(id, self.members))):
            at = load.at(np.asarray(tokens)[rows])
            for whole, part in zip(found, (at.rows, at.hit, at.mean_rows), strict=True):
                whole[rows] = part
            if at.points is not None:  # one law for all members: as many groups of layers
                shape = (*np.shape(tokens), len(at.points.weights))
                points = points or at.points.each(lambda _: np.empty(shape))  # noqa: B023
                for whole, part in zip(points[:5], at.points[:5], strict=True):
                    whole[rows] = part
        return RankLoad(found[0], found[1], found[2], points)


@dataclass(frozen=True)
class Fleet(Deployment):
    """Deployments as one. Its step's prices are arrays ``[members, batches]`` (or what broadcasts to that), its memory
    is, too.
    """

    size: int

    def at(self, kv_dtype: str, mtp_depth: int, pp: int) -> Fleet:
        """All members at one setting, for their memory; their prices need none."""
        step = replace(self.step, sizes=replace(self.step.sizes, mtp_depth=mtp_depth, pp=pp))
        options, layout = replace(self.options, mtp_depth=mtp_depth), replace(self.layout, pp=pp)
        quantization = replace(self.quantization, kv=kv_dtype)
        found = replace(self, layout=layout, options=options, quantization=quantization, step=step)
        vars(found)["profiled"] = self.profiled  # a cached property: at every setting as many tokens are profiled
        return found


def fleet(members: Sequence[Deployment], memo: Memo) -> Fleet:
    """``members`` as one; they have the same table, rows (but for stages, that some may lack), options and engine."""
    prototype = max(members, key=lambda member: member.layout.pp)
    layouts, step = [member.layout for member in members], prototype.step
    dp, ep, etp, ranks = (_column([getattr(one, n) for one in layouts]) for n in ("dp", "ep", "etp", "stage_ranks"))
    # a fleet's layout holds columns where a layout holds numbers
    layout = cast(Layout, Columns(
        tp=prototype.layout.tp, pp=prototype.layout.pp, dp=dp, ep=ep, etp=etp, stage_ranks=ranks
    ))
    loads = tuple(one.step.sizes.load for one in members if isinstance(one.step.sizes.load, ExpertLoad | LayerLoads))
    load: ExpertLoad | MemberLoads | None = None
    if loads:
        load = MemberLoads(loads, _column([one.local_experts for one in loads]))
    if loads and isinstance(loads[0], ExpertLoad) and all(one.busiest is None for one in loads):
        # even ones are plain arithmetic, so one load with columns stands for all
        held: Any = {n: _column([getattr(one, n) for one in loads]) for n in ("share", "ranks", "local_experts")}
        load = replace(loads[0], **held)
    pricers = [one.step.pricer for one in members]
    pricer = replace(
        step.pricer, ep=ep, etp=etp,
        distinct={name: _column([float(one.distinct[name]) for one in pricers]) for name in step.pricer.distinct},
        sources={name: _column([float(one.sources[name]) for one in pricers]) for name in step.pricer.sources},
    )
    if loads:
        memo = replace(memo, load=(dp.tobytes(), etp.tobytes(), *map(id, loads)), members=loads)
    plans = [member.step.plan for member in members]
    rows = tuple(
        _merged(row, [(*one.rows, row)[i] for one in plans])  # no stages: never handed over
        for i, row in enumerate(step.plan.rows)
    )
    sent: Any = _column([one.dispatch.activation_bytes for one in plans])
    one = replace(
        step, plan=replace(step.plan, rows=rows, dispatch=replace(step.plan.dispatch, activation_bytes=sent)),
        pricer=pricer, memo=memo, sizes=replace(step.sizes, dp=dp, etp=etp, load=load),
    )
    known = {field.name: getattr(prototype, field.name) for field in fields(prototype)}
    return Fleet(**{**known, "layout": layout, "step": one}, size=len(members))


def _merged(row: Row, members: Sequence[Row]) -> Row:
    """The row as a fleet has it: collectives of all members, those that lie alike together."""
    if not isinstance(row, Collective):
        return row
    shared = [one for one in members if isinstance(one, Collective) and (one.op, one.label) == (row.op, row.label)]
    assert len(shared) == len(members), "members of a fleet have the same rows"
    first = shared[0]
    if all((one.extent, one.scale) == (first.extent, first.scale) for one in shared) and not row.exchange:
        return replace(first, module=row.module)
    groups = tuple(
        (where, replace(one, scale=_column([shared[i].scale for i in where])))
        for one, where in _alike(shared, [(one.extent, *sorted(one.exchange.items())) for one in shared])
    )
    return Collectives(**vars(replace(first, module=row.module)), members=len(members), groups=groups)


def _column(values: Sequence[float]) -> np.ndarray:
    return np.array(values, dtype=float)[:, None]


def _alike(items: Sequence[Item], keys: Sequence[Hashable]) -> list[tuple[Item, np.ndarray]]:
    """The first item of every key, and where items of that key stand."""
    where: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        where.setdefault(key, []).append(i)
    return [(items[found[0]], np.array(found)) for found in where.values()]
