"""Fitting the rising trees of a kernel model (:mod:`tensorcast.cost.predict.rising`). Needs catboost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorcast.cost.predict.physics import Physics
from tensorcast.cost.predict.rising import coordinates, middle_of
from tensorcast.profiles.device import DeviceProfile
from tensorcast.validate.grow import CLIP, grow
from tensorcast.validate.measured import Measured

PROBES = 32
"""Measured shapes whose median says how fast one device's formula is beside another's."""


@dataclass(frozen=True)
class Climb:
    """Rows for rising trees: what they are told, log of the formula's seconds, log(measured / formula)."""

    told: Mapping[str, np.ndarray]
    formula: np.ndarray
    target: np.ndarray

    def __len__(self) -> int:
        return len(self.target)

    def take(self, at: np.ndarray) -> Climb:
        return Climb({name: values[at] for name, values in self.told.items()}, self.formula[at], self.target[at])


def climb_of(rows: Measured, physics: Physics, device: DeviceProfile, probes: Mapping[str, Sequence[float]]) -> Climb:
    """The measured rows; with ``probes`` the formula's seconds count from its median over those."""
    family, dtype, engine, _ = rows.key
    middle = middle_of(family, dtype, probes, device, engine)
    told = coordinates(family, rows.columns, physics, device, middle)
    return Climb(told, np.log(physics.seconds) - middle * np.log(2.0), np.log(rows.seconds / physics.seconds))


def probes_of(parts: Sequence[Measured]) -> dict[str, tuple[float, ...]]:
    """Some of the shapes, drawn once."""
    names = [name for name in parts[0].columns if name != "source"]
    table = np.stack([np.concatenate([rows.columns[name] for rows in parts]) for name in names])
    some = np.random.default_rng(0).permutation(table.shape[1])[:PROBES]
    return {name: tuple(float(v) for v in values[some]) for name, values in zip(names, table, strict=True)}


def grow_rising(climb: Climb, capacity: tuple[int, int, float], share: float) -> dict[str, Any]:
    """The fields ``rising``, ``share`` and ``span`` of a :class:`~tensorcast.cost.predict.model.Kernel`."""
    target = np.clip(climb.target, *(np.median(climb.target) + np.array([-CLIP, CLIP])))
    trees = grow(climb.told, target + share * climb.formula, *capacity, rises=True)
    return {"rising": trees, "share": share, "span": (float(climb.formula.min()), float(climb.formula.max()))}


def joined(parts: Sequence[Climb]) -> Climb:
    """All rows of several devices."""
    told = {name: np.concatenate([part.told[name] for part in parts]) for name in parts[0].told}
    return Climb(told, *(np.concatenate([getattr(part, name) for part in parts]) for name in ("formula", "target")))


def errors(fields: Mapping[str, Any], climb: Climb) -> np.ndarray:
    """log(measured / predicted) of rows by what :func:`grow_rising` found."""
    back = fields["share"] * np.clip(climb.formula, *fields["span"])
    return climb.target - fields["rising"].values(climb.told) + back


def left_out(
    parts: Sequence[tuple[Climb, Climb]], capacity: tuple[int, int, float], share: float
) -> np.ndarray:
    """The errors of the second of each pair by a fit to the first."""
    found = [errors(grow_rising(known, capacity, share), out) for known, out in parts]
    return np.concatenate(found) if found else np.zeros(0)
