"""What a deployment can choose beside its layout, and the rules that the choices must keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from math import inf
from typing import Any

from tensorcast.cost.stages import broken_stages, stated_stages
from tensorcast.deploy.exchange_kernels import inside_experts
from tensorcast.deploy.layout import Layout
from tensorcast.errors import InputError, unknown_name
from tensorcast.modeling.quantization import KV_DTYPES
from tensorcast.profiles.facts import ModelFacts
from tensorcast.profiles.kernels import ATTENTION_WORDS
from tensorcast.profiles.kernels import WORDS as EXPERTS_KERNELS
from tensorcast.profiles.memory import STATE_DTYPES
from tensorcast.profiles.model import ModelProfile

EXCHANGES = ("high_throughput", "low_latency", "direct")
"""All-to-all kinds in which every rank sends its own tokens and works on what it receives."""

SERVED_ROUTING = "served"
"""How a server's tokens fall on experts where nobody says otherwise: by the law of :mod:`tensorcast.cost.routing` that
fits runs of the network best, its profile's ``traffic``."""


DRAFTING = ("mtp", "eagle3", "dflash", "dspark", "draft_model", "ngram")
"""What drafts tokens: the model's own layers, a head or block trained for it, a small model, or a look-up."""

BALANCED = ("eplb", "balanced", "trivial")
"""Beginnings of placements that give every rank as many experts."""


@dataclass(frozen=True)
class Place:
    """Where options act: a layout of a model, the exchange that runs, and the phase."""

    layout: Layout
    facts: ModelFacts
    all2all: str
    phase: str
    fuses: bool = False
    """Whether the engine runs shared experts among the routed ones unasked, ..."""
    whole: bool = False
    """... or holds them whole on every GPU."""
    has_states: bool = True
    drafts: bool = True


@dataclass(frozen=True)
class About:
    """What is known of an option beside its type and default: metadata of its field in :class:`Options`.

    ``help``, ``metavar``: for ``--help``; ``unasked`` says what ``None`` stands for. ``least``: of a number.
    ``of_experts``: means nothing for a dense model, unless it is one of ``always``. ``idle``: why a choice changes no
    time at a place, or empty.
    """

    help: str
    metavar: str | None = None
    unasked: str = ""
    least: int | None = None
    of_experts: bool = False
    always: tuple[Any, ...] = ()
    idle: Callable[[Place], str] = lambda at: ""


SWITCHED = {
    "fusion": ("engine", "none"), "cuda_graphs": ("engine", "full", "piecewise", "none"),
    "allreduce_fusion": ("engine", "on", "off"), "experts_kernels": ("engine", *EXPERTS_KERNELS),
    "attention_kernels": ("engine", *ATTENTION_WORDS),
}
"""What options may be that take one of a few words."""


def _about(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"about": About(help, **more)})


def _nothing_travels(at: Place) -> str:
    return "no tokens travel to other GPUs" if at.all2all == "none" else ""


def _nothing_drafted(at: Place) -> str:
    return "tokens are drafted in decode" if at.phase != "decode" else "" if at.drafts else "--mtp-depth is 0"


def _nothing_shared(at: Place) -> str:
    if not at.facts.shared_experts:
        return "there is no shared expert"
    if at.layout.tp == 1:
        return "tp is 1"
    return "the engine holds shared experts whole here" if at.whole else ""


