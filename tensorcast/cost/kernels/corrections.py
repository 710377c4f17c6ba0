"""What a device's fitted kernel model makes of the kernels of a step: a factor on the formula's seconds, and how sure.

A model's residual belongs to the formula and the constants that it was fitted over. Where a profile says other
constants now (a user's own calibration), the model is left alone and the formula stands as it is.
"""

from __future__ import annotations

import atexit
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorcast.cost.evidence import NORMAL_80
from tensorcast.cost.kernels.kept_answers import (
    TRANSFERRED,
    Answers,
    Name,
    Residuals,
    answers_file,
    keep_answers,
    model_path,
    read_answers,
)
from tensorcast.cost.kernels.vocabulary import UNRELATED
from tensorcast.cost.work import Array, Size
from tensorcast.profiles.device import DeviceProfile

if TYPE_CHECKING:
    from tensorcast.cost.kernels.predictor import Predictor

LIBRARIES = ("triton", "flashinfer")
"""Whose attention kernels tables tell from an engine's usual ones."""

VARIANTS = ("absorb", "contiguous", "masked", "custom", "nccl", *LIBRARIES)
"""Kernels of a family that models tell apart; others are the family's plain one."""

AT_LEAST_ONE = ("m", "tokens", "batch", "rows", "hit")
"""Sizes that a step may ask for in fractions of one (a mean over ranks): residuals start at one."""

SAME = 1e-6
"""Relative difference up to which a formula is the one that a model was fitted over."""

WEIGHTS = UNRELATED
"""Weights that give every combination of sizes a number of its own, its code."""

MOST, MOST_SIZES = 4096, 1 << 18
"""Answers that are kept: to whole questions, and by single sizes of each kernel."""

_NO_ANSWERS = np.empty((4, 0))


@dataclass(frozen=True)
class Correction:
    """Multiply the formula's seconds, with the constants of ``engine``, by ``factor``. ``error``: median relative error
    of the product; ``level``: an index into :data:`tensorcast.cost.evidence.LEVELS`. Arrays as the sizes broadcast."""

    factor: Size
    error: Size
    level: Size
    engine: str
    variant: str = ""
    silent: None = None
    """Calls for which no model speaks: none."""


