"""What a kernel asks of a device: FLOPs, bytes, tiles. Shape arithmetic only, on floats or numpy arrays alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from tensorcast.profiles.sourced import Figure
from tensorcast.trace.dims import Array as Array
from tensorcast.trace.dims import Size as Size

Mask = NDArray[np.bool_]
"""Which of the calls."""


def some(value: Size | bool | Mask) -> bool:
    """Whether a number, or any of an array, is other than zero. NumPy takes microseconds to say so of a number, and
    pricing asks it of thousands."""
    return bool(value.any()) if isinstance(value, np.ndarray) else bool(value)


def plain(figure: Figure | Size) -> Size:
    """The number of a profile's figure; columns as they are."""
    return figure if isinstance(figure, np.ndarray) else float(figure)

GEMM_TILES = ((128, 256), (128, 128), (64, 128), (64, 64), (16, 64))
"""Output tiles (rows, columns) that GEMM libraries choose from (CUTLASS, cuBLAS, DeepGEMM; 16: operands swapped)."""

ATTENTION_ROWS = 128
"""Queries per tile of FlashAttention-2 and -3 in prefill."""

DECODE_ROWS = 64
"""Rows of the matrix instruction that the heads of one KV head share in decode."""


@dataclass(frozen=True)
class Tiling:
    """One way to cut a kernel into equal pieces, one piece per processor at a time.

    ``flops`` is what one piece issues, padding included; ``rate`` the fraction of the best rate that a piece of this
    size reaches; ``depth`` how many steps it takes one after another (the inner dimension). Where pieces are ``whole``
    the last wave counts in full; else they even out, and nothing is shorter than the ``longest`` (in mean pieces).
    ``split``: spare processors may share a piece along ``depth`` (split-K, split-KV).
    """

    tiles: Size
    flops: Size
    depth: Size
    rate: float = 1.0
    whole: bool = True
    longest: float = 1.0
    split: bool = False


@dataclass(frozen=True)
class Work:
    """One kernel call, or several that the device runs as one.

    ``flops`` counts a multiply-add as 2; ``issued_flops`` adds what padding to 128 x 128 tiles wastes; ``bytes`` is
    traffic with device memory, reads plus writes; ``tiles`` are independent pieces of work. ``tilings``: the ways in
    which the kernel can be cut, the fastest of which runs (none: compute spreads evenly). ``rows`` and ``elements``
    are work beside the matrix units: rows of the input and their elements that a call passes over first
    (quantisation, permutation), or softmax rows and scores. ``calls``: how many such calls run one after another.
    ``kernel``: which one of the family it is, where that is known (an op's name). ``reduces``: whether a row must have
    been read before any of it is written (norms, softmax, selections). ``sizes``: the shape in the words of
    :data:`tensorcast.cost.kernels.vocabulary.SIZES`, where a fitted residual may be asked for it.
    """

    family: str
    dtype: str
    flops: Size = 0.0
    bytes: Size = 0.0
    issued_flops: Size = 0.0
    tiles: Size = 0.0
    tilings: tuple[Tiling, ...] = ()
    rows: Size = 0.0
    elements: Size = 0.0
    calls: Size = 1.0
    kernel: str = ""
    reduces: bool = False
    sizes: Mapping[str, Size] = field(default_factory=dict)


@dataclass(frozen=True)
class Precision:
    """Bytes per element of a matmul's operands (scales included) and the arithmetic it runs in."""

    name: str = "bf16"
    compute: str = "bf16"
    weight_bytes: float = 2.0
    activation_bytes: float = 2.0
    output_bytes: float = 2.0


_LARGEST_REUSE = 128 * 256 / (128 + 256)


def _gemm_tilings(
    groups: Size, m: Size, n: Size, k: Size, *, split: bool, least_rows: int = 1
) -> tuple[Tiling, ...]:
    """A tile's rate follows its operand reuse, FLOPs per operand loaded, saturating: small ones wait for memory."""
    m, n, found = np.asarray(m, dtype=float), np.asarray(n, dtype=float), []
    for rows, columns in GEMM_TILES:
        if rows >= least_rows:
            reuse = rows * columns / (rows + columns)
            rate = reuse / (reuse + 20.0) * (_LARGEST_REUSE + 20.0) / _LARGEST_REUSE
            tiles = groups * np.ceil(m / rows) * np.ceil(n / columns)
            found.append(Tiling(tiles, 2.0 * rows * columns * k, k, rate, split=split))
    return tuple(found)


