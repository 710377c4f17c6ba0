"""Gradients of the ops: registered, the same when compiled, and those of finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_ops import SEED, cases

from tensorcast.ops.gradients import GRADIENTS

TC = torch.ops.tensor_cast

GRADED = [name for name in cases() if name.partition(",")[0] in GRADIENTS]


@pytest.mark.parametrize("name", GRADED)
def test_opcheck_with_gradients(name: str) -> None:
    print(f"repeat with TENSORCAST_TEST_SEED={SEED}")
    torch.manual_seed(SEED)
    op, arguments = cases()[name]
    given = tuple(
        a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments
    )
    torch.library.opcheck(op, given, test_utils=("test_autograd_registration", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("name", GRADED)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """Central differences along a random direction, in fp32; a correction bias has none."""
    torch.manual_seed(3)
    op, arguments = cases()[name]
    spots = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.is_floating_point()]
    spots = [i for i in spots if not (i == 1 and name.startswith("moe_gating"))]

    def value(given: list[Any], weights: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        out = op(*given)
        out = out[0] if isinstance(out, tuple) else out
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)) if weights is None else weights
        return (out * weights).double().sum(), weights

    given = [a.clone().requires_grad_() if i in spots else a for i, a in enumerate(arguments)]
    total, weights = value(given)
    grads = torch.autograd.grad(total, [given[i] for i in spots])
    for i, grad in zip(spots, grads, strict=True):
        direction = torch.randn(arguments[i].shape)
        step = 1e-2
        ends = []
        for sign in (1, -1):
            moved = [a.detach() if isinstance(a, torch.Tensor) else a for a in given]
            moved[i] = moved[i] + sign * step * direction
            ends.append(float(value(moved, weights)[0]))
        expected = (ends[0] - ends[1]) / (2 * step)
        assert float((grad * direction).sum()) == pytest.approx(expected, rel=2e-2, abs=2e-2), (name, i)


def test_an_op_without_a_gradient_says_so() -> None:
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    out = TC.attention(q, torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4))
    with pytest.raises(RuntimeError, match="tensor_cast::attention has no gradient: it is for inference"):
        out.sum().backward()
