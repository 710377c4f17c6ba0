"""Marking the experts' region of a trace, whose sizes depend on the layout and not only on this rank's tokens.

From ``init_routing_v2`` to ``unpermute_tokens`` rows are (token, choice) pairs. Once dispatched, a rank holds ``R`` of
them for its ``E`` experts, each narrowed by the experts' tensor-parallel size (``X = 1/etp``). Shared experts may stay
whole where the rest is cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tensorcast.modeling.quantization import Quantization
from tensorcast.trace.dims import Dim
from tensorcast.trace.fuse import REFERENCE
from tensorcast.trace.table import Op, OpTable, Param, Tensor

EXPERT_STAGES = ("permute", "experts", "unpermute")


def blocks_of(ops: Iterable[Op]) -> dict[int, str]:
    """Layer kind -> path of its MoE block."""
    found: dict[int, str] = {}
    for op in ops:
        if op.name == "init_routing_v2":  # in the experts' module, whose parent is the block unless it is the layer
            parent = op.module.rpartition(".")[0]
            found[op.kind] = op.module if not parent or parent.endswith("]") else parent
    return found


def is_shared(module: str, kind: int, blocks: dict[int, str]) -> bool:
    """Whether a row belongs to the shared experts (or their gate) of its layer's MoE block."""
    block = blocks.get(kind)
    return block is not None and module.startswith(block) and "shared" in module[len(block) :]


def is_shared_param(param: Param, blocks: dict[int, str]) -> bool:
    """Whether a weight is of the shared experts (or their gate)."""
    return param.role != "experts" and is_shared(param.module, param.kind, blocks)


def _rows(tensor: Tensor, per_token: float) -> Tensor:
    """Replace the leading ``k*B*S`` by ``R``."""

    def swap(dim: Dim) -> Dim:
        is_rows = (
            dim.coef == per_token and (dim.B, dim.S, dim.L, dim.P) in ((1, 1, 0, 0), (1, 0, 0, 0)) and not dim.plus
        )
        return Dim(1, R=1) if is_rows else dim

    if tensor.weight or not tensor.dims:
        return tensor
    return Tensor(
        (swap(tensor.dims[0]), *tensor.dims[1:]), tensor.dtype, tensor.storage, "", tensor.expanded, tensor.offset
    )


def _narrow_last(tensor: Tensor) -> Tensor:
    """The last dim is the experts' intermediate width: divide it by etp."""
    *rest, last = tensor.dims
    if last.is_constant and last.coef > 1:
        last = Dim(last.coef, X=1)
    return Tensor((*rest, last), tensor.dtype, tensor.storage, tensor.weight, tensor.expanded, tensor.offset)


def _inside(tensor: Tensor, per_token: float, narrowed: bool) -> Tensor:
    rows = _rows(tensor, per_token)
    return _narrow_last(rows) if narrowed else rows


def _expert_weight(tensor: Tensor, narrowed: int | None) -> Tensor:
    """``[E, a, b]``: the first dim becomes E; dim ``narrowed`` is the intermediate width."""
    dims = [Dim(1, E=1), *tensor.dims[1:]]
    if narrowed is not None:
        dims[narrowed] = Dim(tensor.dims[narrowed].coef, X=1)
    return Tensor(tuple(dims), tensor.dtype, tensor.storage, tensor.weight, tensor.expanded, tensor.offset)


def _matmul(op: Op, per_token: float, up: bool) -> Op:
    x, weight, counts, *bias = op.inputs
    transposed = bool(op.attrs.get("transposed"))
    out_dim, in_dim = (2, 1) if transposed else (1, 2)
    x, out = _rows(x, per_token), _rows(op.outputs[0], per_token)
    if up:
        out = _narrow_last(out)
    else:
        x = _narrow_last(x)
    weight = _expert_weight(weight, out_dim if up else in_dim)
    counts = Tensor((Dim(1, E=1),), counts.dtype, counts.storage)
    biases = tuple(_expert_weight(b, 1 if up else None) for b in bias)
    return op.but(
        inputs=(x, weight, counts, *biases), outputs=(out,), attrs={**op.attrs, "projection": "up" if up else "down"}
    )


def _dispatched(op: Op, per_token: float) -> Op:
    """A permute leaves on this rank the rows that its experts will work on."""
    return op.but(outputs=tuple(_rows(t, per_token) for t in op.outputs), stage="permute")


