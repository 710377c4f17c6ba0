"""Experts' rows through each backend: the same matmuls and activation, in the layout that its kernels read.

The layouts and matmuls are ops; nothing here knows where rows come from or go to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.nn import functional as F

from tensorcast import ops  # noqa: F401  (registers the ops)
from tensorcast.errors import InputError
from tensorcast.modeling.moe.backends import all_backends, own_backend
from tensorcast.ops.moe import align_counts
from tensorcast.ops.quantized import dequantize_weight, format_of

TC = torch.ops.tensor_cast

BLOCK = 128
"""Rows to which the contiguous layout aligns each expert (DeepGEMM, github.com/deepseek-ai/DeepGEMM)."""


Rows = Tensor | Sequence[Tensor]
"""Rows of experts, or the parts that ``quantize_activation`` made of them."""


@dataclass(frozen=True)
class Projection:
    """One stacked matmul of some experts.

    ``weight``: one tensor ``[E,N,K]`` (``[E,K,N]`` if ``transposed``), or with a ``scheme`` the parts that
    ``quantize_weight`` gives, never transposed. ``bias`` ``[E,N]``.
    """

    weight: Sequence[Tensor]
    bias: Tensor | None = None
    transposed: bool = False
    scheme: str = "bf16"

    @property
    def quantizes_rows(self) -> bool:
        return self.scheme != "bf16" and format_of(self.scheme).activation is not None

    def prepare(self, x: Rows) -> list[Tensor]:
        """The rows as the matmul reads them: quantised where the scheme says so and they are not yet."""
        if isinstance(x, Tensor):
            return list(TC.quantize_activation(x, self.scheme)) if self.quantizes_rows else [x]
        if not self.quantizes_rows:
            raise InputError(f"rows come quantised, but experts in {self.scheme} take them as they are")
        return list(x)

    def matmul(self, form: str, x: Sequence[Tensor], counts: Tensor, dtype: torch.dtype) -> Tensor:
        """Prepared rows through the op of this ``form``. LongCat's first matrix stands for experts without weights,
        too, which its second has no part of."""
        out: Tensor
        held = self.weight[0].shape[0]
        counts = counts if counts.shape[0] == held else counts[:held]
        if self.scheme == "bf16":
            out = getattr(TC, form)(x[0], self.weight[0], counts, self.bias, self.transposed)
        else:
            out = getattr(TC, f"scaled_{form}")(x, self.weight, counts, self.scheme, dtype, self.bias)
        return out

    def linear(self, expert: int, x: Tensor) -> Tensor:
        """Rows of one expert, ``[n,K]`` -> ``[n,N]``, by a plain linear layer on its (dequantised) weight."""
        own = replace(self, weight=[part[expert] for part in self.weight])
        weight = own.weight[0].t() if self.transposed else own.weight[0]
        if self.scheme != "bf16":
            weight = dequantize_weight(list(own.weight), self.scheme, x.dtype)
        if self.quantizes_rows:
            x = TC.dequantize_activation(self.prepare(x), self.scheme, x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias[expert])


def run_experts(
    backend: str,
    rows: Rows,
    counts: Tensor,
    *,
    up: Projection,
    activation: Callable[[Tensor], Tensor],
    down: Projection,
    dtype: torch.dtype,
    capacity: int = 0,
) -> Tensor:
    """``rows [R,H]`` ordered by expert, ``counts [E]`` of them -> ``[R,H]`` in ``dtype``.

    ``activation``: ``[n,N]`` of the up projection -> ``[n,K]`` of the down projection. ``capacity`` (masked only): most
    rows of one expert; 0: as many as there are rows, which always suffices. Raises :class:`InputError` for an unknown
    backend and for ``eager`` on tensors without data, ``ValueError`` where an expert has more rows than its capacity.
    """
    check_backend(backend)
    out: Tensor
    if (own := own_backend(backend)) is not None:
        out = own(rows, counts, up=up, activation=activation, down=down, dtype=dtype, capacity=capacity)
        return out
    prepared, form, segments = up.prepare(rows), "grouped_matmul", counts
    total = prepared[0].shape[0]
    if backend == "eager":
        whole = rows if isinstance(rows, Tensor) else TC.dequantize_activation(rows, up.scheme, dtype)
        return _eager(whole, counts, up, activation, down)
    if backend == "masked":
        held = [TC.to_capacity(part, counts, capacity or total) for part in prepared]
        out = run_masked(held, counts, up=up, activation=activation, down=down, dtype=dtype)
        out = TC.from_capacity(out, counts, total)
        return out
    if backend == "batched_mm":
        form = "batched_matmul"
    elif backend == "contiguous":
        prepared, segments = [TC.align_rows(part, counts, BLOCK) for part in prepared], align_counts(counts, BLOCK)
    hidden = activation(up.matmul(form, prepared, segments, dtype))
    out = down.matmul(form, down.prepare(hidden), segments, dtype)
    return TC.unalign_rows(out, counts, total, BLOCK) if backend == "contiguous" else out


def run_masked(
    held: Sequence[Tensor],
    counts: Tensor,
    *,
    up: Projection,
    activation: Callable[[Tensor], Tensor],
    down: Projection,
    dtype: torch.dtype,
) -> Tensor:
    """Prepared rows at fixed capacity, ``[E,C,H]``, ``counts [E]`` of them -> ``[E,C,H]``, zero beyond the counts."""
    hidden = up.matmul("masked_grouped_matmul", held, counts, dtype)
    hidden = activation(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
    return down.matmul("masked_grouped_matmul", down.prepare(hidden), counts, dtype)


def check_backend(backend: str) -> None:
    """Raises :class:`InputError` unless it is a backend that runs (``auto`` is one only once chosen)."""
    if backend not in all_backends():
        raise InputError(f"unknown experts backend {backend!r}: choose one of {', '.join(all_backends())}")


def _eager(
    rows: Tensor, counts: Tensor, up: Projection, activation: Callable[[Tensor], Tensor], down: Projection
) -> Tensor:
    if rows.is_meta or is_fake(rows):
        raise InputError(
            "experts backend 'eager': its loop over the experts hit depends on data, so it cannot be traced; "
            "trace grouped_mm, batched_mm, contiguous or masked"
        )
    each = counts.tolist()
    *parts, rest = rows.split([*each, rows.shape[0] - sum(each)])  # rows of other ranks' experts come last
    done = [
        down.linear(expert, activation(up.linear(expert, part))) for expert, part in enumerate(parts) if part.shape[0]
    ]
    return torch.cat([*done, torch.zeros_like(rest)])
