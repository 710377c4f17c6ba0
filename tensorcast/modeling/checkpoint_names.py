"""Names that the weights of a model have in its checkpoints, by transformers' own tables of renamed weights."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter


def stored_names(model: nn.Module, model_type: str) -> dict[str, tuple[str, ...]]:
    """Modules of a checkpoint that hold each parameter, where they are not its own; of experts those of the first.

    ``model_type`` is the config's, which of a multimodal model is not its text model's.
    """
    own = getattr(getattr(model, "config", None), "model_type", None)
    if isinstance(model, PreTrainedModel):
        known = [*get_model_conversion_mapping(model, add_legacy=False)]
    else:  # a decoder under a head of ours, or a class that a profile names
        known = get_checkpoint_conversion_mapping(own) or []
    known += (get_checkpoint_conversion_mapping(model_type) or []) if model_type != own else []
    back = [_reversed(rename) for rename in reversed(known)]
    back = [rename for rename in back if rename is not None]
    found = {}
    for name, _ in model.named_parameters():
        names = _before(name, back)
        modules = tuple(dict.fromkeys(re.sub(r"\.(weight|bias)$", "", other) for other in names if other != name))
        if modules:
            found[name] = modules
    return found


def _reversed(rename: Any) -> Any:
    try:
        return rename.reverse_transform()
    except (ValueError, KeyError, NotImplementedError):  # one that cannot be turned round
        return None


def _before(name: str, back: list[Any]) -> list[str]:
    """The checkpoint's names of a parameter: its parts first, as the class puts them together last."""
    names = [name]
    for parts in (True, False):
        for rename in back:
            if isinstance(rename, WeightConverter) == parts:
                names = [other for one in names for other in _renamed(one, rename)]
    return names


def _renamed(name: str, rename: Any) -> list[str]:
    renamed, matched = rename.rename_source_key(name)
    if matched is None:
        return [name]
    first, *others = rename.target_patterns
    return [other.replace("*", "0").replace("\\.", ".") for other in
            (renamed, *(renamed.replace(first, another) for another in others))]  # fmt: skip
