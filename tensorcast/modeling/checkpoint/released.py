"""What named releases store of a model that is known: ``profiles/checkpoints/released.yaml``."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from pydantic import Field

from tensorcast.profiles import store
from tensorcast.profiles.sourced import Frozen


class Stored(Frozen):
    """One release, or several that are stored alike."""

    name: str = Field(min_length=3, description="regular expression of the whole name, in small letters")
    said: str = Field(min_length=3, description="how it is stored, after the word 'stored'")
    source: str = Field(default="", description="if not the file's")
    sizes: dict[str, int] = Field(default={}, description="of the config, where the release changed them")
    entry: dict[str, Any] = Field(description="its quantization_config")


class Released(Frozen):
    """All that are known; the first whose name matches counts."""

    name: str
    source: str
    stored: tuple[Stored, ...]


@cache
def _released() -> Released:
    paths = (root / "checkpoints" / "released.yaml" for root in store.profile_roots())
    return store._read(next(path for path in paths if path.is_file()), Released)


def released(name: str) -> Stored | None:
    """What is known of a release by its ``name``; None if nothing is."""
    wanted = name.casefold().strip("/")
    return next((one for one in _released().stored if re.fullmatch(one.name, wanted)), None)


PUBLISHES = {"NVIDIA": "nvfp4"}
"""Vendors of devices, and the precision in which they publish others' models (``nvidia/Kimi-K2.5-NVFP4``)."""

OWN = ("FP8", "MXFP8")
"""What names of releases end in that vendors of models make of their own, in FP8 (``MiniMaxAI/MiniMax-M3-MXFP8``)."""


def published(vendor: str, hf_id: str) -> tuple[str, Stored] | None:
    """Name of the release that a ``vendor`` of devices makes of a model, and what it stores; None for none known."""
    name = f"{vendor.lower()}/{hf_id.rpartition('/')[2]}-{PUBLISHES.get(vendor, '').upper()}"
    return None if vendor not in PUBLISHES or (found := released(name)) is None else (name, found)


def published_in_fp8(hf_id: str) -> tuple[str, Stored] | None:
    """Name of the FP8 release that a model's own vendor makes of it, and what that stores; None for none known."""
    named = ((name, released(name)) for name in (f"{hf_id}-{format_}" for format_ in OWN))
    return next(((name, found) for name, found in named if found is not None), None)
