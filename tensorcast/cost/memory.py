"""What a rank holds: weights, KV cache and states, activations, communication buffers. All in bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add, or_
from typing import NamedTuple

import numpy as np

from tensorcast.cost.stages import layers_of
from tensorcast.cost.work import Array, Mask, Size
from tensorcast.modeling.quantization import Quantization, padded
from tensorcast.profiles.memory import Kept, MemoryCovers, PackedPages
from tensorcast.trace.dims import Sizes
from tensorcast.trace.table import DTYPE_BYTES, STATEFUL, OpTable, per_table


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank; arrays where the batch was one."""

    weights: Size
    kv_cache: Size
    activations: Size
    communication: Size
    engine: Size
    capacity: float
    cache_budget: Size
    """What the engine's memory settings leave for the cache."""

    @property
    def total(self) -> Size:
        return self.weights + self.kv_cache + self.activations + self.communication + self.engine

    @property
    def budget(self) -> Size:
        """The most that all may take together."""
        return self.total - self.kv_cache + self.cache_budget

    @property
    def fits(self) -> bool | Mask:
        return self.kv_cache <= self.cache_budget


MLA_FP8_SCALE_GROUP = 128
"""FP8 latent cache of sparse attention on Hopper: fp8 latent, one fp32 scale per 128 of it, bf16 rope part: 656 bytes
per layer for 512 + 64 (FlashMLA, github.com/deepseek-ai/FlashMLA). Others keep one byte a number, 576 (vLLM 0.24.0,
v1/kv_cache_interface.py, MLAAttentionSpec)."""


@dataclass(frozen=True)
class CacheEntry:
    """Cache of one layer kind on one rank: per token, up to ``limit`` tokens (0: all); or per sequence."""

    kind: int
    per_token: float
    limit: int
    per_sequence: float = 0.0


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
            seen = attention.attrs if attention and op.attrs["kind"] == "kv" else {"window": 0, "chunk": 0}
            limit = seen["window"] or seen["chunk"]
            one = keys.storage == values.storage and keys.offset == values.offset  # not two parts of a fused projection
            shared = one and op.attrs["kind"] != "indexer"  # one vector is key and value
            numel = float(keys.numel(unit)), 0.0 if shared else float(values.numel(unit))
            per_token = sum(numel)
            if op.attrs["kind"] == "indexer":
                ratio = op.attrs.get("compress", 1)
                per_token = indexer_key_bytes(sum(numel) * ratio) / ratio
            elif kv == "bf16" or op.attrs["kind"] == "block_indexer":
                per_token = 2.0 * sum(numel)  # keys of blocks stay in bf16 (vLLM 0.33.0, models/minimax_m3/common)
            elif attention is not None and attention.attrs.get("scaled"):
                per_token = latent_bytes(*numel)
            elif shared:
                per_token *= SHARED_VECTOR_FP8
            # of the last tokens that have no key together yet, in bf16
            tail = 2.0 * op.attrs.get("compress", 1) * op.attrs.get("unpooled", 0)
            entries.append(CacheEntry(op.kind, per_token, int(limit), tail))
            if table.facts.compress_ratios:
                entries += compressed_entries(table, op.kind, per_token, numel[0])
        elif op.name in STATEFUL:
            entries.append(CacheEntry(op.kind, 0.0, 0, float(op.outputs[1].bytes(unit))))
        elif op.name == "causal_conv1d":
            x, weight = op.inputs[:2]
            state = x.dims[1].coef * (weight.dims[-1].coef - 1) * DTYPE_BYTES[x.dtype]
            entries.append(CacheEntry(op.kind, 0.0, 0, float(state)))
    return entries


SHARED_VECTOR_FP8 = 584 / 512
"""Bytes per number of an FP8 cache of vectors that are key and value at once: of 512 numbers 448 in fp8, 64 with
rotary embedding in bf16, and 8 bytes of scales (DeepSeek-V4 in vLLM 0.24.0 and later: 584 bytes per entry)."""


