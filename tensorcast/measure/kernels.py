"""From a row of a plan to a real kernel on real tensors: a registry from op to a few lines that name the shapes.

Operands are random and lie in memory (:mod:`buffers`). What no kernel here can run raises :class:`Unsupported`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import tensorcast.ops  # noqa: F401  (registers the ops)
from tensorcast.cost.formulas import Context
from tensorcast.measure.operands import Buffers, Unsupported, torch_dtype
from tensorcast.measure.replay import Spec, Template
from tensorcast.measure.timing import Call
from tensorcast.modeling.moe.kernels import Projection
from tensorcast.modeling.quantization import SCHEMES
from tensorcast.ops.quantized import quantize_weight
from tensorcast.trace.dims import Dim
from tensorcast.trace.table import DTYPE_BYTES, Op
from tensorcast.trace.table import Tensor as Operand

TC = torch.ops.tensor_cast

MOST_SETS = 1024
"""Sets of operands taken in turn, at most: the smallest kernels find theirs in a cache, and hardly notice."""

ROOM = 0.8
"""Share of the free memory that one kernel may fill."""


@dataclass(frozen=True)
class Case:
    """A row at concrete sizes."""

    op: Op
    at: Context
    buffers: Buffers
    template: Template | None = None
    attrs: dict[str, Any] = field(default_factory=dict)

    def shape(self, operand: Operand) -> tuple[int, ...]:
        return tuple(whole(d.at(self.at.sizes)) for d in operand.dims)

    def take(self, operand: Operand) -> Tensor:
        return self.buffers.take(self.shape(operand), torch_dtype(operand.dtype))

    def value(self, size: Any) -> int:
        return whole(self.at.value(size))


def whole(size: Any) -> int:
    """A size of a balanced step as a count: half a row is a row."""
    return max(math.ceil(float(size) - 1e-6), 0)


Builder = Callable[[Case], Call]
_KERNELS: dict[str, Builder] = {}


def kernel(*names: str) -> Callable[[Builder], Builder]:
    """Register how the named ops run."""

    def register(builder: Builder) -> Builder:
        _KERNELS.update(dict.fromkeys(names, builder))
        return builder

    return register


def operand_bytes(op: Op, at: Context) -> float:
    """What a row's operands and results occupy; attention's cache included."""
    total = sum(float(t.numel(at.sizes)) * DTYPE_BYTES[t.dtype] for t in (*op.inputs, *op.outputs))
    if op.name == "attention":
        k, v = op.inputs[1:3]
        per_token = sum(float(t.numel(at.sizes)) * DTYPE_BYTES[t.dtype] for t in (k, v))
        if op.attrs["latent"] and at.decode:
            per_token = float(at.sizes.B * at.sizes.S) * (op.attrs["latent"] + op.attrs["rope"]) * 2.0
        total += per_token * float(at.sizes.L / at.sizes.S)
    return total


def calls_of(case: Case, free: float, effort: float = 1.0) -> list[Call]:
    """The row's kernel on as many sets of operands as flush the caches, within ``free`` bytes. ``effort`` scales both
    their number and, with it, how well they do."""
    size = operand_bytes(case.op, case.at)
    builder = _KERNELS.get(case.op.name, replayed)
    sets = min(math.ceil(MOST_SETS * effort), max(2, math.ceil(case.buffers.pool_bytes / max(size, 1.0))))
    if size > case.buffers.pool_bytes / 2:  # beyond the pool a kernel flushes the caches itself
        sets = 1 if 2 * size > ROOM * free else 2
    return [builder(case) for _ in range(sets)]


def replayed(case: Case) -> Call:
    """An op as the trace called it, at the row's sizes."""
    if case.op.name == "pointwise":
        raise Unsupported("a fused run has no kernel of its own in torch: its parts are measured with --engine eager")
    if case.template is None:
        raise Unsupported(f"{case.op.name} is only ever traced")
    specs, inputs = case.template.specs, list(case.op.inputs)
    if len(specs) == len(inputs) + 1:  # what is only overwritten is no input of the row
        inputs = [case.op.outputs[0], *inputs]
    if len(specs) != len(inputs):
        raise Unsupported(f"{case.op.name} was called with {len(specs)} tensors, the row has {len(inputs)}")
    return case.template.bind(case.buffers, [_resized(s, case.shape(t)) for s, t in zip(specs, inputs, strict=True)])


