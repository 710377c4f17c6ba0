"""What drafts tokens where it is not the model's own layers: an EAGLE-3 head, a DFlash or DSpark block, a small model.

vLLM 0.33.0 (``model_executor/models/llama_eagle3.py``, ``qwen3_dflash.py``, ``qwen3_dspark.py``, ``v1/spec_decode/``)
and SGLang 0.5.23 (``srt/speculative/``) run them alike:

* ``eagle3``, ``draft_model``: one pass over all tokens that the step has checked, then one per further drafted token.
  An EAGLE-3 head first joins hidden states of three layers of the model (``fc``, whole on every rank), and its first
  layer reads the embedding beside them.
* ``dflash``, ``dspark``: one pass over the block of all drafted tokens; hidden states of several layers become keys and
  values of every draft layer. DSpark then adds a bias of low rank by the token before, token by token.
* ``ngram``: tokens of the prompt are looked up on the host; nothing runs on the GPU.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np

from tensorcast.cost.collectives import group_extent
from tensorcast.cost.work import Size
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.plan.plan import Collective, Row
from tensorcast.deploy.step.sums import RecipePart
from tensorcast.profiles.config_values import text_of
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.sourced import Figure
from tensorcast.trace.dims import Dim
from tensorcast.trace.table import STATEFUL, Op, OpTable, Tensor, per_table

BLOCK = ("dflash", "dspark")
"""What drafts all tokens in one pass."""

EAGLE3_VOCABULARY = 32_000
"""Tokens that an EAGLE-3 head can draft where its config is not given: those of yuhuili/EAGLE3-LLaMA3.1-Instruct-8B and
of heads trained with SpecForge (``draft_vocab_size``)."""

BLOCK_LAYERS, MARKOV_RANK = 5, 256
"""Layers of a DFlash block and rank of DSpark's bias where no config is given: those of z-lab's Qwen3 blocks
(github.com/z-lab/dflash) and of DeepSpec's (``markov_rank``)."""


