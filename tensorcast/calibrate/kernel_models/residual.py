"""Fit what physics misses: per kernel a small boosted-tree residual over log(measured / formula), with its intervals.

One shape in four, chosen by a hash of the shape alone, is kept out of every fit; intervals and errors come from those
rows, and for shapes that were not measured from fits that leave whole models (or weight sizes) out. Needs catboost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from tensorcast.calibrate.constants.errors import errors as fit_errors
from tensorcast.calibrate.kernel_models.boosting import grow
from tensorcast.calibrate.kernel_models.unseen_models import FAMILY, FOLDS, Experts, LeftOut
from tensorcast.calibrate.measured_tables import Key, MeasuredKernel, MeasuredSystem, held_out
from tensorcast.cost.kernels.device_model import CONFIGURATION, LINES, SOURCE_OF, DeviceModel, Kernel
from tensorcast.cost.kernels.formula import KernelFormula, constants_digest, formula_of
from tensorcast.cost.kernels.triton_tiles import TILES, of_library
from tensorcast.profiles.device import DeviceProfile

SIZE = (
    (15000, 240, 6, 0.16), (6000, 200, 6, 0.17), (2000, 160, 6, 0.17), (500, 130, 5, 0.15), (150, 120, 5, 0.14),
    (0, 120, 3, 0.15),
)
"""(rows from which, trees, depth, learning rate): capacity that the rows can pay for."""

FEWEST = 24
"""Fewer rows than this get no residual."""

LEVEL = 0.08
"""log of the factor from which on a configuration's own level is worth remembering: repeats differ by half of it."""

LEVEL_ROWS = 2000

NEW_ROWS = 4000
"""Rows of the fits that leave whole shapes out (their errors need no more)."""

BINS = 5
FEWEST_IN_BIN = 40

QUANTILES = (0.1, 0.9)

NEW_LINES = {"gemm": ("n", "k"), "attention_prefill": ("q_heads", "kv_heads", "head_dim", "window"),
             "attention_decode": ("q_heads", "kv_heads", "head_dim", "window"), "mla_prefill": ("q_heads",),
             "mla_decode": ("q_heads",), "mla_prefill_module": ("q_heads",), "mla_decode_module": ("q_heads",),
             "quantize": ("k",), "moe_exchange": ("hidden", "topk", "experts")}
"""What is left out as a whole to see how a kernel carries over to a shape that was not measured."""


def capacity_for(rows: int) -> tuple[int, int, float]:
    """Trees, depth and learning rate for so many rows."""
    return next((trees, depth, rate) for least, trees, depth, rate in SIZE if rows >= least)


def _rows(features: dict[str, np.ndarray], at: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[at] for name, values in features.items()}


def _lines(rows: MeasuredKernel) -> np.ndarray:
    """A number per row: which model, weight size or head layout it belongs to."""
    family = rows.key[0]
    names = [n for n in (NEW_LINES.get(family) or LINES.get(family) or ("ranks",)) if n in rows.columns]
    if not names:
        return np.zeros(len(rows), dtype=int)
    table = np.stack([rows.columns[name] for name in names], axis=1)
    return np.unique(table, axis=0, return_inverse=True)[1].ravel()


def left_out(rows: MeasuredKernel, physics: KernelFormula, capacity: tuple[int, int, float]) -> LeftOut | None:
    """Leave out one part of the lines after the other. None where there are not two lines."""
    lines = _lines(rows)
    kinds = np.random.default_rng(0).permutation(lines.max() + 1)
    if len(kinds) < 2:
        return None
    fold = kinds[lines] % min(FOLDS, len(kinds))
    keep = np.random.default_rng(1).permutation(len(rows))[:NEW_ROWS]
    target = np.log(rows.seconds / physics.seconds)
    counts = [int(capacity[0] * share) for share in (0.0, 0.1, 0.3, 0.6, 1.0)]
    found = {count: np.full(len(rows), np.nan) for count in counts}
    for one in range(min(FOLDS, len(kinds))):
        train, test = keep[fold[keep] != one], keep[fold[keep] == one]
        if not len(train) or not len(test):
            continue
        trees = grow(_rows(physics.features, train), target[train], *capacity)
        for count in counts:
            found[count][test] = target[test] - trees.values(_rows(physics.features, test), count) if trees.names else (
                target[test] - trees.bias
            )
    scores = {count: float(np.nanmean(np.minimum(np.abs(values), 0.5))) for count, values in found.items()}
    best = min(counts, key=lambda count: scores[count])
    at = np.flatnonzero(~np.isnan(found[best]))
    return LeftOut(at, found[best][at], fold, best)


