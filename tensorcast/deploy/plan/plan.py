"""From an op table and a layout to the rows of one rank's step: the table's ops with the layout's collectives between.

Rules: a row-parallel matmul leaves partial sums, an all-reduce over tp follows. A MoE block exchanges tokens the way
``all2all`` says when dp > 1; at dp = 1 every rank already has all tokens, works on its experts, and one all-reduce
sums routed and shared experts alike. The logits are gathered. Pipeline stages hand on hidden state and residual.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from tensorcast.cost.collectives import group_extent
from tensorcast.cost.kernels.vocabulary import PRECISION, source_of
from tensorcast.cost.work import Size
from tensorcast.deploy.layout import ALL2ALL, Layout, attention_dp
from tensorcast.deploy.options import Options
from tensorcast.deploy.plan.moe_blocks import blocks_of
from tensorcast.errors import InputError, unknown_name
from tensorcast.modeling.moe.backends import choose_backend
from tensorcast.modeling.quantization import SCHEMES, Scheme, rounded_hidden
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.trace.table import Op, OpTable, per_table

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


Row = Op | Collective


@dataclass(frozen=True)
class Plan:
    """Rows of one rank's step, in order, how the MoE blocks exchange tokens, and how their matmuls run."""

    rows: tuple[Row, ...]
    all2all: str
    dispatch: Scheme
    backend: str = "grouped_mm"
    combine: Scheme = SCHEMES["bf16"]


def gated(plan: Plan) -> float:
    """1 where experts' first matmul makes gate and up, 0 where there is no gate."""
    ops = {r.attrs["projection"]: r for r in plan.rows if isinstance(r, Op) and r.name == "grouped_matmul"}
    if len(ops) < 2:
        return 1.0
    return float(ops["up"].outputs[0].dims[-1].coef > 1.5 * ops["down"].inputs[0].dims[-1].coef)


def expert_sources(
    engine: EngineProfile, device: DeviceProfile, config: dict[str, Any], layout: Layout
) -> dict[str, float]:
    """Whose experts' kernels the engine runs for a model, by dtype, as kernel models count libraries; 0 where it says
    nothing."""
    if engine.experts is None:
        return {}
    named = {dtype: engine.experts.library(device.architecture, dtype, config, layout.ep > 1) for dtype in PRECISION}
    return {dtype: source_of(kernels) for dtype, kernels in named.items()}


def choose_all2all(wanted: str, layout: Layout, engine: EngineProfile, phase: Any) -> str:
    """The exchange that runs: ``none`` at dp = 1, else the wanted one, else the engine's default for the phase."""
    if wanted not in ALL2ALL:
        raise unknown_name("--all2all", wanted, ALL2ALL)
    if layout.dp == 1:
        return "none"
    if wanted == "auto":
        default = engine.all2all.get(phase, "allgather_reducescatter")
        return default if layout.etp == 1 and layout.ep > 1 else "allgather_reducescatter"
    if wanted != "allgather_reducescatter" and (layout.etp > 1 or layout.ep == 1):
        raise InputError(
            f"--all2all {wanted}: needs whole experts on every rank (ep = tp*dp = {layout.stage_ranks}), "
            f"got ep = {layout.ep}"
        )
    return wanted


COMBINES = {
    **{name: scheme for name, scheme in SCHEMES.items() if name == "bf16" or scheme.quantizes_activation},
    "logfmt10": Scheme("logfmt10", 2.0, 10 / 8 + 4 / 128),
}
"""What results can travel back in. ``logfmt10``: ten bits a number and four bytes per 128, only in DeepEP's low-latency
kernels (bytes as github.com/deepseek-ai/DeepEP counts them, tests/legacy/test_low_latency.py)."""


def choose_combine(wanted: str | None, all2all: str) -> Scheme:
    """The scheme that results travel back in: the wanted one, else bf16, as DeepEP does."""
    if wanted is not None and wanted not in COMBINES:
        raise unknown_name("--combine dtype", wanted, COMBINES)
    if wanted == "logfmt10" and all2all != "low_latency":
        raise InputError(f"--combine logfmt10: only the low_latency exchange has it, and here it is {all2all}")
    return COMBINES[wanted or "bf16"]


BACKEND_OF = {"high_throughput": "contiguous", "low_latency": "masked"}
"""Layout in which an exchange delivers rows, and so the grouped GEMM that reads them (DeepEP with DeepGEMM)."""


