"""Pricing a plan: seconds of every row and of the whole step, for one candidate or for arrays of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce

import numpy as np

from tensorcast.cost.kernels.corrections import BatchedCorrections, corrections_for
from tensorcast.cost.layer_loads import LayerLoads
from tensorcast.cost.routing import ExpertLoad, Routing, expected_distinct, expert_load
from tensorcast.cost.work import Size
from tensorcast.deploy.exchange_kernels import EXCHANGE_KERNELS
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.plan.plan import Collective, Plan, Row
from tensorcast.deploy.step.asked_rows import AskedRows, Memo, Prices, Waiting
from tensorcast.deploy.step.drafter import Drafter, seconds_of_parts
from tensorcast.deploy.step.overlap import Overlap
from tensorcast.deploy.step.pipeline_stages import HAND_OVER, place_of, stages_of
from tensorcast.deploy.step.price import Part, RowPrice, StepPrice, Where, pick, seconds_of, total
from tensorcast.deploy.step.row_prices import RowPricer
from tensorcast.deploy.step.sizes import Batches, StepSizes
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.trace.dims import Dim
from tensorcast.trace.moe import EXPERT_STAGES, blocks_of
from tensorcast.trace.table import Op, OpTable, Tensor, per_table


@dataclass(frozen=True, kw_only=True)
class Step:
    """A plan, ready to be priced for any batch, new tokens and cached tokens.

    ``sizes`` say what a batch's rows are priced at, ``pricer`` what one costs there, ``overlap`` what of that passes
    unseen. ``captured``: the step is replayed from a graph. ``memo``: where prices of rows are kept from call to call.
    ``drafter``: what drafts tokens, if it is not the model's own layers.
    """

    table: OpTable
    plan: Plan
    sizes: StepSizes
    pricer: RowPricer
    overlap: Overlap
    captured: bool
    memo: Memo | None = None
    drafter: Drafter | None = None

    def price(self, batch: Size, new: Size, past: Size) -> StepPrice:
        """Price ``batch`` sequences per data-parallel rank, ``new`` tokens each after ``past`` cached ones.

        With pipeline stages the batch runs as ``min(pp, batch)`` micro-batches: a decode step ends when every
        micro-batch has passed every stage; prefill adds the bubble, ``(m + pp - 1)`` turns of the slowest stage.
        Under dual-batch overlap every stage runs two halves, each priced as the half it is. With drafted tokens a
        decode step checks ``1 + mtp_depth`` tokens per sequence and then drafts anew.
        """
        return next(prices([(self, batch, new, past)]))

    def seconds(self, batch: Size, new: Size, past: Size) -> Size:
        """Step time alone."""
        return self.price(batch, new, past).seconds

    def ask(
        self, batch: Size, new: Size, past: Size, some: Where = None, *, asked: BatchedCorrections, waiting: Waiting
    ) -> Callable[[], StepPrice]:
        """Ask for the corrections of all rows; call what is returned for the price when they are there.

        ``some`` of the batches are added up alone: steps whose rows are the same share these where all of them ask for
        all batches.
        """
        at = self.sizes.batches(batch, new, past, some)
        memo = Memo() if self.memo is None else self.memo
        whole = chunk = AskedRows(self.pricer, at.whole, asked, memo, waiting=waiting)
        if at.chunk is not at.whole:
            chunk = AskedRows(self.pricer, at.chunk, asked, memo, waiting=waiting)
        rows = self.plan.rows
        if at.draft is not None:
            rows = (*rows, *((_projection(self.table),) if self.drafter is None else self.drafter.rows))
        chunked = [bool(r.exchange) if isinstance(r, Collective) else r.stage in EXPERT_STAGES for r in rows]
        passed = [chunk if inside else whole for inside in chunked]
        asked_for = [(sized, *sized.ask(row)) for row, sized in zip(rows, passed, strict=True)]
        return partial(self._priced, pick(batch, some), at, asked_for, chunk)

    def _priced(
        self, batch: Size, at: Batches, asked: Sequence[tuple[AskedRows, Prices, Hashable]], chunk: AskedRows
    ) -> StepPrice:
        """The price of the rows, each with its sizes, that have asked; those of a ``chunk`` run once for each."""
        found = [sized.price(prices, name) for sized, prices, name in asked]
        if at.chunk is not at.whole:
            found = [p.times(at.chunks) if sized is chunk else p for p, (sized, *_) in zip(found, asked, strict=True)]
        parts = self._parts(found, at)
        layers = Counter(self.table.layer_kinds)
        hidden = self.overlap.hidden(found, at.whole.sizes.tokens, at.dual, at.own)
        places: dict[int, list[RowPrice]] = {}
        for price, row in zip(found, self.plan.rows, strict=False):
            places.setdefault(place_of(row), []).append(price)
        taken = {
            place: pick(total(map(seconds_of, prices)), at.own) * at.halves for place, prices in places.items()
        }
        taken |= {kind: taken[kind] - saved for kind, (saved, _) in hidden.items()}
        stages = [
            total(calls * taken[place] for place, calls in stage if place in taken)
            for stage in stages_of(self.table.layer_kinds, at.pp, self.pricer.engine.pipeline_split)
        ]
        if self.drafter is None:
            (drafting,), layer_passes = parts[2:], at.mtp_depth
            stages[-1] = stages[-1] + pick(total(map(seconds_of, drafting.prices)), drafting.at) * drafting.times
        else:
            layer_passes = self.drafter.layer_passes(at.mtp_depth)
            stages[-1] = stages[-1] + seconds_of_parts(parts[2:])
        slowest = reduce(np.maximum, stages)
        turns = at.pp if self.sizes.decode else at.micro + at.pp - 1
        beside = self.pricer.engine.overhead
        passes = (len(self.table.layer_kinds) + layer_passes) * turns / at.pp
        per_sequence = beside.request_s * np.asarray(batch, dtype=float)
        overhead = beside.step_s + beside.layer_s * passes + per_sequence
        saved, saved_comm = (total(layers[kind] * pair[i] for kind, pair in hidden.items()) for i in range(2))
        return StepPrice(
            parts=parts, seconds=slowest * turns + overhead, overhead_s=overhead, request_overhead_s=per_sequence,
            overhead_error_s=beside.layer_error_s * passes,
            micro_batches=at.micro if np.ndim(at.micro) else int(at.micro), hidden_s=saved, hidden_comm_s=saved_comm,
        )

    def _parts(self, found: Sequence[RowPrice], at: Batches) -> tuple[Part, ...]:
        """Rows of all stages, what hands on between them (always the last row), and what drafts."""
        layers, rows = Counter(self.table.layer_kinds), self.plan.rows
        end = len(rows) - (place_of(rows[-1]) == HAND_OVER)
        calls = tuple(layers[row.kind] if row.kind >= 0 else 1 for row in rows[:end])
        between, last = (at.pp - 1) * at.halves, tuple(found[end : len(rows)])
        drafts = self._drafts if at.draft is not None and self.drafter is None else {}
        drafted, ones = tuple(found[i] for i in drafts), (1,) * len(drafts)
        one_pass = Part(rows[:end], tuple(found[:end]), calls, at.halves, at.own)
        hand_overs = Part(rows[end:], last, (1,) * len(last), between, at.own)
        depth = at.mtp_depth
        if self.drafter is None:
            return one_pass, hand_overs, Part(tuple(drafts.values()), drafted, ones, depth, at.draft)
        if at.draft is None:
            return one_pass, hand_overs
        beside = found[len(rows) :]
        return one_pass, hand_overs, *self.drafter.parts(beside, depth, halves=at.halves, own=at.own, draft=at.draft)

    @cached_property
    def _drafts(self) -> dict[int, Row]:
        """What drafts a token, by position (the projection stands behind the plan's rows): a layer of the last kind
        and the head (DeepSeek-V3, section 2.2), after hidden state and embedding are projected together."""
        rows, last = self.plan.rows, self.table.layer_kinds[-1]
        drafting = {len(rows): _projection(self.table)} | {
            i: row for i, row in enumerate(rows)
            if row.kind == last or (row.kind < 0 and row.module.startswith("lm_head"))
        }
        return {i: replace(row, module=f"mtp.{row.module}") for i, row in drafting.items()}


@per_table
def _projection(table: OpTable) -> Op:
    """``[T,2H] x [2H,H]``"""
    hidden = float(table.facts.hidden_size)
    joined = Tensor((Dim(1, B=1), Dim(2 * hidden)), "bfloat16")
    weight = Tensor((Dim(2 * hidden), Dim(hidden)), "bfloat16", weight="eh_proj.weight")
    return Op("mm", "eh_proj", -1, (joined, weight), (Tensor((Dim(1, B=1), Dim(hidden)), "bfloat16"),))


Asked = tuple[Step, Size, Size, Size] | tuple[Step, Size, Size, Size, Where]
"""A step, and the batch, new and cached tokens to price it at: numbers, or arrays that broadcast; some of the batches
alone (:meth:`Step.ask`)."""


def prices(asked: Sequence[Asked]) -> Iterator[StepPrice]:
    """The price of each step, in order, as :meth:`Step.price` gives it: their kernels' fitted models are asked once."""
    waiting: Waiting = {}
    every: dict[int, BatchedCorrections] = {}
    steps = []
    for step, *at in asked:
        corrections = step.pricer.corrections
        later = every.setdefault(id(corrections), BatchedCorrections(corrections))
        steps.append(step.ask(*at, asked=later, waiting=waiting))
    for later in every.values():
        later.find()
    for priced in steps:
        yield priced()


GLOBAL_EPLB = ("trtllm",)
"""Engines whose balancer knows no nodes (TensorRT-LLM, ``examples/wide_ep/ep_load_balancer/generate_eplb_config.py``);
vLLM's and SGLang's keep the router's groups on nodes."""


def moe_layers(table: OpTable) -> tuple[int, ...]:
    """Numbers of the layers with experts."""
    blocks = blocks_of(table.ops)
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
) -> Step:
    """The step of one layout. ``sources``: whose experts' kernels run, by dtype; ``drafter``: what drafts tokens, if
    it is not the model's own layers."""
    decode = table.phase == "decode"
    # the eager view launches its kernels one by one
    # kernels that are priced as others may be captured where those are not
    named = options.all2all if options.all2all in EXCHANGE_KERNELS else plan.all2all
    eager = options.fusion != "engine" or named in engine.eager_exchanges
    captured = not eager and table.phase in engine.graph_captured_phases
    # tokens of the largest step that is replayed from a graph
    most = math.inf if captured else 0 if decode else prefill_graph_tokens
    matmuls = {r.attrs["projection"]: r for r in plan.rows if isinstance(r, Op) and r.name == "grouped_matmul"}
    gated = 1.0  # where experts' first matmul makes gate and up; 0 where there is no gate
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
        pcp=options.pcp,
    )
    pricer = RowPricer(
        table=table, device=device, engine=engine, corrections=corrections_for(device, engine.name),
        graph_tokens=0.0 if eager else float(most), tp=layout.tp, ep=layout.ep, etp=layout.etp, gated=gated,
        balanced=options.routing == "balanced", sources=sources or {}, distinct=distinct,
    )
    overlap = Overlap.of(plan, table, engine, options, captured)
    return Step(
        table=table, plan=plan, sizes=sizes, pricer=pricer, overlap=overlap, captured=captured, drafter=drafter
    )
