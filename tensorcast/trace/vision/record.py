"""Recording a tower: its weights and pixels on meta, grids and positions as real numbers.

Classes work positions out of grids in Python (``tolist``, ``repeat_interleave``), which needs data. They are on the CPU
here, and stay there until they meet a tensor on meta; what runs on them alone is no work of a GPU and is not recorded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from tensorcast.trace.record import Recorder

MAKERS = (torch.tensor, torch.arange, torch.linspace)
"""Functions that make numbers of no tensor."""


class TowerRecorder(Recorder):
    """A :class:`Recorder` in which real tensors may meet those on meta."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        name = func._schema.name.split("::")[1]
        if tensors and all(t.device.type != "meta" for t in tensors):
            if kwargs.get("device") is not None:  # asked to move to where the weights are
                kwargs = {**kwargs, "device": torch.device("cpu")}
            return func(*args, **kwargs)
        if not tensors:
            return func(*args, **kwargs)
        if name == "index" and any(t.dtype == torch.bool and t.device.type != "meta" for t in tensors):
            args = (args[0], [place for one in args[1] for place in _where(one)], *args[2:])
        args, kwargs = tree_map(_on_meta, (args, kwargs))
        return super().__torch_dispatch__(func, types, args, kwargs)


def _where(index: Any) -> Iterable[Any]:
    """A real mask as the places where it holds, of which nothing on meta could tell how many there are."""
    if isinstance(index, torch.Tensor) and index.dtype == torch.bool and index.device.type != "meta":
        return index.nonzero(as_tuple=True)
    return (index,)


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) and value.device.type != "meta" else value


class RealNumbers(TorchFunctionMode):
    """Inside, numbers that code makes on meta are real, so that it can ask for their values."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in MAKERS and kwargs.get("device") is not None:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)