def _resized(spec: Spec, shape: tuple[int, ...]) -> Spec:
    """The traced strides where the shape is the traced one, else contiguous."""
    if shape == spec.shape:
        return spec
    strides = [1]
    for n in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(n, 1))
    return Spec(shape, tuple(strides[: len(shape)]), spec.dtype)


def _scheme(case: Case) -> str:
    return SCHEMES[case.op.attrs.get("scheme", "bf16")].kernel


@kernel("mm", "addmm")
def matmul(case: Case) -> Call:
    """``x [M,K]`` with ``w [N,K]``, as a linear layer stores it; merged linears add up their N."""
    op = case.op
    x_row = next((t for t in op.inputs if not t.weight and len(t.dims) > 1), op.inputs[0])
    k = case.value(x_row.dims[-1])
    m, n = math.prod(case.shape(x_row)) // k, sum(case.value(t.dims[-1]) for t in op.outputs)
    scheme, dtype = _scheme(case), torch_dtype(op.outputs[0].dtype)
    if scheme != "bf16":
        return _scaled(case, scheme, m, n, k)
    x, w = case.buffers.take((m, k), dtype), case.buffers.take((n, k), dtype)
    bias = case.buffers.take((n,), dtype) if op.name == "addmm" else None
    return partial(F.linear, x, w, bias)


