"""Random operands cut from one large pool per dtype, so that a kernel finds them in memory and not in a cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tensorcast.errors import InputError

POOL_BYTES = 256 << 20
"""Several times the last cache of any processor here (H200: 50 MB of L2, EPYC: 32 MB of L3 per core complex)."""

SEED_ELEMENTS = 1 << 22
"""Random numbers that a pool repeats: values matter little, but zeros, which switch fewer gates, raise the clock."""

DTYPES = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64,
    "float8_e4m3fn": torch.float8_e4m3fn, "act_fp8": torch.float8_e4m3fn, "act_fp8_block": torch.float8_e4m3fn,
    "int8": torch.int8, "act_int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32,
    "int64": torch.int64, "bool": torch.bool, "complex64": torch.complex64,
}
"""Dtypes of the op table in torch's words; quantised activations as what is stored, without their scales."""


class Unsupported(RuntimeError):
    """There is no kernel here for a row. The message says what is missing; the row is reported with it."""


def torch_dtype(name: str) -> torch.dtype:
    """Raises :class:`Unsupported` for a dtype that torch does not hold in tensors of its own (FP4)."""
    if name not in DTYPES:
        raise Unsupported(f"no tensors of dtype {name} are made here")
    return DTYPES[name]


def free_bytes(device: torch.device) -> int:
    """Memory that may be taken now: of the GPU, or of this machine and its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    from tensorcast.measure.environment import free_host_bytes

    return free_host_bytes()


class Buffers:
    """Operands on one device. ``take`` hands out pieces of a pool in turn; each comes round again after the rest."""

    def __init__(self, device: torch.device, pool_bytes: int = POOL_BYTES, seed: int = 0) -> None:
        self.device, self.pool_bytes = device, pool_bytes
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self._pools: dict[torch.dtype, Tensor] = {}
        self._at: dict[torch.dtype, int] = {}

    def _random(self, count: int, dtype: torch.dtype) -> Tensor:
        """``count`` random numbers: floats normal, integers small."""
        seed = min(count, SEED_ELEMENTS)
        if dtype.is_complex:
            found = torch.randn(seed, device=self.device, generator=self.generator, dtype=dtype)
        elif dtype.is_floating_point:
            found = torch.randn(seed, device=self.device, generator=self.generator).to(dtype)
        else:
            high = 2 if dtype is torch.bool else 100
            found = torch.randint(0, high, (seed,), device=self.device, generator=self.generator).to(dtype)
        return found.repeat(-(-count // seed))[:count] if count > seed else found

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous random tensor: a view of the next piece of the pool, or one of its own if it is larger."""
        count = math.prod(shape)
        if count * dtype.itemsize > self.pool_bytes:
            return self._random(count, dtype).view(shape)
        if dtype not in self._pools:
            self._pools[dtype], self._at[dtype] = self._random(self.pool_bytes // dtype.itemsize, dtype), 0
        pool, at = self._pools[dtype], self._at[dtype]
        if at + count > pool.numel():
            at = 0
        self._at[dtype] = at + -(-count // 128) * 128  # pieces begin on a cache line of any device
        return pool[at : at + count].view(shape)

    def strided(self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A random tensor with these strides: transposed, expanded or with gaps, as a trace saw it."""
        span = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if math.prod(shape) else 0
        return self.take((max(span, 1),), dtype).as_strided(shape, stride)

    def own(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A random tensor that may be written to."""
        return self.take(shape, dtype).clone()

    def integers(self, shape: tuple[int, ...], high: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Random integers in ``[0, high)``."""
        return torch.randint(0, max(high, 1), shape, device=self.device, generator=self.generator).to(dtype)

    def choices(self, tokens: int, top_k: int, experts: int) -> Tensor:
        """Expert ids ``[tokens, top_k]``, distinct per token and evenly spread over all experts."""
        if top_k > experts:
            raise InputError(f"top_k = {top_k} of {experts} experts")
        start = torch.arange(tokens, device=self.device)[:, None] * top_k
        names = torch.randperm(experts, device=self.device, generator=self.generator)
        return names[(start + torch.arange(top_k, device=self.device)) % experts]
