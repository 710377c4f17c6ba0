"""The part of a stock multimodal class that turns images into embeddings, on meta: tower, merger, projector.

What goes in is as the class's own image processor makes it, of sizes that are asked for: patches in rows beside their
grid (Qwen, GLM, Kimi, MiniMax), patches beside their positions (Gemma), or pixels (Llama, Step, Pixtral).
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from tensorcast.errors import InputError
from tensorcast.modeling.config import nested
from tensorcast.modeling.experts import NAME
from tensorcast.profiles.config_values import LANGUAGE_PARTS
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.vision.said import vision_of

NOT_OF_IMAGES = ("audio", "language", "text", "lm_head", "talker", "video")
"""Words in the names of parts that images do not pass."""


class Tower(nn.Module):
    """A multimodal model's way from pixels to embeddings of its language model."""

    owner: Any

    def __init__(self, owner: Any, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        for name, child in owner.named_children():
            if not any(word in name for word in NOT_OF_IMAGES):
                self.add_module(name, child)
        # the class's own method, of the module that it belongs to
        object.__setattr__(self, "owner", owner)

    def forward(self, **inputs: Any) -> Any:
        """What ``get_image_features`` of the class gives, through a projector that it leaves to the class's own
        ``forward`` (Llama-4)."""
        entered = set[nn.Module]()
        hooks = [child.register_forward_pre_hook(lambda module, _: entered.add(module)) for child in self.children()]
        try:
            found = self.owner.get_image_features(**inputs)
            left = [child for name, child in self.named_children() if "projector" in name and child not in entered]
            return left[0](found.last_hidden_state) if left else found
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def takes(self) -> frozenset[str]:
        """Arguments of the class's method."""
        return frozenset(inspect.signature(self.owner.get_image_features).parameters)

    @property
    def vision(self) -> PreTrainedConfig:
        return vision_part(self.config)


def vision_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the tower inside a multimodal one."""
    found = getattr(config, "vision_config", None)
    if not isinstance(found, PreTrainedConfig):
        raise InputError(f"model_type {config.model_type!r}: transformers' class has no vision_config")
    return found


def multimodal_config(profile: ModelProfile) -> PreTrainedConfig:
    """Config of the class around a profile's tower. Raises :class:`InputError` where the model takes no images.

    Of the language model it says no more than the width that images are projected to: no other part is run.
    """
    said = vision_of(profile)
    named = [name for name in profile.config.get("architectures") or () if isinstance(name, str)]
    model_type = said.model_type
    if model_type not in _classes():
        model_type = next((kind for kind, cls in _classes().items() if cls in named), model_type)
    if model_type not in _classes() or model_type not in CONFIG_MAPPING:
        raise InputError(
            f"model {profile.name}: transformers {transformers.__version__} has no class of model_type {model_type!r} "
            "that takes images"
        )
    kind = CONFIG_MAPPING[model_type]
    text = next((name for name in LANGUAGE_PARTS if name in kind.sub_configs), "text_config")
    vision = copy.deepcopy(said.vision_config)  # transformers writes into it
    values = {**said.beside, "vision_config": vision, text: {"hidden_size": said.hidden_size}}
    try:
        return kind(**values)
    except Exception as reason:
        line = " ".join(str(reason).split())[:200]
        raise InputError(f"model {profile.name}: transformers rejects the vision part of its config: {line}") from None


def _classes() -> dict[str, str]:
    found = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return {kind: name for kind, name in found.items() if isinstance(name, str)}


def build_tower(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> Tower:
    """The tower of a multimodal ``config`` on meta, with our attention function; its language model is left out."""
    name = _classes()[config.model_type]
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"):
            whole = getattr(transformers, name)._from_config(config, dtype=dtype, attn_implementation="eager")
    except Exception as reason:
        line = " ".join(str(reason).split())[:200]
        raise InputError(f"model_type {config.model_type!r}: {name} cannot be built: {line}") from None
    for one in nested(whole.config):
        object.__setattr__(one, "_attn_implementation_internal", NAME)
    owner = next((m for m in _owners(whole) if callable(getattr(m, "get_image_features", None))), None)
    if owner is None:
        raise InputError(f"model_type {config.model_type!r}: {name} has no get_image_features")
    tower = Tower(owner, whole.config)
    tower.eval().requires_grad_(False)
    return tower


def _owners(whole: Any) -> Iterator[PreTrainedModel]:
    """The innermost first: the class with a head hands images on."""
    if isinstance(getattr(whole, "model", None), PreTrainedModel):
        yield whole.model
    yield whole


def merged(tower: Tower) -> int:
    """Patches on a side that become one token, where the config says so."""
    for config in (tower.vision, tower.config):
        for name in ("spatial_merge_size", "pooling_kernel_size"):
            if isinstance(value := getattr(config, name, None), int):
                return value
    kernel = getattr(tower.vision, "merge_kernel_size", None)
    return int(kernel[0]) if isinstance(kernel, (list, tuple)) else 1


def patch_side(vision: PreTrainedConfig) -> int:
    """Pixels on a side of a patch."""
    value: Any = vision.patch_size
    return int(value[0]) if isinstance(value, (list, tuple)) else int(value)


def inputs_of(tower: Tower, images: int, height: int, width: int) -> dict[str, Any]:
    """What the class takes of ``images`` of ``height`` x ``width`` patches: pixels on meta, grids and positions as they
    are."""
    vision, takes = tower.vision, tower.takes
    patch, channels = patch_side(vision), _channels(vision)
    if "image_grid_thw" in takes:
        shape = images * height * width, *_row_of_patch(tower)
        return {"pixel_values": _pixels(*shape), "image_grid_thw": torch.tensor([[1, height, width]] * images)}
    if "image_position_ids" in takes:
        at = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1).reshape(1, -1, 2)
        return {
            "pixel_values": _pixels(images, height * width, channels * patch**2),
            "image_position_ids": at.expand(images, -1, -1),
        }
    found: dict[str, Any] = {"pixel_values": _pixels(images, channels, height * patch, width * patch)}
    if "image_sizes" in takes:
        found["image_sizes"] = torch.tensor([[height * patch, width * patch]] * images)
    return found


def _pixels(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def _channels(vision: PreTrainedConfig) -> int:
    return int(getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3)


def _row_of_patch(tower: Tower) -> tuple[int, ...]:
    """What stands for one patch: its pixels in a square or in a row, all that the first matrix reads of it."""
    first = next(m for m in tower.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d, nn.Linear)))
    if isinstance(first, nn.Conv2d):
        return first.in_channels, *first.kernel_size
    if isinstance(first, nn.Conv3d):
        return (first.in_channels * math.prod(first.kernel_size),)
    return (first.in_features,)
