"""One MoE block rewritten: read by its fields or kept around rewritten experts, and held against the stock block.

Each structure is proved once per process, on a small twin with random weights in fp32, with every backend.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensorcast.errors import InputError
from tensorcast.modeling.moe.backends import all_backends
from tensorcast.modeling.moe.groups import MoEGroups
from tensorcast.modeling.moe.layer import MoELayer, RoutedExperts
from tensorcast.modeling.moe.parallel import MoEOptions, ParallelMoELayer
from tensorcast.modeling.moe.placement import Placement
from tensorcast.modeling.moe.reading.fields import at, check_fields, find_fields, holds_experts, takes_routing
from tensorcast.modeling.moe.reading.probe import BOUND, ROWS, difference, probe_rows, structure, twins_of
from tensorcast.profiles.model import MoEFields


@dataclass(frozen=True)
class Proof:
    """How a block is rewritten so that it equals the stock one.

    ``fields``: read by them. ``kept``: name of its experts, around which its own code runs. ``returned``: how many
    values the block returns (0: one tensor alone). ``why``: what spoke against the fields, where it is kept.
    """

    fields: MoEFields
    kept: str = ""
    returned: int = 0
    why: str = ""


_proved: dict[Any, Proof] = {}


def rewrite(
    block: nn.Module,
    groups: MoEGroups = MoEGroups(),
    options: MoEOptions = MoEOptions(),
    placement: Placement | None = None,
    fields: MoEFields = MoEFields(),
    *,
    model: str = "",
    layer_index: int = 0,
    part: str = "",
) -> nn.Module:
    """What takes the block's place: same call, same output. Raises :class:`InputError`, one line, where none is equal.

    A block that is not read by its fields is returned itself, its experts replaced.
    """
    name = model or type(block).__name__
    proof = prove(block, fields, name)
    if not proof.kept:
        layer = MoELayer(block, proof.fields, model=name, layer_index=layer_index, part=part)
        parallel = ParallelMoELayer(layer, groups, options, placement)
        layer.release()
        return InPlace(parallel, proof.returned)
    wanted = [option for option in ("external_shared_experts", "enable_shared_expert_tp") if getattr(options, option)]
    if wanted:
        raise InputError(f"model {name}: {wanted[0]} needs a block that is read by its fields; {proof.why}")
    experts = RoutedExperts(at(block, proof.kept), proof.fields, model=name, part=part)
    parent, _, leaf = proof.kept.rpartition(".")
    called = CalledExperts(ParallelMoELayer(experts, groups, options, placement))
    experts.release()
    setattr(block.get_submodule(parent), leaf, called)
    return block


class InPlace(nn.Module):
    """The block's own calling convention: some return a tuple, of which nothing reads the router's logits."""

    def __init__(self, layer: ParallelMoELayer, returned: int) -> None:
        super().__init__()
        self.layer, self.returned = layer, returned

    def forward(self, hidden_states: Tensor, input_ids: Tensor | None = None, **_: Any) -> Any:
        out: Tensor = self.layer(hidden_states, input_ids)
        return (out, *[None] * (self.returned - 1)) if self.returned else out


class CalledExperts(nn.Module):
    """Experts in their place inside a block whose own code routes."""

    def __init__(self, layer: ParallelMoELayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[..., H]``, indices and weights ``[T,k]`` -> the same shape."""
        out: Tensor = self.layer(hidden_states, routed=(top_k_index, top_k_weights))
        return out


def prove(block: nn.Module, fields: MoEFields = MoEFields(), model: str = "") -> Proof:
    """How the block is rewritten, found once for every structure and fields. Raises :class:`InputError`."""
    name = model or type(block).__name__
    check_fields(block, fields, name)
    key = (structure(block), fields.model_dump_json(), name, all_backends())
    if key not in _proved:
        _proved[key] = _prove(block, fields, name)
    return _proved[key]


def _prove(block: nn.Module, fields: MoEFields, name: str) -> Proof:
    why = ""
    for twin in twins_of(block):
        proof, why = _proved_on(twin, fields, name)
        if proof is not None:
            return proof
    raise InputError(f"model {name}: its MoE block {type(block).__name__} cannot be rewritten: {why}")


def _proved_on(twin: nn.Module, fields: MoEFields, name: str) -> tuple[Proof | None, str]:
    """How a twin is rewritten, or the reason against it."""
    found, why = None, ""
    if not fields.keep_block:
        found, why = _by_fields(twin, fields, name)
        if found is not None and (found.returned < 2 or fields.keep_block is False):
            return found, ""
    if fields.keep_block is not False:
        experts = fields.experts or next((n for n, c in twin.named_children() if holds_experts(c, n)), "")
        error, reason = _kept_error(twin, experts, fields)
        if error < BOUND:
            return Proof(fields, experts, why=why or "it returns more than its output"), ""
        if found is not None:  # what else it returns is the router's logits, which nothing reads
            return found, ""
        why = f"{why}; {reason}" if why and reason != why else reason
    return None, why


