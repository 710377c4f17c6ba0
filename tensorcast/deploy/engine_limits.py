"""Which layouts and options an engine can run at all: its limits, named as in the engine's launch table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from tensorcast.deploy.layout import Layout, attention_dp
from tensorcast.deploy.options import Options
from tensorcast.profiles.facts import ModelFacts
from tensorcast.trace.cuts import HALVED_DOWN_TO, Cut


@dataclass(frozen=True)
class Case:
    """What is to run. ``prefill``: options of the same server's prefill where ``options`` are those of its decode.

    ``cuts``: the widths of the model that must be cut into whole blocks of its checkpoint.
    """

    engine: str
    layout: Layout
    facts: ModelFacts
    options: Options
    gpus_per_node: int
    prefill: Options | None = None
    cuts: tuple[Cut, ...] = ()

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

Broken = Callable[[Case], str]
_DEEPEP = ("high_throughput", "low_latency", "by_phase")


def _whole_or_cut(c: Case) -> str:
    if not c.facts.num_experts or c.layout.ep in (1, c.layout.stage_ranks):
        return ""
    return (
        f"experts are spread over all tp*dp = {c.layout.stage_ranks} ranks or each is cut over all of them: "
        f"ep must be {c.layout.stage_ranks} or 1, not {c.layout.ep}"
    )


def _plain(c: Case) -> str:
    return "no plain all-to-all between experts; choose another all2all" if c.exchange == "direct" else ""


def _one_exchange(c: Case) -> str:
    first = c.exchange if c.prefill is None else replace(c, options=c.prefill).exchange
    if first == c.exchange:
        return ""
    return f"a server has one exchange for both phases, not {first} in prefill and {c.exchange} in decode"


def _overlap_needs_deepep(c: Case) -> str:
    if not c.options.dual_batch_overlap or c.exchange in _DEEPEP:
        return ""
    return f"dual-batch overlap needs DeepEP (high_throughput or low_latency) at dp > 1, not {c.exchange or 'none'}"


def _no_overlap(c: Case) -> str:
    return "no dual-batch overlap" if c.options.dual_batch_overlap else ""


def _balanced(c: Case) -> str:
    copies, experts = c.options.redundant_experts, c.facts.num_experts
    if not copies and c.options.placement != "eplb":
        return ""
    if c.layout.ep == 1:
        return "experts are copied or rearranged between expert-parallel ranks only: ep = 1"
    if (experts + copies) % c.layout.ep:
        return f"{experts} experts and {copies} copies do not divide over ep = {c.layout.ep}"
    return ""


def _external(c: Case) -> str:
    n = c.options.external_shared_experts
    return f"no ranks for shared experts alone (external_shared_experts = {n})" if n else ""


def _drafts(c: Case) -> str:
    depth, modules = c.options.mtp_depth, c.facts.mtp_modules
    if not depth or depth <= MOST_DRAFTS <= MOST_DRAFTS * modules:
        return ""
    if not modules:
        return "the model has no multi-token-prediction layer to draft with"
    return f"{depth} drafted tokens from {modules} multi-token-prediction layer(s): {MOST_DRAFTS} at most are drafted"


def _draft_multiple(c: Case) -> str:
    depth, modules = c.options.mtp_depth, c.facts.mtp_modules
    if missing := _drafts(c):
        return missing
    if modules and depth > modules and depth % modules:
        return f"{depth} drafted tokens are no multiple of the model's {modules} multi-token-prediction layers"
    return ""


def _drafts_in_pipeline(c: Case) -> str:
    return f"no speculative decoding at pp = {c.layout.pp}" if c.options.mtp_depth and c.layout.pp > 1 else ""


def _nodes(c: Case) -> str:
    if c.nodes == 1 or c.layout.world_size % c.gpus_per_node == 0:
        return ""
    return f"{c.layout.world_size} GPUs do not fill nodes of {c.gpus_per_node}"


def _ranks_on_nodes(c: Case) -> str:
    ranks = c.layout.tp * c.layout.pp
    if c.nodes == 1 or c.gpus_per_node % ranks == 0 or ranks % c.gpus_per_node == 0:
        return ""
    return f"tp*pp = {ranks} GPUs of a data-parallel rank neither divide nor fill nodes of {c.gpus_per_node}"


def _deepep_over_all(c: Case) -> str:
    if c.exchange not in _DEEPEP or c.layout.etp == 1:
        return ""
    return f"DeepEP spreads experts over all tp*dp = {c.layout.stage_ranks} ranks, not ep = {c.layout.ep}"


def _dense_on_one_node(c: Case) -> str:
    if c.facts.num_experts or c.layout.dp == 1 or c.nodes == 1:
        return ""
    return f"dp = {c.layout.dp} of a dense model over {c.nodes} nodes: start an engine per node"


def _attention_over_all(c: Case) -> str:
    if not c.facts.num_experts or 1 in (c.layout.tp, c.layout.dp):
        return ""
    return f"attention is tensor-parallel or data-parallel over all ranks, not tp{c.layout.tp} x dp{c.layout.dp}"


def _dense_replicas(c: Case) -> str:
    if c.facts.num_experts or c.layout.dp == 1:
        return ""
    return f"a dense model has no dp: start {c.layout.dp} engines of tp{c.layout.tp}"


def _whole_for_exchange(c: Case) -> str:
    if c.exchange in ("", "auto", "allgather_reducescatter") or c.layout.etp == 1:
        return ""
    return f"experts cut over {c.layout.etp} ranks: tokens are gathered, no {c.exchange} exchange"


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
    travels = (c.engine == "vllm" and spread and layout.ep > 1) or (c.engine == "sglang" and c.exchange in _DEEPEP)
    if shared and travels:
        return 1
    if c.engine != "sglang" or not spread:
        return layout.tp
    return layout.stage_ranks if shared else 1


_WAYS = {"routed experts": "raise ep", "shared expert": "lower tp, or send tokens to experts (dp > 1, ep = tp*dp)"}
"""Out of a cut through a block."""


def split_blocks(c: Case) -> str:
    """Which width a layout cuts through a block of the checkpoint's scales, with the numbers; empty if none."""
    for cut in c.cuts:
        ranks, block = _ranks(c, cut.part), cut.block
        if cut.halves and c.engine in ("vllm", "sglang"):
            while cut.size % (ranks * block) and block >= 2 * HALVED_DOWN_TO:
                block //= 2
        shrinks = cut.fewer and c.engine == "trtllm"
        if ranks == 1 or cut.size % (ranks * block) == 0 or (shrinks and cut.size % block == 0):
            continue
        way = _WAYS.get(cut.part, "lower tp")
        return f"{cut.part} {cut.size} / {ranks} = {cut.size / ranks:g} is no multiple of {block} ({cut.scheme}); {way}"
    return ""


