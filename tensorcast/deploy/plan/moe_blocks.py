"""The MoE blocks of a table: which rows they have, and shared experts that are not cut the way the rest is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from tensorcast.trace.dims import Dim
from tensorcast.trace.table import Op, OpTable, Param, Tensor, per_table

EXPERT_STAGES = ("permute", "experts", "unpermute")


def blocks_of(ops: Iterable[Op]) -> dict[int, str]:
    """Layer kind -> path of its MoE block."""
    return {op.kind: _block(op.module) for op in ops if op.name == "init_routing_v2"}


def _block(module: str) -> str:
    """The MoE block that holds an experts module: its parent, unless that is the layer itself."""
    parent = module.rpartition(".")[0]
    return module if not parent or parent.endswith("]") else parent


def is_shared(module: str, kind: int, blocks: dict[int, str]) -> bool:
    """Whether a row belongs to the shared experts (or their gate) of its layer's MoE block."""
    block = blocks.get(kind)
    return block is not None and module.startswith(block) and "shared" in module[len(block) :]


def copies_per_token(facts: dict[str, Any]) -> float:
    """(token, expert) rows of a token on average: its k choices less those of experts that compute nothing."""
    every = facts["num_experts"] + facts["zero_experts"]
    return float(facts["top_k"] * facts["num_experts"] / every) if every else 0.0


@per_table
def has_shared(table: OpTable) -> bool:
    """Whether any MoE block has shared experts."""
    blocks = blocks_of(table.ops)
    return any(_is_shared_param(p, blocks) for p in table.params)


@dataclass(frozen=True)
class Whole:
    """How shared experts run that are not cut over tp.

    ``tokens``: rows that this rank's copy works on, per token of the rank. ``resident``: whether ranks with routed
    experts hold a copy at all; external shared experts live on ranks of their own.
    """

    tokens: float
    resident: bool = True


def with_whole_shared(table: OpTable, whole: Whole) -> OpTable:
    """``table`` with its shared experts at full width, on ``whole.tokens`` of its tokens, without an all-reduce."""
    blocks = blocks_of(table.ops)
    mine = [op for op in table.ops if is_shared(op.module, op.kind, blocks) and not op.stage]
    narrow = {t.dims[-1].coef for op in mine if op.shard == "column" for t in op.outputs}

    def widened(tensor: Tensor) -> Tensor:
        dims = tuple(_widened(d, narrow, table.tp, whole.tokens) for d in tensor.dims)
        return replace(tensor, dims=dims)

    chosen = {id(op) for op in mine}
    ops = [
        op.but(
            inputs=tuple(map(widened, op.inputs)),
            outputs=tuple(map(widened, op.outputs)),
            shard="replicated" if op.shard in ("row", "column") else op.shard,
            attrs={**op.attrs, "whole": True},
        )
        if id(op) in chosen
        else op
        for op in table.ops
    ]
    params = tuple(_held(p, whole.resident) if _is_shared_param(p, blocks) else p for p in table.params)
    return replace(table, ops=tuple(ops), params=params)


def _widened(dim: Dim, narrow: set[float], tp: int, tokens: float) -> Dim:
    if dim.is_constant:
        return dim._replace(coef=dim.coef * tp) if dim.coef in narrow else dim
    return dim._replace(coef=dim.coef * tokens) if dim.B and not dim.L else dim


def _is_shared_param(param: Param, blocks: dict[int, str]) -> bool:
    return param.role != "experts" and is_shared(param.module, param.kind, blocks)


def _held(param: Param, resident: bool) -> Param:
    return replace(param, numel=param.full_numel if resident else 0)
