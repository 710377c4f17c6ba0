"""From a row of the op table to work: a registry of few-line formulas, each naming its shapes.

An op without a formula is priced as memory traffic and reported: nothing is silently free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tensorcast.cost import work as w
from tensorcast.cost.memory import SHARED_VECTOR_FP8, indexer_key_bytes, latent_bytes
from tensorcast.cost.rank_load import LayerPoints
from tensorcast.cost.registry import Registry
from tensorcast.cost.work import Precision, Size, Work
from tensorcast.modeling.quantization import SCHEMES, Scheme
from tensorcast.trace.dims import Dim, Sizes
from tensorcast.trace.table import DTYPE_BYTES, Op, Tensor


@dataclass(frozen=True)
class Context:
    """What a formula may ask beside the row: sizes, hit experts, phase, and how this device runs a scheme.

    ``backend``: how expert matmuls run. ``capacity``: rows that a masked one keeps room for, per expert. ``verify``:
    new tokens per sequence that a decode step checks at once (1 + drafted ones); ``sizes.B`` then counts all of them.
    ``points``: where layers load their experts differently, the load of each group of layers, and ``stages``: the
    pipeline stages of which these are the busiest's.
    """

    sizes: Sizes
    hit: Size = 0.0
    decode: bool = True
    kv_bytes: Size = 2.0
    has_fp4: bool = False
    mxfp4: str = "mxfp4"
    backend: str = "grouped_mm"
    capacity: Size = 0.0
    masked_skips: bool = True
    verify: Size = 1.0
    points: LayerPoints | None = None
    stages: Size = 1

    @property
    def cached_in_fp8(self) -> bool:
        """Whether every call reads keys and values of fewer than 12 bits."""
        return bool(np.all(np.asarray(self.kv_bytes) < 1.5))

    def value(self, size: Any) -> Any:
        """A dim or a plain number at these sizes."""
        return size.at(self.sizes) if isinstance(size, Dim) else size

    def sequences(self, batch: Size, new: Size) -> tuple[Size, Size]:
        """Sequences and new tokens of each, where a decode step checks drafted tokens along with the last one."""
        return batch / self.verify, new * self.verify

    def precision(self, op: Op, output: Tensor) -> Precision:
        """How the row's matmul runs here: MXFP4 weights are unpacked to bf16 where there is no FP4 arithmetic."""
        scheme: Scheme = SCHEMES[op.attrs.get("scheme", "bf16")]
        name = matmul_dtype(op, self.mxfp4)
        activation = next((t for t in op.inputs if not t.weight), op.inputs[0])
        weight_bytes = scheme.weight_bytes
        if scheme.name == "bf16":
            weight_bytes = next((DTYPE_BYTES[t.dtype] for t in op.inputs if t.weight and len(t.dims) > 1), 2.0)
        activation_bytes = scheme.activation_bytes if scheme.quantizes_activation else DTYPE_BYTES[activation.dtype]
        return Precision(name, name, weight_bytes, activation_bytes, DTYPE_BYTES[output.dtype])


def matmul_dtype(op: Op, mxfp4: str) -> str:
    """What kernels call the precision of a matmul, on a device that calls MXFP4 weights ``mxfp4``."""
    kernel: str = SCHEMES[op.attrs.get("scheme", "bf16")].kernel
    return mxfp4 if kernel == "mxfp4" else kernel


Formula = Callable[[Op, Context], list[Work]]
FORMULAS: Registry[Formula] = Registry()
"""By the name of an op; filled at the end of this file."""


def work_of(op: Op, context: Context) -> list[Work]:
    """The kernels of one row. Those of unfused ops that only move data bear the op's name."""
    works = FORMULAS.get(op.name, traffic)(op, context)
    if op.name == "pointwise":
        return works
    return [replace(work, kernel=op.name) if work.family == "memory" else work for work in works]


def _written(op: Op, at: Context) -> Size:
    return sum((t.bytes(at.sizes) for t in op.outputs), 0.0)


MOVES = tuple(
    "pointwise quantize_activation init_routing_v2 unpermute_tokens expert_counts"
    " add sub mul div neg pow square rsqrt sqrt exp log1p floor abs erf sin cos tanh sigmoid silu gelu relu softplus"
    " clamp maximum minimum max min amax mean sum var var_mean cumsum softmax _softmax native_layer_norm topk sort"
    " gather scatter index index_select index_put_ where masked_fill one_hot lt gt le ge eq ne bitwise_not bitwise_and"
    " bitwise_or logical_not logical_and cat stack clone repeat copy_ _to_copy constant_pad_nd select_scatter"
    " slice_scatter tril triu flip polar fill_ zero_ zeros zeros_like ones ones_like full full_like new_zeros new_ones"
    " new_full arange add_ sub_ mul_ div_ scatter_".split()
)


