"""Where a step's time goes: one set of groups for all readers."""

from __future__ import annotations

from tensorcast.deploy.plan.moe_blocks import EXPERT_STAGES, is_shared
from tensorcast.deploy.plan.plan import Collective, Row

GROUPS = (
    "attention", "attention projections", "experts", "shared experts", "dense layers", "router, norms, rest",
    "embedding and head", "dispatch", "combine", "all-reduce", "other collectives", "drafting", "hidden by overlap",
    "pipeline: waiting", "outside kernels",
)  # fmt: skip
"""Groups of ops of a step, in the order in which they are listed; their seconds add up to the step's."""


def group_of(row: Row, blocks: dict[int, str], price_family: str) -> str:
    """The group that a row belongs to."""
    if row.module.startswith("mtp."):
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
    if "attention" in price_family or price_family.startswith("mla") or row.name in _ATTENTION:
        return "attention"
    if row.name in ("mm", "addmm", "bmm"):
        block = blocks.get(row.kind)
        if block is not None and row.module.startswith(block):
            return "router, norms, rest"
        return "attention projections" if "attn" in row.module or "attention" in row.module else "dense layers"
    return "router, norms, rest"


_ATTENTION = (
    "attention", "kv_cache_write", "kv_cache_read", "sparse_indexer", "mla_absorb", "mla_expand", "linear_attention",
    "ssm_scan", "causal_conv1d",
)  # fmt: skip
