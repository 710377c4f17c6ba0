"""Columns of a row whose prompts have images."""

from __future__ import annotations

import re
from typing import Any

from tensorcast.errors import InputError
from tensorcast.predict.cells import Cells
from tensorcast.serving.encoder import PromptImages, prompt_images

IMAGE_COLUMNS: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "images_per_request": ("images with every prompt; their tokens come beside isl", 0, ("images",)),
    "image_size": ("pixels of each, as 1280x720", None, ()),
    "encoder_tp_mode": ("the vision tower on tensor-parallel ranks: weights or data", None, ("mm_encoder_tp_mode",)),
}
"""Columns: what they say, default, other names."""


def read_images(cells: Cells, steady: bool) -> PromptImages | None:
    """Images of a row's prompts; None where there are none. Raises :class:`InputError` on half a question, and for
    requests that come one by one (not ``steady``)."""
    count = cells.whole("images_per_request", least=0) or None
    if count and not steady:
        raise InputError(f"images_per_request {count}: is of steady loads; this row's requests come one by one")
    try:
        return prompt_images(count, cells.text("image_size", None), cells.text("encoder_tp_mode", None))
    except InputError as error:  # names of columns, not of flags
        raise InputError(re.sub("--([a-z-]+)", lambda flag: flag[1].replace("-", "_"), str(error))) from None
