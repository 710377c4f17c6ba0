"""What a model says of its vision tower and of the images that it takes."""

from __future__ import annotations

from typing import Any, NamedTuple

from tensorcast.errors import InputError
from tensorcast.profiles.config_values import text_of
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.vision.images import EncodedImage, ImageRule
from tensorcast.profiles.vision.part import VisionPart
from tensorcast.profiles.vision.processors import OF_TYPE, rule_of_type


class VisionSaid(NamedTuple):
    """All that is said of a model's tower: what transformers' class is built from, and how images are cut."""

    model_type: str
    vision_config: dict[str, Any]
    beside: dict[str, Any]
    hidden_size: int
    images: ImageRule | None


def vision_of(model: ModelProfile) -> VisionSaid:
    """Of a profile or a model's own config. Raises :class:`InputError` where the model takes no images."""
    part, config = model.vision or VisionPart(), model.config
    vision = part.config or config.get("vision_config")
    model_type = part.model_type or str(config.get("model_type", ""))
    if not isinstance(vision, dict):
        raise InputError(f"model {model.name}: config.json has no vision_config: it takes no images")
    if not part.config and not (set(vision) & {"patch_size", "image_size"} or model_type in OF_TYPE):
        raise InputError(
            f"model {model.name}: its vision_config says no patch_size, and model_type {model_type!r} is not known for "
            "images"
        )
    beside = {
        name: value for name, value in config.items()
        if name.startswith(("projector", "multimodal_projector", "spatial_merge", "vision_feature", "merged"))
    }
    hidden = text_of(config).get("hidden_size", config.get("hidden_size", 0))
    images = part.images or rule_of_type(model_type, vision)
    return VisionSaid(model_type, vision, part.beside or beside, int(hidden), images)


def sees(model: ModelProfile) -> bool:
    """Whether a model takes images through a tower that its profile or a type known here describes."""
    known = str(model.config.get("model_type", "")) in OF_TYPE and isinstance(model.config.get("vision_config"), dict)
    return known or bool(model.vision and model.vision.config)


def encoded_image(model: ModelProfile, width: int, height: int) -> EncodedImage:
    """What an image of these pixels is to a model. Raises :class:`InputError` where that is not known."""
    rule = vision_of(model).images
    if rule is None:
        raise InputError(
            f"model {model.name}: how its processor cuts images is not known: no preprocessor_config.json with a known "
            "image_processor_type beside its config.json"
        )
    return rule.encoded(width, height)
