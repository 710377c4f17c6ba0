"""One deployment under one load, number by number: the oracle that arrays of deployments are held against.

Nothing here is shared with the product but the price of a step and the data of a load: prompts are cut, steps averaged
and the steady state found by plain floats and if statements, as section and formula say in
:mod:`tensorcast.serving.steady_state`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from one_step_moments import step_moments

from tensorcast.cost.evidence import EVIDENCE, LEVELS
from tensorcast.deploy.deployment import Deployment
from tensorcast.deploy.plan.plan import Collective
from tensorcast.deploy.step.price import StepPrice
from tensorcast.deploy.step.sizes import GRID
from tensorcast.serving.capacity import own_chunk, sequences_that_fit
from tensorcast.serving.curves import unevenly
from tensorcast.serving.prefill_costs import cut_prompts
from tensorcast.serving.traffic import Traffic
from tensorcast.trace.moe import EXPERT_STAGES

PER_SEQUENCE = {"attention", "indexer_scores", "linear_attention", "ssm_scan", "causal_conv1d"}


def seconds_by_row(price: StepPrice, batches: int) -> list[tuple[Any, np.ndarray, np.ndarray]]:
    """(row, seconds over all its calls, evidence level) of every row, each an entry per batch."""
    return [
        (p, np.broadcast_to(np.asarray(p.seconds * n, dtype=float), batches), np.broadcast_to(p.level, batches))
        for p, n in price.calls
    ]


def evidence(price: StepPrice, batches: int) -> dict[str, np.ndarray]:
    """Share of kernel seconds by kind of evidence."""
    found = {kind: np.zeros(batches) for kind in EVIDENCE}
    for _, seconds, level in seconds_by_row(price, batches):
        for i in range(batches):
            found[LEVELS[int(level[i])]][i] += seconds[i]
    whole = np.array(list(found.values())).sum(axis=0)
    return {kind: seconds / np.maximum(whole, 1e-30) for kind, seconds in found.items()}


class OneCurve:
    """Decode steps of one deployment at ``context`` cached tokens over the batch: straight lines between prices."""

    def __init__(
        self, decode: Deployment, context: float, largest: float, smallest: float = 0.0, *, least: float = 5.0
    ) -> None:
        self.batch = GRID[np.searchsorted(GRID, smallest) : np.searchsorted(GRID, largest) + 1]
        held, n = np.maximum(self.batch, 1 / decode.layout.dp), len(self.batch)  # a step has a sequence at least
        held = unevenly(held, decode.layout.pp, least)
        price, sequences_s = decode.step.price(held, 1.0, context), decode.engine.overhead.request_s * held
        attention = sum(s for p, s, _ in seconds_by_row(price, n) if getattr(p.row, "name", "") in PER_SEQUENCE)
        columns = {
            "seconds": price.seconds, "attention_s": attention + sequences_s, "error": price.error,
            "exposed_comm_s": price.exposed_comm_s, "hidden_comm_s": price.hidden_comm_s, **evidence(price, n),
        }  # fmt: skip
        self.columns = {name: np.broadcast_to(np.asarray(v, dtype=float), n) for name, v in columns.items()}

    def at(self, column: str, batch: Any) -> Any:
        return np.interp(batch, self.batch, self.columns[column])


@dataclass
class OnePrefill:
    """Prefill steps of one deployment: ``fixed_s + prompt_s * n`` seconds for ``n`` prompts per rank."""

    per_step: float
    fixed_s: float
    prompt_s: float
    token_s: float = 0.0
    expert_s: float = 0.0
    late_s: float = 0.0
    step_s: float = 0.0
    error: float = 0.0
    stages: float = 1.0
    passes: float = 1.0
    evidence: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, prefill: Deployment, traffic: Traffic, chunk: int) -> OnePrefill:
        """A step at half a prompt, at one and at as many as fit, under the load that slows it."""
        cut, slow = cut_prompts(traffic, chunk), prefill.engine.overhead
        price = prefill.step.undivided.price(np.array(cut.batches), cut.tokens, cut.past)
        pp = prefill.layout.pp
        factor = slow.prefill_factor / pp  # of a stage
        half, one, full = (float(s) * factor for s in np.broadcast_to(price.seconds, 3))
        held = factor * float(np.broadcast_to(price.least_s, 3)[1])
        experts = sum(
            s for p, s, _ in seconds_by_row(price, 3)
            if (p.row.group in ("dp", "ep") if isinstance(p.row, Collective) else p.row.stage in EXPERT_STAGES)
        )
        attention = sum(s for p, s, _ in seconds_by_row(price, 3) if getattr(p.row, "name", "") in PER_SEQUENCE)
        chunks = max(1 / cut.per_step, 1.0)
        first, last = cut.past - (chunks - 1) / 2 * cut.tokens, cut.past + (chunks - 1) / 2 * cut.tokens
        late = factor * float(np.broadcast_to(attention, 3)[1])
        late *= (last - first) / 2 / ((last + first + cut.tokens) / 2)
        of_half, of_one, _ = factor * (np.broadcast_to(experts, 3) - np.broadcast_to(price.hidden_s, 3))
        if cut.per_step > 1:
            prompt_s = min(max((full - one) / (cut.per_step - 1), 0.0), one)
            token_s, most = prompt_s / cut.tokens, prompt_s
        else:
            prompt_s, token_s, most = 0.0, max(one - half, 0.0) / (cut.tokens / 2), one
        return cls(
            per_step=cut.per_step, fixed_s=one - prompt_s, prompt_s=prompt_s, token_s=token_s, step_s=pp * one,
            stages=pp, passes=pp,
            expert_s=min(max(2 * (of_one - of_half), 0.0), most, max(one - held, 0.0) if held else most),
            late_s=late,
            error=math.hypot(float(np.broadcast_to(price.error, 3)[1]), slow.prefill_error),
            evidence={kind: float(share[1]) for kind, share in evidence(price, 3).items()},
        )  # fmt: skip

    @property
    def most_per_s(self) -> float:
        return self.per_step / (self.fixed_s + self.prompt_s * max(self.per_step, 1.0))

    def at_rate(self, rate: float) -> tuple[float, float]:
        """Seconds in service of a prompt, and how many such times it waits: a gated queue (M/D/1 with one per step)."""
        most = max(self.per_step, 1.0)
        added = min(rate * self.prompt_s, 1 - 1e-9)
        mean = min(max(rate * self.fixed_s / (1 - added), 1.0), most)
        turns = 1 / min(self.per_step, 1.0)
        step = (self.fixed_s + self.prompt_s * mean) * turns
        busy, full = min(rate * step / mean, 1.0), rate / self.most_per_s
        met = step + (busy * self.prompt_s**2 * mean / (1 - added**2) / step if most > 1 else 0.0)
        service = (self.fixed_s + self.prompt_s * min(1 + busy * rate * met, most)) * turns
        if full >= 1:
            return service, math.inf
        crowd = full ** (most + 1) / (2 * most * max(1 - full, 1e-9))
        return service, (busy * met / 2 + crowd * step) / service


@dataclass
class One:
    """What one load meets. Numbers as :class:`~tensorcast.serving.traffic.ServingMetrics` has them."""

    problem: str = ""
    concurrency: float = math.nan
    batch: float = math.nan
    ttft_s: float = math.nan
    tpot_s: float = math.nan
    request_s: float = math.nan
    output_tokens_per_s: float = math.nan
    ttft_error: float = math.nan
    tpot_error: float = math.nan
    decode_step_s: float = math.nan
    prefill_step_s: float = math.nan
    exposed_comm_s: float = math.nan
    hidden_comm_s: float = math.nan
    evidence: dict[str, float] = field(default_factory=dict)


def steps_of(traffic: Traffic, depth: int) -> float:
    """Decode steps of a reply."""
    return max(float(traffic.output_len) - 1, 1) / sum(float(traffic.mtp_acceptance) ** i for i in range(depth + 1))


def found_writing(traffic: Traffic) -> float:
    """Reply of whoever writes at a moment: each length counts as often as it is long."""
    shortest, longest = (float(traffic.output_len) * (1 + side * float(traffic.spread)) for side in (-1, 1))
    if traffic.spread < 1e-3:  # next to none differ
        return float(traffic.output_len) * (1 + float(traffic.spread) ** 2 / 3)
    return 2 / 3 * (longest**3 - shortest**3) / (longest**2 - shortest**2)


def aggregated(
    prefill: Deployment, decode: Deployment, traffic: Traffic, chunk_tokens: int | None = None, *,
    least: float | None = None,
) -> One:
    """One engine that prefills and decodes on the same GPUs. ``chunk_tokens``: prompt tokens per step and dp rank;
    ``least``: sequences with which a pipeline's micro-batch lasts, if not by that."""
    chunk = own_chunk(prefill) if chunk_tokens is None else chunk_tokens
    prompts, dp, users = OnePrefill.of(prefill, traffic, chunk), decode.layout.dp, float(traffic.concurrency)
    fits = float(sequences_that_fit(
        prefill, decode, cut_prompts(traffic, chunk), int(traffic.input_len), found_writing(traffic)
    ))  # fmt: skip
    if fits < 1:
        return One(f"does not fit: no room for one sequence of {traffic.input_len} tokens")
    least = (0.0 if prompts.per_step < 1 else 5.0) if least is None else least
    curve, depth = OneCurve(decode, float(traffic.context), users / dp, least=least), decode.options.mtp_depth

    def times(batch: float) -> tuple[float, float, float, float, float]:
        return engine_times(traffic, decode, dp=dp, depth=depth, curve=curve, prompts=prompts, batch=batch)

    def in_flight(batch: float) -> float:
        return times(batch)[3]

    batch = steady_batch(in_flight, min(users / dp, fits), users)
    first, generation, mean, _, between = times(batch)
    first = max(first, users / (batch * dp) * between - generation)
    share = min(max(1 - float(curve.at("seconds", batch)) / mean, 0.0), 1.0)
    return told(
        traffic, users, batch, first=first, generation=generation, curve=curve, prompts=prompts, share=share
    )  # fmt: skip


