"""The predictor beside three others on the same rows, none of which took part in a fit.

Splits: ``shape`` (one shape in four), ``model`` (whole models out of the experts' fit), ``size`` (the largest sizes),
``device`` (A100, H100 and H200 fitted, B200 predicted from its datasheet). Methods: ``predictor``; ``tuned`` (roofline
with fitted constants); ``plain`` (peaks alone); ``nearest`` (the measured tables, interpolated from the nearest rows).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from tensorcast.calibrate.kernel_models import residual, unseen_devices
from tensorcast.calibrate.kernel_models.unseen_models import Experts
from tensorcast.calibrate.measured_devices import read_device
from tensorcast.calibrate.measured_tables import Key, MeasuredKernel, MeasuredSystem, held_out
from tensorcast.cost.kernels.device_model import LINES, DeviceModel, widened
from tensorcast.cost.kernels.formula import KernelFormula, formula_of
from tensorcast.cost.kernels.lattice import SIDES
from tensorcast.cost.kernels.predictor import Predictor, predictor_for
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.store import load_device
from tensorcast.validate.accuracy.causes import Table, leading, table_of

METHODS = ("predictor", "tuned", "nearest", "plain")

UNTOLD = ("ruled", "untold")
"""Beside them of models left out: whose kernel runs taken from the engine's own rules, and from most other models."""

NEIGHBOURS = 4
"""Measured rows that an interpolated one is averaged from, nearer ones weighing more."""

FITTED_ON, LEFT_OUT_DEVICE = ("a100-sxm", "h100-sxm", "h200-sxm"), "b200-sxm"

MODEL_DEVICES = ("h100-sxm", "h200-sxm", "b200-sxm")

SIZE_DEVICE = "h100-sxm"
"""How fast intervals widen outside the data was settled on others."""

SIZE_ROWS, SIZE_FITTED, SIZE_TESTED = 800, 5000, 1500
"""Fewest rows of a kernel whose largest sizes are left out, and the most that are fitted and predicted."""

SIZE_SHARE = 0.7
"""Share of the values of a size, from the least up, that stay in the fit."""


def nearest(train: MeasuredKernel, seconds: np.ndarray, test: MeasuredKernel) -> np.ndarray:
    """log seconds of the nearest measured rows, sizes on a log scale, averaged by inverse distance."""
    from sklearn.neighbors import KNeighborsRegressor

    def scaled(rows: MeasuredKernel) -> np.ndarray:
        return np.stack([np.log2(np.maximum(v, 0.0) + 1.0) if n != "skew" else 8.0 * v
                         for n, v in rows.columns.items()], axis=1)

    model = KNeighborsRegressor(min(NEIGHBOURS, len(train)), weights="distance")
    return np.exp(model.fit(scaled(train), np.log(seconds)).predict(scaled(test)))


def plain_roofline(physics: KernelFormula, device: DeviceProfile) -> np.ndarray:
    """Peaks alone; a collective's bytes on the wire at link speed."""
    if "log_wire" in physics.features:
        return np.exp2(physics.features["log_wire"]) / float(device.interconnect[0].bandwidth_bytes_per_s)
    return physics.floor


def _rows(
    split: str, device: str, rows: MeasuredKernel, held: np.ndarray, **predicted: np.ndarray
) -> pd.DataFrame:
    key, seconds = rows.key, rows.seconds
    errors = {name: np.abs(values / seconds - 1.0).astype(np.float32) for name, values in predicted.items()}
    family, dtype, engine, variant = key
    ratio, size = predicted["predictor"] / seconds, rows.columns[leading(key[0])]
    return pd.DataFrame({**errors, "seconds": seconds, "held": held, "ratio": ratio, "size": size}).assign(
        split=split, device=device, family=family, dtype=dtype, engine=engine, variant=variant
    )


def by_shape(system: MeasuredSystem, device: DeviceProfile) -> Iterator[pd.DataFrame]:
    """Shapes that the shipped model has not seen."""
    for key, rows in sorted(system.kernels.items()):
        predictor = predictor_for(device, key[2])
        out = held_out(key[0], rows.columns)
        if len(rows) < residual.FEWEST or not out.any() or out.all() or predictor.model is None:
            continue
        if key not in predictor.model.kernels:
            continue
        train, test = rows.take(~out), rows.take(out)
        physics = formula_of(key[0], key[1], key[3], test.columns, device, engine=key[2])
        found = predictor.price(key[0], key[1], key[3], test.columns)
        held = residual.held_across(found.seconds, np.log(test.seconds / found.seconds))
        yield _rows(
            "shape", device.name, test, held, predictor=found.seconds, tuned=physics.seconds,
            nearest=nearest(train, train.seconds, test), plain=plain_roofline(physics, device),
        )


