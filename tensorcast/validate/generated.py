"""Blocks that programs write at the end of hand-written YAML files."""

from __future__ import annotations

from pathlib import Path

from tensorcast.errors import InputError
from tensorcast.trace.cache import write_atomically


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
