"""What a deployment can choose beside its layout, and the rules that the choices must keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tensorcast.deploy.layout import Layout
from tensorcast.errors import InputError
from tensorcast.profiles.facts import ModelFacts

EXCHANGES = ("high_throughput", "low_latency", "direct")
"""All-to-all kinds in which every rank sends its own tokens and works on what it receives."""


@dataclass(frozen=True)
class Options:
    """Precision, kernels, exchange and expert placement; ``None`` and ``auto`` are what model and engine default to.

    ``dispatch``, ``combine``: schemes that tokens travel to their experts and back in. ``shared_expert_tp``: shared
    experts are cut over tp (else every tp rank holds them whole).
    ``external_shared_experts``: expert-parallel ranks that hold only the shared expert. ``dual_batch_overlap``: two
    half batches, one computing while the other communicates. ``mtp_depth``: tokens drafted per sequence and step.
    ``chunk_tokens``: tokens that pass the experts at a time (0: all).
    """

    fusion: str = "engine"
    quant: str | None = None
    kv_dtype: str | None = None
    routing: str = "balanced"
    all2all: str = "auto"
    dispatch: str | None = None
    combine: str | None = None
    redundant_experts: int = 0
    placement: str = "linear"
    experts_backend: str = "auto"
    shared_expert_tp: bool = True
    external_shared_experts: int = 0
    dual_batch_overlap: bool = False
    mtp_depth: int = 0
    chunk_tokens: int = 0


@dataclass(frozen=True)
class OptionRule:
    """A named condition on options for a layout, a model's facts and the exchange that runs (see ``RULES`` too)."""

    name: str
    broken: Callable[[Options, Layout, ModelFacts, str], str]


def _numbers(o: Options, layout: Layout, facts: ModelFacts, all2all: str) -> str:
    for flag in ("redundant_experts", "external_shared_experts", "mtp_depth", "chunk_tokens"):
        if getattr(o, flag) < 0:
            return f"--{flag.replace('_', '-')} {getattr(o, flag)} must be at least 0"
    if o.fusion not in ("engine", "none"):
        return f"--fusion {o.fusion!r}: must be engine or none"
    return ""


def _experts(o: Options, layout: Layout, facts: ModelFacts, all2all: str) -> str:
    asked = {
        "--routing": o.routing not in ("balanced", "uniform"),  # the defaults, of a step and of a comparison
        "--all2all": o.all2all != "auto",
        "--dispatch": o.dispatch is not None,
        "--combine": o.combine is not None,
        "--redundant-experts": o.redundant_experts > 0,
        "--placement": o.placement != "linear",
        "--experts-backend": o.experts_backend != "auto",
        "--chunk-tokens": o.chunk_tokens > 0,
        "--external-shared-experts": o.external_shared_experts > 0,
        "--dual-batch-overlap": o.dual_batch_overlap,
    }
    flags = [flag for flag, given in asked.items() if given]
    if facts.num_experts or not flags:
        return ""
    return f"the model has no experts: {' and '.join(flags)} {'does' if len(flags) == 1 else 'do'} not apply"


def _external(o: Options, layout: Layout, facts: ModelFacts, all2all: str) -> str:
    n = o.external_shared_experts
    if not n:
        return ""
    if not facts.shared_experts:
        return f"--external-shared-experts {n}: the model has no shared expert"
    if all2all not in EXCHANGES:
        return (
            f"--external-shared-experts {n}: tokens must travel to it; use dp > 1, ep = tp*dp and an all-to-all "
            f"({', '.join(EXCHANGES)}), not {all2all}"
        )
    if n >= layout.ep:
        return f"--external-shared-experts {n} leaves none of ep = {layout.ep} ranks for routed experts"
    return ""


def _redundant(o: Options, layout: Layout, facts: ModelFacts, all2all: str) -> str:
    physical, ranks = facts.num_experts + o.redundant_experts, layout.ep - o.external_shared_experts
    if not o.redundant_experts or o.placement != "eplb" or ranks < 1 or physical % ranks == 0:
        return ""
    return f"{physical} experts and copies do not divide over {ranks} ranks, as --placement eplb needs"


def _overlap(o: Options, layout: Layout, facts: ModelFacts, all2all: str) -> str:
    if not o.dual_batch_overlap or all2all in ("high_throughput", "low_latency"):
        return ""
    return f"--dual-batch-overlap hides high_throughput or low_latency exchanges, and here it is {all2all}"


def _drafts(o: Options, layout: Layout, facts: ModelFacts, all2all: str) -> str:
    if not o.mtp_depth or facts.mtp_modules:
        return ""
    return f"--mtp-depth {o.mtp_depth}: the model's config has no multi-token prediction module"


OPTION_RULES = (
    OptionRule("valid numbers", _numbers),
    OptionRule("experts to place", _experts),
    OptionRule("external shared experts", _external),
    OptionRule("redundant experts", _redundant),
    OptionRule("overlap needs an exchange", _overlap),
    OptionRule("drafts need a module", _drafts),
)


def broken_option(options: Options, layout: Layout, facts: ModelFacts, all2all: str) -> tuple[str, str]:
    """Name of the first rule that ``options`` break and what is wrong; two empty strings if none."""
    for rule in OPTION_RULES:
        if problem := rule.broken(options, layout, facts, all2all):
            return rule.name, problem
    return "", ""


def check_options(options: Options, layout: Layout, facts: ModelFacts, all2all: str) -> None:
    """Raise :class:`InputError` with what the first broken rule says."""
    _, problem = broken_option(options, layout, facts, all2all)
    if problem:
        raise InputError(problem)


def idle_options(
    options: Options, layout: Layout, facts: ModelFacts, all2all: str, phase: str
) -> dict[str, str]:
    """Options that were chosen and change no time here, with the reason. Arguments: as for the rules."""
    stays = "no tokens travel to other GPUs"
    whole = "tp is 1" if facts.shared_experts else "there is no shared expert"
    cases = {
        "--all2all": (options.all2all != "auto" and all2all == "none", stays),
        "--dispatch": (options.dispatch is not None and all2all == "none", stays),
        "--combine": (options.combine is not None and all2all == "none", stays),
        "--placement": (options.placement != "linear" and layout.ep == 1, "experts are in one group"),
        "--redundant-experts": (
            options.redundant_experts > 0 and layout.ep == 1, "copies in one group of experts only take memory",
        ),
        "--no-shared-expert-tp": (
            not options.shared_expert_tp and (layout.tp == 1 or not facts.shared_experts), whole,
        ),
        "--mtp-depth": (options.mtp_depth > 0 and phase != "decode", "tokens are drafted in decode"),
    }
    return {flag: why for flag, (idle, why) in cases.items() if idle}


def idle_note(idle: dict[str, str]) -> str:
    """:func:`idle_options` in a line: ``no effect here: --all2all and --dispatch (no tokens travel ...)``."""
    said = [
        f"{' and '.join(flag for flag, reason in idle.items() if reason == why)} ({why})"
        for why in dict.fromkeys(idle.values())
    ]
    return f"no effect here: {', '.join(said)}"
