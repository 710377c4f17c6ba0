"""What a measurement ran on: device, driver, versions, clocks as found, and how busy other processes kept the machine.

Everything is read, nothing is set.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path

QUERY = {
    "driver": "driver_version", "sm_clock": "clocks.sm", "sm_clock_max": "clocks.max.sm", "memory_clock": "clocks.mem",
    "power_limit": "power.limit", "temperature": "temperature.gpu", "persistence": "persistence_mode",
}
"""Fields of ``nvidia-smi --query-gpu`` by the name they get here."""


def environment(device_type: str) -> dict[str, str]:
    """Names and versions, one line each; of the GPU too where ``device_type`` is ``cuda``."""
    from tensorcast.version import __version__

    found = {"date": datetime.date.today().isoformat(), "tensorcast": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    found |= {"system": f"{platform.system()} {platform.release()}", "cpu": cpu_model()}
    if device_type == "cuda":
        return found | _gpu()
    return found | {"device": cpu_model(), "threads": str(threads()), "clock": _cpu_clock()}


def _gpu() -> dict[str, str]:
    import torch

    index = torch.cuda.current_device()
    found = {
        "device": torch.cuda.get_device_name(index), "cuda": str(torch.version.cuda),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(index)),
        "memory": f"{torch.cuda.get_device_properties(index).total_memory / 1e9:.1f} GB",
    }
    # which of the machine's GPUs the index means is a matter of CUDA_VISIBLE_DEVICES: ask by the device's own id
    uuid = str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY.values())}", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        chosen = [f"--id=GPU-{uuid}"] if uuid else [f"--id={index}"]
        told = subprocess.run([*command, *chosen], capture_output=True, text=True, timeout=20, check=True).stdout
        found |= dict(zip(QUERY, (word.strip() for word in told.splitlines()[0].split(",")), strict=False))
    return found


def _cpu_clock() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("cpu MHz"):
                return f"{float(line.partition(':')[2]):.0f} MHz, as found"
    return "not told"


def fingerprint(found: dict[str, str]) -> str:
    """What must be equal for two measurements to belong together: the machine and the software, not the day."""
    return "|".join(found.get(name, "") for name in ("device", "torch", "driver", "threads"))


def busy_s() -> float:
    """Core-seconds that all processes, and a hypervisor's other guests, have used since this machine started."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        ticks = [int(word) for word in Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]]
        idle, waiting = ticks[3], ticks[4]
        return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK")
    return 0.0


def launched() -> int:
    """Processes that torchrun started; 1 without it."""
    told = os.environ.get("WORLD_SIZE", "")
    return int(told) if told.isdigit() and "RANK" in os.environ else 1


class Crowding:
    """How many of the cores that ``threads`` threads want were taken by other processes, from start to ``share``."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.began, self.own, self.all = time.perf_counter(), time.process_time(), busy_s()

    @property
    def share(self) -> float:
        """Cores taken per thread of ours: 0 on a machine of our own, or where the system does not tell."""
        passed = max(time.perf_counter() - self.began, 1e-9)
        others = (busy_s() - self.all - (time.process_time() - self.own)) / passed
        return max(0.0, others + self.threads - (os.cpu_count() or 1)) / self.threads


def free_host_bytes() -> int:
    """Memory that may be taken now: what the system calls available, at most what the container still allows."""
    free = memory_bytes()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text(encoding="utf-8") for name in ("memory.max", "memory.current"))
        cached = next(
            (int(line.split()[1]) for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines()
             if line.startswith("inactive_file ")), 0,
        )
        free = min(free, int(limit) - int(used) + cached)
    return max(free, 0)


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