def engine_times(
    traffic: Traffic, decode: Deployment, *, dp: int, depth: int, curve: Any, prompts: Any, batch: float
) -> tuple[float, float, float, float, float]:
    """Seconds to the first token and of the reply from there, the mean step, requests in flight, seconds that a reply's
    place is taken."""
    stages = decode.layout.pp  # in turns of which all times are
    engine, steps = decode.engine, steps_of(traffic, depth) * stages
    waits = engine.scheduler is not None and engine.scheduler.drafting_ranks_wait and depth > 0
    apart = 2 * float(traffic.spread) * steps * math.sqrt(min(float(traffic.rounds), 1e4)) / 1.5
    mean, met, own, each, full = step_moments(
        curve, prompts, batch, steps=steps, dp=dp, alone=engine.prefill_alone, waits=waits,
        apart=math.inf if math.isinf(float(traffic.rounds)) else apart,
        looks=2 * float(traffic.wait_steps) + 1 if engine.prefill_alone else 1.0, stages=stages,
    )
    others, most = max(batch - 1, 0), prompts.most_per_s
    unread = float(curve.at("seconds", batch)) / stages if engine.prefill_alone else met
    rule = engine.scheduler.micro_batches if engine.scheduler is not None and stages > 1 else None
    seen = engine.arrival_wait_steps if rule is None else rule.wait_turns
    first = float(seen) * met + traffic.wait_steps * unread + own
    first, generation = first + engine.first_token_s(traffic.input_len), steps * mean
    if engine.prefill_alone:
        looks, shared = 2 * traffic.wait_steps + 1, max(prompts.per_step, 1)
        together = others * max(looks / (looks + apart), min(looks / steps, 1))
        cost = prompts.prompt_s + prompts.fixed_s / min(together + 1, shared) if prompts.per_step > 1 else 1 / most
        between = generation - together * max(each - cost, 0)
        more = max(together - others / steps, 0)
        waits = min(more, (more + shared - 1) / 2) * cost
        generation = between - waits
    else:
        waits, between = min(0.75 / (1 + apart), others) / most, generation
    first += waits + max(others / most / 2 - waits, 0) / traffic.rounds
    users = math.inf if full else batch / between * dp * (first + generation)
    return first, generation, mean * stages, users, between