REDUCES = frozenset("rsqrt native_layer_norm softmax _softmax topk sort".split())
"""Ops, alone or in a run, that need a whole row before they write."""


def traffic(op: Op, at: Context) -> list[Work]:
    """Reads its inputs once and writes its outputs once."""
    read, written = (sum((t.bytes(at.sizes) for t in some), 0.0) for some in (op.inputs, op.outputs))
    found = w.memory(read, written)
    if "stream_mix" in op.parts:  # hyper-connections, timed by themselves
        return [replace(found, kernel="stream_mix")]
    return [found if REDUCES.isdisjoint((op.name, *op.parts)) else replace(found, reduces=True)]


def embedding(op: Op, at: Context) -> list[Work]:
    """One table row per token, not the table."""
    moved = op.outputs[0].bytes(at.sizes)
    return [w.memory(moved + op.inputs[-1].bytes(at.sizes), moved)]


def matmul(op: Op, at: Context) -> list[Work]:
    """``[M,K] x [K,N]``; merged linears add up their N. MLA's expansion: keys and values of all tokens from latents."""
    x = next((t for t in op.inputs if not t.weight and len(t.dims) > 1), op.inputs[0])
    k = at.value(x.dims[-1])
    m = x.numel(at.sizes) / k
    n = sum(at.value(t.dims[-1]) for t in op.outputs)
    found = w.gemm(m, n, k, at.precision(op, op.outputs[0]))
    own = op.attrs.get("kernels")  # of :class:`~tensorcast.profiles.kernels.GemmRule`
    if own == "one_tile":
        return [w.one_tile(found)]
    if own == "fp32":
        return [w.memory(2.0 * m * k, 4.0 * m * k), w.fp32_gemm(m, n, k)]
    return [found]


def batched_matmul(op: Op, at: Context) -> list[Work]:
    """``[b,M,K] x [b,K,N]``."""
    a, b = op.inputs[0], op.inputs[1]
    batch, m, k = (at.value(d) for d in a.dims)
    precision = Precision("bf16", "bf16", DTYPE_BYTES[b.dtype], DTYPE_BYTES[a.dtype], DTYPE_BYTES[op.outputs[0].dtype])
    return [w.gemm(m, at.value(b.dims[-1]), k, precision, batch)]


CONTIGUOUS_ROWS, MASKED_ROWS = 128, 64
"""Least rows of a tile in DeepGEMM's contiguous and masked layouts (github.com/deepseek-ai/DeepGEMM)."""


def grouped_matmul(op: Op, at: Context) -> list[Work]:
    """Rows ``[R,K]`` of the busiest rank against the hit experts' ``[N,K]``, as ``at.backend`` runs them.

    ``grouped_mm``: one kernel; ``contiguous`` pads every expert's rows to 128; ``masked`` to 64 where the kernel skips
    empty tiles, else it computes all experts at full capacity. ``eager``: one GEMM per hit expert. ``batched_mm``:
    each row copies its expert's weights, then multiplies alone (transformers' experts interface).
    """
    x, out = op.inputs[0], op.outputs[0]
    rows, k, n = at.value(x.dims[0]), at.value(x.dims[-1]), at.value(out.dims[-1])
    precision = at.precision(op, out)
    if at.backend == "eager":
        return [replace(w.gemm(rows / np.maximum(at.hit, 1.0), n, k, precision), calls=at.hit)]
    if at.backend == "batched_mm":
        copied = rows * n * k * precision.weight_bytes
        return [w.memory(copied, copied), w.gemm(1.0, n, k, precision, batch=rows)]
    if at.backend == "masked" and not at.masked_skips:
        padded = w.grouped_gemm(at.sizes.E * at.capacity, at.sizes.E, n, k, precision)
        return [replace(padded, flops=2.0 * rows * n * k)]
    if op.attrs.get("kernels") == "routed_tiles":
        return [w.routed_tiles(w.grouped_gemm(rows, at.hit, n, k, precision), n, k)]
    least = {"contiguous": CONTIGUOUS_ROWS, "masked": MASKED_ROWS}.get(at.backend, 16)
    return [w.grouped_gemm(rows, at.hit, n, k, precision, align=least)]