def _nothing_fused(at: Place) -> str:
    if not at.facts.shared_experts:
        return "there is no shared expert"
    return "" if at.fuses else "the engine runs shared experts apart"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Precision, kernels, exchange and expert placement; ``None`` and ``auto`` are what model and engine default to.

    Each is declared here once: the command line, the Python API and the rules below are made of these fields.
    """

    quant: str | None = _about(
        None, "Weights: bf16, fp8, fp8_block, int8, w4a16, w4a16_g32, mxfp4 or nvfp4, or apart as "
        "linear=bf16,experts=mxfp4.", metavar="SCHEME", unasked="as the model ships",
    )
    kv_dtype: str | None = _about(None, "KV cache.", metavar="bf16|fp8", unasked="the engine's")
    state_dtype: str | None = _about(
        None, "States of linear attention and SSM layers: float32, bfloat16 or float16.", metavar="DTYPE",
        unasked="as the engine keeps them", idle=lambda at: "" if at.has_states else "no layer keeps a state",
    )
    routing: str = _about(
        "balanced", "How tokens fall on experts: served (what fits the network's served runs: typical, of a few "
        "another), typical, alike (typical, of benchmarks' random tokens), balanced, uniform, zipf:S, or as counted: "
        "recorded:FILE or recorded:NAME.", metavar="LAW",
        of_experts=True, always=("balanced", "uniform", "typical", "alike", SERVED_ROUTING),
    )
    fusion: str = _about("engine", "Fuse kernels as the engine does, or not at all.", metavar="engine|none")
    all2all: str = _about(
        "auto", "How tokens reach their experts at dp > 1: allgather_reducescatter, high_throughput, low_latency, "
        "direct, deepep_v2, nixl_ep, mori_high_throughput, mori_low_latency, flashinfer_nvlink_one_sided or _two_sided "
        "(priced as what moves the same bytes), or auto, the engine's.", metavar="KIND", of_experts=True,
        idle=_nothing_travels,
    )
    dispatch: str | None = _about(
        None, "What tokens are sent in, such as bf16 or fp8_block.", metavar="SCHEME",
        unasked="as the experts read them", of_experts=True, idle=_nothing_travels,
    )
    combine: str | None = _about(
        None, "What results come back in, such as fp8_block, or logfmt10 at low_latency.", metavar="SCHEME",
        unasked="bf16", of_experts=True, idle=_nothing_travels,
    )
    placement: str = _about(
        "linear", "Which group holds which experts: linear, round_robin, eplb (DeepSeek's balancer, for --routing; for "
        "older counts: eplb:RECORDING), eplb_global (over all nodes at once), balanced (eplb, improved), trivial "
        "(linear, its copies idle) or an engine's file.", metavar="POLICY", of_experts=True,
        idle=lambda at: "experts are in one group" if at.layout.ep == 1 else "",
    )
    redundant_experts: int = _about(
        0, "Copies of experts in each MoE layer, over all expert-parallel groups.", least=0, of_experts=True,
        idle=lambda at: "copies in one group of experts only take memory" if at.layout.ep == 1 else "",
    )
    experts_backend: str = _about(
        "auto", "How expert matmuls run: grouped_mm, batched_mm, eager, contiguous, masked, or auto; by phase as "
        "prefill=contiguous,decode=masked.", metavar="NAME", of_experts=True,
    )
    experts_kernels: str = _about(
        "engine", "Whose kernels run the experts: as the engine chooses, or what its own option asks for (vLLM's "
        "--moe-backend, SGLang's --moe-runner-backend, TensorRT-LLM's moe_config.backend).",
        metavar="engine|triton|cutlass|deepgemm|trtllm|marlin", of_experts=True,
    )
    attention_kernels: str = _about(
        "engine", "Whose kernels run attention, where it is not over latents: as the engine chooses, or what its own "
        "option asks for (--attention-backend).", metavar="engine|triton|trtllm|flashinfer|flash_attention",
    )
    shared_expert_tp: bool = _about(
        True, "Cut shared experts over tp, or keep them whole on every GPU.", idle=_nothing_shared
    )
    shared_experts_fusion: bool = _about(
        True, "Run a shared expert as one more routed one where the engine does, or apart.", idle=_nothing_fused
    )
    external_shared_experts: int = _about(
        0, "Expert-parallel groups that hold only the shared expert.", least=0, of_experts=True
    )
    split_tokens_over_tp: bool = _about(
        False, "At dp = 1 each GPU sends its slice of the tokens to their experts, instead of all GPUs working on all "
        "tokens.", of_experts=True,
    )
    route_after_dp_transform: bool = _about(
        False, "The router works on the tokens that a GPU sends, or has gathered, instead of on its own.",
        of_experts=True, idle=_nothing_travels,
    )
    dual_batch_overlap: bool = _about(
        False, "Two half batches: one computes while the other exchanges tokens.", of_experts=True
    )
    mtp_depth: int = _about(
        0, "Tokens drafted per sequence and step.", least=0,
        idle=_nothing_drafted,
    )
    speculative_method: str = _about(
        "mtp", "What drafts the tokens of --mtp-depth: mtp (layers of the model), eagle3, dflash, dspark (a head or "
        "block trained for it), draft_model (a small model) or ngram (looked up in the prompt).", metavar="METHOD",
        idle=_nothing_drafted,
    )
    draft_model: str | None = _about(
        None, "The network that drafts: a name, or a directory with its config.json, as ./eagle3-head.",
        metavar="MODEL", unasked="sizes as published heads have them", idle=_nothing_drafted,
    )
    dcp: int = _about(
        1, "Decode context parallelism (vLLM's --decode-context-parallel-size): tensor-parallel GPUs that share a "
        "sequence's cache, each with its part of the tokens.", least=1,
        idle=lambda at: "prompts attend as without it" if at.phase != "decode" else "",
    )
    pcp: int = _about(
        1, "Prefill context parallelism (vLLM's --prefill-context-parallel-size): data-parallel groups of GPUs that "
        "read each prompt together, a part each; --batch is then of all of them.", least=1,
    )
    pp_partition: str | None = _about(
        None, "Layers of each pipeline stage, as 15,15,16,15 (VLLM_PP_LAYER_PARTITION, SGLANG_PP_LAYER_PARTITION, "
        "TensorRT-LLM's pp_partition).", metavar="N,N,...", unasked="as the engine splits them",
    )
    chunk_tokens: int = _about(0, "Tokens that pass the experts at a time; 0 is all.", least=0, of_experts=True)
    memory_fraction: float | None = _about(
        None, "Share of a GPU's memory, as the engine's own flag means it: --gpu-memory-utilization, "
        "--mem-fraction-static, free_gpu_memory_fraction.", metavar="SHARE", unasked="as the engine takes",
    )
    hand_over_gbs: float | None = _about(
        None, "GB/s at which each GPU of a pool that reads prompts hands their caches over, where that is not over its "
        "links: some 4 through hosts' memory and sockets.", metavar="RATE", unasked="as links have it",
    )
    cuda_graphs: str = _about(
        "engine", "What is replayed from CUDA graphs: as the engine does unasked, whole decode steps (full), pieces of "
        "them between which attention is launched, or none.", metavar="engine|full|piecewise|none",
    )
    compiled: bool = _about(
        True, "What torch.compile fuses where the engine uses it (vLLM), or its own kernels alone; with --cuda-graphs "
        "none that is --enforce-eager.",
    )
    custom_all_reduce: bool = _about(True, "All-reduces by the engine's own kernels where it has them, or by NCCL.")
    allreduce_fusion: str = _about(
        "engine", "All-reduces joined with the norm after them: as the engine does unasked, for any model, or not at "
        "all.", metavar="engine|on|off",
    )


OPTIONS: dict[str, Field[Any]] = {one.name: one for one in fields(Options)}


ABOUT: dict[str, About] = {name: one.metadata["about"] for name, one in OPTIONS.items()}
"""What is known of each option, by its name."""


def flag(name: str) -> str:
    """``--mtp-depth`` for ``mtp_depth``; a switch that is on unasked has the flag that turns it off."""
    off = "no-" if OPTIONS[name].default is True else ""
    return f"--{off}{name.replace('_', '-')}"


def of_layout(options: Options, layout: Layout) -> Options:
    """``options`` without stated stages where ``layout`` has not as many: of another layout of a search, or pool."""
    stages = len(stated_stages(options.pp_partition)) if options.pp_partition else layout.pp
    return options if stages == layout.pp else replace(options, pp_partition=None)


def of_traffic(options: Options, model: ModelProfile, *, alike: bool = False) -> Options:
    """``options`` with the law of ``model`` where they ask for its traffic's; ``alike``: of a benchmark whose requests
    resemble one another."""
    if options.routing != SERVED_ROUTING:
        return options
    return replace(options, routing="alike" if alike and model.traffic == "typical" else model.traffic)


def options_of(given: Mapping[str, Any]) -> Options:
    """Options from keyword arguments. Raises :class:`InputError` with the nearest name for one that there is not.

    ``experts_backend`` may be a mapping by phase or sub-config; the empty key is all others.
    """
    for name in given:
        if name not in OPTIONS:
            raise unknown_name("option", name, OPTIONS)
    backend = given.get("experts_backend", "auto")
    if not isinstance(backend, str):
        given = {**given, "experts_backend": ",".join(f"{key}={name}" for key, name in backend.items())}
    return Options(**given)


def served_options(given: Mapping[str, Any], model: ModelProfile) -> Options:
    """:func:`options_of` a server, whose traffic is the network's own where nobody says otherwise."""
    return of_traffic(options_of({"routing": SERVED_ROUTING, **given}), model)


