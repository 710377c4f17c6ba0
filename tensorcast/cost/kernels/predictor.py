"""Kernel times with an interval and a word on where they come from: physics, and a fitted residual where it pays.

``predict_kernels`` prices a frame of shapes; :class:`Predictor` one kernel's arrays at a time, for pricing steps.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorcast.cost.evidence import LEVELS, NORMAL_80
from tensorcast.cost.kernels.device_model import CONFIGURATION, UNTUNED, DeviceModel, Kernel, read_model
from tensorcast.cost.kernels.expert_load import skew_of
from tensorcast.cost.kernels.formula import KernelFormula, formula_of
from tensorcast.cost.kernels.lattice import SIDES, Lattice
from tensorcast.cost.kernels.monotone import coordinates, middle_of
from tensorcast.cost.kernels.triton_tiles import of_library
from tensorcast.cost.kernels.vocabulary import Columns
from tensorcast.cost.roofline import NEAREST
from tensorcast.cost.work import Size
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.store import load_device, profile_roots

if TYPE_CHECKING:
    import pandas as pd


__all__ = ["Estimate", "Predictor", "predict_kernels", "predictor_for"]
PARTS = ("seconds", "low", "high", "level", "factor")

TRANSFERRED = "other-devices"
"""Name of the model fitted over all measured devices, for those of their vendor that were not."""

ASKED_AGAIN = 0.5
"""Share of the calls up to which the formula is asked again for some of them, rather than told of all."""

LOAD = ("rows", "hit")
"""Columns that give the busiest rank's load of experts."""

BEST_OF = ("grouped_gemm", "attention_decode", "mla_prefill", "mla_decode")
"""Families whose engines ran kernels of different generations on the measured devices: slow ones say little about a
new device."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of every call, the ends of an 80 % interval, where they come from (an index into :data:`LEVELS`), and
    ``factor``, by which the fitted residual changed the physics formula's seconds."""

    seconds: np.ndarray
    low: np.ndarray
    high: np.ndarray
    level: np.ndarray
    factor: np.ndarray

    @property
    def evidence(self) -> np.ndarray:
        """``measured``, ``calibrated`` or ``datasheet`` per call."""
        return np.array(LEVELS, dtype=object)[self.level]

    @property
    def error(self) -> np.ndarray:
        """Median relative error that the interval stands for."""
        return np.log(self.high / self.low) / 2.0 / NORMAL_80


