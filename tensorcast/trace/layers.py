"""One layer per structural kind: the others would record the same ops again.

A kind is a signature: submodule names and classes, their scalar attributes, parameter shapes, the layer type that the
config gives the layer, and the shapes of the tensors it is called with.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

from tensorcast.modeling.attention import layer_type
from tensorcast.modeling.config import field as said
from tensorcast.modeling.described.config import DescribedConfig
from tensorcast.trace.attention import Selection

POSITIONAL = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "moe_layer_idx", "training"})
"""Attributes that tell where a layer is, not what it does."""


@dataclass
class Kinds:
    """Which kind each run of a decoder layer is of, and the layer that stands for each kind.

    A layer that several passes run is of one kind per set of shapes that it is run with. ``running``: the kind that is
    being recorded, or -1. ``signatures``: each layer's own, asked for once however many steps are recorded.
    """

    paths: list[str] = field(default_factory=list)
    of_layer: list[int] = field(default_factory=list)
    representatives: list[str] = field(default_factory=list)
    running: int = -1
    signatures: list[tuple[Any, ...]] = field(default_factory=list)

    def clear(self) -> None:
        """Forget what was found."""
        for found in (self.paths, self.of_layer, self.representatives):
            found.clear()

    def kind_of(self, module: str) -> int:
        """The first kind whose representative holds the module, or -1."""
        for kind, path in enumerate(self.representatives):
            if module == path or module.startswith(path + "."):
                return kind
        return -1

    def layers(self, kind: int) -> list[int]:
        return [i for i, k in enumerate(self.of_layer) if k == kind]

    def run_again(self) -> set[str]:
        """Paths of layers whose kind has one that several passes run: its runs do not tell how many layers it has."""
        runs, layers = Counter(self.paths), list(zip(self.paths, self.of_layer, strict=True))
        looped = {kind for path, kind in layers if runs[path] > 1}
        return {path for path, kind in layers if kind in looped}


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers: the longest list of the classes that the model says not to split."""
    names: set[str] = set()
    modules = list(model.named_modules())
    for _, module in modules:
        names |= set(getattr(module, "_no_split_modules", None) or ())
    best_path, best = "", nn.ModuleList()
    for path, module in modules:
        if not isinstance(module, nn.ModuleList) or any(word in path for word in ("vision", "visual", "audio")):
            continue
        is_layers = {type(layer).__name__ for layer in module} & names or path.rpartition(".")[2] in (
            "layers",
            "h",
            "blocks",
        )
        if is_layers and len(module) > len(best):
            best_path, best = path, module
    return best_path, best


def signature(layer: nn.Module, extra: tuple[Any, ...] = ()) -> tuple[Any, ...]:
    """Equal for two layers exactly when they record the same ops on the same inputs."""
    rows: list[Any] = [extra]
    for name, module in layer.named_modules():
        scalars = tuple(
            sorted(
                (key, repr(value))
                for key, value in vars(module).items()
                if isinstance(value, (int, float, str, bool, type(None))) and key not in POSITIONAL and key[0] != "_"
            )
        )
        shapes = tuple((k, tuple(p.shape), str(p.dtype)) for k, p in module._parameters.items() if p is not None)
        rows.append((name, type(module).__name__, scalars, shapes))
    return tuple(rows)


@contextlib.contextmanager
def one_per_kind(path: str, layers: nn.ModuleList, config: Any, kinds: Kinds) -> Iterator[None]:
    """Inside, only the first of the decoder ``layers`` at ``path`` of each kind runs; the others hand on its output.
    Fills ``kinds``."""
    outputs: dict[Any, Any] = {}
    index: dict[Any, int] = {}
    if not kinds.signatures:
        kinds.signatures += [signature(layer, (layer_type(config, i),)) for i, layer in enumerate(layers)]
    fresh, run_of = not kinds.paths, itertools.count()

    def stand_in(i: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        own = kinds.signatures[i]

        def run(*args: Any, **kwargs: Any) -> Any:
            leaves = tree_leaves((args, {k: v for k, v in kwargs.items() if isinstance(v, (torch.Tensor, tuple))}))
            key = (own, tuple(tuple(t.shape) for t in leaves if isinstance(t, torch.Tensor)))
            if fresh:
                if key not in index:
                    index[key] = len(kinds.representatives)
                    kinds.representatives.append(f"{path}.{i}")
                kinds.paths.append(f"{path}.{i}")
                kinds.of_layer.append(index[key])
            place = next(run_of)
            if key not in outputs:
                kinds.running = kinds.of_layer[place] if place < len(kinds.of_layer) else -1
                try:
                    outputs[key] = forward(*args, **kwargs)
                finally:
                    kinds.running = -1
            return outputs[key]

        return run

    for i, layer in enumerate(layers):
        layer.forward = stand_in(i, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def compress_ratios(config: PreTrainedConfig) -> tuple[int, ...]:
    """By layer, where its type has a compressed cache (DeepSeek-V4)."""
    rates, kinds = said(config, "compress_rates", default={}), said(config, "layer_types", default=[])
    return tuple(int(rates.get(kind, 0)) for kind in kinds) if rates else ()


def selections(config: PreTrainedConfig, of_layer: Sequence[int]) -> dict[int, Selection]:
    """By layer kind, where attention reads compressed entries (DeepSeek-V4), blocks (MiniMax-M3) or pools of
    tokens (GLM-5.3-Flash, Qwen4) that are chosen; ``of_layer``: the kind of each layer."""
    if isinstance(config, DescribedConfig):
        return {
            kind: Selection(
                takes["ratio"], takes["index_topk"], shared=True,
                within=takes["candidate_blocks"] * takes["candidate_block_size"] * (takes["candidates"] == "within"),
            )
            for kind, (name, takes) in zip(of_layer, config.attention, strict=True) if name == "csa2" and takes["ratio"]
        }
    ratios, types = compress_ratios(config), said(config, "layer_types", default=[])
    blocks, pool, own = (
        int(said(config, name, default=0) or 0)
        for name in ("index_topk_blocks", "index_kpool", "indexer_compress_ratio")
    )
    found = {}
    for layer, kind in enumerate(of_layer):
        if ratios and ratios[layer]:
            picks = "sparse" in types[layer]
            found[kind] = Selection(ratios[layer], int(said(config, "index_topk", default=0)) if picks else 0)
        elif blocks and "sparse" in str(types[layer] if layer < len(types) else ""):
            block = int(said(config, "index_block_size"))
            found[kind] = Selection(1, blocks * block, pooled=block)
        elif pool + own > 1 and layer < len(types) and types[layer] == "indexed_attention":
            picked = int(said(config, "indexer_budget" if own else "index_topk"))
            found[kind] = Selection(pool + own, picked // (pool + own), keys_alone=True, plain=bool(own))
    return found