def _candidates(fields: MoEFields) -> Iterator[MoEFields]:
    """As given; else with weights renormalised, which no attribute of some blocks says."""
    yield fields
    if fields.norm_topk_prob is None:
        yield fields.model_copy(update={"norm_topk_prob": ALWAYS})


ALWAYS = "__class__"
"""An attribute that every block has: its value stands for true."""


def _by_fields(twin: nn.Module, fields: MoEFields, name: str) -> tuple[Proof | None, str]:
    """The block read by its fields, or the reason against it."""
    if more := _other_arguments(twin):
        return None, f"its forward takes {', '.join(more)} as well"
    try:
        found = find_fields(twin, fields, name)
        rows, ids = probe_rows(_hidden(twin, found)), torch.arange(ROWS) % 8
        expected, returned = _stock(twin, rows, ids)
    except Exception as reason:  # somebody's code on a twin: whatever it raises speaks against this way
        return None, _line(reason)
    least, why = float("inf"), ""
    for candidate in _candidates(fields):
        try:
            with torch.no_grad():
                error = max(
                    difference(MoELayer(twin, candidate, model=name, backend=backend)(rows, ids), expected)
                    for backend in all_backends()
                )
        except Exception as reason:
            why = why or _line(reason)
            continue
        if error < BOUND:
            return Proof(candidate, returned=returned), ""
        least = min(least, error)
    if least < float("inf"):
        why = f"read by its fields it differs from its own forward by {least:.1e} of the largest value; what it does "
        why += "besides may be named in moe (after_block, routed_scale, bias, routing)"
    return None, why or "its own forward gives values that are not finite"


def _other_arguments(block: nn.Module) -> list[str]:
    """What the block's ``forward`` takes beside states and token ids: a state of its router, a mask."""
    named = list(inspect.signature(block.forward).parameters.values())[1:]
    return [p.name for p in named if p.name != "input_ids" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def _hidden(twin: nn.Module, fields: MoEFields) -> int:
    """The block's hidden size: what its gate reads."""
    gate = at(twin, str(fields.gate))
    return int(next(p.shape[-1] for p in gate.parameters() if p.dim() == 2))


def _stock(twin: nn.Module, rows: Tensor, ids: Tensor) -> tuple[Tensor, int]:
    """The stock block's output for rows as two sequences, and how many values it returns."""
    takes_ids = "input_ids" in inspect.signature(twin.forward).parameters
    more = {"input_ids": ids.view(2, -1)} if takes_ids else {}
    with torch.no_grad():
        try:
            out = twin(rows.view(2, -1, rows.shape[-1]).clone(), **more)
        except (IndexError, ValueError, RuntimeError):  # a block that takes flat rows
            out = twin(rows.clone(), **({"input_ids": ids} if takes_ids else {}))
    if isinstance(out, tuple):
        return out[0].reshape(rows.shape), len(out)
    return out.reshape(rows.shape), 0


def _kept_error(twin: nn.Module, name: str, fields: MoEFields) -> tuple[float, str]:
    """Of the experts inside the block, called with a routing."""
    experts = at(twin, name) if name else None
    if not isinstance(experts, nn.Module):
        return float("inf"), "it has no experts; name them in moe.experts"
    if isinstance(experts, nn.ModuleList) or not takes_routing(experts):
        return float("inf"), f"its experts ({type(experts).__name__}) are not called with rows, indices and weights"
    worst = 0.0
    try:
        for backend in all_backends():
            layer = RoutedExperts(experts, fields, backend=backend)
            called = CalledExperts(ParallelMoELayer(layer, MoEGroups()))
            rows, number = probe_rows(layer.expert_hidden), layer.num_experts + layer.zero_experts
            generator = torch.Generator().manual_seed(3)
            ids = torch.rand((ROWS, number), generator=generator).argsort(-1)[:, : min(2, number)]
            weights = torch.rand(ids.shape, generator=generator)
            with torch.no_grad():
                worst = max(worst, difference(called(rows, ids, weights), experts(rows.clone(), ids, weights)))
    except Exception as reason:
        return float("inf"), _line(reason)
    return worst, f"its experts differ from their own forward by {worst:.1e} of the largest value"


def _line(reason: Exception) -> str:
    lines = str(reason).strip().splitlines()
    return f"{lines[0][:200]}" if lines else type(reason).__name__