def _chosen(options: Options, name: str) -> bool:
    value: Any = getattr(options, name)
    return value != OPTIONS[name].default and value not in ABOUT[name].always


def broken_option(o: Options, layout: Layout, facts: ModelFacts, all2all: str) -> tuple[str, str]:
    """Name of the first rule that options break for a layout, a model's facts and the exchange that runs, and what is
    wrong; two empty strings if none."""
    for name, option in ABOUT.items():
        least, value = option.least, getattr(o, name)
        if least is not None and value < least:
            return "valid numbers", f"{flag(name)} {value} must be at least {least}"
    of_experts = [] if facts.num_experts else [n for n in OPTIONS if ABOUT[n].of_experts and _chosen(o, n)]
    travel, n = all2all in EXCHANGES, o.external_shared_experts
    uneven = broken_stages(o.pp_partition, layout.pp, facts.layers) if o.pp_partition else ""
    physical, ranks = facts.num_experts + o.redundant_experts, layout.ep - n
    for name, words in SWITCHED.items():
        if (value := getattr(o, name)) not in words:
            return "valid numbers", f"{flag(name)} {value!r}: must be {' or '.join(words)}"
    rules: tuple[tuple[str, object, Callable[[], str]], ...] = (
        (
            "valid numbers", o.memory_fraction is None or 0 < o.memory_fraction <= 1,
            lambda: f"--memory-fraction {o.memory_fraction}: must be a share above 0 and up to 1",
        ),
        (
            "valid numbers", o.hand_over_gbs is None or 0 < o.hand_over_gbs < inf,
            lambda: f"--hand-over-gbs {o.hand_over_gbs}: must be more than 0",
        ),
        (
            "experts to place", not of_experts,
            lambda: f"the model has no experts: {' and '.join(map(flag, of_experts))} "
            f"{'does' if len(of_experts) == 1 else 'do'} not apply",
        ),
        (
            "tokens to split", not o.split_tokens_over_tp or (layout.dp == 1 < layout.tp and layout.etp == 1),
            lambda: f"--split-tokens-over-tp is for dp = 1 and ep = tp > 1, not {layout}",
        ),
        (
            "tokens to split", not o.split_tokens_over_tp or travel,
            lambda: f"--split-tokens-over-tp: tokens must travel; use --all2all {', '.join(EXCHANGES)}, not {all2all}",
        ),
        (
            "external shared experts", not n or facts.shared_experts,
            lambda: f"--external-shared-experts {n}: the model has no shared expert",
        ),
        (
            "external shared experts", not n or travel,
            lambda: f"--external-shared-experts {n}: tokens must travel to it; use dp > 1, ep = tp*dp and an "
            f"all-to-all ({', '.join(EXCHANGES)}), not {all2all}",
        ),
        (
            "external shared experts", not n or n < layout.ep,
            lambda: f"--external-shared-experts {n} leaves none of ep = {layout.ep} ranks for routed experts",
        ),
        (
            "redundant experts",
            not o.redundant_experts or not o.placement.startswith(BALANCED) or ranks <= 0 or not physical % ranks,
            lambda: f"{physical} experts and copies do not divide over {ranks} ranks, as --placement eplb needs",
        ),
        (
            "overlap needs an exchange", not o.dual_batch_overlap or (
                all2all in ("high_throughput", "low_latency") and not inside_experts(o.all2all)
            ),
            lambda: "--dual-batch-overlap hides high_throughput or low_latency exchanges, and here it is "
            f"{o.all2all if inside_experts(o.all2all) else all2all}",
        ),
        ("layers of stages", not uneven, lambda: uneven),
        (
            "drafts of a step", o.mtp_depth <= MOST_DRAFTED,
            lambda: f"--mtp-depth {o.mtp_depth}: at most {MOST_DRAFTED} tokens are drafted at once",
        ),
        (
            "drafts need a module", not o.mtp_depth or facts.mtp_modules or o.speculative_method != "mtp",
            lambda: f"--mtp-depth {o.mtp_depth}: the model's config has no multi-token prediction module",
        ),
        (
            "what drafts", o.speculative_method in DRAFTING,
            lambda: f"--speculative-method {o.speculative_method!r}: must be one of {', '.join(DRAFTING)}",
        ),
        (
            "what drafts", o.speculative_method != "draft_model" or o.draft_model,
            lambda: "--speculative-method draft_model: which one? Use --draft-model, as qwen3-0.6b",
        ),
        (
            "what drafts", not o.draft_model or o.speculative_method not in ("mtp", "ngram"),
            lambda: f"--draft-model {o.draft_model}: {o.speculative_method} has none; use --speculative-method eagle3, "
            "dflash, dspark or draft_model",
        ),
    )
    return next(((name, says()) for name, holds, says in rules if not holds), ("", ""))


