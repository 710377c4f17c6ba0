"""What users of a deployment wait for: time to first token, time per token and throughput at a steady load.

The load is a closed loop, as serving benchmarks run it: ``concurrency`` requests are always in flight, and whoever has
its last token sends the next prompt at once. Times are means over requests in the steady state; nothing is fitted
here beyond what the engine profile states.

**Aggregated.** Every decode step brings ``e`` tokens to each of ``B`` sequences (``e`` > 1 with drafted tokens), so
``B * e / output_len`` sequences end per step and as many prompts come in: their number is Poisson. A step without
prompts takes ``d(B)``, one with ``n`` prompts ``a + b * n``: weights are read once for both, so ``a + b * n`` is the
prefill step of those prompts and the ``B`` decoding tokens, plus the decode step's attention. Engines that run prompts
in steps of their own pay ``d(B)`` on top. Arrivals of one step ride in the next (a gated queue), so mean and second
moment of the step time follow from those of the Poisson number; a new request waits for the step under way, which is
longer than the mean step (it is met more often), then for the step that it rides in.

**Disaggregated.** A pool of prefill workers, each a queue of prompts that share steps, hands the cache over to a pool
of decode workers whose steps hold no prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from tensorcast.deploy.deployment import Deployment
from tensorcast.errors import InputError
from tensorcast.profiles.engine import EngineProfile
from tensorcast.serving.capacity import own_chunk, room_for
from tensorcast.serving.curves import DecodeCurve, PrefillLine
from tensorcast.serving.hand_over import transfer_s
from tensorcast.serving.load import Load, Served

IN_STEP_PROMPTS, IN_STEP_SPREAD = 0.75, 0.05
"""Prompts that come in together with one's own, beyond chance, where all replies are equally long: clients that once
waited for the same step move in step. With replies of a relative spread ``s`` it is ``1 / (1 + s / 0.05)`` of that.
Both were picked among eight pairs by their errors on all runs of ``reports/serving.md``: none were left out."""

HALVINGS = 30
"""Steps of the bisection that finds the steady state: relative error 1e-9."""


@dataclass(frozen=True)
class Aggregated:
    """One engine that prefills and decodes on the same GPUs: what follows from the batch that decodes.

    ``dp``, ``depth`` (drafted tokens) and the curves may hold arrays, one entry per batch asked about.
    """

    load: Load
    engine: EngineProfile
    dp: Any
    depth: Any
    decoding: DecodeCurve
    prompts: PrefillLine

    @property
    def steps(self) -> Any:
        """Decode steps of one reply."""
        return np.maximum(self.load.output_len - 1, 1) / self.load.tokens_per_step(self.depth)

    def at(self, batch: Any) -> _Steps:
        # during a reply, every other sequence's client sends one prompt
        arrivals = np.maximum(batch * self.dp - 1, 0) / self.steps
        return _steps(self.decoding, self.prompts, batch, arrivals, self.dp, self.engine.prefill_alone)

    def bunched_s(self, batch: Any) -> Any:
        """Seconds of prompts still to do when the last of a wave of them arrives.

        Where prompts run alone, decoding stands still meanwhile: replies that began together end together, as far as
        their lengths agree, and their clients come back together. The prompts that tokens would wait for, the first
        token waits for then: for half of the wave, in the mean.
        """
        if not self.engine.prefill_alone:
            return 0.0
        spread = 2 * self.load.spread * self.steps * self.decoding.at("seconds", batch)
        return np.maximum(wave_s(self.prompts, batch) - spread, 0)

    def times(self, batch: Any) -> tuple[_Steps, Any, Any]:
        """The steady state, seconds to the first token, and seconds of a reply from there."""
        step, bunched = self.at(batch), self.bunched_s(batch) / 2
        first = (self.engine.arrival_wait_steps + self.load.wait_steps) * step.met_s + step.own_s + bunched
        first = first + wave_s(self.prompts, batch) / 2 / self.load.rounds + self.engine.first_token_s
        if not self.engine.prefill_alone:
            beside = IN_STEP_PROMPTS / (1 + self.load.spread / IN_STEP_SPREAD)
            first = first + np.minimum(beside, np.maximum(batch - 1, 0)) / self.prompts.most_per_s
        return step, first, self.steps * step.mean_s - bunched

    def in_flight(self, batch: Any) -> Any:
        """Requests in flight while ``batch`` sequences per data-parallel rank decode; infinite: more than it serves."""
        step, first, generation = self.times(batch)
        return np.where(step.full, np.inf, batch * self.dp * (1 + first / generation))

    def served(self, batch: Any, concurrency: Any) -> Served:
        """The load's numbers at ``batch``; of ``concurrency`` requests, those that find no room wait for it."""
        step, first, generation = self.times(batch)
        # what a full house does not serve at once adds to the first token
        first = np.maximum(first, concurrency / (batch * self.dp) * generation - generation)
        share = np.clip(1 - self.decoding.at("seconds", batch) / step.mean_s, 0.0, 1.0)
        return _served(self.load, concurrency, batch, first, generation, self.decoding, self.prompts, share)


