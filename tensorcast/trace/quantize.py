"""Putting a quantisation on a traced table: each matmul gets its scheme, its activation a quantising kernel."""

from __future__ import annotations

from dataclasses import replace

from tensorcast.modeling.quantization import BF16, Quantization, Scheme
from tensorcast.trace.table import Op, OpTable, Tensor

MATMULS = frozenset({"mm", "addmm", "grouped_matmul", "mla_absorb", "mla_expand"})

ACTIVATION_DTYPE = {
    "fp8": "act_fp8", "fp8_block": "act_fp8_block", "int8": "act_int8", "nvfp4": "act_nvfp4", "mxfp8": "act_mxfp8",
    "w4a8": "act_fp8",
}  # fmt: skip
"""Of quantised activations, by scheme, else by the kernel that reads them."""


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
    return table.with_ops(ops)
