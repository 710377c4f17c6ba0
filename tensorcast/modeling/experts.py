"""Experts as ops: the function behind transformers' experts interface, and the adapters for blocks outside it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from tensorcast import ops  # noqa: F401  (registers the ops)
from tensorcast.modeling.moe.kernels import Projection, run_experts

NAME = "tensor_cast"
TC = torch.ops.tensor_cast


def routed_experts(
    self: Any, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *_: Any, backend: str = "grouped_mm", **__: Any
) -> Tensor:
    """Experts forward on stacked weights: permute, up, activation, down, unpermute, weighted sum.

    ``x [T,H]`` or ``[B,S,H]``, ``top_k_index [T,k]``, ``top_k_weights [T,k]`` -> as ``x``. ``self`` is any experts
    module with the attributes that transformers' ``use_experts_implementation`` sets.
    """
    rows = TC.init_routing_v2(x.reshape(-1, x.shape[-1]), top_k_index)
    out = expert_rows(self, rows, top_k_index, backend)
    choices = TC.unpermute_tokens(out, top_k_index)
    return (choices * top_k_weights.unsqueeze(-1).to(choices.dtype)).sum(1).to(x.dtype).reshape(x.shape)


def expert_rows(self: Any, rows: Tensor, top_k_index: Tensor, backend: str = "grouped_mm") -> Tensor:
    """The experts' own part: ``rows [T*k,H]`` ordered by expert -> ``[T*k,H]``."""
    up_name, down_name = "gate_up_proj" if self.has_gate else "up_proj", "down_proj"
    up, down = (
        Projection(
            [getattr(self, name)], getattr(self, f"{name}_bias") if self.has_bias else None, bool(self.is_transposed)
        )
        for name in (up_name, down_name)
    )
    counts = TC.expert_counts(top_k_index, up.weight[0].shape[0])
    activation = self._apply_gate if self.has_gate else self.act_fn
    out = run_experts(backend, rows, counts, up=up, activation=activation, down=down, dtype=rows.dtype)
    return self.post_expert_norm(out) if self.has_post_expert_norm else out


ExpertsInterface.register(NAME, routed_experts)


def _gated(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate) * up


def is_stacked(module: nn.Module) -> bool:
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    return isinstance(up, Tensor) and isinstance(down, Tensor) and up.dim() == down.dim() == 3


def stack_flat(experts: Any) -> None:
    """Stack the weights of experts that lie one below another in three matrices of a submodule (DBRX).

    Gate, up and down, each ``[E*I,H]``, become ``gate_up_proj [E,2I,H]`` and ``down_proj [E,H,I]``.
    """
    count = getattr(experts, "num_experts", None)
    for name, part in experts.named_children():
        own = list(part.parameters(recurse=False))
        if not isinstance(count, int) or len(own) != 3 or len({p.shape for p in own}) > 1 or own[0].shape[0] % count:
            continue
        gate, up, down = (p.view(count, -1, p.shape[-1]) for p in own)
        experts.gate_up_proj = nn.Parameter(torch.cat([gate, up], 1), requires_grad=False)
        experts.down_proj = nn.Parameter(down.transpose(1, 2).contiguous(), requires_grad=False)
        experts.act_fn = part.activation_fn
        delattr(experts, name)
        return


def describe_stacked(experts: Any) -> None:
    """Give an undecorated stacked experts module the attributes that the interface's decorator would."""
    experts.has_gate, experts.has_post_expert_norm = True, False
    experts.has_bias = hasattr(experts, "gate_up_proj_bias")
    experts.is_transposed = experts.gate_up_proj.shape[1] == experts.down_proj.shape[2]  # [E,H,2I] beside [E,I,H]
    if not hasattr(experts, "_apply_gate"):
        experts._apply_gate = _gated.__get__(experts)


class SparseBlock(nn.Module):
    """A MoE block whose stock form runs *every* expert on every token, run sparsely: only the chosen k.

    Such blocks scale the experts' input by the routing weight, zero where an expert was not chosen (Llama-4), so the
    sparse form is the same function. The block's gate must be a linear layer with ``top_k``; its score function is
    read off the gate's own output for the chosen experts.
    """

    def __init__(self, block: nn.Module, gate: str, experts: str, shared: str | None) -> None:
        super().__init__()
        self.gate, self.experts = getattr(block, gate), getattr(block, experts)
        self.shared_experts = getattr(block, shared) if shared else None
        self.top_k = int(getattr(block, "top_k", 0) or self.gate.top_k)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """``[..., H]`` -> (``[T,H]``, router logits ``[T,E]``), as the stock block returns."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = self.gate(x)
        weights, index = scores.topk(self.top_k, dim=-1)
        rows = TC.init_routing_v2(x, index)
        order = TC.init_routing_v2(weights.reshape(-1, 1), index.reshape(-1, 1))  # weights in the rows' order
        out = TC.unpermute_tokens(expert_rows(self.experts, rows * order, index), index).sum(1)
        if self.shared_experts is not None:
            out = self.shared_experts(x) + out
        return out, logits


def adapt_experts(model: nn.Module) -> list[str]:
    """Bring stacked experts outside the interface onto the ops. Returns the paths that were adapted.

    Two shapes occur: experts called with (x, index, weights), which only lack the decorator; and experts called with
    the rows of all experts, whose whole block is replaced by :class:`SparseBlock`. Flat ones are stacked first.
    """
    adapted: list[str] = []
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            stack_flat(child)
            if not is_stacked(child) or hasattr(child, "is_transposed"):
                continue
            describe_stacked(child)
            arguments = list(inspect.signature(type(child).forward).parameters)[1:]
            if len(arguments) >= 3:
                child.forward = routed_experts.__get__(child)
            else:
                _replace_block(model, path, module, name)
            adapted.append(f"{path}.{name}")
    return adapted


def _replace_block(model: nn.Module, path: str, block: nn.Module, experts: str) -> None:
    gate = next((n for n, c in block.named_children() if hasattr(c, "top_k") and n != experts), None)
    shared = next((n for n, _ in block.named_children() if "shared" in n), None)
    if gate is None or not path:
        raise TypeError(f"{path or type(block).__name__}: no gate with top_k beside the experts {experts!r}")
    parent, _, leaf = path.rpartition(".")
    replacement = SparseBlock(block, gate, experts, shared).train(block.training)
    setattr(model.get_submodule(parent), leaf, replacement)
