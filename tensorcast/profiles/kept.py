"""What the YAML of a profile said, kept as JSON, which is read ten times faster; in the folder of the trace cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tensorcast.files import cache_dir, write_atomically

if TYPE_CHECKING:
    from tensorcast.profiles.sourced import Frozen

    ProfileT = TypeVar("ProfileT", bound=Frozen)


def kept_file(path: Path, reader: Path) -> Path | None:
    """Where a profile's content is kept; None: nowhere. Its name stands for path, content and the ``reader``'s code."""
    folder = cache_dir()
    if folder is None:
        return None
    digest = hashlib.sha256(str(path.resolve()).encode())
    try:
        digest.update(path.read_bytes() + reader.read_bytes())
    except OSError:  # whoever reads the profile says what is wrong
        return None
    return folder / "profiles" / f"{path.stem}-{digest.hexdigest()[:16]}.json"


def read_kept(kept: Path | None, kind: type[ProfileT]) -> ProfileT | None:
    """The profile, checked like any other; None where nothing is kept, or it is damaged or of other fields."""
    if kept is None:
        return None
    try:
        return kind.model_validate_json(kept.read_bytes())
    except (OSError, ValueError):
        return None


def keep(kept: Path | None, profile: Frozen, content: dict[str, Any]) -> None:
    """Write ``content`` where it makes the same profile when read back: a date, for one, is not JSON."""
    if kept is None:
        return
    with contextlib.suppress(OSError, TypeError, ValueError):  # a read-only home costs time, not the answer
        text = json.dumps(content, separators=(",", ":"))
        if repr(type(profile).model_validate_json(text)) == repr(profile):
            write_atomically(kept, text)
