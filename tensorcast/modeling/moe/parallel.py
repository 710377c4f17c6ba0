"""A MoE layer on parallel groups, for one rank's tokens: traced on meta for any rank, run on gloo or NCCL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tensorcast.errors import InputError
from tensorcast.modeling.moe.backends import SERVING, Phase, Wanted, choose_backend
from tensorcast.modeling.moe.experts import ShardedMLP
from tensorcast.modeling.moe.fused import Exchange, FusedMoETensorCast
from tensorcast.modeling.moe.groups import MoEGroups
from tensorcast.modeling.moe.layer import RoutedExperts
from tensorcast.modeling.moe.phase import PHASES, checked, current_phase
from tensorcast.modeling.moe.placement import Placement, linear, with_external
from tensorcast.modeling.moe.reading.with_shared import with_shared

Chosen = Literal["allgather_reducescatter", "all_to_all", "low_latency"]


@dataclass(frozen=True)
class MoEOptions:
    """What a parallel MoE layer can choose.

    ``exchange``: how tokens reach experts on other ranks when dp > 1; ``decode_exchange``: another one in decode.
    ``route_after_dp_transform``: the gate runs on the gathered or sliced tokens instead of this rank's own.
    ``chunk_tokens``: tokens that pass the experts at a time (0: all). ``max_tokens``: the most that any rank may hold;
    chunks with all_to_all need it, so that all ranks run as many, and low_latency, whose messages it sizes.
    ``enable_shared_expert_tp``: the shared expert works on this rank's own tokens, cut over tp; where every tp rank
    works on all tokens its sum rides on the routed experts' all-reduce. ``external_shared_experts``: the first n ep
    ranks hold the shared expert and nothing else. ``fuse_shared_experts``: at ep = 1 a shared expert like the routed
    ones is one more of them, which every token chooses. ``split_tokens_over_tp``: at dp = 1, as many tokens as tp or
    more are cut over tp and travel, instead of being worked on by all ranks. ``sequence_parallel``: tp ranks hold
    different tokens before and after. ``backend``: of the experts (None: the layer's own). ``scheme``: of the experts'
    weights, ``dispatch``, ``combine``: of the rows that travel to them and back. ``count_loads``: the layer counts its
    experts' rows.
    """

    exchange: Chosen = "all_to_all"
    route_after_dp_transform: bool = False
    chunk_tokens: int = 0
    max_tokens: int = 0
    enable_shared_expert_tp: bool = False
    decode_exchange: Chosen | None = None
    external_shared_experts: int = 0
    fuse_shared_experts: bool = False
    split_tokens_over_tp: bool = False
    sequence_parallel: bool = False
    backend: Wanted | None = None
    scheme: str = "bf16"
    dispatch: str = "bf16"
    combine: str = "bf16"
    count_loads: bool = False

    def exchange_in(self, phase: Phase | None) -> Chosen:
        """The exchange of one phase."""
        return self.decode_exchange if phase == "decode" and self.decode_exchange else self.exchange


class ParallelMoELayer(nn.Module):
    """A :class:`MoELayer` on parallel groups, for one rank's tokens. Drop-in for the block: same input, same output.

    Around :class:`RoutedExperts` it is one for the experts, called with a routing.

    * dp = 1: every tensor-parallel rank holds all tokens; each works on its experts, one all-reduce sums.
    * ``allgather_reducescatter``: tokens of all data-parallel ranks are gathered, the sum is cut back.
    * ``all_to_all`` and ``low_latency``, ep = tp*dp: tokens are padded to a multiple of tp, each tp rank sends its
      slice, results are gathered. ep = dp: each tp rank sends all tokens to its own part of the experts, one all-reduce
      sums.
    A rank without tokens takes part in every collective.
    """

    def __init__(
        self,
        layer: RoutedExperts,
        groups: MoEGroups,
        options: MoEOptions = MoEOptions(),
        placement: Placement | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.groups, self.options = layer, groups, options
        choose_backend(options.backend or "auto", "prefill")  # refuses an unknown name now
        for phase in PHASES:
            self._check_exchange(options.exchange_in(phase))
        external = layer.shared_experts if options.external_shared_experts else None
        self.fused = options.fuse_shared_experts
        self.experts = FusedMoETensorCast(
            self._with_shared(placement) if self.fused else layer.stacked,
            groups,
            self._placed(placement) if options.external_shared_experts else placement,
            external=external,
            zero_experts=layer.zero_experts,
            scheme=options.scheme,
            dispatch=options.dispatch,
            combine=options.combine,
            count_loads=options.count_loads,
        )
        cut = options.enable_shared_expert_tp and layer.shared_experts is not None and groups.tp.size > 1
        cut = cut and not self.fused
        self.shared_slice = ShardedMLP(layer.shared_experts, groups.tp) if cut and not external else None  # type: ignore[arg-type]

    def _check_exchange(self, chosen: Chosen) -> None:
        tp, dp, ep, etp = (g.size for g in (self.groups.tp, self.groups.dp, self.groups.ep, self.groups.etp))
        options, moved = self.options, chosen != "allgather_reducescatter" and ep > 1
        travels = moved and (dp > 1 or options.split_tokens_over_tp or options.sequence_parallel)
        if options.split_tokens_over_tp and not (moved and dp == 1 and etp == 1):
            raise InputError(
                f"split_tokens_over_tp is for dp = 1 and ep = tp with an exchange of rows; "
                f"here dp = {dp}, ep = {ep}, tp = {tp}, {chosen}"
            )
        if travels and etp > 1 and ep != dp:
            raise InputError(
                f"{chosen} with etp = {etp}: the ranks that share an expert must hold the same tokens, "
                f"so ep must be tp*dp = {tp * dp} or dp = {dp}, not {ep}"
            )
        if travels and chosen == "low_latency" and not options.max_tokens:
            raise InputError(
                "low_latency needs max_tokens, the most tokens of any rank: its messages have a fixed size"
            )
        if travels and dp > 1 and options.chunk_tokens and not options.max_tokens:
            raise InputError(f"chunk_tokens with {chosen} needs max_tokens: every rank must run as many chunks")
        if options.sequence_parallel and (not travels or etp > 1 or options.enable_shared_expert_tp):
            raise InputError(
                "sequence_parallel needs rows that travel (all_to_all or low_latency, ep = tp*dp) and a whole shared "
                "expert: every tp rank holds tokens of its own"
            )

    def _with_shared(self, placement: Placement | None) -> nn.Module:
        """The routed experts and the shared one behind them."""
        layer, ep, reason = self.layer, self.groups.ep.size, ""
        if layer.shared_experts is None:
            reason = "it has no shared expert"
        elif ep > 1 or placement is not None or self.options.external_shared_experts:
            reason = f"ep must be 1, with no placement and no external shared experts; here ep = {ep}"
        elif not layer.same_rows or layer.zero_experts or layer.changes_sum:
            reason = "what its routed experts read, or their sum, is not what its shared expert has"
        else:
            found = with_shared(layer.stacked, layer.shared_experts)
            if isinstance(found, nn.Module):
                return found
            reason = found
        raise InputError(f"model {layer.name}: fuse_shared_experts: {reason}")

    def _placed(self, placement: Placement | None) -> Placement:
        """Routed experts on the ranks behind those of the external shared expert."""
        n, layer, ranks = self.options.external_shared_experts, self.layer, self.groups.ep.size
        if n < 0 or n >= ranks:
            raise InputError(f"external_shared_experts = {n} leaves none of ep = {ranks} ranks for routed experts")
        if layer.shared_experts is None:
            raise InputError(f"external_shared_experts = {n}: model {layer.name} has no shared expert")
        if not layer.same_rows or layer.zero_experts:
            raise InputError(
                f"external_shared_experts = {n}: model {layer.name} has latent or zero experts, "
                f"whose rows a shared expert cannot take"
            )
        if ranks - n > layer.num_experts and placement is None:
            raise InputError(f"ep = {ranks} less {n} external is more than the {layer.num_experts} routed experts")
        return with_external(placement or linear(layer.num_experts, ranks - n), n)

    def forward(
        self,
        hidden_states: Tensor,
        input_ids: Tensor | None = None,
        phase: Phase | None = None,
        routed: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """``[..., H]`` of this rank's tokens -> the same shape. ``phase``: else that of the enclosing ``in_phase``.

        ``routed``: indices and weights ``[T,k]`` of the tokens, where the block's own code has chosen.
        """
        phase = current_phase() if phase is None else checked(phase)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        ids = input_ids.reshape(-1) if input_ids is not None else None
        tokens = _Tokens(x, ids, routed)
        if 0 < self.options.max_tokens < x.shape[0]:
            raise InputError(f"{x.shape[0]} tokens on a rank, more than max_tokens = {self.options.max_tokens}")
        chosen = self.options.exchange_in(phase)
        if self.groups.dp.size == 1:
            split = self.options.split_tokens_over_tp and x.shape[0] >= self.groups.tp.size
            split = split or self.options.sequence_parallel
            out = self._sliced(tokens, phase, chosen) if split else self._whole(tokens, phase, "none")
        elif chosen == "allgather_reducescatter" or self.groups.ep.size == 1:
            out = self._gathered(tokens, phase)
        elif self.groups.etp.size > 1:
            out = self._whole(tokens, phase, chosen)
        else:
            out = self._sliced(tokens, phase, chosen)
        return self.layer.finish(out).reshape(hidden_states.shape).to(hidden_states.dtype)

    def _whole(self, tokens: _Tokens, phase: Phase | None, exchange: Chosen | Literal["none"]) -> Tensor:
        """Tensor-parallel ranks hold the same tokens and different parts of experts, or different experts."""
        x, tp, shared = tokens.x, self.groups.tp, self._shared(tokens.x)
        out = self._chunked(self.layer.narrow(x), *self._route(tokens), phase, exchange)
        if shared is not None and self.shared_slice is not None:
            if not self.layer.changes_sum:
                return tp.all_reduce(out + shared)
            shared = tp.all_reduce(shared)
        out = self.layer.widen(tp.all_reduce(out))
        return out if shared is None else out + shared

    def _sliced(self, tokens: _Tokens, phase: Phase | None, exchange: Chosen) -> Tensor:
        """Each tensor-parallel rank sends its slice of the tokens to their experts."""
        tp, total = self.groups.tp, tokens.x.shape[0]
        sequence = self.options.sequence_parallel
        short = 0 if sequence else -total % tp.size

        def own(t: Tensor) -> Tensor:
            return t if sequence else tp.slice(_padded(t, short))

        after = self.options.route_after_dp_transform or sequence
        mine = tokens.map(own) if after else _Tokens(tokens.x, tokens.ids, self._route(tokens)).map(own)
        indices, weights = self._route(mine) if after else mine.chosen()
        out = self.layer.widen(self._chunked(self.layer.narrow(mine.x), indices, weights, phase, exchange))
        shared = self._shared(mine.x) if self.shared_slice is None else None
        out = out if shared is None else out + shared
        out = out if sequence else tp.all_gather(out)[:total]
        return out if self.shared_slice is None else out + tp.all_reduce(self._shared(tokens.x))  # type: ignore[arg-type]

    def _gathered(self, tokens: _Tokens, phase: Phase | None) -> Tensor:
        """All tokens of the data-parallel ranks on each of them, as many rows as there are."""
        x, ids, dp, tp = tokens.x, tokens.ids, self.groups.dp, self.groups.tp
        shared = self._shared(x)
        if self.options.route_after_dp_transform and tokens.routed is None:
            every, sizes = dp.gather_rows(x)
            all_ids = None if ids is None else dp.gather_rows(ids, every.shape[0])[0]
            indices, weights = self._route(_Tokens(every, all_ids))
            every = self.layer.narrow(every)
        else:
            every, sizes = dp.gather_rows(self.layer.narrow(x))
            indices, weights = (dp.gather_rows(t, every.shape[0])[0] for t in self._route(tokens))
        out = dp.scatter_rows(self._chunked(every, indices, weights, phase, "none"), sizes, x.shape[0])
        out = self.layer.widen(tp.all_reduce(out))
        if shared is None:
            return out
        return out + (shared if self.shared_slice is None else tp.all_reduce(shared))

    def _shared(self, x: Tensor) -> Tensor | None:
        """The shared expert on ``x``, or this rank's part of it; nothing where it is one of the experts' choices."""
        return None if self.experts.external or self.fused else self.layer.shared(x, self.shared_slice)

    def _route(self, tokens: _Tokens) -> tuple[Tensor, Tensor]:
        """As chosen, or as the layer routes; a shared expert that is external or among the routed ones is one more
        choice, of weight 1 or its gate."""
        x = tokens.x
        indices, weights = tokens.chosen() if tokens.routed is not None else self.layer.route(x, tokens.ids)
        if not (self.experts.external or self.fused):
            return indices, weights
        gate = self.layer.shared_experts_gate
        if gate is not None and self.layer.weight_on_input:
            raise InputError(f"model {self.layer.name}: weights on the input cannot gate a shared expert")
        one = weights.new_ones((x.shape[0], 1)) if gate is None else torch.sigmoid(gate(x)).to(weights.dtype)
        column = indices.new_full((x.shape[0], 1), self.layer.num_experts)
        return torch.cat([indices, column], 1), torch.cat([weights, one], 1)

    def _chunked(
        self, x: Tensor, indices: Tensor, weights: Tensor, phase: Phase | None, exchange: Chosen | Literal["none"]
    ) -> Tensor:
        """Through the experts, in as many chunks on every rank that exchanges rows, whatever its own tokens."""
        kind: Exchange = "none" if exchange == "allgather_reducescatter" else exchange
        most = self._most_tokens(x.shape[0]) if kind != "none" else x.shape[0]
        chunk = self.options.chunk_tokens
        chunks = max(1, -(-most // chunk)) if chunk else 1
        capacity = -(-most // chunks)
        backend = self._backend(phase, kind, capacity, x.device)

        def run(*part: Tensor) -> Tensor:
            out: Tensor = self.experts(
                *part, exchange=kind, backend=backend, capacity=capacity, weight_on_input=self.layer.weight_on_input
            )
            return out

        if chunks == 1:
            return run(x, indices, weights)
        parts = zip(*(t.tensor_split(chunks) for t in (x, indices, weights)), strict=True)
        return torch.cat([run(*part) for part in parts])

    def _most_tokens(self, own: int) -> int:
        """Most tokens that any rank sends; 0 where ranks may differ and no maximum is given."""
        most, sequence = self.options.max_tokens, self.options.sequence_parallel
        if not most:  # tensor-parallel ranks cut the same tokens into equal parts
            return own if self.groups.dp.size == 1 and not sequence else 0
        return most if sequence or self.groups.etp.size > 1 else -(-most // self.groups.tp.size)

    def _backend(self, phase: Phase | None, kind: Exchange, capacity: int, device: torch.device) -> str:
        """Masked kernels by default only where an expert's rows are bounded by less than all rows."""
        wanted = self.options.backend
        if kind != "low_latency":
            bounded = kind == "none" or capacity > 0
            auto = SERVING if bounded else {**SERVING, "decode": SERVING["prefill"]}
            return self.layer.backend_for(phase, wanted, device, auto)
        backend = self.layer.backend_for(phase or "decode", wanted, device, {"prefill": "masked", "decode": "masked"})
        if backend != "masked":
            raise InputError(f"low_latency lays rows out for the masked backend; {backend} cannot run on them")
        return backend


@dataclass(frozen=True)
class _Tokens:
    """States ``[T,H]`` with their ids ``[T]`` and, where they are routed already, indices and weights ``[T,k]``."""

    x: Tensor
    ids: Tensor | None = None
    routed: tuple[Tensor, Tensor] | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> _Tokens:
        """The same change of the tokens' rows in all of them."""
        routed = None if self.routed is None else (change(self.routed[0]), change(self.routed[1]))
        return _Tokens(change(self.x), None if self.ids is None else change(self.ids), routed)

    def chosen(self) -> tuple[Tensor, Tensor]:
        """The routing, where there is one."""
        if self.routed is None:
            raise InputError("tokens without a routing")
        return self.routed


def _padded(x: Tensor, short: int) -> Tensor:
    """``short`` copies of the first row appended: their results are cut off, their experts are as spread as any."""
    return x if short == 0 else torch.cat([x, x[:1].expand(short, *x.shape[1:])])