def by_model(system: MeasuredSystem, device: DeviceProfile, experts: Experts) -> Iterator[pd.DataFrame]:
    """Whole models (width, expert width, top-k, experts) left out of the experts' fit."""
    for key, rows in sorted(system.kernels.items()):
        if not residual.carried(key) or len(rows) < residual.FEWEST:
            continue
        physics = formula_of(key[0], key[1], key[3], rows.columns, device, engine=key[2])
        found = experts.left_out(key)
        if found is None:
            continue
        lines = np.unique(np.stack([rows.columns[n] for n in LINES[key[0]]]), axis=1, return_inverse=True)[1].ravel()
        near, held = np.full(len(rows), np.nan), np.zeros(len(rows), dtype=bool)
        for one in np.unique(found.fold):
            test = found.rows[found.fold[found.rows] == one]
            train = np.flatnonzero(found.fold != one)
            near[test] = nearest(rows.take(train), rows.seconds[train], rows.take(test))
            at, others = found.fold[found.rows] == one, found.fold[found.rows] != one
            # the interval of the other models, as wide as their number allows
            ends = np.quantile(found.errors[others], residual.QUANTILES)
            low, high = widened(float(ends[0]), float(ends[1]), len(np.unique(lines[found.rows[others]])))
            held[test] = (found.errors[at] >= low) & (found.errors[at] <= high)
        at, seconds = found.rows, rows.seconds[found.rows]
        predicted = np.maximum(seconds * np.exp(-found.errors), physics.floor[at])
        yield _rows(
            "model", device.name, rows.take(at), held[at], predictor=predicted, tuned=physics.seconds[at],
            nearest=near[at], plain=physics.floor[at],
            **{name: seconds * np.exp(-errors) for name in UNTOLD if (errors := getattr(found, name)) is not None},
        )


def by_size(system: MeasuredSystem, device: DeviceProfile) -> Iterator[pd.DataFrame]:
    """The largest values of one size after the other left out of a kernel's fit: how it goes on outside its data. The
    size stands as the variant."""
    for key, rows in sorted(system.kernels.items()):
        if key[3] or len(rows) < SIZE_ROWS or key[0] not in SIDES:
            continue
        for name in (side for side in SIDES[key[0]] if side not in LINES.get(key[0], ())):
            values = np.unique(rows.columns[name])
            out = rows.columns[name] > values[int(len(values) * SIZE_SHARE)]
            draw = np.random.default_rng(0)
            known, beyond = (draw.permutation(np.flatnonzero(at)) for at in (~out, out))
            if len(values) < 6 or len(beyond) < residual.FEWEST:
                continue
            kernel = residual.fit_kernel(rows.take(known[:SIZE_FITTED]), device)
            test = rows.take(beyond[:SIZE_TESTED])
            found = Predictor(device, key[2], DeviceModel(device.name, {key: kernel})).price(*key[:2], "", test.columns)
            physics = formula_of(*key[:2], "", test.columns, device, engine=key[2])
            held = (found.low <= test.seconds) & (test.seconds <= found.high)
            yield _rows(
                "size", device.name, test, held, predictor=found.seconds, tuned=physics.seconds,
                nearest=np.full(len(test), np.nan), plain=physics.floor,
            ).assign(variant=name)


def by_device(where: Mapping[str, Path]) -> Iterator[pd.DataFrame]:
    """The left-out device from its datasheet and from what the fitted devices need over theirs."""
    found, architectures = {}, {}
    for name in (*FITTED_ON, LEFT_OUT_DEVICE):
        device = load_device(name)
        system = read_device(where[name], device, unseen_devices.FAMILIES)
        found[name], architectures[name] = unseen_devices.sampled(system, device), device.architecture
    model = unseen_devices.fit_unseen_devices({name: found[name] for name in FITTED_ON}, architectures)
    device = unseen_devices.bare(load_device(LEFT_OUT_DEVICE))
    for key, (rows, physics, _) in found[LEFT_OUT_DEVICE].items():
        estimate = Predictor(device, key[2], model).price(key[0], key[1], "", rows.columns)
        held = (estimate.low <= rows.seconds) & (rows.seconds <= estimate.high)
        siblings = [part for name in FITTED_ON if (part := found[name].get(key)) is not None]
        near = np.full(len(rows), np.nan)
        if siblings:  # the last fitted device's table, taken as it is
            near = nearest(siblings[-1][0], siblings[-1][0].seconds, rows)
        yield _rows(
            "device", LEFT_OUT_DEVICE, rows, held, predictor=estimate.seconds, tuned=physics.seconds,
            nearest=near, plain=physics.floor,
        )


def compare(where: Mapping[str, Path]) -> tuple[pd.DataFrame, dict[tuple[str, Key], Table]]:
    """One row per held-out measurement and split: every method's |predicted / measured - 1|, whether the 80 % interval
    held, and what was measured; and by device and kernel what the measured table itself shows. ``where``: devices, and
    the folder of what was measured on each."""
    parts: list[pd.DataFrame] = []
    shown: dict[tuple[str, Key], Table] = {}
    for name, folder in where.items():
        device = load_device(name)
        system = read_device(folder, device)
        experts = Experts(system, device)
        parts += by_shape(system, device)
        if name in MODEL_DEVICES:
            parts += by_model(system, device, experts)
        if name == SIZE_DEVICE:
            parts += by_size(system, device)
        for key, rows in system.kernels.items():
            in_fit = int((~held_out(key[0], rows.columns)).sum())
            shown[name, key] = table_of(rows, in_fit, experts if residual.carried(key) else None)
    if {*FITTED_ON, LEFT_OUT_DEVICE} <= set(where):
        parts += by_device(where)
    return pd.concat(parts, ignore_index=True), shown