@dataclass(frozen=True, kw_only=True)
class DraftSizes:
    """A draft network before it is cut; ``features``: numbers of the model's hidden states that it joins per token.

    ``joined``: its first layer reads hidden state and embedding side by side. ``own_embedding``, ``own_head``: whether
    it holds these itself, or uses the model's. ``markov_rank``: of DSpark's bias; 0: none. ``assumed``: not read from a
    config of its own.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    vocab: int
    features: int = 0
    joined: bool = False
    own_embedding: bool = False
    own_head: bool = False
    markov_rank: int = 0
    assumed: bool = False


def draft_sizes(method: str, model: ModelProfile, draft: ModelProfile | None) -> DraftSizes:
    """Sizes of ``draft``'s config, or of a head such as are published for a model of this width.

    Unstated heads are the model's own, of latent attention one per 128 numbers of the hidden state; the MLP is as wide
    as the model's dense one, or four times the hidden state where all its layers have experts.
    """
    target = text_of(model.config)
    own = text_of(draft.config) if draft is not None else {}
    read: dict[str, Any] = {**_assumed(target), **own} if own else _assumed(target)
    hidden, heads = int(read["hidden_size"]), int(read["num_attention_heads"])
    layers = int(own.get("num_hidden_layers", BLOCK_LAYERS if method in BLOCK else 1))
    joins = own.get("target_hidden_size") or target["hidden_size"]
    layer_ids = (own.get("dflash_config") or own).get("target_layer_ids") or own.get("eagle_aux_hidden_state_layer_ids")
    features = int(joins) * (len(layer_ids) if layer_ids else layers if method in BLOCK else 3)
    few = min(EAGLE3_VOCABULARY, int(target["vocab_size"])) if method == "eagle3" else int(target["vocab_size"])
    vocab = own.get("draft_vocab_size") or (own.get("vocab_size") if method == "draft_model" else None) or few
    return DraftSizes(
        hidden=hidden, layers=layers, heads=heads, kv_heads=int(read.get("num_key_value_heads") or heads),
        head_dim=int(read.get("head_dim") or hidden // heads), width=int(read["intermediate_size"]), vocab=int(vocab),
        features=0 if method == "draft_model" else features, joined=method == "eagle3",
        own_embedding=method == "draft_model",
        own_head=method == "eagle3" or (method == "draft_model" and not read.get("tie_word_embeddings")),
        markov_rank=int(own.get("markov_rank") or MARKOV_RANK) if method == "dspark" else 0, assumed=not own,
    )


def _assumed(target: dict[str, Any]) -> dict[str, Any]:
    hidden = int(target["hidden_size"])
    latent = bool(target.get("kv_lora_rank"))
    experts_only = not target.get("moe_intermediate_size") and (
        target.get("num_local_experts") or target.get("num_experts")
    )
    wide = target.get("intermediate_size")
    return {
        "hidden_size": hidden,
        "num_attention_heads": hidden // 128 if latent else target["num_attention_heads"],
        "num_key_value_heads": max(1, hidden // 1024) if latent else target.get("num_key_value_heads"),
        "head_dim": 128 if latent else target.get("head_dim"),
        "intermediate_size": 4 * hidden if experts_only or not wide else wide,
    }


@dataclass(frozen=True, kw_only=True)
class Drafter:
    """Rows of one rank that draft: ``once`` per step over all tokens that it has checked, ``again`` for every further
    pass, ``heads`` for every drafted token; each with how often it runs there. ``sizes`` None: nothing on the GPU.

    ``weight_bytes`` and ``cache_numbers`` per token are those of a rank, beside the model's.
    """

    method: str
    sizes: DraftSizes | None
    once: tuple[tuple[Row, int], ...] = ()
    again: tuple[tuple[Row, int], ...] = ()
    heads: tuple[tuple[Row, int], ...] = ()
    weight_bytes: float = 0.0
    cache_numbers: float = 0.0

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for part in (self.once, self.again, self.heads) for row, _ in part)

    def times(self, depth: Size, halves: Size) -> tuple[Size, Size, Size]:
        """How often each of the three runs for ``depth`` drafted tokens: the first over all checked tokens, the others
        over one token of each sequence."""
        return np.greater(depth, 0) * halves, np.maximum(np.subtract(depth, 1.0), 0.0), depth

    def layer_passes(self, depth: Size) -> Size:
        """Layers that run one after another for ``depth`` drafted tokens."""
        if self.sizes is None:
            return 0.0
        return self.sizes.layers * (np.greater(depth, 0) * 1.0 if self.method in BLOCK else depth)


@cache
def _nothing() -> Drafter:
    return Drafter(method="ngram", sizes=None)


def make_drafter(
    method: str, model: ModelProfile, draft: ModelProfile | None, layout: Layout, device: DeviceProfile
) -> Drafter | None:
    """The drafter of a rank; None: the model's own layers draft, or nothing does."""
    if method == "mtp":
        return None
    if method == "ngram":
        return _nothing()
    sizes = draft_sizes(method, model, draft)
    cut = _Cut(sizes, layout.tp, group_extent(layout.tp, 1, device))
    layers = cut.layers()
    if method in BLOCK:
        kv = 2 * cut.kv_heads * sizes.head_dim * sizes.layers
        context = (cut.matmul("fc", sizes.features, sizes.hidden), cut.matmul("context_kv", sizes.hidden, kv))
        once = (*((row, 1) for row in context), *layers, *cut.head())
        again: tuple[tuple[Row, int], ...] = ()
        heads = cut.bias() if sizes.markov_rank else ()
    else:
        joins = ((cut.matmul("fc", sizes.features, sizes.hidden), 1),) if sizes.features else ()
        once, again, heads = (*joins, *layers), layers, cut.head()
    return Drafter(
        method=method, sizes=sizes, once=once, again=again, heads=heads, weight_bytes=cut.weight_bytes(method),
        cache_numbers=2.0 * cut.kv_heads * sizes.head_dim * sizes.layers,
    )