def _bins(seconds: np.ndarray, errors: np.ndarray) -> tuple[list[float], list[float], list[float]]:
    """Edges in log2 seconds, and the 10 % and 90 % quantiles of the errors between them."""
    count = int(np.clip(len(errors) // FEWEST_IN_BIN, 1, BINS))
    log = np.log2(seconds)
    edges = np.unique(np.quantile(log, np.arange(1, count) / count)) if count > 1 else np.zeros(0)
    part = np.searchsorted(edges, log)
    ends = [np.quantile(errors[part == i], QUANTILES) if (part == i).any() else np.zeros(2)
            for i in range(len(edges) + 1)]
    return edges.round(4).tolist(), *(np.round([end[i] for end in ends], 5).tolist() for i in (0, 1))


def _boxes(rows: MeasuredKernel) -> dict[str, tuple[float, float]]:
    return {name: (float(v.min()), float(v.max())) for name, v in rows.columns.items() if name != "source"}


def _sources(rows: MeasuredKernel) -> tuple[tuple[float, ...], ...]:
    """Which library ran which model, where the tables say it."""
    source = rows.columns.get("source")
    if source is None or not source.any():
        return ()
    sizes = [*(rows.columns[name] for name in SOURCE_OF), rows.columns["moe_ep"] > 1, source]
    return tuple(tuple(float(v) for v in line) for line in np.unique(np.stack(sizes, axis=1), axis=0))


def _seen(rows: MeasuredKernel, lines: tuple[str, ...]) -> tuple[tuple[float, ...], ...]:
    if not lines:
        return ()
    table = np.unique(np.stack([rows.columns[name] for name in lines], axis=1), axis=0)
    return tuple(tuple(float(v) for v in line) for line in table)


def level_table(rows: MeasuredKernel, errors: np.ndarray, train: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Configurations whose rows in the fit lie off by :data:`LEVEL` or more together: their sizes, the library where
    models ran with several, and by how much (the median, drawn towards zero where rows are few)."""
    names: tuple[str, ...] = CONFIGURATION.get(rows.key[0], ())
    if not names or len(rows) < LEVEL_ROWS:
        return ()
    sources = pd.DataFrame(_sources(rows))
    if len(sources) and sources[[*range(len(SOURCE_OF) + 1)]].duplicated().any():
        names = (*names, "source")
    frame = pd.DataFrame({name: rows.columns[name] for name in names}).assign(error=errors)[train]
    found = frame.groupby(list(names))["error"].agg(["median", "size"])
    found["level"] = found["median"] * found["size"] / (found["size"] + 2.0)
    far = found[(found["level"].abs() >= LEVEL) & (found["size"] >= 3)]
    table = far["level"].reset_index().to_numpy(float)
    return tuple((*(float(v) for v in line[:-1]), round(float(line[-1]), 3)) for line in table)


def fit_kernel(rows: MeasuredKernel, device: DeviceProfile, experts: Experts | None = None) -> Kernel:
    """Residual, intervals and errors of one kernel from all its measured rows. ``experts``: of grouped GEMMs, what
    carries over to other models is learnt from them."""
    family, dtype, engine, variant = rows.key
    physics = formula_of(family, dtype, variant, rows.columns, device, engine=engine)
    if variant:  # kernels of a layout of their own are not Triton's
        plain = {name: values for name, values in physics.features.items() if name not in TILES}
        physics = replace(physics, tell=lambda: plain)
    target, sources, features = np.log(rows.seconds / physics.seconds), _sources(rows), physics.features
    if sources:
        features = of_library(features, rows.columns["source"])
    out = held_out(family, rows.columns)
    if out.all() or not out.any():
        out = np.arange(len(rows)) % 4 == 0
    capacity = capacity_for(int((~out).sum()))
    trees = capacity[0]
    grown = grow(_rows(features, ~out), target[~out], *capacity)
    correction = grown.values(features) if grown.names else np.full(len(rows), grown.bias)
    levels = level_table(rows, target - correction, ~out)
    kernel = Kernel(
        *rows.key, trees=grown, box={}, seen=(), edges=(), low=(), high=(), new_low=0.0, new_high=0.0,
        new_trees=trees, levels=levels, sources=sources,
    )
    predicted = np.maximum(physics.seconds * np.exp(correction + kernel.level(rows.columns)), physics.floor)
    errors = np.log(rows.seconds / predicted)
    edges, low, high = _bins(predicted[out], errors[out])
    # a probe is priced whenever the model is read: one of balanced routing needs no table of busiest ranks
    even = out & (rows.columns["skew"] == 0) if "skew" in rows.columns else out
    first = int(np.flatnonzero(even if even.any() else out)[0])
    new = left_out(rows, physics, capacity) if experts is None else experts.left_out(rows.key)
    ruled: tuple[float, ...] = ()
    report: dict[str, Any] = {"points": int((~out).sum()), "held_out": int(out.sum())}
    report |= fit_errors(predicted[out], rows.seconds[out]) | {"coverage": _coverage(predicted[out], errors[out])}
    probe = [*_boxes(rows), *(["source"] if sources else [])]
    report |= {"probe": {name: float(rows.columns[name][first]) for name in probe}}
    report |= {"probe_formula_s": float(physics.seconds[first]), "probe_s": float(predicted[first])}
    report |= {"formula_median_error": fit_errors(physics.seconds[out], rows.seconds[out])["median_error"]}
    if new is None:
        new_low, new_high, new_trees = 2.0 * min(low), 2.0 * max(high), trees
    else:
        # who asks for a model that was not measured may not know whose kernel would run
        blind = new.errors if new.untold is None else new.untold
        new_low, new_high = (float(v) for v in np.quantile(blind, QUANTILES))
        if new.ruled is not None:
            ruled = tuple(round(float(v), 5) for v in np.quantile(new.ruled, QUANTILES))
        new_trees = new.trees or trees
        size = np.exp(-new.errors)
        found = fit_errors(size, np.ones_like(size))
        report |= {"new_shape_median_error": found["median_error"], "new_shape_p90_error": found["p90_error"]}
    return Kernel(
        *rows.key, trees=grown, box=_boxes(rows), seen=_seen(rows, LINES[family]), edges=tuple(edges),
        low=tuple(low), high=tuple(high), new_low=round(new_low, 5), new_high=round(new_high, 5), new_trees=new_trees,
        levels=levels, sources=sources, extrapolated=experts.trees(rows.key) if experts else None, ruled=ruled,
        constants=constants_digest(family, dtype, device, engine), report=report,
    )


def held_across(predicted: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Whether an 80 % interval from one half of the held-out rows holds each error of the other half."""
    half, inside = np.arange(len(errors)) % 2 == 0, np.zeros(len(errors), dtype=bool)
    for known in (half, ~half):
        if known.any() and not known.all():
            edges, low, high = _bins(predicted[known], errors[known])
            part = np.searchsorted(edges, np.log2(predicted[~known]))
            inside[~known] = (errors[~known] >= np.asarray(low)[part]) & (errors[~known] <= np.asarray(high)[part])
    return inside


def _coverage(predicted: np.ndarray, errors: np.ndarray) -> float:
    return round(float(held_across(predicted, errors).mean()), 3) if len(errors) >= 20 else float("nan")


def carried(key: Key) -> bool:
    """Whether a kernel has trees of their own for models that were not measured."""
    return key[0] == FAMILY and not key[3]


def fit_kernels(system: MeasuredSystem, device: DeviceProfile) -> Iterator[Kernel]:
    """Every kernel with enough rows, of families that a model can tell where it may be asked; the formula of others
    stands alone."""
    experts = Experts(system, device)
    for key in sorted(system.kernels):
        if key[0] in LINES and len(system.kernels[key]) >= FEWEST:
            yield fit_kernel(system.kernels[key], device, experts if carried(key) else None)


def fit_model(system: MeasuredSystem, device: DeviceProfile, provenance: str) -> DeviceModel:
    """The kernel model of one device."""
    kernels = {(k.family, k.dtype, k.engine, k.variant): k for k in fit_kernels(system, device)}
    return DeviceModel(device.name, kernels, provenance)
