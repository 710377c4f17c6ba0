"""A whole transformers model onto the MoE layer: every MoE block replaced in place, draft blocks included."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from tensorcast.errors import InputError
from tensorcast.modeling.moe.groups import MoEGroups
from tensorcast.modeling.moe.parallel import MoEOptions
from tensorcast.modeling.moe.placement import Placement
from tensorcast.modeling.moe.reading.fields import at, check_fields, holds_experts
from tensorcast.modeling.moe.rewrite import rewrite
from tensorcast.profiles.model import MoEFields


def apply_moe(
    model: nn.Module,
    groups: MoEGroups = MoEGroups(),
    options: MoEOptions = MoEOptions(),
    *,
    placement: Placement | None = None,
    fields: MoEFields = MoEFields(),
    name: str = "",
    part: str = "",
) -> list[str]:
    """Put a :class:`ParallelMoELayer` in the place of every MoE block of ``model``; returns their paths.

    The phase reaches them all through ``in_phase`` around the model's call. ``part``: the sub-config that ``model`` is
    built from, where ``options.backend`` names some. Every kind of block is
    compared with what takes its place (:mod:`tensorcast.modeling.moe.rewrite`). Raises :class:`InputError` if there is
    no such block, or if one cannot be rewritten so that it stays equal.
    """
    paths: list[str] = []
    for path, block in list(moe_blocks(model, fields)):
        kind = name or type(model).__name__
        new = rewrite(block, groups, options, placement, fields, model=kind, layer_index=len(paths), part=part)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
        paths.append(path)
    if not paths:
        raise InputError(f"model {name or type(model).__name__}: no block with experts; name them in moe.experts")
    return paths


def check_blocks(model: nn.Module, fields: MoEFields, name: str) -> None:
    """Every name that the profile gives is there on every kind of block: else :class:`InputError`, one line."""
    if fields == MoEFields():
        return
    if wrong := [key for key in fields.options if key not in MoEOptions.__dataclass_fields__]:
        known = ", ".join(MoEOptions.__dataclass_fields__)
        raise InputError(f"model {name}: moe.options.{wrong[0]}: no such option; known: {known}")
    blocks = {type(block): block for _, block in moe_blocks(model, fields)}
    if not blocks and fields.block:
        blocks = {type(m): m for path, m in model.named_modules() if path and _is_named(path, m, fields)}
    for block in (blocks or {type(block): block for _, block in moe_blocks(model)}).values():
        check_fields(block, fields, name)
    if not blocks:
        said = f"moe.block = {fields.block!r}" if fields.block else f"moe.experts = {fields.experts!r}"
        kinds = dict.fromkeys(type(m).__name__ for m in model.modules() if any(True for _ in m.children()))
        raise InputError(f"model {name}: {said}, but the modules that hold others are {', '.join(kinds)}")


def moe_blocks(model: nn.Module, fields: MoEFields = MoEFields()) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every block that holds experts: as the profile names them, stacked, or a list ``experts``."""
    for path, module in model.named_modules():
        holds = isinstance(at(module, fields.experts), nn.Module) if fields.experts else _shows(module)
        if path and holds and _is_named(path, module, fields):
            yield path, module


def _is_named(path: str, module: nn.Module, fields: MoEFields) -> bool:
    """Whether the profile, where it names the block, means this module: by its class, or by the end of its path."""
    return fields.block is None or f".{path}".endswith(f".{fields.block}") or type(module).__name__ == fields.block


def _shows(module: nn.Module) -> bool:
    return any(
        holds_experts(child, name) and (name == "experts" or not isinstance(child, nn.ModuleList))
        for name, child in module.named_children()
    )
