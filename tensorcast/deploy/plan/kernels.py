"""Whose kernels an engine runs a model's experts and attention with, as kernel models tell them apart."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any

from tensorcast.cost.kernels.vocabulary import PRECISION, source_of
from tensorcast.deploy.layout import Layout
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.trace.table import Op, with_attr

MOST_SOURCES = 4096
"""Models, engines and devices of which it is kept whose kernels run."""

_sources: dict[tuple[Hashable, ...], tuple[object, object, dict[str, float]]] = {}


def expert_sources(
    engine: EngineProfile, device: DeviceProfile, config: dict[str, Any], layout: Layout
) -> dict[str, float]:
    """Whose experts' kernels the engine runs for a model, by dtype, as kernel models count libraries; 0 where it says
    nothing."""
    if (rules := engine.experts) is None:
        return {}
    key = id(rules), id(config), device.architecture, layout.ep > 1, layout.dp > 1
    if key not in _sources:
        whose = partial(
            rules.library, device.architecture, config=config, spread=layout.ep > 1, attention_dp=layout.dp > 1
        )
        while len(_sources) >= MOST_SOURCES:
            del _sources[next(iter(_sources))]
        named = {dtype: source_of(whose(dtype=dtype)) for dtype in PRECISION}
        _sources[key] = rules, config, named  # they stay alive, so that their ids stay their own
    return _sources[key][-1]


def attended_by(row: Op, kernels: str, as_cached: bool) -> Op:
    """The row as it is run by these ``kernels`` (empty: the usual ones), if it is attention to all tokens or a window:
    its attrs say whose, and whether they multiply in what the cache holds."""
    if row.name != "attention" or row.attrs["latent"] or row.attrs["selected"] or row.attrs.get("compress"):
        return row
    row = with_attr(row, "kernels", kernels) if kernels else row
    return with_attr(row, "as_cached", True) if as_cached else row
