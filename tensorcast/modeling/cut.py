"""One tensor-parallel rank of a model whose class works one width out from another (heads from the hidden size).

Such a class cannot be built narrower by its heads alone. A model with *every* width divided can: its attention and its
mixers are those of a rank, with all that they work out. What it lacks is the residual stream, which every rank has
whole. So each weight gets its whole width back where it meets that stream, as a trial run of the model shows: a matrix
that reads the whole stream is column-parallel, one that reads a cut width is row-parallel and writes the whole stream.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from tensorcast.errors import InputError
from tensorcast.modeling.config import field, narrow, nested

STREAM = ("hidden_size", "d_model", "n_embd", "embed_dim", "word_embed_proj_dim", "block_dim", "conv_dim")
"""Fields that hold the width of the residual stream."""


def mend(model: nn.Module, config: PreTrainedConfig, tp: int, whole: Mapping[str, tuple[int, ...]]) -> None:
    """Put right on one of ``tp`` ranks what a narrower ``config`` alone gets wrong in ``model``; on meta.

    ``whole``: shapes of the weights of one layer of every kind in the whole model, by name.
    """
    _copy_once(model, field(config, "num_key_value_heads", default=0), tp)
    _sum_where_both_are_cut(model, whole)


def _copy_once(model: nn.Module, heads: int, tp: int) -> None:
    """Leave one KV head on a rank where its class, which has several times the config's ``heads`` in some layers, has
    several there (MiMo-V2-Flash: twice as many in windowed layers, from 4 heads, so 2 from the copied one)."""
    if not isinstance(heads, int) or not 0 < heads < tp:  # 0: a class with as many as queries has
        return
    for module in model.modules():
        keys, values, width = (getattr(module, name, None) for name in ("k_proj", "v_proj", "head_dim"))
        if not isinstance(keys, nn.Linear) or not isinstance(values, nn.Linear) or not isinstance(width, int):
            continue
        own, extra = keys.out_features // width, keys.out_features % width
        if own < 2 or extra or getattr(module, "num_key_value_groups", None) is None:
            continue  # one already, latent attention, or no heads that queries share
        held = max(own * heads // tp, 1)
        for part in (keys, values):
            part.out_features = part.out_features // own * held
            for param in part.parameters():
                _resize(param, (part.out_features, *param.shape[1:]))


def _sum_where_both_are_cut(model: nn.Module, whole: Mapping[str, tuple[int, ...]]) -> None:
    """Let a matrix whose inputs and outputs are both cut (Doge: of all heads' values, a number a head) give partial
    sums of all its outputs, of which the rank goes on with its own."""
    names: dict[str, set[tuple[int, ...]]] = {}
    for name, size in whole.items():
        if len(size) == 2:
            names.setdefault(_in_layer(name), set()).add(size)
    for path, module in model.named_modules():
        sizes = names.get(_in_layer(f"{path}.weight"), set()) if isinstance(module, nn.Linear) else set()
        # of kinds that differ (dots3-note's latents), one in which it is as wide is its own
        if len(sizes) != 1 or any(a >= b for size in sizes for a, b in zip(module.weight.shape, size, strict=True)):
            continue
        (size,), own = sizes, module.out_features
        for param in module.parameters():
            _resize(param, (size[0], *param.shape[1:]))
        module.register_forward_hook(lambda _module, _args, out, own=own: out[..., :own])


def _in_layer(name: str) -> str:
    """A name without the number of its layer."""
    return re.sub(r"\.\d+\.", ".", name, count=1)


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
        path, widths = paths[module], [t.shape[-1] for t in inputs]
        like = whole.get_submodule(path)
        # the only matrix of its module, from the stream into the stream: what follows reads all of it
        stays = path in alone and isinstance(like, nn.Linear) and {like.in_features, like.out_features} == {*widths[:1]}
        kept.update(_settle(module, like, path, widths, stays=stays))

    paths = {module: path for path, module in model.named_modules()}
    alone = {paths[found[0]] for module in paths if len(found := _matrices(module)) == 1}
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


def _matrices(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if isinstance(child, nn.Linear)]


def _leaf(path: str, parameter: str) -> str:
    return f"{path.rpartition('.')[2]}.{parameter}"


def _resize(param: Tensor, size: tuple[int, ...]) -> None:
    if size != tuple(param.shape):
        param.data = torch.empty(size, dtype=param.dtype, device=param.device)


def _settle(
    module: nn.Module, whole: nn.Module, path: str, widths: list[int], *, stays: bool
) -> dict[str, tuple[bool, ...]]:
    """Give a module the widths of ``whole``, its like in the whole model, that its inputs have; dims that are whole.

    ``stays``: all of it.
    """
    kept = {}
    for name, param in module.named_parameters(recurse=False):
        full = tuple(whole.get_parameter(name).shape)
        _resize(param, full if stays else _size(module, param, full, widths))
        kept[_leaf(path, name)] = tuple(a == b for a, b in zip(full, param.shape, strict=True))
    if not widths:  # of token numbers and positions alone: what is added to the stream (XGLM, CTRL)
        for tables, own in ((vars(whole), vars(module)), (whole._buffers, module._buffers)):
            own.update({name: value for name, value in tables.items() if isinstance(value, Tensor)})
        if not kept and not list(module.children()):
            vars(module).update({name: value for name, value in vars(whole).items() if type(value) is int})
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
