"""Where a step's time goes: one sum over its rows for all readers, by part of the model or kind of kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tensorcast.deploy.plan.plan import Collective
from tensorcast.deploy.step.price import RowPrice, StepPrice
from tensorcast.trace.moe import EXPERT_STAGES, is_shared

GROUPS = (
    "attention", "attention projections", "experts", "shared experts", "dense layers", "router, norms, rest",
    "embedding and head", "dispatch", "combine", "all-reduce", "other collectives", "drafting", "hidden by overlap",
    "pipeline: waiting", "outside kernels",
)  # fmt: skip
"""Parts of a model's step, in the order in which they are listed; their seconds add up to the step's."""

_ATTENTION = (
    "attention", "kv_cache_write", "kv_cache_read", "sparse_indexer", "mla_absorb", "mla_expand", "linear_attention",
    "ssm_scan", "causal_conv1d",
)  # fmt: skip

KERNEL_GROUPS = (
    "attention",
    "dense GEMM",
    "experts",
    "token exchange",
    "all-reduce and gather",
    "norms and other small",
    "engine",
)
"""Kinds of kernels, as figures colour them; ``engine``: what passes outside of kernels."""


@dataclass
class Spent:
    """What rows take on one GPU over a step; ``launch_s`` of the ``seconds`` are launches of kernels."""

    seconds: float = 0.0
    launch_s: float = 0.0
    bytes: float = 0.0
    flops: float = 0.0
    wire_bytes: float = 0.0
    calls: float = 0.0


@dataclass(frozen=True)
class Breakdown:
    """A step of one GPU: what its rows take by group, what of that is ``hidden_s`` behind other rows (communication:
    ``hidden_comm_s``), and what passes outside of kernels. What is left of the step, stages wait for each other."""

    groups: dict[str, Spent]
    hidden_s: float
    hidden_comm_s: float
    overhead_s: float


def breakdown(price: StepPrice, pp: int, group_of: Callable[[RowPrice], str]) -> Breakdown:
    """Sum the rows of one step up by group.

    Rows are counted over all pipeline stages for one micro-batch; a GPU runs one of ``pp`` stages for all of them.
    """
    passes = float(price.micro_batches) / pp
    groups: dict[str, Spent] = {}
    for row, count in price.calls:
        into, times = groups.setdefault(group_of(row), Spent()), float(count) * passes
        spent = row.spending
        into.seconds += float(row.seconds) * times
        into.bytes += float(spent.bytes) * times
        into.flops += float(spent.flops) * times
        into.wire_bytes += float(spent.wire_bytes) * times
        if not isinstance(row.row, Collective):
            into.launch_s += float(spent.parts["latency"]) * times
        into.calls += times
    hidden, communication = (float(seconds) * passes for seconds in (price.hidden_s, price.hidden_comm_s))
    return Breakdown(groups, hidden, communication, float(price.overhead_s))


def kernel_group(price: RowPrice) -> str:
    """Which of :data:`KERNEL_GROUPS` a row belongs to, by its family and, for collectives, what it moves."""
    if price.family.startswith(("attention", "mla")):
        return "attention"
    if price.family in ("gemm", "grouped_gemm"):
        return "dense GEMM" if price.family == "gemm" else "experts"
    if price.family == "memory":
        return "norms and other small"
    label = price.row.label if isinstance(price.row, Collective) else ""
    return "token exchange" if label in ("dispatch", "combine") else "all-reduce and gather"


def group_of(price: RowPrice, blocks: dict[int, str]) -> str:
    """Which of :data:`GROUPS` a row belongs to. ``blocks``: MoE blocks by layer kind."""
    row = price.row
    if row.module.startswith(("mtp.", "draft")):
        return "drafting"
    if isinstance(row, Collective):
        if row.label in ("dispatch", "combine"):
            return row.label
        return "all-reduce" if row.op == "all_reduce" else "other collectives"
    if is_shared(row.module, row.kind, blocks):
        return "shared experts"
    if row.stage in EXPERT_STAGES:
        return "experts"
    if row.kind < 0:
        return "embedding and head"
    if "attention" in price.family or price.family.startswith("mla") or row.name in _ATTENTION:
        return "attention"
    if row.name not in ("mm", "addmm", "bmm") or row.module.startswith(blocks.get(row.kind, "no block")):
        return "router, norms, rest"
    return "attention projections" if "attn" in row.module or "attention" in row.module else "dense layers"
