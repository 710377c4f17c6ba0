"""Experts padded with zeros to the hidden size that their kernels round up to (MXFP4)."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def with_hidden(experts: Any, hidden: int) -> nn.Module:
    """The same stacked experts for rows of ``hidden`` columns, those beyond the model's zero; in and out."""
    short = hidden - hidden_of(experts)
    if not short:
        return experts
    wide = copy.copy(experts)  # other attributes, and the methods that apply the gate, stay the experts' own
    wide._parameters = dict(experts._parameters)
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    _pad(wide, up, (0, 0, 0, short) if experts.is_transposed else (0, short))
    _pad(wide, "down_proj", (0, short) if experts.is_transposed else (0, 0, 0, short))
    if experts.has_bias:
        _pad(wide, "down_proj_bias", (0, short))
    return wide


def hidden_of(experts: Any) -> int:
    """Columns of the rows that stacked experts take; 0 for experts that run their own code, which take any."""
    if not hasattr(experts, "down_proj"):
        return 0
    down: Tensor = experts.down_proj
    return int(down.shape[2 if experts.is_transposed else 1])


def _pad(module: nn.Module, name: str, short: tuple[int, ...]) -> None:
    setattr(module, name, nn.Parameter(F.pad(getattr(module, name).detach(), short), requires_grad=False))
