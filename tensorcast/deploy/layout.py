"""How a model is spread over GPUs, and the rules that a layout must keep."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tensorcast.errors import InputError
from tensorcast.profiles.facts import ModelFacts
from tensorcast.profiles.memory import is_latent

if TYPE_CHECKING:
    from tensorcast.profiles.device import DeviceProfile

ALL2ALL = (
    "auto", "allgather_reducescatter", "high_throughput", "low_latency", "direct", "deepep_v2", "nixl_ep",
    "mori_high_throughput", "mori_low_latency", "flashinfer_nvlink_one_sided", "flashinfer_nvlink_two_sided",
    "mega_moe", "moonep",
)
"""How tokens reach experts on other data-parallel ranks: gather everything; DeepEP's two modes; plain all-to-all; other
kernels of engines (:mod:`tensorcast.deploy.exchange_kernels`)."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups. Ranks are numbered tp fastest, then dp, then pp.

    Experts live on the ``tp * dp`` ranks of a pipeline stage: ``ep`` groups of whole experts, each expert cut over
    ``etp`` ranks, ``ep * etp == tp * dp``.
    """

    world_size: int
    tp: int = 1
    dp: int = 1
    ep: int = 1
    pp: int = 1
    stage_ranks: int = field(init=False, repr=False, compare=False)
    """Ranks of one pipeline stage."""
    etp: int = field(init=False, repr=False, compare=False)
    """Experts' tensor-parallel size."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stage_ranks", self.tp * self.dp)
        object.__setattr__(self, "etp", max(1, self.stage_ranks // max(self.ep, 1)))

    def __str__(self) -> str:
        parts = [f"tp{self.tp}", f"dp{self.dp}"]
        parts += [f"ep{self.ep}"] if self.ep > 1 else []
        parts += [f"pp{self.pp}"] if self.pp > 1 else []
        return "-".join(parts)


def parse_layout(text: str, world_size: int | None = None) -> Layout:
    """A layout from words such as ``tp8-dp4-ep32-pp2``, as ``str(layout)`` writes them; a size left out is 1.

    ``world_size`` defaults to tp*dp*pp. Raises :class:`InputError` on anything else.
    """
    sizes: dict[str, int] = {}
    for word in re.split(r"[-,\s]+", text.strip().lower()):
        found = re.fullmatch(r"(tp|dp|ep|pp)=?(\d+)", word)
        if not found or found[1] in sizes:
            raise InputError(f"layout {text!r}: {word!r} is not one size each of tp, dp, ep, pp, as in tp1-dp32-ep32")
        sizes[found[1]] = int(found[2])
    if min(sizes.values()) < 1:
        raise InputError(f"layout {text!r}: every size must be at least 1")
    product = sizes.get("tp", 1) * sizes.get("dp", 1) * sizes.get("pp", 1)
    return Layout(product if world_size is None else world_size, **sizes)


RULES = (
    "world size", "heads per rank", "KV heads per rank", "expert ranks", "experts per rank", "expert width",
    "pipeline stages", "interconnect reach",
)  # fmt: skip
"""Names of what a layout must keep, in the order of :func:`broken_rules`."""


def broken_rules(layout: Layout, facts: ModelFacts, device: DeviceProfile) -> Iterator[tuple[str, str]]:
    """Every rule of :data:`RULES` that ``layout`` breaks for a model with these ``facts``, and what is wrong.

    Whole heads of keys and values are a rank's own, or copies of one that several ranks share. Of every engine: vLLM
    0.24.0, model_executor/models/ (assert total_num_kv_heads % tp_size == 0, in 64 files), SGLang 0.5.14, srt/models/
    (the same), TensorRT-LLM, _torch/models/modeling_utils.py (duplicate_kv_weight).
    """
    tp, ep, experts = layout.tp, layout.ep, facts.num_experts
    product = tp * layout.dp * layout.pp
    if product != layout.world_size:
        said = f"tp*dp*pp = {tp}*{layout.dp}*{layout.pp} = {product}, but world_size = {layout.world_size}"
        yield "world size", said
    if facts.heads % tp:  # a state-space model has none
        yield "heads per rank", f"{facts.heads} attention heads do not divide over tp = {tp}"
    if facts.kv_heads and facts.kv_heads % tp and tp % facts.kv_heads:
        yield "KV heads per rank", f"{facts.kv_heads} KV heads are neither a multiple nor a divisor of tp = {tp}"
    if not experts and ep > 1:
        yield "expert ranks", f"ep = {ep}, but the model has no experts; use ep = 1"
    elif layout.stage_ranks % ep:
        yield "expert ranks", f"ep = {ep} does not divide tp*dp = {layout.stage_ranks}"
    if ep > max(experts, 1):
        yield "experts per rank", f"ep = {ep} is more than the {experts} experts; a rank would hold none"
    if experts and facts.moe_intermediate_size % layout.etp:
        width = facts.moe_intermediate_size
        yield "expert width", f"expert width {width} does not divide over tp*dp/ep = {layout.etp} ranks; raise ep"
    if layout.pp > facts.layers:
        yield "pipeline stages", f"pp = {layout.pp} is more than the {facts.layers} layers"
    if layout.world_size > device.world_limit:
        reach = f"{device.name}'s interconnect reaches {device.world_limit}"
        yield "interconnect reach", f"world_size = {layout.world_size}, but {reach}"


def broken_context(dcp: int, layout: Layout, facts: ModelFacts, *, latent: bool) -> str:
    """Why ``dcp`` of a layout's tensor-parallel ranks cannot share a sequence's cache; empty if they can.

    Ranks share what they would hold copies of: latents, which all hold, or heads of keys and values that several do.
    vLLM 0.33.0, config/model.py (verify_with_parallel_config) and config/parallel.py; SGLang 0.5.23,
    arg_groups/attention_hook.py.
    """
    tp, heads, kv_heads = layout.tp, facts.heads, facts.kv_heads
    if dcp > 1 and tp % dcp:
        return f"--dcp {dcp} does not divide tp = {tp}"
    if dcp == 1 or latent:
        return ""
    if not kv_heads or dcp > tp // kv_heads:
        copies = f"tp = {tp} has {max(1, tp // kv_heads) if kv_heads else 0} ranks for each of {kv_heads} KV heads"
        return f"--dcp {dcp}: {copies}; it must not be more"
    if (heads // kv_heads) % dcp:
        return f"--dcp {dcp} does not divide the {heads // kv_heads} query heads of a KV head"
    return ""


def broken_prompts(pcp: int, layout: Layout) -> str:
    """Why ``pcp`` data-parallel groups of a layout cannot read prompts together; empty if they can."""
    return f"--pcp {pcp} does not divide dp = {layout.dp}" if pcp > 1 and layout.dp % pcp else ""


def attention_dp(layout: Layout, num_experts: int) -> int:
    """Data-parallel ranks of one server's attention: of a dense model every rank is a server of its own."""
    return layout.dp if num_experts else 1


def one_server(layout: Layout, num_experts: int) -> tuple[Layout, int]:
    """A server of ``layout``, and how many of it there are: of a dense model every data-parallel rank is one.

    Such ranks share an address and nothing else, and none waits for another's step: vLLM since 0.14.0,
    v1/engine/core.py ("Non-MoE DP ranks are completely independent"; stepping together before is not priced);
    SGLang 0.5.23, managers/data_parallel_controller.py.
    """
    ranks = attention_dp(layout, num_experts)
    if ranks == layout.dp:
        return layout, 1
    return Layout(layout.world_size // layout.dp, layout.tp, ep=layout.ep, pp=layout.pp), layout.dp


def check(layout: Layout, facts: ModelFacts, device: DeviceProfile) -> None:
    """Raise :class:`InputError` naming the first rule that ``layout`` breaks for a model with these ``facts``."""
    for name in ("world_size", "tp", "dp", "ep", "pp"):
        if getattr(layout, name) < 1:
            raise InputError(f"layout: {name} = {getattr(layout, name)} must be at least 1")
    for name, problem in broken_rules(layout, facts, device):
        raise InputError(f"layout {layout} breaks rule '{name}': {problem}")


def broken_parts(dcp: int, pcp: int, layout: Layout, facts: ModelFacts, config: dict[str, Any]) -> str:
    """Why a layout cannot cut a sequence's cache, or a prompt, over so many ranks; empty if it can."""
    return broken_context(dcp, layout, facts, latent=is_latent(config)) or broken_prompts(pcp, layout)