def aggregated(prefill: Deployment, decode: Deployment, load: Load, chunk_tokens: int | None = None) -> Served:
    """One engine that prefills and decodes on the same GPUs. ``chunk_tokens``: prompt tokens per step and dp rank.

    ``prefill`` and ``decode`` are the same layout laid out for either phase.
    """
    engine, dp = decode.engine, decode.layout.dp
    chunk = chunk_tokens or own_chunk(prefill)
    if chunk < 1:
        raise InputError(f"chunk_tokens = {chunk_tokens}: must be at least 1")
    concurrency = np.asarray(load.concurrency, dtype=float)
    prompts = PrefillLine(prefill, load.new, load.prefix_cached, chunk)
    fits, problem = room_for(prefill, decode, prompts, load, pooled=False)
    if problem:
        return unserved(concurrency, problem)
    decoding = DecodeCurve(decode, load.context, float(concurrency.max()) / dp)
    one = Aggregated(load, engine, dp, decode.options.mtp_depth, decoding, prompts)
    return one.served(steady_batch(one.in_flight, np.minimum(concurrency / dp, fits), concurrency), concurrency)


@dataclass(frozen=True)
class Disaggregated:
    """Pools of prefill and decode workers: what follows from the batch that decodes on each data-parallel rank.

    ``ranks`` and ``lanes``: data-parallel ranks of all decode and of all prefill workers. ``hand_over_s``: a prompt's
    cache on its way. Arrays where the batch is one.
    """

    load: Load
    engine: EngineProfile
    ranks: Any
    lanes: Any
    depth: Any
    hand_over_s: Any
    decoding: DecodeCurve
    prompts: PrefillLine

    def generation_s(self, batch: Any) -> Any:
        """Seconds of a reply after its first token."""
        steps = np.maximum(self.load.output_len - 1, 1) / self.load.tokens_per_step(self.depth)
        return steps * self.decoding.at("seconds", batch)

    def ttft(self, batch: Any, concurrency: Any) -> Any:
        rate = batch * self.ranks / self.generation_s(batch)
        service, queue = self.prompts.at_rate(rate / self.lanes)
        # of a closed loop, nobody meets a queue longer than the others in flight
        queue = np.minimum(queue, np.maximum(concurrency / self.lanes - 1, 0))
        burst = wave_s(self.prompts, batch * self.ranks / self.lanes) / 2 / self.load.rounds
        waits = (self.engine.arrival_wait_steps + self.load.wait_steps) * self.decoding.at("seconds", batch)
        overhead = self.engine.first_token_s + self.engine.hand_over_s
        return service * (1 + queue) + burst + self.hand_over_s + waits + overhead

    def in_flight(self, batch: Any, concurrency: Any = np.inf) -> Any:
        """Requests in flight while ``batch`` sequences per rank decode; infinite: more prompts than prefill serves."""
        generation = self.generation_s(batch)
        rate = batch * self.ranks / generation
        full = rate >= self.lanes * self.prompts.most_per_s
        return np.where(full, np.inf, batch * self.ranks * (1 + self.ttft(batch, concurrency) / generation))

    def users(self, batch: Any) -> Any:
        """:meth:`in_flight` of a closed loop, in which the queue itself is no longer than the others in flight."""
        generation = self.generation_s(batch)
        service, _ = self.prompts.at_rate(batch * self.ranks / generation / self.lanes)
        longest, alone = self.in_flight(batch), self.in_flight(batch, 0.0)  # as random arrivals queue; without a queue
        each = batch * self.ranks * service / generation  # users that one more prompt in every lane's queue adds
        capped = np.where(each < self.lanes, (alone - each) / np.maximum(1 - each / self.lanes, 1e-9), np.inf)
        return np.where(alone <= self.lanes, alone, np.minimum(longest, capped))

    def served(self, batch: Any, concurrency: Any) -> Served:
        """The load's numbers at ``batch``; of ``concurrency`` requests, those that find no room wait for it."""
        generation = self.generation_s(batch)
        least = concurrency / (batch * self.ranks) * generation - generation
        first = np.maximum(self.ttft(batch, concurrency), least)
        share = np.zeros_like(batch)
        return _served(self.load, concurrency, batch, first, generation, self.decoding, self.prompts, share)


