"""The op table as plain records: for JSON, and in the order in which the step runs them."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

from tensorcast.cost.stages import stage_layers
from tensorcast.deploy.step.pipeline_stages import FIRST, HAND_OVER, LAST, place_of

if TYPE_CHECKING:
    from tensorcast.deploy.result import Simulation



class Call(NamedTuple):
    """One call in step order: the op's record and the layer it runs in (None outside the layers)."""

    record: dict[str, Any]
    layer: int | None


def records(run: Simulation) -> list[dict[str, Any]]:
    """Rows of the step, costliest first, as dicts of plain Python values."""
    rows = sorted(run.records(), key=lambda record: -record["seconds"])
    return [{key: value for key, value in row.items() if key != "kind"} for row in rows]


def calls(run: Simulation) -> list[Call]:
    """Every call of the step: what comes before the layers, each layer's rows in turn, what comes after.

    With pipeline stages this is one micro-batch on its way through all of them.
    """
    kinds = run.deployment.step.table.layer_kinds
    stages = stage_layers(len(kinds), run.deployment.layout.pp, run.deployment.engine.pipeline_split)
    ends = {stage.stop for stage in stages[:-1]}
    ran = [row for row, count in run.price.calls if count]
    rows = run.records()
    at: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row, record in zip(ran, rows, strict=True):
        at[place_of(row.row)].append(record)
    found = [Call(record, None) for record in at[FIRST]]
    for i, kind in enumerate(kinds):
        often = [record["count"] // kinds.count(kind) for record in at[kind]]
        for half in range(max(often, default=0)):  # two half batches take turns, layer by layer
            found += [Call(record, i) for record, times in zip(at[kind], often, strict=True) if half < times]
        if i + 1 in ends:
            found += [Call(record, None) for record in at[HAND_OVER]]
    found += [Call(record, None) for record in at[LAST]]
    # A row that runs more often than its layers say is still part of the step's time.
    missing: dict[int, int] = {id(record): record["count"] for record in rows}
    for call in found:
        missing[id(call.record)] -= 1
    return found + [Call(record, None) for record in rows for _ in range(missing[id(record)])]