def compressed_entries(table: OpTable, kind: int, entry_bytes: float, width: float) -> list[CacheEntry]:
    """Cache of a layer that keeps one entry per several tokens beside its window, by its model's compression ratios.

    Entries are as large as the window's, with indexer keys at the least ratio. What is not compressed yet, a vector
    and its weights in fp32 for each token of a window of ``ratio``, is a state of each sequence.
    """
    facts = table.facts
    ratio = facts.compress_ratios[table.layer_kinds.index(kind)]
    if not ratio:
        return []
    indexed = ratio == min(filter(None, facts.compress_ratios))
    keys = indexer_key_bytes(facts.indexer_width) if indexed and facts.indexer_width else 0.0
    return [CacheEntry(kind, (entry_bytes + keys) / ratio, 0, 2 * 4.0 * ratio * width)]


def latent_bytes(latent: float, rope: float) -> float:
    """One token's FP8 latent cache entry where it holds scales: see :data:`MLA_FP8_SCALE_GROUP`."""
    return latent + 4.0 * latent / MLA_FP8_SCALE_GROUP + 2.0 * rope


def indexer_key_bytes(width: float) -> float:
    """One token's indexer key: fp8 with one fp32 scale per 128, whatever the KV dtype (vLLM, SGLang: 132 bytes)."""
    return width + 4.0 * math.ceil(width / 128)


def kv_bytes_per_token(table: OpTable, kv: str = "bf16") -> float:
    """Bytes that one more token adds over all layers, before any window is full."""
    kinds = table.layer_kinds
    return sum(e.per_token * (kinds.count(e.kind) if e.kind >= 0 else 1) for e in cache_entries(table, kv))


def cache_bytes(
    table: OpTable, kv: str, sequences: Size, length: Size, layers: slice = slice(None), *, kept: Kept = Kept(),
    ranks: int = 1,
) -> Size:
    """KV cache and recurrent state of ``sequences`` sequences of ``length`` tokens over ``layers``; ``kept`` and
    ``ranks`` as in :func:`sequence_caches`."""
    counts = layers_of(table.layer_kinds, [layers])
    tokens, states = summed(sequence_caches(table, kv, length, kept=kept, ranks=ranks), counts)
    return sequences * (tokens + states)[0]


class SequenceCache(NamedTuple):
    """What a sequence keeps in a layer of this ``kind``; ``state``: however long it is."""

    kind: int
    size_bytes: Size
    state: bool


def summed(each: Sequence[SequenceCache], layers: Mapping[int, Array]) -> tuple[Array, Array]:
    """Bytes that a sequence keeps of its tokens, and of its states, ``[stages, ...]``; ``layers``: of
    :func:`layers_of`."""
    shape = np.broadcast_shapes(*{np.shape(one.size_bytes) for one in each})
    found = np.zeros((2, len(layers[-1]), *shape))
    for kind, size, state in each:  # a class whose layers are not known apart, or run in a loop, has one entry
        whole = np.broadcast_to(size, shape) if shape else size
        found[int(state)] += np.multiply.outer(layers[max(kind, -1)], whole)
    return found[0], found[1]


def room_taken(tokens: Size, states: Size, apart: float) -> Size:
    """Of memory that is shared out to a pool of tokens and one of states, ``apart`` times as large, what must be there
    for these bytes of each: the pool that is filled first decides. One pool (``apart`` 0) holds both."""
    if not apart:
        return tokens + states
    return np.where(states > 0, np.maximum(tokens * (1.0 + apart), states * (1.0 + apart) / apart), tokens)


def sequence_caches(
    table: OpTable, kv: str, length: Size, *, kept: Kept = Kept(), ranks: int = 1
) -> list[SequenceCache]:
    """KV cache and recurrent state that a sequence of ``length`` tokens takes in a layer, with the layer's kind.

    ``kept``: copies of states that an engine has, and the part of its cache that is layers' with windows. ``ranks``
    share the tokens of a sequence.
    """
    share = kept.window_share
    entries = cache_entries(table, kv)
    widest = max((entry.limit for entry in entries), default=0)
    # a pool that is a share of the other's holds as long a window as that has of the other's tokens
    full = length if share is None else np.maximum(length, np.minimum(length, widest) / share)
    found = list[SequenceCache]()
    for entry in entries:
        tokens = full if not entry.limit else np.minimum(length, entry.limit) if share is None else share * full
        slots = 1.0 if entry.per_token else kept.state_slots
        size = entry.per_token * tokens / ranks + entry.per_sequence * slots
        found.append(SequenceCache(entry.kind, size, not entry.per_token))
    return found


