"""From a profile to the op table of its tower: ``B`` images (or tiles of one) of ``S`` patches each.

Towers are recorded for one image at three sizes. Images of one call are packed, so ``B`` of them are as many rows of
every matrix, each attending to its own patches. A class that takes images of one size alone is recorded at it, for
three numbers of images.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from tensorcast.errors import InputError
from tensorcast.modeling.vision.cut import Pair, cut_tower, pairs_of
from tensorcast.modeling.vision.tower import (
    Tower,
    build_tower,
    inputs_of,
    merged,
    multimodal_config,
    patch_side,
)
from tensorcast.profiles.facts import ModelFacts
from tensorcast.profiles.model import ModelProfile
from tensorcast.trace.closed_form import DECODE, NoClosedForm, Probe, ProgramVaries
from tensorcast.trace.dims import Dim, product
from tensorcast.trace.layers import Kinds, one_per_kind
from tensorcast.trace.record import Call, Seen
from tensorcast.trace.sharding import mark_sharding
from tensorcast.trace.table import Op, OpTable, Param, Tensor, layer_ranges
from tensorcast.trace.tracer import as_mm, closed_ops
from tensorcast.trace.vision.record import RealNumbers, TowerRecorder

SIDES = (211, 223, 307)
"""Squares of patches along one image; primes, far below what tables of positions reach."""
LEAST = 4
"""Patches on the other side where the class merges none: what two strides of two take."""
MATMULS = ("mm", "addmm")


def trace_tower(profile: ModelProfile, tp: int = 1, whole: OpTable | None = None) -> OpTable:
    """Op table of the vision tower of ``profile`` on one of ``tp`` ranks: ``B`` images of ``S`` patches.

    Raises :class:`InputError`, one line, where it takes no images or its class cannot be followed.
    """
    transformers_logging.set_verbosity_error()
    config = multimodal_config(profile)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            whole = whole or _traced(profile.name, build_tower(config), 1)
            if tp == 1:
                return whole
            narrow = build_tower(config)
            cut_tower(narrow, tp, _pairs(whole))
            shard = _traced(profile.name, narrow, tp)
        except (InputError, NoClosedForm, ProgramVaries) as reason:
            raise InputError(f"model {profile.name}: its vision tower: {reason}") from None
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as reason:
            line = next(iter(str(reason).strip().splitlines()), type(reason).__name__)[:160]
            raise InputError(f"model {profile.name}: transformers' class of its vision tower fails: {line}") from reason
    params = tuple(
        replace(cut, full_numel=full.numel) for full, cut in zip(whole.params, shard.params, strict=True)
    )
    return replace(mark_sharding(whole, shard), params=params)


def _traced(name: str, tower: Tower, tp: int) -> OpTable:
    kinds, ops, block = _closed(tower)
    if any(op.name in ("topk", "_grouped_mm", "grouped_mm") for op in ops):
        raise InputError("has experts of its own, which are not followed")
    vision = tower.vision
    heads = next((op.inputs[0].dims[1].coef for op in ops if op.name == "attention"), 0)
    facts = ModelFacts(
        hidden_size=int(getattr(vision, "hidden_size", 0) or 0), layers=len(kinds.of_layer),
        heads=int(heads) * tp, kv_heads=int(heads) * tp, block=block,
    )
    names = tuple(layer_ranges(kinds.layers(kind)) for kind in range(len(kinds.representatives)))
    return OpTable(
        model=name, phase="encode", tp=tp, ops=tuple(ops), layer_kinds=tuple(kinds.of_layer), kind_names=names,
        params=_params(tower, kinds, ops), facts=facts,
    )


def _closed(tower: Tower) -> tuple[Kinds, list[Op], int]:
    """Kinds of layers, rows in closed form, and of how many patches images are multiples (0: of one size alone)."""
    vision = tower.vision
    side = merged(tower) if merged(tower) > 1 else LEAST
    if isinstance(window := getattr(vision, "window_size", None), int) and window > patch_side(vision):
        side = window // patch_side(vision)  # pixels: windows are whole
    try:
        kinds = Kinds()
        recorded = [_record(tower, 1, side, side * n, kinds) for n in SIDES]
        probes = tuple(Probe(1, n, 5003, side * side) for n in SIDES)
        return kinds, [_of_images(op) for op in _as_matmuls(closed_ops(tower, kinds, recorded, probes))], side * side
    except (RuntimeError, ValueError, KeyError):
        size: Any = getattr(vision, "image_size", None)
        if size is None:
            raise
    kinds, (height, width) = Kinds(), (size, size) if isinstance(size, int) else (size[0], size[1])
    patch = patch_side(vision)
    recorded = [_record(tower, p.B, height // patch, width // patch, kinds) for p in DECODE]
    return kinds, _as_matmuls(closed_ops(tower, kinds, recorded, DECODE)), 0


def _record(tower: Tower, images: int, height: int, width: int, kinds: Kinds) -> list[Call]:
    recorder = TowerRecorder(tower, kinds)
    path, layers = _layers(tower)
    with (
        torch.no_grad(), RealNumbers(), one_per_kind(path, layers, tower.vision, kinds), _no_words(), recorder
    ):
        tower(**inputs_of(tower, images, height, width))
    return _windows_as_one(recorder.calls)


def _windows_as_one(calls: list[Call]) -> list[Call]:
    """Attention that a class runs window by window, all windows alike, as one call with as many sequences."""
    found, joined = list[Call](), dict[int, Seen]()
    for call in calls:
        last = found[-1] if found else None
        if last is not None and call.name == last.name == "attention" and call.module == last.module:
            first = joined.setdefault(last.outputs[0].storage, last.outputs[0])
            if call.inputs[0].shape[1:] != last.inputs[0].shape[1:]:
                raise ProgramVaries(f"{call.module}: windows of several sizes")
            last.inputs = [_more(one, call.inputs[0].shape[0]) for one in last.inputs]
            last.outputs = [_more(one, call.outputs[0].shape[0]) for one in last.outputs]
            joined[call.outputs[0].storage] = first
            continue
        parts = {id(joined.get(one.storage)) for one in call.inputs}
        if call.name == "cat" and len(parts) == 1 and len(call.inputs) > 2:
            call.inputs = [replace(call.inputs[0], shape=call.outputs[0].shape)]
        found.append(call)
    return found


def _more(seen: Seen, windows: int) -> Seen:
    return replace(seen, shape=(seen.shape[0] + windows, *seen.shape[1:]))


@contextlib.contextmanager
def _no_words() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _layers(tower: Tower) -> tuple[str, nn.ModuleList]:
    """Path and list of the tower's layers: the longest list of modules of one class."""
    lists = [(path, module) for path, module in tower.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise InputError("has no list of layers")
    return max(lists, key=lambda one: len(one[1]))


def _of_images(op: Op) -> Op:
    """A row of one image as one of ``B`` of them."""
    return op.but(inputs=tuple(map(_batched, op.inputs)), outputs=tuple(map(_batched, op.outputs)))


def _batched(t: Tensor) -> Tensor:
    """Of as many images: a batch of one becomes ``B``, else there are ``B`` times as many rows of patches."""
    grows = next((i for i, dim in enumerate(t.dims) if dim.S), None)
    if grows is None or t.weight:
        return t
    dims = list(t.dims)
    if dims[0].is_constant and dims[0].coef == 1 and not dims[0].plus and len(dims) > 2:
        dims[0] = Dim(B=1)
    else:
        dims[grows] = dims[grows]._replace(B=1)
    return replace(t, dims=tuple(dims))


def _as_matmuls(ops: list[Op]) -> list[Op]:
    """Convolutions as the matrix products that they are: patches by a kernel as large, or windows of a map."""
    return [_as_matmul(op) if op.name == "convolution" else as_mm(op) for op in ops]


def _as_matmul(op: Op) -> Op:
    x, weight, *_ = op.inputs
    out = op.outputs[0]
    channels, *kernel = weight.dims
    width = _product(tuple(kernel))
    rows = _product((out.dims[0], *out.dims[2:]))  # [N, channels, ...] written: one row for each place
    kept = tuple(t for t in op.inputs[1:] if t.weight and len(t.dims) < len(weight.dims))
    flat = replace(weight, dims=(width, channels), expanded=())
    return op.but(
        name="mm", inputs=(replace(x, dims=(rows, width), expanded=()), flat, *kept),
        outputs=(replace(out, dims=(rows, channels), expanded=()),), attrs={},
    )


NORMS = ("native_layer_norm", "mean", "rsqrt")


def _product(dims: tuple[Dim, ...]) -> Dim:
    found, *_ = product(dims)
    return found._replace(coef=int(found.coef)) if found.coef == int(found.coef) else found


def _pairs(table: OpTable) -> list[Pair]:
    """Pairs of matrices (:mod:`tensorcast.modeling.vision.cut`): no norm over all that the first gives is between."""
    weights = {p.name: p for p in table.params if p.role == "linear"}
    read, at = list[tuple[str, int]](), dict[str, int]()
    for i, op in enumerate(table.ops):
        if op.name in MATMULS and (name := next((w for w in op.weights if w in weights), "")):
            source = next(t for t in op.inputs if not t.weight)
            read.append((name.rpartition(".")[0], source.storage))
            at[read[-1][0]] = i

    def normed(first: str, second: str) -> bool:
        width = weights[f"{second}.weight"].shape[1]
        between = table.ops[at[first] : at[second]]
        return any(op.name in NORMS and op.inputs[0].dims[-1].coef == width for op in between)

    return pairs_of(read, normed)


def _params(tower: Tower, kinds: Kinds, ops: list[Op]) -> tuple[Param, ...]:
    """Every parameter of one layer per kind, and of what lies outside the layers."""
    multiplied = {w for op in ops if op.name in MATMULS for w in op.weights}
    others = tuple(path + "." for path in kinds.paths if path not in set(kinds.representatives))
    found = []
    for name, param in tower.named_parameters():
        if name.startswith(others):
            continue
        module = name.rpartition(".")[0]
        linear = isinstance(tower.get_submodule(module), nn.Linear) and name in multiplied and param.dim() == 2
        found.append(Param(
            name, module, kinds.kind_of(module), param.numel(), param.numel(), str(param.dtype).removeprefix("torch."),
            "linear" if linear else "other", tuple(param.shape),
        ))  # fmt: skip
    return tuple(found)
