"""Checkpoints' expert tensors into a rank's stacked weights, expert by expert and projection by projection.

The words are vLLM's FusedMoE's: ``w1`` is the gate projection, ``w3`` up, ``w2`` down; a mapping says for every tensor
of a checkpoint which parameter, which physical expert and which shard it is; each rank takes its own slice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tensorcast.errors import InputError
from tensorcast.modeling.moe.experts import FusedMoEBase
from tensorcast.modeling.moe.fused import FusedMoETensorCast
from tensorcast.modeling.moe.placement import Placement
from tensorcast.ops.quantized import format_of, parts_of

Shard = Literal["w1", "w2", "w3"]

PARTS = {
    "weight": "values", "weight_packed": "values", "qweight": "values", "weight_scale": "scale",
    "weight_scale_inv": "scale", "scales": "scale", "weight_scale_2": "outer_scale",
    "weight_zero_point": "zero", "qzeros": "zero", "bias": "bias",
}  # fmt: skip
"""What the last word of a tensor's name is, in the checkpoints of compressed-tensors, ModelOpt and FP8 releases."""


@dataclass(frozen=True)
class Expected:
    """A projection of one physical expert: the ``parameter`` it goes to, and the start of its ``name`` in a file."""

    parameter: str
    name: str
    expert: int
    shard: Shard


def make_expert_params_mapping(
    placement: Placement, *, gate: str = "gate_proj", down: str = "down_proj", up: str = "up_proj",
    experts: str = "experts",
) -> list[Expected]:
    """Every projection of every physical expert; copies of an expert have its tensors' names.

    ``gate`` may be empty: experts without one have ``w1`` alone, named ``up``.
    """
    shards: dict[Shard, str] = {"w1": gate, "w2": down, "w3": up} if gate else {"w1": up, "w2": down}
    first = "gate_up_proj" if gate else "up_proj"
    return [
        Expected(f"{experts}.{'down_proj' if shard == 'w2' else first}", f"{experts}.{logical}.{name}.", expert, shard)
        for expert, logical in enumerate(placement.physical_to_logical)
        for shard, name in shards.items()
    ]


def expert_map(placement: Placement, rank: int) -> Tensor:
    """Local slot of every physical expert, ``[num_physical]``; -1 for those of other ranks."""
    found = torch.full((placement.num_physical,), -1, dtype=torch.int64)
    slots = placement.slots(rank)
    found[slots.start : slots.stop] = torch.arange(len(slots))
    return found


