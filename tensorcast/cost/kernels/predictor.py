"""Kernel times with an interval and a word on where they come from: a formula, and a fitted residual where it pays.

:class:`Predictor` prices one kernel's arrays at a time; :mod:`tensorcast.cost.kernels.frames` frames of shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorcast.cost.kernels.device_model import CONFIGURATION, LINES, UNPACKS, UNTUNED, DeviceModel, Kernel, read_model
from tensorcast.cost.kernels.estimates import (
    LENT_ERROR,
    PARTS,
    UNPACKS_ERROR,
    Estimate,
    borrowed,
    estimated,
    in_order,
    of_other_chip,
    without_residual,
)
from tensorcast.cost.kernels.expert_load import skew_of
from tensorcast.cost.kernels.formula import KernelFormula, formula_of
from tensorcast.cost.kernels.kept_answers import TRANSFERRED, model_path
from tensorcast.cost.kernels.lattice import SIDES, Lattice
from tensorcast.cost.kernels.monotone import coordinates, middle_of
from tensorcast.cost.kernels.triton_tiles import of_library
from tensorcast.cost.kernels.vocabulary import Columns, alike
from tensorcast.cost.roofline import NEAREST, UNMEASURED, constants_for
from tensorcast.cost.work import Array, Mask, Size
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.store import load_device

__all__ = ["Estimate", "Predictor", "from_other_devices", "predictor_for"]

LOAD = ("rows", "hit")
"""Columns that give the busiest rank's load of experts."""

BEST_OF = ("gemm", "grouped_gemm", "attention_decode", "mla_prefill", "mla_decode")
"""Families whose engines ran kernels of different generations on the measured devices: slow ones say little about a
new device."""

CARRIED = ("attention_prefill", *BEST_OF)
"""Families that are carried over from other devices."""


