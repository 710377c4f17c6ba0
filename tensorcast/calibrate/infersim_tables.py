"""H20 and H800 as alibaba/InferSim (Apache-2.0) timed them: DeepGEMM, FlashAttention-3, FlashInfer and FlashMLA.

A checkout's ``bench_data`` holds a CSV per kernel, phase and GPU (``mha/decode/h20/32-8-128.csv``: heads, cached heads,
head size): FP8 GEMMs in blocks of 128, grouped GEMMs of a rank as two products, attention. Grouped GEMMs take a random
number of rows per expert, 0.7 to 1.3 times the stated one, rounded down (its ``kernel_benchmark/``). Which engine calls
a kernel is not said: they are any engine's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from tensorcast.calibrate.measured_rows import Key, MeasuredKernel, MeasuredSystem, joined
from tensorcast.cost.kernels.vocabulary import Columns

SOURCE = "alibaba/InferSim f2293da (Apache-2.0), bench_data of {system}"

PLACE = "bench_data"

SYSTEMS = {"h20": "h20", "h800-sxm": "h800"}
"""Devices by the folder's name."""

DECODE = ["dtype", "kv_dtype", "batch_size", "kv_len", "latency_us", "mfu"]
"""Columns of decode attention: one table lacks its first line."""

LAYOUTS = {"prefill": "contiguous", "decode": "masked"}
"""Of DeepGEMM's grouped GEMMs, by phase."""

HOST_S = 32e-6
"""Decode attention is launched call by call there: short ones take as long as the host needs, 25 to 31 us whatever
their size."""

HOST_BOUND = "decode attention under 32 us: the host's time to launch it"

SPREAD = np.linspace(0.7, 1.3, 601)
"""Of an expert's rows over the stated number."""


def holds(folder: Path) -> bool:
    """Whether a folder is such a checkout."""
    return (Path(folder) / PLACE).is_dir()


def _full(size: int, **values: float) -> Columns:
    return {name: np.full(size, value) for name, value in values.items()}


def _gemm(path: Path) -> MeasuredKernel:
    table = pd.read_csv(path)
    columns = {name: table[name].to_numpy(float) for name in ("m", "n", "k")} | _full(len(table), batch=1.0)
    return MeasuredKernel(("gemm", "fp8_block", "any", ""), columns, table["latency_us"].to_numpy(float) * 1e-6)


def rows_of(stated: np.ndarray) -> np.ndarray:
    """Rows that an expert has on average, where so many were stated."""
    return np.floor(stated[:, None] * SPREAD).mean(axis=1)


def _grouped(path: Path, phase: str) -> MeasuredKernel:
    """Both products of a rank's experts, for as many tokens as give them the rows that they had."""
    table = pd.read_csv(path)
    sizes = {"hidden": "hidden_size", "inter": "intermediate_size", "topk": "topk", "experts": "num_experts",
             "moe_ep": "num_gpus"}
    columns = {ours: table[theirs].to_numpy(float) for ours, theirs in sizes.items()}
    tokens = rows_of(table["tokens_per_expert"].to_numpy(float)) * columns["experts"] / columns["topk"]
    columns |= {"tokens": tokens, "slots": columns["experts"]} | _full(len(table), moe_tp=1.0, gated=1.0, skew=0.0)
    seconds = (table["up_proj_us"] + table["down_proj_us"]).to_numpy(float) * 1e-6
    key = ("grouped_gemm", "fp8_block", "any", LAYOUTS[phase])
    return MeasuredKernel(key, columns, seconds).take(tokens > 0)


def _attention(path: Path, kind: str, phase: str) -> Iterator[MeasuredKernel]:
    """Attention of one layout of heads by the cache's dtype."""
    table = pd.read_csv(path)
    if "latency_us" not in table:
        table = pd.read_csv(path, names=DECODE)
    heads, cached, size = (float(part) for part in path.stem.split("-"))
    prefill = phase == "prefill"
    for dtype, part in table.groupby(table["kv_dtype"] if "kv_dtype" in table else table["dtype"]):
        new = part["seq_len"].to_numpy(float) if prefill else np.ones(len(part))
        columns = {
            "batch": np.ones(len(part)) if prefill else part["batch_size"].to_numpy(float), "new": new,
            "past": np.zeros(len(part)) if prefill else part["kv_len"].to_numpy(float) - 1.0,
        } | _full(len(part), q_heads=heads, kv_bytes=1.0 if dtype == "fp8" else 2.0)
        if kind == "mha":
            columns |= _full(len(part), kv_heads=cached, head_dim=size, window=0.0)
        family = f"{'attention' if kind == 'mha' else 'mla'}_{phase}"
        yield MeasuredKernel((family, str(dtype), "any", ""), columns, part["latency_us"].to_numpy(float) * 1e-6)


def _kernels(place: Path, system: str) -> Iterator[MeasuredKernel]:
    for path in sorted(place.glob(f"gemm/{system}/*.csv")):
        yield _gemm(path)
    for phase in LAYOUTS:
        for path in sorted(place.glob(f"grouped_gemm/{phase}/{system}/*.csv")):
            yield _grouped(path, phase)
        for kind in ("mha", "mla"):
            for path in sorted(place.glob(f"{kind}/{phase}/{system}/*.csv")):
                yield from _attention(path, kind, phase)


def read_system(folder: Path, system: str) -> MeasuredSystem:
    """All kernels of one of :data:`SYSTEMS`' values. Grouped GEMMs of both layouts also stand together, as those of an
    engine that is not told which it runs."""
    result = MeasuredSystem(system, source=SOURCE.format(system=system))
    parts: dict[Key, list[MeasuredKernel]] = {}
    for rows in _kernels(Path(folder) / PLACE, system):
        if rows.key[0].endswith("decode"):
            slow = rows.seconds > HOST_S
            result.drop(rows.key[0], HOST_BOUND, int((~slow).sum()))
            rows = rows.take(slow)
        keys = [rows.key, (*rows.key[:3], "")] if rows.key[0] == "grouped_gemm" else [rows.key]
        for key in keys:
            parts.setdefault(key, []).append(MeasuredKernel(key, rows.columns, rows.seconds, ("InferSim f2293da",)))
    result.kernels = {key: joined(found).fastest() for key, found in parts.items()}
    return result
