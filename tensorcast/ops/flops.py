"""FLOPs of the experts' matmuls for ``torch.utils.flop_counter``, which counts no op that it does not know."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from tensorcast.ops.moe import MATMULS
from tensorcast.ops.quantized import format_of

TC = torch.ops.tensor_cast


@register_flop_formula([getattr(TC, form) for form in MATMULS])
def _matmul_flops(x: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """2 * rows * N * K; every row of the layout counts, its padding too."""
    return 2 * prod(out_shape) * x[-1]


@register_flop_formula([getattr(TC, f"scaled_{form}") for form in MATMULS])
def _scaled_matmul_flops(
    x: Any, weight: Sequence[Sequence[int]], counts: Any, scheme: str, *_: Any, out_shape: Sequence[int], **__: Any
) -> int:
    """As the plain forms; the weights' values are ``[E,N,K]``, or ``[E,N,K/2]`` where two share a byte."""
    return 2 * prod(out_shape) * weight[0][-1] * (2 if format_of(scheme).packed else 1)
