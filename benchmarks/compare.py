"""Searching layouts of DeepSeek-V3: whole-process time cold and warm, candidates per second, growth with the cluster.

``OMP_NUM_THREADS=1 python benchmarks/compare.py [--to 1024]``. Targets on 32 H200, every axis searched: 15 s cold, 5 s
with a warm trace cache; 200,000 candidates per second inside.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

ASKED = ("-i", "4096", "-o", "1024", "--ttft", "2s", "--tpot", "50ms")
FULL = ("--full", "--any-engine")
TRIES = 3
"""Runs of each measurement, of which the fastest is printed: other work on the machine only adds time."""


def process(model: str, device: str, gpus: int, extra: tuple[str, ...], cache: Path) -> float:
    """Wall seconds of one fresh ``tensorcast compare``."""
    environment = {**os.environ, "TENSORCAST_CACHE": str(cache)}
    command = (sys.executable, "-m", "tensorcast", "compare", model, "-d", device, "-n", str(gpus), *ASKED, *extra)
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {done.returncode}: {done.stderr.strip()}")
    return time.perf_counter() - start


def inside(model: str, device: str, gpus: int) -> tuple[int, int, float, float]:
    """Variants, candidates, and the least seconds to price and to serve them, with every axis; tables are in memory."""
    from tensorcast.parallel import uncollected
    from tensorcast.profiles.store import load_device, load_engine, load_model
    from tensorcast.search.axes import FULL as EVERY_AXIS
    from tensorcast.search.candidates import aggregated, disaggregated
    from tensorcast.search.search_task import SearchTask
    from tensorcast.search.space import space
    from tensorcast.search.variant_prices import VariantPrices
    from tensorcast.serving.traffic import Traffic

    task = SearchTask(
        model=load_model(model), device=load_device(device), engine=load_engine("vllm"), gpus=gpus,
        load=Traffic(4096, 1024, 1), ttft_s=2.0, tpot_s=0.05, axes=EVERY_AXIS, runnable_only=False,
    )  # fmt: skip
    tried = space(task, Counter())
    VariantPrices(task.scenario, tried, task.axes.chunk_tokens)  # every table is read and fused
    best = (0, 0.0, math.inf)
    for _ in range(TRIES):
        with uncollected():  # as tensorcast.search.search.search runs
            start = time.perf_counter()
            shop = VariantPrices(task.scenario, space(task, Counter()), task.axes.chunk_tokens)
            priced = time.perf_counter()
            found = [aggregated(shop, (2.0, 0.05)), disaggregated(shop, gpus, (2.0, 0.05))]
            served = time.perf_counter()
        if served - start < best[1] + best[2]:
            best = sum(len(points.variant) + slow for points, slow in found), priced - start, served - priced
    return len(tried), *best


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="deepseek-v3")
    parser.add_argument("--device", default="h200")
    parser.add_argument("--to", type=int, default=1024, help="largest cluster")
    options = parser.parse_args()
    console = Console(width=110)
    table = Table(title=f"{options.model} on 32 {options.device}, whole process")
    for heading in ("what", "seconds", "target"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    with tempfile.TemporaryDirectory(prefix="tensorcast-bench-") as folder:
        warm = Path(folder) / "warm"
        process(options.model, options.device, 32, FULL, warm)
        for what, extra, caches, target in (
            ("default space, warm", (), [warm] * TRIES, "5"),
            ("every axis, any engine, warm", FULL, [warm] * TRIES, "5"),
            ("every axis, any engine, cold", FULL, [Path(folder) / f"cold{i}" for i in range(2)], "15"),
        ):
            best = min(process(options.model, options.device, 32, extra, cache) for cache in caches)
            table.add_row(what, f"{best:.2f}", target)
        console.print(table)
    table = Table(title="every axis, any engine: growth with the cluster (pricing and serving, in one process)")
    for heading in ("GPUs", "variants", "candidates", "price s", "serve s", "candidates/s"):
        table.add_column(heading, justify="right")
    gpus = 8
    while gpus <= options.to:
        variants, candidates, price, serve = inside(options.model, options.device, gpus)
        rate = candidates / (price + serve)
        table.add_row(f"{gpus}", f"{variants:,}", f"{candidates:,}", f"{price:.2f}", f"{serve:.2f}", f"{rate:,.0f}")
        gpus *= 2
    console.print(table)


if __name__ == "__main__":
    main()
