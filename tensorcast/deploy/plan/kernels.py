"""Whose kernels an engine runs a model's experts and attention with, as kernel models tell them apart."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

from tensorcast.cost.kernels.vocabulary import PRECISION, source_of
from tensorcast.deploy.layout import Layout
from tensorcast.errors import InputError
from tensorcast.modeling.moe.backends import BACKENDS, choose_backend
from tensorcast.profiles.config_values import is_one_of, text_of
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.kernels import GemmRule, Lacking
from tensorcast.profiles.memory import is_latent
from tensorcast.trace.cache import WholeModel
from tensorcast.trace.table import Op, with_attr

MOST_SOURCES = 4096
"""Models, engines and devices of which it is kept whose kernels run, and which are missed."""

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


def attention_kernels(engine: EngineProfile, architecture: str, config: dict[str, Any]) -> tuple[str, bool, bool, str]:
    """Whose kernels run a model's attention (empty: the usual ones), whether they multiply in what the cache holds,
    whether its indexers score all entries where they choose among some blocks of them, and whose run it over latents as
    over one head of keys (empty: kernels for latents)."""
    whole = bool(text_of(config).get("candidate_topk_blocks")) and architecture not in engine.scores_within
    if (rules := engine.attention) is None:
        return "", False, whole, ""
    unusual, library = rules.unusual(architecture, config), rules.library(architecture, config)
    over_latents = library if architecture.lower() in rules.over_latents.get(library, ()) else ""
    return unusual, library in rules.as_cached, whole, over_latents


def attended_by(row: Op, kernels: str, as_cached: bool, whole: bool, over_latents: str) -> Op:
    """The row as it is run so (:func:`attention_kernels`), if it scores entries or is attention to all tokens or a
    window: its attrs say how."""
    if whole and row.attrs.get("within"):
        return with_attr(row, "within", 0)
    if row.name != "attention" or row.attrs["selected"] or row.attrs.get("compress"):
        return row
    if row.attrs["latent"]:
        return with_attr(row, "kernels", over_latents) if over_latents else row
    row = with_attr(row, "kernels", kernels) if kernels else row
    return with_attr(row, "as_cached", True) if as_cached else row


def gemm_rules(engine: EngineProfile, architecture: str, config: dict[str, Any]) -> tuple[GemmRule, ...]:
    """Which GEMMs of a model run kernels of their own on devices of this architecture."""
    return tuple(rule for rule in engine.gemms if rule.holds(architecture, config))


def multiplied_by(row: Op, rules: Iterable[GemmRule]) -> Op:
    """The row as it is run so (:func:`gemm_rules`), if it is a GEMM of one of them: its attrs name the kernel."""
    if row.name not in ("mm", "addmm", "grouped_matmul"):
        return row
    scheme, experts = row.attrs.get("scheme", "bf16"), row.name == "grouped_matmul"
    of_it = [rule for rule in rules if rule.of_experts == experts and scheme in (rule.schemes or (scheme,))]
    if experts or not of_it:
        return with_attr(row, "kernels", of_it[0].kernel) if of_it else row
    x = next((t for t in row.inputs if not t.weight and len(t.dims) > 1), row.inputs[0])
    sides = x.dims[-1], *(t.dims[-1] for t in row.outputs)
    if not all(side.is_constant for side in sides):
        return row
    depth, *columns = (int(side.coef + side.plus) for side in sides)
    found = next((rule for rule in of_it if rule.runs(row.module, sum(columns), depth)), None)
    return row if found is None else with_attr(row, "kernels", found.kernel)


@dataclass(frozen=True)
class Kernels:
    """What a model needs kernels for. ``lacking``: what the engine's profile says that it has none for, by device."""

    lacking: tuple[Lacking, ...]
    architecture: str
    config: dict[str, Any]
    whole: WholeModel

    @cached_property
    def missed(self) -> list[Lacking]:
        """What is lacking that this model needs here, in some layouts and with some options at least."""
        config, stored, facts = self.config, self.whole.stored, self.whole.facts
        text = text_of(config)
        latent = is_latent(config) or bool(text.get("compress_ratios"))
        attention = {"": True, "sparse": bool(facts.indexer_width) and latent}
        experts = {stored.experts.name, stored.experts.kernel} if facts.num_experts else set[str]()
        shared = (text.get("index_topk_freq") or 1) > 1 or "shared" in (text.get("indexer_types") or ())
        return [
            one for one in self.lacking
            if (not one.devices or self.architecture.lower() in one.devices) and attention.get(one.attention, latent)
            and is_one_of(one.models, config) and not (one.but_models and is_one_of(one.but_models, config))
            and (not one.methods or stored.method in one.methods)
            and (not one.linear or not {stored.linear.name, stored.linear.kernel}.isdisjoint(one.linear))
            and (not one.experts or not experts.isdisjoint(one.experts)) and (shared or not one.shared_choices)
        ]


_kernels: dict[tuple[Hashable, ...], Kernels] = {}


def kernels_of(engine: EngineProfile, architecture: str, config: dict[str, Any], whole: WholeModel) -> Kernels:
    """What a model needs of an engine's kernels on a device of this ``architecture``: looked for once."""
    key = id(engine.lacking), architecture, id(config), id(whole)
    if key not in _kernels:
        while len(_kernels) >= MOST_SOURCES:
            del _kernels[next(iter(_kernels))]
        # all that it is of stays alive in it, so that their ids stay their own
        _kernels[key] = Kernels(engine.lacking, architecture, config, whole)
    return _kernels[key]


BACKEND_OF = {"high_throughput": "contiguous", "low_latency": "masked"}
"""Layout in which an exchange delivers rows, and so the grouped GEMM that reads them (DeepEP with DeepGEMM)."""


def choose_experts_backend(
    wanted: str, all2all: str, engine: EngineProfile, device: DeviceProfile, phase: Any
) -> str:
    """The experts backend that runs: the wanted one, else what the exchange delivers to, else the engine's.

    ``wanted``: a name, or names by phase or sub-config, as :func:`choose_backend` reads them. Where the engine is
    transformers itself, its own rule holds: on a GPU ``grouped_mm`` decodes as ``batched_mm``.
    """
    by_rule = engine.experts_backend.get("decode") == "batched_mm" and device.name != "cpu"
    if wanted != "auto":
        chosen = _read_backend(wanted, phase, device="cuda" if by_rule else "cpu")
        if chosen not in ("auto", *BACKENDS):
            raise InputError(f"--experts-backend {chosen}: registered by you; it runs, but has no price")
        if chosen != "auto":
            return chosen
    default = BACKEND_OF.get(all2all) or engine.experts_backend.get(phase, "grouped_mm")
    return "grouped_mm" if default == "batched_mm" and not by_rule else default


_read_backend = cache(partial(choose_backend, part="text_config", auto={}))
"""What is wanted of the language model, read once: plans are many."""
