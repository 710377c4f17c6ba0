"""The machine that runs this, as device profile ``cpu``: a few seconds of measuring, then kept on disk.

Peaks are the best that any probe reached. Constants are fitted to a spread of shapes per family with one shape in
three held out, and carry those shapes' error.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from tensorcast.files import cache_dir, write_atomically
from tensorcast.measure.environment import cpu_model, memory_bytes, threads
from tensorcast.profiles.device import Calibration, DeviceProfile, KernelConstants

if TYPE_CHECKING:
    import numpy as np

    from tensorcast.measure.probes import ProbedHost, Sample


FORMAT = 3
"""Raised when what is measured changes, so that older files are not read."""

LATENCY_S = 5e-5
"""One message between two processes over loopback. Assumption: what gloo takes on a server, not measured."""

PROCESSES = 64
"""Ranks that may be simulated on one machine; nothing but its cores sets a limit."""

HELD_OUT = 3
"""One shape in so many is kept out of the fit."""

CROWDED = 0.15
"""Cores per thread taken by other processes from which on figures are not kept: threads wait for each other."""


def host_profile(effort: float = 1.0) -> DeviceProfile:
    """This machine as a device: read from the cache, else measured now (about 4 s) and stored.

    ``effort``, at most 1, scales sizes and repeats; below 1 the figures are rough. What is measured while other
    processes hold the cores says so, on stderr too, and is not stored; nor is anything with ``TENSORCAST_CACHE=off``.
    """
    path = _file(effort)
    if path is not None and path.exists():
        with contextlib.suppress(ValueError, OSError):  # damaged: measure again
            return DeviceProfile.model_validate_json(path.read_bytes())
    from tensorcast.measure.probes import measure  # torch loads only here

    measured = measure(threads(), effort)
    profile = profile_of(measured, threads())
    if measured.crowding >= CROWDED:
        logging.getLogger("tensorcast").warning("warning: %s", profile.sources["host"])
    elif path is not None:
        with contextlib.suppress(OSError):  # a read-only home costs time, not the answer
            write_atomically(path, profile.model_dump_json(exclude_defaults=True, indent=1))
    return profile


def _file(effort: float) -> Path | None:
    folder = cache_dir()
    if folder is None:
        return None
    key = [FORMAT, cpu_model(), os.cpu_count(), threads(), importlib.metadata.version("torch"), effort]
    return folder / "hosts" / f"cpu-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"


def profile_of(measured: ProbedHost, count: int) -> DeviceProfile:
    """The profile that says what was ``measured`` with ``count`` threads."""
    today = datetime.date.today().isoformat()
    how = f"torch {importlib.metadata.version('torch')}, {count} threads"
    if measured.crowding >= CROWDED:
        how += f", while other processes took {measured.crowding:.0%} of the cores: far too slow"
    bandwidth = measured.bandwidth
    device = DeviceProfile.model_validate({
        "name": "cpu", "vendor": platform.system(), "architecture": platform.machine(), "description": cpu_model(),
        "sources": {
            "host": f"measured on this machine, {today}, {how}",
            "system": "what the operating system, or the container, lets this process use",
        },
        "processors": count,
        "whole_tiles": False,
        "peak_flops": {dtype: {"value": _round(rate), "source": "host"} for dtype, rate in measured.flops.items()},
        "memory_bytes": {"value": memory_bytes(), "source": "system"},
        "memory_bandwidth_bytes_per_s": {"value": _round(bandwidth), "source": "host"},
        "interconnect": [{
            "name": "host", "size": PROCESSES,
            "bandwidth_bytes_per_s": {
                "value": _round(bandwidth / 2), "source": "host: half the stream, as a message is written and read",
            },
            "latency_s": {"value": LATENCY_S, "source": "assumption: a gloo message over loopback"},
        }],
    })
    kernels = tuple(
        _fitted(family, dtype, samples, measured.launch_s, device)
        for (family, dtype), samples in measured.samples.items()
    )
    provenance = (
        f"measured on this machine with {how}: first decile of repeated calls, operands from memory; "
        f"one shape in {HELD_OUT} held out"
    )
    return device.model_copy(update={"calibration": Calibration(provenance=provenance, date=today, kernels=kernels)})


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _fitted(
    family: str, dtype: str, samples: list[Sample], launch_s: float, device: DeviceProfile
) -> KernelConstants:
    """Efficiencies and launch time of one family; the errors are those of the shapes held out."""
    import numpy as np

    from tensorcast.calibrate.constants.errors import errors, kernel_seconds
    from tensorcast.calibrate.constants.minimise import fit_constants

    # which one of three is held out changes from three to three: some probes take three kernels in turn
    held = np.array([i % HELD_OUT == (i // HELD_OUT + 1) % HELD_OUT for i in range(len(samples))])
    seconds = np.array([sample.seconds for sample in samples])
    bounds = {
        "compute_efficiency": (0.7, 0.01, 1.0), "memory_efficiency": (0.7, 0.01, 1.0),
        "launch_s": (2.0 * launch_s, launch_s / 2, 20.0 * launch_s),
    }

    def predict(values: dict[str, float], rows: np.ndarray) -> np.ndarray:
        constants = KernelConstants.model_validate({"family": family, "dtype": dtype, **values})
        works = [sample.work for sample, wanted in zip(samples, rows, strict=True) if wanted]
        return np.array([float(kernel_seconds([work], constants, constants, device)) for work in works])

    found, _ = fit_constants(bounds, lambda values: predict(values, ~held), seconds[~held])
    score = errors(predict(found, held), seconds[held])
    return KernelConstants.model_validate({
        "family": family, "dtype": dtype, "points": int((~held).sum()), "held_out": int(held.sum()), **found, **score,
    })
