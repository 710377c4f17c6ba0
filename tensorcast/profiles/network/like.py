"""Networks that profiles describe, for the ``config.json`` of another release of their type."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensorcast.errors import InputError
from tensorcast.profiles.network.unshipped import refused_type


def described_like(model_type: str, files: Iterable[Path], root: Path) -> dict[str, Any]:
    """``network`` and ``moe`` of the first profile among ``files`` that describes a network of this type, or nothing.

    A description names fields of a config, so it reads that of any release of the type. Raises :class:`InputError` for
    a type that cannot be priced, as ``root`` says, where nothing describes it.
    """
    import yaml

    own = re.compile(rf"^  model_type: {re.escape(model_type)}$", re.MULTILINE)
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        if "\nnetwork:" in text and own.search(text):
            try:
                content = yaml.safe_load(text)
            except yaml.YAMLError:  # whoever asks for this profile is told what is wrong with it
                continue
            return {name: content[name] for name in ("network", "moe") if name in content}
    if why := refused_type(model_type, root):
        raise InputError(f"model_type {model_type} has no price: {why}")
    return {}
