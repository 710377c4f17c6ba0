"""Registries: entries by name, of which no name may have two."""

from __future__ import annotations

from typing import TypeVar

Entry = TypeVar("Entry")


class Registry(dict[str, Entry]):
    """Entries by name; setting a name a second time raises :class:`ValueError`, as two modules would then disagree."""

    def __setitem__(self, name: str, entry: Entry) -> None:
        if name in self:
            raise ValueError(f"{name!r} is registered already")
        super().__setitem__(name, entry)
