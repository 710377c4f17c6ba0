"""From an op table and a layout to the rows of one rank's step: the table's ops with the layout's collectives between.

Rules: a row-parallel matmul leaves partial sums, an all-reduce over tp follows. A MoE block exchanges tokens the way
``all2all`` says when dp > 1; at dp = 1 every rank already has all tokens, works on its experts, and one all-reduce
sums routed and shared experts alike, unless tokens are split over tp: then each rank sends its slice. The logits are
gathered. Pipeline stages hand on hidden state and residual.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

from tensorcast.cost.collectives import group_extent
from tensorcast.cost.work import Size
from tensorcast.deploy.exchange_kernels import EXCHANGE_KERNELS
from tensorcast.deploy.layout import ALL2ALL, Layout, attention_dp
from tensorcast.deploy.options import EXCHANGES, Options
from tensorcast.deploy.plan.kernels import (
    attended_by,
    attention_kernels,
    choose_experts_backend,
    gemm_rules,
    multiplied_by,
)
from tensorcast.errors import InputError, unknown_name
from tensorcast.modeling.quantization import SCHEMES, Scheme, rounded_hidden
from tensorcast.profiles.config_values import is_one_of
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.kernels import GATHERS
from tensorcast.trace.cache import WholeModel
from tensorcast.trace.dims import product
from tensorcast.trace.moe import BlockForm, Whole, blocks_of
from tensorcast.trace.sharding import sums_of
from tensorcast.trace.table import Op, OpTable, per_table, with_attr

CollectiveOp = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"]


@dataclass(frozen=True)
class Collective:
    """A collective row: what moves, in which group, and how the payload grows with the sizes.

    ``payload`` is ``scale`` bytes times the tokens of this rank (or, ``per="sequence"``, its sequences), in the units
    that :func:`tensorcast.cost.collectives.collective_time` defines per op.
    """

    op: CollectiveOp
    module: str
    kind: int
    group: str
    ranks: int
    extent: tuple[int, ...]
    scale: Size
    per: Literal["token", "sequence"] = "token"
    exchange: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def said(self) -> Hashable:
        """All but how much moves, and how far."""
        return self.op, self.module, self.kind, self.group, self.label, bool(self.exchange)

    def beside(self, op: Op) -> Collective:
        """The same in the module and layer of an op."""
        _, _, _, *rest = vars(self).values()
        return Collective(self.op, op.module, op.kind, *rest)


Row = Op | Collective


@dataclass(frozen=True)
class Plan:
    """Rows of one rank's step, in order, how the MoE blocks exchange tokens, and how their matmuls run.

    ``form``: on which tokens a rank works inside the blocks. ``joins``: norms run in the all-reduces before them.
    """

    rows: tuple[Row, ...]
    all2all: str
    dispatch: Scheme
    combine: Scheme
    backend: str
    form: BlockForm
    joins: bool = False

    @cached_property
    def frame(self) -> Plan:
        """The first of all plans that differ in their collectives' sizes alone: what holds for all is kept with it."""
        said = tuple([id(row) if isinstance(row, Op) else row.said for row in self.rows])
        if said not in _frames:
            while len(_frames) >= MOST_FRAMES:
                del _frames[next(iter(_frames))]
            _frames[said] = self  # its ops stay alive, so that their ids stay their own
        return _frames[said]


MOST_FRAMES = 2048

_frames: dict[tuple[Hashable, ...], Plan] = {}


def choose_all2all(wanted: str, layout: Layout, engine: EngineProfile, phase: Any, *, split: bool = False) -> str:
    """The exchange that runs: the wanted one, or what it is priced as, else the engine's default for the phase.

    At dp = 1 it is ``none``, unless tokens are ``split`` over tp and so travel.
    """
    if wanted not in ALL2ALL:
        raise unknown_name("--all2all", wanted, ALL2ALL)
    if layout.dp == 1 and not split:
        return "none"
    if wanted == "auto":
        default = engine.all2all.get(phase, "allgather_reducescatter")
        return default if layout.etp == 1 and layout.ep > 1 else "allgather_reducescatter"
    if wanted != "allgather_reducescatter" and (layout.etp > 1 or layout.ep == 1):
        raise InputError(
            f"--all2all {wanted}: needs whole experts on every rank (ep = tp*dp = {layout.stage_ranks}), "
            f"got ep = {layout.ep}"
        )
    return EXCHANGE_KERNELS[wanted].like if wanted in EXCHANGE_KERNELS else wanted