def choose_experts_backend(
    wanted: str, all2all: str, engine: EngineProfile, device: DeviceProfile, phase: Any
) -> str:
    """The experts backend that runs: the wanted one, else what the exchange delivers to, else the engine's.

    ``wanted``: a name, or names by phase or sub-config, as :func:`choose_backend` reads them. Where the engine is
    transformers itself, its own rule holds: on a GPU ``grouped_mm`` decodes as ``batched_mm``.
    """
    by_rule = engine.experts_backend.get("decode") == "batched_mm" and device.name != "cpu"
    chosen = _asked_backend(wanted, phase, "cuda" if by_rule else "cpu")
    if chosen != "auto":
        return chosen
    default = BACKEND_OF.get(all2all) or engine.experts_backend.get(phase, "grouped_mm")
    return "grouped_mm" if default == "batched_mm" and not by_rule else default


@cache
def _asked_backend(wanted: str, phase: Any, device: str) -> str:
    """What ``wanted`` says for the language model; read once, plans are many."""
    return choose_backend(wanted, phase, part="text_config", device=device, auto={})


def make_plan(
    table: OpTable,
    layout: Layout,
    device: DeviceProfile,
    engine: EngineProfile,
    options: Options,
    config: dict[str, Any],
) -> Plan:
    """The rows of one rank, by ``options``' exchange, its dtypes and the backend. ``config``: the model's.

    Tokens are sent as the experts read them if these quantise them, and come back in bf16, unless said otherwise.
    """
    chosen, dispatch = choose_all2all(options.all2all, layout, engine, table.phase), options.dispatch
    experts = next((op for op in table.ops if op.name == "grouped_matmul"), None)
    if dispatch is not None and dispatch not in SCHEMES:
        raise unknown_name("--dispatch dtype", dispatch, SCHEMES)
    scheme = SCHEMES[dispatch or (experts.attrs.get("scheme", "bf16") if experts else "bf16")]
    if not scheme.quantizes_activation:
        scheme = SCHEMES["bf16"]
    combine = choose_combine(options.combine, chosen)
    width = table.facts.moe_hidden_size
    if engine.pads_hidden and experts is not None:
        width = rounded_hidden(width, experts.attrs.get("scheme", "bf16"))
    external = int(options.external_shared_experts > 0)
    moe = _MoEExchange(table, layout, device, chosen, scheme, combine, width, external)
    rows = _with_collectives(table, layout, device, moe)
    asked, limits = options.fusion == "engine" and "allreduce_norm" in engine.fusions, engine.allreduce_norm
    dp = attention_dp(layout, table.facts.num_experts)
    if asked and (limits is None or limits.runs(config, dp)):
        _join_norms(rows, device, engine, _joined(table))
    backend = choose_experts_backend(options.experts_backend, chosen, engine, device, table.phase)
    return Plan(tuple(rows), chosen, scheme, backend, combine)


def _with_collectives(table: OpTable, layout: Layout, device: DeviceProfile, moe: _MoEExchange) -> list[Row]:
    tp, done, rows = group_extent(layout.tp, 1, device), 0, list[Row]()
    for i in _sites(table):
        op = table.ops[i]
        if op.name == "init_routing_v2":
            rows += [*table.ops[done:i], *moe.dispatch(op)]
            done = i
        rows += table.ops[done : i + 1]
        done = i + 1
        if layout.tp > 1 and op.shard == "row" and not moe.sums(op):
            rows.append(_reduced(op, layout.tp, tp))
        if layout.tp > 1 and _is_logits(op):
            vocabulary = table.facts.vocab_size * 2.0
            rows.append(Collective(
                "all_gather", op.module, op.kind, "tp", layout.tp, tp, vocabulary, "sequence", label="logits"
            ))  # fmt: skip
        if i in moe.experts_end:
            rows += moe.combine(op)
        if i in moe.block_end:
            rows += moe.gather(op)
    rows += table.ops[done:]
    if layout.pp > 1:
        hop = group_extent(2, layout.stage_ranks, device)
        state = 2 * 2.0 * table.facts.hidden_size  # hidden state and residual in bf16
        rows.append(Collective("send_recv", "pipeline", -1, "pp", 2, hop, state, label="stage hand-over"))
    return rows


@per_table
def _sites(table: OpTable) -> list[int]:
    """Positions of the ops before or after which something may be communicated; plans of a table are many."""
    _, *ends = _blocks(table)
    return [
        i for i, op in enumerate(table.ops)
        if op.name == "init_routing_v2" or op.shard == "row" or _is_logits(op) or any(i in some for some in ends)
    ]  # fmt: skip


def _is_logits(op: Op) -> bool:
    return op.shard == "column" and op.kind < 0 and op.name in ("mm", "addmm")


@per_table
def _joined(table: OpTable) -> dict[tuple[int, float], tuple[Op, Op]]:
    """Norms by identity and limit, and as :func:`_join_norms` has them: the table's plans share them."""
    return {}


