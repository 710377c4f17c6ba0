"""Generic passes over the op table, on storage identity alone: what a serving engine would run as one kernel.

``fold``: ops on parameters only happen once, at load time. ``merged_gemm``: matmuls that read the same activation
(QKV, gate and up). ``pointwise``: runs of elementwise, row-wise and layout ops between two barriers, across the layer
boundary too. The passes are linear in the number of ops and know no model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from tensorcast.modeling.quantization import SCHEMES
from tensorcast.trace.dims import Dim, Sizes
from tensorcast.trace.table import Op, OpTable, Tensor

MATMULS = frozenset({"mm", "addmm"})
BARRIERS = frozenset(
    "mm addmm bmm grouped_matmul attention kv_cache_write kv_cache_read init_routing_v2 expert_counts embedding"
    " linear_attention ssm_scan causal_conv1d convolution sparse_indexer mla_absorb mla_expand quantize_activation"
    " _fft_r2c cumsum".split()
)
"""Kernels of their own. All else may join a pointwise run."""

REFERENCE = Sizes(B=64.0, S=64.0, P=4096.0, R=4096.0, E=8.0, X=1.0)
"""Sizes at which two operands of one storage are compared."""

MOST_STREAMS = 4
"""Residual streams of a model with hyper-connections (DeepSeek-V4: 4)."""

LABELS = (
    ("stream_mix", "stream_mix"),
    ("topk", "top_k"),
    ("softmax", "softmax"),
    ("_softmax", "softmax"),
    ("rsqrt", "rms_norm"),
    ("native_layer_norm", "layer_norm"),
    ("silu", "silu"),
    ("gelu", "gelu"),
    ("sigmoid", "sigmoid"),
    ("cos", "rope_table"),
    ("neg", "rope"),
    ("unpermute_tokens", "unpermute"),
    ("quantize_activation", "quantize"),
)


def fold(ops: Iterable[Op], eager: Collection[str] = ()) -> list[Op]:
    """Drop ops that read only parameters, but in modules that run ``eager``; their results count as parameters for
    what follows."""
    made: dict[int, str] = {}
    kept: list[Op] = []
    for op in ops:
        inputs = tuple(
            t
            if t.weight or t.storage not in made
            else Tensor(t.dims, t.dtype, t.storage, made[t.storage], t.expanded, t.offset)
            for t in op.inputs
        )
        if op.outputs and all(t.weight for t in inputs) and op.name not in BARRIERS and op.module not in eager:
            name = next((t.weight for t in inputs), "constant")
            made.update({t.storage: name for t in op.outputs})
            continue
        same = all(new is old for new, old in zip(inputs, op.inputs, strict=True))
        kept.append(op if same else op.but(inputs=inputs))
    return kept


def merge_gemms(ops: Iterable[Op], apart: Iterable[Collection[str]] = ()) -> list[Op]:
    """One matmul for those that read the same activation, in the same block, with weights of the same scheme.

    Modules whose last names are in one group of ``apart`` merge with each other only.
    """
    group = {leaf: i for i, leaves in enumerate(apart) for leaf in leaves}
    merged: list[Op] = []
    seen: dict[tuple[object, ...], int] = {}
    for op in ops:
        if op.name not in MATMULS or len(op.weights) == 0:
            for t in op.outputs:  # written in place: what was read before is not what is there now
                seen = {key: at for key, at in seen.items() if key[0] != t.storage}
            merged.append(op)
            continue
        activation = next((t for t in op.inputs if not t.weight), None)
        if activation is None:
            merged.append(op)
            continue
        block, _, leaf = op.module.rpartition(".")
        key = (
            activation.storage,
            activation.offset,
            activation.dims,
            block,
            group.get(leaf),
            op.name,
            op.attrs.get("scheme"),
            op.shard,
            op.kind,
        )
        if key in seen:
            first = merged[seen[key]]
            merged[seen[key]] = first.but(
                module=f"{first.module}+{leaf}",
                inputs=first.inputs + tuple(t for t in op.inputs if t.weight),
                outputs=first.outputs + op.outputs,
            )
        else:
            seen[key] = len(merged)
            merged.append(op)
    return merged


def offset_norms(ops: Sequence[Op]) -> set[str]:
    """Modules that scale by one plus their weight (Gemma's and Qwen3-Next's norms)."""
    made: set[int] = set()
    added: set[str] = set()
    for op in ops:
        if op.inputs and all(t.weight or t.storage in made for t in op.inputs):
            made |= {t.storage for t in op.outputs}
            added |= {op.module} if op.name == "add" else set()
    return added & {op.module for op in ops if op.name == "rsqrt"}


def pointwise_runs(ops: list[Op], fusions: Collection[str] = (), eager: Collection[str] = ()) -> list[Op]:
    """Fuse non-barrier ops of one layer (and of one side of a MoE exchange) into ``pointwise`` rows, but those of
    modules that run ``eager``.

    An op joins the earliest run that comes after all it depends on, so independent chains (the norms of a query and of
    a key latent) share one kernel, as hand-written engines have it.
    """
    groups = _group(ops, fusions, eager)
    last_read: dict[int, int] = {}
    size: dict[int, float] = {}
    for i, group in enumerate(groups):
        for op in group:
            for t in op.inputs:
                last_read[t.storage] = i
            for t in op.outputs:
                size[t.storage] = max(size.get(t.storage, 0.0), float(t.numel(REFERENCE)))
    closing = {group[0].kind: i for i, group in enumerate(groups)}  # what a layer's last row writes is its output
    for i in closing.values():
        last_read.update({t.storage: len(groups) for op in groups[i][-1:] for t in op.outputs})
    return [
        group[0] if group[0].name in BARRIERS and len(group) == 1 else _fuse_run(group, last_read, size, i)
        for i, group in enumerate(groups)
    ]


def _group(ops: list[Op], fusions: Collection[str], eager: Collection[str]) -> list[list[Op]]:
    groups: list[list[Op]] = []
    wrote: dict[int, int] = {}
    touched: dict[int, int] = {}
    first_of_kind: dict[int, int] = {}
    for op in ops:
        first_of_kind.setdefault(op.kind, len(groups))
        place = len(groups)
        after = max(
            [
                first_of_kind[op.kind],
                *(wrote.get(t.storage, -1) for t in op.inputs),
                *(touched.get(t.storage, -1) for t in op.outputs),
            ]
        )
        if op.module not in eager and (op.name not in BARRIERS or op.name == "quantize_activation"):
            open_ = (i for i in range(after, len(groups)) if groups[i][0].module not in eager)
            place = next((i for i in open_ if _joins(op, groups[i], fusions)), len(groups))
        if place == len(groups):
            groups.append([])
        groups[place].append(op)
        for t in op.outputs:
            wrote[t.storage] = max(place, wrote.get(t.storage, -1))
        for t in (*op.inputs, *op.outputs):
            touched[t.storage] = max(place, touched.get(t.storage, -1))
    return groups


def _joins(op: Op, group: list[Op], fusions: Collection[str]) -> bool:
    first = group[0]  # a barrier is alone in its group
    if first.name in BARRIERS and first.name != "quantize_activation":
        return False
    if first.kind != op.kind or _side(first) != _side(op):
        return False
    if op.name == "quantize_activation":  # only in an engine whose norm or activation kernel writes quantised output
        names = {part for other in group for part in (other.name, *other.parts)}
        normed = "rsqrt" in names or "native_layer_norm" in names
        name = "norm_quant" if normed else "activation_quant"
        return len(group) > 0 and (name in fusions or f"{name}:{SCHEMES[op.attrs['scheme']].kernel}" in fusions)
    return first.name != "quantize_activation"


def _side(op: Op) -> str:
    """Rows inside the experts' region live on other ranks' tokens: they never fuse with rows outside it."""
    return "experts" if op.stage == "experts" else ""


def _fuse_run(run: list[Op], last_read: dict[int, int], size: dict[int, float], end: int) -> Op:
    if len(run) == 1:
        return run[0].but(parts=run[0].parts or (run[0].name,), name="pointwise", attrs=_labelled(run))
    made: set[int] = set()
    read: dict[int, list[Tensor]] = {}
    written: dict[int, list[Tensor]] = {}
    for op in run:
        for t in op.inputs:
            if t.storage not in made and all(_view(t) != _view(r) for r in read.setdefault(t.storage, [])):
                read[t.storage].append(t)
        for t in op.outputs:
            made.add(t.storage)
            if last_read.get(t.storage, -1) > end and all(
                _view(t) != _view(w) for w in written.setdefault(t.storage, [])
            ):
                written[t.storage].append(t)
    inputs = tuple(t for tensors in read.values() for t in _cap(tensors, size))
    outputs = tuple(t for tensors in written.values() for t in _cap(tensors, size))
    parts = tuple(part for op in run for part in (op.parts or (op.name,)))
    stage = next((op.stage for op in run if op.stage), "")
    shard = next((op.shard for op in run if op.shard == "row"), "")
    return Op("pointwise", _common(run), run[0].kind, inputs, outputs, _labelled(run), stage, shard, parts)


def _view(t: Tensor) -> tuple[object, ...]:
    return (t.offset, t.dims)


def _cap(tensors: list[Tensor], size: dict[int, float]) -> list[Tensor]:
    """Distinct views of one storage, dropping those beyond its size (a whole and its halves are one read)."""
    if len(tensors) == 1:
        return tensors
    sizes = [float(t.numel(REFERENCE)) for t in tensors]
    whole = max(size.get(tensors[0].storage, 0.0), *sizes)
    kept: list[Tensor] = []
    total = 0.0
    for numel, t in sorted(zip(sizes, tensors, strict=True), key=lambda pair: -pair[0]):
        total += numel
        if total > whole * 1.001:
            break
        kept.append(t)
    return kept


def _labelled(run: list[Op]) -> dict[str, object]:
    parts = [part for op in run for part in (op.parts or (op.name,))]
    labels = list(dict.fromkeys(label for name, label in LABELS if name in parts))
    if parts.count("add") > 1 and ("rms_norm" in labels or "layer_norm" in labels):  # one is epsilon
        labels.insert(0, "add")
    if not labels:
        labels = list(dict.fromkeys(parts))[:3]
    reduced = next((op.attrs for op in run if op.shard == "row"), {})
    return {**reduced, "label": "+".join(labels)}


def _common(run: list[Op]) -> str:
    """The module path that a run shares, or the first and last it touches."""
    first, last = run[0].module, run[-1].module
    return first if first == last else f"{first} … {last.rpartition('.')[2]}"


def across_layers(ops: list[Op]) -> list[Op]:
    """Join a layer's closing run (the residual add) with the next layer's opening run (the norm), per kind."""
    result = list(ops)
    for kind in sorted({op.kind for op in ops if op.kind >= 0}):
        rows = [i for i, op in enumerate(result) if op.kind == kind]
        first, last = result[rows[0]], result[rows[-1]]
        if len(rows) < 3 or first.name != "pointwise" or last.name != "pointwise" or not last.outputs:
            continue
        stream = {(t.dims, t.dtype) for t in last.outputs}
        inputs = last.inputs + tuple(t for t in first.inputs if (t.dims, t.dtype) not in stream or t.weight)
        if len(inputs) == len(last.inputs) + len(first.inputs):
            continue  # the opening run does not read what the closing run writes
        joined = last.but(
            module=first.module,
            inputs=inputs,
            outputs=last.outputs + first.outputs,
            parts=last.parts + first.parts,
            attrs=_labelled([last, first]),
        )
        result[rows[0]] = joined
        del result[rows[-1]]
    return result


def sparse_indexers(ops: list[Op]) -> list[Op]:
    """The scoring of cached tokens by a sparse-attention indexer as one op: cache read to top-k, one module."""
    result: list[Op] = []
    i = 0
    while i < len(ops):
        op = ops[i]
        if op.name != "kv_cache_read":
            result.append(op)
            i += 1
            continue
        ends = [j for j in range(i, len(ops)) if ops[j].name == "topk" and ops[j].module == op.module]
        if not ends:
            result.append(op)
            i += 1
            continue
        region = ops[i : ends[0] + 1]
        # A projection inside the region (the per-head weights) stays a GEMM of its own, before the scores.
        result += [row for row in region if row.weights and row.name in MATMULS]
        scores = next(row for row in region if row.name == "bmm")
        query, keys = scores.inputs[0], op.outputs[0]
        heads = query.dims[-2] if len(query.dims) == 3 else Dim(1)
        selected = ops[ends[0]].outputs[0].dims[-1]
        attrs = {"heads": heads, "selected": selected, "head_dim": keys.dims[-1]}
        result.append(Op("sparse_indexer", op.module, op.kind, (query, keys), ops[ends[0]].outputs[1:], attrs))
        i = ends[0] + 1
    return result


def permute_kernels(ops: list[Op]) -> list[Op]:
    """Counting, sorting and permuting rows by expert is one kernel in every engine: join a block's ``permute`` rows."""
    result: list[Op] = []
    at = -1
    for op in ops:
        if op.name == "init_routing_v2" and op.outputs[0].dims[-1].coef > 1:
            at = len(result)
        elif op.stage == "permute" and op.name in ("init_routing_v2", "expert_counts") and at >= 0:
            kept = result[at]
            extra = tuple(t for t in op.inputs if all(t.storage != k.storage for k in kept.inputs))
            result[at] = kept.but(inputs=kept.inputs + extra, outputs=kept.outputs + op.outputs)
            continue
        result.append(op)
    return result


