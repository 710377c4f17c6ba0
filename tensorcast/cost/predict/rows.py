"""What a device's fitted kernel model makes of the kernels of a step: a factor on the formula's seconds, and how sure.

A model's residual belongs to the formula and the constants that it was fitted over. Where a profile says other
constants now (a user's own calibration), the model is left alone and the formula stands as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from tensorcast.cost.predict import TRANSFERRED, predictor_for
from tensorcast.cost.predict.model import Kernel
from tensorcast.cost.predict.physics import constants_digest, physics_of
from tensorcast.cost.work import Size, Work
from tensorcast.profiles.device import DeviceProfile

VARIANTS = ("absorb", "contiguous", "masked", "custom", "nccl")
"""Kernels of a family that models tell apart; others are the family's plain one."""

AT_LEAST_ONE = ("m", "tokens", "batch", "rows", "hit")
"""Sizes that a step may ask for in fractions of one (a mean over ranks): residuals start at one."""

SAME = 1e-6
"""Relative difference up to which a formula is the one that a model was fitted over."""

WEIGHTS = np.random.default_rng(11).random(16) + 0.5
"""Weights that give every combination of sizes a number of its own."""

MOST = 4096
"""Answers that are kept."""


@dataclass(frozen=True)
class Correction:
    """Multiply the formula's seconds, with the constants of ``engine``, by ``factor``. ``error``: median relative error
    of the product; ``level``: an index into :data:`tensorcast.cost.predict.LEVELS`. Arrays as the sizes broadcast."""

    factor: Size
    error: Size
    level: Size
    engine: str
    variant: str = ""


class Corrections:
    """Corrections for one device under one engine; every answer is kept, by its sizes."""

    def __init__(self, device: DeviceProfile, engine: str) -> None:
        self.device, self.predictor = device, predictor_for(device, engine)
        self._kernels: dict[tuple[str, str, str], tuple[str, str] | None] = {}
        self._found: dict[tuple[Any, ...], Correction] = {}

    def of(self, work: Work, variant: str = "") -> Correction | None:
        """The correction of one kernel; None where no model speaks for it."""
        return self.at(work.family, work.dtype, variant, work.sizes) if work.sizes else None

    def at(self, family: str, dtype: str, variant: str, sizes: Mapping[str, Size]) -> Correction | None:
        """The correction of ``family`` at ``sizes`` (all of its own), scalars or arrays that broadcast."""
        variant = variant if variant in VARIANTS or ":" in variant else ""
        belongs = self._whose(family, dtype, variant)
        if belongs is None:
            return None
        values = [np.asarray(value, dtype=float) for value in _cached(family, sizes).values()]
        key = (family, dtype, variant, *sizes, *((value.shape, value.tobytes()) for value in values))
        if key not in self._found:
            while len(self._found) >= MOST:
                del self._found[next(iter(self._found))]
            self._found[key] = self._ask(belongs, (family, dtype, variant), dict(zip(sizes, values, strict=True)))
        return self._found[key]

    def _ask(self, belongs: tuple[str, str], name: tuple[str, str, str], sizes: dict[str, np.ndarray]) -> Correction:
        held = {n: np.maximum(value, 1.0) if n in AT_LEAST_ONE else value for n, value in sizes.items()}
        shape = np.broadcast_shapes(*(value.shape for value in held.values()))
        flat = {n: np.broadcast_to(value, shape).ravel() for n, value in held.items()}
        first, where = _distinct(list(flat.values()))
        found = self.predictor.price(*name, {n: value[first] for n, value in flat.items()})
        factor, error, level = (x[where].reshape(shape)[()] for x in (found.factor, found.error, found.level))
        return Correction(factor, error, level, *belongs)

    def _whose(self, family: str, dtype: str, variant: str) -> tuple[str, str] | None:
        """Engine and variant of the kernel whose residual applies, if one does."""
        key = family, dtype, variant
        if key not in self._kernels:
            self._kernels[key] = self._look_up(*key)
        return self._kernels[key]

    def _look_up(self, family: str, dtype: str, variant: str) -> tuple[str, str] | None:
        model, engine = self.predictor.model, self.predictor.engine
        if model is None:
            return None
        if model.device == TRANSFERRED:  # over the formula with this device's own, assumed constants
            known = any(key[0] == family for key in model.kernels) and not variant
            return (engine, "") if known else None
        kernel = model.find(family, dtype, engine, variant)
        return (kernel.engine, kernel.variant) if kernel is not None and self._belongs(kernel) else None

    def _belongs(self, kernel: Kernel) -> bool:
        """Whether formula and constants are those that the model's residual was fitted over."""
        if kernel.constants != constants_digest(kernel.family, kernel.dtype, self.device, kernel.engine):
            return False
        sizes = {name: np.array([value]) for name, value in kernel.report["probe"].items()}
        now = physics_of(kernel.family, kernel.dtype, kernel.variant, sizes, self.device, kernel.engine).seconds[0]
        then = float(kernel.report["probe_formula_s"])
        return bool(abs(now - then) <= SAME * then)


def _distinct(columns: list[np.ndarray]) -> tuple[Any, Any]:
    """Where each distinct combination of the columns' values first stands, and which of them every entry is."""
    varying = [column for column in columns if len(column) > 1 and column.min() < column.max()]
    if not varying:
        return slice(0, 1), np.zeros(len(columns[0]), dtype=int)
    codes = sum(weight * column for weight, column in zip(WEIGHTS, varying, strict=False))
    return np.unique(codes, return_index=True, return_inverse=True)[1:]


def _cached(family: str, sizes: Mapping[str, Size]) -> Mapping[str, Size]:
    """Attention's sizes with the cache's bytes as models know them: 1 (FP8, scales beside it) or 2."""
    if "kv_bytes" not in sizes:
        return sizes
    narrow = np.asarray(sizes["kv_bytes"]) < 1.5
    return {**sizes, "kv_bytes": np.where(narrow & (family != "mla_prefill"), 1.0, 2.0)}


@dataclass(frozen=True, eq=False)
class _Held:
    """A profile by identity: profiles hold mappings and cannot be hashed."""

    device: DeviceProfile

    def __hash__(self) -> int:
        return id(self.device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and other.device is self.device


@lru_cache(maxsize=32)
def _made(device: _Held, engine: str) -> Corrections:
    return Corrections(device.device, engine)


def corrections_for(device: DeviceProfile, engine: str) -> Corrections:
    """Corrections of a device under an engine, shared by all steps on this profile."""
    return _made(_Held(device), engine)
