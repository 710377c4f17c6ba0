"""What an engine's experts need over physics for a model that was never measured, learnt across models and dtypes.

Sizes tell which model a row is of, and trees remember it: here they see ratios alone. Where few models were measured in
one dtype, the engine's others help at a lower weight. Configurations that run far off the level of their like teach
nothing about a new model and are set aside. Settled by leaving models out; needs catboost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tensorcast.calibrate.kernel_models.boosting import grow
from tensorcast.calibrate.kernel_models.expert_libraries import ruled_sources
from tensorcast.calibrate.measured_tables import Key, MeasuredKernel, MeasuredSystem, held_out
from tensorcast.cost.kernels.device_model import CONFIGURATION, LINES
from tensorcast.cost.kernels.formula import formula_of
from tensorcast.cost.kernels.lattice import SIDES, Lattice, Price
from tensorcast.cost.kernels.trees import Trees
from tensorcast.cost.kernels.triton_tiles import of_library
from tensorcast.cost.kernels.vocabulary import CODE, Columns
from tensorcast.profiles.device import DeviceProfile

FAMILY = "grouped_gemm"

REMEMBER = ("hidden", "inter", "topk", "experts", "slots", "moe_tp", "tokens")
"""Features that tell one model from another."""

CAPACITY = (140, 5, 0.14)
"""Trees, depth, learning rate."""

OWN_ROWS, OTHER_ROWS = 6000, 800

OTHERS_WEIGHT = 0.3
"""Of a row of another dtype, where a row of the kernel's own weighs one."""

APART = 0.3
"""|log| of the factor by which the median row of a configuration may lie off what a quick fit says."""

QUICK = (80, 6, 0.15)

FOLDS = 4
TESTED = 4000
"""Rows of a kernel, in whole configurations, that are predicted with their models left out."""


@dataclass(frozen=True)
class Part:
    """Rows of one kernel: features, log(measured / formula), the model of each row, and which rows may teach others:
    those in the fit, in configurations that run like their like. ``ruled``: whose kernel the engine's own rules name
    for each row (0: none)."""

    features: Mapping[str, np.ndarray]
    target: np.ndarray
    model: np.ndarray
    apart: np.ndarray
    teach: np.ndarray
    ruled: np.ndarray

    def at(self, rows: np.ndarray, source: np.ndarray | None = None) -> Columns:
        """Features of some rows, run by the library that ran them or by ``source``."""
        some = {name: values[rows] for name, values in self.features.items()}
        return of_library(some, some["source"] if source is None else source)


@dataclass(frozen=True)
class LeftOut:
    """Rows whose whole line (model, weight size) took no part in the fit that predicts them: their positions, their
    log(measured / predicted), the fold of every row, and the number of trees that serves such rows best (0: others,
    grown for them). ``untold``: the errors where it is not told whose kernel ran; ``ruled``: where the engine's own
    rules say it, as far as they do."""

    rows: np.ndarray
    errors: np.ndarray
    fold: np.ndarray
    trees: int
    untold: np.ndarray | None = None
    ruled: np.ndarray | None = None


def models_of(rows: MeasuredKernel) -> np.ndarray:
    """A number per row that is the same for the same model, in every table."""
    return sum((w * rows.columns[name] for w, name in zip(CODE, LINES[FAMILY], strict=False)), np.zeros(len(rows)))


def part_of(rows: MeasuredKernel, device: DeviceProfile) -> Part:
    """One kernel's rows, those at a level of their own told apart."""
    family, dtype, engine, variant = rows.key
    physics = formula_of(family, dtype, variant, rows.columns, device, engine=engine)
    target = np.log(rows.seconds / physics.seconds)
    ratios = {name: values for name, values in physics.features.items() if name not in REMEMBER}
    ratios["source"] = rows.columns.get("source", np.zeros(len(rows)))
    seen = of_library(ratios, ratios["source"])
    some = np.random.default_rng(2).permutation(len(rows))[:OWN_ROWS]
    quick = grow({name: values[some] for name, values in seen.items()}, target[some], *QUICK)
    sizes = pd.DataFrame({name: rows.columns[name] for name in CONFIGURATION[FAMILY]})
    off = sizes.assign(off=target - quick.values(seen)).groupby(list(sizes))["off"].transform("median")
    apart = off.abs().to_numpy() > APART
    teach = ~apart & ~held_out(family, rows.columns)
    return Part(ratios, target, models_of(rows), apart, teach, ruled_sources(rows, device))


