"""A whole transformers model onto the MoE layer: every MoE block replaced in place, draft blocks included."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator

from torch import Tensor, nn

from tensorcast.errors import InputError
from tensorcast.modeling.moe.groups import MoEGroups
from tensorcast.modeling.moe.layer import MoELayer
from tensorcast.modeling.moe.parallel import MoEOptions, ParallelMoELayer
from tensorcast.modeling.moe.placement import Placement
from tensorcast.profiles.model import MoEFields


def apply_moe(
    model: nn.Module,
    groups: MoEGroups = MoEGroups(),
    options: MoEOptions = MoEOptions(),
    placement: Placement | None = None,
    fields: MoEFields = MoEFields(),
    name: str = "",
    part: str = "",
) -> list[str]:
    """Put a :class:`ParallelMoELayer` in the place of every MoE block of ``model``; returns their paths.

    The phase reaches them all through ``in_phase`` around the model's call. ``part``: the sub-config that ``model`` is
    built from, where ``options.backend`` names some. Raises :class:`InputError` if there is no such block.
    """
    paths: list[str] = []
    for path, block in list(moe_blocks(model, fields)):
        layer = MoELayer(block, fields, model=name or type(model).__name__, layer_index=len(paths), part=part)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _InPlace(block, ParallelMoELayer(layer, groups, options, placement)))
        paths.append(path)
    if not paths:
        raise InputError(f"model {name or type(model).__name__}: no block with experts; name them in moe.experts")
    return paths


def moe_blocks(model: nn.Module, fields: MoEFields = MoEFields()) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every block that holds experts: stacked weights, or a list of that name."""
    for path, module in model.named_modules():
        for name, child in module.named_children():
            down = getattr(child, "down_proj", None)
            stacked = isinstance(down, Tensor) and down.dim() == 3
            if path and (stacked or (isinstance(child, nn.ModuleList) and name == (fields.experts or "experts"))):
                yield path, module


class _InPlace(nn.Module):
    """The block's own calling convention: some return a tuple, of which nothing reads the router's logits."""

    def __init__(self, block: nn.Module, layer: ParallelMoELayer) -> None:
        super().__init__()
        self.layer, self.returns_tuple = layer, _returns_tuple(block)

    def forward(self, hidden_states: Tensor, input_ids: Tensor | None = None) -> Tensor | tuple[Tensor, None]:
        out: Tensor = self.layer(hidden_states, input_ids)
        return (out, None) if self.returns_tuple else out


def _returns_tuple(block: nn.Module) -> bool:
    """Whether the block's ``forward`` returns several values, read off its source."""
    source = textwrap.dedent(inspect.getsource(type(block).forward))
    return any(isinstance(n, ast.Return) and isinstance(n.value, ast.Tuple) for n in ast.walk(ast.parse(source)))
