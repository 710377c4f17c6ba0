"""What an engine logs of its cache as it starts, worked out from a deployment: to be held beside the real line."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from tensorcast.cost.memory import PackedCache, cache_entries
from tensorcast.deploy.deployment import Deployment
from tensorcast.profiles.memory import Kept

LINES = {
    "vllm": (
        "GPU KV cache size: {tokens:,} tokens", "Maximum concurrency for {length:,} tokens per request: {times:.2f}x",
    ),
    "sglang": ("max_total_num_tokens={tokens}",),
    "trtllm": ("max tokens in paged KV cache ({tokens})",),
}  # fmt: skip
"""vLLM 0.24.0, v1/core/kv_cache_utils.py (tokens are the concurrency times the longest request); SGLang 0.5.14,
srt/managers/scheduler.py; TensorRT-LLM, _torch/pyexecutor/resource_manager.py."""

LONG = 1 << 16
"""Tokens of the requests by which a cache's room is counted: windows and states take their most by then."""

ROOM_ERROR_BYTES = 3e9
"""How far the room for the cache is off in public logs of engines: see docs/checkpoints.md."""


class CacheLog(NamedTuple):
    """Tokens that the cache of one data-parallel rank holds, requests of ``length`` tokens that do, and the lines.

    ``sequences``: that have a state, where states have a pool of their own; ``state_tokens``: whose room a sequence's
    states take where they have not.
    """

    tokens: int
    concurrency: float
    length: int
    lines: tuple[str, ...]
    sequences: float | None = None
    state_tokens: float = 0.0
    room: float | None = None
    """Tokens of running sequences beside ``state_tokens`` of each, where that is not what the line says."""


def cache_log(deployment: Deployment, length: int) -> CacheLog:
    """At the engine's own settings, for requests of ``length`` tokens, prompt and reply.

    The pipeline stage with the least room decides.
    """
    memory, table, engine = deployment.memory(1, 1, 0), deployment.drafting, deployment.engine
    depth, times = deployment.options.mtp_depth, np.inf
    rules, stages = engine.cache_rules, deployment.layout.pp
    kept = rules.kept(deployment.model.config, depth, stages) if rules else Kept()
    sequences: float | None = None
    state_tokens, room = 0.0, math.inf
    each_stage = zip(deployment.stages.weights, deployment.stages.layers, deployment.packed, strict=True)
    for weights, layers, packed in each_stage:
        left = float(memory.cache_budget + memory.weights - weights)
        if packed is not None:
            times = min(times, left // packed.block_bytes / _blocks_logged(deployment, packed, length))
            each, *fixed = packed.blocks(LONG)
            per_token = float(each) / LONG
            room = min(room, left / packed.block_bytes / per_token)
            state_tokens = max(state_tokens, float(sum(fixed)) / per_token)
            continue
        kinds, growing, states = table.layer_kinds[layers], 0.0, 0.0
        for entry in cache_entries(table, deployment.quantization.kv):
            times_kept = max(kinds.count(entry.kind), entry.kind < 0)
            growing += times_kept * entry.per_token * _tokens_held(deployment, entry.limit, kept, length)
            states += times_kept * entry.per_sequence * (1.0 if entry.per_token else kept.state_slots)
        if states and kept.states_apart:  # a pool of their own, of so much of the other's size
            left /= 1.0 + kept.states_apart
            own = max(0.0, left * kept.states_apart / states)
            sequences, states = own if sequences is None else min(sequences, own), 0.0
        times = min(times, left / (growing + states)) if growing + states else times
        state_tokens = max(state_tokens, states / growing * length if growing else 0.0)
    if not 0 < times < np.inf:
        return CacheLog(0, 0.0, length, ())
    said = {"tokens": int(times * length), "length": length, "times": times}
    lines = tuple(line.format(**said) for line in LINES.get(deployment.engine.name, ()))
    held = room if room < math.inf else None
    return CacheLog(int(times * length), float(times), length, lines, sequences, state_tokens, held)


def _blocks_logged(deployment: Deployment, packed: PackedCache, length: int) -> float:
    """Blocks that the engine counts for a request of ``length`` tokens, all of a step's new."""
    pages = deployment.engine.packed_pages
    assert pages is not None
    each = packed.blocks(length, _step_tokens(deployment))
    if pages.whole_blocks:
        return float(sum(each))
    first = packed.groups[0].size_bytes
    return math.ceil(sum(float(n) * one.size_bytes for n, one in zip(each, packed.groups, strict=True)) / first)


def _tokens_held(deployment: Deployment, window: int, kept: Kept, length: int) -> float:
    """Tokens of a request of ``length`` that layers with this ``window`` (0: none) keep, in whole blocks.

    vLLM 0.24.0, v1/kv_cache_interface.py: a window keeps what a step may add to it, and a block more, since it may
    begin inside one (SlidingWindowSpec). SGLang 0.5.14, model_executor/pool_configurator.py: a share of all.
    """
    scheduler = deployment.engine.scheduler
    block = 1 if scheduler is None else scheduler.block_tokens
    if not window:
        return math.ceil(length / block) * block
    if kept.window_share is not None:
        return kept.window_share * length
    return (math.ceil(min(length, window - 1 + _step_tokens(deployment)) / block) + 1) * block


def _step_tokens(deployment: Deployment) -> int:
    """New tokens of all steps under way."""
    engine = deployment.engine
    steps = 1 if engine.scheduler is None else engine.scheduler.held_steps
    return steps * engine.tokens_per_step(deployment.device)


def room_note(deployment: Deployment) -> str:
    """A note where the cache has less room than is known of what an engine keeps for itself; empty if it has more."""
    room = float(deployment.memory(1, 1, 0).cache_budget)
    if room > ROOM_ERROR_BYTES:
        return ""
    return (
        f"the cache has {max(room, 0.0) / 1e9:.1f} GB, less than the error of what the engine keeps for itself (about "
        f"{ROOM_ERROR_BYTES / 1e9:.0f} GB): it may not start, or hold more; compare with its log"
    )
