"""Putting a precision on a traced table: layers whose weights differ in it become kinds of their own, each matmul gets
its scheme, its activation a quantising kernel."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace

from tensorcast.modeling.quantization import BF16, ROLES, Quantization, Scheme
from tensorcast.trace.table import STATEFUL, Op, OpTable, Param, Tensor, layer_ranges, per_table

Schemes = tuple[str, ...]

MATMULS = frozenset({"mm", "addmm", "grouped_matmul", "mla_absorb", "mla_expand"})

ACTIVATION_DTYPE = {
    "fp8": "act_fp8", "fp8_block": "act_fp8_block", "int8": "act_int8", "nvfp4": "act_nvfp4", "mxfp8": "act_mxfp8",
    "w4a8": "act_fp8",
}  # fmt: skip
"""Of quantised activations, by scheme, else by the kernel that reads them."""


def by_precision(table: OpTable, quantization: Quantization) -> OpTable:
    """The table with a kind for every set of schemes that layers of one structure have, so that one layer stands for
    no other that is stored or runs otherwise. Sparse latent caches are marked where they hold scales."""
    if quantization.scaled_latents and any(map(_is_sparse, table.ops)):
        table = replace(table, ops=tuple(_scaled(op) for op in table.ops))
    if not quantization.by_name:
        return table
    kinds, groups = list(table.layer_kinds), list[tuple[int, int]]()  # (kind, first layer) of each new kind
    for kind in range(len(table.kind_names)):
        layers = [i for i, of in enumerate(table.layer_kinds) if of == kind]
        weights = [p for p in table.params if p.kind == kind and p.role in ROLES]
        found: dict[Schemes, list[int]] = defaultdict(list)
        for layer in layers:
            found[tuple(_scheme(p, layers[0], layer, quantization) for p in weights)].append(layer)
        for same in list(found.values())[1:]:
            number = len(table.kind_names) + len(groups)
            groups.append((kind, same[0]))
            for layer in same:
                kinds[layer] = number
    return _split(table, kinds, groups) if groups else table


@per_table
def schemes_of(table: OpTable, quantization: Quantization) -> tuple[Schemes, ...]:
    """All that a table takes of a precision: schemes of its weights, layer by layer, and whether latents hold scales.

    What is the same for two precisions makes the same of the table.
    """
    marked = "scaled" if quantization.scaled_latents and any(map(_is_sparse, table.ops)) else ""
    found: list[Schemes] = [(marked,)]
    for kind in range(-1, len(table.kind_names)):
        layers = [i for i, of in enumerate(table.layer_kinds) if of == kind] if quantization.by_name else []
        weights = [p for p in table.params if p.kind == kind and p.role in ROLES]
        for layer in layers or [-1]:
            found.append(tuple(_scheme(p, layers[0] if layers else -1, layer, quantization) for p in weights))
    return tuple(found)


def _is_sparse(op: Op) -> bool:
    return bool(op.name == "attention" and op.attrs.get("latent") and op.attrs.get("selected"))


def _scaled(op: Op) -> Op:
    return op.but(attrs={**op.attrs, "scaled": True}) if _is_sparse(op) else op


def _scheme(param: Param, first: int, layer: int, quantization: Quantization) -> str:
    own = _of_layer(param, first, layer)
    return quantization.scheme(own.name, own.role, own.stored).name


def _renamed(name: str, first: int, layer: int) -> str:
    return re.sub(rf"(^|\.){first}\.", rf"\g<1>{layer}.", name, count=1)


def _of_layer(param: Param, first: int, layer: int) -> Param:
    if first == layer:
        return param
    stored = tuple(_renamed(name, first, layer) for name in param.stored)
    return replace(param, name=_renamed(param.name, first, layer), stored=stored)


def _split(table: OpTable, kinds: list[int], groups: list[tuple[int, int]]) -> OpTable:
    """``table`` with its layers' new ``kinds``: rows and parameters of a kind are there once more per group of it."""
    names = [layer_ranges([i for i, of in enumerate(kinds) if of == kind])
             for kind in range(len(table.kind_names) + len(groups))]  # fmt: skip
    firsts = [table.layer_kinds.index(kind) for kind in range(len(table.kind_names))]
    storages = 1 + max((t.storage for op in table.ops for t in (*op.inputs, *op.outputs)), default=0)
    more: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for at, (kind, layer) in enumerate(groups):
        more[kind].append((len(table.kind_names) + at, layer))
    ops, params = list[Op](), list[Param]()
    last = {op.kind: i for i, op in enumerate(table.ops)}

    def label(module: str, kind: int, number: int) -> str:
        return module.replace(f"[{table.kind_names[kind]}]", f"[{names[number]}]", 1)

    for i, op in enumerate(table.ops):
        split = op.kind in more
        ops.append(op.but(module=label(op.module, op.kind, op.kind)) if split else op)
        if not split or i != last[op.kind]:
            continue
        rows = [row for row in table.ops if row.kind == op.kind]
        for number, layer in more[op.kind]:
            copies = _copies(rows, firsts[op.kind], layer, storages * (1 + number))
            ops += [row.but(kind=number, module=label(row.module, op.kind, number)) for row in copies]
    for param in table.params:
        split = param.kind in more
        params.append(replace(param, module=label(param.module, param.kind, param.kind)) if split else param)
        for number, layer in more.get(param.kind, ()):
            own = _of_layer(param, firsts[param.kind], layer)
            params.append(replace(own, kind=number, module=label(param.module, param.kind, number)))
    return replace(
        table, ops=tuple(ops), params=tuple(params), layer_kinds=tuple(kinds), kind_names=tuple(names)
    )  # fmt: skip