def block_form(
    options: Options, layout: Layout, all2all: str, engine: EngineProfile, *, device: DeviceProfile,
    config: dict[str, Any], whole: WholeModel,
) -> BlockForm:
    """On which tokens a rank works inside its MoE blocks, and how shared experts run, as the layer itself does.

    Where rows travel each tp rank has a slice of the tokens: of an engine that slices before the router, the router
    and the shared experts work on the slice, too. Gathered tokens are chosen for after the gather if so asked.
    ``config``: the model's; ``whole``: the model before it is cut.
    """
    rule, fusing, travels = engine.sliced_blocks, engine.fused_shared_experts, all2all in EXCHANGES
    fused, spread = False, layout.ep > 1
    if fusing is not None and options.shared_experts_fusion and options.shared_expert_tp and not travels:
        kernels = ""
        if engine.experts is not None:
            kernels = engine.experts.library(
                device.architecture, whole.stored.experts.name, config, spread, attention_dp=layout.dp > 1
            )
        fused = options.fusion == "engine" and whole.facts.shared_experts and fusing.holds(
            config, whole.facts.num_experts, architecture=device.architecture, spread=spread, kernels=kernels
        )
    sliced = (
        rule is not None and layout.tp > 1 and layout.etp == 1 and layout.dp >= rule.least_dp
        and all2all in rule.exchanges and is_one_of(rule.architectures, config)
    )  # fmt: skip
    part, shared = 1.0 / layout.tp, None
    if options.external_shared_experts:
        shared = Whole(layout.dp / options.external_shared_experts, resident=False)
    elif layout.tp > 1 and (sliced or not options.shared_expert_tp):
        shared = Whole(part if travels or sliced else 1.0)
    later = options.route_after_dp_transform and all2all != "none"
    own = 1.0 if travels or not later else float(layout.dp)
    return BlockForm(
        shared=shared, norm=part if sliced and rule is not None and rule.scatters else 1.0,
        choosing=part if sliced or (later and travels) else own, moving=part if travels else 1.0,
        adding=part if sliced or travels else 1.0, fused=fused,
    )


COMBINES = {
    **{name: scheme for name, scheme in SCHEMES.items() if name == "bf16" or scheme.quantizes_activation},
    "logfmt10": Scheme("logfmt10", 2.0, 10 / 8 + 4 / 128),
}
"""What results can travel back in. ``logfmt10``: ten bits a number and four bytes per 128, only in DeepEP's low-latency
kernels (bytes as github.com/deepseek-ai/DeepEP counts them, tests/legacy/test_low_latency.py)."""


def make_plan(
    table: OpTable,
    layout: Layout,
    device: DeviceProfile,
    engine: EngineProfile,
    *,
    options: Options,
    config: dict[str, Any],
    form: BlockForm,
) -> Plan:
    """The rows of one rank, by ``options``' exchange, its dtypes and the backend. ``config``: the model's; ``form``:
    that of its MoE blocks in ``table``.
    """
    exchange = exchange_of(table, layout, device, engine, options=options, form=form)
    tp, done, rows = group_extent(layout.tp, 1, device), 0, list[Row]()
    sites, blocks = _sites(table)
    moe, scattered = exchange.collectives, form.norm < 1.0  # the sum before the block slices the tokens
    for i, (op, places) in sites.items():
        if "dispatch" in places:
            rows += table.ops[done:i]
            rows += (one.beside(op) for one in moe["dispatch"])
            done = i
        rows += table.ops[done : i + 1]
        done = i + 1
        # a block without an exchange sums its shared experts in its own all-reduce
        summed = exchange.all2all == "none" and op.module.startswith(blocks.get(op.kind, "no block"))
        if layout.tp > 1 and op.shard == "row" and not summed:
            # a matmul's output, or the one number per token that a norm reduces to
            norm, width = op.name == "pointwise", op.outputs[0].dims[-1].coef
            if op.name == "embedding":  # a token may have several rows
                width = product(op.outputs[0].dims)[0].coef
            label = "norm over sharded width" if norm else ""
            partial_sums = 4.0 * max(op.parts.count("rsqrt"), 1) if norm else 2.0 * width
            rows += [sums_of(op)] * norm
            kept = norm or not (scattered and op.kind in blocks)
            name: CollectiveOp = "all_reduce" if kept else "reduce_scatter"
            per, many = _rows_of(op) if table.phase == "encode" else ("token", 1.0)
            rows.append(Collective(
                name, op.module, op.kind, "tp", layout.tp, tp, many * partial_sums, per, label=label
            ))  # fmt: skip
        if layout.tp > 1 and "logits" in places:
            vocabulary = table.facts.vocab_size * 2.0
            rows.append(Collective(
                op="all_gather", module=op.module, kind=op.kind, group="tp", ranks=layout.tp, extent=tp,
                scale=vocabulary, per="sequence", label="logits",
            ))  # fmt: skip
        for place in ("combine", "end"):
            if place in places:
                rows += (one.beside(op) for one in moe[place])
    rows += table.ops[done:]
    rows += moe["stages"]
    asked, limits = options.fusion == "engine" and "allreduce_norm" in engine.fusions, engine.allreduce_norm
    alone, joins = attention_dp(layout, table.facts.num_experts) == 1, False
    if asked and (limits is None or (is_one_of(limits.models, config) and (alone or not limits.one_replica))):
        joins = _join_norms(rows, device, engine)
    if any(how := attention_kernels(engine, device.architecture, config)):
        rows = [attended_by(row, *how) if isinstance(row, Op) else row for row in rows]
    if own := gemm_rules(engine, device.architecture, config):
        rows = [multiplied_by(row, own) if isinstance(row, Op) else row for row in rows]
    backend = choose_experts_backend(options.experts_backend, exchange.all2all, engine, device, table.phase)
    return Plan(
        rows=tuple(rows), all2all=exchange.all2all, dispatch=exchange.dispatch, combine=exchange.combine,
        backend=backend, form=form, joins=joins,
    )