def mla_absorb(op: Op, at: Context) -> list[Work]:
    """Per head: query into the latent ``[T,nope] x [nope,latent]``, output from it ``[T,latent] x [latent,v]``."""
    tokens = op.inputs[0].numel(at.sizes) / op.attrs["latent"]
    a = op.attrs
    return [
        w.gemm(tokens, a["latent"], a["nope"], batch=a["heads"]),
        w.gemm(tokens, a["v_dim"], a["latent"], batch=a["heads"]),
    ]


def chunk_pairs(new: Size, past: Size, chunk: int) -> Size:
    """(query, key) pairs where a query sees its own chunk of the sequence only: ``p mod chunk + 1`` at position p."""

    def up_to(n: Size) -> Size:
        n = np.asarray(n, dtype=float)
        whole, rest = np.floor(n / chunk), np.mod(n, chunk)
        return whole * chunk * (chunk + 1) / 2 + rest * (rest + 1) / 2

    return up_to(np.asarray(past) + new) - up_to(past)


def sparse_prompts(at: Context) -> dict[str, Any]:
    """Heads and arithmetic of sparse latent attention on prompts: FlashMLA's kernel computes 64 heads on Hopper and 128
    on Blackwell, in bf16; TensorRT-LLM's, which engines run on Blackwell where the cache is in FP8, 64 in FP8."""
    if at.has_fp4 and at.cached_in_fp8:
        return {"dtype": "fp8", "least_heads": 64.0}
    kernel = "fp8_cache" if at.cached_in_fp8 else ""  # on Hopper numbers are widened as they are read
    return {"dtype": "bf16", "least_heads": 128.0 if at.has_fp4 else 64.0, "kernel": kernel}


def attention(op: Op, at: Context) -> list[Work]:
    """q ``[B,Hq,S,D]``, new k ``[B,Hkv,S,D]``, v ``[B,Hkv,S,Dv]`` after ``past`` cached tokens."""
    q, k, v = op.inputs[:3]
    batch, heads, new, width = (at.value(d) for d in q.dims)
    batch, new = at.sequences(batch, new)
    past, a = at.value(op.attrs["past"]), op.attrs
    if "context_ranks" in a:  # a part of the tokens, for the heads of all ranks that hold the others
        heads, past = heads * a["context_ranks"], past / a["context_ranks"]
    whole = a.get("kernels") if a["latent"] else ""  # whose kernels attend to latents as to heads of keys
    if whole and at.decode:
        return [_one_head(at, batch, new, past, heads, read=2.0 * a["latent"] + a["rope"])]
    if a["latent"] and not whole:
        nope = width - a["rope"]
        kv_bytes = at.kv_bytes
        if kv_bytes < 2.0 and a.get("scaled"):
            kv_bytes = latent_bytes(a["latent"], a["rope"]) / (a["latent"] + a["rope"])
        sparse = {} if at.decode or not a["selected"] else sparse_prompts(at)
        return [
            w.mla(
                batch, new, past, heads, latent=a["latent"], rope=a["rope"], nope=nope, v_dim=at.value(v.dims[-1]),
                kv_bytes=kv_bytes, selected=a["selected"], decode=at.decode, **sparse,
            )
        ]
    if a.get("compress") or (a["selected"] and not a["latent"]):
        return [_chosen(op, at, batch, new, past)]
    window = a["window"]
    if a["chunk"]:
        past = np.where(np.asarray(past) + new > a["chunk"], np.mod(past, a["chunk"]), past)
    found = w.attention(
        batch, new, past, heads, heads if whole else at.value(k.dims[1]), qk_dim=width, v_dim=at.value(v.dims[-1]),
        kv_bytes=at.kv_bytes, window=window, causal=a["causal"], decode=at.decode,
        dtype="fp8" if a.get("as_cached") and at.cached_in_fp8 else "",
    )
    if a["chunk"]:  # a long prefill crosses chunks: count its pairs exactly
        exact = chunk_pairs(new, at.value(op.attrs["past"]), a["chunk"]) / w.attended_pairs(new, past, window)
        scale = np.minimum(exact, 1.0)
        tilings = tuple(replace(t, flops=t.flops * scale) for t in found.tilings)
        found = replace(
            found,
            flops=found.flops * scale,
            issued_flops=found.issued_flops * scale,
            tilings=tilings,
            elements=found.elements * scale,
        )
    return [found]


HEADS_TOGETHER, HEAD_WIDTH = 16.0, 256.0
"""Query heads of a block of Triton's kernel for decode, and the widest head that it was timed with in tables."""


