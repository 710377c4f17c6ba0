"""What a rank holds: weights, KV cache and states, activations, communication buffers. All in bytes."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, TypeVar

import numpy as np

from tensorcast.modeling.quantization import Quantization, rounded_hidden
from tensorcast.trace.dims import Sizes
from tensorcast.trace.table import DTYPE_BYTES, Op, OpTable, Tensor

MLA_FP8_SCALE_GROUP = 128
"""FP8 latent cache: fp8 latent, one fp32 scale per 128 of it, bf16 rope part: 656 bytes per layer for 512 + 64
(FlashMLA, github.com/deepseek-ai/FlashMLA)."""


@dataclass(frozen=True)
class CacheEntry:
    """Cache of one layer kind on one rank: per token, up to ``limit`` tokens (0: all); or per sequence."""

    kind: int
    per_token: float
    limit: int
    per_sequence: float = 0.0


Found = TypeVar("Found")


def per_table(function: Callable[..., Found]) -> Callable[..., Found]:
    """Remember what ``function`` finds in a table (by identity: tables hold dicts) for its other arguments."""
    found: dict[tuple[Any, ...], tuple[OpTable, Found]] = {}

    @functools.wraps(function)
    def remembered(table: OpTable, *rest: Any) -> Found:
        key = (id(table), *rest)
        if key not in found:
            if len(found) >= 1024:
                found.pop(next(iter(found)))
            found[key] = table, function(table, *rest)  # the table stays alive, so its id stays its own
        return found[key][1]

    return remembered


@per_table
def cache_entries(table: OpTable, kv: str) -> list[CacheEntry]:
    """What every layer of each kind keeps per token and per sequence, in bytes on this rank.

    Read off the cache writes of the trace; windows and chunks off the attention of the same layer kind.
    """
    unit = Sizes(B=1.0, S=1.0, P=0.0)
    entries = []
    for op in table.ops:
        if op.name == "kv_cache_write":
            keys, values = op.inputs
            attention = next((a for a in table.ops if a.name == "attention" and a.kind == op.kind), None)
            limit = (attention.attrs["window"] or attention.attrs["chunk"]) if attention else 0
            entries.append(CacheEntry(op.kind, _token_bytes(op, keys, values, unit, kv, attention), int(limit)))
        elif op.name in ("linear_attention", "ssm_scan"):
            entries.append(CacheEntry(op.kind, 0.0, 0, float(op.outputs[1].bytes(unit))))
        elif op.name == "causal_conv1d":
            x, weight = op.inputs[:2]
            state = x.dims[1].coef * (weight.dims[-1].coef - 1) * DTYPE_BYTES[x.dtype]
            entries.append(CacheEntry(op.kind, 0.0, 0, float(state)))
    return entries


def latent_bytes(latent: float, rope: float) -> float:
    """One token's FP8 latent cache entry: see :data:`MLA_FP8_SCALE_GROUP`."""
    return latent + 4.0 * latent / MLA_FP8_SCALE_GROUP + 2.0 * rope


def indexer_key_bytes(width: float) -> float:
    """One token's indexer key: fp8 with one fp32 scale per 128, whatever the KV dtype (vLLM, SGLang: 132 bytes)."""
    return width + 4.0 * math.ceil(width / 128)


def _token_bytes(op: Op, keys: Tensor, values: Tensor, unit: Sizes, kv: str, attention: Op | None) -> float:
    numel = float(keys.numel(unit) + values.numel(unit))
    if op.attrs["kind"] == "indexer":
        return indexer_key_bytes(numel)
    if kv == "bf16":
        return 2.0 * numel
    if attention is not None and attention.attrs["latent"]:
        return latent_bytes(float(keys.numel(unit)), float(values.numel(unit)))
    return numel


def kv_bytes_per_token(table: OpTable, kv: str = "bf16") -> float:
    """Bytes that one more token adds over all layers, before any window is full."""
    return sum(e.per_token * table.layer_kinds.count(e.kind) for e in cache_entries(table, kv))


def cache_bytes(table: OpTable, kv: str, sequences: Any, length: Any, layers: slice = slice(None)) -> Any:
    """KV cache and recurrent state of ``sequences`` sequences of ``length`` tokens over ``layers``."""
    kinds = table.layer_kinds[layers]
    total: Any = 0.0
    for entry in cache_entries(table, kv):
        tokens = np.minimum(length, entry.limit) if entry.limit else length
        total = total + kinds.count(entry.kind) * sequences * (entry.per_token * tokens + entry.per_sequence)
    return total