def stream_mixes(ops: list[Op]) -> list[Op]:
    """Hyper-connections as engines' kernels run them: the mixing of a token's few streams, and the thin products in
    fp32 that make its weights, join the norms and sums around them (SGLang, vLLM and TensorRT-LLM: ``mhc_pre`` and
    ``mhc_post``)."""
    mixed = {op.kind for op in ops if _mixes(op)}
    return [
        op.but(name="stream_mix") if op.kind in mixed and (_mixes(op) or _thin(op)) else op for op in ops
    ]


def _mixes(op: Op) -> bool:
    """Whether a batched product multiplies few rows of each token by a square of as many."""
    if op.name != "bmm" or op.weights:
        return False
    *_, rows, columns = op.inputs[0].dims
    return rows == columns and rows.is_constant and rows.coef <= MOST_STREAMS


def _thin(op: Op) -> bool:
    fp32 = all(t.dtype == "float32" for t in op.inputs)
    return op.name == "mm" and fp32 and op.outputs[0].dims[-1].coef <= MOST_STREAMS * (MOST_STREAMS + 2)


def matter(fusions: Iterable[str], schemes: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """Those of an engine's ``fusions`` that change a table whose weights have these ``schemes``."""
    written = {SCHEMES[name].kernel for some in schemes for name in some if name in SCHEMES}
    return tuple(one for one in fusions if ":" not in one or one.rpartition(":")[2] in written)


def fuse(table: OpTable, fusions: Collection[str], apart: Iterable[Collection[str]] = ()) -> OpTable:
    """The table as an engine with these ``fusions`` runs it; none of them gives the eager view.

    ``norm_quant`` and ``activation_quant`` may name a dtype that they write (``norm_quant:fp8``). ``apart``: groups of
    projections that it does not merge with others
    (:class:`tensorcast.profiles.kernels.OwnGemms`).
    """
    ops = list(table.ops)
    if not fusions:
        return table
    eager = offset_norms(ops) if "eager_norms" in fusions else ()
    ops = permute_kernels(sparse_indexers(fold(ops, eager)))
    if "pointwise" in fusions:
        ops = stream_mixes(ops)
    if "merged_gemm" in fusions:
        ops = merge_gemms(ops, apart)
    if "pointwise" in fusions:
        ops = across_layers(pointwise_runs(ops, fusions, eager))
    return replace(table, ops=tuple(ops))
