"""Experts that are no two stacked matmuls: each one's own ``forward`` runs.

Where an expert is linear layers with anything row by row between them, one run of its ``forward`` does for all of them:
its linear layers become grouped matmuls on the stacked weights, its vectors are looked up row by row. Else experts are
called one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tensorcast import ops  # noqa: F401  (registers the ops)
from tensorcast.errors import InputError
from tensorcast.modeling.moe.groups import ParallelGroup
from tensorcast.modeling.moe.kernels import Rows, check_backend
from tensorcast.ops.moe import row_experts

TC = torch.ops.tensor_cast


class ListedExperts(nn.Module):
    """Some experts as modules. ``grouped``: all in one run of the first one's ``forward``; else one by one.

    ``take`` gives those that a rank holds, in the place of stacked weights. They cannot be cut over ranks or quantised.
    """

    def __init__(self, experts: Sequence[nn.Module], grouped: bool) -> None:
        super().__init__()
        self.experts, self.grouped = nn.ModuleList(experts), grouped

    def __len__(self) -> int:
        return len(self.experts)

    @property
    def device(self) -> torch.device:
        return next(self.experts.parameters()).device

    def take(self, held: Sequence[int], etp: ParallelGroup = ParallelGroup("etp"), scheme: str = "bf16") -> nn.Module:
        """The experts of these ids (replicas may repeat), called with rows ordered by expert and their counts."""
        kind = type(self.experts[0]).__name__
        if etp.size > 1:
            raise InputError(f"experts of type {kind} run their own code and cannot be cut over etp = {etp.size} ranks")
        if scheme != "bf16":
            raise InputError(f"experts of type {kind} run their own code and cannot be held as {scheme}")
        chosen = [self.experts[i] for i in held]
        return GroupedExperts(chosen) if self.grouped else LoopedExperts(chosen)


class LoopedExperts(nn.Module):
    """Experts called one by one on their rows."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, rows: Rows, counts: Tensor, *, backend: str = "eager", capacity: int = 0) -> Tensor:
        """``rows [R,H]`` ordered by expert, ``counts [E]`` -> ``[R,H]``; rows at fixed capacity ``[E,C,H]`` as well.

        Without data every expert gets as many rows, the first ``R mod E`` one more.
        """
        x = _whole(rows)
        if x.dim() == 3:
            return torch.stack([expert(part) for expert, part in zip(self.experts, x, strict=True)])
        no_data = x.is_meta or is_fake(x)
        parts = x.tensor_split(len(self.experts)) if no_data else x.split(counts.tolist())
        done = [expert(part) for expert, part in zip(self.experts, parts, strict=True) if part.shape[0]]
        return torch.cat(done) if done else torch.empty_like(x)


class GroupedExperts(nn.Module):
    """All experts in one run of the first one's ``forward``; ``eager`` calls them one by one."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        self._program: Any = [experts[0]]  # in lists: the modules' own weights are not this module's parameters
        self._each: Any = [LoopedExperts(experts)]
        self._names = {id(t): name for name, t in _tensors(experts[0])}
        for name in self._names.values():
            stacked = torch.stack([dict(_tensors(expert))[name].detach() for expert in experts])
            setattr(self, _attribute(name), nn.Parameter(stacked, requires_grad=False))

    def forward(self, rows: Rows, counts: Tensor, *, backend: str = "grouped_mm", capacity: int = 0) -> Tensor:
        """As :class:`LoopedExperts`; the masked and contiguous layouts run as one grouped GEMM."""
        check_backend(backend)
        x = _whole(rows)
        if backend == "eager" and x.dim() == 2:
            if x.is_meta or is_fake(x):
                raise InputError("experts backend 'eager' depends on data and cannot be traced: take grouped_mm")
            each: Tensor = self._each[0](rows, counts)
            return each
        form = "masked_grouped_matmul" if x.dim() == 3 else "batched_matmul" if backend == "batched_mm" else ""
        weights = {key: getattr(self, _attribute(name)) for key, name in self._names.items()}
        with _AllExperts(weights, counts, getattr(TC, form or "grouped_matmul")):
            out: Tensor = self._program[0](x)
        return out


class _AllExperts(TorchFunctionMode):
    """Inside, one expert's tensors stand for those of all: ``weights`` has the stacked ones by the id of its own."""

    def __init__(self, weights: Mapping[int, Tensor], counts: Tensor, matmul: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weights, self.counts, self.matmul = weights, counts, matmul

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and id(args[1]) in self.weights:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            stacked = None if bias is None else self.weights[id(bias)]
            return self.matmul(args[0], self.weights[id(args[1])], self.counts, stacked)
        held = [value for value in (*args, *kwargs.values()) if id(value) in self.weights]
        if not held:
            return func(*args, **kwargs)
        if any(value.dim() > 1 for value in held) or func in NOT_BY_ROW:
            raise TypeError(f"{getattr(func, '__name__', func)} on an expert's weight is no linear layer")
        rows = next((value for value in args if isinstance(value, Tensor) and id(value) not in self.weights), None)
        if rows is None:
            raise TypeError(f"{getattr(func, '__name__', func)} on an expert's weight alone")
        return func(*(self._by_row(value, rows) for value in args),
                    **{name: self._by_row(value, rows) for name, value in kwargs.items()})  # fmt: skip

    def _by_row(self, value: Any, rows: Tensor) -> Any:
        """A vector of every expert as one for each row: ``[R,n]``, or ``[E,1,n]`` at fixed capacity."""
        stacked = self.weights.get(id(value))
        if stacked is None:
            return value
        stacked = stacked.unsqueeze(-1) if stacked.dim() == 1 else stacked
        return stacked.unsqueeze(1) if rows.dim() == 3 else stacked[row_experts(self.counts, rows.shape[0])]


NOT_BY_ROW = (F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm, torch.matmul, torch.mm, torch.einsum, F.prelu)
"""Functions that read a whole vector, not one for each row."""


def _tensors(expert: nn.Module) -> list[tuple[str, Tensor]]:
    return [*expert.named_parameters(), *((name, t) for name, t in expert.named_buffers() if t.is_floating_point())]


def _attribute(name: str) -> str:
    return name.replace(".", "__")


def _whole(rows: Rows) -> Tensor:
    if not isinstance(rows, Tensor):
        raise InputError("experts that run their own code take rows as they are, not quantised")
    return rows
