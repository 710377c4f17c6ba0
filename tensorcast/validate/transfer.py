"""What kernels need over the datasheet formula on a device that was not measured, learnt on those that were.

The formula is that of a device without calibration (datasheet fractions); the residual is fitted over all measured
devices, and its interval comes from leaving out one device after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tensorcast.cost.predict import TRANSFERRED, Predictor
from tensorcast.cost.predict.model import DeviceModel, Kernel
from tensorcast.cost.predict.physics import Physics, physics_of
from tensorcast.cost.predict.tiles import TILES
from tensorcast.profiles.device import DeviceProfile
from tensorcast.validate import fit
from tensorcast.validate.measured import Key, Measured, System
from tensorcast.validate.residual import QUANTILES, grow

FAMILIES = ("gemm", "grouped_gemm", "attention_prefill", "attention_decode", "mla_prefill", "mla_decode")

ROWS = 3000
"""Rows per device and kernel: devices differ by more than rows do."""

CAPACITY = (60, 4, 0.15)
"""Trees, depth, learning rate: small, since what is peculiar to one device should not be learnt."""

Sampled = tuple[Measured, Physics]


def bare(device: DeviceProfile) -> DeviceProfile:
    """The device as if nothing had been measured on it."""
    return device.model_copy(update={"calibration": None})


def sampled(system: System, device: DeviceProfile) -> dict[Key, Sampled]:
    """Some rows of every plain kernel of the system with their physics by datasheet."""
    found: dict[Key, Sampled] = {}
    for key, rows in sorted(system.kernels.items()):
        if key[0] in FAMILIES and not key[3]:
            some = rows.take(np.random.default_rng(0).permutation(len(rows))[:ROWS])
            found[key] = some, physics_of(key[0], key[1], "", some.columns, bare(device), key[2])
    return found


def _fitted(key: Key, parts: Sequence[Sampled]) -> Kernel:
    # engines borrow each other's kernels here, and tiles are of one engine
    names = set.intersection(*(set(physics.features) for _, physics in parts)) - set(TILES)
    features = {name: np.concatenate([physics.features[name] for _, physics in parts]) for name in names}
    target = np.concatenate([np.log(rows.seconds / physics.seconds) for rows, physics in parts])
    trees = grow(features, target, *CAPACITY)
    box = {
        name: (min(float(rows.columns[name].min()) for rows, _ in parts),
               max(float(rows.columns[name].max()) for rows, _ in parts))
        for name in parts[0][0].columns if name != "source"
    }
    return Kernel(*key, trees, box, (), (), (0.0,), (0.0,), 0.0, 0.0, len(trees.feature))


def fit_transfer(devices: Mapping[str, dict[Key, Sampled]], architectures: Mapping[str, str]) -> DeviceModel:
    """One model over all the named devices, with intervals from leaving out each architecture in turn: a new device is
    rarely a sibling of a measured one."""
    kernels: dict[Key, Kernel] = {}
    for key in sorted({key for found in devices.values() for key in found}):
        held = {name: found[key] for name, found in devices.items() if key in found}
        kernel = _fitted(key, list(held.values()))
        errors = []
        for one in sorted({architectures[name] for name in held}):
            others = [part for name, part in held.items() if architectures[name] != one]
            if not others:
                continue
            without = _fitted(key, others)
            for rows, physics in (part for name, part in held.items() if architectures[name] == one):
                errors.append(np.log(rows.seconds / physics.seconds) - without.trees.values(physics.features))
        found = np.concatenate(errors) if errors else np.array([-0.7, 0.7])
        low, high = (round(float(v), 5) for v in np.quantile(found, QUANTILES))
        size = np.exp(-found)
        report = {"devices": sorted(held)} | ({} if not errors else fit.errors(size, np.ones_like(size)))
        fields = {name: getattr(kernel, name) for name in kernel.__dataclass_fields__}
        kernels[key] = Kernel(**fields | {
            "low": (low,), "high": (high,), "new_low": low, "new_high": high, "report": report,
        })
    return DeviceModel(TRANSFERRED, kernels, "fitted over " + ", ".join(sorted(devices)))


def left_out_errors(
    model: DeviceModel, device: DeviceProfile, found: Mapping[Key, Sampled]
) -> dict[Key, tuple[np.ndarray, np.ndarray]]:
    """Per kernel |predicted / measured - 1| of a device that ``model`` has not seen, and whether the interval held."""
    result = {}
    for key, (rows, _) in found.items():
        estimate = Predictor(bare(device), key[2], model).price(key[0], key[1], "", rows.columns)
        held = (estimate.low <= rows.seconds) & (rows.seconds <= estimate.high)
        result[key] = np.abs(estimate.seconds / rows.seconds - 1.0), held
    return result
