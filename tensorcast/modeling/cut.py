"""One tensor-parallel rank of a model whose class works one width out from another (heads from the hidden size).

Such a class cannot be built narrower by its heads alone. A model with *every* width divided can: its attention and its
mixers are those of a rank, with all that they work out. What it lacks is the residual stream, which every rank has
whole. So each weight gets its whole width back where it meets that stream, as a trial run of the model shows: a matrix
that reads the whole stream is column-parallel, one that reads a cut width is row-parallel and writes the whole stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from tensorcast.errors import InputError
from tensorcast.modeling.config import narrow, nested

STREAM = ("hidden_size", "d_model", "n_embd", "embed_dim", "word_embed_proj_dim", "block_dim", "conv_dim")
"""Fields that hold the width of the residual stream."""


def divided(config: PreTrainedConfig, tp: int) -> PreTrainedConfig:
    """``config`` with the stream's width divided as well. Raises :class:`InputError` where a size does not divide."""
    narrowed = narrow(config, tp)
    for part in nested(narrowed):
        for name in STREAM:
            width = vars(part).get(name)
            if not isinstance(width, int):
                continue
            if width % tp:
                raise InputError(f"tp={tp}: {name}={width} does not divide by it; choose a tp that divides {width}")
            object.__setattr__(part, name, width // tp)
    return narrowed


def widen(model: nn.Module, whole: nn.Module, run: Callable[[nn.Module], Any]) -> None:
    """Give the weights of ``model``, all of whose widths are divided, those of ``whole`` where they meet the stream.

    ``run`` runs a model once; every module's weights are settled just before it is called. Routed experts stay whole:
    they are cut by sizes of their own. Both models are on meta.
    """
    kept: dict[str, tuple[bool, ...]] = {}
    ran: set[nn.Module] = set()

    def settle(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point() and t.dim()]
        ran.add(module)
        path = paths[module]
        kept.update(_settle(module, whole.get_submodule(path), path, [t.shape[-1] for t in inputs]))

    paths = {module: path for path, module in model.named_modules()}
    hooks = [module.register_forward_pre_hook(settle, with_kwargs=True) for module in paths]
    try:
        run(model)
    finally:
        for hook in hooks:
            hook.remove()
    for module in paths.keys() - ran:
        # kernels take a module's weights as they are; layers that only run with pictures are like those that ran
        own = model.get_submodule(paths[module].rpartition(".")[0]) not in ran
        for name, param in module.named_parameters(recurse=False):
            full = whole.get_submodule(paths[module]).get_parameter(name).shape
            like = kept.get(_leaf(paths[module], name), (own,) * len(full))
            _resize(param, tuple(a if keep else b for a, b, keep in zip(full, param.shape, like, strict=True)))


def _leaf(path: str, parameter: str) -> str:
    return f"{path.rpartition('.')[2]}.{parameter}"


def _resize(param: Tensor, size: tuple[int, ...]) -> None:
    if size != tuple(param.shape):
        param.data = torch.empty(size, dtype=param.dtype, device=param.device)


def _settle(module: nn.Module, whole: nn.Module, path: str, widths: list[int]) -> dict[str, tuple[bool, ...]]:
    """Give a module the widths of ``whole``, its like in the whole model, that its inputs have; dims that are whole."""
    kept = {}
    for name, param in module.named_parameters(recurse=False):
        full = tuple(whole.get_parameter(name).shape)
        _resize(param, _size(module, param, full, widths))
        kept[_leaf(path, name)] = tuple(a == b for a, b in zip(full, param.shape, strict=True))
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    if isinstance(module, Conv1D):
        module.nf = module.weight.shape[1]
    if not isinstance(module, nn.Linear | Conv1D) and (kept or _routes(module)):
        for name, value in vars(whole).items():  # routers and blocks of experts flatten tokens by the stream's width
            if type(value) is int and value in widths and vars(module).get(name) != value:
                setattr(module, name, value)
    return kept


def _routes(block: nn.Module) -> bool:
    return any("expert" in name or name in ("gate", "router") for name, _ in block.named_children())


def _size(module: nn.Module, param: Tensor, whole: tuple[int, ...], widths: list[int]) -> tuple[int, ...]:
    """Shape of a rank's part of a weight that is ``whole`` in the model, by the widths of its module's inputs."""
    if isinstance(module, nn.Linear | Conv1D) and widths:
        return _matrix(module, param, whole, widths[0])
    if isinstance(module, nn.Embedding):
        return param.shape[0], whole[1]
    if param.dim() == 3 and param.shape[0] == whole[0]:  # routed experts
        return whole
    return tuple(full if full in widths else cut for full, cut in zip(whole, param.shape, strict=True))


def _matrix(module: nn.Linear | Conv1D, param: Tensor, whole: tuple[int, ...], width: int) -> tuple[int, ...]:
    reads, writes = (1, 0) if isinstance(module, nn.Linear) else (0, 1)
    if param.dim() == 1:  # a bias is settled after its matrix
        return (module.weight.shape[writes],)
    row = width == param.shape[reads] != whole[reads]
    size = list(param.shape)
    size[writes if row else reads] = whole[writes if row else reads]
    return tuple(size)
