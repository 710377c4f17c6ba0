"""What a device's fitted kernel model makes of the kernels of a step: a factor on the formula's seconds, and how sure.

A model's residual belongs to the formula and the constants that it was fitted over. Where a profile says other
constants now (a user's own calibration), the model is left alone and the formula stands as it is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from tensorcast.cost.kernels.device_model import Kernel
from tensorcast.cost.kernels.formula import constants_digest, formula_of
from tensorcast.cost.kernels.predictor import TRANSFERRED, predictor_for
from tensorcast.cost.work import Size, Work
from tensorcast.profiles.device import DeviceProfile


@dataclass(eq=False)
class PendingCorrection:
    """A :class:`Correction` whose numbers are there after :meth:`BatchedCorrections.find`."""

    engine: str
    variant: str
    factor: Size = 1.0
    error: Size = 0.0
    level: Size = 0


Question = tuple[PendingCorrection, list[np.ndarray]]


class BatchedCorrections:
    """Stands in for :class:`Corrections` where prices are read only after :meth:`find`."""

    def __init__(self, corrections: Corrections) -> None:
        self._corrections = corrections
        self._asked: dict[tuple[Any, ...], list[Question]] = defaultdict(list)

    def of(self, work: Work, variant: str = "") -> PendingCorrection | None:
        """As :meth:`Corrections.of`."""
        return self.at(work.family, work.dtype, variant, work.sizes) if work.sizes else None

    def at(self, family: str, dtype: str, variant: str, sizes: Mapping[str, Size]) -> PendingCorrection | None:
        """As :meth:`Corrections.at`."""
        name, belongs, columns = self._corrections.question(family, dtype, variant, sizes)
        if belongs is None:
            return None
        found = PendingCorrection(*belongs)
        self._asked[(*name, belongs, *columns)].append((found, list(columns.values())))
        return found

    def find(self) -> None:
        """Ask each kernel's model once, and hand the numbers out."""
        for (family, dtype, variant, belongs, *names), questions in self._asked.items():
            shapes = [np.broadcast_shapes(*(value.shape for value in values)) for _, values in questions]
            ends = np.cumsum([math.prod(shape) for shape in shapes])
            parts = [slice(end - math.prod(shape), end) for end, shape in zip(ends, shapes, strict=True)]
            columns = np.empty((len(names), ends[-1]))
            for (_, values), part, shape in zip(questions, parts, shapes, strict=True):
                for column, value in zip(columns, values, strict=True):
                    column[part].reshape(shape)[...] = value
            sizes = dict(zip(names, columns, strict=True))
            together = self._corrections.ask(belongs, (family, dtype, variant), sizes)
            numbers = [np.asarray(x) for x in (together.factor, together.error, together.level)]
            for (found, _), part, shape in zip(questions, parts, shapes, strict=True):
                found.factor, found.error, found.level = (x[part].reshape(shape)[()] for x in numbers)
        self._asked.clear()


VARIANTS = ("absorb", "contiguous", "masked", "custom", "nccl")
"""Kernels of a family that models tell apart; others are the family's plain one."""

AT_LEAST_ONE = ("m", "tokens", "batch", "rows", "hit")
"""Sizes that a step may ask for in fractions of one (a mean over ranks): residuals start at one."""

SAME = 1e-6
"""Relative difference up to which a formula is the one that a model was fitted over."""

WEIGHTS = np.random.default_rng(11).random(16) + 0.5
"""Weights that give every combination of sizes a number of its own, its code."""

MOST, MOST_SIZES = 4096, 1 << 18
"""Answers that are kept: to whole questions, and by single sizes of each kernel."""


@dataclass(frozen=True)
class Correction:
    """Multiply the formula's seconds, with the constants of ``engine``, by ``factor``. ``error``: median relative error
    of the product; ``level``: an index into :data:`tensorcast.cost.evidence.LEVELS`. Arrays as the sizes broadcast."""

    factor: Size
    error: Size
    level: Size
    engine: str
    variant: str = ""


