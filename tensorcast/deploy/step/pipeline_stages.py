"""Pipeline stages: which of a plan's rows each one runs, how often, and how many kernels the host launches for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tensorcast.cost.stages import stage_layers
from tensorcast.cost.work import Size
from tensorcast.deploy.plan.plan import Collective, Row
from tensorcast.profiles.engine import PipelineSplit
from tensorcast.profiles.scheduler import SerialPipeline
from tensorcast.trace.moe import EXPERT_STAGES

if TYPE_CHECKING:
    from tensorcast.deploy.step.row_prices import RowPricer

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


SCANS = {"linear_attention": 9.0, "ssm_scan": 5.0}
"""Kernels of a prompt's scan (SGLang 0.5.9, layers/attention/fla/chunk.py, chunk_gated_delta_rule_fwd and the norms of
queries and keys; layers/attention/mamba/ops/ssd_combined.py, _mamba_chunk_scan_combined_fwd)."""

HOST_ERROR = 0.2
"""Of seconds that a step waits for the host. By how much longer replies with more prompts between them take, a launch
takes it 54 to 78 us with DeepSeek-R1, GLM-4.6 and Qwen3-235B (SGLang's cookbook: B200, 16 users, replies of 500 tokens
and of 4,000)."""


def launches_of(row: Row) -> float:
    """Kernels that the host launches for a row; what a call of experts does beside its products goes with these."""
    if isinstance(row, Collective):
        return 1.0
    return SCANS.get(row.name, float(row.stage not in EXPERT_STAGES or row.name == "grouped_matmul"))


def launching(
    pricers: Sequence[RowPricer], launches: Sequence[Mapping[int, float]], which: NDArray[np.intp], tokens: Size
) -> dict[int, Size]:
    """Seconds that the host needs to launch what one pass over the plan runs, by place, of entries of ``which`` of the
    steps with these ``pricers`` and ``launches``, at ``tokens``: none where these are replayed from a graph. Empty
    where the host is never late."""
    each_s = np.array([float(one.engine.host_launch_s or 0.0) for one in pricers])
    late = np.greater(tokens, np.array([one.graph_tokens for one in pricers])[which])
    if not each_s.any() or not late.any():
        return {}
    counts = {place: np.array([one[place] for one in launches]) for place in launches[0]}
    return {place: late * (count * each_s)[which] for place, count in counts.items()}


Stage = tuple[tuple[int, Size], ...]
"""A pipeline stage: how often it runs the rows of each place (a layer's kind, or a place outside the layers)."""


def stages_of(layer_kinds: Sequence[int], pp: Size, split: PipelineSplit = "first") -> list[Stage]:
    """The stages of a pipeline; those that run the same once, the last one last. Of ``pp`` in arrays those of every
    entry, as arrays; an entry with fewer stages than others has its first again."""
    if not isinstance(pp, np.ndarray):
        return list(_stages(tuple(layer_kinds), int(pp), split))
    sizes, where = np.unique(pp, return_inverse=True)
    pipelines = [_stages(tuple(layer_kinds), int(size), split) for size in sizes]
    most = max(map(len, pipelines))
    places = {place for stages in pipelines for stage in stages for place, _ in stage}
    together: list[Stage] = []
    for i in range(-most, 0):
        calls = [dict(stages[max(i, -len(stages))]) for stages in pipelines]
        together.append(tuple((place, np.array([one.get(place, 0) for one in calls])[where]) for place in places))
    return together


@lru_cache(maxsize=1024)
def _stages(layer_kinds: tuple[int, ...], pp: int, split: PipelineSplit) -> tuple[Stage, ...]:
    """Those of one pipeline."""
    found = []
    stages = stage_layers(len(layer_kinds), pp, split)
    for i, layers in enumerate(stages):
        first, last = i == 0, i == len(stages) - 1
        outside = {FIRST: int(first), LAST: int(last), HAND_OVER: int(not last)}
        found.append((*Counter(layer_kinds[layers]).items(), *outside.items()))
    return tuple(dict.fromkeys(found))


def serial_rounds(serial: SerialPipeline, turns: Size, pp: Size, depth: Size) -> tuple[Size, Size]:
    """``turns`` of a stage in a step that checks ``depth`` drafts, in a pipeline whose host plans no step ahead, and
    seconds that it waits for it: a round, of ``pp`` turns, has one micro-batch less in it where drafts wait."""
    several = np.greater(pp, 1)
    if serial.drafts_wait and np.any(np.greater(depth, 0)):
        turns = np.where(several & np.greater(depth, 0), turns * pp / np.maximum(np.subtract(pp, 1), 1), turns)
    return turns, several * serial.step_s * turns / pp