class PagedGroup(NamedTuple):
    """Layers whose pages are given together: tokens of a page, those that are kept (0: all), and bytes of the pages."""

    tokens: int
    window: int
    size_bytes: float


class PackedCache(NamedTuple):
    """A cache of blocks that hold a page of every layer; ``groups`` of layers take blocks of their own, all entries
    first. See :class:`~tensorcast.profiles.memory.PackedPages`."""

    block_bytes: float
    groups: tuple[PagedGroup, ...]

    def blocks(self, length: Size, step: float = 1.0) -> list[Size]:
        """Blocks that each group takes of a sequence of ``length`` tokens, ``step`` of which are new."""
        return [
            np.ceil(np.minimum(length, one.window - 1 + step if one.window else np.inf) / one.tokens) + bool(one.window)
            for one in self.groups
        ]


def packed_cache(table: OpTable, kv: str, layers: slice, pages: PackedPages) -> PackedCache | None:
    """Of ``layers`` of a model that compresses its cache; none where they keep nothing but windows."""
    facts, entries = table.facts, cache_entries(table, kv)
    ratios = [facts.compress_ratios[table.layer_kinds.index(kind)] for kind in table.layer_kinds[layers]]
    counts, least = Counter(ratio for ratio in ratios if ratio), min(filter(None, facts.compress_ratios), default=0)
    if not counts:
        return None
    entry, window = next((one.per_token, one.limit) for one in entries if one.limit)
    width = next(one.per_token / 2.0 for one in cache_entries(table, "bf16") if one.limit)
    unit, own = pages.aligned_bytes["fp8" if kv == "fp8" else "bf16"], Counter[float]()

    def page(size: float) -> float:  # of the next size that entries have
        whole = math.ceil(size / unit) * unit
        return min((one for one in own if one >= whole), default=whole)

    kept_all = [(pages.block_tokens / ratio * entry, n) for ratio, n in counts.items()]
    if facts.indexer_width:
        kept_all.append((pages.block_tokens / least * indexer_key_bytes(facts.indexer_width), counts[least]))
    own = reduce(add, (Counter({page(size): n}) for size, n in kept_all))
    groups = [(pages.window_tokens, window, Counter({page(pages.window_tokens * entry): len(ratios)}))]
    for ratio, n in counts.items():
        tokens, kept = pages.state_pages[ratio].tokens, pages.state_pages[ratio].window
        widths = (width, facts.indexer_width) if ratio == least and facts.indexer_width else (width,)  # vector, weights
        groups.append((tokens, kept, Counter({page(tokens * 2.0 * kept / ratio * one * 4.0): n for one in widths})))
    most = [max(sizes.values()) for sizes in (own, *(sizes for _, _, sizes in groups))]
    side = min(range(most[0], max(most) + 1), key=lambda each: (sum(-n % each for n in most), -each))
    parts = [(pages.block_tokens, 0, own)]
    for tokens, kept, sizes in groups:
        parts += [
            (tokens, kept, Counter({size: n // cut + (i < n % cut) for size, n in sizes.items()}))
            for cut in (math.ceil(max(sizes.values()) / side),) for i in range(cut)
        ]
    slots = reduce(or_, (sizes for _, _, sizes in parts))
    return PackedCache(
        sum(size * n for size, n in slots.items()),
        tuple(PagedGroup(tokens, kept, sum(size * n for size, n in sizes.items())) for tokens, kept, sizes in parts),
    )


def weight_bytes(
    table: OpTable, quantization: Quantization, ep: int = 1, etp: int = 1, layers: slice = slice(None), *,
    first: bool = True, last: bool = True, local_experts: Size | None = None, padding: tuple[int, int] = (1, 1),
) -> Size:
    """Weights on one rank: experts split over ``ep`` and ``etp``, the rest as traced at this tp. Scales included.

    ``local_experts``: experts and copies on the fullest rank, by default what even splitting gives. ``padding``:
    multiples that the engine pads experts' hidden size and a rank's part of their width to, in MXFP4.
    """
    whole = weights_of_stages(
        table, quantization, ep, etp, layers=layers_of(table.layer_kinds, [layers]),
        ends=np.array([[first], [last]], dtype=float), local_experts=local_experts, padding=padding,
    )
    return whole[0]


def weights_of_stages(
    table: OpTable, quantization: Quantization, ep: Size, etp: Size, *, layers: Mapping[int, Array], ends: Array,
    local_experts: Size | None, padding: tuple[int, int], tables: Size = 1.0,
) -> Array:
    """:func:`weight_bytes` ``[stages, ...]`` of stages with these ``layers`` (:func:`layers_of`); ``ends``: which are
    the first of their pipeline, and which the last. ``tables``: the share of a tensor-parallel rank's rows of tables
    that it holds."""
    first, last = ends
    once = {"embedding": np.maximum(first, last) if table.facts.tied_embedding else first, "lm_head": last}
    width, hidden = table.facts.moe_intermediate_size, padding[0]
    local: Size = np.ceil(table.facts.num_experts / ep) if local_experts is None else local_experts
    shape = np.broadcast_shapes(np.shape(local), np.shape(etp), np.shape(tables))
    sizes, counts = list[Size](), list[Array]()
    for part in _weights(table, quantization, hidden):
        size: Size = part.size_bytes + part.table_bytes * tables
        if part.expert_bytes:
            wider = padded(width / etp, padding[1]) if part.padded_bytes else 1.0
            size = size + (part.expert_bytes + part.padded_bytes * (wider - 1.0)) * local / etp
        # outside the layers: is it on this pipeline stage?
        counts.append(layers[part.kind] if part.kind >= 0 else once.get(part.role, layers[-1]))
        sizes.append(np.broadcast_to(size, shape) if shape else size)
    each: Array = np.array(counts).T @ np.array(sizes).reshape(len(sizes), -1)
    return each.reshape(-1, *shape)


@dataclass
class _Weights:
    """Parameters of one layer kind, or of one role outside the layers."""

    kind: int
    role: str
    size_bytes: float = 0.0
    expert_bytes: float = 0.0
    """Of one whole expert."""
    padded_bytes: float = 0.0
    """Of these, what grows with the width that engines pad."""
    table_bytes: float = 0.0
    """Of tables of rows."""


@per_table
def _weights(table: OpTable, quantization: Quantization, hidden_multiple: int) -> list[_Weights]:
    found: dict[tuple[int, str], _Weights] = {}
    for p in table.params:
        role = p.role if p.kind < 0 else ""
        part = found.setdefault((p.kind, role), _Weights(p.kind, role))
        scheme = quantization.scheme(p.name, p.role, p.stored)
        per_element = scheme.weight_bytes if scheme.name != "bf16" else DTYPE_BYTES[p.dtype]
        if p.role == "experts":
            grows = scheme.name == "mxfp4"
            per_element *= padded(table.facts.moe_hidden_size, hidden_multiple) if grows else 1.0
            expert_bytes = p.full_numel / table.facts.num_experts * per_element
            part.expert_bytes += expert_bytes
            part.padded_bytes += expert_bytes if grows else 0.0
        elif p.role == "tables":
            part.table_bytes += p.numel * per_element
        else:
            part.size_bytes += p.numel * per_element
    return list(found.values())


def low_latency_buffer_bytes(tokens_per_rank: Size, hidden: int, num_experts: int) -> Size:
    """DeepEP's low-latency RDMA buffer: two of (send + receive + signal), a slot per expert and token.

    Source: ``get_low_latency_rdma_size_hint`` of github.com/deepseek-ai/DeepEP; 16-byte headers, fp32 scale per 128.
    """
    message = 16 + np.maximum(2 * hidden, hidden + 4 * hidden / 128)
    combine = 2 * hidden
    send = np.maximum(tokens_per_rank * message, num_experts * tokens_per_rank * combine)
    receive = num_experts * tokens_per_rank * np.maximum(message, combine)
    return 2 * (send + receive + 4 * num_experts)


def cache_budget(
    covers: MemoryCovers, share: Size, *, capacity: float, context: Size, weights: Size, beside: Size
) -> Size:
    """Bytes that an engine's memory settings leave for the cache; below 0 where not even the rest fits.

    ``share`` of the device's ``capacity``: of what, ``covers`` says. ``context`` is in use before the engine starts;
    ``beside`` holds it too, and all else that is neither weights nor cache.
    """
    free = capacity - weights - beside
    if covers == "everything":
        return free - (1.0 - share) * capacity
    if covers == "cache":
        return share * free
    # activations live in what is left over; where they need more, the share has to be set lower
    return np.minimum(share * (capacity - context) - weights, free)