class Exchange(NamedTuple):
    """How a MoE block exchanges tokens, what they and their results travel in, and all that hangs on how ranks lie.

    ``collectives``: by place, before the permute (``dispatch``), after the experts (``combine``), at the block's
    ``end``, and between pipeline ``stages``. The rows of each block put them in their place.
    """

    all2all: str
    dispatch: Scheme
    combine: Scheme
    collectives: dict[str, list[Collective]]


def exchange_of(
    table: OpTable, layout: Layout, device: DeviceProfile, engine: EngineProfile, *, options: Options, form: BlockForm
) -> Exchange:
    """The exchange of a layout's MoE blocks.

    Tokens are sent as the experts read them if these quantise them, and come back in bf16, unless said otherwise.
    """
    split, dispatch, facts = options.split_tokens_over_tp, options.dispatch, table.facts
    chosen = choose_all2all(options.all2all, layout, engine, table.phase, split=split)
    experts = next(iter(expert_matmuls(table).values()), None)
    if dispatch is not None and dispatch not in SCHEMES:
        raise unknown_name("--dispatch dtype", dispatch, SCHEMES)
    scheme = SCHEMES[dispatch or (experts.attrs.get("scheme", "bf16") if experts else "bf16")]
    gather = engine.gather if chosen == "allgather_reducescatter" else None
    if not scheme.quantizes_activation or (gather is not None and gather.bf16 and dispatch is None):
        scheme = SCHEMES["bf16"]
    if options.combine is not None and options.combine not in COMBINES:
        raise unknown_name("--combine dtype", options.combine, COMBINES)
    if options.combine == "logfmt10" and chosen != "low_latency":
        raise InputError(f"--combine logfmt10: only the low_latency exchange has it, and here it is {chosen}")
    combine = COMBINES[options.combine or "bf16"]  # bf16 unasked, as DeepEP does
    width = facts.moe_hidden_size
    if engine.pads_hidden and experts is not None:
        width = rounded_hidden(width, experts.attrs.get("scheme", "bf16"))
    copies = facts.copies_per_token + (options.external_shared_experts > 0)  # one for an external shared expert
    token, result = (float(width) * one.activation_bytes for one in (scheme, combine))
    gathers = gather.prompts if gather is not None and table.phase == "prefill" else GATHERS
    sent = _Sent(token, result, facts.moe_hidden_size, copies, form.adding < 1.0, gathers)
    found = _moe_collectives(layout, device, chosen, sent)
    state = 2.0 * facts.handed_on * facts.hidden_size  # hidden state and residual in bf16
    found["stages"] = [] if layout.pp == 1 else [Collective(
        op="send_recv", module="pipeline", kind=-1, group="pp", ranks=2,
        extent=group_extent(2, layout.stage_ranks, device), scale=state, label="stage hand-over",
    )]  # fmt: skip
    return Exchange(chosen, scheme, combine, found)


class _Sent(NamedTuple):
    """What a MoE block exchanges: bytes of a token and of its result, as they travel, the hidden size of the block,
    and the (token, expert) copies of a token. ``sliced``: each tp rank has a slice of the tokens until they are
    gathered. ``gathers``: what gathers tokens, and takes their results back, where no exchange does."""

    token_bytes: float
    result_bytes: float
    hidden: int
    copies: float
    sliced: bool
    gathers: tuple[CollectiveOp, CollectiveOp]


@per_table
def moe_blocks(table: OpTable) -> dict[int, str]:
    """Layer kind -> path of its MoE block."""
    return blocks_of(table.ops)