class Predictor:
    """Prices kernels of one device under one engine: as measured, or as ``served``, where kernels are tuned."""

    def __init__(self, device: DeviceProfile, engine: str, model: DeviceModel | None, served: bool = False) -> None:
        self.device, self.engine, self.model, self.served = device, engine, model, served
        self._middles: dict[tuple[str, ...], float] = {}
        self._lattices: dict[tuple[str | bool, ...], Lattice] = {}

    def estimate(self, family: str, dtype: str, variant: str = "", **sizes: Size) -> Estimate:
        """One kernel's calls. ``sizes`` as in :data:`SIZES`, scalars or arrays of one length.

        Missing ones: batch 1, past 0, window 0, bf16 cache, moe_tp and moe_ep 1, gated, slots as experts, balanced.
        Of ``grouped_gemm`` the load may be given as ``rows`` and ``hit`` instead of being worked out from tokens.
        """
        given = {**DEFAULTS.get(family, {}), **sizes}
        if family == "grouped_gemm":
            given.setdefault("slots", given["experts"])
            given["skew"] = skew_of(given.pop("distribution"))
        arrays = np.broadcast_arrays(*(np.atleast_1d(np.asarray(value, dtype=float)) for value in given.values()))
        return self.price(family, dtype, variant, dict(zip(given, arrays, strict=True)))

    def price(self, family: str, dtype: str, variant: str, columns: Columns) -> Estimate:
        """One kernel's calls from columns of equal length."""
        if family == "moe_exchange" and variant.endswith(":both"):
            return self._both_ways(dtype, variant.removesuffix(":both"), columns)
        if self.model is not None and self.model.device == TRANSFERRED:
            return self._from_other_devices(family, dtype, variant, columns)
        kernel = self.model.find(family, dtype, self.engine, variant) if self.model else None
        engine = kernel.engine if kernel is not None else self.engine
        physics = formula_of(family, dtype, variant, columns, self.device, engine)
        if kernel is None:
            return _without_residual(physics)
        return self._with_residual(kernel, physics, columns, lambda c: formula_of(
            family, dtype, variant, c, self.device, engine), variant)

    def _with_residual(
        self, kernel: Kernel, physics: KernelFormula, columns: Columns, formula: Callable[[Columns], KernelFormula],
        variant: str = "",
    ) -> Estimate:
        """Where it was measured what was; else times that grow with size (:mod:`tensorcast.cost.kernels.lattice`)."""
        beyond, known = kernel.beyond(columns), kernel.measured_shape(columns)
        inside = known & (beyond <= 0)
        measured = inside & ~self._untuned(kernel.level(columns)) & (variant == kernel.variant)
        measured &= kernel.engine in (self.engine, "any")
        seconds = np.empty(len(beyond))
        for at, price in ((inside, self._fitted), (~inside, partial(self._carried, formula))):
            if at.all():
                seconds = price(kernel, physics, columns, known)
            elif at.any():
                some = _some(columns, at)
                part = formula(some) if at.mean() < ASKED_AGAIN else physics.take(at)
                seconds[at] = price(kernel, part, some, known[at])
        ends = kernel.interval(seconds, measured, beyond, kernel.stated(columns))
        return _estimate(seconds, physics, ends, np.where(measured, 2, 1), seconds / physics.seconds)

    def _fitted(
        self, kernel: Kernel, physics: KernelFormula, columns: Columns, known: np.ndarray,
        features: Columns | None = None,
    ) -> np.ndarray:
        """Seconds with the residual of the measured sizes; ``features``: of others than the calls' own."""
        told = kernel.features(physics.features, columns) if features is None else features
        level = np.where(known, kernel.level(columns), 0.0)
        correction = kernel.correction(told, known) + np.where(self._untuned(level), 0.0, level)
        return np.maximum(physics.seconds * np.exp(correction), physics.floor)

    def _untuned(self, level: np.ndarray) -> np.ndarray:
        """Whether a configuration's level is that of a kernel that a server would have tuned."""
        return (level > UNTUNED) & self.served

    def _carried(
        self, formula: Callable[[Columns], KernelFormula], kernel: Kernel, physics: KernelFormula, columns: Columns,
        known: np.ndarray,
    ) -> np.ndarray:
        """Seconds outside the data. Where experts' load was given, its formula counts, with the residual for tokens as
        the routing spreads them."""
        own = {name: values for name, values in columns.items() if name not in LOAD}
        seconds = np.empty(len(known))
        for lines in (True, False):
            at = known == lines
            if at.any():
                seconds[at] = np.exp(self._lattice(kernel, formula, lines).log_seconds(_some(own, at)))
        if len(own) < len(columns):
            seconds = physics.seconds * seconds / formula(own).seconds
        return np.maximum(seconds, physics.floor)

    def _lattice(self, kernel: Kernel, formula: Callable[[Columns], KernelFormula], known: bool) -> Lattice:
        """The one on which a kernel is carried beyond its data; ``known``: of lines that were measured."""
        key = kernel.family, kernel.dtype, kernel.engine, kernel.variant, known
        if key not in self._lattices:
            def node(sizes: Columns) -> np.ndarray:
                by_formula = formula(sizes)
                # a node may hold the sizes of a measured model, which says nothing about others
                lines = kernel.measured_shape(sizes) & (known or kernel.family not in CONFIGURATION)
                held = _held(kernel, by_formula, sizes, formula)
                return np.log(self._fitted(kernel, by_formula, sizes, lines, held))

            every = SIDES[kernel.family].items()
            sides = {name: nodes for name, nodes in every if not (known and name in kernel.lines)}
            self._lattices[key] = Lattice(sides, kernel.box, node)
        return self._lattices[key]

    def _from_other_devices(self, family: str, dtype: str, variant: str, columns: Columns) -> Estimate:
        """No data of this device: what its vendor's others need over the same formula. Where engines differ for the
        kernels that they happen to run there (:data:`BEST_OF`), the fastest engine's."""
        assert self.model is not None
        engines = ("trtllm", "vllm", "sglang") if family in BEST_OF else (self.engine,)
        physics = formula_of(family, dtype, variant, columns, self.device, self.engine)
        best: Estimate | None = None
        for engine in engines:
            nearest = (self.model.find(family, name, engine, "") for name in (dtype, *NEAREST.get(dtype, ())))
            kernel = next((found for found in nearest if found is not None), None)
            if kernel is None or variant or (family in BEST_OF and kernel.engine != engine):
                continue
            middle = self._middle(kernel, dtype)
            told = coordinates(family, columns, physics, self.device, middle)
            factor = kernel.monotone_correction(told, (physics.features["log_seconds"] - middle) * np.log(2.0))
            seconds = np.maximum(physics.seconds * np.exp(factor), physics.floor)
            none = np.zeros(len(seconds), dtype=bool)
            ends = kernel.interval(seconds, none, kernel.beyond(columns), none)
            found = _estimate(seconds, physics, ends, none.astype(int), seconds / physics.seconds)
            if best is None:
                best = found
            else:
                faster = found.seconds < best.seconds
                pairs = ((getattr(found, part), getattr(best, part)) for part in PARTS)
                best = Estimate(*(np.where(faster, new, old) for new, old in pairs))
        return _without_residual(physics) if best is None else best

    def _middle(self, kernel: Kernel, dtype: str) -> float:
        """What a kernel's formula seconds count from on this device (log2)."""
        key = kernel.family, kernel.dtype, kernel.engine, dtype
        if key not in self._middles:
            self._middles[key] = middle_of(kernel.family, dtype, kernel.probes, self.device, self.engine)
        return self._middles[key]

    def _both_ways(self, dtype: str, backend: str, columns: Columns) -> Estimate:
        """Dispatch and combine, one after the other: intervals add, as one kernel's errors move together."""
        there = self.price("moe_exchange", dtype, f"{backend}:dispatch", columns)
        bf16 = np.full_like(columns["copy_bytes"], 2.0)
        back = self.price("moe_exchange", dtype, f"{backend}:combine", {**columns, "copy_bytes": bf16})
        return Estimate(
            there.seconds + back.seconds, there.low + back.low, there.high + back.high,
            np.minimum(there.level, back.level), (there.factor + back.factor) / 2.0,
        )


