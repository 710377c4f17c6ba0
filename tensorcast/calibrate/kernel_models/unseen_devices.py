"""What kernels need over the datasheet formula on a device that was not measured, learnt on those that were.

The formula is that of a device without calibration (datasheet fractions); the residual is fitted over all measured
devices, and its interval comes from leaving out one device after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tensorcast.calibrate.constants.errors import errors as fit_errors
from tensorcast.calibrate.kernel_models.boosting import CLIP, grow, no_trees
from tensorcast.calibrate.kernel_models.residual import QUANTILES
from tensorcast.calibrate.measured_tables import Key, MeasuredKernel, MeasuredSystem
from tensorcast.cost.kernels.device_model import DeviceModel, Kernel
from tensorcast.cost.kernels.formula import KernelFormula, formula_of
from tensorcast.cost.kernels.kept_answers import TRANSFERRED
from tensorcast.cost.kernels.monotone import coordinates, middle_of
from tensorcast.cost.kernels.predictor import Predictor
from tensorcast.profiles.device import DeviceProfile

PROBES = 32
"""Measured shapes whose median says how fast one device's formula is beside another's."""


@dataclass(frozen=True)
class MonotoneRows:
    """Rows that monotone trees are fitted to: features, log of the formula's seconds, log(measured / formula)."""

    features: Mapping[str, np.ndarray]
    formula: np.ndarray
    target: np.ndarray

    def __len__(self) -> int:
        return len(self.target)


def monotone_rows(
    rows: MeasuredKernel, physics: KernelFormula, device: DeviceProfile, probes: Mapping[str, Sequence[float]]
) -> MonotoneRows:
    """The measured rows; with ``probes`` the formula's seconds count from its median over those."""
    family, dtype, engine, _ = rows.key
    middle = middle_of(family, dtype, probes, device, engine)
    features = coordinates(family, rows.columns, physics, device, middle)
    formula = np.log(physics.seconds) - middle * np.log(2.0)
    return MonotoneRows(features, formula, np.log(rows.seconds / physics.seconds))


def probes_of(parts: Sequence[MeasuredKernel]) -> dict[str, tuple[float, ...]]:
    """Some of the shapes, drawn once."""
    names = [name for name in parts[0].columns if name != "source"]
    table = np.stack([np.concatenate([rows.columns[name] for rows in parts]) for name in names])
    some = np.random.default_rng(0).permutation(table.shape[1])[:PROBES]
    return {name: tuple(float(v) for v in values[some]) for name, values in zip(names, table, strict=True)}


def grow_monotone(rows: MonotoneRows, capacity: tuple[int, int, float], share: float) -> dict[str, Any]:
    """The fields ``monotone``, ``share`` and ``span`` of a :class:`~tensorcast.cost.kernels.device_model.Kernel`."""
    target = np.clip(rows.target, *(np.median(rows.target) + np.array([-CLIP, CLIP])))
    trees = grow(rows.features, target + share * rows.formula, *capacity, monotone=True)
    return {"monotone": trees, "share": share, "span": (float(rows.formula.min()), float(rows.formula.max()))}


def joined(parts: Sequence[MonotoneRows]) -> MonotoneRows:
    """All rows of several devices."""
    features = {name: np.concatenate([part.features[name] for part in parts]) for name in parts[0].features}
    formula, target = (np.concatenate([getattr(part, name) for part in parts]) for name in ("formula", "target"))
    return MonotoneRows(features, formula, target)


def monotone_errors(fields: Mapping[str, Any], rows: MonotoneRows) -> np.ndarray:
    """log(measured / predicted) of rows by what :func:`grow_monotone` found."""
    back = fields["share"] * np.clip(rows.formula, *fields["span"])
    return rows.target - fields["monotone"].values(rows.features) + back


def left_out(
    parts: Sequence[tuple[MonotoneRows, MonotoneRows]], capacity: tuple[int, int, float], share: float
) -> np.ndarray:
    """The errors of the second of each pair by a fit to the first."""
    found = [monotone_errors(grow_monotone(known, capacity, share), out) for known, out in parts]
    return np.concatenate(found) if found else np.zeros(0)


FAMILIES = ("gemm", "grouped_gemm", "attention_prefill", "attention_decode", "mla_prefill", "mla_decode")

ROWS = 3000
"""Rows per device and kernel: devices differ by more than rows do."""

CAPACITY = (60, 4, 0.15)
"""Trees, depth, learning rate: small, since what is peculiar to one device should not be learnt."""

SHARES = (0.1, 0.3, 0.5)
"""Shares that are tried (:mod:`tensorcast.cost.kernels.monotone`)."""

WORST = 0.7
"""|log error| from which on a row counts as just as bad, when shares are compared."""


