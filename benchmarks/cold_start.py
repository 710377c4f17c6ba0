"""Whole-process times of the command line, from nothing and warm, with peak memory; tracing after imports.

``python benchmarks/cold_start.py``. Every command is a fresh process; cold ones get an empty trace cache.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

SIMULATE = (
    "-m", "tensorcast", "simulate", "deepseek-v3", "--device", "h200", "--world-size", "32", "--tp", "1", "--dp", "32",
    "--ep", "32", "--phase", "decode", "--batch", "128", "--context", "4096",
)

TRACE = """
import time
import torch, transformers
from tensorcast.profiles import load_model
from tensorcast.trace.tracer import trace
from tensorcast.modeling.config import hf_config
profile = load_model("deepseek-v3")
hf_config(profile)  # transformers imports the configuration class of a family when it is first asked for
import transformers.models.deepseek_v3.modeling_deepseek_v3
start = time.perf_counter()
trace(profile, "prefill"), trace(profile, "decode")
print(time.perf_counter() - start)
"""


def measured(arguments: Sequence[str], cache: Path) -> tuple[float, float, str]:
    """Wall seconds, peak memory in bytes and standard output of one Python process."""
    environment = {**os.environ, "TENSORCAST_CACHE": str(cache), "COLUMNS": "160"}
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, *arguments], stdout=out, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed with {process.returncode}")
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return seconds, usage.ru_maxrss * scale, text


def main() -> None:
    """Print the table; each line is the best of its runs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "numpy"))
    table = Table(title=f"{_processor()}, {cores} cores; Python {platform.python_version()}, {versions}")
    for heading in ("what", "seconds", "target", "peak memory"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    with tempfile.TemporaryDirectory(prefix="tensorcast-bench-") as folder:
        warm = Path(folder) / "warm"
        measured(SIMULATE, warm)  # also fills the page cache: files of torch read from disk once
        lines: list[tuple[str, tuple[str, ...], list[Path], str]] = [
            ("python, nothing imported", ("-c", "pass"), [warm] * 3, ""),
            ("import tensorcast", ("-c", "import tensorcast"), [warm] * 5, "0.5"),
            ("tensorcast --help", ("-m", "tensorcast", "--help"), [warm] * 5, "0.5"),
            ("simulate deepseek-v3, cold", SIMULATE, [Path(folder) / f"cold{i}" for i in range(3)], "12"),
            ("simulate deepseek-v3, warm", SIMULATE, [warm] * 3, "3"),
        ]
        for what, arguments, caches, target in lines:
            runs = [measured(arguments, cache) for cache in caches]
            table.add_row(what, f"{min(r[0] for r in runs):.2f}", target, f"{max(r[1] for r in runs) / 1e6:.0f} MB")
        runs = [measured(("-c", TRACE), warm) for _ in range(3)]
        best = min(float(text) for _, _, text in runs)
        peak = max(run[1] for run in runs)
        table.add_row("trace deepseek-v3, both phases, after imports", f"{best:.2f}", "1", f"{peak / 1e6:.0f} MB")
    Console(width=120).print(table)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