class ExpertLoader:
    """Loads the experts of one rank's stage, in place, and knows what is still missing."""

    def __init__(self, stage: FusedMoETensorCast) -> None:
        if not isinstance(stage.local, FusedMoEBase):
            raise InputError(f"{type(stage.local).__name__}: only stacked experts are loaded by shards")
        self.stage, self.held = stage, stage.local
        self.map = expert_map(stage.placement, stage.groups.ep.rank)
        scheme = self.held.scheme
        self.kind = None if scheme == "bf16" else format_of(scheme)
        if self.kind is not None and self.kind.block[0] > 1 and self.held.has_gate and not self.held.is_concatenated:
            raise InputError(f"experts held as {scheme}: gate and up interleaved, with one scale for a block of both")
        self.parts = ("values",) if scheme == "bf16" else parts_of(scheme)
        shards: tuple[Shard, ...] = ("w1", "w2", "w3") if self.held.has_gate else ("w1", "w2")
        parts = (*self.parts, "bias") if self.held.has_bias else self.parts
        self._missing = {(s, x, part) for s in range(stage.count) for x in shards for part in parts}

    def missing(self) -> list[str]:
        """What no tensor was loaded for, in words."""
        return [f"{part} of {shard}, slot {slot}" for slot, shard, part in sorted(self._missing)]

    def load(
        self, weight: Tensor, *, shard: Shard, expert: int, part: str = "values", transposed: bool = False
    ) -> bool:
        """One whole tensor of physical ``expert`` into this rank's slice; False where another rank holds it.

        ``[N,K]`` as linear layers have it, ``[K,N]`` if ``transposed``. Scales: one number, ``[N]``, ``[N,1]``, groups
        ``[N,K/g]`` or blocks. 4-bit values in pairs, or eight to an int32 (compressed-tensors). Raises
        :class:`InputError` where the shapes do not fit.
        """
        if not 0 <= expert < len(self.map):
            raise InputError(f"expert {expert}: the placement has {len(self.map)} physical experts")
        known = (*self.parts, "bias") if self.held.has_bias else self.parts
        if part not in known or (shard == "w3" and not self.held.has_gate):
            raise InputError(f"{part} of {shard}: experts held as {self.held.scheme} have {', '.join(known)}")
        slot = int(self.map[expert])
        if slot < 0:
            return False
        target = self._target(slot, shard, part)
        given = weight.t() if transposed and weight.dim() == 2 else weight
        if given.dtype == torch.int32 and self.kind is not None and self.kind.packed:
            given = given.contiguous().view(torch.uint8)
        given = self._own(self._matrix(given, target, part), target, shard, part)
        if not self._fits(given.shape, target.shape, shard):
            raise InputError(
                f"expert {expert}, {shard}: {part} of shape {list(weight.shape)} does not fit {list(target.shape)}"
            )
        other = {"w1": "w3", "w3": "w1"}.get(shard) if part == "outer_scale" and self.held.has_gate else None
        told = other is not None and (slot, other, part) not in self._missing
        if told and not torch.equal(given.to(target), target):
            raise InputError(f"expert {expert}: w1 and w3 have different outer scales, and the kernel takes one")
        with torch.no_grad():
            target[tuple(slice(0, n) for n in given.shape)] = given.to(target.dtype)
        self._missing.discard((slot, shard, part))
        return True

    def _fits(self, given: torch.Size, target: torch.Size, shard: Shard) -> bool:
        """The same shape; fewer along the hidden size only where the kernels need it wider than the model has it."""
        if self.stage.width == self.stage.hidden or len(given) != 2:
            return given == target
        hidden, inner = (0, 1) if shard == "w2" else (1, 0)
        return given[inner] == target[inner] and given[hidden] <= target[hidden]

    def _target(self, slot: int, shard: Shard, part: str) -> Tensor:
        """Where the tensor goes, as ``[N,K]`` (a view): half of the first projection, or all of the second."""
        held, name = self.held, "down_proj" if shard == "w2" else self.held.up_name
        suffix = {"values": "", "bias": "_bias"}.get(part, f"_{part}")
        whole: Tensor = getattr(held, name + suffix).data[slot]
        if part == "bias":
            whole = whole.unsqueeze(-1)
        elif held.is_transposed:
            whole = whole.t()
        if shard == "w2" or not held.has_gate or part == "outer_scale":
            return whole
        if held.is_concatenated:
            return whole.chunk(2)[0 if shard == "w1" else 1]
        return whole[(0 if shard == "w1" else 1) :: 2]

    def _matrix(self, given: Tensor, target: Tensor, part: str) -> Tensor:
        """Scales and biases as matrices: one number for every row of the target, or one per row."""
        if given.numel() == 1 and part in ("scale", "outer_scale"):
            whole = target.shape[0] * (self.stage.groups.etp.size if part == "scale" else 1)
            return given.reshape(1, 1).expand(max(whole, 1), 1)
        return given.unsqueeze(-1) if given.dim() == 1 else given

    def _own(self, given: Tensor, target: Tensor, shard: Shard, part: str) -> Tensor:
        """This rank's slice: rows of ``w1`` and ``w3``, columns of ``w2``; what does not lie along the cut is whole."""
        etp = self.stage.groups.etp
        if etp.size == 1 or part == "outer_scale":
            return given
        if shard == "w2" and part == "bias":  # added once, by the first rank
            return given if etp.rank == 0 else torch.zeros_like(given)
        dim = 1 if shard == "w2" else 0
        if shard == "w2" and given.shape[1] == 1 and part == "scale":
            return given[: target.shape[0]]
        size, left = divmod(given.shape[dim], etp.size)
        if left:
            raise InputError(f"{part} of {shard}: {given.shape[dim]} do not divide over etp = {etp.size}")
        return given.narrow(dim, etp.rank * size, size)


def load_experts(loader: ExpertLoader, tensors: Iterable[tuple[str, Tensor]], mapping: list[Expected]) -> list[str]:
    """A checkpoint's tensors of one layer's experts by name; returns the names that are no expert's.

    Raises :class:`InputError` for a tensor whose last word is not in :data:`PARTS`.
    """
    strange = []
    starts: dict[str, list[Expected]] = {}
    for one in mapping:
        starts.setdefault(one.name, []).append(one)
    for name, tensor in tensors:
        found = next((known for start, known in starts.items() if start in name), None)
        if found is None:
            strange.append(name)
            continue
        word = name.rpartition(".")[2]
        if word not in PARTS:
            raise InputError(f"{name}: {word!r} is none of {', '.join(PARTS)}")
        for one in found:
            loader.load(tensor, shard=one.shard, expert=one.expert, part=PARTS[word])
    return strange
