"""Multi-head latent attention's up-projection, as engines run it in each phase.

Decode absorbs it into the query and the output (two batched matmuls per head: DeepSeek-V2, arXiv 2405.04434, section
2.1.2); prefill expands keys and values of every token of the sequence, cached ones too. Sparse attention reads a few
cached latents per query, so it stays absorbed in prefill as well (FlashMLA's sparse prefill kernel).
"""

from __future__ import annotations

from tensorcast.trace.dims import Dim
from tensorcast.trace.table import Op, Tensor


def mark_latent(ops: list[Op], phase: str) -> list[Op]:
    """Rename each latent attention's up-projection to ``mla_absorb`` (decode, sparse) or ``mla_expand``."""
    latent = {op.module: op for op in ops if op.name == "attention" and op.attrs.get("latent")}
    absorbed = {op.module for op in latent.values() if phase == "decode" or op.attrs["selected"]}
    expanded_keys = {op.inputs[1].storage for op in latent.values() if op.module in absorbed}
    marked = []
    for op in ops:
        if op.name == "copy_" and op.outputs[0].storage in expanded_keys:
            continue  # the absorbed form never builds keys per head
        attention = latent.get(op.module.rpartition(".")[0])
        if attention is None or op.name != "mm" or op.inputs[0].dims[-1].coef != attention.attrs["latent"]:
            marked.append(op)
            continue
        heads, v_dim = attention.inputs[0].dims[1].coef, attention.inputs[2].dims[-1].coef
        nope = attention.inputs[0].dims[-1].coef - attention.attrs["rope"]
        if op.outputs[0].dims[-1].coef != heads * (nope + v_dim):  # a query's up-projection from a latent as wide
            marked.append(op)
            continue
        attrs = {
            **op.attrs,
            "heads": heads,
            "latent": attention.attrs["latent"],
            "nope": nope,
            "v_dim": v_dim,
        }
        if attention.module in absorbed:
            marked.append(op.but(name="mla_absorb", attrs=attrs))
        else:
            marked.append(
                op.but(
                    name="mla_expand",
                    attrs=attrs,
                    inputs=(_all_tokens(op.inputs[0]), *op.inputs[1:]),
                    outputs=tuple(_all_tokens(t) for t in op.outputs),
                )
            )
    return marked


def _all_tokens(tensor: Tensor) -> Tensor:
    """Rows ``B*S`` become ``B*L``: cached latents are expanded again."""
    rows, *rest = tensor.dims
    if rows.S:
        rows = rows._replace(S=rows.S - 1, L=rows.L + 1)
    return Tensor((Dim(*rows), *rest), tensor.dtype, tensor.storage, tensor.weight, tensor.expanded, tensor.offset)
