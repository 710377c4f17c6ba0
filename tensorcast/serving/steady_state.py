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

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorcast.profiles.engine import EngineProfile
from tensorcast.serving.curves import DecodeCurve
from tensorcast.serving.full_cache import FullCache
from tensorcast.serving.lockstep import held_up, some_read, varied, window
from tensorcast.serving.prefill_costs import PrefillCosts
from tensorcast.serving.traffic import Array, Mask, Number, Rows, ServingMetrics, Traffic, steps_between_looks

IN_STEP_PROMPTS = 0.75
"""Prompts that come in together with one's own, beyond chance, where all replies are equally long: clients that once
waited for the same step move in step. Replies that end steps apart bring as many times fewer. Picked by errors on all
runs of ``reports/serving.md``, none left out; 0.5 and 1 serve as well."""

LONG = 1e4
"""Rounds after which ends of replies are as far apart as chance has them."""

NEARLY_NONE = 1e-6
"""Other sequences where there are none: shares of a rate that is 0 are those of a small one."""

SURELY = 1 + 1e-9
"""So many times what was worked out in another order are more, whatever rounding did."""

HALVINGS = 30
"""Steps of the bisection that finds the steady state: relative error 1e-9."""


@dataclass(frozen=True)
class Queued:
    """Of pools at a batch, whatever else is in flight: seconds of a decode step and of a reply, sequences that decode,
    prompts per second, seconds of one in service, how many such times it waits at most, what passes beside; and whether
    prompts overrun."""

    step_s: Array
    generation_s: Array
    sequences: Array
    rate: Array
    service_s: Array
    queue: Array
    beside_s: tuple[Number, ...]
    full: Mask


@dataclass(frozen=True)
class SteadyState:
    """What follows from the batch that decodes, seconds: to the first token, of a reply from there, from the end of one
    to that of the next in a place of the batch, of a mean step, of one without prompts; and requests in flight,
    infinitely many where prompts come faster than they are read."""

    first_s: Array
    generation_s: Array
    place_s: Array
    step_s: Array
    plain_s: Array
    concurrency: Array
    queued: Queued | None = None


@dataclass(frozen=True, kw_only=True)
class ServingModel(ABC):
    """A way to serve: what follows from the batch that decodes. Arrays of one entry per batch asked about, or numbers.

    ``decode_ranks``: data-parallel ranks that decode; ``depth``: drafted tokens per step.
    """

    traffic: Traffic
    engine: EngineProfile
    decode_ranks: Number
    depth: Number | Rows
    decoding: DecodeCurve
    prompts: PrefillCosts

    @abstractmethod
    def at(self, batch: Array, concurrency: Number = np.inf) -> SteadyState:
        """The state in which ``batch`` sequences decode on every data-parallel rank.

        ``concurrency``: requests in flight, of which a queue holds the others at most; endless if not given.
        """

    def steady_batch(self, limit: Array, concurrency: Array) -> Array:
        """The batch at which as many requests are in flight as there are, at most ``limit``: by bisection."""
        low, high = np.zeros_like(limit), limit
        inside = self.at(high, concurrency).concurrency <= concurrency
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            below = self.at(middle, concurrency).concurrency <= concurrency
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return np.where(inside, limit, np.maximum(low, 1e-9))

    def ttft_s(self, batch: Array, concurrency: Array, state: SteadyState) -> Array:
        """To the first token: what a full house does not serve at once adds to it."""
        waits = concurrency / (batch * self.decode_ranks) * state.place_s - state.generation_s
        return np.maximum(state.first_s, waits)

    def times(self, batch: Array, concurrency: Array, state: SteadyState) -> dict[str, Array]:
        """Of :meth:`metrics` what a search chooses by: how long users wait, how many tokens come, how sure that is."""
        ttft = self.ttft_s(batch, concurrency, state)
        tpot = state.generation_s / np.maximum(self.traffic.output_len - 1, 1)
        request = ttft + tpot * (self.traffic.output_len - 1)
        prefill_share = np.clip(1 - state.plain_s / state.step_s, 0.0, 1.0)
        steps_error = (1 - prefill_share) * self.decoding.at("error", batch)
        return {
            "concurrency": concurrency,
            "batch": batch,
            "ttft_s": ttft,
            "tpot_s": tpot,
            "request_s": request,
            "output_tokens_per_s": concurrency / request * self.traffic.output_len,
            "ttft_error": np.broadcast_to(self.prompts.error, ttft.shape),
            "tpot_error": np.hypot(steps_error, prefill_share * self.prompts.error),
        }

    def metrics(self, batch: Array, concurrency: Array) -> ServingMetrics:
        """What users meet at ``batch``; of ``concurrency`` requests, those that find no room wait for it."""
        state, decoding = self.at(batch, concurrency), self.decoding
        times: dict[str, Any] = self.times(batch, concurrency, state)
        prefill_share = np.clip(1 - state.plain_s / state.step_s, 0.0, 1.0)
        return ServingMetrics(
            **times,
            decode_step_s=state.plain_s,
            prefill_step_s=np.broadcast_to(self.prompts.step_s, times["ttft_s"].shape),
            exposed_comm_s=decoding.at("exposed_comm_s", batch),
            hidden_comm_s=decoding.at("hidden_comm_s", batch),
            evidence={
                kind: (1 - prefill_share) * decoding.at(kind, batch) + prefill_share * share
                for kind, share in self.prompts.evidence.items()
            },
        )


