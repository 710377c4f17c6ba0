"""Arrays side by side: one entry per deployment, or per candidate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

Own = TypeVar("Own", bound="Entries")


@dataclass(frozen=True)
class Entries:
    """Base of dataclasses whose fields are arrays of one shape, or dictionaries of such arrays by name."""

    def where(self: Own, chosen: Any) -> Own:
        """The entries that are ``chosen``: an index, several, or a mask."""
        return type(self)(**{
            name: {key: value[chosen] for key, value in held.items()} if isinstance(held, dict) else held[chosen]
            for name, held in vars(self).items()
        })

    @classmethod
    def joined(cls: type[Own], parts: Sequence[Own]) -> Own:
        """All entries of ``parts``, one after another; of dictionaries what the first part has."""
        found: dict[str, Any] = {}
        for name, first in vars(parts[0]).items():
            held = [vars(part)[name] for part in parts]
            if isinstance(first, dict):
                found[name] = {key: np.concatenate([one[key] for one in held]) for key in first}
            else:
                found[name] = np.concatenate(held)
        return cls(**found)