class Experts:
    """The plain grouped GEMMs of one system, every kernel's rows prepared once."""

    def __init__(self, system: MeasuredSystem, device: DeviceProfile) -> None:
        self.system, self.device = system, device
        self._parts: dict[Key, Part] = {}

    def part(self, key: Key) -> Part:
        """One kernel's rows."""
        if key not in self._parts:
            self._parts[key] = part_of(self.system.kernels[key], self.device)
        return self._parts[key]

    def others(self, key: Key) -> list[Part]:
        """The same engine's other dtypes."""
        return [self.part(other) for other in sorted(self.system.kernels)
                if other[0] == FAMILY and other[2:] == key[2:] and other[1] != key[1]]

    def trees(self, key: Key) -> Trees | None:
        """Trees for models that were not measured."""
        return grow_for_unseen(self.part(key), self.others(key), np.random.default_rng(1))

    def left_out(self, key: Key) -> LeftOut | None:
        """One part of the models after the other left out, in every dtype. None where there are not two."""
        own, others, rows = self.part(key), self.others(key), self.system.kernels[key]
        models, line = np.unique(own.model, return_inverse=True)
        if len(models) < 2:
            return None
        fold = np.random.default_rng(0).permutation(len(models))[line] % min(FOLDS, len(models))
        test = _whole_configurations(rows)
        log_seconds, box = np.log(rows.seconds), {name: (v.min(), v.max()) for name, v in rows.columns.items()}
        errors, untold, ruled = np.full((3, len(line)), np.nan)
        for one in np.unique(fold):
            at = test[fold[test] == one]
            trees = grow_for_unseen(own, others, np.random.default_rng(1), np.unique(own.model[fold == one]))
            if trees is not None and len(at):
                guessed = _most_ran(own, np.flatnonzero(fold != one), at)
                seen = np.isin(own.ruled[at], own.features["source"][fold != one])
                said = np.where(seen, own.ruled[at], guessed)
                sizes = rows.take(at).columns
                lattice = Lattice(SIDES[FAMILY], box, self._node(key, trees), reach=1)
                for kept, source in ((errors, own.features["source"][at]), (untold, guessed), (ruled, said)):
                    kept[at] = log_seconds[at] - lattice.log_seconds({**sizes, "source": source})
        found = np.flatnonzero(~np.isnan(errors))
        return LeftOut(
            rows=found, errors=errors[found], fold=fold, trees=0, untold=untold[found], ruled=ruled[found]
        )

    def _node(self, key: Key, trees: Trees) -> Price:
        """log seconds by trees that carry one kernel over to other models."""
        family, dtype, engine, variant = key

        def price(sizes: Columns) -> np.ndarray:
            physics = formula_of(family, dtype, variant, sizes, self.device, engine=engine)
            told = of_library(physics.features, sizes["source"])
            residual = trees.values({**told, "own": np.ones(len(physics.seconds))})
            return np.maximum(np.log(physics.seconds) + residual, np.log(physics.floor))

        return price


def _whole_configurations(rows: MeasuredKernel) -> np.ndarray:
    """Positions of :data:`TESTED` rows or a few more, drawn by configuration."""
    sizes = (w * rows.columns[name] for w, name in zip(CODE, CONFIGURATION[FAMILY], strict=False))
    _, config, count = np.unique(sum(sizes, np.zeros(len(rows))), return_inverse=True, return_counts=True)
    order = np.random.default_rng(1).permutation(len(count))
    some = order[: int(np.searchsorted(count[order].cumsum(), TESTED)) + 1]
    return np.flatnonzero(np.isin(config, some))


def _most_ran(part: Part, train: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Whose kernel most models among the rows ``train`` ran that are spread and gated as the rows ``at``."""
    source, result = part.features["source"], np.zeros(len(at))
    kind = np.stack([part.features["moe_ep"] > 0, part.features["gated"]], axis=1)
    for one in np.unique(kind[at], axis=0):
        like = train[(kind[train] == one).all(axis=1)]
        like = like if len(like) else train[kind[train, 0] == one[0]]
        codes, counts = np.unique(np.unique([part.model[like], source[like]], axis=1)[1], return_counts=True)
        if len(codes):
            result[(kind[at] == one).all(axis=1)] = codes[counts.argmax()]
    return result


def grow_for_unseen(
    own: Part, others: Sequence[Part], draw: np.random.Generator, without: Sequence[float] | np.ndarray = ()
) -> Trees | None:
    """Trees from some teaching rows of ``own`` and fewer of ``others``; models ``without`` take no part. None where no
    row is left."""
    parts = []
    for part, most, weight in ((own, OWN_ROWS, 1.0), *((other, OTHER_ROWS, OTHERS_WEIGHT) for other in others)):
        may = np.flatnonzero(part.teach & ~np.isin(part.model, without))
        if len(may):
            parts.append((part, draw.permutation(may)[:most], weight))
    if not parts:
        return None
    seen = [part.at(at) for part, at, _ in parts]
    features = {name: np.concatenate([each[name] for each in seen]) for name in own.features}
    features["own"] = np.concatenate([np.full(len(at), float(part is own)) for part, at, _ in parts])
    target = np.concatenate([part.target[at] for part, at, _ in parts])
    weights = np.concatenate([np.full(len(at), weight) for _, at, weight in parts])
    return grow(features, target, *CAPACITY, weights=weights)
