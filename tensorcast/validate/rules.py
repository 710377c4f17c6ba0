"""Whose experts' kernels an engine's own rules name for measured rows, from the models that are known to have their
shapes: what a simulation of such a model is told, without having seen a measurement."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from tensorcast.cost.predict.model import SOURCE_OF
from tensorcast.cost.predict.shapes import source_of
from tensorcast.deploy.tables import traced_table
from tensorcast.errors import InputError
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.store import list_engines, list_models, load_engine, load_model
from tensorcast.validate.measured import Measured

EXPERTS = ("moe_hidden_size", "moe_intermediate_size", "top_k", "num_experts")
"""Facts of a traced model that :data:`SOURCE_OF` names."""


@cache
def known_models() -> dict[tuple[float, ...], dict[str, Any]]:
    """Configs of the models with a profile, by :data:`SOURCE_OF`; of models with the same experts the first."""
    found: dict[tuple[float, ...], dict[str, Any]] = {}
    for name in list_models():
        model = load_model(name)
        if "expert" not in str(model.config):
            continue
        try:
            facts = traced_table(model, "decode").facts
        except InputError:  # one that cannot be traced is simply not known
            continue
        if facts["num_experts"]:
            found.setdefault(tuple(float(facts[part]) for part in EXPERTS), model.config)
    return found


def ruled_sources(rows: Measured, device: DeviceProfile) -> np.ndarray:
    """The library that the engine's rules name for each row, as the tables' ``source`` counts them; 0 where none is
    named. A model that is not known has no class and no activation: rules for all models alone hold for it."""
    _, dtype, engine, _ = rows.key
    profile = load_engine(engine) if engine in list_engines() else None
    result = np.zeros(len(rows))
    if profile is None or profile.experts is None or "moe_ep" not in rows.columns:
        return result
    models, known = known_models(), np.stack([rows.columns[name] for name in (*SOURCE_OF, "moe_ep")], axis=1)
    for line in np.unique(np.column_stack([known[:, :4], known[:, 4] > 1]), axis=0):
        config = models.get(tuple(float(size) for size in line[:4]), {})
        at = (known[:, :4] == line[:4]).all(axis=1) & ((known[:, 4] > 1) == line[4])
        result[at] = source_of(profile.experts.library(device.architecture, dtype, config, bool(line[4])))
    return result
