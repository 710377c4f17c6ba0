"""What kernels need over the datasheet formula on a device that was not measured, learnt on those that were.

The formula is that of a device without calibration (datasheet fractions); the residual is fitted over all measured
devices, and its interval comes from leaving out one device after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tensorcast.cost.predict import TRANSFERRED, Predictor
from tensorcast.cost.predict.model import DeviceModel, Kernel
from tensorcast.cost.predict.physics import Physics, physics_of
from tensorcast.profiles.device import DeviceProfile
from tensorcast.validate import fit, rise
from tensorcast.validate.grow import no_trees
from tensorcast.validate.measured import Key, Measured, System
from tensorcast.validate.residual import QUANTILES

FAMILIES = ("gemm", "grouped_gemm", "attention_prefill", "attention_decode", "mla_prefill", "mla_decode")

ROWS = 3000
"""Rows per device and kernel: devices differ by more than rows do."""

CAPACITY = (60, 4, 0.15)
"""Trees, depth, learning rate: small, since what is peculiar to one device should not be learnt."""

SHARES = (0.1, 0.3, 0.5)
"""Shares that are tried (:mod:`tensorcast.cost.predict.rising`)."""

WORST = 0.7
"""|log error| from which on a row counts as just as bad, when shares are compared."""


class Sampled(NamedTuple):
    """Rows of one kernel on one device, their physics by datasheet, and the device as if nothing had been measured."""

    rows: Measured
    physics: Physics
    device: DeviceProfile


def bare(device: DeviceProfile) -> DeviceProfile:
    """The device as if nothing had been measured on it."""
    return device.model_copy(update={"calibration": None})


def sampled(system: System, device: DeviceProfile) -> dict[Key, Sampled]:
    """Some rows of every plain kernel of the system with their physics by datasheet."""
    found: dict[Key, Sampled] = {}
    for key, rows in sorted(system.kernels.items()):
        if key[0] in FAMILIES and not key[3]:
            found[key] = sample(rows.take(np.random.default_rng(0).permutation(len(rows))[:ROWS]), device)
    return found


def sample(rows: Measured, device: DeviceProfile) -> Sampled:
    """The rows with their physics by datasheet."""
    family, dtype, engine, _ = rows.key
    return Sampled(rows, physics_of(family, dtype, "", rows.columns, bare(device), engine), bare(device))


def _box(parts: Sequence[Sampled]) -> dict[str, tuple[float, float]]:
    ends: dict[str, tuple[float, float]] = {}
    for name in parts[0].rows.columns:
        if name != "source":
            values = np.concatenate([part.rows.columns[name] for part in parts])
            ends[name] = float(values.min()), float(values.max())
    return ends


def fit_transfer(devices: Mapping[str, dict[Key, Sampled]], architectures: Mapping[str, str]) -> DeviceModel:
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
    climbs, splits = {}, {}
    for key, parts in held.items():
        probes = rise.probes_of([part.rows for part in parts.values()])
        climbs[key] = {name: rise.climb_of(*part, probes) for name, part in parts.items()}
        splits[key] = list(_architectures_left_out(climbs[key], architectures))
    tried = {share: {key: rise.left_out(pairs, CAPACITY, share) for key, pairs in splits.items()} for share in SHARES}
    share = min(SHARES, key=lambda one: np.mean(
        [np.minimum(np.abs(errors), WORST).mean() for errors in tried[one].values() if len(errors)] or [0.0]
    ))
    kernels = {}
    for key, parts in held.items():
        report: dict[str, Any] = {"devices": sorted(parts)}
        errors = tried[share][key] if len(tried[share][key]) else np.array([-0.7, 0.7])
        low, high = (round(float(v), 5) for v in np.quantile(errors, QUANTILES))
        if splits[key]:
            report |= fit.errors(np.exp(-errors), np.ones_like(errors))
        kernels[key] = Kernel(
            *key, no_trees(0.0), _box(list(parts.values())), (), (), (low,), (high,), low, high, 0, report=report,
            probes=rise.probes_of([part.rows for part in parts.values()]),
            **rise.grow_rising(rise.joined(list(climbs[key].values())), CAPACITY, share),
        )
    return kernels


def _architectures_left_out(
    climbs: Mapping[str, rise.Climb], architectures: Mapping[str, str]
) -> Iterator[tuple[rise.Climb, rise.Climb]]:
    """Rows of all devices but those of one architecture, and those rows."""
    for one in sorted({architectures[name] for name in climbs}):
        out = [climb for name, climb in climbs.items() if architectures[name] == one]
        known = [climb for name, climb in climbs.items() if architectures[name] != one]
        if known:
            yield rise.joined(known), rise.joined(out)


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
