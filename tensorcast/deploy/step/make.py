"""The step of a layout: its plan with all that pricing it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tensorcast.cost.formulas import matmul_dtype
from tensorcast.cost.kernels.corrections import corrections_for
from tensorcast.cost.layer_loads import LayerLoads
from tensorcast.cost.roofline import constants_for
from tensorcast.cost.routing import ExpertLoad, Routing, expected_distinct, expert_load
from tensorcast.deploy.exchange_kernels import EXCHANGE_KERNELS
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.plan.plan import Plan, expert_matmuls, moe_blocks
from tensorcast.deploy.step.overlap import Overlap
from tensorcast.deploy.step.row_prices import EXPERTS_CALL, FeedForward, RowPricer
from tensorcast.deploy.step.sizes import Ends, StepSizes
from tensorcast.deploy.step.step import Step
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.trace.table import OpTable

if TYPE_CHECKING:
    from tensorcast.deploy.step.drafter import Drafter

GLOBAL_EPLB = ("trtllm",)
"""Engines whose balancer knows no nodes (TensorRT-LLM, ``examples/wide_ep/ep_load_balancer/generate_eplb_config.py``);
vLLM's and SGLang's keep the router's groups on nodes."""


def moe_layers(table: OpTable) -> tuple[int, ...]:
    """Numbers of the layers with experts."""
    blocks = moe_blocks(table)
    return tuple(i for i, kind in enumerate(table.layer_kinds) if kind in blocks)


