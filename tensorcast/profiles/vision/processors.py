"""Rules of images by the image processor that a model names, and those that its type has where it names none.

Limits are what a file ``preprocessor_config.json`` says; else transformers' defaults of the class (5.23.0, its
``image_processing_*.py``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tensorcast.errors import InputError
from tensorcast.profiles.vision.images import Grid, ImageRule, Limited, LongestSide, Pooled, Tiles, Views

FILE = "preprocessor_config.json"
Said = Mapping[str, Any]


def _grid(said: Said, *, patch: int, least: int, most: int, frames: int = 1) -> Grid:
    """``frames``: as many as an image counts for in the limits."""
    size: Said = said["size"] if isinstance(said.get("size"), dict) else {}
    least_pixels = said.get("min_pixels") or size.get("shortest_edge") or least
    most_pixels = said.get("max_pixels") or size.get("longest_edge") or most
    return Grid(
        patch=said.get("patch_size", patch), merge=said.get("merge_size", 2), least_pixels=least_pixels // frames,
        most_pixels=most_pixels // frames,
    )


def _limited(said: Said) -> Limited:
    said = {**said, **(said["media_proc_cfg"] if isinstance(said.get("media_proc_cfg"), dict) else {})}
    side = said.get("patch_limit_on_one_side") or (said.get("size") or {}).get("max_height", 512)
    return Limited(
        rule="limited", patch=said.get("patch_size", 14),
        merge=said.get("merge_kernel_size", said.get("merge_size", 2)),
        most_patches=said.get("in_patch_limit", said.get("max_patches", 16384)), most_side_patches=side,
    )


def _pooled(said: Said) -> Pooled:
    return Pooled(
        rule="pooled", patch=said.get("patch_size", 16), pool=said.get("pooling_kernel_size", 3),
        most_tokens=said.get("max_soft_tokens", 280),
    )


def _tiles(said: Said) -> Tiles:
    tile = (said.get("size") or {}).get("height", 336)
    # patches of 14, four of which become a token (pixel_shuffle_ratio 0.5)
    return Tiles(
        rule="tiles", tile=tile, patch=14, most_tiles=said.get("max_patches", 16), tile_tokens=(tile // 14) ** 2 // 4
    )


def _views(said: Said) -> Views:
    return Views(
        rule="views", whole=(said.get("size") or {}).get("height", 728), window=said.get("patch_size", 504),
        most_side=said.get("max_image_size", 3024), patch=14, stride=4,
    )


def _longest_side(said: Said) -> LongestSide:
    patch = said.get("patch_size", 16)
    longest = (said.get("size") or {}).get("longest_edge", 1024)
    return LongestSide(
        rule="longest_side", patch=patch["height"] if isinstance(patch, dict) else patch,
        merge=said.get("spatial_merge_size", 1), longest=longest,
    )


PROCESSORS: dict[str, Callable[[Said], ImageRule]] = {
    "Qwen2VLImageProcessor": partial(_grid, patch=14, least=56 * 56, most=28 * 28 * 1280),
    "Qwen3VLImageProcessor": partial(_grid, patch=16, least=65536, most=16777216),
    "Glm4vImageProcessor": partial(_grid, patch=14, least=112 * 112, most=28 * 28 * 15000, frames=2),
    "MiniMaxM3VLImageProcessor": partial(_grid, patch=14, least=4 * 28 * 28, most=451584),
    "Kimi_K25ImageProcessor": _limited, "KimiK25VisionProcessor": _limited,
    "Gemma4ImageProcessor": _pooled, "Llama4ImageProcessor": _tiles, "Step3p7ImageProcessor": _views,
    "PixtralImageProcessor": _longest_side,
}  # fmt: skip
"""By class; a name may end in ``Fast`` or ``Pil``."""

OF_TYPE = {
    "qwen2_vl": "Qwen2VLImageProcessor", "qwen2_5_vl": "Qwen2VLImageProcessor", "qwen3_vl": "Qwen3VLImageProcessor",
    "qwen3_vl_moe": "Qwen3VLImageProcessor", "qwen3_5": "Qwen3VLImageProcessor", "qwen3_5_moe": "Qwen3VLImageProcessor",
    "glm4v": "Glm4vImageProcessor", "glm4v_moe": "Glm4vImageProcessor", "minimax_m3_vl": "MiniMaxM3VLImageProcessor",
    "kimi_k25": "Kimi_K25ImageProcessor", "gemma4": "Gemma4ImageProcessor", "llama4": "Llama4ImageProcessor",
    "step3p7": "Step3p7ImageProcessor", "mistral3": "PixtralImageProcessor", "pixtral": "PixtralImageProcessor",
    "mistral_large4": "PixtralImageProcessor",
}  # fmt: skip
"""What files of these types name, or would. Qwen's of 3 and 3.5 name the class of 2 with limits of their own."""


def rule_of_type(model_type: str, vision: Said) -> ImageRule | None:
    """The rule of a model's type without a file beside it; None where none is known. ``vision``: its vision config."""
    name = OF_TYPE.get(model_type)
    if name is None:
        return None
    patch, merge = vision.get("patch_size"), vision.get("spatial_merge_size")
    said = {} if patch is None or name not in ("Qwen2VLImageProcessor", "Qwen3VLImageProcessor") else {
        "patch_size": patch, "merge_size": merge or 2
    }
    return PROCESSORS[name](said)


def rule_of_folder(folder: Path) -> ImageRule | None:
    """The rule that the file of a model's folder says, None where there is none.

    Raises :class:`InputError`, one line, where it says what is not known.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        said = json.loads(path.read_text("utf-8"))
        name = str(said.get("image_processor_type") or said.get("processor_class"))
        known = PROCESSORS.get(name.removesuffix("Fast").removesuffix("Pil"))
        if known is None:
            return None
        size = said.get("size")
        if name.startswith("Qwen2VL") and isinstance(size, dict) and said.get("patch_size") == 16:
            known = PROCESSORS["Qwen3VLImageProcessor"]
        return known(said).model_copy(update={"source": FILE})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ValidationError) as error:
        line = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: not what an image processor's file says: {line}") from None


def said_beside(config: Said, folder: Path) -> dict[str, Any]:
    """The field ``vision`` of a profile of a folder's ``config``, where a file beside it says how images are cut."""
    rule = rule_of_folder(folder) if "vision_config" in config else None
    return {} if rule is None else {"vision": {"images": rule}}