def gemm(m: Size, n: Size, k: Size, precision: Precision = Precision(), batch: Size = 1.0) -> Work:
    """``batch`` products ``[m,k] x [k,n] -> [m,n]``, each with weights of its own."""
    tilings = _gemm_tilings(batch, m, n, k, split=True)
    moved = m * k * precision.activation_bytes + k * n * precision.weight_bytes + m * n * precision.output_bytes
    return Work(
        family="gemm", dtype=precision.name, flops=2.0 * batch * m * n * k, bytes=batch * moved,
        issued_flops=tilings[1].tiles * tilings[1].flops, tiles=tilings[1].tiles, tilings=tilings,
        rows=batch * m, elements=batch * m * k, sizes={"m": m, "n": n, "k": k, "batch": batch},
    )


def one_tile(work: Work) -> Work:
    """A GEMM by a kernel that has one tile, 128 x 128, and shares none out: it takes what a tile's depth does, at few
    rows as at 128."""
    m, n, k = (work.sizes[name] for name in ("m", "n", "k"))
    tiles, flops = np.ceil(np.asarray(m, dtype=float) / 128.0) * np.ceil(n / 128.0), 2.0 * 128 * 128 * k
    return replace(
        work, tilings=(Tiling(tiles, flops, k),), tiles=tiles, issued_flops=tiles * flops, kernel="one_tile", sizes={}
    )


FP32 = Precision("fp32", "fp32", 4.0, 4.0, 4.0)


def fp32_gemm(m: Size, n: Size, k: Size) -> Work:
    """A narrow GEMM without matrix units, in tiles of 32 x 32: it takes what a tile's depth does, of a row an eighth of
    it and of up to 16 a third, which are shared out."""
    rows = np.asarray(m, dtype=float)
    depth = k * np.select([rows <= 1.0, rows <= 16.0], [0.12, 0.33], 1.0)
    tiles, flops = np.ceil(rows / 32.0) * np.ceil(n / 32.0), 2.0 * 32 * 32 * depth
    return replace(
        gemm(m, n, k, FP32), tilings=(Tiling(tiles, flops, depth),), tiles=tiles, issued_flops=tiles * flops,
        kernel="fp32", sizes={},
    )  # fmt: skip


def grouped_gemm(
    rows: Size, hit: Size, n: Size, k: Size, precision: Precision = Precision(), *, align: int = 16
) -> Work:
    """One GEMM per hit expert over ``rows`` rows in all; weights ``[n,k]`` of the ``hit`` experts are read once.

    An expert's rows are padded to the tile that suits, at least ``align`` (contiguous layouts of DeepGEMM: 128).
    """
    rows_per_expert = np.asarray(rows, dtype=float) / np.maximum(hit, 1.0)
    tilings = _gemm_tilings(hit, rows_per_expert, n, k, split=False, least_rows=align)
    moved = rows * k * precision.activation_bytes + hit * n * k * precision.weight_bytes
    return Work(
        family="grouped_gemm", dtype=precision.name, flops=2.0 * rows * n * k,
        bytes=moved + rows * n * precision.output_bytes, issued_flops=tilings[0].tiles * tilings[0].flops,
        tiles=tilings[0].tiles, tilings=tilings, rows=rows, elements=rows * k, sizes={"rows": rows, "hit": hit},
    )


def routed_tiles(work: Work, n: Size, k: Size) -> Work:
    """Products of experts by a kernel whose tiles are 256 columns wide and 32 rows high or, of more, 128; two
    of them share a processor."""
    rows, hit = (np.asarray(work.sizes[name], dtype=float) for name in ("rows", "hit"))
    each = rows / np.maximum(hit, 1.0)
    height = np.where(each > 32.0, 128.0, 32.0)
    tiles, flops = hit * np.ceil(each / height) * np.ceil(np.asarray(n) / 256.0) / 2.0, 2.0 * 2.0 * height * 256.0 * k
    return replace(
        work, tilings=(Tiling(tiles, flops, k),), tiles=tiles, issued_flops=tiles * flops, kernel="routed_tiles"
    )


def attended_pairs(new: Size, past: Size, window: Size = 0, causal: bool = True) -> Size:
    """(query, key) pairs that one sequence's attention computes: ``new`` queries after ``past`` cached tokens.

    Causal queries see ``past + 1 ... past + new`` keys, at most ``window`` of them where ``window > 0``.
    """
    new, past, window = (np.asarray(x, dtype=float) for x in (new, past, window))
    if not causal:
        return new * (past + new)
    full = new * past + new * (new + 1) / 2
    growing = np.clip(window - past, 0, new)  # queries whose history is still shorter than the window
    windowed = growing * past + growing * (growing + 1) / 2 + (new - growing) * window
    return np.where(window > 0, windowed, full)


