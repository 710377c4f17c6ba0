"""Pipeline stages: which of a plan's rows each one runs, and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from tensorcast.cost.work import Size
from tensorcast.deploy.layout import stage_layers
from tensorcast.deploy.plan.plan import Collective, Row
from tensorcast.profiles.engine import PipelineSplit

FIRST, LAST, HAND_OVER = -1, -2, -3
"""Places of rows outside the layers: on the first pipeline stage, on the last, on all but the last."""


def place_of(row: Row) -> int:
    """Where a row runs: in layers of its kind, or outside the layers."""
    if row.kind >= 0:
        return row.kind
    if isinstance(row, Collective) and row.op == "send_recv":
        return HAND_OVER
    at_start = row.module.startswith(("embed", "rotary")) or getattr(row, "name", "") == "embedding"
    return FIRST if at_start else LAST


Stage = tuple[tuple[int, Size], ...]
"""A pipeline stage: how often it runs the rows of each place (a layer's kind, or a place outside the layers)."""


def stages_of(layer_kinds: Sequence[int], pp: int, split: PipelineSplit = "first") -> list[Stage]:
    """The stages of a pipeline; those that run the same once, the last one last."""
    found = []
    stages = stage_layers(len(layer_kinds), pp, split)
    for i, layers in enumerate(stages):
        first, last = i == 0, i == len(stages) - 1
        outside = {FIRST: int(first), LAST: int(last), HAND_OVER: int(not last)}
        found.append((*Counter(layer_kinds[layers]).items(), *outside.items()))
    return list(dict.fromkeys(found))


def stages_of_each(layer_kinds: Sequence[int], pp: Size, split: PipelineSplit = "first") -> list[Stage]:
    """:func:`stages_of` every entry of ``pp`` in arrays; an entry with fewer stages than others has its first again."""
    if not isinstance(pp, np.ndarray):
        return stages_of(layer_kinds, int(pp), split)
    sizes, where = np.unique(pp, return_inverse=True)
    pipelines = [[dict(stage) for stage in stages_of(layer_kinds, int(size), split)] for size in sizes]
    most = max(map(len, pipelines))
    places = {place for stages in pipelines for calls in stages for place in calls}
    found: list[Stage] = []
    for i in range(-most, 0):
        calls = [stages[max(i, -len(stages))] for stages in pipelines]
        found.append(tuple((place, np.array([one.get(place, 0) for one in calls])[where]) for place in places))
    return found
