"""Recorded routing: how often each expert of each layer was chosen, in prefill and in decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tensorcast.cost.work import Array
from tensorcast.errors import InputError

PHASES = ("prefill", "decode")

EITHER = ""
"""Key of counts whose phase nobody noted: they stand for both."""


@dataclass(frozen=True, eq=False)
class LayerCounts:
    """Choices of each expert in each MoE layer, ``[layers, experts]``.

    ``layers``: the layers' numbers in the model, empty where one row stands for every layer. ``name`` is for messages.
    """

    name: str
    counts: Array
    layers: tuple[int, ...] = ()

    @property
    def num_experts(self) -> int:
        return int(self.counts.shape[1])

    @property
    def shares(self) -> Array:
        """Part of a layer's choices that falls on each expert, ``[layers, experts]``: rows add up to 1."""
        return self.counts / self.counts.sum(axis=1, keepdims=True)

    def for_model(self, num_experts: int, layers: Sequence[int]) -> LayerCounts:
        """The counts of a model's MoE ``layers``; raises :class:`InputError` where they are of another model."""
        if self.num_experts != num_experts:
            raise InputError(
                f"{self.name}: {self.num_experts} counts a layer, but the model has {num_experts} experts a "
                "layer"
            )
        if not self.layers or not layers:
            return self
        if len(self.layers) != len(layers):
            raise InputError(
                f"{self.name}: counts of {len(self.layers)} layers, but the model has {len(layers)} MoE "
                "layers"
            )
        # engines number layers from the model's first, or MoE layers from 0; order is the same
        if self.layers != tuple(layers) and self.layers != tuple(range(self.layers[0], self.layers[0] + len(layers))):
            odd = next(a for a, b in zip(self.layers, layers, strict=True) if a != b)
            raise InputError(f"{self.name}: layer {odd} has counts, but is no MoE layer of the model")
        return self


@dataclass(frozen=True, eq=False)
class Recording:
    """One or more recordings of one model: counts by phase, or by :data:`EITHER`. ``source``: where they are from."""

    name: str
    phases: Mapping[str, LayerCounts]
    source: str = ""

    def of(self, phase: str) -> LayerCounts:
        """The counts of ``phase``: its own, else those of no noted phase, else the other phase's."""
        for one in (phase, EITHER, *PHASES):
            if one in self.phases:
                return self.phases[one]
        raise InputError(f"recording {self.name}: no counts")

    def stands_in(self, phase: str) -> bool:
        """Whether ``phase`` was not recorded and the other one stands in for it."""
        return phase not in self.phases and EITHER not in self.phases


def checked_counts(
    name: str, counts: object, layers: Sequence[int] | None = None, *, dense: bool = False
) -> LayerCounts:
    """Counts ``[layers, experts]`` as read; ``layers``: their numbers (0, 1, ... unless given).

    ``dense``: rows of zeros are layers without experts, and are left out. Raises :class:`InputError`.
    """
    try:
        found = np.asarray(counts, dtype=float)
    except (TypeError, ValueError):
        raise InputError(f"{name}: counts must be numbers, as many in every layer") from None
    if found.ndim != 2 or not found.size:
        raise InputError(f"{name}: counts must be [layers, experts], got shape {list(found.shape)}")
    if not np.isfinite(found).all() or (found < 0).any():
        raise InputError(f"{name}: counts must be numbers of at least 0")
    numbers = tuple(range(len(found))) if layers is None else tuple(layers)
    empty = found.sum(axis=1) == 0
    if empty.all():
        raise InputError(f"{name}: counts must be numbers of at least 0, not all 0")
    if empty.any() and not dense:
        raise InputError(f"{name}: layer {numbers[int(empty.argmax())]} has no counts: all its experts have 0")
    kept = tuple(number for number, none in zip(numbers, empty, strict=True) if not none)
    if dense and kept != tuple(number for number in numbers if kept[0] <= number <= kept[-1]):
        gap = next(n for n in numbers if kept[0] < n < kept[-1] and n not in kept)
        # dense layers come first; a hole further in is a layer that was not recorded, unless holes alternate
        if len({b - a for a, b in zip(kept, kept[1:], strict=False)}) > 1:
            raise InputError(f"{name}: layer {gap} has no counts, but layers before and after it have")
    return LayerCounts(name, found[~empty], kept)


def merged(name: str, parts: Sequence[LayerCounts]) -> LayerCounts:
    """Recordings of one model and phase, added up. Raises :class:`InputError` where layers or experts differ."""
    first = parts[0]
    for other in parts[1:]:
        if other.counts.shape != first.counts.shape or other.layers != first.layers:
            raise InputError(
                f"{other.name}: {len(other.counts)} layers of {other.num_experts} experts cannot be added to "
                f"{len(first.counts)} of {first.num_experts} in {first.name}"
            )
    return first if len(parts) == 1 else LayerCounts(name, np.sum([one.counts for one in parts], axis=0), first.layers)


def drift(before: LayerCounts, after: LayerCounts) -> Array:
    """How far popularity moved, per layer ``[layers]``: the part of all choices that fall on other experts, 0 to 1."""
    if before.counts.shape != after.counts.shape:
        raise InputError(
            f"{after.name}: {list(after.counts.shape)} counts cannot be compared with {list(before.counts.shape)} in "
            f"{before.name}"
        )
    return np.asarray(np.abs(before.shares - after.shares).sum(axis=1) / 2.0)