def _copies(rows: list[Op], first: int, layer: int, apart: int) -> list[Op]:
    """The rows of another layer: its own weights and its own storages, but for what comes from outside."""
    made = {t.storage for row in rows for t in row.outputs}

    def own(t: Tensor) -> Tensor:
        storage = t.storage + apart if t.storage in made else t.storage
        return replace(t, storage=storage, weight=_renamed(t.weight, first, layer) if t.weight else "")

    return [row.but(inputs=tuple(map(own, row.inputs)), outputs=tuple(map(own, row.outputs))) for row in rows]


def with_states(table: OpTable, dtype: str) -> OpTable:
    """The table with recurrent states in ``dtype``, as an engine keeps, reads and writes them; empty: as traced."""
    states = {t.storage for op in table.ops if op.name in STATEFUL for t in (*op.inputs[3:], *op.outputs[1:])}
    if not dtype or not states:
        return table

    def kept(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(replace(t, dtype=dtype) if t.storage in states and not t.weight else t for t in tensors)

    return replace(table, ops=tuple(op.but(inputs=kept(op.inputs), outputs=kept(op.outputs)) for op in table.ops))


def apply_quantization(table: OpTable, quantization: Quantization) -> OpTable:
    """The table with ``attrs["scheme"]`` on every matmul and ``quantize_activation`` rows before those that need one.

    Routed rows are quantised once per token before they are permuted and sent, as dispatch in FP8 does.
    """
    schemes = {p.name: quantization.scheme(p.name, p.role, p.stored) for p in table.params}
    experts = {p.kind: schemes[p.name] for p in reversed(table.params) if p.role == "experts"}
    ops: list[Op] = []
    made: dict[tuple[int, int, str], Tensor] = {}
    routed: dict[int, Tensor] = {}
    storage = 1 + max((t.storage for op in table.ops for t in (*op.inputs, *op.outputs)), default=0)

    def quantized(op: Op, activation: Tensor, scheme: Scheme) -> Tensor:
        nonlocal storage
        key = (activation.storage, activation.offset, scheme.name)
        if key not in made:
            dtype = ACTIVATION_DTYPE.get(scheme.name) or ACTIVATION_DTYPE[scheme.kernel]
            made[key] = Tensor(activation.dims, dtype, storage)
            storage += 1
            ops.append(
                Op(
                    "quantize_activation",
                    op.module,
                    op.kind,
                    (activation,),
                    (made[key],),
                    {"scheme": scheme.name},
                    op.stage,
                )
            )
        return replace(made[key], dims=activation.dims)  # another row may read other rows of it

    for op in table.ops:
        experts_scheme = experts.get(op.kind, BF16)
        if (
            op.name == "init_routing_v2"
            and experts_scheme.quantizes_activation
            and len(op.inputs[0].dims) == 2
            and op.inputs[0].dims[-1].coef > 1
        ):
            x = quantized(op.but(stage=""), op.inputs[0], experts_scheme)
            out = op.outputs[0]
            routed[out.storage] = Tensor(out.dims, x.dtype, out.storage, "", out.expanded, out.offset)
            ops.append(op.but(inputs=(x, *op.inputs[1:]), outputs=(routed[out.storage],)))
            continue
        if op.name not in MATMULS or not op.weights:
            ops.append(op)
            continue
        scheme = schemes.get(op.weights[0], BF16)
        inputs = op.inputs
        if scheme.quantizes_activation and op.name != "mla_absorb":  # absorbed matmuls run in bf16
            at = next(i for i, t in enumerate(inputs) if not t.weight)
            activation = inputs[at]
            x = (
                Tensor(activation.dims, routed[activation.storage].dtype, activation.storage)
                if activation.storage in routed
                else quantized(op, activation, scheme)
            )
            inputs = (*inputs[:at], x, *inputs[at + 1 :])
        ops.append(op.but(inputs=inputs, attrs={**op.attrs, "scheme": scheme.name}))
    return replace(table, ops=tuple(ops))
