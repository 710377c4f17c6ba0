"""One face over both styles of experts: a list of modules, and one module with stacked weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tensorcast.modeling.experts import describe_stacked, is_stacked
from tensorcast.modeling.moe.experts import count_of, held_experts
from tensorcast.modeling.moe.reading.stacking import is_described, read_list, read_stacked
from tensorcast.profiles.model import MoEFields


class ExpertWrapper(nn.Module):
    """One face over a ``ModuleList`` of experts and over one module with stacked weights.

    Both can be counted, called expert by expert, and cut to a range. Anything else is a ``TypeError``.
    """

    def __init__(self, experts: nn.Module, fields: MoEFields = MoEFields()) -> None:
        super().__init__()
        if not isinstance(experts, nn.ModuleList) and not any(p.dim() > 1 for p in experts.parameters()):
            raise TypeError(_refused(experts))
        if isinstance(experts, nn.Linear):
            raise TypeError(_refused(experts))
        self.experts, self.fields = experts, fields

    @property
    def is_list(self) -> bool:
        return isinstance(self.experts, nn.ModuleList)

    def __len__(self) -> int:
        experts: Any = self.experts
        return len(experts) if self.is_list else count_of(experts)

    def call(self, expert: int, rows: Tensor) -> Tensor:
        """``rows [n,H]`` through one expert; no rows come back untouched."""
        if rows.shape[0] == 0:
            return rows
        if self.is_list:
            out: Tensor = self.experts[expert](rows)  # type: ignore[index]
            return out
        counts = torch.zeros(len(self), dtype=torch.long, device=rows.device)
        counts[expert] = rows.shape[0]
        found: Tensor = held_experts(self.experts, range(len(self)))(rows, counts)
        return found

    def slice(self, start: int, count: int) -> ExpertWrapper:
        """Experts ``start ... start + count - 1``."""
        if self.is_list:
            return ExpertWrapper(self.experts[start : start + count])  # type: ignore[index]
        return ExpertWrapper(held_experts(self.experts, range(start, start + count)))

    def stacked(self) -> nn.Module:
        """A module with stacked weights and the attributes of transformers' experts interface.

        The experts themselves where they have them; else read off them, and compared with their own ``forward``.
        """
        experts: Any = self.experts
        if self.is_list:
            return read_list(experts, self.fields)
        if hasattr(experts, "is_transposed") and not self.fields.matrices:
            return self.experts
        if is_stacked(experts) and not self.fields.matrices and is_described(experts):
            describe_stacked(experts)
            return self.experts
        return read_stacked(experts, self.fields)


def _refused(experts: nn.Module) -> str:
    return f"experts of type {type(experts).__name__}: expected a ModuleList, or stacked up and down projections"
