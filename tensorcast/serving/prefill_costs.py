"""What prompts cost the GPUs that prefill: how they are cut into steps, seconds of those, and the queue before them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorcast.cost.evidence import EVIDENCE
from tensorcast.deploy.step.price import StepPrice
from tensorcast.errors import InputError
from tensorcast.serving.entries import Entries
from tensorcast.serving.traffic import Array, Number, Traffic

NEARLY_ALL = 1 - 1e-12

IN_TURNS = ("seconds", "experts_s", "attention_s", "least_s")
"""Of :func:`prefill_columns` what stages share."""


@dataclass(frozen=True)
class PromptCut:
    """How prompts of one length run as prefill steps.

    ``tokens``: new tokens that a step takes of a prompt. A prompt longer than a step's chunk runs as equal chunks; a
    chunk is priced at the mean of the tokens cached before it, ``past``. ``per_step``: prompts of a data-parallel rank
    that share a step at most; below 1 for those in chunks. ``batches``: prompts per rank at which steps are priced.
    ``rises``: by which share of what the mean chunk sees the last one sees more.
    """

    tokens: float
    past: float
    per_step: float
    batches: tuple[float, float, float]
    rises: float


def cut_prompts(traffic: Traffic, chunk_tokens: int) -> PromptCut:
    """Prompts of ``traffic`` in steps of at most ``chunk_tokens`` tokens per data-parallel rank."""
    if chunk_tokens < 1:
        raise InputError(f"chunk_tokens = {chunk_tokens}: must be at least 1")
    new = float(traffic.input_len - traffic.prefix_cached)
    chunks = float(np.ceil(new / chunk_tokens))
    per_step = float(chunk_tokens // new) if chunks == 1 else 1.0 / chunks
    before = (new - new / chunks) / 2
    past = float(traffic.prefix_cached) + before
    rises = before / (past + new / chunks / 2)
    return PromptCut(new / chunks, past, per_step, (0.5, 1.0, max(per_step, 1.0)), rises)


@dataclass(frozen=True, kw_only=True)
class PrefillCosts(Entries):
    """Prefill steps in a server under load; arrays of one shape, an entry per deployment and cut of its prompts.

    A step with ``n`` prompts per data-parallel rank, ``per_step`` at most, takes ``fixed_s + prompt_s * n`` seconds of
    each of ``stages``, its turn, and has left the last one after ``passes`` turns; a step of one prompt takes
    ``step_s`` until then. ``token_s``: what one more token adds. Every data-parallel rank has as many prompts;
    ``expert_s`` is what experts and exchange take of ``prompt_s`` or, with one prompt per step, of ``fixed_s``: a rank
    with a prompt where others have none needs its part of that. ``late_s``: by how much a prompt's last chunk takes
    longer than its mean one. ``error``: relative median error of a step.
    ``evidence``: shares of its kernel seconds by :data:`~tensorcast.cost.evidence.EVIDENCE`.
    """

    per_step: Array
    fixed_s: Array
    prompt_s: Array
    token_s: Array
    expert_s: Array
    late_s: Array
    step_s: Array
    error: Array
    stages: Array
    passes: Array
    evidence: dict[str, Array]

    @property
    def most_per_s(self) -> Array:
        """Prompts per second of one data-parallel rank that does nothing else, where enough of them wait."""
        return self.per_step / (self.fixed_s + self.prompt_s * np.maximum(self.per_step, 1.0))

    def passing_s(self, turn_s: Array) -> Array:
        """Seconds until a prompt has left the last stage, once its steps have held the first one as long as they do, if
        the last of them does so for ``turn_s``."""
        return (self.passes - 1) * turn_s

    def turns_held(self, share: Array) -> Array:
        """Share of a pipeline's turns that take as long as a step with prompts, where ``share`` of micro-batches are
        such: none overtakes another, and none is composed before the oldest one is back, so that all in flight
        advance with the longest. Chunks of one prompt come one after another, and prompts as chance has them."""
        begun = np.where(self.per_step > 1, -np.log1p(-np.minimum(share, NEARLY_ALL)), share * self.per_step)
        return 1 - (1 - share) * np.exp(-begun * (self.stages - 1))

    def at_rate(self, rate: Number) -> tuple[Array, Array]:
        """Seconds in service of a prompt when ``rate`` per second come to a rank, and how many such times it waits; of
        pipelines, in service of the first stage.

        Prompts that came while a step ran share the next (a gated queue): in the mean ``n`` of them where
        ``n = rate * (fixed + prompt_s * n)``. A new one meets a longer step than the mean, waits for half of it, and
        rides with those that came in all of it; near the limit it waits for those before it that did not fit, too.
        With one prompt per step this is an M/D/1 queue.
        """
        most = np.maximum(self.per_step, 1.0)
        added = np.minimum(rate * self.prompt_s, 1 - 1e-9)  # prompts that come during one prompt more
        mean = np.clip(rate * self.fixed_s / (1 - added), 1.0, most)
        step = (self.fixed_s + self.prompt_s * mean) / np.minimum(self.per_step, 1.0)
        busy, full = np.minimum(rate * step / mean, 1.0), rate / self.most_per_s
        varied = np.where(most > 1, busy * self.prompt_s**2 * mean / (1 - added**2), 0.0)
        met = step + varied / step
        rides = np.minimum(1 + busy * rate * met, most)
        service = (self.fixed_s + self.prompt_s * rides) / np.minimum(self.per_step, 1.0)
        crowd = full ** (most + 1) / (2 * most * np.maximum(1 - full, 1e-9))
        return service, np.where(full < 1, (busy * met / 2 + crowd * step) / service, np.inf)


def prefill_columns(price: StepPrice, factor: Number, error: Number) -> dict[str, Any]:
    """Of prefill steps as they are in a server under load, with the engine's ``prefill_factor`` and ``prefill_error``:
    seconds, those of experts, error, evidence.

    Expert seconds are what the tokens of all data-parallel ranks take: experts, dispatch and combine, less what
    overlaps.
    """
    return {
        "seconds": factor * price.seconds,
        "experts_s": factor * (price.tally.experts - price.hidden_s),
        "attention_s": factor * price.tally.attention,
        "least_s": factor * np.broadcast_to(price.least_s, np.shape(price.seconds)),
        "error": np.hypot(price.error, error),
        **price.tally.evidence,
    }


def prefill_costs(
    columns: Mapping[str, Array], tokens: Number, per_step: Number, rises: Number,
    stages: Number = 1.0,
) -> PrefillCosts:
    """Costs from :func:`prefill_columns` ``[..., 3]``, the last axis over the three batches of a :class:`PromptCut`.

    ``tokens, per_step, rises``: of the cut; numbers, or arrays of one entry for each of the other axes. ``stages``: of
    a pipeline, as these, whose steps are of one micro-batch each; a prompt's next step begins while one is on its way.
    """
    of_turns = {name: columns[name] / np.asarray(stages, dtype=float)[..., None] for name in IN_TURNS}
    half, one, full = np.moveaxis(of_turns["seconds"], -1, 0)
    per_step, stages = (np.broadcast_to(np.asarray(size, dtype=float), one.shape) for size in (per_step, stages))
    several = per_step > 1
    prompt_s = np.where(several, np.clip((full - one) / np.where(several, per_step - 1, 1.0), 0.0, one), 0.0)
    with_half, with_one = of_turns["experts_s"][..., 0], of_turns["experts_s"][..., 1]
    # fewer experts' tokens save no more than a step takes beyond what the host does to launch it
    held = of_turns["least_s"][..., 1]
    most_s = np.where(several, prompt_s, one)
    most_s = np.where(held > 0, np.minimum(most_s, np.maximum(one - held, 0.0)), most_s)
    return PrefillCosts(
        per_step=per_step,
        fixed_s=one - prompt_s,
        prompt_s=prompt_s,
        token_s=np.where(several, prompt_s / tokens, np.maximum(one - half, 0.0) / (np.asarray(tokens) / 2)),
        expert_s=np.clip(2 * (with_one - with_half), 0.0, most_s),
        late_s=rises * of_turns["attention_s"][..., 1],
        step_s=columns["seconds"][..., 1],
        error=columns["error"][..., 1],
        stages=stages,
        passes=stages,
        evidence={kind: columns[kind][..., 1] for kind in EVIDENCE},
    )