@dataclass(frozen=True, kw_only=True)
class Aggregated(ServingModel):
    """One engine that prefills and decodes on the same GPUs. All entries cut their prompts, or none does.

    ``full``: the cache, if replies fill it, of engines that let more in than stay.
    """

    full: FullCache | None = None

    def at(self, batch: Array, concurrency: Number = np.inf) -> SteadyState:
        """As :meth:`ServingModel.at`; prompts wait for steps here, in no queue that ``concurrency`` would bound. Where
        the cache is full, those of ``concurrency`` beyond are let in and start over."""
        full = self.full
        if full is None:
            return self._at(batch)
        waiting, share = full.at(batch)
        found = self._at(batch, waiting, share)
        if np.any(np.isfinite(concurrency)) and np.any(brim := full.brims(batch)):
            more = np.where(brim, concurrency - found.concurrency * SURELY, 0.0) / self.decode_ranks
            if np.any(more > 0):
                found = self._at(batch, *full.filled(waiting, share, more))
        return found

    def _at(self, batch: Array, waiting: Number = 0.0, share: Number = 0.0) -> SteadyState:
        """``waiting``: with their first token, on a rank; ``share``: of what replies write that is read again."""
        traffic, engine, prompts = self.traffic, self.engine, self.prompts
        # a pipeline is a server whose step is a turn of its stages, so many of which bring a token to each sequence
        steps, others = traffic.decode_steps(self.depth) * prompts.stages, np.maximum(batch - 1, 0)
        apart = 4 / 3 * traffic.spread * steps * np.sqrt(np.minimum(traffic.rounds, LONG))  # in steps, of all rounds
        # phases that all begin with are lost in an endless load
        again = share * traffic.output_len / (traffic.input_len - traffic.prefix_cached)
        step = self._steps(batch, steps, np.where(np.isinf(traffic.rounds), np.inf, apart / steps), 1 + again)
        # between two looks for requests no step reads any: where prompts run alone these are plain
        unread = step.plain_s if engine.prefill_alone else step.met_s
        first = self._wait_steps * step.met_s + step.own_s + engine.first_token_s(traffic.input_len)
        if np.any(traffic.wait_steps):
            first = first + traffic.wait_steps * unread
        generation = steps * step.mean_s
        if engine.prefill_alone:
            # Decoding stands still while prompts run, so that others' replies do not end meanwhile: those alone come
            # together, beyond chance, that end in one step, or between two looks for requests; of lengths that differ
            # ends move apart with every round. Their prompts are what tokens would wait for; the first token waits for
            # them instead: for all that share its step, for half of them where they take many.
            looks = steps_between_looks(traffic.wait_steps)
            together = others * np.maximum(looks / (looks + apart), np.minimum(looks / steps, 1.0))
            # they share steps, where others pay for one of their own, and all of one wait for its end
            shared = np.maximum(prompts.per_step, 1.0)
            each = np.where(
                prompts.per_step > 1, prompts.prompt_s + prompts.fixed_s / np.minimum(together + 1, shared),
                1 / prompts.most_per_s,
            )
            generation = generation - together * np.maximum(step.prompt_s - each, 0.0)
            more = np.maximum(together - others / steps, 0.0)  # than the step alone brings, which it rides in
            bunched = np.minimum(more, (more + shared - 1) / 2) * each
            place, generation = generation, generation - bunched
        else:
            bunched, place = np.minimum(IN_STEP_PROMPTS / (1 + apart), others) / prompts.most_per_s, generation
        first = first + bunched
        if np.any(np.isfinite(traffic.rounds)):
            # the wave that all begin with makes one round's first tokens wait, where others' prompts do not anyway
            wave = others / prompts.most_per_s  # until its last prompt is done, beyond the first
            first = first + np.maximum(wave / 2 - bunched, 0.0) / traffic.rounds
        generation = generation + waiting * place / batch
        users = np.where(step.full, np.inf, batch * self.decode_ranks * (first + generation) / place)
        mean, plain = step.mean_s * prompts.stages, step.plain_s * prompts.stages
        return SteadyState(first, generation, place, mean, plain, users)

    @property
    def _wait_steps(self) -> Number:
        """Steps, or turns of a pipeline's stages, before the one that a new request rides in."""
        engine, stages = self.engine, self.prompts.stages
        rule = None if engine.scheduler is None else engine.scheduler.micro_batches
        if rule is None or not np.any(stages > 1):
            return engine.arrival_wait_steps
        return np.where(stages > 1, rule.wait_turns, engine.arrival_wait_steps)

    def _steps(self, batch: Array, steps: Array, apart: Array, reads: Number) -> _Steps:
        """Moments of the step time where a reply takes so many ``steps``, ends ``apart``, in replies, from those of one
        beginning, and ranks, if several, move in lockstep.

        While one's own reply is written all other users of one's rank send a prompt, as none is read while one's own
        is; of other ranks' users as many as their replies make up of their time. ``reads``: how often, in tokens, a
        prompt is read. Of a pipeline steps are its turns, in each of which one of as many micro-batches as there are
        stages decodes.
        """
        prompts, dp, alone = self.prompts, self.decode_ranks, self.engine.prefill_alone
        scheduler, stages = self.engine.scheduler, self.prompts.stages
        wait = alone and scheduler is not None and scheduler.ranks_wait(self.depth)
        plain = self.decoding.at("seconds", batch) / stages
        shared = 0.0 if alone else (self.decoding.at("attention_s", batch) + prompts.token_s * batch) / stages
        first = prompts.fixed_s + (plain if alone else shared)  # a: what a step with prompts takes beside their number
        extra = first - plain
        alone_s = prompts.prompt_s - prompts.expert_s * (1 - 1 / dp)
        # one's own prompt without others', in replies
        reading = (first + alone_s) / (plain * (np.minimum(prompts.per_step, 1.0) * steps))
        # users of a rank: n of them take 1 + n * reading for a round each, of which 1 + (n - 1) * reading are replies;
        # of those whose prompts are on their way behind the first stage as many more as send one during a reply
        behind = prompts.passing_s(np.minimum(prompts.per_step, 1.0) * reading) if np.any(stages > 1) else 0.0
        more, writing = reading * batch, batch + behind * (batch + 1)
        slack = 1 + behind - reading - more
        far = np.sqrt(slack * slack + 4 * (reading * writing))
        far += np.abs(slack)
        users = np.where(slack > 0, 2 * writing / np.maximum(far, 1e-9), far / (2 * reading))
        if np.all(batch >= 1):
            users = np.maximum(users, batch)
            beside = users - 1 + (dp - 1) * batch
        else:
            more += batch * (1 + behind)
            users = np.where(more < 1, more, np.maximum(users, batch))
            several = np.maximum(users, 1.0)
            beside = several - 1 + (dp - several / users) * batch
        arrivals = np.maximum(beside, NEARLY_NONE) / steps * reads
        per_rank = arrivals / dp
        used = per_rank / prompts.per_step
        if np.all(prompts.per_step <= 1):  # a prompt takes 1 / per_step steps of its own
            mixed = some_read(used, apart, dp, users, wait | (not alone))
            idle = 1 - np.maximum(used, 1e-12) / np.maximum(mixed, 1e-12)  # share of the ranks that have none
            # of several that read, the one that is farthest, but where all go in step
            readers = np.maximum(dp * (1 - idle), 1.0)
            late = prompts.late_s * (readers - 1) / (readers + 1) * (1 - 1 / (1 + steps * apart * prompts.per_step))
            each = np.maximum(extra + prompts.prompt_s + late - prompts.expert_s * idle, 0.0)
            # steps in which one's own reply stands still, and those of others that go on meanwhile
            still = np.where(wait, mixed, used) if alone else mixed
            longer = np.maximum(each - plain, 0.0)
            mean = plain + still * each + (mixed - still) * longer
            variance = varied(still) * each**2 + varied(mixed - still) * longer**2
            own = (plain + each) / prompts.per_step - (plain if alone else 0.0)
            with_prompts, longest = mixed, each if alone else plain + each
        else:
            # the slowest of dp ranks: at least whether any has a prompt, at most all of them on one
            # between two looks for requests none is read, then all that came since are
            looks = steps_between_looks(self.traffic.wait_steps) if alone else 1.0
            wide = np.where(np.greater(dp, 1), window(used, apart, 1.0), 1.0) / looks
            most = np.minimum(arrivals, per_rank + np.sqrt(2 * np.log(dp) * per_rank * wide))
            none = 1 + wide * np.expm1(-arrivals / wide)
            most = np.maximum(np.maximum(most, 1 - none), per_rank / np.clip(users, 1 / dp, 1))
            idle = 1 - np.maximum(per_rank, 1e-12) / np.maximum(most, 1e-12)  # share of the ranks that have fewer
            spared = prompts.expert_s * idle
            each = prompts.prompt_s - spared
            slowest, once = most * each, (1 - none) * extra
            # prompts alone take as many steps as they need
            taking = np.maximum(once, most / prompts.per_step * extra) if alone else once
            mean = plain + np.maximum(taking + slowest, 0.0)
            scatter = each * slowest + none * extra * (once + 2 * slowest)
            if alone:
                busy = np.maximum(-np.expm1(-per_rank * looks) / looks, 1e-12)
                some = some_read(busy, apart, dp, users, False)
                turns = np.maximum(1.0, per_rank / busy / prompts.per_step)
                reading = extra * turns + (prompts.prompt_s - prompts.expert_s * (1 - busy / some)) * per_rank / busy
                longer = np.maximum(reading - plain, 0.0)
                mean = np.where(wait, mean, plain + busy * reading + (some - busy) * longer)
            # arrivals vary with the length of the step before, too
            variance = scatter / np.maximum(1 - np.square(slowest / mean), 1e-3)
            others = per_rank * (1 + variance / mean**2)
            half = 1 + others / 2
            ridden = extra if alone else first
            own = ridden * np.maximum(1.0, half / prompts.per_step) - spared
            own += prompts.prompt_s * np.minimum(1 + others, np.maximum(prompts.per_step, half))
            with_prompts = some * turns if alone else 1 - none
            longest = ridden - spared + prompts.prompt_s * np.minimum(1 + others, prompts.per_step)
        if np.any(stages > 1):
            own = own + prompts.passing_s(longest)
            mean = mean + held_up(prompts, with_prompts, np.maximum(longest - plain, 0.0), alone)
        met = mean + variance / mean
        # prompts that do not fit into the step wait for the next
        # (of prompts alone as many as come while replies are written, however long they take to read)
        left = 1.0 if alone else np.maximum(1 - used, 1e-3)
        own = own + met * used / (left * (2 * np.maximum(prompts.per_step, 1.0)))
        return _Steps(mean, met, own, plain, (mean - plain) / per_rank, (used >= 0.98) & (not alone))