class _Cut:
    """A draft network cut over tensor-parallel ranks, as the model is (``draft_tensor_parallel_size`` unasked)."""

    def __init__(self, sizes: DraftSizes, tp: int, extent: tuple[int, ...]) -> None:
        self.sizes, self.tp, self.extent = sizes, tp, extent
        self.heads, self.kv_heads = max(1, sizes.heads // tp), max(1, sizes.kv_heads // tp)
        self.width, self.vocab = -(-sizes.width // tp), -(-sizes.vocab // tp)

    def layers(self) -> tuple[tuple[Row, int], ...]:
        """One pass: embedding, then every layer."""
        s = self.sizes
        ids = Tensor((Dim(1, B=1),), "int64")
        table = Tensor((Dim(self.vocab), Dim(s.hidden)), "bfloat16", weight="draft.embed_tokens")
        embedding = Op("embedding", "draft.embed_tokens", -1, (table, ids), (_activation(s.hidden),))
        q, kv = self.heads * s.head_dim, self.kv_heads * s.head_dim
        rows: list[Row] = [_norm(s.hidden), self.matmul("qkv_proj", s.hidden, q + 2 * kv), *self._attention()]
        rows += [*self._summed("o_proj", q), _norm(s.hidden), self.matmul("gate_up_proj", s.hidden, 2 * self.width)]
        rows += [_pointwise("silu", (self.width, self.width), (self.width,)), *self._summed("down_proj", self.width)]
        first: list[Row] = [embedding, *([self._collective("all_reduce", 2.0 * s.hidden)] if self.tp > 1 else [])]
        if not s.joined:
            return (*((row, 1) for row in first), *((row, s.layers) for row in rows))
        # an EAGLE-3 head's first layer norms embedding and hidden state, and reads both
        first.append(_norm(s.hidden))
        joined = self.matmul("qkv_proj", 2 * s.hidden, q + 2 * kv)
        later = ((rows[1], s.layers - 1),) if s.layers > 1 else ()
        return (
            *((row, 1) for row in first), (joined, 1), *later, *((row, s.layers) for row in (rows[0], *rows[2:])),
        )  # fmt: skip

    def head(self) -> tuple[tuple[Row, int], ...]:
        rows: list[Row] = [_norm(self.sizes.hidden), self.matmul("lm_head", self.sizes.hidden, self.vocab)]
        if self.tp > 1:
            rows.append(self._collective("all_gather", 2.0 * self.sizes.vocab))
        return tuple((row, 1) for row in rows)

    def bias(self) -> tuple[tuple[Row, int], ...]:
        """DSpark's bias on one token's logits: an embedding of the token before, and a matrix of its rank."""
        rank, ids = self.sizes.markov_rank, Tensor((Dim(1, B=1),), "int64")
        table = Tensor((Dim(self.sizes.vocab), Dim(rank)), "bfloat16", weight="draft.markov_w1")
        looked_up = Op("embedding", "draft.markov_w1", -1, (table, ids), (_activation(rank),))
        rows: list[Row] = [looked_up, self.matmul("markov_w2", rank, self.vocab)]
        if self.tp > 1:
            rows.append(self._collective("all_gather", 2.0 * self.sizes.vocab))
        return tuple((row, 1) for row in rows)

    def weight_bytes(self, method: str) -> float:
        """Bytes of a rank, in bf16; embedding and head where they are its own."""
        s = self.sizes
        q, kv = self.heads * s.head_dim, self.kv_heads * s.head_dim
        layer = s.hidden * (q + 2 * kv) + q * s.hidden + 3 * s.hidden * self.width
        numbers = s.layers * layer + s.features * s.hidden + (s.hidden * (q + 2 * kv) if s.joined else 0)
        numbers += s.hidden * self.vocab * (s.own_embedding + s.own_head)
        numbers += s.markov_rank * (s.vocab + self.vocab)
        return 2.0 * numbers

    def matmul(self, name: str, inner: int, outer: int) -> Op:
        weight = Tensor((Dim(inner), Dim(outer)), "bfloat16", weight=f"draft.{name}")
        return Op(
            "mm", f"draft.{name}", -1, (_activation(inner), weight), (_activation(outer),), attrs={"scheme": "bf16"}
        )

    def _attention(self) -> list[Row]:
        s = self.sizes
        q, k = (Tensor((Dim(1, B=1), Dim(n), Dim(1), Dim(s.head_dim)), "bfloat16") for n in (self.heads, self.kv_heads))
        attrs = {
            "scale": s.head_dim**-0.5, "causal": True, "window": 0, "chunk": 0, "selected": 0, "latent": 0, "rope": 0,
            "past": Dim(1, P=1),
        }
        widths = (self.heads * s.head_dim, self.kv_heads * s.head_dim)
        written = Tensor((Dim(1, B=1), Dim(1)), "bfloat16")
        return [
            _pointwise("rope", widths, widths),
            Op("kv_cache_write", "draft.attention", -1, (k, k), (written,), attrs={"kind": "kv"}),
            Op("attention", "draft.attention", -1, (q, k, k), (q,), attrs=attrs),
        ]

    def _summed(self, name: str, inner: int) -> list[Row]:
        """A row-parallel matmul and the sum over its ranks."""
        rows: list[Row] = [self.matmul(name, inner, self.sizes.hidden)]
        return [*rows, self._collective("all_reduce", 2.0 * self.sizes.hidden)] if self.tp > 1 else rows

    def _collective(self, name: Any, scale: float) -> Collective:
        return Collective(
            op=name, module="draft", kind=-1, group="tp", ranks=self.tp, extent=self.extent, scale=scale,
            label="drafted logits" if name == "all_gather" else "",
        )


def _activation(width: int) -> Tensor:
    return Tensor((Dim(1, B=1), Dim(width)), "bfloat16")


def _norm(width: int) -> Op:
    return _pointwise("add+rms_norm", (width, width), (width, width), weights=(width,))


def _pointwise(label: str, inputs: Sequence[int], outputs: Sequence[int], weights: Sequence[int] = ()) -> Op:
    read = (*map(_activation, inputs), *(Tensor((Dim(w),), "bfloat16", weight="draft.norm") for w in weights))
    return Op("pointwise", "draft", -1, read, tuple(map(_activation, outputs)), attrs={"label": label})


class Beside(NamedTuple):
    """``rows`` behind a plan's, ``parts`` beside the plan's own, and by position what rows are called in these."""

    rows: tuple[Row, ...]
    parts: tuple[RecipePart, ...]
    named: Mapping[int, Row]


NOTHING = Beside((), (), {})
"""Of a step that drafts none."""


def beside(planned: Sequence[Row], table: OpTable, drafter: Drafter | None, copies: Figure | None) -> Beside:
    """What drafts tokens beside the ``planned`` rows, and the ``copies`` of accepted states that an engine makes."""
    rows, parts, named = list[Row](), list[RecipePart](), dict[int, Row]()
    if drafter is None:
        named = _own_layer(planned, table)
        rows.append(_projection(table))
        parts.append(RecipePart(tuple(named), (1,) * len(named), drafts=True))
    else:
        for some in (drafter.once, drafter.again, drafter.heads):
            first = len(planned) + len(rows)
            rows += [row for row, _ in some]
            where, often = tuple(range(first, first + len(some))), tuple([n for _, n in some])
            parts.append(RecipePart(where, often, drafts=some is not drafter.once))
    if copies is not None and (kept := _kept_states(table, copies.value)) is not None:
        parts.append(RecipePart((len(planned) + len(rows),), (1,), drafts=True))
        rows.append(kept)
    return Beside(tuple(rows), tuple(parts), named)


def _own_layer(planned: Sequence[Row], table: OpTable) -> dict[int, Row]:
    """What drafts a token, by position (the projection stands behind the plan's rows): a layer of the last kind and
    the head (DeepSeek-V3, section 2.2), after hidden state and embedding are projected together."""
    last = table.layer_kinds[-1]
    drafting = {len(planned): _projection(table)} | {
        i: row for i, row in enumerate(planned)
        if row.kind == last or (row.kind < 0 and row.module.startswith("lm_head"))
    }
    return {i: replace(row, module=f"mtp.{row.module}") for i, row in drafting.items()}


@per_table
def _projection(table: OpTable) -> Op:
    """``[T,2H] x [2H,H]``"""
    hidden = float(table.facts.hidden_size)
    joined = Tensor((Dim(1, B=1), Dim(2 * hidden)), "bfloat16")
    weight = Tensor((Dim(2 * hidden), Dim(hidden)), "bfloat16", weight="eh_proj.weight")
    return Op("mm", "eh_proj", -1, (joined, weight), (Tensor((Dim(1, B=1), Dim(hidden)), "bfloat16"),))


@per_table
def _kept_states(table: OpTable, moved: float) -> Op | None:
    """Copies of each sequence's accepted states, of all layers together, at ``moved`` states of traffic for each; None
    where there are none."""
    layers, found = Counter(table.layer_kinds), list[Tensor]()
    for op in table.ops:
        if op.name in STATEFUL:
            state = op.outputs[1]
            numbers = math.prod(dim.coef for dim in state.dims[1:]) * layers[op.kind] * moved / 2
            found.append(Tensor((Dim(1, B=1), Dim(numbers)), state.dtype))
    return Op("copy_", "accepted_states", -1, tuple(found), tuple(found)) if found else None