def _one_head(at: Context, batch: Size, new: Size, past: Size, heads: Size, *, read: Size) -> Work:
    """Decode over latents in a kernel for grouped queries: a latent with its rope part is read as the one head of keys
    and once more as the values, by each block of heads of each split (SGLang 0.5.8, attention/triton_ops/
    decode_attention.py, _decode_grouped_att_m_fwd). It takes as much longer than heads of :data:`HEAD_WIDTH` as more
    is read."""
    blocks = np.ceil(np.asarray(heads) / HEADS_TOGETHER)
    found = w.attention(
        batch * blocks, new, past, np.minimum(heads, HEADS_TOGETHER), 1.0, qk_dim=HEAD_WIDTH, v_dim=HEAD_WIDTH,
        kv_bytes=at.kv_bytes, decode=True,
    )
    return replace(found, calls=read / (2.0 * HEAD_WIDTH))


def _chosen(op: Op, at: Context, batch: Size, new: Size, past: Size) -> Work:
    """Attention to a window and compressed entries, all or those picked (DeepSeek-V4), or to picked blocks of keys."""
    q, k, v = op.inputs[:3]
    a, heads, width, v_dim = op.attrs, at.value(q.dims[1]), at.value(q.dims[-1]), at.value(v.dims[-1])
    phase, length = "decode" if at.decode else "prefill", np.asarray(past + new, dtype=float)
    cache = "fp8" if at.cached_in_fp8 else "bf16"
    if not a.get("compress"):
        seen = np.minimum(length, a["selected"])
        return w.chosen_attention(
            batch, new, heads, kv_heads=at.value(k.dims[1]), width=width, v_dim=v_dim,
            pairs=w.attended_pairs(new, past, a["selected"]), keys=seen if at.decode else length,
            entry_bytes=at.kv_bytes * (width + v_dim), family=f"blocks_{phase}", dtype=cache,
        )
    ratio, picked = a["compress"], a["picked"]
    entries, reach = length / ratio, a["window"] if at.decode else a["window"] + new
    chosen = np.minimum(entries, picked) if picked and at.decode else entries
    return w.chosen_attention(
        batch, new, heads, kv_heads=1.0, width=width, v_dim=v_dim,
        pairs=w.attended_pairs(new, past, a["window"]) + w.attended_pairs(new, past, picked * ratio) / ratio,
        keys=np.minimum(length, reach) + chosen, entry_bytes=width * (SHARED_VECTOR_FP8 if cache == "fp8" else 2.0),
        family=f"compressed_{phase}", dtype=cache, kernel="picked" if picked else "every",
        least_heads=128.0 if at.has_fp4 else 64.0,
    )


def sparse_indexer(op: Op, at: Context) -> list[Work]:
    """Scores of every visible cached token per query and head, then top-k: q ``[B*S,Hi,Di]``, keys ``[B,L,Di]``.

    Keys may stand for several tokens (``compress``), be kept in bf16 (``plain``), and blocks of them be chosen by their
    best (``pooled``); a query may see those of blocks alone that were chosen before (``within``).
    """
    heads, width = at.value(op.attrs["heads"]), at.value(op.attrs["head_dim"])
    batch, new = at.sequences(at.sizes.B, at.sizes.S)
    ratio, pooled = op.attrs.get("compress", 1), op.attrs.get("pooled", 1)
    within = op.attrs.get("within", 0) * ratio  # of as many tokens, where blocks of entries were chosen before
    pairs = batch * w.attended_pairs(new, at.sizes.P, within) / ratio
    plain = pooled > 1 or op.attrs.get("plain", False)
    read = np.minimum(at.sizes.L, within) if within and at.decode else at.sizes.L
    keys = batch * read / ratio * (2.0 * width if plain else indexer_key_bytes(width))
    queries = batch * new * heads * width
    flops = 2.0 * pairs * heads * width
    if plain:  # keys in bf16; one score per block is written and read
        family = f"block_scores_{'decode' if at.decode else 'prefill'}"
        return [Work(family, "bf16", flops, keys + 2.0 * queries + 8.0 * pairs / pooled, flops, rows=batch * new)]
    # fp32 scores are written once and read once by the selection, which queries that see no more than it do not need
    kernel = "compressed" if ratio > 1 else ""
    if at.decode:
        moved = keys + queries + 8.0 * pairs + _written(op, at)
        rows = batch * new * np.where(np.asarray(at.sizes.L) > ratio * at.value(op.attrs["selected"]), 1.0, 0.0)
        return [Work("indexer_decode", "fp8", flops, moved, flops, rows=rows, kernel=kernel)]
    # of prompts the scores are FP8 arithmetic
    score = Work("indexer_scores", "fp8", flops, keys + queries + 4.0 * pairs, flops, kernel=kernel)
    chosen = at.value(op.outputs[0].dims[-1])
    seen = batch * w.attended_pairs(new, at.sizes.P, chosen * ratio) / ratio
    rows = batch * np.clip(new + at.sizes.P - chosen * ratio, 0, new)
    more = np.maximum(pairs - seen, 0.0) + rows * chosen
    return [score, Work("indexer_topk", "bf16", bytes=4.0 * more + _written(op, at), rows=rows, kernel=kernel)]