@dataclass(frozen=True)
class _Steps:
    """Steps at a batch, seconds: the mean, what an arrival meets, what it rides in, one without prompts, what each
    prompt of a rank adds to them; and whether prompts overrun."""

    mean_s: Array
    met_s: Array
    own_s: Array
    plain_s: Array
    prompt_s: Array
    full: Mask


@dataclass(frozen=True, kw_only=True)
class Disaggregated(ServingModel):
    """Pools of prefill and of decode workers; prompts go to the least loaded of ``prefill_ranks`` data-parallel ranks.

    ``hand_over_s``: a prompt's cache on its way.
    """

    prefill_ranks: Number
    hand_over_s: Number

    def at(self, batch: Array, concurrency: Number = np.inf, known: SteadyState | None = None) -> SteadyState:
        """As :meth:`ServingModel.at`, where an endless queue is one of arrivals at random. ``known``: the state at that
        batch with others in flight."""
        traffic, engine, prompts = self.traffic, self.engine, self.prompts
        queued = None if known is None else known.queued
        if queued is None:
            decode_step = self.decoding.at("seconds", batch) * engine.overhead.pool_factor
            generation, sequences = traffic.decode_steps(self.depth) * decode_step, batch * self.decode_ranks
            rate = sequences / generation
            wave = np.maximum(sequences / self.prefill_ranks - 1, 0) / prompts.most_per_s  # as of Aggregated
            waits = (engine.arrival_wait_steps + traffic.wait_steps) * decode_step
            overhead = engine.first_token_s(traffic.input_len) + engine.hand_over_s
            service, queue = prompts.at_rate(rate / self.prefill_ranks)
            passing = prompts.passing_s(service * np.minimum(prompts.per_step, 1.0))
            queued = Queued(
                decode_step, generation, sequences, rate, service, queue,
                (wave / 2 / traffic.rounds, self.hand_over_s, waits, overhead, passing),
                rate >= self.prefill_ranks * prompts.most_per_s,
            )
        # of a closed loop, nobody meets a queue longer than the others in flight
        queue = np.minimum(queued.queue, np.maximum(concurrency / self.prefill_ranks - 1, 0))
        first: Any = sum(queued.beside_s, queued.service_s * (1 + queue))
        users = np.where(queued.full, np.inf, queued.sequences * (1 + first / queued.generation_s))
        generation, decode_step = queued.generation_s, queued.step_s
        return SteadyState(first, generation, generation, decode_step, decode_step, users, queued)

    def closed_loop(self, batch: Array) -> tuple[Array, SteadyState]:
        """Requests in flight of a closed loop, in which the queue itself is no longer than the others in flight; and
        the state there."""
        longest = self.at(batch)  # as random arrivals queue
        alone, ranks = self.at(batch, 0.0, longest), self.prefill_ranks  # without a queue
        assert longest.queued is not None
        each = longest.queued.rate * longest.queued.service_s  # in flight for one more prompt in every rank's queue
        capped = np.where(each < ranks, (alone.concurrency - each) / np.maximum(1 - each / ranks, 1e-9), np.inf)
        users = np.where(alone.concurrency <= ranks, alone.concurrency, np.minimum(longest.concurrency, capped))
        return users, self.at(batch, users, longest)
