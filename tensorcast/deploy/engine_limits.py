"""Which layouts and options an engine can run at all: its limits, named as in the engine's launch table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tensorcast.deploy.exchange_kernels import DEEPEP, EXCHANGE_KERNELS
from tensorcast.deploy.layout import Layout, attention_dp
from tensorcast.deploy.options import BALANCED, Options
from tensorcast.deploy.plan.kernels import Kernels
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.facts import ModelFacts
from tensorcast.trace.cuts import HALVED_DOWN_TO, Cut


@dataclass(frozen=True)
class Case:
    """What is to run. ``prefill``: options of the same server's prefill where ``options`` are those of its decode.

    ``cuts``: the widths of the model that must be cut into whole blocks of its checkpoint. ``kernels``: what it needs
    of a device, where that is known.
    """

    engine: str
    layout: Layout
    facts: ModelFacts
    options: Options
    gpus_per_node: int
    prefill: Options | None = None
    cuts: tuple[Cut, ...] = ()
    kernels: Kernels | None = None

    @property
    def nodes(self) -> int:
        return max(1, math.ceil(self.layout.world_size / self.gpus_per_node))

    @property
    def exchange(self) -> str:
        """How tokens reach experts of other dp ranks, in our words; empty where the engine has nothing to choose.

        SGLang's ``auto`` is DeepEP where it can run, in each phase's mode (``by_phase``), as its engine profile says.
        """
        if self.layout.dp == 1 or self.layout.ep == 1:
            return ""
        first = self.options if self.prefill is None else self.prefill
        if self.engine == "sglang" and (first.all2all, self.options.all2all) == ("high_throughput", "low_latency"):
            return "by_phase"
        if self.options.all2all != "auto":
            return self.options.all2all
        if self.engine == "sglang":
            return "by_phase" if self.layout.etp == 1 else "allgather_reducescatter"
        return "allgather_reducescatter" if self.engine == "vllm" else "auto"


MOST_DRAFTS = 7
"""Deepest draft that any engine's own tables try with a layer that is run again and again
(SGLang 0.5.14, speculative/adaptive_spec_params.py; it takes 3 for DeepSeek-V3 unasked)."""

Limit = tuple[str, str]
"""A rule of :data:`ENGINE_RULES` that is broken, by name, and what is wrong."""

KERNELS_OF = {
    "vllm": tuple(EXCHANGE_KERNELS),
    "sglang": (
        "deepep_v2", "nixl_ep", "mori_high_throughput", "mori_low_latency", "flashinfer_nvlink_one_sided", "mega_moe",
    ),
    "trtllm": ("flashinfer_nvlink_one_sided", "flashinfer_nvlink_two_sided"),
}
"""Kernels that an engine can be told to exchange by (:data:`EXCHANGE_KERNELS`). TensorRT-LLM's are of its own
(NVLinkOneSided and NVLinkTwoSided, communication_factory.py, of which FlashInfer's were made)."""

_HALVED = {"vllm": ("nixl_ep",)}
"""Beside DeepEP, those that dual-batch overlap runs with (vLLM 0.33.0, config/vllm.py)."""

DEEPEP_RANKS = frozenset((2, 4, 8, 16, 24, 32, 64, 128, 144, 160))
"""Ranks that DeepEP's normal kernels are set for (buffer.py, get_dispatch_config, of 9fe9021, as vLLM 0.24.0 lists
them in prepare_finalize/deepep_ht.py). Both modes want as many experts on each rank (csrc/deep_ep.cpp)."""


def _of_exchange(c: Case) -> Iterator[Limit]:
    exchange, etp = c.exchange, c.layout.etp
    if exchange in EXCHANGE_KERNELS and exchange not in KERNELS_OF.get(c.engine, ()):
        yield "exchange kernels", f"no {exchange}; choose another all2all"
    elif exchange == "flashinfer_nvlink_one_sided" and c.engine == "sglang" and c.layout.tp > 1:
        yield "exchange kernels", f"{exchange} runs with attention data-parallel over all ranks, not at tp{c.layout.tp}"
    if exchange == "deepep_v2":
        yield "DeepEP v2", "this release has no deepep_v2"
    if exchange == "direct":
        yield "plain all-to-all", "no plain all-to-all between experts; choose another all2all"
    reads = c.options if c.prefill is None else c.prefill
    first = exchange if reads.all2all == c.options.all2all else replace(c, options=reads).exchange
    if first != exchange:
        yield (
            "one exchange",
            f"a server has one exchange for both phases, not {first} in prefill and {exchange} in decode",
        )
    if c.options.dual_batch_overlap and c.engine == "trtllm":
        yield "dual-batch overlap", "this engine has none"
    elif c.options.dual_batch_overlap and exchange not in (*DEEPEP, *_HALVED.get(c.engine, ())):
        yield (
            "dual-batch overlap",
            f"dual-batch overlap needs DeepEP (high_throughput or low_latency) at dp > 1, not {exchange or 'none'}",
        )
    if exchange in DEEPEP and etp > 1:
        said = f"DeepEP spreads experts over all tp*dp = {c.layout.stage_ranks} ranks, not ep = {c.layout.ep}"
        yield "all-to-all over all ranks", said
    elif exchange in DEEPEP and (c.facts.num_experts + c.options.redundant_experts) % c.layout.ep:
        said = f"{c.facts.num_experts + c.options.redundant_experts} experts do not divide over its {c.layout.ep} ranks"
        yield "DeepEP's ranks", f"{said}; choose another all2all"
    elif exchange in ("high_throughput", "by_phase") and c.layout.ep not in DEEPEP_RANKS:
        yield "DeepEP's ranks", f"its kernels for prompts have no size for {c.layout.ep} ranks; choose another all2all"
    if exchange not in ("", "auto", "allgather_reducescatter") and etp > 1:
        said = f"experts cut over {etp} ranks: tokens are gathered, no {exchange} exchange"
        yield "all-to-all with whole experts", said


def _of_moonep(c: Case) -> Iterator[Limit]:
    if c.exchange != "moonep":
        return
    yield "MoonEP", "this release has no moonep"
    if c.options.redundant_experts or c.options.placement != "linear":
        yield "exchange kernels", "moonep copies experts itself: no redundant experts, placement linear"
    if c.kernels is not None and c.kernels.whole.stored.experts.name != "bf16":
        yield "exchange kernels", f"moonep has bf16 alone, not {c.kernels.whole.stored.experts.name}"


def _of_experts(c: Case) -> Iterator[Limit]:
    layout, experts, ranks = c.layout, c.facts.num_experts, c.layout.stage_ranks
    copies, external = c.options.redundant_experts, c.options.external_shared_experts
    if experts and layout.ep not in (1, ranks):
        yield (
            "whole experts or all cut",
            f"experts are spread over all tp*dp = {ranks} ranks or each is cut over all of them: "
            f"ep must be {ranks} or 1, not {layout.ep}",
        )
    balances = c.options.placement.startswith(BALANCED)
    if (copies or balances) and layout.ep == 1:
        yield "balanced experts", "experts are copied or rearranged between expert-parallel ranks only: ep = 1"
    elif (copies or balances) and (experts + copies) % layout.ep:
        yield "balanced experts", f"{experts} experts and {copies} copies do not divide over ep = {layout.ep}"
    if experts and (experts + copies) % layout.ep:
        yield "even experts", f"{experts + copies} experts do not divide over ep = {layout.ep}"
    if external:
        said = f"no ranks for shared experts alone (external_shared_experts = {external})"
        yield "external shared experts", said
    if experts and 1 not in (layout.tp, layout.dp):
        said = f"attention is tensor-parallel or data-parallel over all ranks, not tp{layout.tp} x dp{layout.dp}"
        yield "attention over all ranks", said
    if not experts and layout.dp > 1:
        yield "dense replicas", f"a dense model has no dp: start {layout.dp} engines of tp{layout.tp}"


def _of_drafts(c: Case) -> Iterator[Limit]:
    depth, modules = c.options.mtp_depth, c.facts.mtp_modules
    if not depth:
        return
    if c.layout.pp > 1:
        yield "drafts in a pipeline", f"no speculative decoding at pp = {c.layout.pp}"
        if c.engine == "sglang" and attention_dp(c.layout, c.facts.num_experts) > 1:
            yield "what drafts", f"nothing drafts in a pipeline under attention DP (dp = {c.layout.dp})"
    if c.options.speculative_method != "mtp":
        yield from _of_drafters(c)
    elif not modules:
        yield "draft layers", "the model has no multi-token-prediction layer to draft with"
    elif depth > MOST_DRAFTS:
        layers = f"{modules} multi-token-prediction layer(s)"
        yield "draft layers", f"{depth} drafted tokens from {layers}: {MOST_DRAFTS} at most are drafted"
    elif c.engine == "vllm" and depth > modules and depth % modules:
        layers = f"the model's {modules} multi-token-prediction layers"
        yield "draft layers", f"{depth} drafted tokens are no multiple of {layers}"


def _of_drafters(c: Case) -> Iterator[Limit]:
    """What drafts beside the model's own layers (SGLang 0.5.23, arg_groups/speculative_hook.py, validation_hook.py)."""
    method, spread = c.options.speculative_method, attention_dp(c.layout, c.facts.num_experts) > 1
    if method == "dspark":
        yield "DSpark drafts", "this release has no dspark"
    if c.engine == "trtllm" and method in ("dflash", "dspark"):
        yield "what drafts", f"no {method}"
    if c.engine != "sglang":
        return
    if c.layout.pp > 1:
        yield "what drafts", f"{method} does not draft in a pipeline (pp = {c.layout.pp}), only the model's layers do"
    if method == "ngram" and spread:
        yield "what drafts", f"ngram does not draft under attention DP (dp = {c.layout.dp})"
    if method == "dspark" and spread and c.exchange in DEEPEP:
        yield "what drafts", "dspark drafts under attention DP with gathered tokens only; choose another all2all"


def _of_nodes(c: Case) -> Iterator[Limit]:
    layout, node, ranks, pcp = c.layout, c.gpus_per_node, c.layout.tp * c.layout.pp, c.options.pcp
    several = layout.world_size > node
    if pcp > 1 and (c.facts.kv_heads != c.facts.heads or several):
        yield "prompts in parts", f"latent attention alone, on one node here, reads prompts in parts (pcp = {pcp})"
    if c.engine == "trtllm" and c.options.cuda_graphs == "piecewise":
        yield "graphs in pieces", "decode steps are replayed whole, or not at all"
    if c.engine == "trtllm" and c.options.allreduce_fusion != "engine":
        yield "all-reduces with norms", "no option that switches them"
    if pcp > 1:
        yield "prefill context parallelism", f"no prefill context parallelism (pcp = {pcp}) in this release"
    if c.options.dcp > 1:
        yield "decode context parallelism", f"no decode context parallelism (dcp = {c.options.dcp}) in this release"
    if not several:
        return
    if layout.world_size % node:
        yield "whole nodes", f"{layout.world_size} GPUs do not fill nodes of {node}"
    if node % ranks and ranks % node:
        said = f"tp*pp = {ranks} GPUs of a data-parallel rank neither divide nor fill nodes of {node}"
        yield "data-parallel ranks on nodes", said
    if not c.facts.num_experts and layout.dp > 1:
        said = f"dp = {layout.dp} of a dense model over {c.nodes} nodes: start an engine per node"
        yield "dense replicas on one node", said


BLOCKS = "quantisation blocks"
"""Name of the rule that every engine has: it cannot start a rank whose part of a weight splits a block of scales."""


def _ranks(c: Case, part: str) -> int:
    """Ranks that ``part`` of a model is cut over.

    Shared experts are whole where tokens travel: in vLLM 0.24.0 with expert parallelism, tp and dp (config/parallel.py,
    use_sequence_parallel_moe), in SGLang 0.5.14 with DeepEP (models/qwen2_moe.py, deepseek_v2.py). SGLang's attention
    DP cuts what is not attention over all ranks of a stage, but dense MLPs not with --moe-dense-tp-size 1, which stands
    in our commands where that would split a block.
    """
    layout = c.layout
    if part == "routed experts":
        return layout.etp
    if part not in ("shared expert", "dense MLP"):
        return layout.tp
    shared, spread = part == "shared expert", attention_dp(layout, c.facts.num_experts) > 1
    if shared and (c.options.external_shared_experts or not c.options.shared_expert_tp):
        return 1
    travels = (c.engine == "vllm" and spread and layout.ep > 1) or (c.engine == "sglang" and c.exchange in DEEPEP)
    if shared and travels:
        return 1
    if c.engine != "sglang" or not spread:
        return layout.tp
    return layout.stage_ranks if shared else 1


_WAYS = {"routed experts": "raise ep", "shared expert": "lower tp, or send tokens to experts (dp > 1, ep = tp*dp)"}
"""Out of a cut through a block."""


def halved_group(cut: Cut, ranks: int, engine: str) -> int:
    """Elements of a GPTQ or AWQ expert's group of scales under ``engine``: halved where ``ranks`` would split it."""
    block = cut.block
    while engine in ("vllm", "sglang") and cut.size % (ranks * block) and block >= 2 * HALVED_DOWN_TO:
        block //= 2
    return block


def halving_note(engine: str, layout: Layout, cuts: tuple[Cut, ...]) -> str:
    """A note on groups of scales that ``engine`` halves in this layout; empty if it halves none."""
    for cut in cuts:
        block = halved_group(cut, layout.etp, engine) if cut.halves else cut.block
        if block < cut.block and cut.size % (layout.etp * block) == 0:
            each = f"{cut.part} {cut.size} / {layout.etp} = {cut.size // layout.etp}"
            times = f"{cut.block // block} times the scales that are counted"
            return f"{each} splits groups of {cut.block} ({cut.scheme}): {engine} makes them {block}, {times}"
    return ""


VOCABULARY_UNIT = 64
"""vLLM 0.24.0, layers/vocab_parallel_embedding.py: a vocabulary is filled up to a multiple of it, and ranks must share
that evenly. SGLang 0.5.14 fills up to a multiple of tp times it where they would not, TensorRT-LLM to one of tp."""


def _of_blocks(c: Case) -> Iterator[Limit]:
    """The first width that a layout cuts through a block of the checkpoint's scales, with the numbers; vocabulary."""
    rows = -(-c.facts.vocab_size // VOCABULARY_UNIT) * VOCABULARY_UNIT
    if rows % c.layout.tp:
        yield "vocabulary", f"{rows} rows, a multiple of {VOCABULARY_UNIT}, do not divide over tp = {c.layout.tp}"
    for cut in c.cuts:
        ranks = _ranks(c, cut.part)
        block = halved_group(cut, ranks, c.engine) if cut.halves else cut.block
        shrinks = cut.fewer and c.engine == "trtllm"
        if ranks == 1 or cut.size % (ranks * block) == 0 or (shrinks and cut.size % block == 0):
            continue
        way = _WAYS.get(cut.part, "lower tp")
        each = f"{cut.part} {cut.size} / {ranks} = {cut.size / ranks:g}"
        yield BLOCKS, f"{each} is no multiple of {block} ({cut.scheme}); {way}"
        return


def _of_device(c: Case) -> Iterator[Limit]:
    """What the engine has no kernels for on the device; an entry of its profile holds where all that it names does."""
    if c.kernels is None:
        return
    stored = c.kernels.whole.stored
    for one in c.kernels.missed:
        if (
            one.cache in ("", c.options.kv_dtype or stored.kv) and (c.nodes > 1 or not one.over_nodes)
            and (not one.exchanges or c.exchange in one.exchanges) and (c.options.dual_batch_overlap or not one.halved)
            and (not one.drafts or (c.options.mtp_depth > 0 and c.options.speculative_method in one.drafts))
            and c.layout.pp >= max(one.least_stages, 1 + one.in_pipeline)
        ):
            where = f", not on {c.kernels.architecture}" if one.devices else ""
            yield one.rule, f"{one.says}{where}; {one.way}"


def unasked_exchange(options: Options, engine: EngineProfile, architecture: str) -> Options:
    """``options`` whose exchange gathers tokens where the one that the engine would take has no kernels here."""
    here = (
        one for one in engine.lacking
        if architecture.lower() in one.devices and not (one.over_nodes or one.models or one.but_models or one.experts)
    )  # fmt: skip
    lacking = {kind for one in here for kind in one.exchanges}
    if options.all2all != "auto" or lacking.isdisjoint(engine.all2all.values()):
        return options
    return replace(options, all2all="allgather_reducescatter")


ANY_ENGINE = (BLOCKS, "devices of the engine", "sparse attention kernels", "cache kernels", "precisions of the device")
"""No step can be priced against these: a rank's weights would be none that exist, or no kernel does what it asks."""

_SHARED = ("exchange kernels", "plain all-to-all", "balanced experts", "external shared experts", "whole nodes")
ENGINE_RULES: dict[str, tuple[str, ...]] = {
    "vllm": (
        *_SHARED, "one exchange", "whole experts or all cut", "dual-batch overlap", "draft layers", "DSpark drafts",
        "model classes", "MoonEP", "prefill context parallelism", "prompts in parts", "data-parallel ranks on nodes",
        "DeepEP's ranks", "DeepEP's devices", "vocabulary",
        *(rule for rule in ANY_ENGINE if rule != "devices of the engine"),
    ),
    "sglang": (
        *_SHARED, "model classes", "all-to-all over all ranks", "dual-batch overlap", "draft layers",
        "drafts in a pipeline", "DSpark drafts", "what drafts", "decode context parallelism",
        "prefill context parallelism", "DeepEP v2", "dense replicas on one node", "even experts", "DeepEP's ranks",
        "DeepEP's devices", *ANY_ENGINE,
    ),
    "trtllm": (
        *_SHARED, "one exchange", "attention over all ranks", "dense replicas", "all-to-all with whole experts",
        "dual-batch overlap", "draft layers", "what drafts", "graphs in pieces", "all-reduces with norms",
        "decode context parallelism", "prefill context parallelism", "DeepEP's ranks", "DeepEP's devices",
        *(rule for rule in ANY_ENGINE if rule != "cache kernels"),
    ),
}
"""Names of the rules that an engine has, in the order in which they are told. Sources stand in
``profiles/launch/ENGINE.yaml``."""

_OF_ANY = (_of_blocks, _of_device)
_LIMITS = (_of_exchange, _of_moonep, _of_experts, _of_drafts, _of_nodes, *_OF_ANY)


def engine_can_run(
    engine: str, layout: Layout, facts: ModelFacts, options: Options = Options(), gpus_per_node: int = 8, *,
    prefill: Options | None = None, cuts: tuple[Cut, ...] = (), any_engine: bool = False, lifted: tuple[str, ...] = (),
    kernels: Kernels | None = None,
) -> str:
    """Why ``engine`` cannot run this; empty if it can, or if it has no rules here.

    ``prefill``: how the server that decodes by ``options`` reads prompts, if it does both and they differ. ``cuts``:
    :func:`tensorcast.trace.cuts.cut_widths` of the model. ``any_engine``: only what no engine can, cut as this one
    does; an engine without rules of its own has these. ``lifted``: rules that its release has no more.
    ``kernels``: what is asked of a device, if one is meant.
    """
    case = Case(
        engine=engine, layout=layout, facts=facts, options=options, gpus_per_node=gpus_per_node, prefill=prefill,
        cuts=cuts, kernels=kernels,
    )
    rules, limits = (ANY_ENGINE, _OF_ANY) if any_engine else (ENGINE_RULES.get(engine, ANY_ENGINE), _LIMITS)
    broken = dict(found for limit in limits for found in limit(case))
    return next((f"{name}: {broken[name]}" for name in rules if name in broken and name not in lifted), "")
