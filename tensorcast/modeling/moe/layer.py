"""A transformers MoE block, read through field names that default from the block itself, on one rank.

``parallel.py`` puts it on parallel groups, ``fused.py`` holds a rank's experts and moves rows to and from them. The
same modules are traced for one rank on meta and run on real ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tensorcast.errors import InputError
from tensorcast.modeling.moe.backends import SERVING, Phase, Wanted, choose_backend
from tensorcast.modeling.moe.fused import FusedMoETensorCast
from tensorcast.modeling.moe.groups import MoEGroups
from tensorcast.modeling.moe.phase import checked, current_phase
from tensorcast.modeling.moe.reading.fields import at, find_fields, looked_up
from tensorcast.modeling.moe.reading.wrapper import ExpertWrapper
from tensorcast.modeling.moe.rounding import hidden_of
from tensorcast.profiles.model import MoEFields

TC = torch.ops.tensor_cast


class RoutedExperts(nn.Module):
    """Experts alone, for rows whose routing is made elsewhere: by the block's own code.

    ``backend`` of the experts, where it names sub-configs that of ``part``.
    """

    shared_experts: nn.Module | None
    shared_experts_gate: nn.Module | None
    weight_on_input = False
    changes_sum = False
    """Whether :meth:`widen` does anything to the routed experts' sum."""
    same_rows = True
    """Whether experts take rows of the model's hidden size, as shared experts do."""

    def __init__(
        self,
        experts: nn.Module,
        fields: MoEFields = MoEFields(),
        *,
        model: str = "",
        backend: Wanted = "auto",
        part: str = "",
    ) -> None:
        super().__init__()
        self.name = model or type(experts).__name__
        self.shared_experts = self.shared_experts_gate = None
        # stacked once; a ModuleList's own copy of the weights is not kept
        self.stacked = ExpertWrapper(experts, fields).stacked()
        self.wrapper = ExpertWrapper(self.stacked)
        self.num_experts, self.zero_experts = len(self.wrapper), int(getattr(experts, "zero_expert_num", 0) or 0)
        self.backend, self.part = backend, part
        choose_backend(backend, "prefill")  # refuses an unknown name now

    def release(self) -> None:
        """Let go of the stacked weights, once a rank's own experts are taken from them."""
        del self.stacked, self.wrapper

    @property
    def expert_hidden(self) -> int:
        """Columns of the rows that experts take: the model's hidden size, or the latent one."""
        return hidden_of(self.stacked)

    def route(self, x: Tensor, input_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x [T,H]`` -> expert indices and weights, both ``[T,k]``."""
        raise InputError(f"model {self.name}: its experts are called with a routing; they have no gate of their own")

    def shared(self, x: Tensor, mlp: nn.Module | None = None) -> Tensor | None:
        """Output of the shared experts (or of ``mlp``, this rank's slice of them), times their gate if there is one."""
        return None

    def narrow(self, x: Tensor) -> Tensor:
        """The block's states to rows for the experts."""
        return x

    def widen(self, x: Tensor) -> Tensor:
        """The routed experts' sum to the block's states."""
        return x

    def finish(self, x: Tensor) -> Tensor:
        """What the block does to its output, shared experts included."""
        return x

    def backend_for(
        self, phase: Phase | None, wanted: Wanted | None, device: torch.device, auto: Mapping[str, str] = SERVING
    ) -> str:
        """Backend of a phase; without one, ``auto`` is one grouped GEMM per projection."""
        wanted = self.backend if wanted is None else wanted
        if phase is not None:
            # a trace on meta stands for the accelerator
            kind = "cpu" if device.type == "cpu" else "cuda"
            return choose_backend(wanted, phase, part=self.part, device=kind, auto=auto)
        return choose_backend(wanted, "prefill", part=self.part, auto={"prefill": "grouped_mm"})


class MoELayer(RoutedExperts):
    """Gate, routed experts and shared experts of one block on one rank.

    Routing comes in three kinds: a ``router`` callable ``(gate, hidden, top_k, input_ids, layer_index) -> (indices,
    weights)``; a gate that returns raw logits; a gate that returns (logits, weights, indices), (indices, weights) or
    scores of every expert, zero where not chosen. The last kind scales the experts' input (Llama-4), the others output.
    Ids beyond the experts are zero experts, which return their input. Latent experts work in a smaller hidden size.
    ``backend`` and ``part`` as in :class:`RoutedExperts`.
    """

    def __init__(
        self,
        block: nn.Module,
        fields: MoEFields = MoEFields(),
        *,
        model: str = "",
        router: Any = None,
        layer_index: int = 0,
        backend: Wanted = "auto",
        part: str = "",
    ) -> None:
        found = find_fields(block, fields, model)
        experts: Any = at(block, str(found.experts))
        super().__init__(experts, found, model=model or type(block).__name__, backend=backend, part=part)
        self.fields = found
        self.gate: Any = at(block, str(found.gate))
        self.shared_experts = at(block, found.shared_experts) if found.shared_experts else None
        self.shared_experts_gate = at(block, found.shared_experts_gate) if found.shared_experts_gate else None
        before = (*filter(None, (found.latent_down,)), *found.before)
        after = (*found.after, *filter(None, (found.latent_up,)))
        self.before, self.after, self.after_block = (
            nn.ModuleList(at(block, path) for path in paths) for paths in (before, after, found.after_block)
        )
        scale = looked_up(block, self.gate, experts, found.routed_scale)
        self.routed_scale: Any = [scale]
        self.sum_bias: Any = [looked_up(block, self.gate, experts, found.bias)]  # in lists: the block's own parameters
        self.changes_sum = bool(after) or scale is not None or found.bias is not None
        self.same_rows = not before and not after
        self.top_k = self._top_k(looked_up(block, self.gate, experts, found.top_k or "top_k"))
        self.norm_topk_prob = bool(looked_up(block, self.gate, experts, found.norm_topk_prob or "norm_topk_prob"))
        self.router, self.layer_index = router, layer_index
        # A gate may ask for what the block holds (a correction bias) or for token ids: pass them by name.
        wanted = (
            list(inspect.signature(self.gate.forward).parameters)[1:] if not isinstance(self.gate, nn.Linear) else []
        )
        self._block: Any = [block]
        self._gate_extras = [name for name in wanted if hasattr(block, name)]
        self._gate_takes_ids = "input_ids" in wanted
        if found.routing == "hash" and not self._gate_takes_ids:
            raise InputError(f"model {self.name}: moe.routing = 'hash', but its gate {found.gate!r} takes no input_ids")
        self._stage: FusedMoETensorCast | None = None

    def _top_k(self, top_k: Any) -> int:
        if top_k is None:
            raise InputError(
                f"model {self.name}: field top_k ({self.fields.top_k or 'top_k'!r}) is on neither its "
                f"MoE block nor its gate; set moe.top_k in the model profile"
            )
        if not 1 <= int(top_k) <= self.num_experts + self.zero_experts:
            raise InputError(f"model {self.name}: top_k = {top_k} of {self.num_experts + self.zero_experts} experts")
        return int(top_k)

    def route(self, x: Tensor, input_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x [T,H]`` -> expert indices and weights, both ``[T,k]``."""
        if self.router is not None:
            indices, weights = self.router(self.gate, x, self.top_k, input_ids, self.layer_index)
            return indices, weights
        extras = {name: getattr(self._block[0], name) for name in self._gate_extras}
        if self._gate_takes_ids:
            if input_ids is None:
                raise InputError(f"model {self.name}: its gate looks experts up by token id; pass input_ids")
            extras["input_ids"] = input_ids
        out = self.gate(x, **extras)
        raw = self.fields.routing == "logits" or self.fields.gate_returns_raw_logits
        if not isinstance(out, tuple) or raw:
            logits = self._logits(out)
            weights, indices = TC.moe_gating_top_k_softmax(logits, self.top_k)
            if self.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            return indices, weights.to(x.dtype)
        first, second = self._pair(out)
        if self.fields.routing == "scores" or (first.is_floating_point() and second.is_floating_point()):
            self.weight_on_input = True
            weights, indices = first.topk(self.top_k, dim=-1)
            return indices, weights
        return (second, first) if first.is_floating_point() else (first, second)  # both orders exist

    def _logits(self, out: Any) -> Tensor:
        """A score for every expert, among what the gate returns."""
        given = out if isinstance(out, tuple) else (out,)
        every = self.num_experts + self.zero_experts
        found = [t for t in given if isinstance(t, Tensor) and t.is_floating_point() and t.shape[-1] == every]
        if not found:
            shapes = ", ".join(str(tuple(t.shape)) for t in given if isinstance(t, Tensor))
            raise InputError(f"model {self.name}: its gate returns no logits of {every} experts, but {shapes}")
        return found[0]

    def _pair(self, out: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Indices and weights, or scores and logits: the tensors that lie before and at the end of what a gate returns.

        Where it returns more (a state, weights of shared experts), the indices tell which two they are.
        """
        tensors = [t for t in out if isinstance(t, Tensor)]
        at_ = next((i for i, t in enumerate(tensors) if not t.is_floating_point()), None)
        if at_ is None:
            return tensors[-2], tensors[-1]
        same = [i for i, t in enumerate(tensors) if i != at_ and t.shape == tensors[at_].shape]
        if not same:
            raise InputError(f"model {self.name}: its gate returns indices and no weights of their shape")
        return tensors[at_], tensors[min(same, key=lambda i: abs(i - at_))]

    def shared(self, x: Tensor, mlp: nn.Module | None = None) -> Tensor | None:
        """Output of the shared experts (or of ``mlp``, this rank's slice of them), times their gate if there is one."""
        mlp = mlp if mlp is not None else self.shared_experts
        if mlp is None:
            return None
        out: Tensor = mlp(x)
        return out if self.shared_experts_gate is None else torch.sigmoid(self.shared_experts_gate(x)) * out

    def narrow(self, x: Tensor) -> Tensor:
        """The block's states to rows for the experts: hidden size to the experts' own, where they work in a smaller."""
        for module in self.before:
            x = module(x)
        return x

    def widen(self, x: Tensor) -> Tensor:
        """The routed experts' sum to the block's states."""
        for module in self.after:
            x = module(x)
        if self.routed_scale[0] is not None:
            x = x * self.routed_scale[0]
        return x if self.sum_bias[0] is None else x + self.sum_bias[0]

    def finish(self, x: Tensor) -> Tensor:
        """What the block does to its output, shared experts included."""
        for module in self.after_block:
            x = module(x)
        return x

    def forward(self, hidden_states: Tensor, input_ids: Tensor | None = None, phase: Phase | None = None) -> Tensor:
        """``[..., H]`` -> the same shape, all on this rank. ``phase``: else that of the enclosing ``in_phase``."""
        phase = current_phase() if phase is None else checked(phase)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        indices, weights = self.route(x, None if input_ids is None else input_ids.reshape(-1))
        if self._stage is None:
            self._stage = FusedMoETensorCast(self.stacked, MoEGroups(), zero_experts=self.zero_experts)
        backend = self.backend_for(phase, None, x.device)
        rows = self.narrow(x)
        out = self._stage(rows, indices, weights, backend=backend, weight_on_input=self.weight_on_input)
        out, shared = self.widen(out), self.shared(x)
        return self.finish(out if shared is None else out + shared).reshape(hidden_states.shape).to(hidden_states.dtype)
