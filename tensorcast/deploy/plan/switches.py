"""Switches of an engine's command that change what its steps take: memory, graphs, all-reduces, whose kernels."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from tensorcast.cost.stages import stated_stages
from tensorcast.deploy.exchange_kernels import EXCHANGE_KERNELS
from tensorcast.deploy.options import Options
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.kept import same
from tensorcast.profiles.memory import Served
from tensorcast.profiles.sourced import Figure

SWITCHES = attrgetter(
    "memory_fraction", "cuda_graphs", "compiled", "custom_all_reduce", "allreduce_fusion", "experts_kernels",
    "attention_kernels",
)
"""What is switched."""

UNSWITCHED = SWITCHES(Options())
"""The switches as engines start unasked."""

OWN_FUSIONS, JOINS = ("merged_gemm", "pointwise", "allreduce_norm"), "allreduce_norm"
"""Fusions that engines' own kernels and model code are, without a compiler: vLLM's quantising ones are its compiler's,
and so is its joining of all-reduces with norms."""


def served_with(options: Options, all2all: str, *, context: int | None = None) -> Served:
    """What decides about graphs of a server with these ``options``, tokens of whose experts travel by ``all2all``."""
    kind = options.all2all if options.all2all in EXCHANGE_KERNELS and all2all != "none" else all2all
    # gathering and scattering are the engine's collectives, no exchange of their own
    kind = "" if kind == "allgather_reducescatter" else kind
    return Served(kind, options.dual_batch_overlap, options.dcp, options.pcp, balances(options), context)


def balances(options: Options) -> bool:
    """Whether the engine is to move experts by their load, and not to lay them as a file of its own says."""
    return not names_file(options.placement) and bool(options.redundant_experts or options.placement.startswith("eplb"))


def names_file(placement: str) -> bool:
    """Whether ``placement`` is an engine's file of where experts lie."""
    return placement.endswith((".json", ".yaml", ".yml")) and ":" not in placement


def as_asked(engine: EngineProfile, options: Options) -> EngineProfile:
    """``engine`` with the stages and switches that ``options`` ask for: one object for all that are the same."""
    if options.pp_partition:
        engine = same(engine.with_stages(stated_stages(options.pp_partition)))
    return engine if SWITCHES(options) == UNSWITCHED else same(switched(engine, options))


def switched(engine: EngineProfile, options: Options) -> EngineProfile:
    """``engine`` as it starts with the switches that ``options`` ask for; what it has none of stays as it is."""
    fusions = engine.fusions
    changes: dict[str, Any] = {"custom_all_reduce": engine.custom_all_reduce and options.custom_all_reduce}
    if options.memory_fraction is not None:
        asked = Figure(value=options.memory_fraction, source="as asked: --memory-fraction")
        changes |= {"memory_fraction": asked, "reserve": None}
    if options.experts_kernels != "engine" and engine.experts is not None:
        changes["experts"] = engine.experts.model_copy(update={"asked": options.experts_kernels})
    if options.attention_kernels != "engine" and engine.attention is not None:
        changes["attention"] = engine.attention.model_copy(update={"asked": options.attention_kernels})
    if not options.compiled and engine.compiles:
        fusions = tuple(name for name in fusions if name in OWN_FUSIONS and name != JOINS)
    if options.allreduce_fusion != "engine":
        fusions = tuple(name for name in fusions if name != JOINS)
    if options.allreduce_fusion == "on":
        fusions = (*fusions, JOINS)
        if engine.allreduce_norm is not None:
            every = {"models": (), "one_replica": False}
            changes["allreduce_norm"] = engine.allreduce_norm.model_copy(update=every)
    if options.cuda_graphs != "engine":  # without graphs attention is launched between compiled pieces all the same
        changes["decode_graphs"] = "full" if options.cuda_graphs == "full" else "piecewise"
    if options.cuda_graphs == "none":
        changes["graph_captured_phases"] = ()
        if engine.reserve is not None and "reserve" not in changes:
            changes["reserve"] = engine.reserve.without_graphs()
    if options.cuda_graphs == "none" or (engine.compiles and not options.compiled):  # pieces are the compiler's
        changes["prefill_graphs"] = None
    return engine.model_copy(update={**changes, "fusions": fusions})
