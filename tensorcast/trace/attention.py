"""Attention as engines run it, where a class says it in another way.

**Latents.** Multi-head latent attention's up-projection: decode absorbs it into the query and the output (two batched
matmuls per head: DeepSeek-V2, arXiv 2405.04434, section 2.1.2); prefill expands keys and values of every token of the
sequence, cached ones too. Sparse attention reads a few cached latents per query, so it stays absorbed in prefill, too
(FlashMLA's sparse prefill kernel).

**Chosen entries.** DeepSeek-V4 attends to a window and to compressed entries (one per ``ratio`` tokens), all of them or
those that an indexer chooses; MiniMax-M3 to blocks of keys that its indexer chooses. transformers' classes keep such
entries in caches of their own, score them by plain products and hand masks to attention. Engines score and select in
kernels, and no kernel reads a mask (vLLM 0.33.0, ``models/deepseek_v4`` and ``models/minimax_m3``). The indexers of
GLM-5.3-Flash and Qwen4 score one key for several tokens, and attention reads the tokens of those that are chosen (the
same, ``models/glm5next/common/attention.py`` and ``models/qwen4_exp/common/qsa_cache.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

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


@dataclass(frozen=True)
class Selection:
    """What the queries of a layer kind see beside their window: entries of ``ratio`` tokens each, all of them or
    ``picked`` ones, which an indexer picks in blocks of ``pooled`` tokens."""

    ratio: int
    picked: int
    pooled: int = 1
    keys_alone: bool = False
    """Whether only the indexer's keys stand for several tokens, and attention reads the tokens (GLM-5.3-Flash)."""
    plain: bool = False
    """Whether keys that do are kept in bf16."""
    shared: bool = False
    """Whether entries and keys are written by some layers for others, as their own code says (DeepSeek-V4.1)."""
    within: int = 0
    """Entries among which an indexer chooses, as blocks of them were chosen before; 0: all."""


def mark_selection(ops: list[Op], chosen: Mapping[int, Selection]) -> list[Op]:
    """Ops with each such layer's scoring as one ``sparse_indexer``, its attention told what it reads, masks gone.

    ``chosen``: by layer kind.
    """
    marked = list(ops)
    for kind, selection in chosen.items():
        attention = next((op for op in marked if op.name == "attention" and op.kind == kind), None)
        if attention is None:
            continue
        within = {id(op) for op in marked if op.kind == kind and op.module.startswith(attention.module)}
        marked = _scored(marked, within, attention.module, selection)
        if selection.shared:
            marked = [_of_entries(op, selection.ratio) if op.kind == kind else op for op in marked]
        marked = _read(marked, within, attention, selection)
    return marked


