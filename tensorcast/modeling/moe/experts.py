"""A rank's experts: stacked weights cut from a transformers experts module, and one face over both experts styles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensorcast.errors import InputError
from tensorcast.modeling.moe.groups import ParallelGroup

TC = torch.ops.tensor_cast


class ExpertWrapper(nn.Module):
    """One face over a ``ModuleList`` of expert MLPs and over one module with stacked weights.

    Both can be counted, called expert by expert, and cut to a range. Anything else is a ``TypeError``.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        if not isinstance(experts, nn.ModuleList) and not hasattr(experts, "down_proj"):
            raise TypeError(
                f"experts of type {type(experts).__name__}: expected a ModuleList, or stacked up and down projections"
            )
        self.experts = experts

    @property
    def is_list(self) -> bool:
        return isinstance(self.experts, nn.ModuleList)

    def __len__(self) -> int:
        experts: Any = self.experts
        return len(experts) if self.is_list else int(experts.down_proj.shape[0])

    def call(self, expert: int, rows: Tensor) -> Tensor:
        """``rows [n,H]`` through one expert; no rows come back untouched."""
        if rows.shape[0] == 0:
            return rows
        if self.is_list:
            out: Tensor = self.experts[expert](rows)  # type: ignore[index]
            return out
        counts = torch.zeros(len(self), dtype=torch.long, device=rows.device)
        counts[expert] = rows.shape[0]
        return FusedMoEBase(self.experts, range(len(self)))(rows, counts)

    def slice(self, start: int, count: int) -> ExpertWrapper:
        """Experts ``start ... start + count - 1``."""
        if self.is_list:
            return ExpertWrapper(self.experts[start : start + count])  # type: ignore[index]
        return ExpertWrapper(FusedMoEBase(self.experts, range(start, start + count)))

    def stacked(self) -> nn.Module:
        """A module with stacked weights: the experts themselves, or the list's gated MLPs stacked."""
        return _stack(self.experts) if self.is_list else self.experts  # type: ignore[arg-type]


