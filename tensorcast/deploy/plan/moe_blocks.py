"""The MoE blocks of a table, and shared experts that are not cut the way the rest is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tensorcast.trace.moe import blocks_of, is_shared, is_shared_param
from tensorcast.trace.table import OpTable, Tensor

EXPERT_STAGES = ("permute", "experts", "unpermute")


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
        dims = []
        for dim in tensor.dims:
            if dim.is_constant:
                dims.append(dim._replace(coef=dim.coef * table.tp) if dim.coef in narrow else dim)
            else:
                dims.append(dim._replace(coef=dim.coef * whole.tokens) if dim.B and not dim.L else dim)
        return replace(tensor, dims=tuple(dims))

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
    params = tuple(
        replace(p, numel=p.full_numel if whole.resident else 0) if is_shared_param(p, blocks) else p
        for p in table.params
    )
    return replace(table, ops=tuple(ops), params=params)