def disaggregated(
    prefill: Deployment, decode: Deployment, prefill_workers: int, decode_workers: int, traffic: Traffic,
    *, chunk_tokens: int | None = None, least: float | None = None,
) -> One:  # fmt: skip
    """Pools of prefill and of decode workers; a worker is one whole layout."""
    chunk = own_chunk(prefill) if chunk_tokens is None else chunk_tokens
    cut, prompts = cut_prompts(traffic, chunk), OnePrefill.of(prefill, traffic, chunk)
    users = float(traffic.concurrency)
    lengths = int(traffic.input_len), found_writing(traffic)
    fits = float(sequences_that_fit(prefill, decode, None, *lengths))
    if fits < 1:
        return One(f"does not fit: no room for one sequence of {traffic.input_len} tokens")
    if sequences_that_fit(prefill, prefill, cut, lengths[0], 0) < 1:
        return One(f"does not fit: prefill workers have no room for {traffic.input_len} tokens")
    ranks, lanes = decode_workers * decode.layout.dp, prefill_workers * prefill.layout.dp
    curve = OneCurve(decode, float(traffic.context), users / ranks, least=math.inf if least is None else least)
    hand_over = hand_over_s(prefill, decode, lengths[0], prefill_workers + decode_workers)
    steps, engine = steps_of(traffic, decode.options.mtp_depth), decode.engine

    def step_s(batch: float) -> float:
        return float(curve.at("seconds", batch)) * engine.overhead.pool_factor

    def first_s(batch: float) -> float:
        step = step_s(batch)
        service, queue = prompts.at_rate(batch * ranks / (steps * step) / lanes)
        queue = min(queue, max(users / lanes - 1, 0))
        burst = max(batch * ranks / lanes - 1, 0) / prompts.most_per_s / 2 / traffic.rounds
        waits = (engine.arrival_wait_steps + traffic.wait_steps) * step
        overhead = hand_over + engine.first_token_s(traffic.input_len) + engine.hand_over_s
        overhead += (prompts.passes - 1) * service * min(prompts.per_step, 1.0)
        return float(service * (1 + queue) + burst + waits + overhead)

    def in_flight(batch: float) -> float:
        generation = steps * step_s(batch)
        if batch * ranks / generation >= lanes * prompts.most_per_s:
            return math.inf
        return batch * ranks * (1 + first_s(batch) / generation)

    batch = steady_batch(in_flight, min(users / ranks, fits), users)
    generation = steps * step_s(batch)
    first = max(first_s(batch), users / (batch * ranks) * generation - generation)
    found = told(
        traffic, users, batch, first=first, generation=generation, curve=curve, prompts=prompts, share=0.0
    )  # fmt: skip
    return replace(found, decode_step_s=step_s(batch))


