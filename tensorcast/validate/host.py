"""The machine that runs this, as a device profile: a few seconds of measuring, then kept on disk.

Peaks are the best that any probe reached. Constants are fitted to a spread of shapes per family with one shape in
three held out, and carry those shapes' error. Weights and caches are read from a buffer much larger than the caches,
so that they come from memory as a model's do.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorcast.profiles.device import Calibration, DeviceProfile, KernelConstants
from tensorcast.trace.cache import cache_dir, write_atomically

if TYPE_CHECKING:
    from tensorcast.cost.work import Work

FORMAT = 1
"""Raised when what is measured changes, so that older files are not read."""

BUFFER_BYTES = 256 << 20
"""Memory that weights and caches are taken from in turn."""

WIDTH = 2048
"""Inner and outer size of the measured GEMMs at full effort."""

REPEATS = 7
"""Timed calls of every probe, after two that warm up."""

FINITE = 0x3C003C00
"""As fp32 and as two bf16 an ordinary small number: denormals and NaN have speeds of their own."""

LATENCY_S = 5e-5
"""One message between two processes over loopback. Assumption: what gloo takes on a server, not measured."""

DTYPES = ("bf16", "fp32")
ELEMENT_BYTES = {"bf16": 2.0, "fp32": 4.0}

HELD_OUT = 3
"""One shape in so many is kept out of the fit."""


@dataclass
class Sample:
    """One measured call: the work it stands for, and seconds."""

    work: Work
    seconds: float


@dataclass
class Measured:
    """Everything that was measured here. FLOP/s, bytes/s, seconds."""

    flops: dict[str, float] = field(default_factory=dict)
    bandwidth: float = 0.0
    launch_s: float = 0.0
    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)


def host_profile(effort: float = 1.0) -> DeviceProfile:
    """This machine as device ``cpu``: read from the cache, else measured now (about 3 s) and stored.

    ``effort``, at most 1, scales sizes and repeats; below 1 the figures are rough. ``TENSORCAST_CACHE=off`` measures every time.
    """
    path = _file(effort)
    if path is not None and path.exists():
        with contextlib.suppress(ValueError, OSError):  # damaged: measure again
            return DeviceProfile.model_validate_json(path.read_bytes())
    profile = profile_of(measure(effort), threads())
    if path is not None:
        with contextlib.suppress(OSError):  # a read-only home costs time, not the answer
            write_atomically(path, profile.model_dump_json(exclude_defaults=True, indent=1))
    return profile


def threads() -> int:
    """Cores that this process may use, or fewer where OMP_NUM_THREADS says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(asked)) if asked.isdigit() and int(asked) > 0 else cores


def cpu_model() -> str:
    """Marketing name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Hardware", "Processor")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or its container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return total


def _file(effort: float) -> Path | None:
    folder = cache_dir()
    if folder is None:
        return None
    key = [FORMAT, cpu_model(), os.cpu_count(), threads(), importlib.metadata.version("torch"), effort]
    return folder / "hosts" / f"cpu-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"


# Measuring


def _seconds(call: Callable[[], Any], repeats: int, inner: int = 1) -> float:
    """Lower quartile of the time of one call: other processes only ever add to it."""
    for _ in range(2):
        call()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(inner):
            call()
        taken.append((time.perf_counter() - start) / inner)
    return sorted(taken)[(len(taken) - 1) // 4]


class _Pool:
    """Tensors of a shape, each from a place that was not touched for a while: one buffer, taken in turn."""

    def __init__(self, size: int) -> None:
        import torch

        self.torch = torch
        self.words = torch.full((size // 4,), FINITE, dtype=torch.int32)
        self.at = 0

    def take(self, dtype: str, *shape: int) -> Any:
        """A view of the next piece of the buffer, from its start where the rest is too short."""
        flat = self.words.view(self.torch.bfloat16) if dtype == "bf16" else self.words.view(self.torch.float32)
        count = 1
        for size in shape:
            count *= size
        start = self.at * 4 // flat.element_size()
        if start + count > flat.numel():
            start = 0
        # pieces begin on a cache line
        self.at = -(-(start + count) * flat.element_size() // 64) * 16
        return flat[start : start + count].view(shape)


@contextlib.contextmanager
def _alone(count: int) -> Iterator[None]:
    """Inference mode with ``count`` threads; the caller's number comes back."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)