ANY_ENGINE: dict[str, Broken] = {BLOCKS: split_blocks}
"""No step can be priced against these: a rank's weights would be none that exist."""

_SHARED: dict[str, Broken] = {
    "plain all-to-all": _plain,
    "balanced experts": _balanced,
    "external shared experts": _external,
    "whole nodes": _nodes,
}
ENGINE_RULES: dict[str, dict[str, Broken]] = {
    "vllm": {
        **_SHARED,
        "one exchange": _one_exchange,
        "whole experts or all cut": _whole_or_cut,
        "dual-batch overlap": _overlap_needs_deepep,
        "draft layers": _draft_multiple,
        "data-parallel ranks on nodes": _ranks_on_nodes,
        **ANY_ENGINE,
    },
    "sglang": {
        **_SHARED,
        "all-to-all over all ranks": _deepep_over_all,
        "dual-batch overlap": _overlap_needs_deepep,
        "draft layers": _drafts,
        "drafts in a pipeline": _drafts_in_pipeline,
        "dense replicas on one node": _dense_on_one_node,
        **ANY_ENGINE,
    },
    "trtllm": {
        **_SHARED,
        "one exchange": _one_exchange,
        "attention over all ranks": _attention_over_all,
        "dense replicas": _dense_replicas,
        "all-to-all with whole experts": _whole_for_exchange,
        "dual-batch overlap": _no_overlap,
        "draft layers": _drafts,
        **ANY_ENGINE,
    },
}
"""By engine and rule name: what is wrong, or empty. Sources stand in ``profiles/launch/ENGINE.yaml``."""


def one_exchange(engine: str) -> bool:
    """Whether a server of ``engine`` has the same all-to-all in prefill and decode."""
    return "one exchange" in ENGINE_RULES.get(engine, {})


def engine_can_run(
    engine: str, layout: Layout, facts: ModelFacts, options: Options = Options(), gpus_per_node: int = 8, *,
    prefill: Options | None = None, cuts: tuple[Cut, ...] = (), any_engine: bool = False,
) -> str:
    """Why ``engine`` cannot run this; empty if it can, or if it has no rules here.

    ``prefill``: how the server that decodes by ``options`` reads prompts, if it does both and they differ. ``cuts``:
    :func:`tensorcast.trace.cuts.cut_widths` of the model. ``any_engine``: only what no engine can, cut as this one
    does; an engine without rules of its own has these.
    """
    case = Case(
        engine=engine, layout=layout, facts=facts, options=options, gpus_per_node=gpus_per_node, prefill=prefill,
        cuts=cuts,
    )
    rules = ANY_ENGINE if any_engine else ENGINE_RULES.get(engine, ANY_ENGINE)
    for name, broken in rules.items():
        if problem := broken(case):
            return f"{name}: {problem}"
    return ""
