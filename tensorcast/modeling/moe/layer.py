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
from tensorcast.modeling.experts import describe_stacked, is_stacked
from tensorcast.modeling.moe.backends import SERVING, Phase, Wanted, choose_backend
from tensorcast.modeling.moe.experts import ExpertWrapper
from tensorcast.modeling.moe.fused import FusedMoETensorCast
from tensorcast.modeling.moe.groups import MoEGroups
from tensorcast.modeling.moe.phase import checked, current_phase
from tensorcast.modeling.moe.rounding import hidden_of
from tensorcast.profiles.model import MoEFields

TC = torch.ops.tensor_cast


def find_fields(block: nn.Module, given: MoEFields = MoEFields(), model: str = "") -> MoEFields:
    """Field names of a block: what the profile gives, else what the block shows. A missing one is an error."""
    children = dict(block.named_children())
    for role in ("gate", "experts", "shared_experts", "shared_experts_gate", "latent_down", "latent_up"):
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
    latent = [n for n, c in children.items() if "latent" in n and isinstance(c, nn.Linear)]
    down = given.latent_down or next((n for n in latent if _narrows(children[n])), None)
    up = given.latent_up or next((n for n in latent if not _narrows(children[n])), None)
    if bool(down) != bool(up):
        raise InputError(
            f"model {model or type(block).__name__}: its MoE block has one latent projection, {down or up!r}; "
            f"name both in moe.latent_down and moe.latent_up"
        )
    rest = [n for n in children if n not in (experts, shared, shared_gate, down, up)]
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
        latent_down=down,
        latent_up=up,
    )


def _narrows(projection: Any) -> bool:
    return bool(projection.out_features < projection.in_features)


def _looked_up(block: nn.Module, gate: nn.Module, named: str | None, default: str) -> Any:
    """An attribute of the block, else of its gate."""
    name = named or default
    return getattr(block, name, getattr(gate, name, None))


class MoELayer(nn.Module):
    """Gate, routed experts and shared experts of one block on one rank.

    Routing comes in three kinds: a ``router`` callable ``(gate, hidden, top_k, input_ids, layer_index) -> (indices,
    weights)``; a gate that returns raw logits; a gate that returns (logits, weights, indices), (indices, weights) or
    scores of every expert, zero where not chosen. The last kind scales the experts' input (Llama-4), the others output.
    Ids beyond the experts are zero experts, which return their input. Latent experts work in a smaller hidden size.
    ``backend`` of the experts, where it names sub-configs that of ``part``.
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
        super().__init__()
        self.fields = find_fields(block, fields, model)
        self.name = model or type(block).__name__
        self.gate: Any = getattr(block, str(self.fields.gate))
        experts: Any = getattr(block, str(self.fields.experts))
        if is_stacked(experts) and not hasattr(experts, "is_transposed"):
            describe_stacked(experts)
        # stacked once; a ModuleList's own copy of the weights is not kept
        self.stacked = ExpertWrapper(experts).stacked()
        self.wrapper = ExpertWrapper(self.stacked)
        self.num_experts, self.zero_experts = len(self.wrapper), int(getattr(experts, "zero_expert_num", 0) or 0)
        self.shared_experts = self._child(block, self.fields.shared_experts)
        self.shared_experts_gate = self._child(block, self.fields.shared_experts_gate)
        self.latent_down = self._child(block, self.fields.latent_down)
        self.latent_up = self._child(block, self.fields.latent_up)
        self.top_k = self._top_k(block, fields)
        self.norm_topk_prob = bool(_looked_up(block, self.gate, fields.norm_topk_prob, "norm_topk_prob"))
        self.router, self.layer_index, self.backend, self.part = router, layer_index, backend, part
        choose_backend(backend, "prefill")  # refuses an unknown name now
        self.weight_on_input = False
        # A gate may ask for what the block holds (a correction bias) or for token ids: pass them by name.
        wanted = (
            list(inspect.signature(self.gate.forward).parameters)[1:] if not isinstance(self.gate, nn.Linear) else []
        )
        self._block: Any = [block]
        self._gate_extras = [name for name in wanted if hasattr(block, name)]
        self._gate_takes_ids = "input_ids" in wanted
        self._stage: FusedMoETensorCast | None = None

    @staticmethod
    def _child(block: nn.Module, name: str | None) -> nn.Module | None:
        return getattr(block, name) if name else None

    def _top_k(self, block: nn.Module, fields: MoEFields) -> int:
        top_k = _looked_up(block, self.gate, fields.top_k, "top_k")
        if top_k is None:
            raise InputError(
                f"model {self.name}: field top_k ({fields.top_k or 'top_k'!r}) is on neither its "
                f"MoE block nor its gate; set moe.top_k in the model profile"
            )
        if not 1 <= int(top_k) <= self.num_experts + self.zero_experts:
            raise InputError(f"model {self.name}: top_k = {top_k} of {self.num_experts + self.zero_experts} experts")
        return int(top_k)

    @property
    def expert_hidden(self) -> int:
        """Columns of the rows that experts take: the model's hidden size, or the latent one."""
        return hidden_of(self.stacked)

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
        if not isinstance(out, tuple):
            weights, indices = TC.moe_gating_top_k_softmax(out, self.top_k)
            if self.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            return indices, weights.to(x.dtype)
        first, second = out[-2:]
        if len(out) == 2 and first.is_floating_point() and second.is_floating_point():
            self.weight_on_input = True
            weights, indices = first.topk(self.top_k, dim=-1)
            return indices, weights
        return (second, first) if first.is_floating_point() else (first, second)  # both orders exist

    def shared(self, x: Tensor, mlp: nn.Module | None = None) -> Tensor | None:
        """Output of the shared experts (or of ``mlp``, this rank's slice of them), times their gate if there is one."""
        mlp = mlp if mlp is not None else self.shared_experts
        if mlp is None:
            return None
        out: Tensor = mlp(x)
        return out if self.shared_experts_gate is None else torch.sigmoid(self.shared_experts_gate(x)) * out

    def narrow(self, x: Tensor) -> Tensor:
        """Hidden size to the experts' own, where they work in a smaller one."""
        return x if self.latent_down is None else self.latent_down(x)

    def widen(self, x: Tensor) -> Tensor:
        """The way back of :meth:`narrow`."""
        return x if self.latent_up is None else self.latent_up(x)

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
        return (out if shared is None else out + shared).reshape(hidden_states.shape).to(hidden_states.dtype)
