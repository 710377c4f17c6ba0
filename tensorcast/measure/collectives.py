"""Under torchrun: collectives over message sizes, and a MoE layer whose experts lie on all ranks, for real.

Every rank runs the same calls; the slowest rank's time counts, as all wait for it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tensorcast.errors import InputError
from tensorcast.measure.timing import Timing, summarise
from tensorcast.modeling.moe.groups import MoEGroups
from tensorcast.modeling.moe.layer import MoELayer
from tensorcast.modeling.moe.parallel import MoEOptions, ParallelMoELayer

SIZES = tuple(1 << power for power in range(12, 27, 2))
"""Bytes: 4 KB to 64 MB."""

REPEATS = 9

BACKEND = {"cpu": "gloo", "cuda": "nccl"}


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[tuple[int, int]]:
    """(rank, ranks) of a group over gloo or NCCL, made from torchrun's environment."""
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group(BACKEND[device.type])
    except (RuntimeError, ValueError) as reason:
        raise InputError(f"torch.distributed does not start: {str(reason).splitlines()[0][:160]}") from None
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def _calls(nbytes: int, ranks: int, device: torch.device) -> dict[str, tuple[float, Callable[[], Any]]]:
    """Per collective its call, and its payload in bytes as ``cost.collectives.collective_time`` counts it."""
    each = max(1, nbytes // 2 // ranks)
    whole = torch.randn(each * ranks, device=device).to(torch.bfloat16)
    part = torch.randn(each, device=device).to(torch.bfloat16)
    out, piece = torch.empty_like(whole), torch.empty_like(part)
    # torch 2.13 calls them by new names
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    payload = 2.0 * whole.numel()
    return {
        "all_reduce": (payload, lambda: dist.all_reduce(whole.clone())),
        "all_gather": (payload, lambda: gather(out, part)),
        "reduce_scatter": (payload, lambda: scatter(piece, whole)),
        "all_to_all": (payload, lambda: dist.all_to_all_single(out, whole)),
    }


def _slowest(call: Callable[[], Any], device: torch.device, repeats: int) -> Timing:
    """Each repeat starts on all ranks together; its time is the slowest rank's."""
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    taken = []
    for i in range(repeats + 2):
        dist.barrier()
        wait()
        start = time.perf_counter()
        call()
        wait()
        if i >= 2:
            taken.append(time.perf_counter() - start)
    every = torch.tensor(taken, dtype=torch.float64, device=device)
    dist.all_reduce(every, op=dist.ReduceOp.MAX)
    return summarise(every.tolist(), "clock")


def measure_collectives(
    device: torch.device, sizes: Sequence[int] = SIZES, repeats: int = REPEATS
) -> list[dict[str, Any]]:
    """One row per collective and size: payload, ranks, seconds and spread, or the error it ended with."""
    rows, ranks, failed = [], dist.get_world_size(), set()
    for nbytes in sizes:
        for op, (payload, call) in _calls(nbytes, ranks, device).items():
            if op in failed:
                continue
            row: dict[str, Any] = {
                "level": "collective", "op": op, "family": op, "dtype": "any", "ranks": ranks, "payload_bytes": payload,
                "shape": f"{payload:.0f} bytes", "problem": "",
            }
            try:
                row |= _timed(_slowest(call, device, repeats))
            except (RuntimeError, NotImplementedError, ValueError) as reason:  # on every rank alike
                row["problem"] = (str(reason).strip() or type(reason).__name__).splitlines()[0][:160]
                failed.add(op)
            rows.append(row)
    return rows


def _timed(timing: Timing) -> dict[str, Any]:
    return {
        "seconds": timing.median_s, "low_s": timing.low_s, "median_s": timing.median_s, "high_s": timing.high_s,
        "calls": timing.calls, "method": timing.method,
    }


def _output(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def measure_expert_parallel(
    block: nn.Module, tp: int, ep: int, tokens: Sequence[int], hidden: int, *,
    repeats: int = REPEATS,
) -> list[dict[str, Any]]:
    """The block's own output on this rank's tokens against the parallel layer's, and the latter's time.

    All ranks must hold the same weights. ``tokens`` per data-parallel rank.
    """
    parameter = next(block.parameters())
    device, rank, ranks = parameter.device, dist.get_rank(), dist.get_world_size()
    if ranks % tp:
        raise InputError(f"--tp {tp} does not divide the {ranks} processes of torchrun")
    groups = MoEGroups.of(tp, ranks // tp, ep, rank)
    groups.bind(dist)
    exchange: Any = "all_to_all" if ep > 1 and ranks // tp > 1 else "allgather_reducescatter"
    layer = ParallelMoELayer(MoELayer(block), groups, MoEOptions(exchange))
    rows = []
    for count in tokens:
        generator = torch.Generator(device=device).manual_seed(1000 + groups.dp.rank)
        x = torch.randn(1, count, hidden, device=device, generator=generator).to(parameter.dtype)
        with torch.inference_mode():
            expected, found = _output(block(x)).reshape(x.shape).float(), layer(x).float()
            off = ((found - expected).abs().max() / expected.abs().max()).double()
            dist.all_reduce(off, op=dist.ReduceOp.MAX)
            timing = _slowest(lambda x=x: layer(x), device, repeats)  # type: ignore[misc]
        rows.append({
            "level": "expert_parallel", "op": "moe_layer", "family": "moe_layer", "ranks": ranks,
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "shape": f"tp{tp}-dp{ranks // tp}-ep{ep} {exchange} {count} tokens per rank", "tokens": count,
            "relative_error": float(off), "problem": "", **_timed(timing),
        })
    return rows