def _attention_tilings(
    batch: Size, new: Size, pairs: Size, keys: Size, *, heads: Size, kv_heads: Size, dims: Size, decode: bool
) -> tuple[Tiling, ...]:
    """Prefill: a tile per head and block of queries. Decode: a tile per KV head, its query heads are the rows."""
    if decode:
        blocks = np.ceil(np.asarray(new) * heads / kv_heads / DECODE_ROWS)
        return (Tiling(batch * kv_heads * blocks, 2.0 * DECODE_ROWS * keys * dims, keys, whole=False, split=True),)
    blocks = np.ceil(np.asarray(new, dtype=float) / ATTENTION_ROWS)
    # a block of queries passes over the keys of its middle query and half a block more: diagonal tiles are not halved
    mean_keys = np.minimum(pairs / new + ATTENTION_ROWS / 2, np.maximum(keys, 1.0))
    return (
        Tiling(batch * heads * blocks, 2.0 * ATTENTION_ROWS * mean_keys * dims, mean_keys, whole=False, longest=1.5),
    )


def attention(
    batch: Size, new: Size, past: Size, q_heads: Size, kv_heads: Size, *, qk_dim: Size, v_dim: Size,
    kv_bytes: Size = 2.0, window: Size = 0, causal: bool = True, decode: bool = False, dtype: str = "",
) -> Work:
    """Softmax attention over a paged cache; queries and outputs in bf16, keys and values ``kv_bytes`` per element.

    Reads the ``past`` (or window) cached tokens and the new ones once per KV head (grouped queries share them).
    ``dtype``: in prefill the arithmetic (bf16 unless said), in decode the cache's (fp8 below 1.5 bytes per element).
    """
    pairs = attended_pairs(new, past, window, causal)
    keys = np.where(np.asarray(window) > 0, np.minimum(past + new, np.asarray(window) + new - 1), past + new)
    flops = 2.0 * batch * q_heads * pairs * (qk_dim + v_dim)
    kv = batch * keys * kv_heads * (qk_dim + v_dim) * kv_bytes
    io = batch * new * q_heads * (qk_dim + v_dim) * 2.0
    tilings = _attention_tilings(
        batch, new, pairs, keys, heads=q_heads, kv_heads=kv_heads, dims=qk_dim + v_dim, decode=decode
    )
    family = "attention_decode" if decode else "attention_prefill"
    cache = "fp8" if np.all(np.asarray(kv_bytes) < 1.5) else "bf16"
    return Work(
        family=family, dtype=dtype or (cache if decode else "bf16"), flops=flops, bytes=kv + io,
        issued_flops=tilings[0].tiles * tilings[0].flops, tiles=tilings[0].tiles, tilings=tilings,
        rows=batch * new * q_heads, elements=batch * q_heads * pairs, sizes={
            "batch": batch, "new": new, "past": past, "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": qk_dim,
            "window": window, "kv_bytes": kv_bytes,
        },
    )


def mla(
    batch: Size, new: Size, past: Size, heads: Size, *, latent: Size, rope: Size, nope: Size, v_dim: Size,
    kv_bytes: Size = 2.0, selected: Size = 0, decode: bool = False, dtype: str = "", least_heads: float = 1.0,
    kernel: str = "",
) -> Work:
    """Multi-head latent attention: absorbed in decode (all heads share one latent), expanded in prefill.

    ``selected > 0``: sparse attention, each query reads that many cached tokens (DeepSeek sparse attention). Its prompt
    kernels compute at least ``least_heads`` heads, and all selected places, whatever a query can see; queries share
    nothing. ``dtype`` as in :func:`attention`. Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1; FlashMLA (absorbed
    form; for sparse prompts its README and ``csrc/``, 64 heads on SM90, 128 on SM100).
    """
    plain = not np.any(np.asarray(selected) > 0)
    absorbed = decode or not plain
    pairs = attended_pairs(new, past)
    keys = np.asarray(past + new, dtype=float)
    if not plain:
        pairs = attended_pairs(new, past, selected)
        keys = np.where(np.asarray(new) > 1, keys, np.minimum(keys, selected))
    if absorbed:
        dims = 2 * latent + rope
        kv = batch * keys * (latent + rope) * kv_bytes
        tilings = _attention_tilings(
            batch, new, pairs, pairs / new, heads=heads, kv_heads=1.0, dims=dims, decode=True
        )
        if not decode:
            run = np.ceil(np.asarray(heads) / least_heads) * least_heads
            tilings = _attention_tilings(
                batch * new, 1.0, selected, selected, heads=run, kv_heads=1.0, dims=dims, decode=True
            )
    else:
        dims = nope + rope + v_dim
        kv = batch * keys * heads * dims * 2.0  # the expanded keys and values of this step
        tilings = _attention_tilings(batch, new, pairs, keys, heads=heads, kv_heads=heads, dims=dims, decode=False)
    cache = "fp8" if np.all(np.asarray(kv_bytes) < 1.5) else "bf16"
    family = ("mla_decode" if decode else "mla_prefill") if plain else "mla_sparse_decode" if decode else "mla_sparse"
    return Work(
        family=family, dtype=dtype or (cache if decode else "bf16"),
        flops=2.0 * batch * heads * pairs * dims, bytes=kv + batch * new * heads * dims * 2.0,
        issued_flops=tilings[0].tiles * tilings[0].flops, tiles=tilings[0].tiles, tilings=tilings,
        rows=batch * new * heads, elements=batch * heads * pairs, kernel=kernel,
        sizes={"batch": batch, "new": new, "past": past, "q_heads": heads, "kv_bytes": kv_bytes} if plain else {},
    )


