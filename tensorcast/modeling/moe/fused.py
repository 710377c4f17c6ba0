"""The expert stage of a MoE layer on one rank: its experts, and the exchange of rows with the other ranks."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensorcast.errors import InputError
from tensorcast.modeling.moe.experts import ShardedMLP, count_of, device_of, held_experts
from tensorcast.modeling.moe.groups import MoEGroups, ParallelGroup
from tensorcast.modeling.moe.placement import Placement, choose_replica, linear
from tensorcast.modeling.moe.rounding import hidden_of, with_hidden
from tensorcast.modeling.quantization import rounded_hidden
from tensorcast.ops.quantized import format_of

TC = torch.ops.tensor_cast

Exchange = Literal["none", "all_to_all", "low_latency"]
"""How rows meet experts. ``none``: every rank holds all tokens and works on its own experts' rows. ``all_to_all``: rows
travel to their experts and back, as many as there are. ``low_latency``: the same in messages of fixed size."""


class FusedMoETensorCast(nn.Module):
    """A rank's experts and the way of rows to them and back.

    ``placement`` says which experts (and replicas of busy ones) each ep rank holds; contiguous without one.
    ``external``: a shared expert on ranks of its own; the placement counts it as one expert more, its last, and a rank
    holds either it or routed ones. ``zero_experts``: ids beyond the experts that return their input (LongCat), on
    whatever rank the token is. ``scheme``: the routed experts' weights are held quantised, as wide as its kernels need.
    ``dispatch``, ``combine``: schemes of rows that travel to experts and back (``bf16``: in the activations' dtype).
    ``count_loads``: keep in ``loads`` [E] how many rows each expert was chosen for by this rank's calls, as EPLB
    placement wants it.
    """

    _loads: Tensor | None
    physical: Tensor
    copies: Tensor

    def __init__(
        self,
        experts: nn.Module,
        groups: MoEGroups,
        placement: Placement | None = None,
        *,
        external: nn.Module | None = None,
        zero_experts: int = 0,
        scheme: str = "bf16",
        dispatch: str = "bf16",
        combine: str = "bf16",
        count_loads: bool = False,
    ) -> None:
        super().__init__()
        device = device_of(experts)
        self.groups, self.num_experts, self.zero_experts = groups, count_of(experts), zero_experts
        self.placement = self._checked(placement, external is not None)
        self.external = external is not None
        self.hidden = hidden_of(experts)
        self.width = rounded_hidden(self.hidden, scheme)
        self.dispatch, self.combine = dispatch, combine
        for way, sent in (("dispatch", dispatch), ("combine", combine)):
            if sent != "bf16" and format_of(sent).activation is None:
                raise InputError(f"{way} = {sent!r}: this scheme keeps activations as they are; fp8_block does not")
        if getattr(experts, "has_post_expert_norm", False) and (groups.etp.size > 1 or self.width > self.hidden):
            raise InputError(f"experts with a norm after them cannot be cut over etp = {groups.etp.size} or widened")
        self.place(self.placement, device)
        held = [self.placement.physical_to_logical[slot] for slot in self.placement.slots(groups.ep.rank)]
        self.local: nn.Module = (
            SharedRank(external, groups.etp, self.hidden)
            if external is not None and self.num_experts in held
            else held_experts(with_hidden(experts, self.width), held, groups.etp, scheme)
        )
        loads = torch.zeros(self.placement.num_experts + zero_experts, dtype=torch.int64, device=device)
        self.register_buffer("_loads", loads if count_loads else None, persistent=False)

    @property
    def loads(self) -> Tensor:
        """Rows of each routed expert so far, ``[E]``. Raises :class:`InputError` if they are not counted."""
        if self._loads is None:
            raise InputError("expert loads are not counted: set count_loads")
        return self._loads[: self.num_experts]

    def _checked(self, placement: Placement | None, external: bool) -> Placement:
        ranks = self.groups.ep.size
        if placement is None:
            if ranks > self.num_experts:
                raise InputError(f"ep = {ranks} is more than the {self.num_experts} experts; a rank would hold none")
            placement = linear(self.num_experts, ranks)
        if (placement.num_experts, placement.ranks) != (self.num_experts + external, ranks):
            raise InputError(
                f"placement of {placement.num_experts} experts on {placement.ranks} ranks, "
                f"but the layer has {self.num_experts + external} experts and ep = {ranks}"
            )
        return placement

    def place(self, placement: Placement, device: torch.device | None = None) -> None:
        """Rows go by this placement from now on; the weights must lie so (``weights.rearrange`` moves them).

        Logical to physical ids as tensors; ids of zero experts follow the last physical one.
        """
        self.placement, slots = placement, placement.slots(self.groups.ep.rank)
        self.per_rank, self.start, self.count = list(placement.experts_per_rank), slots.start, len(slots)
        device = self.physical.device if device is None else device
        physical, copies = self.placement.logical_to_physical().tolist(), self.placement.replica_counts.tolist()
        first = self.placement.num_physical
        for zero in range(self.zero_experts):
            # without an external expert they stand behind the routed ones, as the router numbers them
            physical.append([first + zero] + [-1] * (len(physical[0]) - 1))
            copies.append(1)
        self.mapped = physical != [[e] for e in range(len(physical))]
        self.register_buffer("physical", torch.tensor(physical, device=device), persistent=False)
        self.register_buffer("copies", torch.tensor(copies, device=device), persistent=False)

    def expected_rows(self, tokens: int, chosen: int, sources: int) -> int:
        """Rows of this rank's experts, balanced routing, from ``sources`` ranks of ``tokens`` with ``chosen`` each.

        Every token visits the external shared expert; what else it chooses falls on all ids alike. Copies share. -1 in
        code that torch.compile reads: how many rows there are is known when it runs.
        """
        if torch.compiler.is_compiling():
            return -1
        held = [self.placement.physical_to_logical[self.start + slot] for slot in range(self.count)]
        copies = self.placement.replica_counts
        routed = Fraction(chosen - self.external, self.num_experts + self.zero_experts)
        share = sum((Fraction(1) if e == self.num_experts else routed) / int(copies[e]) for e in held)
        rows = Fraction(sources) * share
        return -(-tokens * rows.numerator // rows.denominator)

    def forward(
        self,
        x: Tensor,
        indices: Tensor,
        weights: Tensor,
        *,
        exchange: Exchange = "none",
        backend: str = "grouped_mm",
        capacity: int = 0,
        weight_on_input: bool = False,
    ) -> Tensor:
        """``x [T,H]``, ``indices, weights [T,k]`` -> ``[T,H]``; partial sums over the ranks that share the tokens.

        ``capacity``: most tokens of any rank, which ``low_latency`` needs. ``weight_on_input``: the weights scale the
        experts' input rows, not their output.
        """
        logical = indices
        if self._loads is not None:
            self._loads += TC.expert_counts(logical, self._loads.shape[0])
        if self.mapped:  # ranks start at different copies, so that one token each does not meet on one rank
            source = 0 if exchange == "none" else self.groups.ep.rank
            indices = choose_replica(indices, self.physical, self.copies, source)
        padded = x if self.width == self.hidden else F.pad(x, (0, self.width - self.hidden))
        rows = TC.init_routing_v2(padded, indices)
        if weight_on_input:
            # each (token, choice) pair is one row with one choice: its weight, in the order of the rows
            rows = rows * TC.init_routing_v2(weights.reshape(-1, 1), indices.reshape(-1, 1))
        counts = TC.expert_counts(indices, self.placement.num_physical + self.zero_experts)
        out = self._visit(rows, counts, indices.shape[1], exchange=exchange, backend=backend, capacity=capacity)
        choices = TC.unpermute_tokens(out, indices)
        if padded is not x:
            choices = choices[..., : self.hidden]
        if not weight_on_input:
            choices = choices * weights.unsqueeze(-1).to(choices.dtype)
        total = choices.sum(1)
        if self.zero_experts:  # they return their input; where ranks sum their parts, each adds its share
            sharing = self.groups.etp.size * (self.groups.ep.size if exchange == "none" else 1)
            total = total + x * ((weights * (logical >= self.num_experts)).sum(-1, keepdim=True) / sharing)
        return total.to(x.dtype)

    def _visit(
        self, rows: Tensor, counts: Tensor, chosen: int, *, exchange: Exchange, backend: str, capacity: int
    ) -> Tensor:
        """Rows ordered by physical expert to the experts and back into their place."""
        total, tokens = rows.shape[0], rows.shape[0] // chosen
        if exchange == "none":
            if self.count == counts.shape[0]:
                return self._run(rows, counts, backend, tokens)
            expected = self.expected_rows(tokens, chosen, 1)
            own, own_counts = TC.slice_experts(rows, counts, self.start, self.count, expected)
            return TC.place_experts(self._run(own, own_counts, backend, tokens), counts, self.start, total)
        if self.zero_experts:  # rows of zero experts stay
            routed = counts.shape[0] - self.zero_experts
            share = total * self.num_experts // (self.num_experts + self.zero_experts)
            own, own_counts = TC.slice_experts(rows, counts, 0, routed, share)
            out = self._exchange(own, own_counts, tokens, chosen, exchange=exchange, backend=backend, capacity=capacity)
            return TC.place_experts(out, counts, 0, total)
        return self._exchange(rows, counts, tokens, chosen, exchange=exchange, backend=backend, capacity=capacity)

    def _exchange(
        self, rows: Tensor, counts: Tensor, tokens: int, chosen: int, *, exchange: Exchange, backend: str, capacity: int
    ) -> Tensor:
        ep, total, to = self.groups.ep, rows.shape[0], (self.per_rank, self.groups.ep.rank)
        going = _packed(rows, self.dispatch)
        if exchange == "low_latency":
            sent = [TC.low_latency_dispatch(part, counts, *to, capacity, ep.name) for part in going]
            laid, sources = _unpacked([part for part, _ in sent], self.dispatch, rows.dtype), sent[0][1]
            out = self.local(laid, sources.sum(0), backend="masked", capacity=ep.size * capacity)
            back = (counts, sources, self.per_rank, capacity, total, ep.name)
            returned = [TC.low_latency_combine(part, *back) for part in _packed(out, self.combine)]
            return _unpacked(returned, self.combine, out.dtype)
        expected = self.expected_rows(tokens, chosen, ep.size)
        sent = [TC.dispatch_rows(part, counts, *to, ep.name, expected) for part in going]
        received, sources = [part for part, _ in sent], sent[0][1]
        ordered = _unpacked([TC.to_expert_major(part, sources) for part in received], self.dispatch, rows.dtype)
        out = self._run(ordered, sources.sum(0), backend, ep.size * capacity)
        parts = [TC.to_rank_major(part, sources) for part in _packed(out, self.combine)]
        returned = [TC.combine_rows(part, counts, sources, self.per_rank, ep.name, total) for part in parts]
        return _unpacked(returned, self.combine, out.dtype)

    def _run(self, rows: Tensor, counts: Tensor, backend: str, capacity: int) -> Tensor:
        out: Tensor = self.local(rows, counts, backend=backend, capacity=capacity)
        return out


def _packed(rows: Tensor, scheme: str) -> list[Tensor]:
    """What travels: the rows, or their quantised parts; FP8 goes as bytes, which every network library sends."""
    if scheme == "bf16":
        return [rows]
    parts = TC.quantize_activation(rows, scheme)
    return [part.view(torch.uint8) if part.element_size() == 1 else part for part in parts]


def _unpacked(parts: list[Tensor], scheme: str, dtype: torch.dtype) -> Tensor:
    """The rows that :func:`_packed` took apart, in ``dtype``."""
    if scheme == "bf16":
        return parts[0]
    kind = format_of(scheme)
    stored = zip(parts, (kind.dtype, kind.scale, torch.float32), strict=False)  # few schemes have a third part
    out: Tensor = TC.dequantize_activation([part.view(own) for part, own in stored], scheme, dtype)
    return out


class SharedRank(nn.Module):
    """The shared expert as all that a rank holds, cut over ``etp``; takes rows as routed experts do.

    ``hidden``: the model's own columns, where rows come padded.
    """

    def __init__(self, mlp: nn.Module, etp: ParallelGroup, hidden: int) -> None:
        super().__init__()
        self.mlp = ShardedMLP(mlp, etp) if etp.size > 1 else mlp
        self.hidden = hidden

    def forward(self, rows: Tensor, counts: Tensor, *, backend: str = "", capacity: int = 0) -> Tensor:
        """``rows [..., H]`` -> the same shape; it has no use for counts, backend and capacity."""
        width = self.hidden or rows.shape[-1]
        out: Tensor = self.mlp(rows[..., :width])
        return out if rows.shape[-1] == width else F.pad(out, (0, rows.shape[-1] - width))