def _join_norms(
    rows: list[Row], device: DeviceProfile, engine: EngineProfile, joined: dict[tuple[int, float], tuple[Op, Op]]
) -> None:
    """A norm right after a small all-reduce inside one node runs in its kernel: attrs say up to how many tokens."""
    for i, before in enumerate(rows[:-1]):
        if not isinstance(before, Collective) or before.op != "all_reduce" or len(before.extent) > 1:
            continue
        row = rows[i + 1]
        if not isinstance(row, Op) or row.name != "pointwise" or "norm" not in str(row.attrs.get("label")):
            continue
        limit = math.inf
        if engine.allreduce_norm is not None:
            limit = engine.allreduce_norm.limit_bytes(device.architecture, before.ranks, before.scale)
        key = id(row), limit / before.scale
        if key not in joined:
            joined[key] = row, row.but(attrs={**row.attrs, "joined_tokens": key[1]})
        rows[i + 1] = joined[key][1]


def _reduced(op: Op, ranks: int, extent: tuple[int, ...]) -> Collective:
    """All-reduce of a row-parallel result: a matmul's output, or the one number per token that a norm reduces to."""
    out = op.outputs[0]
    if op.name == "pointwise":
        return Collective("all_reduce", op.module, op.kind, "tp", ranks, extent, 4.0, label="norm over sharded width")
    width = out.dims[-1].coef
    return Collective("all_reduce", op.module, op.kind, "tp", ranks, extent, 2.0 * width)


@per_table
def _blocks(table: OpTable) -> tuple[dict[int, str], set[int], set[int]]:
    """MoE blocks by layer kind, the last rows of their experts, and their own last rows."""
    found = blocks_of(table.ops)
    experts: dict[int, int] = {}
    blocks: dict[int, int] = {}
    for i, op in enumerate(table.ops):
        if op.stage == "experts":
            experts[op.kind] = i
        if op.kind in found and op.module.startswith(found[op.kind]):
            blocks[op.kind] = i
    return found, set(experts.values()), set(blocks.values())


class _MoEExchange:
    """A MoE block's collectives: dispatch before the permute, combine after the experts, the rest at its end."""

    def __init__(
        self,
        table: OpTable,
        layout: Layout,
        device: DeviceProfile,
        all2all: str,
        dispatch: Scheme,
        combine: Scheme,
        width: int,
        external: int,
    ) -> None:
        self.layout, self.all2all = layout, all2all
        self.copies = table.facts.copies_per_token + external  # a copy for the ranks of an external shared expert
        self.hidden = float(table.facts.moe_hidden_size)
        self.width = float(width)  # of the rows that travel
        self.token = self.width * dispatch.activation_bytes
        self.result = self.width * combine.activation_bytes
        self.groups = {
            "tp": (layout.tp, group_extent(layout.tp, 1, device)),
            "dp": (layout.dp, group_extent(layout.dp, layout.tp, device)),
            "ep": (layout.stage_ranks, group_extent(layout.stage_ranks, 1, device)),
        }
        self.blocks, self.experts_end, self.block_end = _blocks(table)

    def sums(self, op: Op) -> bool:
        """Whether a row-parallel shared expert's sum rides on the block's own all-reduce."""
        block = self.blocks.get(op.kind)
        return bool(block) and self.all2all == "none" and op.module.startswith(str(block))

    def _row(self, op: Op, name: CollectiveOp, group: str, scale: float, label: str, **exchange: Any) -> Collective:
        ranks, extent = self.groups[group]
        return Collective(name, op.module, op.kind, group, ranks, extent, scale, "token", exchange, label)

    def _all_to_all(self, op: Op, copy_bytes: float, phase: str) -> Collective:
        exchange = {"kind": self.all2all, "phase": phase, "copies": self.copies}
        # a token is sent by one of the tp ranks that hold it
        return self._row(op, "all_to_all", "ep", copy_bytes * self.copies / self.layout.tp, phase, **exchange)

    def dispatch(self, op: Op) -> Iterator[Collective]:
        """Tokens travel to the ranks of their experts."""
        if self.all2all == "allgather_reducescatter":
            yield self._row(op, "all_gather", "dp", self.token * self.layout.dp, "dispatch")
        elif self.all2all != "none":
            yield self._all_to_all(op, self.token, "dispatch")

    def combine(self, op: Op) -> Iterator[Collective]:
        """Results travel back."""
        if self.all2all not in ("none", "allgather_reducescatter"):
            yield self._all_to_all(op, self.result, "combine")

    def gather(self, op: Op) -> Iterator[Collective]:
        """What leaves the block's result on every rank that holds the token."""
        whole = 2.0 * self.hidden
        if self.all2all == "allgather_reducescatter":
            yield self._row(op, "reduce_scatter", "dp", self.result * self.layout.dp, "combine")
        if self.layout.tp > 1:
            split = self.all2all not in ("none", "allgather_reducescatter")
            name: CollectiveOp = "all_gather" if split else "all_reduce"
            yield self._row(op, name, "tp", whole, "tokens split over tp" if split else "experts")
