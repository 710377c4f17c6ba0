"""Arrays side by side: one entry per deployment, or per candidate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np

Own = TypeVar("Own", bound="Entries")


@dataclass(frozen=True)
class Entries:
    """Base of dataclasses whose fields are arrays of one shape, dictionaries of such arrays by name, or entries."""

    def where(self: Own, chosen: Any) -> Own:
        """The entries that are ``chosen``: an index, several, or a mask."""
        found: dict[str, Any] = {}
        for field in fields(self):
            held = getattr(self, field.name)
            if isinstance(held, dict):
                found[field.name] = {key: value[chosen] for key, value in held.items()}
            elif held is not None:
                found[field.name] = held.where(chosen) if isinstance(held, Entries) else held[chosen]
        return type(self)(**found)

    @classmethod
    def joined(cls: type[Own], parts: Sequence[Own], chosen: Any = slice(None)) -> Own:
        """All entries of ``parts``, one after another, or those of them that are ``chosen``; of dictionaries what the
        first part has."""
        found: dict[str, Any] = {}
        for field in fields(cls):
            held: list[Any] = [getattr(part, field.name) for part in parts]
            if isinstance(held[0], dict):
                found[field.name] = {key: np.concatenate([one[key] for one in held])[chosen] for key in held[0]}
            elif isinstance(held[0], Entries):
                found[field.name] = type(held[0]).joined(held, chosen)
            elif held[0] is not None:
                found[field.name] = np.concatenate(held)[chosen]
        return cls(**found)
