"""One tensor-parallel rank of a tower: its matrices in pairs, the first cut over outputs, the second over inputs.

A pair is what reads one tensor (queries, keys and values; gate and up; one matrix alone) and the next matrix of the
same module. Matrices that stand alone, or in modules of their own (Gemma-4's), are whole on every rank, as vLLM 0.33.0
has them (``models/gemma4_mm.py`` builds transformers' own tower).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tensorcast.errors import InputError
from tensorcast.modeling.vision.tower import Tower

HEADS = ("num_heads", "num_attention_heads", "num_key_value_heads", "n_heads")


class Pair(NamedTuple):
    """Paths of the matrices of one pair, and of the module that holds them."""

    module: str
    columns: tuple[str, ...]
    row: str


def pairs_of(read: Sequence[tuple[str, int]], apart: Callable[[str, str], bool]) -> list[Pair]:
    """Pairs among matrices in the order in which they run: of each its path and what it reads (its identity).

    ``apart``: whether something between two needs all that the first gives.
    """
    found, done = list[Pair](), set[str]()
    for i, (path, source) in enumerate(read):
        module = path.rpartition(".")[0]
        if path in done:
            continue
        within = [(other, what) for other, what in read[i:] if other.rpartition(".")[0] == module]
        columns = [other for other, what in within if what == source]
        row = next((other for other, what in within if what != source), None)
        if row is None or row in done or apart(columns[0], row):
            continue
        found.append(Pair(module, tuple(columns), row))
        done |= {*columns, row}
    return found


def cut_tower(tower: Tower, tp: int, pairs: Sequence[Pair]) -> None:
    """Make a tower that of one of ``tp`` ranks. ``pairs``: of the layer of each kind; all layers have them.

    Raises :class:`InputError` where heads or widths do not divide.
    """
    leaves = {(_leaf(pair.module), tuple(map(_last, pair.columns)), _last(pair.row)) for pair in pairs}
    for path, module in tower.named_modules():
        for place, columns, row in leaves:
            if _leaf(path) != place or not all(isinstance(getattr(module, name, None), nn.Linear)
                                               for name in (*columns, row)):
                continue
            second: nn.Linear = getattr(module, row)
            inner = second.in_features
            firsts: list[nn.Linear] = [getattr(module, name) for name in columns]
            if any(first.out_features % inner for first in firsts):
                continue  # what lies between makes another width of it
            heads = {name: value for name in HEADS if isinstance(value := getattr(module, name, None), int)}
            for name, value in (*heads.items(), ("width", inner)):
                if value % tp:
                    raise InputError(
                        f"tp={tp}: {path}: {name}={value} does not divide by it; "
                        "use --encoder-tp-mode data, each rank with images of its own"
                    )
            if heads and getattr(module, "embed_dim", None) == inner:
                heads["embed_dim"] = inner  # which some reshape to
            for name, value in heads.items():
                setattr(module, name, value // tp)
            for first in firsts:
                first.out_features //= tp
                _resize(first.weight, (first.out_features, first.in_features))
                if first.bias is not None:
                    _resize(first.bias, (first.out_features,))
            second.in_features //= tp
            _resize(second.weight, (second.out_features, second.in_features))


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _leaf(path: str) -> str:
    """A path without the number of its layer."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _resize(param: Tensor, size: tuple[int, ...]) -> None:
    param.data = torch.empty(size, dtype=param.dtype, device=param.device)