DEFAULTS: dict[str, dict[str, Any]] = {
    "gemm": {"batch": 1.0},
    "grouped_gemm": {"moe_tp": 1.0, "moe_ep": 1.0, "gated": 1.0, "distribution": "balanced"},
    "attention_prefill": {"past": 0.0, "window": 0.0, "kv_bytes": 2.0},
    "attention_decode": {"new": 1.0, "window": 0.0, "kv_bytes": 2.0},
    "mla_prefill": {"past": 0.0, "kv_bytes": 2.0}, "mla_decode": {"new": 1.0, "kv_bytes": 2.0},
    "moe_exchange": {"nodes": 1.0, "sms": 20.0, "copy_bytes": 2.0},
}


def _held(
    kernel: Kernel, physics: KernelFormula, columns: Columns, formula: Callable[[Columns], KernelFormula]
) -> Columns:
    """Features of the calls, beyond the measured sizes those of the nearest ones."""
    outside, features = np.flatnonzero(kernel.beyond(columns) > 0), kernel.features(physics.features, columns)
    if len(outside):
        nearest = kernel.inside(_some(columns, outside))
        source = features["source"][outside] if "source" in features else None
        held = of_library(formula(nearest).features, source)
        features = dict(features)
        for name in kernel.asked() & held.keys():
            features[name] = features[name].copy()
            features[name][outside] = held[name]
    return features


def _some(columns: Columns, at: np.ndarray) -> Columns:
    return {name: values[at] for name, values in columns.items()}


def _estimate(
    seconds: np.ndarray, physics: KernelFormula, ends: tuple[Any, Any], level: np.ndarray, factor: np.ndarray
) -> Estimate:
    """With an interval by the logs of its ends over ``seconds``, that goes no lower than physics allows."""
    low, high = (seconds * np.exp(end) for end in ends)
    return Estimate(seconds, np.maximum(low, np.minimum(physics.floor, seconds)), high, level, factor)


