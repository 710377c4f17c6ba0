"""Which layers each pipeline stage runs."""

from __future__ import annotations

from itertools import accumulate

from tensorcast.profiles.engine import PipelineSplit


def stage_layers(layers: int, pp: int, split: PipelineSplit = "first") -> list[slice]:
    """Layers of each pipeline stage: contiguous; which have one more where they do not divide, ``split`` says, or how
    many each has. What drafts is behind the layers and on no stage here."""
    if isinstance(split, tuple):
        ends = [0, *accumulate(split)]
        return [slice(*ends[stage : stage + 2]) for stage in range(len(split))]
    left = layers % pp
    start = {"first": 0, "before_last": pp - 1 - left, "last": pp - left}[split]
    bounds = [0]
    for stage in range(pp):
        bounds.append(bounds[-1] + layers // pp + (1 if start <= stage < start + left else 0))
    return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
