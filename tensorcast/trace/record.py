"""Recording one forward pass: every op with its shapes, storages, module and the scalars that price it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tensorcast.modeling.attention import of_every_token
from tensorcast.trace.layers import Kinds
from tensorcast.trace.table import EVERY_TOKEN

VIEWS = frozenset(
    "view _unsafe_view reshape transpose t t_ permute expand slice select split split_with_sizes unsqueeze squeeze"
    " detach alias chunk unbind as_strided _reshape_alias narrow unfold lift_fresh view_as_real view_as_complex"
    " diagonal _conj real imag unsafe_split movedim swapaxes view_as".split()
)
"""Ops that move no data."""

ALLOCATIONS = frozenset("empty new_empty empty_like empty_strided new_empty_strided scalar_tensor device".split())
"""Ops that only reserve memory."""

WRITE_ONLY = frozenset("copy_ fill_ zero_".split())
"""In-place ops that do not read what they overwrite."""


@dataclass(slots=True)
class Seen:
    """A tensor as the recorder saw it."""

    shape: tuple[int, ...]
    expanded: tuple[int, ...]
    dtype: str
    storage: int
    offset: int


@dataclass(slots=True)
class Call:
    """One recorded op, with concrete sizes."""

    name: str
    module: str
    inputs: list[Seen]
    outputs: list[Seen]
    attrs: dict[str, Any]
    kind: int = -1
    """Of the decoder layer that ran it."""


def _see(tensor: torch.Tensor) -> Seen:
    shape = tuple(int(s) for s in tensor.shape)
    expanded = tuple(i for i, (n, step) in enumerate(zip(shape, tensor.stride(), strict=True)) if step == 0 and n > 1)
    return Seen(
        shape,
        expanded,
        str(tensor.dtype).removeprefix("torch."),
        tensor.untyped_storage()._cdata,
        int(tensor.storage_offset()),
    )


def _attrs(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Scalars by schema name: all of ours, and the reduced or indexed dimension of aten's."""
    schema = func._schema.arguments
    keep_all = func.namespace == "tensor_cast"
    found: dict[str, Any] = {}
    for i, argument in enumerate(schema):
        value = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
        if keep_all and isinstance(value, (int, float, bool, str)):
            found[argument.name] = value
        elif argument.name == "dim" and isinstance(value, (int, list, tuple)):
            found["dim"] = value if isinstance(value, int) else (value[0] if len(value) == 1 else -1)
    return found


class Recorder(TorchDispatchMode):
    """A dispatch mode that lists the ops run inside it. Tensors are kept alive, so storages stay distinct."""

    def __init__(self, model: nn.Module, kinds: Kinds | None = None) -> None:
        super().__init__()
        self.kinds = Kinds() if kinds is None else kinds
        self.calls: list[Call] = []
        self._paths = {module: path for path, module in model.named_modules()}
        self._stack = [""]
        self._alive: list[torch.Tensor] = []
        self._hooks: list[Any] = []

    @property
    def module(self) -> str:
        """Path of the module that is running."""
        return self._stack[-1]

    def _of_layer(self) -> str:
        """Path of the module that is running, with a word in it where its layer does this with all tokens."""
        if self.kinds.running < 0 or not of_every_token():
            return self.module
        layer = self.kinds.representatives[self.kinds.running]
        return f"{layer}.{EVERY_TOKEN}{self.module[len(layer) :]}"

    def __enter__(self) -> Any:
        def entered(module: nn.Module, _: Any) -> None:
            self._stack.append(self._paths.get(module, self._stack[-1]))

        def left(*_: Any) -> None:
            self._stack.pop()

        self._hooks = [register_module_forward_pre_hook(entered), register_module_forward_hook(left, always_call=True)]
        return super().__enter__()

    def __exit__(self, *exc: Any) -> Any:
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*exc)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name in VIEWS or name in ALLOCATIONS:
            self._alive += [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            return out
        read = args[1:] if name in WRITE_ONLY else args
        inputs = [t for t in tree_leaves((read, kwargs)) if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self._alive += inputs + outputs
        attrs = _attrs(func, args, kwargs)
        seen = [_see(t) for t in inputs], [_see(t) for t in outputs]
        self.calls.append(Call(name, self._of_layer(), *seen, attrs, self.kinds.running))
        return out
