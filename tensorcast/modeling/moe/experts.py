"""A rank's experts: stacked weights, cut from a module with the attributes of transformers' experts interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensorcast.errors import InputError
from tensorcast.modeling.moe.groups import ParallelGroup
from tensorcast.modeling.moe.kernels import Projection, Rows, check_backend, run_experts, run_masked
from tensorcast.modeling.moe.listed import ListedExperts
from tensorcast.ops.quantized import parts_of, quantize_weight


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
    experts interface: gated or not, with biases, transposed, gate and up concatenated or interleaved. ``backend`` and
    ``capacity`` as :func:`run_experts` takes them. ``scheme``: the weights are held quantised (``bf16``: as they are);
    a quantised source is cut by experts, not over ranks.
    """

    def __init__(
        self,
        source: nn.Module,
        experts: Sequence[int],
        etp: ParallelGroup = ParallelGroup("etp"),
        *,
        backend: str = "grouped_mm",
        capacity: int = 0,
        scheme: str = "bf16",
    ) -> None:
        super().__init__()
        check_backend(backend)
        held = getattr(source, "scheme", "bf16") if isinstance(source, FusedMoEBase) else "bf16"
        if held != "bf16" and (scheme not in ("bf16", held) or etp.size > 1):
            raise InputError(f"experts quantised as {held}: cannot be cut over {etp.size} ranks or become {scheme}")
        root = source.source[0] if isinstance(source, FusedMoEBase) else source
        self.source: Any = [root]  # in a list: its other experts are not this module's parameters
        self.etp, self.backend, self.capacity = etp, backend, capacity
        self.scheme = held if held != "bf16" else scheme
        origin: Any = source
        self.dtype: torch.dtype = origin.dtype if isinstance(origin, FusedMoEBase) else origin.down_proj.dtype
        for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm"):
            setattr(self, name, getattr(source, name, name == "is_concatenated"))
        self.up_name = "gate_up_proj" if self.has_gate else "up_proj"
        self._suffixes = [""] if self.scheme == "bf16" else ["", *(f"_{part}" for part in parts_of(self.scheme)[1:])]
        chosen = torch.as_tensor(list(experts), dtype=torch.long)
        for name in (self.up_name, "down_proj"):
            if held == "bf16":
                self._keep(name, self._quantized(self._take(source, name, chosen)))
            else:
                self._keep(name, [_chosen(getattr(source, name + suffix), chosen) for suffix in self._suffixes])
            if self.has_bias:
                bias = f"{name}_bias"
                setattr(self, bias, nn.Parameter(self._take(source, bias, chosen), requires_grad=False))
        if self.scheme != "bf16":
            self.is_transposed = False  # quantised weights are [E,N,K]

    def _take(self, source: nn.Module, name: str, chosen: Tensor) -> Tensor:
        """This rank's share of the chosen experts' tensor."""
        part = _chosen(getattr(source, name), chosen)
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
        return part.contiguous()

    def _cut(self, part: Tensor, dim: int, halves: bool) -> Tensor:
        """This rank's slice along ``dim``; of both halves where gate and up lie one after the other."""
        pieces = part.chunk(2, dim) if halves else (part,)
        width, left = divmod(pieces[0].shape[dim], self.etp.size)
        if left:
            raise InputError(f"experts of width {pieces[0].shape[dim]} do not divide over etp = {self.etp.size}")
        return torch.cat([p.narrow(dim, self.etp.rank * width, width) for p in pieces], dim)

    def _quantized(self, weight: Tensor) -> list[Tensor]:
        if self.scheme == "bf16":
            return [weight]
        return quantize_weight(weight.transpose(1, 2) if self.is_transposed else weight, self.scheme)

    def _keep(self, name: str, parts: list[Tensor]) -> None:
        for suffix, part in zip(self._suffixes, parts, strict=True):
            setattr(self, name + suffix, nn.Parameter(part, requires_grad=False))

    def _projection(self, name: str) -> Projection:
        weight = [getattr(self, name + suffix) for suffix in self._suffixes]
        bias = getattr(self, f"{name}_bias") if self.has_bias else None
        return Projection(weight, bias, bool(self.is_transposed), self.scheme)

    def forward(self, rows: Rows, counts: Tensor, *, backend: str | None = None, capacity: int | None = None) -> Tensor:
        """``rows [R,H]`` ordered by expert, ``counts [E_local]`` -> ``[R,H]`` (partial sums when etp > 1).

        Rows may come at fixed capacity, ``[E_local,C,H]``: then the masked kernels run on them as they are. They may
        come quantised, as the parts that ``quantize_activation`` gives for this module's scheme. ``backend`` and
        ``capacity`` replace this module's own for one call, as a phase may.
        """
        source = self.source[0]
        activation = source._apply_gate if self.has_gate else source.act_fn
        up, down = self._projection(self.up_name), self._projection("down_proj")
        first, dtype = (rows, rows.dtype) if isinstance(rows, Tensor) else (rows[0], self.dtype)
        if first.dim() == 3:
            out = run_masked(up.prepare(rows), counts, up=up, activation=activation, down=down, dtype=dtype)
        else:
            backend = self.backend if backend is None else backend
            capacity = self.capacity if capacity is None else capacity
            out = run_experts(
                backend, rows, counts, up=up, activation=activation, down=down, dtype=dtype, capacity=capacity
            )
        return source.post_expert_norm(out) if self.has_post_expert_norm else out


def held_experts(
    experts: nn.Module, ids: Sequence[int], etp: ParallelGroup = ParallelGroup("etp"), scheme: str = "bf16"
) -> nn.Module:
    """The experts of these ids as a rank holds them: called with rows ordered by expert and their counts."""
    if isinstance(experts, ListedExperts):
        return experts.take(ids, etp, scheme)
    return FusedMoEBase(experts, ids, etp, scheme=scheme)


def count_of(experts: Any) -> int:
    """How many experts a list or a stacked module holds."""
    return len(experts) if isinstance(experts, ListedExperts) else int(experts.down_proj.shape[0])


def device_of(experts: Any) -> torch.device:
    """Where the experts' weights are."""
    return experts.device if isinstance(experts, ListedExperts) else experts.down_proj.device


def _chosen(whole: Tensor, chosen: Tensor) -> Tensor:
    """The chosen experts of a stacked tensor; the tensor itself, not a copy, where that is all of them in order."""
    if chosen.tolist() == list(range(whole.shape[0])):
        return whole.detach()
    return whole.detach()[chosen.to(whole.device)]
