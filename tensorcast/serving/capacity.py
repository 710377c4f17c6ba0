"""Sequences that fit beside a full step."""

from __future__ import annotations

import numpy as np

from tensorcast.deploy.deployment import Deployment
from tensorcast.deploy.layout import attention_dp
from tensorcast.serving.prefill_costs import PromptCut
from tensorcast.serving.traffic import Array, Number, Traffic


def sequences_that_fit(
    prefill: Deployment, decode: Deployment, prompts: PromptCut | None, input_len: Number, output_len: Number
) -> Array:
    """Sequences per data-parallel rank whose cache fits beside weights and the buffers of a full prefill step.

    ``prompts``: as they are read beside; None: elsewhere, by a pool of their own. Engines that admit a request only if
    its whole reply has room count all of it, the others the mean over the reply.
    """
    left, buffers = decode_budget(decode, input_len)
    each = sequence_bytes(decode, input_len, output_len, pooled=prompts is None)
    fits = room(decode, left, each + buffers)
    if prompts is not None:
        fits = np.minimum(fits, room(decode, prefill_budget(prefill, prompts), each))
    return fits


def prompts_that_fit(prefill: Deployment, budget: Number, input_len: Number) -> Array:
    """Prompts per data-parallel rank of a pool that reads them alone, whose cache fits into the ``budget`` of a full
    step."""
    return room(prefill, budget, sequence_bytes(prefill, input_len, 0))


MOST_SEQUENCES = float(1 << 24)
"""More than any rank holds."""

SEVERAL = 256
"""Sequences of a decode step by which its buffers' growth is told: a sum of terms that nearly all grow evenly."""


def decode_budget(decode: Deployment, input_len: Number, chunk: int | None = None) -> tuple[Number, Number]:
    """What decode steps leave for the cache, and how much of it the buffers of each of their sequences take: live
    activations and what the MoE exchange receives, where they share memory with the cache. ``chunk``: see
    :meth:`Deployment.cache_budget`."""
    left = np.asarray(decode.cache_budget(np.array([1.0, SEVERAL]), 1, int(input_len), chunk=chunk))
    left = np.broadcast_to(left, (*left.shape[:-1], 2))
    one, several = left if left.ndim == 1 else (left[:, :1], left[:, 1:])
    if decode.engine.memory_covers == "weights_and_cache":
        return one, 0.0
    buffers = (one - several) / (SEVERAL - 1)
    return one + buffers, buffers


def prefill_budget(prefill: Deployment, *prompts: PromptCut) -> Number:
    """What a full prefill step leaves for the cache; of several cuts of prompts along the last axis."""
    each = np.array([(int(max(cut.per_step, 1.0)), int(cut.tokens), int(cut.past)) for cut in prompts], dtype=float)
    batch, tokens, past = each.T if len(each) > 1 else each[0]
    return prefill.cache_budget(batch, tokens, past, chunk=batch * tokens)


def sequence_bytes(decode: Deployment, input_len: Number, output_len: Number, pooled: bool = False) -> Number:
    """The cache that a sequence needs to be admitted, with room that is kept for the rest of its reply. ``pooled``: to
    a server that writes what others read, which may leave so many tokens for each reply under way."""
    scheduler = decode.engine.scheduler
    length = input_len + (output_len if decode.engine.reserves_reply else output_len / 2)
    if pooled and scheduler is not None and scheduler.room_first is not None:
        length = length + scheduler.room_first.reserved_tokens
    expected = None if pooled or scheduler is None else scheduler.expected_reply
    if expected is not None and expected.fixed_whole:  # in the mean of all moments of a reply; shares fall to little
        most = np.minimum(output_len, expected.most_tokens)
        length = length + most - most * most / (2 * np.maximum(output_len, 1))
    return decode.held(1.0, int(length))[1]


def room(decode: Deployment, budget: Number, per_sequence: Number, most: Number | None = None) -> Array:
    """Sequences whose cache fits into ``budget`` bytes, as many as a step may have; their captured decode steps take of
    it, too."""
    budget, reserve = np.maximum(budget, 0.0), decode.engine.reserve
    free = 1.0 - decode.context_bytes / float(decode.device.memory_bytes)  # of which a share less graphs is taken
    few: Array = np.floor(budget / np.maximum(per_sequence + free * decode.graph_bytes(1), 1.0))
    most = decode.most_sequences if most is None else most
    if reserve is None or not reserve.many_sequences:
        return np.minimum(few, most)
    if reserve.pooled:
        return np.minimum(_held(decode, budget, per_sequence, free), most)
    limit = reserve.many_sequences
    many = np.floor(budget / np.maximum(per_sequence + free * decode.graph_bytes(limit + 1) / (limit + 1), 1.0))
    return np.minimum(np.where(few > limit, np.maximum(many, limit), few), most)


def _held(decode: Deployment, budget: Array, per_sequence: Number, free: Number) -> Array:
    """Sequences whose cache and captured decode steps fit into ``budget``, where the steps take no even share each."""
    low = np.zeros(np.broadcast_shapes(np.shape(budget), np.shape(per_sequence)))
    high = np.floor(np.minimum(budget / np.maximum(per_sequence, 1.0), MOST_SEQUENCES)) + 1.0 + low
    while np.any(high - low > 1):
        middle = np.floor((low + high) / 2)
        fits = middle * per_sequence + free * decode.graph_bytes(middle) <= budget
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return low


def own_chunk(prefill: Deployment) -> int:
    """Prompt tokens per step and data-parallel rank that the engine takes unasked."""
    dp = attention_dp(prefill.layout, prefill.raw.facts.num_experts)
    return prefill.engine.tokens_per_step(prefill.device, dp, prefill.step.plan.all2all)


def room_for(
    prefill: Deployment, decode: Deployment, prompts: PromptCut, traffic: Traffic, pooled: bool
) -> tuple[Array, str]:
    """Sequences of ``traffic`` that fit on a decoding rank, and why none does. ``pooled``: prefill has its own GPUs."""
    beside = None if pooled else prompts  # what a full prefill step takes on the same GPUs
    fits = sequences_that_fit(prefill, decode, beside, traffic.input_len, traffic.reply_in_flight)
    if fits < 1:
        return fits, f"does not fit: no room for one sequence of {traffic.input_len} tokens"
    if pooled and prompts_that_fit(prefill, prefill_budget(prefill, prompts), traffic.input_len) < 1:
        return fits, f"does not fit: prefill workers have no room for {traffic.input_len} tokens"
    return fits, ""
