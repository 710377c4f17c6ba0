"""The vision part of a model profile."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tensorcast.profiles.sourced import Frozen
from tensorcast.profiles.vision.images import ImageRule


class VisionPart(Frozen):
    """What a profile whose config is of the language model alone says of its tower, in transformers' words."""

    model_type: str | None = Field(default=None, description="of the class that takes images; else the config's")
    config: dict[str, Any] = Field(default={}, description="vision_config of config.json; else the config's own")
    beside: dict[str, Any] = Field(default={}, description="fields of config.json that size a projector")
    images: ImageRule | None = Field(default=None, description="what preprocessor_config.json says")
    source: str = Field(default="", description="where it is from")