def _matmuls_ahead(ops: list[Op], start: int) -> int:
    """Grouped matmuls of the region that opens at ``start``: one up, or two where gate and up are apart, and down."""
    end = next((i for i in range(start, len(ops)) if ops[i].name == "unpermute_tokens"), len(ops))
    return sum(op.name == "grouped_matmul" for op in ops[start:end])


def mark_experts(ops: list[Op]) -> list[Op]:
    """Tag the rows of every experts region with their stage and put their sizes in R, E, X."""
    marked: list[Op] = []
    region = ""  # routing opens it, unpermute closes it
    per_token: float = 0
    matmuls, last = 0, 0
    for i, op in enumerate(ops):
        if op.name == "init_routing_v2" and not region:
            region, matmuls, last = "permute", 0, _matmuls_ahead(ops, i)
            per_token = op.inputs[1].dims[-1].coef
            marked.append(_dispatched(op, per_token))
        elif op.name == "unpermute_tokens" and region:
            region = ""
            inputs = (_rows(op.inputs[0], per_token), *op.inputs[1:])
            marked.append(op.but(inputs=inputs, stage="unpermute"))
        elif not region:
            marked.append(op)
        elif op.name == "init_routing_v2":
            marked.append(_dispatched(op, per_token))
        elif op.name == "expert_counts":
            marked.append(op.but(stage="permute"))
        elif op.name == "grouped_matmul":
            matmuls += 1
            marked.append(_matmul(op, per_token, up=matmuls < last).but(stage="experts"))
        else:
            narrowed = 0 < matmuls < last  # between the first and the last matmul rows have the intermediate width
            inputs, outputs = (
                tuple(t if t.weight else _inside(t, per_token, narrowed) for t in tensors)
                for tensors in (op.inputs, op.outputs)
            )
            marked.append(op.but(inputs=inputs, outputs=outputs, stage="experts"))
    return marked


@dataclass(frozen=True)
class Whole:
    """How shared experts run that are not cut over tp.

    ``tokens``: rows that this rank's copy works on, per token of the rank. ``resident``: whether ranks with routed
    experts hold a copy at all; external shared experts live on ranks of their own.
    """

    tokens: float
    resident: bool = True


@dataclass(frozen=True)
class BlockForm:
    """On which tokens a rank works inside its MoE blocks, per token of the rank, and how shared experts run.

    ``norm``: what stands between attention's sum and the block; ``choosing``: the router; ``moving``: rows permuted to
    experts and summed; ``adding``: what else the block does before its tokens are all on the rank again. ``shared``:
    shared experts that are not cut over tp; ``fused``: one runs among the routed experts, if it is like them.
    """

    shared: Whole | None = None
    fused: bool = False
    norm: float = 1.0
    choosing: float = 1.0
    moving: float = 1.0
    adding: float = 1.0


def with_block_form(table: OpTable, form: BlockForm) -> OpTable:
    """``table`` with its MoE blocks on the tokens, and its shared experts in the way, that ``form`` says."""
    if form.shared is not None:
        table = _with_whole_shared(table, form.shared)
    if (form.norm, form.choosing, form.moving, form.adding) == (1.0, 1.0, 1.0, 1.0):
        return table
    ops = list(table.ops)
    for kind, block in blocks_of(ops).items():
        mine = [i for i, op in enumerate(ops) if op.kind == kind]
        inside = [i for i in mine if ops[i].module.startswith(block)]
        start = next(i for i in inside if ops[i].name == "init_routing_v2")
        experts = ops[start].module
        summed = max((i for i in mine if i < inside[0] and ops[i].shard == "row"), default=inside[0])
        for i in mine:
            op = ops[i]
            if summed < i < inside[0]:
                ops[i] = _on_tokens(op, form.norm)
            elif i in inside and not is_shared(op.module, kind, {kind: block}):
                ops[i] = _on_tokens(op, _share(op, i < start, op.module.startswith(experts), table, form))
    return replace(table, ops=tuple(ops))


def _share(op: Op, before: bool, of_experts: bool, table: OpTable, form: BlockForm) -> float:
    """Of a row inside a block: before the permute it chooses, unless it narrows what the experts read."""
    facts = table.facts
    narrows = facts.moe_hidden_size != facts.hidden_size and op.outputs[0].dims[-1].coef == facts.moe_hidden_size
    if before and not of_experts:
        return form.adding if narrows else form.choosing
    return form.moving if of_experts else form.adding