def _scaled(case: Case, scheme: str, m: int, n: int, k: int) -> Call:
    """An FP8 product: one scale per row, or per 1 x 128 and 128 x 128 block."""
    if scheme not in ("fp8", "fp8_block"):
        raise Unsupported(f"torch has no {scheme} matmul that takes these operands")
    f8 = torch.float8_e4m3fn
    x, w = case.buffers.take((m, k), f8), case.buffers.take((n, k), f8)
    if scheme == "fp8":
        one = torch.ones((), device=case.buffers.device)
        return partial(torch._scaled_mm, x, w.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    kinds = F.ScalingType
    x_scale = torch.ones((-(-k // 128), m), device=x.device).T
    w_scale = torch.ones((-(-n // 128), -(-k // 128)), device=x.device)
    return partial(
        F.scaled_mm, x, w.T, x_scale, kinds.BlockWise1x128, w_scale, kinds.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )


@kernel("bmm")
def batched_matmul(case: Case) -> Call:
    """``[b,M,K] x [b,K,N]``."""
    return partial(torch.bmm, case.take(case.op.inputs[0]), case.take(case.op.inputs[1]))


@kernel("grouped_matmul")
def grouped_matmul(case: Case) -> Call:
    """Rows ``[R,K]`` spread evenly over the hit experts' weights, run as the plan's backend runs them."""
    if case.op.attrs.get("scheme", "bf16") != "bf16":
        if case.buffers.device.type == "cpu":
            raise Unsupported(f"no grouped matmul in {_scheme(case)} on a CPU but by unpacking the weights first")
        return quantised_grouped(case)
    x, weight = case.take(case.op.inputs[0]), case.take(case.op.inputs[1])
    transposed = bool(case.op.attrs.get("transposed"))
    counts = spread(x.shape[0], whole(case.at.hit), weight.shape[0], x.device)
    if case.at.backend == "grouped_mm":
        bias = case.take(case.op.inputs[3]) if len(case.op.inputs) > 3 else None
        return partial(TC.grouped_matmul, x, weight, counts, bias, transposed)
    stacked = weight if transposed else weight.transpose(-2, -1)
    if case.at.backend == "batched_mm":
        owner = torch.repeat_interleave(torch.arange(len(counts), device=x.device), counts)
        return lambda: torch.bmm(x.unsqueeze(1), stacked[owner])
    if case.at.backend == "eager":
        parts = [(i, part) for i, part in enumerate(x.split(counts.tolist())) if len(part)]
        return lambda: torch.cat([part @ stacked[i] for i, part in parts])
    raise Unsupported(f"experts backend {case.at.backend} is timed as a whole layer, not row by row")


def quantised_grouped(case: Case) -> Call:
    """Rows and weights quantised beforehand, then the package's op: torch's scaled grouped GEMM where it has one."""
    (rows, k), (experts, *_), n = *(case.shape(t) for t in case.op.inputs[:2]), case.value(case.op.outputs[0].dims[-1])
    scheme, dtype = case.op.attrs["scheme"], torch_dtype(case.op.outputs[0].dtype)
    weight = quantize_weight(case.buffers.take((experts, n, k), dtype), scheme)
    projection = Projection(weight, case.take(case.op.inputs[3]) if len(case.op.inputs) > 3 else None, scheme=scheme)
    x = projection.prepare(case.buffers.take((rows, k), dtype))
    counts = spread(rows, whole(case.at.hit), experts, x[0].device)
    return partial(projection.matmul, "grouped_matmul", x, counts, dtype)


def spread(rows: int, hit: int, experts: int, device: torch.device) -> Tensor:
    """Rows per expert ``[experts]``: as even as can be over ``hit`` of them, which lie apart."""
    hit = max(1, min(hit, experts, max(rows, 1)))
    counts = torch.zeros(experts, dtype=torch.int64, device=device)
    chosen = torch.arange(hit, device=device) * experts // hit
    counts[chosen] = rows // hit + (torch.arange(hit, device=device) < rows % hit).to(torch.int64)
    return counts


@kernel("attention")
def attention(case: Case) -> Call:
    """The package's own op on all ``past + new`` keys; MLA in decode in its absorbed form, one latent for all heads."""
    op, at, a = case.op, case.at, case.op.attrs
    if a["selected"]:
        raise Unsupported("torch has no attention over selected tokens")
    q_row, k_row, v_row = op.inputs[:3]
    batch, heads, new, width = case.shape(q_row)
    past, dtype = case.value(a["past"]), torch_dtype(q_row.dtype)
    if at.kv_bytes < 2.0:
        raise Unsupported("torch has no attention over an FP8 cache")
    if a["latent"] and at.decode:
        q = case.buffers.take((batch, heads, new, a["latent"] + a["rope"]), dtype)
        kv = case.buffers.take((batch, 1, past + new, a["latent"] + a["rope"]), dtype)
        return partial(
            F.scaled_dot_product_attention, q, kv, kv[..., : a["latent"]], scale=a["scale"], enable_gqa=True
        )
    q = case.buffers.take((batch, heads, new, width), dtype)
    k, v = (case.buffers.take((batch, case.value(t.dims[1]), past + new, case.value(t.dims[-1])), dtype)
            for t in (k_row, v_row))
    sinks = case.take(op.inputs[3]) if len(op.inputs) > 3 else None
    return partial(
        TC.attention, q, k, v, past, a["scale"], a["causal"], a["window"], a["chunk"], 0, 0, 0, sinks
    )


@kernel("mla_absorb")
def mla_absorb(case: Case) -> Call:
    """Per head: query into the latent ``[T,nope] x [nope,latent]``, output from it ``[T,latent] x [latent,v]``."""
    a = case.op.attrs
    tokens = math.prod(case.shape(case.op.inputs[0])) // int(a["latent"])
    heads, latent, nope, v_dim = (int(a[name]) for name in ("heads", "latent", "nope", "v_dim"))
    take, bf16 = case.buffers.take, torch.bfloat16
    q, up = take((heads, tokens, nope), bf16), take((heads, nope, latent), bf16)
    o, down = take((heads, tokens, latent), bf16), take((heads, latent, v_dim), bf16)
    return lambda: (torch.bmm(q, up), torch.bmm(o, down))


@kernel("mla_expand")
def mla_expand(case: Case) -> Call:
    """Latents of all tokens ``[B*L,latent]`` to keys and values per head."""
    return matmul(case)


@kernel("embedding")
def embedding(case: Case) -> Call:
    """Rows of the table for random token ids."""
    table = case.take(case.op.inputs[0])
    return partial(F.embedding, case.buffers.integers(case.shape(case.op.inputs[-1]), table.shape[0]), table)


@kernel("kv_cache_write")
def kv_cache_write(case: Case) -> Call:
    """New keys and values into their places in a cache that holds ``past + new`` tokens per sequence."""
    pairs, past = [], whole(case.at.sizes.P)
    for operand in case.op.inputs:
        new = case.take(operand)
        if new.numel():
            cache = case.buffers.take((*new.shape[:-2], past + new.shape[-2], new.shape[-1]), new.dtype)
            pairs.append((cache[..., past:, :], new))
    return lambda: [slot.copy_(new) for slot, new in pairs]


@kernel("kv_cache_read")
def kv_cache_read(case: Case) -> Call:
    """All entries of an indexer's cache ``[B,L,D]`` into a tensor of their own."""
    return case.take(case.op.outputs[0]).clone


@kernel("linear_attention", "ssm_scan", "causal_conv1d")
def traced_only(case: Case) -> Call:
    """What transformers runs with kernels of its own, and the package only traces."""
    raise Unsupported(f"{case.op.name} is only ever traced; a whole layer runs transformers' own kernel")


@kernel("init_routing_v2")
def init_routing(case: Case) -> Call:
    """Rows ordered by expert: as many as this rank works on."""
    rows, width = math.prod(case.shape(case.op.outputs[0])[:1]), case.value(case.op.inputs[0].dims[-1])
    top_k = case.value(case.op.inputs[1].dims[-1])
    tokens = max(1, -(-rows // top_k))
    x = case.buffers.take((tokens, width), torch_dtype(case.op.inputs[0].dtype))
    return partial(TC.init_routing_v2, x, _choices(case, tokens, top_k))


def _choices(case: Case, tokens: int, top_k: int) -> Tensor:
    return case.buffers.choices(tokens, top_k, max(whole(case.at.sizes.E), top_k))


@kernel("expert_counts")
def expert_counts(case: Case) -> Call:
    """Rows per expert from the tokens' choices."""
    tokens, top_k = case.shape(case.op.inputs[0])
    return partial(TC.expert_counts, _choices(case, tokens, top_k), max(whole(case.at.sizes.E), top_k))


@kernel("unpermute_tokens")
def unpermute(case: Case) -> Call:
    """Rows back to their tokens."""
    rows, width = case.shape(case.op.inputs[0])
    top_k = case.value(case.op.inputs[1].dims[-1])
    tokens = max(1, -(-rows // top_k))
    x = case.buffers.take((tokens * top_k, width), torch_dtype(case.op.inputs[0].dtype))
    return partial(TC.unpermute_tokens, x, _choices(case, tokens, top_k))


@kernel("quantize_activation")
def quantize(case: Case) -> Call:
    """bf16 to the scheme's values and scales, by the package's own op."""
    shape = case.shape(case.op.inputs[0])
    x = case.buffers.take((math.prod(shape[:-1]), shape[-1]), torch.bfloat16)
    return partial(TC.quantize_activation, x, case.op.attrs["scheme"])


def shape_text(op: Op, at: Context) -> str:
    """Operands' shapes for people: ``8x2048 · 2048x4096``."""
    def one(operand: Operand) -> str:
        return "x".join(str(whole(d.at(at.sizes))) for d in operand.dims) or "1"

    return " · ".join(one(t) for t in op.inputs) or " · ".join(one(t) for t in op.outputs)


def identity(op: Op, at: Context) -> tuple[Any, ...]:
    """Equal for two rows exactly when the same kernel runs on operands of the same shapes and dtypes."""
    def operands(tensors: tuple[Operand, ...]) -> tuple[Any, ...]:
        return tuple(
            (tuple(whole(d.at(at.sizes)) for d in t.dims), t.expanded, t.dtype, bool(t.weight)) for t in tensors
        )

    skipped = {"label", "projection"}
    attrs = tuple(sorted(
        (name, str(whole(value.at(at.sizes))) if isinstance(value, Dim) else str(value))
        for name, value in op.attrs.items() if name not in skipped
    ))
    past = whole(at.sizes.P) if op.name in ("attention", "kv_cache_write", "sparse_indexer") else 0
    experts = (whole(at.hit), at.backend) if op.name == "grouped_matmul" else ()
    decode = at.decode if op.name == "attention" else None
    return op.name, operands(op.inputs), operands(op.outputs), attrs, op.parts, past, experts, decode