@dataclass(eq=False)
class Corrections:
    """Corrections for one device under one engine; every answer is kept, by its sizes."""

    device: DeviceProfile
    engine: str
    _residuals: Residuals = field(default_factory=dict)
    _found: dict[tuple[Hashable, ...], Correction] = field(default_factory=dict)
    _answers: Answers = field(default_factory=dict)
    kept: Path | None = None
    """Where answers are kept for other processes."""
    more: bool = False
    """Whether there are any that the file has not."""

    @cached_property
    def predictor(self) -> Predictor:
        """Whose answers are kept: read where something has no answer yet."""
        from tensorcast.cost.kernels.predictor import predictor_for

        return predictor_for(self.device, self.engine, served=True)

    def at(self, family: str, dtype: str, variant: str, sizes: Mapping[str, Size]) -> Correction | None:
        """The correction of ``family`` at ``sizes`` (all of its own), scalars or arrays that broadcast; None where no
        model speaks for the kernel, or no sizes are told."""
        name, belongs, columns = self.question(family, dtype, variant, sizes)
        if belongs is None:
            return None
        key = (*name, *columns, *((value.shape, value.tobytes()) for value in columns.values()))
        if key not in self._found:
            while len(self._found) >= MOST:
                del self._found[next(iter(self._found))]
            self._found[key] = self.ask(belongs, name, columns)
        return self._found[key]

    def question(
        self, family: str, dtype: str, variant: str, sizes: Mapping[str, Size]
    ) -> tuple[Name, tuple[str, str] | None, dict[str, Array]]:
        """The kernel's full name; engine and variant whose residual applies, if one does; the sizes as models know
        them (of a cache's bytes 1, FP8 with scales beside it, or 2)."""
        asked = family, dtype, variant
        if asked not in self._residuals:
            told = variant if self._told(*asked) else ""
            self._residuals[asked], self.more = (told, self._residual(family, dtype, told)), True
        told, belongs = self._residuals[asked]
        name = family, dtype, told
        if belongs is None or not sizes:
            return name, None, {}
        columns = {size: np.asarray(value, dtype=float) for size, value in sizes.items()}
        if "kv_bytes" in columns:
            columns["kv_bytes"] = np.where((columns["kv_bytes"] < 1.5) & (family != "mla_prefill"), 1.0, 2.0)
        return name, belongs, columns

    def _told(self, family: str, dtype: str, variant: str) -> bool:
        """Whether models tell the variant from the family's plain kernel: of attention's libraries, that of some."""
        model = self.predictor.model
        if variant in LIBRARIES and model is not None:
            known = model.find(family, dtype, self.engine, variant)
            return known is not None and known.variant == variant
        return variant in VARIANTS or ":" in variant

    def variant(self, family: str, dtype: str, variant: str) -> str:
        """The variant of the kernel whose residual applies; the plain one where none does."""
        _, belongs, _ = self.question(family, dtype, variant, {"any": 1.0})
        return belongs[1] if belongs is not None else ""

    def ask(self, belongs: tuple[str, str], name: Name, sizes: Mapping[str, Array]) -> Correction:
        """The answer to a :meth:`question`. What the model says is kept by the codes of sizes: searches ask for the
        same few again and again, and only those that have no answer yet are priced."""
        held = {n: np.maximum(value, 1.0) if n in AT_LEAST_ONE else value for n, value in sizes.items()}
        shape = np.broadcast_shapes(*(value.shape for value in held.values()))
        codes: Any = sum(weight * value for weight, value in zip(WEIGHTS, held.values(), strict=False))
        asked = np.broadcast_to(codes, shape).ravel()
        known = self._answers.get((*name, *sizes), _NO_ANSWERS)
        if known.shape[1] > MOST_SIZES:
            known = _NO_ANSWERS
        place = known[0].searchsorted(asked)
        new = np.flatnonzero(known[0].take(place, mode="clip") != asked) if known.size else np.arange(len(asked))
        if len(new):
            codes, first = np.unique(asked[new], return_index=True)
            columns = {n: np.broadcast_to(value, shape).ravel()[new[first]] for n, value in held.items()}
            found = self.predictor.price(*name, columns)
            error = np.log(found.high / found.low) / 2.0 / NORMAL_80  # a median, that the interval stands for
            more = np.stack([codes, found.factor, error, found.level])
            known, place = _merged(known, more), place + codes.searchsorted(asked)
            self._answers[(*name, *sizes)], self.more = known, True
        factor, error, level = known[1:, place.reshape(shape)]
        return Correction(factor[()], error[()], level.astype(int)[()], *belongs)

    def _residual(self, family: str, dtype: str, variant: str) -> tuple[str, str] | None:
        """Engine and variant of the kernel whose residual applies: one over the formula and the constants of today."""
        from tensorcast.cost.kernels.formula import constants_digest, formula_of
        from tensorcast.cost.kernels.predictor import CARRIED

        model, engine = self.predictor.model, self.engine
        if model is None:
            return None
        timed = self.predictor.timed  # models are fitted over the formula of the device that was timed
        kernel = model.find(family, dtype, engine, variant)
        if kernel is None and (lender := self.predictor.lender(family, dtype, variant)):
            return (engine, "") if self._residual(family, lender, variant) is not None else None
        if kernel is None and family in CARRIED and self.predictor.unmeasured(family, dtype, variant):
            return engine, ""
        if kernel is None or kernel.constants != constants_digest(family, dtype, timed, kernel.engine):
            return None
        sizes = {name: np.array([value]) for name, value in kernel.report["probe"].items()}
        now = formula_of(family, dtype, kernel.variant, sizes, timed, engine=kernel.engine).seconds[0]
        then = float(kernel.report["probe_formula_s"])
        return (kernel.engine, kernel.variant) if abs(now - then) <= SAME * then else None


def _merged(known: Array, more: Array) -> Array:
    """Answers ``[4, codes]`` in the order of their codes, of which none is in both."""
    found = np.empty((len(known), known.shape[1] + more.shape[1]))
    at = known[0].searchsorted(more[0]) + np.arange(more.shape[1])
    rest = np.ones(found.shape[1], dtype=bool)
    rest[at] = False
    found[:, at], found[:, rest] = more, known
    return found


@dataclass(eq=False)
class PendingCorrection:
    """A :class:`Correction` whose numbers are there after :meth:`BatchedCorrections.find`."""

    engine: str
    variant: str
    factor: Size = 1.0
    error: Size = 0.0
    level: Size = 0
    silent: None = None