class Sampled(NamedTuple):
    """Rows of one kernel on one device, their physics by datasheet, and the device as if nothing had been measured."""

    rows: MeasuredKernel
    physics: KernelFormula
    device: DeviceProfile


def bare(device: DeviceProfile) -> DeviceProfile:
    """The device as if nothing had been measured on it."""
    return device.model_copy(update={"calibration": None})


def sampled(system: MeasuredSystem, device: DeviceProfile, most: int = ROWS) -> dict[Key, Sampled]:
    """At most so many rows of every plain kernel of the system with their physics by datasheet."""
    found: dict[Key, Sampled] = {}
    for key, rows in sorted(system.kernels.items()):
        if key[0] in FAMILIES and not key[3]:
            found[key] = sample(rows.take(np.random.default_rng(0).permutation(len(rows))[:most]), device)
    return found


def sample(rows: MeasuredKernel, device: DeviceProfile) -> Sampled:
    """The rows with their physics by datasheet."""
    family, dtype, engine, _ = rows.key
    return Sampled(rows, formula_of(family, dtype, "", rows.columns, bare(device), engine=engine), bare(device))


def _box(parts: Sequence[Sampled]) -> dict[str, tuple[float, float]]:
    ends: dict[str, tuple[float, float]] = {}
    for name in parts[0].rows.columns:
        if name != "source":
            values = np.concatenate([part.rows.columns[name] for part in parts])
            ends[name] = float(values.min()), float(values.max())
    return ends


def fit_unseen_devices(devices: Mapping[str, dict[Key, Sampled]], architectures: Mapping[str, str]) -> DeviceModel:
    """One model over all the named devices, with intervals from leaving out each architecture in turn: a new device is
    rarely a sibling of a measured one. So is settled what share of a formula's growth a family's trees take back."""
    kernels: dict[Key, Kernel] = {}
    keys = sorted({key for found in devices.values() for key in found})
    for family in sorted({key[0] for key in keys}):
        kernels |= _fit_family(
            {key: {name: found[key] for name, found in devices.items() if key in found}
             for key in keys if key[0] == family}, architectures,
        )
    return DeviceModel(TRANSFERRED, kernels, "fitted over " + ", ".join(sorted(devices)))


def _fit_family(held: Mapping[Key, Mapping[str, Sampled]], architectures: Mapping[str, str]) -> dict[Key, Kernel]:
    every, splits = {}, {}
    for key, parts in held.items():
        probes = probes_of([part.rows for part in parts.values()])
        every[key] = {name: monotone_rows(*part, probes) for name, part in parts.items()}
        splits[key] = list(_architectures_left_out(every[key], architectures))
    tried = {share: {key: left_out(pairs, CAPACITY, share) for key, pairs in splits.items()} for share in SHARES}
    share = min(SHARES, key=lambda one: np.mean(
        [np.minimum(np.abs(errors), WORST).mean() for errors in tried[one].values() if len(errors)] or [0.0]
    ))
    kernels = {}
    for key, parts in held.items():
        report: dict[str, Any] = {"devices": sorted(parts)}
        errors = tried[share][key] if len(tried[share][key]) else np.array([-0.7, 0.7])
        low, high = (round(float(v), 5) for v in np.quantile(errors, QUANTILES))
        if splits[key]:
            report |= fit_errors(np.exp(-errors), np.ones_like(errors))
        kernels[key] = Kernel(
            *key, trees=no_trees(0.0), box=_box(list(parts.values())), seen=(), edges=(), low=(low,), high=(high,),
            new_low=low, new_high=high, new_trees=0, report=report,
            probes=probes_of([part.rows for part in parts.values()]),
            **grow_monotone(joined(list(every[key].values())), CAPACITY, share),
        )
    return kernels


def _architectures_left_out(
    devices: Mapping[str, MonotoneRows], architectures: Mapping[str, str]
) -> Iterator[tuple[MonotoneRows, MonotoneRows]]:
    """Rows of all devices but those of one architecture, and those rows."""
    for one in sorted({architectures[name] for name in devices}):
        out = [rows for name, rows in devices.items() if architectures[name] == one]
        known = [rows for name, rows in devices.items() if architectures[name] != one]
        if known:
            yield joined(known), joined(out)


def left_out_errors(
    model: DeviceModel, device: DeviceProfile, found: Mapping[Key, Sampled]
) -> dict[Key, tuple[np.ndarray, np.ndarray]]:
    """Per kernel |predicted / measured - 1| of a device that ``model`` has not seen, and whether the interval held."""
    result = {}
    for key, (rows, _, _) in found.items():
        estimate = Predictor(bare(device), key[2], model).price(key[0], key[1], "", rows.columns)
        held = (estimate.low <= rows.seconds) & (rows.seconds <= estimate.high)
        result[key] = np.abs(estimate.seconds / rows.seconds - 1.0), held
    return result
