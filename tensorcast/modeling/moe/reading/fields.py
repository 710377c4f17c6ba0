"""Names of a MoE block's attributes: what the profile says, checked against the block, and what the block shows."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from tensorcast.errors import InputError
from tensorcast.modeling.moe.reading.stacking import names_on
from tensorcast.profiles.model import MoEFields

MODULES = ("gate", "experts", "shared_experts", "shared_experts_gate", "latent_down", "latent_up")
SEVERAL = ("before", "after", "after_block")
VALUES = ("top_k", "norm_topk_prob", "num_experts", "routed_scale", "bias")
"""Fields that name a module of the block, several modules of it, and a value on it, its gate or its experts."""


def at(module: Any, path: str) -> Any:
    """What lies at a dotted path of a module (``.`` is the module itself), or None."""
    found = module
    for part in path.split(".") if path != "." else ():
        found = getattr(found, part, None)
    return found


def looked_up(block: nn.Module, gate: Any, experts: Any, path: str | None) -> Any:
    """A value on the block, else on its gate, else on its experts; None where it is on none."""
    values = (at(part, path) for part in (block, gate, experts) if part is not None and path)
    return next((value for value in values if value is not None), None)


def check_fields(block: nn.Module, given: MoEFields, model: str) -> None:
    """Every name that the profile gives exists on the block: else one line that lists what does.

    ``top_k`` alone may be missed here: :class:`MoELayer` says so with what it looked for.
    """
    name = model or type(block).__name__
    for role in (*MODULES, *SEVERAL):
        value = getattr(given, role)
        for path in value if isinstance(value, tuple) else (value,) if value else ():
            if not isinstance(at(block, path), nn.Module):
                children = ", ".join(path for path, _ in block.named_children())
                raise InputError(f"model {name}: moe.{role} = {path!r}, but its MoE block has {children}")
    gate, experts = (at(block, path) if path else None for path in (given.gate, given.experts))
    for role in VALUES:
        path = getattr(given, role)
        if path and looked_up(block, gate, experts, path) is None:
            shown = dict.fromkeys(n for part in (block, gate, experts) if part is not None for n in names_on(part))
            if role == "top_k":
                raise InputError(
                    f"model {name}: field top_k ({path!r}) is on neither its MoE block nor its gate, which have "
                    f"{', '.join(shown)}; set moe.top_k in the model profile"
                )
            raise InputError(f"model {name}: moe.{role} = {path!r}, but its MoE block has {', '.join(shown)}")
    if given.num_experts and experts is not None:
        said = int(looked_up(block, gate, experts, given.num_experts))
        if isinstance(experts, nn.ModuleList) and said != len(experts):
            raise InputError(f"model {name}: moe.num_experts = {given.num_experts!r} is {said}, "
                             f"but {given.experts} holds {len(experts)}")  # fmt: skip


def find_fields(block: nn.Module, given: MoEFields = MoEFields(), model: str = "") -> MoEFields:
    """Field names of a block: what the profile gives, else what the block shows. A missing one is an error."""
    name = model or type(block).__name__
    check_fields(block, given, model)
    children = dict(block.named_children())
    experts = given.experts or next((n for n, c in children.items() if holds_experts(c, n)), None)
    if experts is None:
        raise InputError(f"model {name}: its MoE block has no experts; name them in moe.experts")
    shared_gate = given.shared_experts_gate or next((n for n in children if "shared" in n and "gate" in n), None)
    shared = given.shared_experts or next((n for n in children if "shared" in n and n != shared_gate), None)
    down, up = _latent(children, given, name)
    taken = {experts, shared, shared_gate, down, up, *given.before, *given.after, *given.after_block}
    rest = [n for n in children if n not in taken]
    gate = given.gate or next((n for n in rest if hasattr(children[n], "top_k")), None)
    gate = gate or next((n for n in rest if n in ("gate", "router") or isinstance(children[n], nn.Linear)), None)
    if gate is None:
        raise InputError(f"model {name}: its MoE block has no gate; name it in moe.gate")
    found = {"gate": gate, "experts": experts, "shared_experts": shared, "shared_experts_gate": shared_gate}
    return given.model_copy(update={**found, "latent_down": down, "latent_up": up})


def holds_experts(child: nn.Module, name: str) -> bool:
    """Whether a block's child of this name is its experts: a list, or stacked weights."""
    if isinstance(child, nn.ModuleList):
        return True
    down = getattr(child, "down_proj", None)
    return "shared" not in name and (
        (isinstance(down, torch.Tensor) and down.dim() == 3)
        or (name == "experts" and hasattr(child, "num_experts") and takes_routing(child))
    )


def takes_routing(experts: nn.Module) -> bool:
    """Whether experts are called with rows, indices and weights."""
    return len(inspect.signature(type(experts).forward).parameters) >= 4


def _latent(children: dict[str, nn.Module], given: MoEFields, name: str) -> tuple[str | None, str | None]:
    """The projections around latent experts, by their name and direction."""
    linear: dict[str, Any] = {n: c for n, c in children.items() if "latent" in n and isinstance(c, nn.Linear)}
    narrow = {n: c.out_features < c.in_features for n, c in linear.items()}
    down = given.latent_down or next((n for n in narrow if narrow[n]), None)
    up = given.latent_up or next((n for n in narrow if not narrow[n]), None)
    if bool(down) != bool(up):
        raise InputError(
            f"model {name}: its MoE block has one latent projection, {down or up!r}; "
            f"name both in moe.latent_down and moe.latent_up"
        )
    return down, up
