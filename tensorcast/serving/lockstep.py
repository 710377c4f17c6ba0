"""Steps that several share: data-parallel ranks that all wait for those that read, and pipeline stages, whose
micro-batches wait for one another."""

from __future__ import annotations

import numpy as np

from tensorcast.serving.prefill_costs import PrefillCosts
from tensorcast.serving.traffic import Array, Mask, Number


def held_up(prompts: PrefillCosts, reading: Array, longer: Array, alone: bool) -> Array:
    """Seconds that a turn of a pipeline is longer, in the mean, as turns without prompts are held up by those with
    some, which are so much ``longer`` and as many as ``reading`` for each that decodes."""
    turns = 1 + reading if alone else 1.0
    share = np.minimum(reading / turns, 1.0)
    found: Array = (prompts.turns_held(share) - share) * turns * longer
    return found


def window(used: Array, apart: Array, widest: Number) -> Array:
    """The part of a round of replies, in these, in which a rank reads that takes ``used`` steps for it.

    Ranks begin together, and in steps, of which all take as many, they stay together: they read in one window of each
    round, as wide as its prompts take, which widens as replies end ``apart``, in replies, until prompts come at any
    time.
    """
    found: Array = np.minimum(np.hypot(used, apart), np.maximum(used, widest))
    return found


def some_read(used: Array, apart: Array, dp: Number, users: Array, together: Mask | bool) -> Array:
    """Steps, for each in which all write, in which some of ``dp`` ranks reads, where each does in ``used``.
    ``together``: they write together, too; else, where prompts run alone, each rank when it has none (SGLang 0.5.23,
    srt/managers/scheduler.py: each rank picks its own batch, all run them together). Of fewer ``users`` of a rank than
    one not all ranks read."""
    wide = window(used, apart, np.where(together, 1.0, 1 + used))
    share = np.minimum(used / wide, 1 - 1e-12)
    found: Array = np.maximum(-wide * np.expm1(dp * np.log1p(-share)), used / np.clip(users, 1 / dp, 1))
    return found


def varied(chance: Array) -> Array:
    """Variance of whether something happens."""
    found: Array = np.minimum(chance, 1.0) * np.maximum(1 - chance, 0.0)
    return found
