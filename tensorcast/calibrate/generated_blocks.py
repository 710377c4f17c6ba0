"""Blocks that programs write at the end of hand-written YAML files."""

from __future__ import annotations

from pathlib import Path

import yaml

from tensorcast.errors import InputError
from tensorcast.files import write_atomically
from tensorcast.profiles.engine import EngineFit, EngineProfile
from tensorcast.profiles.store import load_engine

MARKER = "# Fitted by `make engines`, which replaces all that follows; do not edit.\n"


def read_engine(path: Path) -> EngineProfile:
    """The engine profile at ``path``."""
    return load_engine(path.resolve())


def render(fit: EngineFit) -> str:
    """The block as YAML, one line per device."""
    fields = fit.model_dump(exclude_defaults=True)
    served = fields.pop("served", {})
    text = MARKER + yaml.safe_dump({"fitted": fields}, sort_keys=False, width=110, allow_unicode=True)
    if served:
        text += "  served:\n"
    for name, models in served.items():
        text += f"    {name}: [{', '.join(models)}]\n"
    return text


def write_fit(path: Path, fit: EngineFit) -> None:
    """Replace the generated block at the end of an engine profile, or append one; the rest stays byte for byte."""
    replace_block(path, "fitted", MARKER, render(fit))


def replace_block(path: Path, key: str, marker: str, block: str) -> None:
    """Replace what follows ``marker`` in the file by ``block``, which begins with it, or append it.

    The rest stays byte for byte. Raises :class:`InputError` where ``key`` stands among what was written by hand.
    """
    text = path.read_bytes().decode("utf-8")  # as it is, line ends included
    hand, _, _ = text.partition(marker)
    if any(line.startswith(f"{key}:") for line in hand.splitlines()):
        raise InputError(f"{path}: has a {key} block that this program did not write; remove it first")
    if hand and not hand.endswith("\n"):
        hand += "\n"
    separator = "" if marker in text or not hand else "\n"
    write_atomically(path, hand + separator + block)