def chosen_attention(
    batch: Size, new: Size, heads: Size, *, kv_heads: Size, width: Size, v_dim: Size, pairs: Size, keys: Size,
    entry_bytes: Size, family: str, dtype: str, kernel: str = "", least_heads: float = 1.0,
) -> Work:
    """Attention to entries that a window, compression or an indexer leaves: ``pairs`` (query, entry) and ``keys``
    entries of each sequence, of ``entry_bytes`` per KV head.

    Queries gather their own entries, so no tile of queries shares any; a kernel computes at least ``least_heads``
    heads of a KV head (FlashMLA: 64 rows on SM90, 128 on SM100). Prompts read the entries once from memory, the rest
    from caches.
    """
    per_head = np.maximum(np.asarray(heads, dtype=float) / kv_heads, 1.0)
    run = np.ceil(per_head / least_heads) * least_heads * kv_heads
    flops = 2.0 * batch * pairs * (width + v_dim)
    moved = batch * keys * kv_heads * entry_bytes + 2.0 * batch * new * heads * (width + v_dim)
    return Work(
        family, dtype, flops=flops * heads, bytes=moved, issued_flops=flops * run, rows=batch * new,
        elements=batch * pairs * heads, kernel=kernel,
    )


def linear_attention(
    batch: Size, new: Size, heads: Size, *, key_heads: Size, k_dim: Size, v_dim: Size, state_bytes: Size = 4.0,
    chunk: int = 64, decode: bool = False,
) -> Work:
    """Gated delta rule: states ``[k_dim, v_dim]`` of each value head, ``state_bytes`` per number.

    One is read and one written, or in decode one after each of the ``new`` tokens, as not all of them may be accepted
    (vLLM 0.24.0, layers/fla/ops/fused_recurrent.py: ``ssm_state_indices``; SGLang 0.5.9, layers/attention/fla/
    fused_recurrent.py: ``intermediate_states_buffer``).

    Per token and value head the state is read for the prediction, updated and read for the output: ``6*k_dim*v_dim``
    FLOPs; on prompts ``2*chunk*2*(k_dim + v_dim)`` more inside chunks, which follow one another in each head (Gated
    DeltaNet, arXiv 2412.06464, section 3.3).
    """
    per_token = 6.0 * k_dim * v_dim + (0.0 if decode else 4.0 * chunk * (k_dim + v_dim))
    rows = batch * new * heads
    states = (1.0 + (new if decode else 1.0)) * state_bytes * batch * heads * k_dim * v_dim
    moved = 2.0 * batch * new * (2.0 * key_heads * k_dim + 2.0 * heads * v_dim) + states
    if decode:
        return Work("linear_decode", "bf16", flops=rows * per_token, bytes=moved, rows=rows)
    chain = Tiling(batch * heads, new * per_token, np.ceil(np.asarray(new, dtype=float) / chunk))
    return Work(
        "linear_prefill", "bf16", flops=rows * per_token, bytes=moved, issued_flops=rows * per_token,
        tiles=chain.tiles, tilings=(chain,), rows=rows,
    )


def short_convolution(batch: Size, new: Size, channels: Size, width: Size, *, decode: bool = False) -> Work:
    """Depthwise causal convolution of ``width`` inputs over ``[batch, channels, new]`` in bf16; its state of ``width``
    inputs is written, and in decode read."""
    inputs, states = batch * new * channels, batch * channels
    moved = 2.0 * (2.0 * inputs + channels * width + (1.0 + decode) * states * width)
    family = "conv_decode" if decode else "conv_prefill"
    return Work(family, "bf16", flops=2.0 * inputs * width, bytes=moved, rows=batch, elements=states)


def memory(read: Size, written: Size, flops: Size = 0.0, dtype: str = "bf16") -> Work:
    """A kernel that is memory traffic: elementwise runs, norms, copies, gathers."""
    return Work("memory", dtype, flops=flops, bytes=read + written, issued_flops=flops)