def _on_tokens(op: Op, share: float) -> Op:
    """The row on ``share`` of this rank's tokens."""
    if share == 1.0:
        return op

    def scaled(tensor: Tensor) -> Tensor:
        if tensor.weight:
            return tensor
        dims = (dim._replace(coef=dim.coef * share) if dim.B and not dim.L else dim for dim in tensor.dims)
        return replace(tensor, dims=tuple(dims))

    return op.but(inputs=tuple(map(scaled, op.inputs)), outputs=tuple(map(scaled, op.outputs)))


def _with_whole_shared(table: OpTable, whole: Whole) -> OpTable:
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


def with_fused_shared(table: OpTable, running: Quantization) -> OpTable:
    """``table`` with the shared expert of each block among the routed ones: in their grouped GEMMs, as one more choice.

    Its own matmuls and the sum with the routed experts are gone; a gate of its own stays, as the weight of the choice.
    The same table where a block's shared expert is not of a routed one's size and scheme (``running``).
    """
    blocks = blocks_of(table.ops)
    shared = {kind: [p for p in table.params if p.kind == kind and _is_mlp(p, blocks)] for kind in blocks}
    if not all(_like_routed(table, mine, kind, running) for kind, mine in shared.items()):
        return table
    fused = {id(p) for mine in shared.values() for p in mine}
    ops = list[Op]()
    for kind in dict.fromkeys(op.kind for op in table.ops):
        mine = [op for op in table.ops if op.kind == kind]
        if kind in blocks:
            paths = {p.module.rpartition(".")[0] for p in shared[kind]}
            mine = [_one_more(op, table) for op in _without(mine, paths)]
        ops += mine
    return replace(
        table, ops=tuple(ops), params=tuple(p for p in table.params if id(p) not in fused),
        facts=replace(table.facts, fused_experts=1),
    )


def _is_mlp(param: Param, blocks: dict[int, str]) -> bool:
    """Whether a weight is of a shared expert; its gate has one output."""
    return is_shared_param(param, blocks) and param.shape[0] > 1


def _like_routed(table: OpTable, shared: list[Param], kind: int, running: Quantization) -> bool:
    routed = [p for p in table.params if p.kind == kind and p.role == "experts"]
    sizes = sum(p.full_numel for p in shared), sum(p.full_numel for p in routed) / table.facts.num_experts
    schemes = {running.scheme(p.name, p.role, p.stored).name for p in (*shared, *routed)}
    return bool(shared) and sizes[0] == sizes[1] and len(schemes) == 1


def _without(ops: list[Op], paths: set[str]) -> list[Op]:
    """``ops`` of a layer without those of the modules at ``paths`` and what only joins their output to the others'."""
    kept: list[Op] = []
    gone: set[int] = set()
    same: dict[int, Tensor] = {}  # a sum with what is gone is its other part
    for op in ops:
        inputs = tuple(replace(t, storage=same[t.storage].storage) if t.storage in same else t for t in op.inputs)
        reads = any(t.storage in gone for t in inputs if not t.weight)
        if not reads and not any(op.module == path or op.module.startswith(f"{path}.") for path in paths):
            kept.append(op.but(inputs=inputs))
            continue
        made = op.outputs[0]
        others = [t for t in inputs if reads and not t.weight and t.storage not in gone]
        other = next((t for t in others if t.numel(REFERENCE) == made.numel(REFERENCE)), None)
        if other is None:
            gone |= {t.storage for t in op.outputs}
        else:
            same[made.storage] = other
    return kept


def _one_more(op: Op, table: OpTable) -> Op:
    """A row that moves tokens to experts and back, with a choice more for every token; others as they are."""
    facts = table.facts
    if op.stage not in ("permute", "unpermute") and not op.module.endswith(".experts"):
        return op

    def wider(tensor: Tensor) -> Tensor:
        if tensor.weight or op.stage == "experts":
            return tensor
        first, *rest = tensor.dims
        if first.is_constant and first.coef == facts.num_experts:  # rows of every expert
            return replace(tensor, dims=(first._replace(coef=first.coef + 1), *rest))
        dims = (d._replace(coef=d.coef + 1) if d.is_constant and d.coef == facts.top_k else d for d in rest)
        return replace(tensor, dims=(first, *dims))

    attrs = op.attrs
    if op.name == "expert_counts":
        attrs = {**attrs, "num_experts": attrs["num_experts"] + 1}
    return op.but(inputs=tuple(map(wider, op.inputs)), outputs=tuple(map(wider, op.outputs)), attrs=attrs)
