"""Timing calls: warm-up, repeats, median and spread. CUDA events and graph replay on a GPU, else a monotonic clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

REPEATS = 15
"""Timed calls at least, after two that warm up."""

SPAN_S = 0.03
"""Shortest time that one kernel is measured for."""

PATIENCE_S = 1.5
"""A kernel that took so long stops after three calls."""

SHORT_S = 1e-4
"""Kernels under this are replayed from a CUDA graph: launching one by one would take as long as they do."""

REPLAYS = 10

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: first decile, median, ninth decile; how many were timed, and how.

    ``method``: ``clock``, ``events`` (CUDA events round each call) or ``graph`` (events round a replayed graph).
    """

    low_s: float
    median_s: float
    high_s: float
    calls: int
    method: str

    @property
    def seconds(self) -> float:
        """What predictions are compared with: the median on a GPU, which nobody else is using; on a CPU the first
        decile, since other processes only ever add."""
        return self.low_s if self.method == "clock" else self.median_s


def summarise(seconds: Sequence[float], method: str) -> Timing:
    """Deciles of the timed calls."""
    found = sorted(seconds)
    low, median, high = (found[min(int(share * len(found)), len(found) - 1)] for share in (0.1, 0.5, 0.9))
    return Timing(low, median, high, len(found), method)


def time_calls(calls: Sequence[Call], device: torch.device, effort: float = 1.0) -> Timing:
    """Time ``calls``, the same kernel on different operands, taken in turn. ``effort`` scales repeats and span.

    What the kernel raises is raised here: out of memory, an unsupported dtype.
    """
    with torch.inference_mode():
        for i in range(2):
            calls[i % len(calls)]()
        return _on_gpu(calls, device, effort) if device.type == "cuda" else _on_clock(calls, effort)


def _on_clock(calls: Sequence[Call], effort: float) -> Timing:
    least, taken = max(3, round(REPEATS * effort)), list[float]()
    began = time.perf_counter()
    while True:
        call = calls[len(taken) % len(calls)]
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        taken.append(now - start)
        enough = len(taken) >= least and now - began >= SPAN_S * effort
        if enough or (len(taken) >= 3 and now - began >= PATIENCE_S * effort):
            return summarise(taken, "clock")


def _on_gpu(calls: Sequence[Call], device: torch.device, effort: float) -> Timing:
    least = max(5, round(2 * REPEATS * effort))
    timing = summarise(_events([calls[i % len(calls)] for i in range(least)], device), "events")
    if timing.median_s >= SHORT_S:
        return timing
    inner = max(len(calls), min(200, int(SPAN_S * effort / REPLAYS / max(timing.low_s, 1e-6))))
    try:
        graph = _captured([calls[i % len(calls)] for i in range(inner)], device)
    except RuntimeError:  # a kernel that asks the host for a size cannot be captured: its launches are part of it
        torch.cuda.synchronize(device)
        return timing
    graph.replay()
    replays = _events([graph.replay] * REPLAYS, device)
    return summarise([seconds / inner for seconds in replays], "graph")


def _events(calls: Sequence[Call], device: torch.device) -> list[float]:
    """Seconds of each call by device events, queued without waiting."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    torch.cuda.synchronize(device)
    marks[0].record()
    for call, mark in zip(calls, marks[1:], strict=True):
        call()
        mark.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in zip(marks[:-1], marks[1:], strict=True)]


def _captured(calls: Sequence[Call], device: torch.device) -> torch.cuda.CUDAGraph:
    """All calls as one graph. Capture needs a stream of its own that has run them before."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph
