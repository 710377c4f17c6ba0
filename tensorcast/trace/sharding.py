"""Which weights a narrower config made column- or row-parallel, found by comparing two traces of the same model."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

from tensorcast.errors import InputError
from tensorcast.trace.dims import Dim, product
from tensorcast.trace.table import Op, OpTable, Tensor, per_op

MATMULS = frozenset({"mm", "addmm", "bmm", "mla_absorb", "mla_expand"})
REDUCTIONS = frozenset({"mean", "sum", "var", "var_mean", "norm", "linalg_vector_norm"})

COPIES = frozenset({"clone", "copy_", "_to_copy"})


def _contraction(op: Op) -> tuple[float, float]:
    """(K, N) of a matmul row."""
    activation = op.inputs[1] if op.name == "addmm" else op.inputs[0]
    return activation.dims[-1].coef, op.outputs[0].dims[-1].coef


def _narrowed(a: Tensor, b: Tensor, dim: int) -> bool:
    return a.dims[dim].coef != b.dims[dim].coef


def _style(whole: Op, shard: Op) -> str:
    if whole.stage == "experts":
        return "experts"
    if whole.name in MATMULS:
        (k1, n1), (k2, n2) = _contraction(whole), _contraction(shard)
        if k2 != k1 and n2 == n1:
            return "row"
        return "column" if n2 != n1 else "replicated"
    if whole.name == "embedding" and whole.weights:
        return "row" if _narrowed(whole.inputs[0], shard.inputs[0], 0) else "replicated"
    if whole.name in REDUCTIONS and "dim" in whole.attrs and whole.inputs[0].dims:
        dim = whole.attrs["dim"]
        return (
            "row"
            if -len(whole.inputs[0].dims) <= dim < len(whole.inputs[0].dims)
            and _narrowed(whole.inputs[0], shard.inputs[0], dim)
            else ""
        )
    return ""


def mark_sharding(whole: OpTable, shard: OpTable) -> OpTable:
    """``shard``'s rows with their style: ``row`` leaves partial sums (then all-reduced), ``column`` splits outputs.

    ``whole`` is the trace at tp=1. The experts' region is taken from it: experts are sharded by their own sizes.
    """
    paired = _twins(whole, shard)
    if not paired:
        raise InputError(
            f"model {whole.model}: tp = {shard.tp} runs other operations than tp = 1: what it shards cannot be told; "
            f"use a smaller tp"
        )
    rows, twins = [], iter(paired)
    for b in shard.ops:
        if not _pairs(b):
            rows.append(b)
            continue
        a = next(twins)
        base = a if a.stage == "experts" else b
        rows.append(base.but(shard=_style(a, b)))
    return replace(shard, ops=tuple(rows))


def _twins(whole: OpTable, shard: OpTable) -> list[Op]:
    """The op of ``whole`` behind each of ``shard`` that has one; empty where they run other operations.

    A class that runs its heads one after another (Zamba's scans) has fewer of them on a rank.
    """
    ours, theirs = ([op for op in table.ops if _pairs(op)] for table in (whole, shard))
    if [op.name for op in ours] == [op.name for op in theirs]:
        return ours
    runs = [[list(run) for _, run in groupby(ops, lambda op: (op.name, op.kind))] for ops in (ours, theirs)]
    if [run[0].name for run in runs[0]] != [run[0].name for run in runs[1]]:
        return []
    return [a[0] for a, b in zip(*runs, strict=True) for _ in b]


SCANS = frozenset({"attention", "linear_attention", "ssm_scan"})
CONVOLUTIONS = frozenset({"causal_conv1d", "convolution"})


def mixers_whole(whole: OpTable, shard: OpTable) -> bool:
    """Whether a kind of attention or scan is as wide in ``shard``: its class takes that from elsewhere than heads.

    Inkling has both beside its heads: attention over what layers before gave, which is over no tokens of before, and
    convolutions of the stream. A convolution tells in the module that scans (Zamba's Mamba runs its heads one by one),
    or where its layer mixes tokens by nothing else (LFM2).
    """
    def widths(table: OpTable) -> dict[tuple[str, str], object]:
        scans = [op for op in table.ops if op.name in SCANS and op.attrs.get("past") != 0]
        kinds, inside = {op.kind for op in scans}, tuple({op.module for op in scans})
        convolved = [op for op in table.ops if op.name in CONVOLUTIONS]
        tell = scans + [op for op in convolved if op.kind not in kinds or op.module.startswith(inside)]
        return {(op.module, op.name): product(op.inputs[0].dims) for op in reversed(tell)}

    ours, theirs = widths(whole), widths(shard)
    return any(theirs.get(place) == width for place, width in ours.items())


def _pairs(op: Op) -> bool:
    """Copies come and go with head counts (one head left makes a reshape a view); every other op has its twin."""
    return op.name not in COPIES or op.stage == "experts"


@per_op
def sums_of(norm: Op) -> Op:
    """The kernel that sums the squares of a norm's inputs before it runs: other ranks hold the rest of its width. One
    object for all that ask, so that plans share it."""
    sums = tuple(replace(t, dims=(*t.dims[:-1], Dim()), dtype="float32") for t in norm.outputs)
    return norm.but(outputs=sums, attrs={**norm.attrs, "label": "sum_of_squares"}, shard="", parts=("pow", "sum"))
