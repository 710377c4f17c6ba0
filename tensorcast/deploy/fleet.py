"""Many deployments of one structure priced in one call: sizes that differ between them become an axis of their arrays.

A step's price is a sum over rows, and deployments that differ in dp, ep, what is dispatched or how many experts are
copied have the same rows. So a *fleet* is a :class:`Deployment` whose layout holds columns ``[members, 1]`` instead of
numbers; batches are the other axis. What changes no row but only the sizes of a step (the cache's dtype, drafted
tokens, half batches, micro-batches of pipeline stages) goes along the batches: sizes that come up again and again are
priced once. Rows that no member changes (attention, dense layers, norms) are priced once, too, and remembered for
other fleets: the memo is what makes options cheap.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from tensorcast.deploy.deployment import Deployment
from tensorcast.deploy.layout import stage_layers
from tensorcast.deploy.step.fleet_step import FleetStep, Memo


@dataclass(frozen=True)
class Fleet(Deployment):
    """Deployments as one. Its step's prices are arrays ``[members, batches]`` (or what broadcasts to that), its memory
    is, too.
    """

    step: FleetStep

    def at(self, kv_dtype: str, mtp_depth: int, pp: int) -> Fleet:
        """All members at one setting, for their memory; their prices need none."""
        options, layout = replace(self.options, mtp_depth=mtp_depth), replace(self.layout, pp=pp)
        step = copy.copy(self.step)
        step.options, step.layout, step.stages = options, layout, stage_layers(len(step.table.layer_kinds), pp)
        quantization = replace(self.quantization, kv=kv_dtype)
        return replace(self, layout=layout, options=options, quantization=quantization, step=step)


def fleet(members: Sequence[Deployment], memo: Memo) -> Fleet:
    """``members`` as one; they have the same table, rows (but for stages, that some may lack), options and engine."""
    prototype = max(members, key=lambda member: member.layout.pp)
    step = FleetStep(prototype.step, [member.step for member in members], memo)
    known = {field.name: getattr(prototype, field.name) for field in fields(prototype)}
    return Fleet(**{**known, "layout": step.layout, "step": step})