@dataclass(eq=False)
class BatchedCorrections:
    """Stands in for :class:`Corrections` where prices are read only after :meth:`find`."""

    corrections: Corrections
    _asked: dict[tuple[Any, ...], list[tuple[PendingCorrection, list[Array]]]] = field(default_factory=dict)

    def at(self, family: str, dtype: str, variant: str, sizes: Mapping[str, Size]) -> PendingCorrection | None:
        """As :meth:`Corrections.at`."""
        name, belongs, columns = self.corrections.question(family, dtype, variant, sizes)
        if belongs is None:
            return None
        found = PendingCorrection(*belongs)
        self._asked.setdefault((name, belongs, *columns), []).append((found, list(columns.values())))
        return found

    def find(self) -> None:
        """Ask each kernel's model once, and hand the numbers out."""
        for (name, belongs, *names), every in self._asked.items():
            same: dict[tuple[Hashable, ...], tuple[list[PendingCorrection], list[Array]]] = {}
            for found, values in every:  # rows of one load ask the same
                key = tuple([(value.shape, value.tobytes()) for value in values])
                same.setdefault(key, ([], values))[0].append(found)
            questions = list(same.values())
            shapes = [np.broadcast_shapes(*(value.shape for value in values)) for _, values in questions]
            ends = np.cumsum([math.prod(shape) for shape in shapes])
            parts = [slice(end - math.prod(shape), end) for end, shape in zip(ends, shapes, strict=True)]
            columns = np.empty((len(names), ends[-1]))
            for (_, values), part, shape in zip(questions, parts, shapes, strict=True):
                for column, value in zip(columns, values, strict=True):
                    column[part].reshape(shape)[...] = value
            together = self.corrections.ask(belongs, name, dict(zip(names, columns, strict=True)))
            numbers = [np.asarray(x) for x in (together.factor, together.error, together.level)]
            for (alike, _), part, shape in zip(questions, parts, shapes, strict=True):
                factor, error, level = (x[part].reshape(shape)[()] for x in numbers)
                for found in alike:
                    found.factor, found.error, found.level = factor, error, level
        self._asked.clear()
        own = self.corrections
        if own.more and own.kept is not None and not own.kept.exists():  # all may be too many once the process ends
            keep_answers(own.kept, own._answers, own._residuals)


@dataclass(eq=False)
class SeveralCorrections:
    """Stands in for :class:`BatchedCorrections` where calls are of several devices and engines: ``each`` answers for so
    many ``calls``, one's after another's."""

    each: Sequence[BatchedCorrections]
    calls: Sequence[int]

    def at(self, family: str, dtype: str, variant: str, sizes: Mapping[str, Size]) -> SeveralPending | None:
        """As :meth:`Corrections.at`, None where no model speaks for any of the calls. Arrays of ``sizes`` have one
        entry for each call."""
        if not sizes:
            return None
        columns = {name: np.asarray(value, dtype=float) for name, value in sizes.items()}
        found, end = list[PendingCorrection | None](), 0
        for one, count in zip(self.each, self.calls, strict=True):
            some = slice(end, end := end + count)
            own = {name: value[some] if np.ndim(value) else value for name, value in columns.items()}
            found.append(one.at(family, dtype, variant, own))
        if not any(found):
            return None
        engines = tuple([
            one.corrections.engine if answer is None else answer.engine
            for one, answer in zip(self.each, found, strict=True)
        ])
        return SeveralPending(found, self.calls, engines)


@dataclass(eq=False)
class SeveralPending:
    """Corrections of calls on several devices, for some of which no model may speak; ``engine``: whose constants are
    corrected, or stand alone, of each."""

    each: Sequence[PendingCorrection | None]
    calls: Sequence[int]
    engine: tuple[str, ...]

    @property
    def variant(self) -> str:
        """Of the kernel that all are of; nothing if they are of several."""
        variants = {"" if one is None else one.variant for one in self.each}
        return variants.pop() if len(variants) == 1 else ""

    @property
    def factor(self) -> Array:
        """One for each call."""
        return self._column([1.0 if one is None else one.factor for one in self.each])

    @property
    def level(self) -> Any:
        """One for each call; of those that are :attr:`silent` any."""
        return self._column([0 if one is None else one.level for one in self.each])

    @property
    def error(self) -> Array:
        """As :attr:`level`."""
        return self._column([0.0 if one is None else one.error for one in self.each])

    @property
    def silent(self) -> Any:
        """For which calls no model speaks; None if there are none."""
        return np.repeat([one is None for one in self.each], self.calls) if None in self.each else None

    def _column(self, values: Sequence[Size]) -> Array:
        each = zip(values, self.calls, strict=True)
        return np.concatenate([v if np.shape(v) == (count,) else np.broadcast_to(v, count) for v, count in each])


MOST_DEVICES = 256
"""Devices and engines whose corrections are kept."""

_corrections: dict[tuple[int, str], Corrections] = {}
"""By identity of the device, which its corrections keep alive."""


def corrections_for(device: DeviceProfile, engine: str) -> Corrections:
    """Corrections of a device under an engine, shared by all steps on this profile."""
    key = id(device), engine
    if key not in _corrections:
        while len(_corrections) >= MOST_DEVICES:
            del _corrections[next(iter(_corrections))]
        models = filter(None, (model_path(device.timed_on or device.name), model_path(TRANSFERRED)))
        kept = answers_file(device, engine, *models)
        answers, residuals = read_answers(kept)
        _corrections[key] = Corrections(device, engine, residuals, _answers=answers, kept=kept)
    return _corrections[key]


@atexit.register
def keep_all() -> None:
    """Keep what has been answered since."""
    for one in _corrections.values():
        if one.kept is not None and one.more:
            keep_answers(one.kept, one._answers, one._residuals)
            one.more = False
