"""Models without a profile that people ask for by name, and types of models that cannot be priced: why."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

FILE = "unshipped.yaml"
"""In the folder of shipped profiles."""


def why_unshipped(name: str, root: Path) -> str:
    """What is to be done about a model ``name`` that ships with no profile; empty where nothing is known of it."""
    own = re.sub(r"[ _]+", "-", name.rpartition("/")[2].lower())
    for entry in _entries(root):
        if any(own.startswith(one) for one in entry["names"]):
            if "refused" in entry:
                return f"model {name!r} has no price: {entry['refused']}"
            return f"model {name!r} ships with no profile: give the folder with its config.json (type {entry['type']})"
    return ""


def refused_type(model_type: str, root: Path) -> str:
    """Why no model of this ``model_type`` has a price; empty where it may have one."""
    return next((str(one["refused"]) for one in _entries(root) if one["type"] == model_type and "refused" in one), "")


def _entries(root: Path) -> list[dict[str, Any]]:
    import yaml

    entries: list[dict[str, Any]] = yaml.safe_load((root / FILE).read_text(encoding="utf-8"))
    return entries