def hand_over_s(prefill: Deployment, decode: Deployment, tokens: int, workers: int) -> float:
    """A prompt's cache over the innermost tier if both pools fit into one of its domains, else over the outermost; from
    device to device over the slower one's. GPUs that are joined in pairs have one link to each other."""
    from tensorcast.cost.memory import cache_bytes
    from tensorcast.profiles.memory import Kept

    gpus = (prefill.layout.world_size + decode.layout.world_size) * workers / 2
    tier = prefill.device.interconnect[0 if gpus <= prefill.device.interconnect[0].size else -1]
    kept, rules = Kept(), prefill.engine.cache_rules
    if rules is not None and rules.kept(prefill.model.config, 0).window_share == 1:  # windows share the others' cache
        kept = Kept(window_share=1.0)
    share = float(cache_bytes(prefill.raw, prefill.quantization.kv, 1, tokens, kept=kept)) / prefill.layout.pp
    if prefill.options.hand_over_gbs:
        return share / (1e9 * prefill.options.hand_over_gbs)
    tiers = [tier]
    if decode.device.name != prefill.device.name:
        tiers = [one.device.interconnect[-1] for one in (prefill, decode)]
    links = [one.size - 1 if one.pairwise else 1 for one in tiers]
    return max(
        float(one.latency_s) + share * many / float(one.bandwidth_bytes_per_s)
        for one, many in zip(tiers, links, strict=True)
    )


def steady_batch(in_flight: Callable[[float], float], limit: float, users: float) -> float:
    """The batch at which as many requests are in flight as there are, at most ``limit``."""
    if in_flight(limit) <= users:
        return float(limit)
    low, high = 0.0, limit
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if in_flight(middle) <= users else (low, middle)
    return max(low, 1e-9)


def told(
    traffic: Traffic, users: float, batch: float, *, first: float, generation: float, curve: Any, prompts: Any,
    share: float,
) -> One:  # fmt: skip
    """The numbers at a steady state; ``share``: of the time per token, what prompts take."""
    tpot = generation / max(float(traffic.output_len) - 1, 1)
    request = first + tpot * (float(traffic.output_len) - 1)
    at = {name: float(curve.at(name, batch)) for name in ("seconds", "error", "exposed_comm_s", "hidden_comm_s")}
    return One(
        concurrency=users, batch=batch, ttft_s=first, tpot_s=tpot, request_s=request,
        output_tokens_per_s=users / request * float(traffic.output_len), ttft_error=prompts.error,
        tpot_error=math.hypot((1 - share) * at["error"], share * prompts.error), decode_step_s=at["seconds"],
        prefill_step_s=prompts.step_s, exposed_comm_s=at["exposed_comm_s"], hidden_comm_s=at["hidden_comm_s"],
        evidence={
            kind: (1 - share) * float(curve.at(kind, batch)) + share * one for kind, one in prompts.evidence.items()
        },
    )  # fmt: skip