class Corrections:
    """Corrections for one device under one engine; every answer is kept, by its sizes."""

    def __init__(self, device: DeviceProfile, engine: str) -> None:
        self.device, self.predictor = device, predictor_for(device, engine, served=True)
        self._kernels: dict[tuple[str, str, str], tuple[str, str] | None] = {}
        self._found: dict[tuple[Any, ...], Correction] = {}
        self._answers: dict[tuple[str, ...], _Answers] = {}

    def of(self, work: Work, variant: str = "") -> Correction | None:
        """The correction of one kernel; None where no model speaks for it."""
        return self.at(work.family, work.dtype, variant, work.sizes) if work.sizes else None

    def at(self, family: str, dtype: str, variant: str, sizes: Mapping[str, Size]) -> Correction | None:
        """The correction of ``family`` at ``sizes`` (all of its own), scalars or arrays that broadcast."""
        name, belongs, columns = self.question(family, dtype, variant, sizes)
        if belongs is None:
            return None
        key = (*name, *sizes, *((value.shape, value.tobytes()) for value in columns.values()))
        if key not in self._found:
            while len(self._found) >= MOST:
                del self._found[next(iter(self._found))]
            self._found[key] = self.ask(belongs, name, columns)
        return self._found[key]

    def question(
        self, family: str, dtype: str, variant: str, sizes: Mapping[str, Size]
    ) -> tuple[tuple[str, str, str], tuple[str, str] | None, dict[str, np.ndarray]]:
        """The kernel's full name; engine and variant whose residual applies, if one does; the sizes as models know
        them."""
        name = family, dtype, variant if variant in VARIANTS or ":" in variant else ""
        belongs = self._whose(*name)
        if belongs is None:
            return name, None, {}
        return name, belongs, {n: np.asarray(v, dtype=float) for n, v in _cached(family, sizes).items()}

    def ask(self, belongs: tuple[str, str], name: tuple[str, str, str], sizes: dict[str, np.ndarray]) -> Correction:
        """The answer to a :meth:`question`, not kept."""
        held = {n: np.maximum(value, 1.0) if n in AT_LEAST_ONE else value for n, value in sizes.items()}
        shape = np.broadcast_shapes(*(value.shape for value in held.values()))
        codes: Any = sum(weight * value for weight, value in zip(WEIGHTS, held.values(), strict=False))
        codes, first, where = np.unique(np.broadcast_to(codes, shape), return_index=True, return_inverse=True)
        answers = self._answers.setdefault((*name, *sizes), _Answers())
        if len(answers.codes) > MOST_SIZES:
            answers = self._answers[(*name, *sizes)] = _Answers()
        if len(new := answers.without(codes)):
            at = first[new]
            columns = {n: np.broadcast_to(value, shape).ravel()[at] for n, value in held.items()}
            found = self.predictor.price(*name, columns)
            answers.keep(codes[new], np.array([found.factor, found.error, found.level]))
        factor, error, level = answers.of(codes)[:, where.reshape(shape)]
        return Correction(factor[()], error[()], level.astype(int)[()], *belongs)

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
        now = formula_of(kernel.family, kernel.dtype, kernel.variant, sizes, self.device, kernel.engine).seconds[0]
        then = float(kernel.report["probe_formula_s"])
        return bool(abs(now - then) <= SAME * then)


class _Answers:
    """What the model said of one kernel, by the codes of its sizes: searches ask for the same few again and again."""

    def __init__(self) -> None:
        self.codes, self.values = np.empty(0), np.empty((3, 0))

    def without(self, codes: np.ndarray) -> np.ndarray:
        """Positions of the codes that have no answer yet."""
        if not len(self.codes):
            return np.arange(len(codes))
        nearest = self.codes[np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)]
        return np.flatnonzero(nearest != codes)

    def keep(self, codes: np.ndarray, values: np.ndarray) -> None:
        """Answers ``[3, n]`` to codes that had none: factor, error, level."""
        every = np.concatenate([self.codes, codes])
        order = np.argsort(every, kind="stable")
        self.codes, self.values = every[order], np.concatenate([self.values, values], axis=1)[:, order]

    def of(self, codes: np.ndarray) -> np.ndarray:
        return self.values[:, np.searchsorted(self.codes, codes)]


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
