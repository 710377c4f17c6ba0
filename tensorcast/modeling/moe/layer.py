"""A transformers MoE block, rewritten: the same module is traced for one rank on meta and run on real ranks.

``MoELayer`` reads any block through field names that default from the block itself. ``ParallelMoELayer`` puts it on
parallel groups, ``FusedMoETensorCast`` holds a rank's experts and moves rows to and from them.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensorcast.errors import InputError
from tensorcast.modeling.experts import describe_stacked, is_stacked
from tensorcast.modeling.moe.experts import ExpertWrapper, FusedMoEBase, ShardedMLP
from tensorcast.modeling.moe.groups import MoEGroups
from tensorcast.modeling.moe.placement import Placement, choose_replica, linear
from tensorcast.profiles.model import MoEFields

TC = torch.ops.tensor_cast

Exchange = Literal["none", "allgather_reducescatter", "all_to_all"]


def find_fields(block: nn.Module, given: MoEFields = MoEFields(), model: str = "") -> MoEFields:
    """Field names of a block: what the profile gives, else what the block shows. A missing one is an error."""
    children = dict(block.named_children())
    for role in ("gate", "experts", "shared_experts", "shared_experts_gate"):
        name = getattr(given, role)
        if name is not None and name not in children:
            raise InputError(
                f"model {model or type(block).__name__}: moe.{role} = {name!r}, "
                f"but its MoE block has {', '.join(children)}"
            )
    experts = given.experts or next(
        (
            n
            for n, c in children.items()
            if isinstance(c, nn.ModuleList) or (hasattr(c, "down_proj") and "shared" not in n)
        ),
        None,
    )
    if experts is None:
        raise InputError(
            f"model {model or type(block).__name__}: its MoE block has no experts; name them in moe.experts"
        )
    shared_gate = given.shared_experts_gate or next((n for n in children if "shared" in n and "gate" in n), None)
    shared = given.shared_experts or next((n for n in children if "shared" in n and n != shared_gate), None)
    rest = [n for n in children if n not in (experts, shared, shared_gate)]
    gate = given.gate or next((n for n in rest if hasattr(children[n], "top_k")), None)
    gate = gate or next((n for n in rest if n in ("gate", "router") or isinstance(children[n], nn.Linear)), None)
    if gate is None:
        raise InputError(f"model {model or type(block).__name__}: its MoE block has no gate; name it in moe.gate")
    return MoEFields(
        gate=gate,
        experts=experts,
        shared_experts=shared,
        shared_experts_gate=shared_gate,
        top_k=given.top_k,
        norm_topk_prob=given.norm_topk_prob,
    )


def _looked_up(block: nn.Module, gate: nn.Module, named: str | None, default: str) -> Any:
    """An attribute of the block, else of its gate."""
    name = named or default
    return getattr(block, name, getattr(gate, name, None))


class MoELayer(nn.Module):
    """Gate, routed experts and shared experts of one block on one rank.

    Routing comes in three kinds: a ``router`` callable ``(gate, hidden, top_k, input_ids, layer_index) -> (indices,
    weights)``; a gate that returns raw logits; a gate that returns (logits, weights, indices), (indices, weights) or
    scores of every expert, zero where not chosen. The last kind scales the experts' input (Llama-4), the others output.
    """

    def __init__(
        self,
        block: nn.Module,
        fields: MoEFields = MoEFields(),
        *,
        model: str = "",
        router: Any = None,
        layer_index: int = 0,
    ) -> None:
        super().__init__()
        self.fields = find_fields(block, fields, model)
        self.gate: Any = getattr(block, str(self.fields.gate))
        experts = getattr(block, str(self.fields.experts))
        if is_stacked(experts) and not hasattr(experts, "is_transposed"):
            describe_stacked(experts)
        self.wrapper = ExpertWrapper(experts)
        self.shared_experts = getattr(block, self.fields.shared_experts) if self.fields.shared_experts else None
        gate_name = self.fields.shared_experts_gate
        self.shared_experts_gate = getattr(block, gate_name) if gate_name else None
        top_k = _looked_up(block, self.gate, fields.top_k, "top_k")
        if top_k is None:
            raise InputError(
                f"model {model or type(block).__name__}: field top_k ({fields.top_k or 'top_k'!r}) is on neither its "
                f"MoE block nor its gate; set moe.top_k in the model profile"
            )
        self.top_k = int(top_k)
        if self.top_k > len(self.wrapper):
            raise InputError(
                f"model {model or type(block).__name__}: top_k = {self.top_k} of {len(self.wrapper)} experts"
            )
        self.norm_topk_prob = bool(_looked_up(block, self.gate, fields.norm_topk_prob, "norm_topk_prob"))
        self.router, self.layer_index = router, layer_index
        self.weight_on_input = False
        # A gate may ask for what the block holds (a correction bias): pass it by name.
        wanted = (
            list(inspect.signature(self.gate.forward).parameters)[1:] if not isinstance(self.gate, nn.Linear) else []
        )
        self._block: Any = [block]
        self._gate_extras = [name for name in wanted if hasattr(block, name)]

    def route(self, x: Tensor, input_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x [T,H]`` -> expert indices and weights, both ``[T,k]``."""
        if self.router is not None:
            indices, weights = self.router(self.gate, x, self.top_k, input_ids, self.layer_index)
            return indices, weights
        extras = [getattr(self._block[0], name) for name in self._gate_extras]
        out = self.gate(x, *extras)
        if isinstance(out, tuple) and len(out) == 2:
            if out[0].shape[-1] == len(self.wrapper) != self.top_k:
                self.weight_on_input = True
                weights, indices = out[0].topk(self.top_k, dim=-1)
                return indices, weights
            indices, weights = out
            return indices, weights
        if isinstance(out, tuple):
            weights, indices = out[1], out[2]
            if indices.is_floating_point():  # (logits, indices, weights) exists too
                weights, indices = indices, weights
            return indices, weights
        weights, indices = TC.moe_gating_top_k_softmax(out, self.top_k)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return indices, weights.to(x.dtype)

    def shared(self, x: Tensor, mlp: nn.Module | None = None) -> Tensor | None:
        """Output of the shared experts (or of ``mlp``, this rank's slice of them), times their gate if there is one."""
        mlp = mlp if mlp is not None else self.shared_experts
        if mlp is None:
            return None
        out: Tensor = mlp(x)
        return out if self.shared_experts_gate is None else torch.sigmoid(self.shared_experts_gate(x)) * out

    def forward(self, hidden_states: Tensor, input_ids: Tensor | None = None) -> Tensor:
        """``[..., H]`` -> the same shape, everything on this rank."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        indices, weights = self.route(x, input_ids)
        out = FusedMoETensorCast(self.wrapper.stacked(), MoEGroups())(x, indices, weights, self.weight_on_input)
        shared = self.shared(x)
        return (out if shared is None else out + shared).reshape(hidden_states.shape).to(hidden_states.dtype)


class FusedMoETensorCast(nn.Module):
    """The expert stage of one rank: its experts' weights, and the exchange of rows with the ranks that hold the others.

    ``placement`` says which experts (and replicas of busy ones) each ep rank holds; contiguous without one.
    ``exchange``: ``none`` (every rank holds all tokens and works on its own experts' rows), ``all_to_all`` (rows travel
    to their experts and back).
    """

    def __init__(
        self,
        experts: nn.Module,
        groups: MoEGroups,
        exchange: Exchange = "none",
        placement: Placement | None = None,
    ) -> None:
        super().__init__()
        self.groups, self.exchange = groups, exchange
        down: Any = experts.down_proj
        num_experts = int(down.shape[0])
        if placement is None:
            if groups.ep.size > num_experts:
                raise InputError(
                    f"ep = {groups.ep.size} is more than the {num_experts} experts; a rank would hold none"
                )
            placement = linear(num_experts, groups.ep.size)
        if (placement.num_experts, placement.ranks) != (num_experts, groups.ep.size):
            raise InputError(
                f"placement of {placement.num_experts} experts on {placement.ranks} ranks, "
                f"but the layer has {num_experts} experts and ep = {groups.ep.size}"
            )
        self.per_rank = list(placement.experts_per_rank)
        self.num_physical = placement.num_physical
        slots = placement.slots(groups.ep.rank)
        self.start, self.count = slots.start, len(slots)
        self.local = FusedMoEBase(experts, [placement.physical_to_logical[slot] for slot in slots], groups.etp)
        self.replicated = placement.physical_to_logical != tuple(range(num_experts))
        table = torch.tensor(placement.logical_to_physical().tolist(), device=down.device)
        self.register_buffer("physical", table, persistent=False)
        copies = torch.tensor(placement.replica_counts.tolist(), device=down.device)
        self.register_buffer("copies", copies, persistent=False)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor, weight_on_input: bool = False) -> Tensor:
        """``x [T,H]``, ``indices, weights [T,k]`` -> ``[T,H]``; partial sums over the ranks that share the tokens.

        ``weight_on_input``: the weights scale the experts' input rows, not their output.
        """
        if self.replicated:  # ranks start at different copies, so that one token each does not meet on one rank
            indices = choose_replica(indices, self.physical, self.copies, self.groups.dp.rank)
        rows = TC.init_routing_v2(x, indices)
        if weight_on_input:
            # each (token, choice) pair is one row with one choice: its weight, in the order of the rows
            rows = rows * TC.init_routing_v2(weights.reshape(-1, 1), indices.reshape(-1, 1))
        counts = TC.expert_counts(indices, self.num_physical)
        if self.groups.ep.size == 1:
            out = self.local(rows, counts)
        elif self.exchange == "all_to_all":
            out = self._exchanged(rows, counts)
        else:
            own, own_counts = TC.slice_experts(rows, counts, self.start, self.count)
            out = TC.place_experts(self.local(own, own_counts), counts, self.start, rows.shape[0])
        choices = TC.unpermute_tokens(out, indices)
        if weight_on_input:
            return choices.sum(1).to(x.dtype)
        return (choices * weights.unsqueeze(-1).to(choices.dtype)).sum(1).to(x.dtype)

    def _exchanged(self, rows: Tensor, counts: Tensor) -> Tensor:
        ep = self.groups.ep
        received, sources = TC.dispatch_rows(rows, counts, self.per_rank, ep.rank, ep.name)
        ordered = TC.to_expert_major(received, sources)
        out = self.groups.etp.all_reduce(self.local(ordered, sources.sum(0)))
        return TC.combine_rows(TC.to_rank_major(out, sources), counts, sources, self.per_rank, ep.name)


@dataclass(frozen=True)
class MoEOptions:
    """What a parallel MoE layer can choose.

    ``exchange``: how tokens reach experts on other ranks when dp > 1. ``route_after_dp_transform``: the gate runs on
    the gathered or sliced tokens instead of this rank's own. ``chunk_tokens``: tokens that pass the experts at a time
    (0: all); with ``all_to_all`` it needs ``max_tokens``, the most that any rank may hold, so that all ranks run the
    same number of chunks. ``enable_shared_expert_tp``: the shared expert works on this rank's own tokens, cut over tp;
    at dp = 1 its sum rides on the routed experts' all-reduce.
    """

    exchange: Literal["allgather_reducescatter", "all_to_all"] = "all_to_all"
    route_after_dp_transform: bool = False
    chunk_tokens: int = 0
    max_tokens: int = 0
    enable_shared_expert_tp: bool = False


class ParallelMoELayer(nn.Module):
    """A :class:`MoELayer` on parallel groups, for one rank's tokens. Drop-in for the block: same input, same output.

    * dp = 1: every tensor-parallel rank holds all tokens; each works on its experts, one all-reduce sums.
    * dp > 1, ``allgather_reducescatter``: tokens of all data-parallel ranks are gathered, the sum is cut back.
    * dp > 1, ``all_to_all``: tokens are padded to a multiple of tp, each tp rank sends its slice, results are gathered.
    A rank without tokens takes part in every collective.
    """

    def __init__(
        self,
        layer: MoELayer,
        groups: MoEGroups,
        options: MoEOptions = MoEOptions(),
        placement: Placement | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.groups, self.options = layer, groups, options
        moved = groups.dp.size > 1 and groups.ep.size > 1 and options.exchange == "all_to_all"
        if moved and groups.etp.size > 1 and groups.tp.size > 1:
            raise InputError(
                "all_to_all with etp > 1 needs tp = 1: the ranks that share an expert must hold other tokens"
            )
        if moved and options.chunk_tokens and not options.max_tokens:
            raise InputError("chunk_tokens with all_to_all needs max_tokens: every rank must run as many chunks")
        if groups.dp.size == 1:
            self.exchange: Exchange = "none"
        else:
            self.exchange = "all_to_all" if moved else "allgather_reducescatter"
        kind: Exchange = "all_to_all" if moved else "none"
        self.experts = FusedMoETensorCast(layer.wrapper.stacked(), groups, kind, placement)
        cut = options.enable_shared_expert_tp and layer.shared_experts is not None and groups.tp.size > 1
        self.shared_slice = ShardedMLP(layer.shared_experts, groups.tp) if cut else None  # type: ignore[arg-type]

    def forward(self, hidden_states: Tensor, input_ids: Tensor | None = None) -> Tensor:
        """``[..., H]`` of this rank's tokens -> the same shape."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        ids = input_ids.reshape(-1) if input_ids is not None else None
        shared = self.layer.shared(x, self.shared_slice)
        if shared is not None and self.shared_slice is not None and self.exchange != "none":
            shared = self.groups.tp.all_reduce(shared)
        if self.exchange == "none":
            indices, weights = self.layer.route(x, ids)
            out = self._chunked(x, indices, weights)
            if shared is not None and self.shared_slice is not None:
                out, shared = out + shared, None
            out = self.groups.tp.all_reduce(out)
        elif self.exchange == "all_to_all":
            out = self._sliced(x, ids)
        else:
            out = self._gathered(x, ids)
        out = out if shared is None else out + shared
        return out.reshape(hidden_states.shape).to(hidden_states.dtype)

    def _chunked(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        chunks = self._chunks(x.shape[0])
        if chunks <= 1:
            out: Tensor = self.experts(x, indices, weights, self.layer.weight_on_input)
            return out
        parts = zip(*(t.tensor_split(chunks) for t in (x, indices, weights)), strict=True)
        return torch.cat([self.experts(*part, self.layer.weight_on_input) for part in parts])

    def _chunks(self, tokens: int) -> int:
        """How many times the experts run: the same on every rank that exchanges rows, whatever its own tokens."""
        chunk = self.options.chunk_tokens
        if not chunk:
            return 1
        return -(-(self.options.max_tokens if self.exchange == "all_to_all" else tokens) // chunk)

    def _sliced(self, x: Tensor, ids: Tensor | None) -> Tensor:
        tp, tokens = self.groups.tp, x.shape[0]
        short = -tokens % tp.size
        routed = None if self.options.route_after_dp_transform else self.layer.route(x, ids)
        mine = tp.slice(_padded(x, short))
        if routed is None:
            indices, weights = self.layer.route(mine, None if ids is None else tp.slice(_padded(ids, short)))
        else:
            indices, weights = (tp.slice(_padded(t, short)) for t in routed)
        return tp.all_gather(self._chunked(mine, indices, weights))[:tokens]

    def _gathered(self, x: Tensor, ids: Tensor | None) -> Tensor:
        dp = self.groups.dp
        every, sizes = dp.gather_rows(x)
        if self.options.route_after_dp_transform:
            indices, weights = self.layer.route(every, None if ids is None else dp.gather_rows(ids)[0])
        else:
            indices, weights = (dp.gather_rows(t)[0] for t in self.layer.route(x, ids))
        out = self._chunked(every, indices, weights)
        return self.groups.tp.all_reduce(dp.scatter_rows(out, sizes))


def _padded(x: Tensor, short: int) -> Tensor:
    """``short`` rows of zeros appended."""
    return x if short == 0 else torch.cat([x, x.new_zeros((short, *x.shape[1:]))])
