"""How a model is spread over GPUs, and the rules that a layout must keep."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensorcast.errors import InputError
from tensorcast.profiles.facts import ModelFacts

if TYPE_CHECKING:
    from tensorcast.profiles.device import DeviceProfile

ALL2ALL = ("auto", "allgather_reducescatter", "high_throughput", "low_latency", "direct")
"""How tokens reach experts on other data-parallel ranks: gather everything; DeepEP's two modes; plain all-to-all."""


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

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tp * self.dp

    @property
    def etp(self) -> int:
        """Experts' tensor-parallel size."""
        return max(1, self.stage_ranks // max(self.ep, 1))

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


@dataclass(frozen=True)
class Rule:
    """A named condition on a layout; ``broken`` says what is wrong, or is empty."""

    name: str
    broken: Callable[[Layout, ModelFacts, DeviceProfile], str]


def _world(layout: Layout, facts: ModelFacts, device: DeviceProfile) -> str:
    product = layout.tp * layout.dp * layout.pp
    if product == layout.world_size:
        return ""
    return f"tp*dp*pp = {layout.tp}*{layout.dp}*{layout.pp} = {product}, but world_size = {layout.world_size}"


def _heads(layout: Layout, facts: ModelFacts, device: DeviceProfile) -> str:
    if not facts.heads or facts.heads % layout.tp == 0:  # a state-space model has none
        return ""
    return f"{facts.heads} attention heads do not divide over tp = {layout.tp}"


def _kv_heads(layout: Layout, facts: ModelFacts, device: DeviceProfile) -> str:
    """A rank holds whole heads of keys and values: its own, or a copy of one that several ranks share.

    Of every engine: vLLM 0.24.0, model_executor/models/ (assert total_num_kv_heads % tp_size == 0, in 64 files), SGLang
    0.5.14, srt/models/ (the same), TensorRT-LLM, _torch/models/modeling_utils.py (duplicate_kv_weight).
    """
    heads, tp = facts.kv_heads, layout.tp
    if not heads or heads % tp == 0 or tp % heads == 0:
        return ""
    return f"{heads} KV heads are neither a multiple nor a divisor of tp = {tp}"


def _expert_ranks(layout: Layout, facts: ModelFacts, device: DeviceProfile) -> str:
    if not facts.num_experts:
        return "" if layout.ep == 1 else f"ep = {layout.ep}, but the model has no experts; use ep = 1"
    if layout.stage_ranks % layout.ep == 0:
        return ""
    return f"ep = {layout.ep} does not divide tp*dp = {layout.stage_ranks}"


def _experts_per_rank(layout: Layout, facts: ModelFacts, device: DeviceProfile) -> str:
    if layout.ep <= max(facts.num_experts, 1):
        return ""
    return f"ep = {layout.ep} is more than the {facts.num_experts} experts; a rank would hold none"


def _expert_width(layout: Layout, facts: ModelFacts, device: DeviceProfile) -> str:
    width = facts.moe_intermediate_size
    if not facts.num_experts or width % layout.etp == 0:
        return ""
    return f"expert width {width} does not divide over tp*dp/ep = {layout.etp} ranks; raise ep"


def _stages(layout: Layout, facts: ModelFacts, device: DeviceProfile) -> str:
    if layout.pp <= facts.layers:
        return ""
    return f"pp = {layout.pp} is more than the {facts.layers} layers"


def _reach(layout: Layout, facts: ModelFacts, device: DeviceProfile) -> str:
    if layout.world_size <= device.world_limit:
        return ""
    return f"world_size = {layout.world_size}, but {device.name}'s interconnect reaches {device.world_limit}"


RULES = (
    Rule("world size", _world),
    Rule("heads per rank", _heads),
    Rule("KV heads per rank", _kv_heads),
    Rule("expert ranks", _expert_ranks),
    Rule("experts per rank", _experts_per_rank),
    Rule("expert width", _expert_width),
    Rule("pipeline stages", _stages),
    Rule("interconnect reach", _reach),
)


def attention_dp(layout: Layout, num_experts: int) -> int:
    """Data-parallel ranks of one server's attention: of a dense model every rank is a server of its own."""
    return layout.dp if num_experts else 1


def check(layout: Layout, facts: ModelFacts, device: DeviceProfile) -> None:
    """Raise :class:`InputError` naming the first rule that ``layout`` breaks for a model with these ``facts``."""
    for name in ("world_size", "tp", "dp", "ep", "pp"):
        if getattr(layout, name) < 1:
            raise InputError(f"layout: {name} = {getattr(layout, name)} must be at least 1")
    for rule in RULES:
        problem = rule.broken(layout, facts, device)
        if problem:
            raise InputError(f"layout {layout} breaks rule '{rule.name}': {problem}")


def stage_layers(layers: int, pp: int) -> list[slice]:
    """Layers of each pipeline stage: contiguous, the first stages one more where they do not divide."""
    bounds = [0]
    for stage in range(pp):
        bounds.append(bounds[-1] + layers // pp + (1 if stage < layers % pp else 0))
    return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