def weight_bytes(
    table: OpTable,
    quantization: Quantization,
    ep: int = 1,
    etp: int = 1,
    layers: slice = slice(None),
    first: bool = True,
    last: bool = True,
    local_experts: int | None = None,
    rounded: bool = False,
) -> float:
    """Weights on one rank: experts split over ``ep`` and ``etp``, the rest as traced at this tp. Scales included.

    ``local_experts``: experts and copies on the fullest rank, by default what even splitting gives. ``rounded``: the
    engine pads experts' hidden size to their kernels' multiple.
    """
    total = 0.0
    for p in table.params:
        if p.kind < 0 and not _in_stage(table, p.role, first, last):
            continue
        scheme = quantization.scheme(p.name, p.role)
        per_element = scheme.weight_bytes if scheme.name != "bf16" else DTYPE_BYTES[p.dtype]
        numel = float(p.numel)
        if p.role == "experts":
            experts = table.facts["num_experts"]
            held = math.ceil(experts / ep) if local_experts is None else local_experts
            hidden = table.facts["moe_hidden_size"]
            per_element *= rounded_hidden(hidden, scheme.name) / hidden if rounded and hidden else 1.0
            numel = p.full_numel / experts * held / etp
        total += numel * per_element * table.count(p, layers)
    return total


def _in_stage(table: OpTable, role: str, first: bool, last: bool) -> bool:
    """Whether a parameter outside the layers lies on this pipeline stage."""
    if role == "embedding":
        return first or (last and table.facts["tied_embedding"])
    return last if role == "lm_head" else True


def activation_bytes(table: OpTable, sizes: Sizes) -> Any:
    """Peak of live activations over a step: every tensor from the row that makes it to the last that reads it."""
    tensors, storages, moments = _liveness(table)
    size = [t.bytes(sizes) for t in tensors]
    held = [reduce(np.maximum, [size[i] for i in seen]) for seen in storages]
    peak: Any = 0.0
    for moment in moments:
        peak = np.maximum(peak, sum((count * held[i] for i, count in moment), 0.0))
    return peak


@per_table
def _liveness(table: OpTable) -> tuple[list[Tensor], list[tuple[int, ...]], list[tuple[tuple[int, int], ...]]]:
    """Distinct tensors; what storages hold (those seen in them so far); by moment how many storages hold which of that.

    A moment at which nothing lives that does not live at another one, too, is left out.
    """
    shapes: dict[Tensor, int] = {}
    last = {t.storage: i for i, op in enumerate(table.ops) for t in (*op.inputs, *op.outputs) if not t.weight}
    numbers: dict[tuple[int, ...], int] = {}
    live: dict[int, tuple[int, ...]] = {}
    moments: list[Counter[int]] = []
    for i, op in enumerate(table.ops):
        touched = [t for t in (*op.inputs, *op.outputs) if not t.weight]
        for t in touched:
            shape = shapes.setdefault(replace(t, storage=-1, offset=0), len(shapes))
            seen = live.get(t.storage, ())
            live[t.storage] = seen if shape in seen else (*seen, shape)
        moments.append(Counter(numbers.setdefault(held, len(numbers)) for held in live.values()))
        for t in touched:
            if last[t.storage] == i:
                live.pop(t.storage, None)
    largest: list[Counter[int]] = []
    for moment in sorted(moments, key=lambda m: -m.total()):
        if not any(moment <= other for other in largest):
            largest.append(moment)
    return list(shapes), list(numbers), [tuple(moment.items()) for moment in largest]


def low_latency_buffer_bytes(tokens_per_rank: Any, hidden: int, num_experts: int) -> Any:
    """DeepEP's low-latency RDMA buffer: two of (send + receive + signal), a slot per expert and token.

    Source: ``get_low_latency_rdma_size_hint`` of github.com/deepseek-ai/DeepEP; 16-byte headers, fp32 scale per 128.
    """
    message = 16 + np.maximum(2 * hidden, hidden + 4 * hidden / 128)
    combine = 2 * hidden
    send = np.maximum(tokens_per_rank * message, num_experts * tokens_per_rank * combine)
    receive = num_experts * tokens_per_rank * np.maximum(message, combine)
    return 2 * (send + receive + 4 * num_experts)