@dataclass(eq=False)
class Predictor:
    """Prices kernels of one device under one engine: as measured, or as ``served``, where kernels are tuned."""

    device: DeviceProfile
    engine: str
    model: DeviceModel | None
    served: bool = False
    lent: bool = field(init=False)
    _bare: Predictor | None = field(default=None, init=False, repr=False)
    _middles: dict[tuple[str, ...], float] = field(default_factory=dict, init=False, repr=False)
    _lattices: dict[tuple[str | bool, ...], Lattice] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.lent = self.device.timed_on not in ("", self.device.name)

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
        found = self._priced(family, dtype, variant, columns)
        if self.device.timed_on_other_chip:
            floor = formula_of(family, dtype, variant, columns, self.device, engine=self.engine).floor
            found = of_other_chip(found, floor)
        return found

    def _priced(self, family: str, dtype: str, variant: str, columns: Columns) -> Estimate:
        """:meth:`price`, as if what was timed had been on this device."""
        if self.model is not None and self.model.device == TRANSFERRED:
            return self._from_other_devices(family, dtype, variant, columns)
        kernel = self.model.find(family, dtype, self.engine, variant) if self.model else None
        if self.model is not None and kernel is not None and kernel.sources and "source" in columns:
            # of libraries that were not timed under this engine by the table where they were
            timed = {0.0, *(line[-1] for line in kernel.sources)}
            if UNPACKS in timed and not kernel.timed(UNPACKS, columns):
                timed -= {UNPACKS}
            others = sorted({*columns["source"].tolist()} - timed)
            asked = family, dtype, self.engine, variant
            lent = [(code, ran) for code in others if (ran := self.model.timed_with(code, asked, columns)) is not None]
            if lent:
                return self._lent(kernel, lent, (family, dtype, variant), columns)
            if (twin := kernel.twin(columns)).any():
                return self._as_its_twin(kernel, twin, (family, dtype, variant), columns)
        return self._by_kernel(kernel, family, dtype, variant, columns)

    def _as_its_twin(self, kernel: Kernel, twin: Array, name: tuple[str, str, str], columns: Columns) -> Estimate:
        """Calls of models that were timed with a kernel's ``twin``: as these took, times what other models' took by the
        one over the other."""
        there = self._by_kernel(kernel, *name, {**columns, "source": np.where(twin > 0, twin, columns["source"])})
        formula = partial(formula_of, *name, device=self.device, engine=kernel.engine)
        ours, theirs = (
            self._extrapolated(
                kernel, formula, {**columns, "source": source}, kernel.beyond(columns), measured_shape=False
            ) for source in (columns["source"], np.where(twin > 0, twin, columns["source"]))
        )
        times = ours.seconds / theirs.seconds
        seconds, least = there.seconds * times, formula(columns).floor
        ends = (np.where(twin > 0, seconds * end / ours.seconds, old) for end, old in (
            (ours.low, there.low), (ours.high, there.high)
        ))  # fmt: skip
        low, high = ends
        seconds = np.maximum(seconds, least)
        return Estimate(
            seconds, np.maximum(low, np.minimum(least, seconds)), high, np.where(twin > 0, 1, there.level),
            there.factor * seconds / there.seconds,
        )

    def _lent(
        self, own: Kernel, lent: Sequence[tuple[float, Kernel]], name: tuple[str, str, str], columns: Columns
    ) -> Estimate:
        """Experts of libraries that other engines' kernels were timed with, and the rest as if alone."""
        places, parts = list[NDArray[np.int_]](), list[Estimate]()
        for code, other in lent:
            places.append(np.flatnonzero(columns["source"] == code))
            some = {size: values[places[-1]] for size, values in columns.items()}
            by_own = formula_of(*name, some, self.device, engine=own.engine)  # what the asked one corrects
            there = self._by_kernel(other, name[0], other.dtype, name[2], some)
            dtypes = other.dtype != name[1]
            parts.append(borrowed(there, by_own, UNPACKS_ERROR if dtypes else LENT_ERROR, whole=dtypes))
        rest = np.isin(columns["source"], [code for code, _ in lent], invert=True)
        if rest.any():
            places.append(np.flatnonzero(rest))
            parts.append(self.price(*name, {size: values[rest] for size, values in columns.items()}))
        return in_order(parts, places)

    def _by_kernel(
        self, kernel: Kernel | None, family: str, dtype: str, variant: str, columns: Columns
    ) -> Estimate:
        """Calls of one kernel, or of none that is known."""
        if kernel is not None and kernel.engine == "any" and "moe_tp" in columns:
            # tables that time what one rank computes know a cut expert as a narrower one
            uncut = np.ones(len(columns["moe_tp"]))
            columns = columns | {"inter": columns["inter"] / columns["moe_tp"], "moe_tp": uncut}
        name = family, dtype, variant
        if kernel is None:
            by_formula = formula_of(*name, columns, self.device, engine=self.engine)
            if lender := self.lender(family, dtype, variant):
                theirs = formula_of(family, lender, variant, columns, self.device, engine=self.engine)
                by = by_formula.seconds / theirs.seconds if self.device.kin else 1.0  # kin tells the two apart
                return borrowed(self.price(family, lender, variant, columns).times(by), by_formula)
            if family not in CARRIED or not self.unmeasured(family, dtype, variant):
                return without_residual(by_formula)
            if self._bare is None:
                self._bare = from_other_devices(self.device, self.engine, self.served)
            found = self._bare.price(family, dtype, variant, columns)
            return replace(found, factor=found.seconds / by_formula.seconds)
        shape, outside = kernel.measured_shape(columns), kernel.beyond(columns)
        inside = outside <= 0
        kinds = [(np.flatnonzero(at), kind) for at, kind in (
            (shape & inside, (True, True)), (shape & ~inside, (True, False)), (~shape, (False, False))
        ) if at.any()]
        if len(kinds) == 1:
            return self._of_kind(kernel, name, columns, outside, kinds[0][1])
        return in_order([
            self._of_kind(kernel, name, {n: values[at] for n, values in columns.items()}, outside[at], kind)
            for at, kind in kinds
        ], [at for at, _ in kinds])

    def _of_kind(
        self, kernel: Kernel, name: tuple[str, str, str], columns: Columns, outside: Array, kind: tuple[bool, bool]
    ) -> Estimate:
        """Calls of one ``kind``: whether their shapes were measured, and whether their other sizes lie inside what was;
        by how much they lie ``outside``: :meth:`~tensorcast.cost.kernels.device_model.Kernel.beyond`."""
        measured_shape, inside = kind
        formula = partial(formula_of, *name, device=self.device, engine=kernel.engine)
        if measured_shape and inside:
            by_formula, level = formula(columns), kernel.level(columns)
            # measured are calls whose own kernel was, and ran as a server would run it
            own = name[2] == kernel.variant and kernel.engine in (self.engine, "any") and not self.lent
            measured = np.full(len(level), own) & ~(self.served & (level > UNTUNED))
            features = of_library(by_formula.features, kernel.library(columns))
            seconds = self._with_residual(kernel, by_formula, columns, features, np.ones(len(level), dtype=bool))
            ends = kernel.interval(seconds, columns, measured, outside)
            return estimated(seconds, by_formula, ends, np.where(measured, 2, 1))
        found = self._extrapolated(kernel, formula, columns, outside, measured_shape=measured_shape)
        if not measured_shape or not (longer := kernel.longer(columns)).any():
            return found
        # longer contexts than were timed take no less than the longest that was, whatever other sizes' rows say
        edge = {name: np.clip(columns[name], *kernel.box.get(name, (0.0, np.inf))) for name in columns}
        return found.at_least(np.where(longer, self._by_kernel(kernel, *name, edge).seconds, 0.0))

    def lender(self, family: str, dtype: str, variant: str) -> str:
        """The dtype whose kernel stands in for one that was not measured: the one that lent its constants, if it
        computes and stores alike and its kernel was. None is the empty name."""
        lent = constants_for(self.device, family, dtype, self.engine)[0].dtype
        if variant or self.model is None or lent == dtype or not alike(lent, dtype):
            return ""
        return lent if self.model.find(family, lent, self.engine, variant) is not None else ""

    def unmeasured(self, family: str, dtype: str, variant: str) -> bool:
        """Whether a device of which other kernels were measured is priced as one that was not."""
        if self.device.calibration is None or self.device.vendor != "NVIDIA" or variant or dtype in UNMEASURED:
            return False
        return constants_for(self.timed, family, dtype, self.engine)[1] == "datasheet"

    @property
    def timed(self) -> DeviceProfile:
        """The device that its kernels were timed on, itself or a lender."""
        return load_device(self.device.timed_on) if self.lent else self.device

    def _with_residual(
        self, kernel: Kernel, formula: KernelFormula, columns: Columns, features: Columns, measured_shape: Mask
    ) -> Array:
        """Seconds of the formula with its residual; a kernel that a server would have tuned has no level of its own."""
        level = np.where(measured_shape, kernel.level(columns), 0.0)
        tuned = np.where(self.served & (level > UNTUNED), 0.0, level)
        return np.maximum(
            formula.seconds * np.exp(kernel.correction(features, measured_shape) + tuned), formula.floor
        )

    def _extrapolated(
        self, kernel: Kernel, formula: Callable[[Columns], KernelFormula], columns: Columns, outside: Array, *,
        measured_shape: bool,
    ) -> Estimate:
        """Calls outside the data: times that grow with every size (:mod:`tensorcast.cost.kernels.lattice`). Where
        experts' load was given, its formula counts, with the residual for tokens as the routing spreads them."""
        key = kernel.family, kernel.dtype, kernel.engine, kernel.variant, measured_shape
        if key not in self._lattices:
            every = SIDES[kernel.family].items()
            sides = {name: nodes for name, nodes in every if not (measured_shape and name in LINES[kernel.family])}
            if kernel.engine == "any" and "inter" in sides:  # counted by rank: as narrow as cut ones are
                sides["inter"] = sides["inter"] / 8.0
            # a node may hold the sizes of a measured model, which says nothing about others
            models = measured_shape or kernel.family not in CONFIGURATION
            self._lattices[key] = Lattice(sides, kernel.box, partial(self._node, kernel, formula, models))
        by_formula, own = formula(columns), {name: columns[name] for name in columns if name not in LOAD}
        seconds = np.exp(self._lattices[key].log_seconds(own))
        if len(own) < len(columns):
            seconds = by_formula.seconds * seconds / formula(own).seconds
        seconds = np.maximum(seconds, by_formula.floor)
        none = np.zeros(len(seconds), dtype=bool)
        ends = kernel.interval(seconds, columns, none, outside)
        return estimated(seconds, by_formula, ends, np.ones(len(seconds), dtype=int))

    def _node(
        self, kernel: Kernel, formula: Callable[[Columns], KernelFormula], models: bool, columns: Columns
    ) -> Array:
        """log seconds of a lattice's nodes. Beyond the measured sizes the features are those of the nearest ones: the
        residual stays as at its edge. ``models``: what was measured of their models counts."""
        by_formula, outside = formula(columns), np.flatnonzero(kernel.beyond(columns) > 0)
        features = of_library(by_formula.features, kernel.library(columns))
        if len(outside):
            nearest = {name: values[outside] for name, values in columns.items()}
            nearest |= {name: np.clip(nearest[name], *ends) for name, ends in kernel.box.items() if name in nearest}
            source = features["source"][outside] if "source" in features else None
            held, features = of_library(formula(nearest).features, source), dict(features)
            asked = {*kernel.trees.names, *(kernel.extrapolated.names if kernel.extrapolated else ())}
            for name in asked & held.keys():
                features[name] = features[name].copy()
                features[name][outside] = held[name]
        measured_shape = kernel.measured_shape(columns) & models
        return np.log(self._with_residual(kernel, by_formula, columns, features, measured_shape))

    def _from_other_devices(self, family: str, dtype: str, variant: str, columns: Columns) -> Estimate:
        """No data of this device: what its vendor's others need over the same formula. Where engines differ for the
        kernels that they happen to run there (:data:`BEST_OF`), the fastest engine's."""
        assert self.model is not None
        engines = ("trtllm", "vllm", "sglang") if family in BEST_OF else (self.engine,)
        formula = formula_of(family, dtype, variant, columns, self.device, engine=self.engine)
        best: Estimate | None = None
        for engine in engines:
            nearest = (self.model.find(family, name, engine, "") for name in (dtype, *NEAREST.get(dtype, ())))
            kernel = next((found for found in nearest if found is not None), None)
            if kernel is None or variant or (family in BEST_OF and kernel.engine != engine):
                continue
            middle = self._middle(kernel, dtype)
            features = coordinates(family, columns, formula, self.device, middle)
            factor = kernel.monotone_correction(features, (formula.features["log_seconds"] - middle) * np.log(2.0))
            seconds = np.maximum(formula.seconds * np.exp(factor), formula.floor)
            none = np.zeros(len(seconds), dtype=bool)
            ends = kernel.interval(seconds, columns, none, kernel.beyond(columns))
            found = estimated(seconds, formula, ends, none.astype(int))
            if best is None:
                best = found
            else:
                faster = found.seconds < best.seconds
                pairs = {name: (getattr(found, name), getattr(best, name)) for name in PARTS}
                best = Estimate(**{name: np.where(faster, new, old) for name, (new, old) in pairs.items()})
        return without_residual(formula) if best is None else best

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


