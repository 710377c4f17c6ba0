"""Which layers each pipeline stage runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from tensorcast.cost.work import Array
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


def layers_of(kinds: tuple[int, ...], stages: Sequence[slice]) -> Mapping[int, Array]:
    """Layers of each of the ``kinds`` in each of the ``stages``; one of what is outside the layers, -1."""
    first, end = np.array([one.indices(len(kinds))[:2] for one in stages]).T
    counts = defaultdict(lambda: np.zeros(len(stages)), {-1: np.ones(len(stages))})
    for kind in dict.fromkeys(kinds):
        before = np.append(0.0, np.cumsum(np.equal(kinds, kind)))
        counts[kind] = before[end] - before[first]
    return counts


class StagesAlike(NamedTuple):
    """Pipeline stages, those that are alike once: their ``layers``, of how many stages their pipeline is, the ``ends``
    (``[2, stages]``: whether first, whether last) and layers of each kind (:func:`layers_of`)."""

    layers: tuple[slice, ...]
    pipelines: tuple[int, ...]
    ends: Array
    counts: Mapping[int, Array]


@lru_cache(maxsize=4096)
def stages_alike(kinds: tuple[int, ...], layers: int, pps: tuple[int, ...], split: PipelineSplit) -> StagesAlike:
    """Of pipelines of so many stages. Layers of ``kinds`` behind ``layers`` are what drafts, in the last stage."""
    found: dict[tuple[int, ...], tuple[slice, bool, bool]] = {}
    for pp in pps:
        stages = stage_layers(layers, pp, split)
        stages[-1] = slice(stages[-1].start, len(kinds))
        for i, own in enumerate(stages):
            first, last = i == 0, i == len(stages) - 1
            found.setdefault((pp, first, last, *sorted(kinds[own])), (own, first, last))
    every = tuple([own for own, _, _ in found.values()])
    ends = np.array([ends for _, *ends in found.values()], dtype=float).T
    return StagesAlike(every, tuple([pp for pp, *_ in found]), ends, layers_of(kinds, every))


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
