"""Which devices a folder of measurements is about, whoever measured: one place that knows every layout.

A folder is an ``aiconfigurator-core`` (:mod:`tensorcast.calibrate.measured_tables`), a checkout of ROCm/aiter
(:mod:`tensorcast.calibrate.aiter_tables`) or one of alibaba/InferSim (:mod:`tensorcast.calibrate.infersim_tables`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tensorcast.calibrate import aiter_tables, infersim_tables, measured_tables
from tensorcast.calibrate.impossible_rows import without_impossible
from tensorcast.calibrate.measured_rows import MeasuredSystem
from tensorcast.errors import InputError
from tensorcast.profiles.device import DeviceProfile


def system_of(folder: Path, device: DeviceProfile) -> str | None:
    """What the folder calls a device: its name, or one of its aliases. None where it holds nothing of it."""
    if aiter_tables.holds(folder):
        return aiter_tables.SYSTEMS.get(device.name)
    if infersim_tables.holds(folder):
        return infersim_tables.SYSTEMS.get(device.name)
    known = measured_tables.systems_in(folder)
    return next((one for name in (device.name, *device.aliases) if (one := name.replace("-", "_")) in known), None)


def read_device(folder: Path, device: DeviceProfile, families: Sequence[str] = ()) -> MeasuredSystem:
    """What a folder holds of a device, all families or some, without rows that its datasheet does not allow. Raises
    :class:`InputError` where that is nothing."""
    system = system_of(folder, device)
    if system is None:
        raise InputError(f"no measured tables of {device.name} below {folder}")
    if aiter_tables.holds(folder) or infersim_tables.holds(folder):
        reader = aiter_tables if aiter_tables.holds(folder) else infersim_tables
        found = reader.read_system(folder, system)
        without_impossible(found, device)
        found.kernels = {key: rows for key, rows in found.kernels.items() if not families or key[0] in families}
        return found
    return measured_tables.read_system(folder, system, tuple(families) or None, device)