def experts_of(
    table: OpTable, layout: Layout, device: DeviceProfile, engine: EngineProfile, options: Options, *,
    routing: Routing | None = None,
) -> tuple[ExpertLoad | LayerLoads | None, dict[str, float]]:
    """How tokens fall on a layout's experts, and how many ranks and nodes a token's copies go to, on average; nothing
    of a model without experts. ``routing``: that of the options, where it is parsed already."""
    facts = table.facts
    if not facts.num_experts:
        return None, {}
    # domains of the innermost tier that the experts' ranks span
    nodes = max(1, -(-layout.stage_ranks // device.interconnect[0].size))
    if layout.dp > 1 and options.all2all in EXCHANGE_KERNELS and EXCHANGE_KERNELS[options.all2all].balances:
        routing = Routing.parse("balanced", table.phase)
    routing = routing or Routing.parse(options.routing, table.phase)
    load = expert_load(
        routing,
        facts.num_experts,
        facts.copies_per_token,
        layout.ep - options.external_shared_experts,
        redundant=options.redundant_experts,
        policy=options.placement,
        fused=facts.fused_experts,
        nodes=1 if engine.name in GLOBAL_EPLB else nodes,
        groups=facts.expert_groups,
        layers=moe_layers(table) if routing.counts is not None else (),
        stages=(len(table.layer_kinds), engine.pipeline_split) if routing.counts is not None else (0, "first"),
    )
    limits = (facts.expert_groups, facts.expert_groups_chosen)
    kept = options.placement.startswith(("eplb", "balanced")) and facts.expert_groups % nodes == 0
    if options.placement not in ("linear", "trivial") and (not kept or options.placement.startswith("eplb_global")):
        limits = (1, 1)  # groups are scattered: a token's choices go anywhere
    return load, {
        tier: expected_distinct(facts.num_experts, facts.top_k, parts, *limits)
        for tier, parts in (("ranks", layout.ep), ("nodes", nodes))
    }


def _ends(
    table: OpTable, plan: Plan, layout: Layout, engine: EngineProfile, *, exchange: str, graph_tokens: float
) -> Ends | None:
    """Where layers that a model needs for the ends of prompts alone run on these."""
    rule, sliced = engine.prompt_ends, plan.form.choosing < 1.0
    if rule is None or not table.facts.ends_tokens:
        return None
    above = rule.above(graph_tokens, tp=layout.tp, dp=layout.dp, exchange=exchange, sliced=sliced)
    return None if above is None else Ends(float(table.facts.ends_tokens), above)


def make_step(
    table: OpTable,
    plan: Plan,
    layout: Layout,
    device: DeviceProfile,
    engine: EngineProfile,
    *,
    kv_bytes: float = 2.0,
    options: Options = Options(),
    prefill_graph_tokens: int = 0,
    sources: Mapping[str, float] | None = None,
    drafter: Drafter | None = None,
    serial_s: float = 0.0,
) -> Step:
    """The step of one layout. ``sources``: whose experts' kernels run, by dtype; ``drafter``: what drafts tokens, if
    it is not the model's own layers; ``serial_s``: what a step takes longer whose scheduler plans none ahead."""
    decode = table.phase == "decode"
    # the eager view launches its kernels one by one
    # kernels that are priced as others may be captured where those are not
    named = options.all2all if options.all2all in EXCHANGE_KERNELS else plan.all2all
    eager = options.fusion != "engine" or named in engine.eager_exchanges
    captured = not eager and table.phase in engine.graph_captured_phases
    # tokens of the largest step that is replayed from a graph
    whole = captured and (not decode or engine.decode_graphs == "full")
    most = math.inf if whole else prefill_graph_tokens if captured or not decode else 0
    matmuls = expert_matmuls(table)
    gated = 1.0
    if len(matmuls) > 1:
        wide, narrow = matmuls["up"].outputs[0].dims[-1].coef, matmuls["down"].inputs[0].dims[-1].coef
        gated = float(wide > 1.5 * narrow)
    load, distinct = experts_of(table, layout, device, engine, options)
    halved = engine.halved_steps
    # with MXFP8 activations on Blackwell; with MXFP4 ones on CDNA 4 (SGLang 0.5.14, quark/schemes/quark_w4a4_mxfp4.py)
    mxfp4 = ("w4a4" if device.vendor == "AMD" else "w4a8") if "fp4" in device.peak_flops else "mxfp4"
    sizes = StepSizes(
        decode=decode, dp=layout.dp, etp=layout.etp, pp=layout.pp, kv_bytes=kv_bytes, mtp_depth=options.mtp_depth,
        dual=options.dual_batch_overlap, least_halved=0.0 if halved is None else float(
            halved.decode_tokens if decode else halved.prefill_tokens
        ), load=load, chunk_tokens=options.chunk_tokens, backend=plan.backend,
        has_fp4="fp4" in device.peak_flops, mxfp4=mxfp4, masked_skips=engine.masked_gemm == "skips",
        pcp=options.pcp, ends=None if decode else _ends(
            table, plan, layout, engine, exchange=named, graph_tokens=most
        ),
    )
    corrections = corrections_for(device, engine.name)
    # an engine's call of experts was timed whole: the constants know what it takes for its rows beside the products
    apart = device.experts_held  # or its kernels alone
    one_call = plan.backend == "grouped_mm" and options.fusion == "engine" and bool(engine.fusions)
    for op in matmuls.values():
        dtype = matmul_dtype(op, mxfp4)
        _, kernel, _ = corrections.question("grouped_gemm", dtype, "", {"rows": 1.0})
        constants, _ = constants_for(device, "grouped_gemm", dtype, kernel[0] if kernel else engine.name)
        one_call = one_call and (apart is not None or bool(constants.row_s or constants.element_s))
    facts = table.facts
    feed_forward = FeedForward(
        facts.moe_hidden_size, facts.moe_intermediate_size, facts.top_k, facts.num_experts, facts.fused_experts, gated
    )
    pricer = RowPricer(
        table=table, device=device, engine=engine, corrections=corrections,
        graph_tokens=0.0 if eager else float(most), tp=layout.tp, ep=layout.ep, etp=layout.etp,
        feed_forward=feed_forward, balanced=options.routing == "balanced", sources=sources or {}, distinct=distinct,
        held=frozenset() if not one_call else EXPERTS_CALL if apart is None else frozenset(("products", *apart)),
        joins=plan.joins,
    )
    overlap = Overlap.of(plan, table, engine, options, captured, decode=decode)
    return Step(
        table=table, plan=plan, sizes=sizes, pricer=pricer, overlap=overlap, captured=captured, drafter=drafter,
        serial_s=serial_s,
    )