def _stack(experts: nn.ModuleList) -> nn.Module:
    """Stack a list of gated MLPs (``gate_proj``, ``up_proj``, ``down_proj``, ``act_fn``) into one module."""
    first: Any = experts[0]
    if not all(hasattr(first, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        raise TypeError(
            f"cannot stack experts of type {type(first).__name__}: no gate_proj, up_proj, down_proj, act_fn"
        )
    stacked: Any = nn.Module()
    every: list[Any] = list(experts)
    gate_up = torch.stack([torch.cat([e.gate_proj.weight, e.up_proj.weight]) for e in every])
    stacked.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
    stacked.down_proj = nn.Parameter(torch.stack([e.down_proj.weight for e in every]), requires_grad=False)
    stacked.act_fn = first.act_fn
    stacked.has_gate, stacked.has_bias, stacked.is_transposed = True, False, False
    stacked.is_concatenated, stacked.has_post_expert_norm = True, False
    stacked._apply_gate = lambda h: stacked.act_fn(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1]
    return stacked


class ShardedMLP(nn.Module):
    """A gated MLP (``gate_proj``, ``up_proj``, ``down_proj``) cut over a group's ranks: outputs are partial sums."""

    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    gate_proj_bias: Tensor | None
    up_proj_bias: Tensor | None
    down_proj_bias: Tensor | None

    def __init__(self, mlp: nn.Module, group: ParallelGroup) -> None:
        super().__init__()
        source: Any = mlp
        if not all(hasattr(source, name) for name in ("gate_proj", "up_proj", "down_proj")):
            raise TypeError(f"cannot cut {type(mlp).__name__} over ranks: no gate_proj, up_proj, down_proj")
        width = source.down_proj.weight.shape[1]
        if width % group.size:
            raise InputError(f"shared expert of width {width} does not divide over tp = {group.size}")
        self.act_fn: Any = getattr(source, "act_fn", None) or source.activation_fn
        part = slice(group.rank * (width // group.size), (group.rank + 1) * (width // group.size))
        for name in ("gate_proj", "up_proj", "down_proj"):
            layer = getattr(source, name)
            weight = layer.weight.detach()[:, part] if name == "down_proj" else layer.weight.detach()[part]
            setattr(self, name, nn.Parameter(weight.contiguous(), requires_grad=False))
            bias = layer.bias
            if bias is not None:  # the output bias is added once, not once per rank
                bias = bias.detach()[part] if name != "down_proj" else bias.detach() * (group.rank == 0)
            self.register_buffer(f"{name}_bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[T,H]`` -> ``[T,H]``, to be summed over the group."""
        hidden = self.act_fn(F.linear(x, self.gate_proj, self.gate_proj_bias))
        hidden = hidden * F.linear(x, self.up_proj, self.up_proj_bias)
        return F.linear(hidden, self.down_proj, self.down_proj_bias)


class FusedMoEBase(nn.Module):
    """Stacked weights of some experts, each cut over ``etp`` ranks; rows ordered by expert in, rows out.

    ``experts`` lists ids of ``source`` (replicas may repeat). Works on any module with the attributes of transformers'
    experts interface: gated or not, with biases, transposed, gate and up concatenated or interleaved.
    """

    def __init__(self, source: nn.Module, experts: Sequence[int], etp: ParallelGroup = ParallelGroup("etp")) -> None:
        super().__init__()
        root = source.source[0] if isinstance(source, FusedMoEBase) else source
        self.source: Any = [root]  # in a list: its other experts are not this module's parameters
        self.etp = etp
        for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm"):
            setattr(self, name, getattr(source, name, name == "is_concatenated"))
        self.up_name = "gate_up_proj" if self.has_gate else "up_proj"
        chosen = torch.as_tensor(list(experts), dtype=torch.long)
        for name in (self.up_name, "down_proj"):
            self._take(source, name, chosen)
            if self.has_bias:
                self._take(source, f"{name}_bias", chosen)

    def _take(self, source: nn.Module, name: str, chosen: Tensor) -> None:
        whole: Tensor = getattr(source, name)
        every = chosen.tolist() == list(range(whole.shape[0]))  # then share the weights instead of copying them
        part = whole.detach() if every else whole.detach()[chosen.to(whole.device)]
        is_up = name.startswith(self.up_name)
        if self.etp.size > 1 and name != "down_proj_bias":
            # up: the output dim; down: the input dim; biases have no input dim
            dim = (
                (1 if part.dim() == 2 or not self.is_transposed else 2)
                if is_up
                else (2 if not self.is_transposed else 1)
            )
            part = self._cut(part, dim, halves=is_up and bool(self.has_gate) and bool(self.is_concatenated))
        elif name == "down_proj_bias" and self.etp.rank > 0:
            part = torch.zeros_like(part)  # added once, not once per rank
        setattr(self, name, nn.Parameter(part.contiguous(), requires_grad=False))

    def _cut(self, part: Tensor, dim: int, halves: bool) -> Tensor:
        """This rank's slice along ``dim``; of both halves where gate and up lie one after the other."""
        pieces = part.chunk(2, dim) if halves else (part,)
        width = pieces[0].shape[dim] // self.etp.size
        return torch.cat([p.narrow(dim, self.etp.rank * width, width) for p in pieces], dim)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """``rows [R,H]`` ordered by expert, ``counts [E_local]`` -> ``[R,H]`` (partial sums when etp > 1)."""
        source = self.source[0]
        up_bias = getattr(self, f"{self.up_name}_bias") if self.has_bias else None
        down_bias = self.down_proj_bias if self.has_bias else None
        hidden = TC.grouped_matmul(rows, getattr(self, self.up_name), counts, up_bias, self.is_transposed)
        hidden = source._apply_gate(hidden) if self.has_gate else source.act_fn(hidden)
        out: Tensor = TC.grouped_matmul(hidden, self.down_proj, counts, down_bias, self.is_transposed)
        return source.post_expert_norm(out) if self.has_post_expert_norm else out
