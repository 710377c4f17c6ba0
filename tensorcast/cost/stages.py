"""Which layers each pipeline stage runs."""

from __future__ import annotations

from itertools import accumulate

from tensorcast.errors import InputError
from tensorcast.profiles.engine import PipelineSplit


def stage_layers(layers: int, pp: int, split: PipelineSplit = "first") -> list[slice]:
    """Layers of each pipeline stage: contiguous; which have one more where they do not divide, ``split`` says, or, of
    pipelines with as many stages, how many each has. What drafts is behind the layers and on no stage here."""
    if isinstance(split, tuple):
        stated, split = split
        if len(stated) == pp:
            ends = [0, *accumulate(stated)]
            return [slice(*ends[stage : stage + 2]) for stage in range(pp)]
    left = layers % pp
    start = {"first": 0, "before_last": pp - 1 - left, "last": pp - left}[split]
    bounds = [0]
    for stage in range(pp):
        bounds.append(bounds[-1] + layers // pp + (1 if start <= stage < start + left else 0))
    return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


def stated_stages(text: str) -> tuple[int, ...]:
    """Layers of each pipeline stage, from ``15,15,16,15``. Raises :class:`InputError` where they are no numbers."""
    try:
        return tuple(int(one) for one in text.split(","))
    except ValueError:
        raise InputError(f"--pp-partition {text!r}: must be whole numbers of layers, as 15,15,16,15") from None


def broken_stages(text: str, pp: int, layers: int) -> str:
    """What is wrong with stated stages for ``layers`` in ``pp`` stages; empty if nothing."""
    stages = stated_stages(text)
    if len(stages) != pp:
        return f"--pp-partition {text}: {len(stages)} stages, and pp = {pp}"
    if sum(stages) != layers or min(stages) < 1:
        return f"--pp-partition {text}: must be numbers above 0 that add up to {layers} layers, not {sum(stages)}"
    return ""
