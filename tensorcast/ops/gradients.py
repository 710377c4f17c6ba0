"""Gradients of the routing ops and the experts' matmuls, each by other ops of the vocabulary.

A pair of functions per op, as ``torch.library.register_autograd`` takes them: what to save, and the gradients of the
arguments. Experts' choices and counts have none. Symbols as in ``moe.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TC = torch.ops.tensor_cast

Setup = Callable[[Any, tuple[Any, ...], Any], None]
Backward = Callable[..., Any]
Gradient = tuple[Setup, Backward]


def _softmax_back(probabilities: Tensor, grad: Tensor) -> Tensor:
    return probabilities * (grad - (grad * probabilities).sum(-1, keepdim=True))


def _save_gating(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])


def _gating_back(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None]:
    logits, indices = ctx.saved_tensors
    chosen = torch.zeros_like(logits, dtype=torch.float32).scatter(-1, indices, grad.float())
    return _softmax_back(torch.softmax(logits.float(), -1), chosen).to(logits.dtype), None


def _save_grouped_gating(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.sigmoid, ctx.renormalize, ctx.scale = inputs[5:8]
    ctx.mark_non_differentiable(output[1])


def _grouped_gating_back(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    """The bias steers the choice alone: it has no gradient."""
    logits, indices = ctx.saved_tensors
    scores = torch.sigmoid(logits.float()) if ctx.sigmoid else torch.softmax(logits.float(), -1)
    weights, back = scores.gather(-1, indices), grad.float() * ctx.scale
    if ctx.renormalize:
        total = weights.sum(-1, keepdim=True) + 1e-20
        back = (back - (back * weights / total).sum(-1, keepdim=True)) / total
    chosen = torch.zeros_like(scores).scatter(-1, indices, back)
    found = chosen * scores * (1 - scores) if ctx.sigmoid else _softmax_back(scores, chosen)
    return found.to(logits.dtype), *[None] * 7


def _save_second(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.rest, ctx.rows = inputs[2:], inputs[0].shape


def _routing_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    """Every token's gradient is the sum of its rows'."""
    (indices,) = ctx.saved_tensors
    return TC.unpermute_tokens(grad.contiguous(), indices).sum(-2), None


def _unpermute_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (indices,) = ctx.saved_tensors
    held = grad.masked_fill((indices < 0).unsqueeze(-1), 0.0)
    return TC.init_routing_v2(held.reshape(-1, grad.shape[-1]), indices.reshape(-1, 1)), None


def _align_back(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (counts,) = ctx.saved_tensors
    return TC.unalign_rows(grad.contiguous(), counts, ctx.rows[0], ctx.rest[0]), None, None


def _unalign_back(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (counts,) = ctx.saved_tensors
    return TC.align_rows(grad.contiguous(), counts, ctx.rest[1]), None, None, None


def _to_capacity_back(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (counts,) = ctx.saved_tensors
    return TC.from_capacity(grad.contiguous(), counts, ctx.rows[0]), None, None


def _from_capacity_back(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (counts,) = ctx.saved_tensors
    return TC.to_capacity(grad.contiguous(), counts, ctx.rows[1]), None, None


def _save_matmul(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.has_bias, ctx.transposed = inputs[3] is not None, inputs[4]


def _matmul_back(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Of both forms on rows ordered by expert: by grouped matmuls."""
    x, weight, counts = ctx.saved_tensors
    grad = grad.contiguous()
    for_x = TC.grouped_matmul(grad, weight, counts, None, not ctx.transposed) if ctx.needs_input_grad[0] else None
    pair = (x, grad) if ctx.transposed else (grad, x)
    for_weight = TC.grouped_outer(*pair, counts) if ctx.needs_input_grad[1] else None
    ones = grad.new_ones((grad.shape[0], 1))
    for_bias = TC.grouped_outer(grad, ones, counts).squeeze(-1) if ctx.has_bias else None
    return for_x, for_weight, None, for_bias, None


def _masked_back(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, counts = ctx.saved_tensors
    empty = torch.arange(grad.shape[1], device=grad.device) >= counts.unsqueeze(1)
    grad = grad.masked_fill(empty.unsqueeze(2), 0.0)
    for_x = TC.masked_grouped_matmul(grad, weight, counts, None, not ctx.transposed)
    pair = (x, grad) if ctx.transposed else (grad, x)
    for_weight = torch.bmm(pair[0].transpose(1, 2), pair[1])
    return for_x, for_weight, None, grad.sum(1) if ctx.has_bias else None, None


GRADIENTS: dict[str, Gradient] = {
    "moe_gating_top_k_softmax": (_save_gating, _gating_back),
    "moe_gating_grouped_top_k": (_save_grouped_gating, _grouped_gating_back),
    "init_routing_v2": (_save_second, _routing_back),
    "unpermute_tokens": (_save_second, _unpermute_back),
    "align_rows": (_save_second, _align_back),
    "unalign_rows": (_save_second, _unalign_back),
    "to_capacity": (_save_second, _to_capacity_back),
    "from_capacity": (_save_second, _from_capacity_back),
    "grouped_matmul": (_save_matmul, _matmul_back),
    "batched_matmul": (_save_matmul, _matmul_back),
    "masked_grouped_matmul": (_save_matmul, _masked_back),
}
"""What ``define`` registers; any other op says in its backward pass that it has none."""


def refused(name: str) -> Gradient:
    """For an op without a gradient: the forward pass runs, the backward pass says so."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"tensor_cast::{name} has no gradient: it is for inference; call it under torch.no_grad()")

    return setup, backward
