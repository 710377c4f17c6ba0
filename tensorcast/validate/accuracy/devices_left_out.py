"""How far off devices are of which nothing was measured: every measured one in turn, priced as if it were such a one.

By the *datasheet*: the formula with fractions of it, as a device without calibration is priced; with *trees* beside, of
what measured ones of other architectures need over it, as a kernel that was not timed on a measured device is. Or by
another measured device's kernels (:attr:`~tensorcast.profiles.device.DeviceProfile.like`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from tensorcast.calibrate.kernel_models import unseen_devices
from tensorcast.calibrate.kernel_models.unseen_devices import Sampled
from tensorcast.calibrate.measured_devices import read_device
from tensorcast.calibrate.measured_tables import Key
from tensorcast.cost.kernels.device_model import DeviceModel, read_model
from tensorcast.cost.kernels.kept_answers import TRANSFERRED, model_path
from tensorcast.cost.kernels.predictor import Predictor
from tensorcast.profiles.device import DeviceProfile, balanced_alike, lent
from tensorcast.profiles.store import load_device
from tensorcast.validate.accuracy.page import percent, quantile, table

ROWS = 400
"""Rows per kernel and device: devices differ by more than rows do."""

NEXT_ARCHITECTURES = (
    ("l40s", "rtx-pro-6000"), ("rtx-pro-6000", "l40s"), ("mi300x", "mi355x"), ("mi355x", "mi300x"),
)  # fmt: skip
"""Devices, and lenders of the next architecture with memory of the same kind: as far off as another chip may be."""

DATASHEET, TREES = "datasheet", "datasheet and trees"

Found = Mapping[str, dict[Key, Sampled]]


@dataclass(frozen=True)
class Lender:
    """A measured device whose kernels price another, and how near it is."""

    name: str
    kind: str


def lenders(device: DeviceProfile, measured: Mapping[str, DeviceProfile]) -> list[Lender]:
    """Of the device's architecture all others, and those of :data:`NEXT_ARCHITECTURES`."""
    found = []
    for name, other in measured.items():
        if name != device.name and other.architecture == device.architecture:
            found.append(Lender(name, "architecture" if balanced_alike(device, other) else "cut"))
        elif (device.name, name) in NEXT_ARCHITECTURES:
            found.append(Lender(name, "next architecture"))
    return found


def errors(where: Mapping[str, Path]) -> pd.DataFrame:
    """A row per measured call and way to price it: ``device, vendor, family, way`` (:data:`DATASHEET`, :data:`TREES` or
    a lender), ``kind`` of the lender, ``ratio`` (predicted over measured), ``held`` (the 80 % interval). ``where``:
    devices, and the folder of what was measured on each."""
    devices = {name: load_device(name) for name in where}
    found = {
        name: unseen_devices.sampled(read_device(where[name], device, unseen_devices.FAMILIES), device, ROWS)
        for name, device in devices.items()
    }
    others = {one: _of_others(one, devices, found) for one in {device.architecture for device in devices.values()}}
    parts: list[pd.DataFrame] = []
    for name, device in devices.items():
        bare = unseen_devices.bare(device)
        parts += _priced(found[name], bare, None, DATASHEET, "")
        if device.vendor == "NVIDIA":
            parts += _priced(found[name], bare, others[device.architecture], TREES, "")
        for lender in lenders(device, devices):
            asked = lent(bare, devices[lender.name], other_chip=True)
            parts += _priced(found[name], asked, _model(lender.name), lender.name, lender.kind)
    return pd.concat(parts, ignore_index=True)


def _model(name: str) -> DeviceModel | None:
    path = model_path(name)
    return None if path is None else read_model(path)


def _of_others(architecture: str, devices: Mapping[str, DeviceProfile], found: Found) -> DeviceModel | None:
    """The model for devices that were not measured, as it ships, but for an architecture that takes no part in it."""
    shipped = _model(TRANSFERRED)
    if shipped is None:
        return None
    fitted = {name for kernel in shipped.kernels.values() for name in kernel.report["devices"] if name in devices}
    rest = {name: found[name] for name in sorted(fitted) if devices[name].architecture != architecture}
    if len(rest) == len(fitted):
        return shipped
    return unseen_devices.fit_unseen_devices(rest, {name: devices[name].architecture for name in rest})


def _priced(
    found: Mapping[Key, Sampled], device: DeviceProfile, model: DeviceModel | None, way: str, kind: str
) -> Iterator[pd.DataFrame]:
    for key, (rows, _, _) in found.items():
        estimate = Predictor(device, key[2], model).price(key[0], key[1], "", rows.columns)
        held = (estimate.low <= rows.seconds) & (rows.seconds <= estimate.high)
        yield pd.DataFrame({"ratio": estimate.seconds / rows.seconds, "held": held}).assign(
            device=device.name, vendor=device.vendor, family=key[0], way=way, kind=kind
        )


KINDS = {
    "architecture": "of its architecture, balanced alike", "next architecture": "of the next architecture",
    "cut": "of its architecture, arithmetic cut",
}  # fmt: skip


def section(found: pd.DataFrame) -> list[str]:
    """Markdown: by device and way, and of all devices with and without AMD's."""
    found = found.assign(error=(found.ratio - 1.0).abs())
    lines = [
        "## Devices left out", "",
        f"Every measured device in turn as one of which nothing was, up to {ROWS} rows of each plain kernel.",
        "*Datasheet*: fractions of its peaks as assumed of any device, which is how one without calibration is priced;",
        "*trees*: over them, what NVIDIA's of other architectures need, which prices kernels that were not timed on a",
        "measured one. By another's kernels: what a profile asks for with `like`, which is refused where arithmetic",
        "was cut and memory was not, and of another architecture; both stand here to show how far off loans are.", "",
    ]  # fmt: skip
    rows: list[list[object]] = []
    for way, part in (*((one, found[found.way == one]) for one in (DATASHEET, TREES)), *(
        (f"a device {KINDS[kind]}", found[found.kind == kind]) for kind in KINDS
    )):
        for whose, some in (("all", part), ("but for AMD's", part[part.vendor != "AMD"])):
            if len(some) and (whose == "all" or len(some) < len(part)):
                rows.append([way, whose, some.device.nunique(), *_figures(some)])
    head = ["rows", "median", "p90", "predicted / measured", "80 % interval held"]
    lines += [*table(["by", "devices", "", *head], rows), ""]
    rows = []
    for key, some in found.groupby(["device", "way"], sort=True):
        rows.append([*key, KINDS.get(some.kind.iloc[0], ""), *_figures(some)])
    return [*lines, *table(["device", "by", "which is", *head], rows)]


def _figures(rows: pd.DataFrame) -> list[object]:
    return [
        f"{len(rows):,}", percent(quantile(rows.error, 0.5)), percent(quantile(rows.error, 0.9)),
        f"{rows.ratio.median():.2f}", f"{100 * rows.held.mean():.0f} %",
    ]  # fmt: skip
