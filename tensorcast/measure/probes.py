"""Timing kernels on the machine that runs this: GEMMs, grouped GEMMs, attention, streams, a tiny op.

Operands are read from a buffer much larger than the caches, so that they come from memory as a model's weights do.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tensorcast.ops  # noqa: F401  (registers the ops)
from tensorcast.cost import work
from tensorcast.cost.work import Precision, Work
from tensorcast.measure.environment import Crowding

BUFFER_BYTES = 256 << 20
"""Memory that operands are taken from in turn."""

WIDTH = 2048
"""Inner and outer size of the measured GEMMs at full effort."""

REPEATS = 7
"""Timed calls of every probe at full effort, at least, after two that warm up."""

SPAN_S = 0.015
"""Shortest probe at full effort."""

PATIENCE_S = 0.15
"""A probe that took so long stops after three calls: the machine is slow, or busy."""

HEAD = 128
"""Width of an attention head."""

FINITE = 0x3C003C00
"""As fp32 and as two bf16 an ordinary small number: denormals and NaN have speeds of their own."""

TORCH = {"bf16": torch.bfloat16, "fp32": torch.float32}
DTYPES = tuple(TORCH)


@dataclass(frozen=True)
class Sample:
    """One measured call: the work it stands for, and seconds."""

    work: Work
    seconds: float


@dataclass
class ProbedHost:
    """Everything that was measured. Peak FLOP/s by dtype, bytes/s, seconds, and samples by (family, dtype).

    ``crowding``: cores that other processes took from ours meanwhile, per thread; 0 where the system does not tell.
    """

    flops: dict[str, float] = field(default_factory=dict)
    bandwidth: float = 0.0
    launch_s: float = 0.0
    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    crowding: float = 0.0


def timed(call: Callable[[], Any], repeats: int, inner: int = 1) -> float:
    """First decile of the seconds of one call: other processes only ever add to it.

    At least ``repeats`` calls over at least ``SPAN_S * repeats / REPEATS``, as another process may hold a core for
    several milliseconds; at most ``PATIENCE_S``, but three calls in any case.
    """
    for _ in range(2):
        call()
    taken: list[float] = []
    began = time.perf_counter()
    while True:
        start = time.perf_counter()
        for _ in range(inner):
            call()
        now = time.perf_counter()
        taken.append((now - start) / inner)
        enough = len(taken) >= repeats and now - began >= SPAN_S * repeats / REPEATS
        if enough or (len(taken) >= 3 and now - began >= PATIENCE_S):
            return sorted(taken)[len(taken) // 10]


class Pool:
    """Tensors of any shape, each from a place that was not touched for a while: one buffer, taken in turn."""

    def __init__(self, dtype: str, buffer: Tensor) -> None:
        self.dtype, self.flat, self.at = dtype, buffer.view(TORCH[dtype]), 0

    @property
    def element_bytes(self) -> int:
        return self.flat.element_size()

    def take(self, *shape: int) -> Tensor:
        """A view of the next piece of the buffer, from its start again where the rest is too short."""
        count = math.prod(shape)
        if self.at + count > self.flat.numel():
            self.at = 0
        piece = self.flat[self.at : self.at + count].view(shape)
        self.at += -(-count // 64) * 64  # pieces begin on a cache line
        return piece


def measure(threads: int, effort: float = 1.0) -> ProbedHost:
    """Time everything with ``threads`` threads. ``effort``, at most 1, scales sizes and repeats."""
    effort = min(effort, 1.0)
    repeats = max(3, round(REPEATS * effort))
    width = max(256, round(WIDTH * effort**0.5 / 128) * 128)
    found = ProbedHost()
    crowding = Crowding(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            buffer = torch.full((BUFFER_BYTES // 4,), FINITE, dtype=torch.int32)
            found.bandwidth = stream(buffer.view(torch.float32), repeats)
            one = torch.zeros(1)
            found.launch_s = timed(lambda: one.add_(1.0), repeats, inner=200)
            buffer.fill_(FINITE)
            for dtype in DTYPES:
                pool = Pool(dtype, buffer)
                for family, probe in PROBES.items():
                    found.samples[family, dtype] = list(probe(pool, width, repeats))
                products = [*found.samples["gemm", dtype], *found.samples["grouped_gemm", dtype]]
                found.flops[dtype] = max(float(s.work.flops) / s.seconds for s in products)
            found.flops |= other_peaks(width // 2, found.flops["fp32"])
    finally:
        torch.set_num_threads(before)
    found.crowding = crowding.share
    return found


def stream(flat: Tensor, repeats: int) -> float:
    """Bytes/s of the best of a copy, an addition and a sum; every byte that is read or written counts."""
    n = flat.numel() // 4
    a, b, c = flat[: 2 * n], flat[2 * n : 4 * n], flat[n : 2 * n]
    moved: list[tuple[int, Callable[[], Any]]] = [
        (4 * n, lambda: b.copy_(a)), (3 * n, lambda: torch.add(a[:n], c, out=b[:n])), (2 * n, lambda: a.sum()),
    ]
    return max(4 * count / timed(call, repeats) for count, call in moved)


def other_peaks(n: int, fp32: float, repeats: int = 3) -> dict[str, float]:
    """FLOP/s in fp16 and int8 where this machine has them: emulation, far slower than ``fp32``, is left out."""
    half, small = torch.ones(n, n, dtype=torch.float16), torch.ones(n, n, dtype=torch.int8)
    calls: dict[str, Callable[[], Any]] = {"fp16": lambda: half @ half.T, "int8": lambda: torch._int_mm(small, small.T)}
    found = {}
    for dtype, call in calls.items():
        with contextlib.suppress(RuntimeError, AttributeError):  # no such kernel in this build of torch
            rate = 2.0 * n**3 / timed(call, repeats)
            if rate >= fp32 / 2:
                found[dtype] = rate
    return found


def _precision(pool: Pool) -> Precision:
    size = float(pool.element_bytes)
    return Precision(pool.dtype, pool.dtype, size, size, size)


def gemm(pool: Pool, width: int, repeats: int) -> Iterator[Sample]:
    """``x [m,k] @ w[n,k].T``."""
    half = width // 2
    shapes = [
        (1, width, width), (2, half, width), (8, width, width), (16, width, half), (32, width, width),
        (64, half, width), (128, width, width), (256, width, half), (512, width, width), (half, half, width),
        (half, width, half), (width, width, half),
    ]

    def call(x: Tensor, n: int, k: int) -> Tensor:
        return x @ pool.take(n, k).T

    for m, n, k in shapes:
        seconds = timed(partial(call, pool.take(m, k).clone(), n, k), repeats)
        yield Sample(work.gemm(m, n, k, _precision(pool)), seconds)


def grouped_gemm(pool: Pool, width: int, repeats: int) -> Iterator[Sample]:
    """The package's own op: rows in equal groups, one weight ``[n,k]`` per expert."""
    narrow, half = width // 4, width // 2
    shapes = [
        (4, 1, narrow, half), (8, 1, half, narrow), (8, 4, narrow, half), (4, 16, half, narrow), (8, 16, narrow, half),
        (8, 64, half, narrow), (4, 128, narrow, half), (2, 256, half, narrow), (4, 256, narrow, half),
    ]

    def call(x: Tensor, counts: Tensor, n: int) -> Any:
        return torch.ops.tensor_cast.grouped_matmul(x, pool.take(len(counts), n, x.shape[1]), counts)

    for experts, rows, n, k in shapes:
        x, counts = pool.take(experts * rows, k).clone(), torch.full((experts,), rows)
        seconds = timed(partial(call, x, counts, n), repeats)
        yield Sample(work.grouped_gemm(experts * rows, experts, n, k, _precision(pool)), seconds)