def disaggregated(
    prefill: Deployment, decode: Deployment, prefill_workers: int, decode_workers: int, load: Load,
    chunk_tokens: int | None = None,
) -> Served:
    """Pools of prefill and of decode workers; a worker is one whole layout. Prompts go to the least loaded worker."""
    for name, workers in (("prefill_workers", prefill_workers), ("decode_workers", decode_workers)):
        if workers < 1:
            raise InputError(f"{name} = {workers}: must be at least 1")
    engine, dp = decode.engine, decode.layout.dp
    concurrency = np.asarray(load.concurrency, dtype=float)
    prompts = PrefillLine(prefill, load.new, load.prefix_cached, chunk_tokens or own_chunk(prefill))
    fits, problem = room_for(prefill, decode, prompts, load, pooled=True)
    if problem:
        return unserved(concurrency, problem)
    ranks, lanes = decode_workers * dp, prefill_workers * prefill.layout.dp
    decoding = DecodeCurve(decode, load.context, float(concurrency.max()) / ranks)
    hand_over = transfer_s(prefill, decode, load.input_len, prefill_workers + decode_workers)
    pools = Disaggregated(load, engine, ranks, lanes, decode.options.mtp_depth, hand_over, decoding, prompts)
    limit = np.minimum(concurrency / ranks, fits)
    return pools.served(steady_batch(lambda b: pools.in_flight(b, concurrency), limit, concurrency), concurrency)


def wave_s(prompts: PrefillLine, prompts_at_once: Any) -> Any:
    """Seconds until the last of so many prompts that come to a rank at once is done, beyond those of the first."""
    return np.maximum(prompts_at_once - 1, 0) / prompts.most_per_s


@dataclass(frozen=True)
class _Steps:
    """Steady state at a batch: mean step, the step that an arrival meets, the step it rides in, in seconds."""

    mean_s: Any
    met_s: Any
    own_s: Any
    full: Any