@per_table
def expert_matmuls(table: OpTable) -> dict[str, Op]:
    """Experts' matmuls by projection: of kinds of layers that have experts the last one's."""
    return {op.attrs["projection"]: op for op in table.ops if op.name == "grouped_matmul"}


@per_table
def _sites(table: OpTable) -> tuple[dict[int, tuple[Op, frozenset[str]]], dict[int, str]]:
    """Ops before or after which something may be communicated, by position, with what may; MoE blocks by layer kind.

    Experts are over with their last op, a block with its own. Found once: plans of a table are many.
    """
    blocks = moe_blocks(table)
    found: dict[int, set[str]] = {}
    ends: dict[tuple[str, int], int] = {}
    for i, op in enumerate(table.ops):
        if op.name == "init_routing_v2":
            found[i] = {"dispatch"}
        elif op.shard == "row":
            found[i] = {"sum"}
        elif op.shard == "column" and op.kind < 0 and op.name in ("mm", "addmm") and table.facts.vocab_size:
            found[i] = {"logits"}
        if op.stage == "experts":
            ends["combine", op.kind] = i
        if op.kind in blocks and op.module.startswith(blocks[op.kind]):
            ends["end", op.kind] = i
    for (place, _), i in ends.items():
        found.setdefault(i, set()).add(place)
    return {i: (table.ops[i], frozenset(found[i])) for i in sorted(found)}, blocks


def _rows_of(op: Op) -> tuple[Literal["token", "sequence"], float]:
    """Rows of what a tower's row gives, per patch or, in one of images of one size, per image."""
    rows, *_ = product(op.outputs[0].dims[:-1])
    return "token" if rows.S else "sequence", rows.coef


def _join_norms(rows: list[Row], device: DeviceProfile, engine: EngineProfile) -> bool:
    """A norm right after a small all-reduce inside one node runs in its kernel: attrs say up to how many tokens.
    Whether any does."""
    joins = False
    for i, before in enumerate(rows[:-1]):
        if not isinstance(before, Collective) or before.op != "all_reduce" or len(before.extent) > 1:
            continue
        if before.group != "tp":  # a sum that gathers tokens
            continue
        row = rows[i + 1]
        if not isinstance(row, Op) or row.name != "pointwise" or "norm" not in str(row.attrs.get("label")):
            continue
        limit, scale = math.inf, float(before.scale)
        if engine.allreduce_norm is not None:
            limit = engine.allreduce_norm.limit_bytes(device, before.ranks, scale)
        rows[i + 1] = with_attr(row, "joined_tokens", limit / scale)
        joins = joins or limit > 0
    return joins


def _moe_collectives(
    layout: Layout, device: DeviceProfile, all2all: str, sent: _Sent
) -> dict[str, list[Collective]]:
    """Collectives of a MoE block by place: before the permute (``dispatch``), after the experts, at the block's end."""
    anywhere = partial(Collective, module="", kind=-1)
    over_dp = partial(anywhere, group="dp", ranks=layout.dp, extent=group_extent(layout.dp, layout.tp, device))
    over_ep = partial(
        anywhere, group="ep", ranks=layout.stage_ranks, extent=group_extent(layout.stage_ranks, 1, device)
    )
    both = sent.token_bytes, sent.result_bytes
    found: dict[str, list[Collective]] = {"dispatch": [], "combine": [], "end": []}
    gathers = all2all == "allgather_reducescatter"
    if gathers:
        token, result = (bytes_each * layout.dp for bytes_each in both)
        over = over_ep if sent.sliced else over_dp
        there, back = sent.gathers
        found["dispatch"].append(over(op=there, scale=token, label="dispatch"))
        found["end"].append(over(op=back, scale=result, label="combine"))
    elif all2all != "none":
        for phase, copy_bytes in zip(("dispatch", "combine"), both, strict=True):
            exchange = {"kind": all2all, "phase": phase, "copies": sent.copies}
            scale = copy_bytes * sent.copies / layout.tp  # a token is sent by one of the tp ranks that hold it
            found[phase].append(over_ep(op="all_to_all", scale=scale, exchange=exchange, label=phase))
    if layout.tp > 1:  # what leaves the block's result, in bf16, on every rank that holds the token
        name: CollectiveOp = "all_gather" if sent.sliced else "all_reduce"
        found["end"].append(anywhere(
            op=name, group="tp", ranks=layout.tp, extent=group_extent(layout.tp, 1, device), scale=2.0 * sent.hidden,
            label="tokens split over tp" if sent.sliced else "experts",
        ))  # fmt: skip
    return found