def _scored(ops: list[Op], within: set[int], module: str, selection: Selection) -> list[Op]:
    """With one op in the place of the first product of queries and keys in the indexer."""
    scores = next(
        (
            i
            for i, op in enumerate(ops)
            if id(op) in within and op.name == "bmm" and not op.weights and ".indexer" in op.module[len(module) :]
        ),
        None,
    )
    if scores is None:
        return ops
    product = ops[scores]
    top = next(op for op in ops[scores:] if id(op) in within and op.name == "topk")
    indexer = top.module
    heads, width = _heads(product), product.inputs[0].dims[-1]
    length = Dim(1 / selection.ratio, L=1)
    queries, scored_keys = (_made_from(t.storage, ops[:scores]) for t in product.inputs)
    keys = Tensor((Dim(1, B=1), length, width), "bfloat16", scored_keys)
    query = replace(product.inputs[0], storage=queries)
    places = top.outputs[1]
    found = Tensor((*places.dims[:-1], Dim(selection.picked // selection.pooled)), places.dtype, places.storage)
    attrs: dict[str, Any] = {"heads": heads, "selected": Dim(selection.picked), "head_dim": width}
    attrs |= {"compress": selection.ratio} if selection.ratio > 1 else {}
    attrs |= {"pooled": selection.pooled} if selection.pooled > 1 else {}
    attrs |= {"plain": True} if selection.plain else {}
    attrs |= {"within": selection.within} if selection.within else {}
    scored = Op("sparse_indexer", indexer, product.kind, (query, keys), (found,), attrs)
    within.add(id(scored))
    kept = [_pooled(op, selection, width) if id(op) in within and selection.keys_alone else op for op in ops[:scores]]
    within.update(id(op) for op in kept if "unpooled" in op.attrs)
    if selection.ratio == 1 and not selection.shared:  # a token's own key; of compressed ones the layer's ratio tells
        written = Tensor((Dim(1, B=1), Dim(1), _new(product), width), "bfloat16", scored_keys)
        nothing = Tensor((*written.dims[:-1], Dim(0)), "bfloat16", -1 - 2 * scores)
        slots = Tensor((Dim(1, B=1), _new(product)), "int64", -2 - 2 * scores)
        write = Op("kv_cache_write", indexer, product.kind, (written, nothing), (slots,), {"kind": "block_indexer"})
        kept.append(write)
    return [*kept, scored, *ops[scores + 1 :]]


def _pooled(op: Op, selection: Selection, width: Dim) -> Op:
    """The write of an indexer's keys with one of ``width`` for several tokens; ``unpooled``: numbers of a token that it
    is made of (GLM: a key and a gate), kept until it is."""
    if op.name != "kv_cache_write" or op.attrs["kind"] != "indexer":
        return op
    batch, new, own = op.inputs[0].dims
    written = replace(op.inputs[0], dims=(batch, new._replace(coef=new.coef / selection.ratio), width))
    attrs = {**op.attrs, "compress": selection.ratio, "unpooled": own.coef // width.coef * width.coef}
    attrs |= {"kind": "block_indexer"} if selection.plain else {}
    return op.but(inputs=(written, *op.inputs[1:]), attrs=attrs)


def _of_entries(op: Op, ratio: int) -> Op:
    """The write of an entry of several tokens, or of its key: of each token a part. Tokens that have none together yet
    leave a vector and its weights in fp32."""
    if ratio == 1 or op.name != "kv_cache_write" or op.attrs["kind"] not in ("entries", "indexer"):
        return op
    inputs = tuple([
        replace(t, dims=(*rest, tokens._replace(coef=tokens.coef / ratio), width))
        for t in op.inputs for *rest, tokens, width in (t.dims,)
    ])
    attrs = {**op.attrs, "compress": ratio}
    attrs |= {"unpooled": 4.0 * op.inputs[0].dims[-1].coef} if op.attrs["kind"] == "entries" else {}
    return op.but(inputs=inputs, attrs=attrs)


def _heads(product: Op) -> Dim:
    """Of the indexer: a batched product has them among its rows or in its batch."""
    batch, rows, _ = product.inputs[0].dims
    if batch.B and batch.coef > 1:
        return Dim(batch.coef)
    return Dim(rows.coef)


def _made_from(storage: int, before: list[Op]) -> int:
    """The storage that copies in another precision or shape were made of: no kernel makes those."""
    for op in reversed(before):
        if op.name in ("clone", "_to_copy") and any(t.storage == storage for t in op.outputs):
            storage = op.inputs[0].storage
    return storage


def _new(product: Op) -> Dim:
    rows = product.inputs[0].dims[1]
    return Dim(1, S=1) if rows.S else Dim(1)


def _read(ops: list[Op], within: set[int], attention: Op, selection: Selection) -> list[Op]:
    """Without what nothing reads any more, last things first; attention says what it reads."""
    read: set[int] = set()
    kept = []
    for op in reversed(ops):
        mine = id(op) in within
        idle = mine and not op.weights and op.name not in ("attention", "sparse_indexer", "kv_cache_write")
        if idle and op.outputs and not any(t.storage in read for t in op.outputs):
            continue
        if op is attention:
            compressed = (selection.ratio > 1 or selection.shared) and not selection.keys_alone
            attrs = {**op.attrs, "selected": 0 if compressed else op.attrs["selected"]}
            if compressed:
                attrs |= {"compress": selection.ratio, "picked": selection.picked}
            op = op.but(attrs=attrs)
        read.update(t.storage for t in op.inputs)
        kept.append(op)
    return kept[::-1]