def kv_cache_write(op: Op, at: Context) -> list[Work]:
    """New keys and values in bf16 read, written in the cache's dtype."""
    numel = sum((t.numel(at.sizes) for t in op.inputs), 0.0)
    return [w.memory(2.0 * numel, at.kv_bytes * numel)]


def kv_cache_read(op: Op, at: Context) -> list[Work]:
    """All cached entries read once (eager view of an indexer)."""
    return [w.memory(_written(op, at), 0.0)]


def linear_attention(op: Op, at: Context) -> list[Work]:
    """Gated delta rule, q, k ``[B,S,H,D]``, v ``[B,S,Hv,Dv]``, state ``[B,Hv,D,Dv]``."""
    v, k = op.inputs[2], op.inputs[1]
    batch, new, heads, v_dim = (at.value(d) for d in v.dims)
    batch, new = at.sequences(batch, new)
    return [
        w.linear_attention(
            batch, new, heads, key_heads=at.value(k.dims[2]), k_dim=at.value(k.dims[-1]), v_dim=v_dim,
            state_bytes=DTYPE_BYTES[op.outputs[1].dtype], chunk=op.attrs.get("chunk", 64), decode=at.decode,
        )
    ]


def ssm_scan(op: Op, at: Context) -> list[Work]:
    """Mamba-2, x ``[B,S,H,D]``, b, c ``[B,S,G,N]``, state ``[B,H,D,N]``: ``6*D*N`` per token and head; the chunked
    form adds ``2*C*(N + D)`` (Mamba-2, arXiv 2405.21060, section 6). Decode writes a state after each token (vLLM
    0.24.0, layers/mamba/ops/mamba_ssm.py: ``IS_SPEC_DECODING``)."""
    x, b = op.inputs[0], op.inputs[1]
    batch, new, heads, width = (at.value(d) for d in x.dims)
    batch, new = at.sequences(batch, new)
    n, chunk = at.value(b.dims[-1]), op.attrs.get("chunk", 256)
    flops = batch * new * heads * (6.0 * width * n + (0.0 if at.decode else 2.0 * chunk * (n + width)))
    states = 1.0 + (new if at.decode else 1.0)
    state = states * DTYPE_BYTES[op.outputs[1].dtype] * batch * heads * width * n
    moved = sum((t.bytes(at.sizes) for t in (*op.inputs[:3], op.outputs[0])), 0.0) + state
    return [Work("memory" if at.decode else "attention_prefill", "bf16", flops, moved, flops)]


def causal_conv1d(op: Op, at: Context) -> list[Work]:
    """Depthwise over ``[B,C,S]`` with weight ``[C,width]``; the state of ``width`` inputs is read and written."""
    x, weight = op.inputs[0], op.inputs[1]
    batch, channels, new = (at.value(d) for d in x.dims)
    batch, new = at.sequences(batch, new)
    return [w.short_convolution(batch, new, channels, at.value(weight.dims[-1]), decode=at.decode)]


for _names, _formula in (
    (MOVES, traffic),
    (("embedding",), embedding),
    (("mm", "addmm", "mla_expand"), matmul),
    (("bmm",), batched_matmul),
    (("grouped_matmul",), grouped_matmul),
    (("mla_absorb",), mla_absorb),
    (("attention",), attention),
    (("sparse_indexer",), sparse_indexer),
    (("kv_cache_write",), kv_cache_write),
    (("kv_cache_read",), kv_cache_read),
    (("linear_attention",), linear_attention),
    (("ssm_scan",), ssm_scan),
    (("causal_conv1d", "convolution"), causal_conv1d),
):
    for _name in _names:
        FORMULAS[_name] = _formula