def _without_residual(physics: KernelFormula) -> Estimate:
    width = NORMAL_80 * physics.error
    level = np.full(len(physics.seconds), LEVELS.index(physics.evidence))
    seconds = np.maximum(physics.seconds, physics.floor)
    return _estimate(seconds, physics, (-width, width), level, np.ones(len(seconds)))


@lru_cache(maxsize=32)
def _model_at(path: Path, _changed: float) -> DeviceModel:
    return read_model(path)


def model_path(device: str) -> Path | None:
    """Where the kernel model of a device is kept, the user's own before the shipped one."""
    for root in profile_roots():
        path = root / "calibration" / f"{device}.npz"
        if path.is_file():
            return path
    return None


MOST_PREDICTORS = 256
"""Predictors that are kept."""

_predictors: dict[tuple[int, str, bool], Predictor] = {}
"""By identity of the device, which the predictor keeps alive."""


def predictor_for(device: DeviceProfile, engine: str = "any", served: bool = False) -> Predictor:
    """The predictor of a device under an engine; a model file is read once. ``served``: of kernels as an engine tunes
    them, also where they were measured untuned.

    A device without calibration is priced by the formula with datasheet fractions, and if it is NVIDIA's by what the
    measured NVIDIA devices need over that.
    """
    measured = device.calibration is not None
    path = model_path(device.name if measured else TRANSFERRED)
    if path is None or not (measured or device.vendor == "NVIDIA"):
        return Predictor(device, engine, None, served)
    model = _model_at(path, os.stat(path).st_mtime)
    key = id(device), engine, served
    known = _predictors.get(key)
    if known is None or known.device is not device or known.model is not model:
        if len(_predictors) >= MOST_PREDICTORS:
            _predictors.clear()
        known = _predictors[key] = Predictor(device, engine, model, served)
    return known


def predict_kernels(frame: pd.DataFrame, *, device: str | DeviceProfile, engine: str | None = None) -> pd.DataFrame:
    """Seconds of every row's kernel, with an 80 % interval and evidence.

    ``frame``: a column ``family`` (one of :data:`SIZES`, or a measured table's name such as ``moe``) and the shape
    columns of its rows' families, in the measured tables' words (``num_tokens``, ``moe_ep_size``, ...) or ours. A
    column ``engine`` names the engine row by row where ``engine`` is not given. Returns the frame with ``seconds, low,
    high, evidence`` (``measured``: on or between measured points; ``calibrated``: a fitted model carries them further;
    ``datasheet``: nothing was measured). Raises :class:`InputError` for an unknown family, dtype or engine, a missing
    column, and sizes that no kernel has.

    ``measured`` seconds follow the measurements, also where a larger call was the faster one. The others never fall as
    a size of :data:`~tensorcast.cost.kernels.lattice.SIDES` grows, but where a head size or window is one that was
    measured, or where another engine's measurements stand in. None is under what peaks and links allow.
    """
    from tensorcast.cost.kernels.shape_checks import check_calls, engine_name
    from tensorcast.cost.kernels.shape_tables import calls_of

    profile = load_device(device) if isinstance(device, str) else device
    size = len(frame)
    seconds, low, high, level = np.zeros(size), np.zeros(size), np.zeros(size), np.zeros(size, dtype=int)
    if engine is None and "engine" in frame.columns:
        said = frame["engine"].astype(object).fillna("any").astype(str).reset_index(drop=True)
        parts = said.groupby(said).indices
    else:
        parts = {engine or "any": np.arange(size)}
    for name, rows in parts.items():
        predictor = predictor_for(profile, engine_name(str(name)))
        part = frame if len(rows) == size else frame.iloc[rows]
        for calls in calls_of(part):
            check_calls(calls, part)
            at = rows[calls.rows]
            found = predictor.price(calls.family, calls.dtype, calls.variant, calls.columns)
            seconds[at], low[at], high[at], level[at] = found.seconds, found.low, found.high, found.level
    return frame.assign(seconds=seconds, low=low, high=high, evidence=np.array(LEVELS, dtype=object)[level])
