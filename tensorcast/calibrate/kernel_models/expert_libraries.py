"""Whose experts' kernels an engine's own rules name for measured rows, from the models that are known to have their
shapes: what a simulation of such a model is told, without having seen a measurement."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from tensorcast.calibrate.measured_tables import MeasuredKernel
from tensorcast.cost.kernels.device_model import SOURCE_OF
from tensorcast.cost.kernels.vocabulary import source_of
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.model import EXPERTS, EXPERTS_PER_TOKEN, stated
from tensorcast.profiles.store import list_engines, list_models, load_engine, load_model

SAID_AS = {
    "hidden": ("moe_latent_size", "hidden_size"), "inter": ("moe_intermediate_size", "intermediate_size"),
    "topk": EXPERTS_PER_TOKEN, "experts": EXPERTS,
}
"""Fields of models' configs for the sizes of :data:`SOURCE_OF`; the first that is there."""


@cache
def known_models() -> dict[tuple[float, ...], list[dict[str, Any]]]:
    """Configs of the models with a profile, by :data:`SOURCE_OF`."""
    found: dict[tuple[float, ...], list[dict[str, Any]]] = {}
    for name in list_models():
        config = load_model(name).config
        sizes = tuple(float(stated(config, SAID_AS[size])) for size in SOURCE_OF)
        if all(sizes):
            found.setdefault(sizes, []).append(config)
    return found


def ruled_sources(rows: MeasuredKernel, device: DeviceProfile) -> np.ndarray:
    """The library that the engine's rules name for each row, as the tables' ``source`` counts them; 0 where none is
    named, or another for every model with such experts. A model that is not known has no class and no activation: rules
    for all models alone hold for it."""
    _, dtype, engine, _ = rows.key
    profile = load_engine(engine) if engine in list_engines() else None
    if profile is not None and profile.calibrated is not None:
        profile = load_engine(f"{engine}=={profile.calibrated.kernels}")
    result = np.zeros(len(rows))
    if profile is None or profile.experts is None or "moe_ep" not in rows.columns:
        return result
    spread = rows.columns["moe_ep"] > 1
    kinds, kind = np.unique(
        np.column_stack([*(rows.columns[name] for name in SOURCE_OF), spread]), axis=0, return_inverse=True
    )
    for place, (*sizes, whole) in enumerate(kinds.tolist()):
        configs = known_models().get(tuple(sizes), [{}])
        named = {
            profile.experts.library(device.architecture, dtype, config, bool(whole), attention_dp=own)
            for config in configs for own in (False, True)
        }
        result[kind.ravel() == place] = source_of(named.pop()) if len(named) == 1 else 0.0
    return result
