"""Predicting tables of 10,000 deployments: whole process, few deployments under many loads, and nearly all different.

``OMP_NUM_THREADS=1 python benchmarks/predict_rows.py [--rows N] [--jobs N]``. Target: 10,000 different rows
in 15 CPU seconds.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tensorcast.deploy.layout import Layout, check
from tensorcast.errors import InputError
from tensorcast.profiles.facts import ModelFacts
from tensorcast.profiles.store import list_devices, list_models, load_device, load_model

Row = dict[str, object]
TARGET_S = 15.0
ENGINES = ("vllm", "sglang", "trtllm")
FEW = 20
"""Deployments of the table that repeats them."""

WRONG = 0.02
"""Share of layouts that break a rule and are kept."""


shipped = cache(lambda names: list(names()))
device_of = cache(load_device)


@cache
def facts_of(model: str) -> ModelFacts:
    """What layout rules ask of a model."""
    return load_model(model).stated_facts


@cache
def fewest(model: str, device: str) -> int:
    """GPUs, a power of two, that could hold a model's weights in 16 bits."""
    params, memory = load_model(model).total_params, float(device_of(device).memory_bytes)
    need = 1.3 * 2 * float(params.value) / memory if params else 4.0
    return 1 << max(0, math.ceil(math.log2(need)))


def sizes(layout: Layout, role: str = "") -> Row:
    """Columns of one layout."""
    return {f"{role}{name}": getattr(layout, name) for name in ("tp", "dp", "ep", "pp")}


def some_layout(dice: random.Random, model: str, device: str) -> Layout:
    """A layout on enough GPUs, up to eight times as many, that keeps every rule; a few may break them."""
    profile, least = device_of(device), fewest(model, device)
    while True:
        gpus = least * 2 ** dice.randint(0, 3)
        tp, pp, ep = (2 ** dice.randint(0, most) for most in (3, 2, 8))
        if tp * pp > gpus or ep * pp > gpus:
            continue
        found = Layout(gpus, tp, gpus // (tp * pp), ep, pp)
        try:
            check(found, facts_of(model), profile)
        except InputError:
            if dice.random() > WRONG:
                continue
        return found


def deployment(dice: random.Random) -> Row:
    """A random deployment: model, device, engine, form, layout and precision."""
    model, device, engine = dice.choice(shipped(list_models)), dice.choice(shipped(list_devices)), dice.choice(ENGINES)
    row: Row = {"model": model, "device": device, "engine": engine}
    row["precision"] = dice.choice(("", "", "bf16", "fp8"))
    row["kv_dtype"] = dice.choice(("", "", "fp8"))
    if dice.random() < 0.7:
        return {**row, "mode": "agg", **sizes(some_layout(dice, model, device))}
    pools = {"prefill_workers": dice.randint(1, 4), "decode_workers": dice.randint(1, 8)}
    prefill, decode = (some_layout(dice, model, device) for _ in range(2))
    return {**row, "mode": "disagg", **pools, **sizes(prefill, "prefill_"), **sizes(decode, "decode_")}


def load(dice: random.Random) -> Row:
    """Random lengths and requests in flight."""
    return {
        "isl": int(2 ** dice.uniform(6, 14)),
        "osl": int(2 ** dice.uniform(4, 12)),
        "concurrency": int(2 ** dice.uniform(0, 11)),
    }


def few(dice: random.Random, rows: int) -> list[Row]:
    """Rows of few deployments under loads that are all different."""
    repeated = [deployment(dice) for _ in range(FEW)]
    return [{**dice.choice(repeated), **load(dice)} for _ in range(rows)]


def different(dice: random.Random, rows: int) -> list[Row]:
    """Rows that are nearly all deployments of their own."""
    return [{**deployment(dice), **load(dice)} for _ in range(rows)]


TABLES: dict[str, Callable[[random.Random, int], list[Row]]] = {
    f"{FEW} deployments, many loads": few,
    "nearly all different": different,
}


def written(rows: list[Row], runs: Path) -> Path:
    """``runs``, a CSV file of the rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with runs.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return runs


def process(rows: list[Row], jobs: int, folder: Path, cache_folder: Path) -> tuple[float, float, int]:
    """Wall seconds and processor seconds of one fresh ``tensorcast predict``, and rows with a problem."""
    runs, out = written(rows, folder / "runs.csv"), folder / "out.csv"
    command = (sys.executable, "-m", "tensorcast", "predict", str(runs), "--out", str(out), "--jobs", str(jobs))
    environment = {**os.environ, "TENSORCAST_CACHE": str(cache_folder)}
    start, before = time.perf_counter(), os.times()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, os.times()
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {done.returncode}: {done.stderr.strip()}")
    with out.open(newline="") as file:
        problems = sum(bool(row["problem"]) for row in csv.DictReader(file))
    used = after.children_user - before.children_user + after.children_system - before.children_system
    return wall, used, problems


def main() -> None:
    """Print seconds of both tables, with a cache that holds every trace (tracing is timed in cold_start.py)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="trace cache to use and fill; default a new one")
    options = parser.parse_args()
    table = Table(title=f"tensorcast predict, {options.rows:,} rows, {options.jobs} process(es), traces cached")
    for heading in ("rows", "deployments", "problems", "seconds", "CPU seconds", "ms per row"):
        table.add_column(heading, justify="left" if heading == "rows" else "right")
    with tempfile.TemporaryDirectory(prefix="tensorcast-bench-") as folder:
        traces = options.cache or Path(folder) / "cache"
        for name, make in TABLES.items():
            rows = make(random.Random(0), options.rows)
            loads = ("isl", "osl", "concurrency")
            distinct = {tuple((k, v) for k, v in row.items() if k not in loads) for row in rows}
            if options.cache is None:
                process(rows, options.jobs, Path(folder), traces)
            wall, used, problems = process(rows, options.jobs, Path(folder), traces)
            table.add_row(
                name, f"{len(distinct):,}", f"{problems:,}", f"{wall:.1f}", f"{used:.1f}",
                f"{1e3 * wall / options.rows:.2f}",
            )  # fmt: skip
        Console(width=110).print(table)
        print(f"Target for {10_000:,} different rows: {TARGET_S:g} CPU seconds.")


if __name__ == "__main__":
    main()