MOST_PREDICTORS = 256
"""Predictors that are kept."""

_models: dict[Path, tuple[float, DeviceModel]] = {}
"""By file, with the time at which it was changed."""

_predictors: dict[tuple[int, str, bool], Predictor] = {}
"""By identity of the device, which the predictor keeps alive."""


def predictor_for(device: DeviceProfile, engine: str = "any", served: bool = False) -> Predictor:
    """The predictor of a device under an engine; a model file is read once. ``served``: of kernels as an engine tunes
    them, also where they were measured untuned. A device of which nothing was is priced by the formula with datasheet
    fractions.
    """
    return _with_model(device, device.timed_on, engine, served)


def from_other_devices(device: DeviceProfile, engine: str, served: bool = False) -> Predictor:
    """The predictor of what was not timed on a device by what other devices need over the formula."""
    return _with_model(device.model_copy(update={"calibration": None}), TRANSFERRED, engine, served)


def _with_model(device: DeviceProfile, model_of: str, engine: str, served: bool) -> Predictor:
    path = model_path(model_of) if model_of else None
    if path is None:
        return Predictor(device, engine, None, served)
    changed = path.stat().st_mtime
    if path not in _models or _models[path][0] != changed:
        _models[path] = changed, read_model(path)
    model, key = _models[path][1], (id(device), engine, served)
    known = _predictors.get(key)
    if known is None or known.model is not model:
        if len(_predictors) >= MOST_PREDICTORS:
            _predictors.clear()
        known = _predictors[key] = Predictor(device, engine, model, served)
    return known