def measure(effort: float = 1.0) -> Measured:
    """Time GEMMs, grouped GEMMs, attention, streams and a tiny op on this machine."""
    import torch

    effort = min(effort, 1.0)
    repeats = max(3, round(REPEATS * effort))
    width = max(256, round(WIDTH * effort**0.5 / 128) * 128)
    found = Measured()
    with _alone(threads()):
        pool = _Pool(BUFFER_BYTES)
        found.bandwidth = _stream(pool, repeats)
        one = torch.zeros(1)
        found.launch_s = _seconds(lambda: one.add_(1.0), repeats, inner=200)
        for dtype in DTYPES:
            for family, probe in PROBES.items():
                found.samples[family, dtype] = list(probe(pool, dtype, width, repeats))
        for dtype in DTYPES:
            gemms = [*found.samples["gemm", dtype], *found.samples["grouped_gemm", dtype]]
            found.flops[dtype] = max(s.work.flops / s.seconds for s in gemms)
        found.flops |= _other_peaks(width // 2, found.flops["fp32"])
    return found


def _stream(pool: _Pool, repeats: int) -> float:
    """Bytes/s of the best of a copy, an addition and a sum over half the buffer; every byte read or written counts."""
    import torch

    flat = pool.words.view(torch.float32)
    half = flat.numel() // 2
    a, b, part = flat[:half], flat[half:], flat[: half // 2]
    moved = {
        "copy": (2 * half, lambda: b.copy_(a)),
        "add": (3 * (half // 2), lambda: torch.add(part, a[half // 2 : half // 2 * 2], out=b[: half // 2])),
        "sum": (half, lambda: a.sum()),
    }
    best = max(4 * count / _seconds(call, repeats) for count, call in moved.values())
    pool.words.fill_(FINITE)
    return best


def _gemm(pool: _Pool, dtype: str, width: int, repeats: int) -> Iterator[Sample]:
    """``x [m,k] @ w[n,k].T``, weights from memory."""
    from tensorcast.cost import work

    half = width // 2
    shapes = [
        (1, width, width), (2, half, width), (8, width, width), (16, width, half), (32, width, width),
        (64, half, width), (128, width, width), (256, width, half), (512, width, width), (half, half, width),
        (half, width, half), (width, width, half),
    ]
    for m, n, k in shapes:
        x = pool.take(dtype, m, k).clone()
        seconds = _seconds(lambda x=x, n=n, k=k: x @ pool.take(dtype, n, k).T, repeats)
        yield Sample(work.gemm(m, n, k, _precision(dtype)), seconds)


def _grouped_gemm(pool: _Pool, dtype: str, width: int, repeats: int) -> Iterator[Sample]:
    """The package's own op: rows in equal groups, one weight ``[n,k]`` per expert, from memory."""
    import torch

    import tensorcast.ops  # noqa: F401  (registers the op)
    from tensorcast.cost import work

    narrow, half = width // 4, width // 2
    shapes = [
        (4, 1, narrow, half), (8, 1, half, narrow), (8, 4, narrow, half), (4, 16, half, narrow), (8, 16, narrow, half),
        (8, 64, half, narrow), (4, 128, narrow, half), (2, 256, half, narrow), (4, 256, narrow, half),
    ]
    for experts, rows, n, k in shapes:
        counts = torch.full((experts,), rows)
        x = pool.take(dtype, experts * rows, k).clone()

        def call(x: Any = x, counts: Any = counts, shape: tuple[int, ...] = (experts, n, k)) -> Any:
            return torch.ops.tensor_cast.grouped_matmul(x, pool.take(dtype, *shape), counts)

        yield Sample(work.grouped_gemm(experts * rows, experts, n, k, _precision(dtype)), _seconds(call, repeats))


def _attention(pool: _Pool, dtype: str, shapes: list[tuple[int, int, int, int, int]], repeats: int) -> Iterator[Sample]:
    """torch's fused attention on ``(B, S, P, Hq, Hkv)``, heads of 128, keys and values from memory."""
    from torch.nn import functional as F

    from tensorcast.cost import work

    for batch, new, past, heads, kv_heads in shapes:
        q = pool.take(dtype, batch, heads, new, 128).clone()

        def call(q: Any = q, kv: tuple[int, ...] = (batch, kv_heads, past + new, 128), causal: bool = new > 1) -> Any:
            k, v = pool.take(dtype, *kv), pool.take(dtype, *kv)
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

        size = ELEMENT_BYTES[dtype]
        found = work.attention(
            batch, new, past, heads, kv_heads, 128, 128, kv_bytes=size, decode=new == 1, dtype=dtype
        )
        yield Sample(found, _seconds(call, repeats))


def _attention_prefill(pool: _Pool, dtype: str, width: int, repeats: int) -> Iterator[Sample]:
    most = width // 2
    shapes = [
        (1, most // 8, 0, 8, 2), (1, most // 4, 0, 4, 4), (2, most // 4, 0, 8, 2), (1, most // 2, 0, 4, 1),
        (1, most // 2, 0, 8, 8), (1, most, 0, 4, 1),
    ]
    return _attention(pool, dtype, shapes, repeats)


def _attention_decode(pool: _Pool, dtype: str, width: int, repeats: int) -> Iterator[Sample]:
    most = width
    shapes = [
        (1, 1, most // 4 - 1, 8, 2), (1, 1, most - 1, 8, 2), (4, 1, most // 4 - 1, 8, 8), (4, 1, most // 2 - 1, 16, 4),
        (8, 1, most // 2 - 1, 8, 2), (8, 1, most - 1, 16, 2),
    ]
    return _attention(pool, dtype, shapes, repeats)


def _memory(pool: _Pool, dtype: str, width: int, repeats: int) -> Iterator[Sample]:
    """Copies, additions and activation functions, operands and results in memory."""
    import torch

    from tensorcast.cost import work

    size = ELEMENT_BYTES[dtype]
    for rows in (1, 16, 256, 1024):
        moved = rows * width * size

        def take(rows: int = rows) -> Any:
            return pool.take(dtype, rows, width)

        calls: list[tuple[float, Callable[[], Any]]] = [
            (moved, lambda take=take: take().copy_(take())),
            (2 * moved, lambda take=take: torch.add(take(), take(), out=take())),
            (moved, lambda take=take: torch.ops.aten.silu.out(take(), out=take())),
        ]
        for read, call in calls:
            yield Sample(work.memory(read, moved, dtype=dtype), _seconds(call, repeats))


PROBES: dict[str, Callable[[_Pool, str, int, int], Iterator[Sample]]] = {
    "gemm": _gemm, "grouped_gemm": _grouped_gemm, "attention_prefill": _attention_prefill,
    "attention_decode": _attention_decode, "memory": _memory,
}


def _precision(dtype: str) -> Any:
    from tensorcast.cost.work import Precision

    size = ELEMENT_BYTES[dtype]
    return Precision(dtype, dtype, size, size, size)


def _other_peaks(n: int, fp32: float, repeats: int = 3) -> dict[str, float]:
    """FLOP/s in fp16 and int8 where this machine has them: emulation, far slower than fp32, is left out."""
    import torch

    half = torch.ones(n, n, dtype=torch.float16)
    small = torch.ones(n, n, dtype=torch.int8)
    calls: dict[str, Callable[[], Any]] = {"fp16": lambda: half @ half.T, "int8": lambda: torch._int_mm(small, small.T)}
    found = {}
    for dtype, call in calls.items():
        with contextlib.suppress(RuntimeError, AttributeError):  # no such kernel in this build of torch
            rate = 2.0 * n**3 / _seconds(call, repeats)
            if rate >= fp32 / 2:
                found[dtype] = rate
    return found


# From measurements to a profile


def profile_of(measured: Measured, count: int) -> DeviceProfile:
    """The profile that says what was ``measured`` with ``count`` threads."""
    today, version = datetime.date.today().isoformat(), importlib.metadata.version("torch")
    bandwidth = measured.bandwidth
    device = DeviceProfile.model_validate({
        "name": "cpu", "vendor": platform.system(), "architecture": platform.machine(), "description": cpu_model(),
        "sources": {
            "host": f"measured on this machine, {today}, torch {version}, {count} threads",
            "system": "what the operating system, or the container, lets this process use",
        },
        "processors": count,
        "peak_flops": {dtype: {"value": _round(rate), "source": "host"} for dtype, rate in measured.flops.items()},
        "memory_bytes": {"value": memory_bytes(), "source": "system"},
        "memory_bandwidth_bytes_per_s": {"value": _round(bandwidth), "source": "host"},
        "interconnect": [{
            "name": "host", "size": count,
            "bandwidth_bytes_per_s": {
                "value": _round(bandwidth / 2), "source": "host: half the stream bandwidth, a message is written and read",
            },
            "latency_s": {"value": LATENCY_S, "source": "assumption: a gloo message over loopback"},
        }],
    })
    kernels = tuple(
        _fitted(family, dtype, samples, measured.launch_s, device)
        for (family, dtype), samples in measured.samples.items()
    )
    calibration = Calibration(
        provenance=f"measured on this machine with torch {version}, {count} threads: lower quartile of repeated calls, "
        f"one shape in {HELD_OUT} held out",
        date=today, kernels=kernels,
    )
    return device.model_copy(update={"calibration": calibration})


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _fitted(
    family: str, dtype: str, samples: list[Sample], launch_s: float, device: DeviceProfile
) -> KernelConstants:
    """Efficiencies and launch time of one family; the errors are those of the shapes held out."""
    import numpy as np

    from tensorcast.validate.fit import errors, fit_constants, kernel_seconds

    # which one of three changes from three to three, as probes take turns in threes
    held = [i % HELD_OUT == (i // HELD_OUT + 1) % HELD_OUT for i in range(len(samples))]
    seconds = np.array([s.seconds for s in samples])
    fitted = ~np.array(held)
    bounds = {
        "compute_efficiency": (0.7, 0.01, 1.0), "memory_efficiency": (0.7, 0.01, 1.0),
        "launch_s": (2.0 * launch_s, launch_s / 2, 20.0 * launch_s),
    }

    def predict(values: dict[str, float], rows: np.ndarray) -> np.ndarray:
        constants = KernelConstants.model_validate({"family": family, "dtype": dtype, **values})
        works = [s.work for s, wanted in zip(samples, rows, strict=True) if wanted]
        return np.array([float(kernel_seconds([work], constants, constants, device)) for work in works])

    found, _ = fit_constants(bounds, lambda values: predict(values, fitted), seconds[fitted])
    score = errors(predict(found, ~fitted), seconds[~fitted])
    return KernelConstants.model_validate({
        "family": family, "dtype": dtype, "points": int(fitted.sum()), "held_out": int(sum(held)), **found, **score,
    })