def _attention(pool: Pool, shapes: list[tuple[int, int, int, int]], decode: bool, repeats: int) -> Iterator[Sample]:
    """The package's own op on ``(B, L, Hq, Hkv)``: ``L`` new tokens, or one new token after ``L - 1``."""

    def call(q: Tensor, batch: int, kv_heads: int, length: int) -> Any:
        k, v = (pool.take(batch, kv_heads, length, HEAD) for _ in range(2))
        return torch.ops.tensor_cast.attention(q, k, v, length - q.shape[2], HEAD**-0.5)

    for batch, length, heads, kv_heads in shapes:
        new = 1 if decode else length
        q = pool.take(batch, heads, new, HEAD).clone()
        wanted = work.attention(
            batch, new, length - new, heads, kv_heads, qk_dim=HEAD, v_dim=HEAD, kv_bytes=float(pool.element_bytes),
            decode=decode, dtype=pool.dtype,
        )
        yield Sample(wanted, timed(partial(call, q, batch, kv_heads, length), repeats))


def attention_prefill(pool: Pool, width: int, repeats: int) -> Iterator[Sample]:
    """Causal attention of whole prompts."""
    long, middle, short = width // 2, width // 4, width // 8
    shapes = [
        (1, short, 8, 2), (1, middle, 4, 4), (2, short, 8, 2), (1, middle, 8, 8), (2, middle, 4, 1), (1, long, 4, 1),
    ]
    return _attention(pool, shapes, False, repeats)


def attention_decode(pool: Pool, width: int, repeats: int) -> Iterator[Sample]:
    """One new token per sequence."""
    long, middle, short = width, width // 2, width // 4
    shapes = [
        (1, short, 8, 2), (1, long, 8, 2), (4, short, 8, 8), (4, middle, 16, 4), (8, middle, 8, 2), (4, long, 8, 4),
    ]
    return _attention(pool, shapes, True, repeats)


def memory(pool: Pool, width: int, repeats: int) -> Iterator[Sample]:
    """Copies, additions and an activation function, operands and results in memory."""

    def copy(rows: int) -> Tensor:
        return pool.take(rows, width).copy_(pool.take(rows, width))

    def add(rows: int) -> Tensor:
        return torch.add(pool.take(rows, width), pool.take(rows, width), out=pool.take(rows, width))

    def silu(rows: int) -> Any:
        return torch.ops.aten.silu.out(pool.take(rows, width), out=pool.take(rows, width))

    for rows in (1, 16, 256, 1024):
        size = float(rows * width * pool.element_bytes)
        for call, operands in ((copy, 1), (add, 2), (silu, 1)):
            seconds = timed(partial(call, rows), repeats)
            yield Sample(work.memory(operands * size, size, dtype=pool.dtype), seconds)


PROBES: dict[str, Callable[[Pool, int, int], Iterator[Sample]]] = {
    "gemm": gemm, "grouped_gemm": grouped_gemm, "attention_prefill": attention_prefill,
    "attention_decode": attention_decode, "memory": memory,
}
