"""Small ops as the trace called them: every argument, with tensors as shapes and strides, to be called on real data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedConfig

from tensorcast.measure.operands import Buffers
from tensorcast.trace.forward import record_step
from tensorcast.trace.layers import Kinds
from tensorcast.trace.record import ALLOCATIONS, VIEWS
from tensorcast.trace.table import Op
from tensorcast.trace.tracer import _label

INDEXED = frozenset("gather scatter scatter_ index index_select index_put_ scatter_add_ embedding".split())
"""Ops whose integer operands are positions in their first one."""


@dataclass(frozen=True)
class Spec:
    """A tensor argument without data."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Template:
    """One call of a trace: the function and its arguments, flattened, with :class:`Spec` where a tensor was."""

    function: Any
    leaves: tuple[Any, ...]
    structure: Any

    @property
    def specs(self) -> list[Spec]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Spec)]

    def _written(self) -> set[int]:
        """Positions of arguments that the function writes to."""
        flags = [a.alias_info is not None and a.alias_info.is_write for a in self.function._schema.arguments]
        return {i for i, flag in enumerate(flags) if flag}

    def bind(self, buffers: Buffers, operands: list[Spec]) -> Callable[[], Any]:
        """The call on random operands, one per tensor argument, of these shapes."""
        given = iter(operands)
        first = next((s for s in operands if s.shape), None)
        leaves: list[Any] = []
        for leaf in self.leaves:
            leaves.append(self._operand(next(given), buffers, first) if isinstance(leaf, Spec) else _at(leaf, buffers))
        args, kwargs = tree_unflatten(leaves, self.structure)
        args = tuple(
            value.clone() if i in self._written() and isinstance(value, torch.Tensor) else value
            for i, value in enumerate(args)
        )
        function = self.function
        return lambda: function(*args, **kwargs)

    def _operand(self, spec: Spec, buffers: Buffers, first: Spec | None) -> torch.Tensor:
        if spec.dtype in (torch.int64, torch.int32) and self.function._schema.name.split("::")[1] in INDEXED:
            return buffers.integers(spec.shape, self._positions(first), spec.dtype)
        return buffers.strided(spec.shape, spec.stride, spec.dtype)

    def _positions(self, first: Spec | None) -> int:
        """How many positions an index may name: the size of the indexed dimension of the first operand."""
        if first is None:
            return 1
        names = [a.name for a in self.function._schema.arguments]
        dim = self.leaves[names.index("dim")] if "dim" in names and len(self.leaves) > names.index("dim") else 0
        return min(first.shape) if not isinstance(dim, int) else first.shape[dim]


def _at(leaf: Any, buffers: Buffers) -> Any:
    """A scalar argument; devices of the trace become the device of the run."""
    return buffers.device if isinstance(leaf, torch.device) else leaf


class _Watch(TorchDispatchMode):
    """Below a recorder: every call that the recorder lists arrives here too, with all its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.templates: list[Template] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name.split("::")[1] not in VIEWS | ALLOCATIONS:
            leaves, structure = tree_flatten((args, kwargs or {}))
            found = tuple(
                Spec(tuple(x.shape), tuple(x.stride()), x.dtype) if isinstance(x, torch.Tensor) else x for x in leaves
            )
            self.templates.append(Template(func, found, structure))
        return out


Templates = dict[tuple[str, str], list[Template]]
"""By op name and module, as the op table labels it, in the order of the calls."""


def watch_step(
    model: nn.Module, config: PreTrainedConfig, phase: str, batch: int, *, new: int, past: int
) -> Templates:
    """All calls of one step of ``model`` on meta at concrete sizes, one layer per kind."""
    kinds, watch = Kinds(), _Watch()
    with watch:
        calls = record_step(
            model, config, batch=batch, new=new, past=past, recurrent_state=phase == "decode", kinds=kinds
        )
    found: Templates = defaultdict(list)
    for call, template in zip(calls, watch.templates[len(watch.templates) - len(calls) :], strict=True):
        assert template.function._schema.name.endswith(f"::{call.name}")
        found[call.name, _label(call.module, call.kind, kinds)].append(template)
    return found


def matched(rows: list[Op], templates: Templates) -> list[Template | None]:
    """The template of every row: the n-th call of that op in that module; None for rows that a pass made."""
    seen: dict[tuple[str, str], int] = defaultdict(int)
    found: list[Template | None] = []
    for row in rows:
        key = (row.name, row.module)
        at, seen[key] = seen[key], seen[key] + 1
        known = templates.get(key, [])
        found.append(known[at] if at < len(known) else None)
    return found