def _steps(decoding: DecodeCurve, prompts: PrefillLine, batch: Any, arrivals: Any, dp: Any, alone: bool) -> _Steps:
    """Moments of the step time when ``arrivals`` prompts per step come to ``dp`` ranks in lockstep."""
    plain = decoding.at("seconds", batch)
    shared = 0.0 if alone else decoding.at("attention_s", batch) + prompts.token_s * batch
    first = prompts.fixed_s + (plain if alone else shared)  # a: what a step with prompts takes beside their number
    extra = first - plain
    per_rank = arrivals / dp
    used = per_rank / prompts.per_step
    if np.all(prompts.per_step <= 1):  # a prompt takes 1 / per_step steps of its own
        mixed = 1 - np.maximum(1 - used, 0) ** dp
        idle = 1 - np.maximum(used, 1e-12) / np.maximum(mixed, 1e-12)  # share of the ranks that have none
        each = np.maximum(extra + prompts.prompt_s - prompts.expert_s * idle, 0.0)
        mean = plain + mixed * each
        variance = mixed * (1 - mixed) * each**2
        own = (plain + each) / prompts.per_step - (plain if alone else 0.0)
    else:
        # the slowest of dp ranks: at least whether any has a prompt, at most all of them on one
        most = np.minimum(arrivals, per_rank + np.sqrt(2 * np.log(dp) * per_rank))
        none = np.exp(-arrivals)
        most = np.maximum(most, 1 - none)
        idle = 1 - np.maximum(per_rank, 1e-12) / np.maximum(most, 1e-12)  # share of the ranks that have fewer
        mean = plain + np.maximum((1 - none) * extra + most * (prompts.prompt_s - prompts.expert_s * idle), 0.0)
        scatter = prompts.prompt_s**2 * most + 2 * extra * prompts.prompt_s * most * none + extra**2 * none * (1 - none)
        # arrivals vary with the length of the step before, too
        variance = scatter / np.maximum(1 - np.square(most * prompts.prompt_s / mean), 1e-3)
        others = per_rank * (1 + variance / mean**2)
        turns = np.maximum(1.0, (1 + others / 2) / prompts.per_step)
        own = (first - (plain if alone else 0.0)) * turns + prompts.prompt_s * np.minimum(
            1 + others, np.maximum(prompts.per_step, 1 + others / 2)
        )
        own = own - prompts.expert_s * idle
    met = mean + variance / mean
    # prompts that do not fit into the step wait for the next
    own = own + met * used / (2 * np.maximum(1 - used, 1e-3)) / np.maximum(prompts.per_step, 1.0)
    return _Steps(mean, met, own, used >= 0.98)


def steady_batch(in_flight: Any, limit: Any, concurrency: Any) -> Any:
    """The batch at which as many requests are in flight as there are, at most ``limit``: by bisection."""
    low, high = np.zeros_like(limit), limit
    inside = in_flight(high) <= concurrency
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        below = in_flight(middle) <= concurrency
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(inside, limit, np.maximum(low, 1e-9))


def _served(
    load: Load, concurrency: Any, batch: Any, first: Any, generation: Any,
    decoding: DecodeCurve, prompts: PrefillLine, prefill_share: Any,
) -> Served:
    per_token = generation / np.maximum(load.output_len - 1, 1)
    request = first + per_token * (load.output_len - 1)
    share = prefill_share
    error = np.hypot((1 - share) * decoding.at("error", batch), share * prompts.error)
    kinds = {
        kind: (1 - share) * decoding.at(kind, batch) + share * prompts.evidence[kind] for kind in prompts.evidence
    }
    columns = {
        "concurrency": concurrency,
        "batch": batch,
        "ttft_s": first,
        "tpot_s": per_token,
        "request_s": request,
        "output_tokens_per_s": concurrency / request * load.output_len,
        "ttft_error": np.full_like(first, prompts.error),
        "tpot_error": error,
        "decode_step_s": decoding.at("seconds", batch),
        "prefill_step_s": np.full_like(first, prompts.step_s),
        "exposed_comm_s": decoding.at("exposed_comm_s", batch),
        "hidden_comm_s": decoding.at("hidden_comm_s", batch),
    }
    evidence = {kind: _plain(value) for kind, value in kinds.items()}
    problem = _plain(np.full(concurrency.shape, "", dtype=object))
    return Served(**{name: _plain(value) for name, value in columns.items()}, evidence=evidence, problem=problem)


def unserved(concurrency: Any, why: str) -> Served:
    """No numbers, and ``why``."""
    columns = {field.name: np.full(concurrency.shape, np.nan) for field in fields(Served)}
    columns |= {"concurrency": concurrency, "problem": np.full(concurrency.shape, why, dtype=object)}
    return Served(**{name: _plain(value) for name, value in columns.items()} | {"evidence": {}})


def _plain(value: Any) -> Any:
    """A scalar for a scalar load, else the array."""
    return value.item() if np.ndim(value) == 0 and isinstance(value, np.ndarray) else value