MOST_DRAFTED = 128
"""Tokens that a step may draft: several times what any engine's guide asks for."""


def check_options(options: Options, layout: Layout, facts: ModelFacts, all2all: str) -> None:
    """Raise :class:`InputError` with what the first broken rule says."""
    if options.kv_dtype and options.kv_dtype not in KV_DTYPES:
        raise unknown_name("--kv-dtype", options.kv_dtype, KV_DTYPES)
    if options.state_dtype and options.state_dtype not in STATE_DTYPES:
        raise unknown_name("--state-dtype", options.state_dtype, STATE_DTYPES)
    _, problem = broken_option(options, layout, facts, all2all)
    if problem:
        raise InputError(problem)


def idle_options(options: Options, at: Place) -> dict[str, str]:
    """Options that were chosen and change no time at a place, with the reason."""
    idle = {flag(name): ABOUT[name].idle(at) for name in OPTIONS if _chosen(options, name)}
    return {name: why for name, why in idle.items() if why}


def idle_note(idle: dict[str, str]) -> str:
    """:func:`idle_options` in a line: ``no effect here: --all2all and --dispatch (no tokens travel ...)``."""
    said = [
        f"{' and '.join(flag for flag, reason in idle.items() if reason == why)} ({why})"
        for why in dict.fromkeys(idle.values())
    ]
    return f"no effect here: {', '.join(said)}"
