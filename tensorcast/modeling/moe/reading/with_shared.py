"""A shared expert behind the routed ones, where it is like them: their grouped GEMMs run it, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tensorcast.modeling.moe.experts import FusedMoEBase
from tensorcast.modeling.moe.listed import ListedExperts
from tensorcast.modeling.moe.reading.probe import BOUND, ROWS, difference, probe_rows, small_twin

GATED = ("gate_proj", "up_proj", "down_proj")


class WithShared(nn.Module):
    """Stacked experts with one more, their last; it has the attributes of transformers' experts interface."""

    def __init__(self, experts: nn.Module, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        source: Any = experts
        for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated"):
            setattr(self, name, getattr(source, name, name == "is_concatenated"))
        self._apply_gate: Any = source._apply_gate
        for name, last in (("gate_up_proj", gate_up), ("down_proj", down)):
            whole = getattr(source, name).detach()
            setattr(self, name, nn.Parameter(torch.cat([whole, last[None].to(whole)]), requires_grad=False))


def with_shared(experts: nn.Module, shared: nn.Module) -> nn.Module | str:
    """``experts`` with the ``shared`` one as their last, or why it cannot be: it must compute what they do, which is
    seen on random rows."""
    found = _joined(experts, shared)
    if isinstance(found, str):
        return found
    pair = nn.ModuleDict({"experts": experts, "shared": shared})  # so that widths shrink alike
    twin = small_twin(pair)
    joined: Any = _joined(twin["experts"], twin["shared"])
    rows, last = probe_rows(joined.down_proj.shape[2 if joined.is_transposed else 1]), joined.down_proj.shape[0] - 1
    with torch.no_grad():
        out = FusedMoEBase(joined, [last])(rows, torch.tensor([ROWS]))
        error = difference(out, twin["shared"](rows.clone()))
    return found if error < BOUND else f"its shared expert computes something else ({error:.1e} of the largest value)"


def _joined(experts: nn.Module, shared: nn.Module) -> WithShared | str:
    routed: Any = experts
    if isinstance(experts, ListedExperts) or not getattr(experts, "has_gate", False):
        return "its routed experts are no gated ones with stacked weights"
    if getattr(routed, "has_bias", False) or getattr(routed, "has_post_expert_norm", False):
        return "its routed experts have biases or a norm"
    layers = [getattr(shared, name, None) for name in GATED]
    if not all(isinstance(layer, nn.Linear) and layer.bias is None for layer in layers):
        return f"its shared expert has no {', '.join(GATED)} without biases"
    gate, up, down = (layer.weight.detach() for layer in layers if isinstance(layer, nn.Linear))
    together = getattr(routed, "is_concatenated", True)
    gate_up = torch.cat([gate, up]) if together else torch.stack([gate, up], 1).flatten(0, 1)
    if getattr(routed, "is_transposed", False):
        gate_up, down = gate_up.T, down.T
    for name, part in (("gate_up_proj", gate_up), ("down_proj", down)):
        whole = getattr(routed, name)
        if whole.shape[1:] != part.shape:
            return f"its shared expert's {name} is {tuple(part.shape)}, a routed one's {tuple(whole.shape[1:])}"
    return WithShared(experts, gate_up, down)
