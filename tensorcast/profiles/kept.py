"""Profiles as they were checked, kept in the folder of the trace cache: a second reading checks nothing again."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tensorcast.files import cache_dir, digest_of, write_atomically

if TYPE_CHECKING:
    from tensorcast.profiles.sourced import Frozen

    ProfileT = TypeVar("ProfileT", bound=Frozen)


_SOURCES = tuple(sorted(Path(__file__).parent.rglob("*.py")))
"""The code that checks profiles."""


def kept_file(path: Path, release: str = "") -> Path | None:
    """Where a profile is kept; None: nowhere. Its name stands for path and content, for the ``release`` that it is of,
    and for the code that checks it."""
    folder = cache_dir()
    if folder is None:
        return None
    import pydantic  # makes objects out of what a file says

    try:
        said = f"{pydantic.VERSION} {digest_of(_SOURCES)} {path.resolve()} {release}".encode() + path.read_bytes()
    except OSError:  # whoever reads the profile says what is wrong
        return None
    return folder / "profiles" / f"{path.stem}-{hashlib.sha256(said).hexdigest()[:16]}.pickle"


class _Profiles(pickle.Unpickler):
    """Makes objects of this package's classes and of no others, whatever a file asks for."""

    def find_class(self, module: str, name: str) -> Any:
        # a module of this package also holds what it imports, so the class is asked where it was defined
        found = super().find_class(module, name) if module.startswith("tensorcast.profiles.") else None
        if not isinstance(found, type) or found.__module__ != module:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a profile")
        return found


def read_kept(kept: Path | None, kind: type[ProfileT]) -> ProfileT | None:
    """The profile; None where nothing is kept, or the file is damaged."""
    if kept is None:
        return None
    if isinstance(known := _known.get(kept), kind):
        return known
    with contextlib.suppress(Exception):  # whatever a damaged file makes the reader do, the profile is read anew
        with kept.open("rb") as file:
            profile = _Profiles(file).load()
        if isinstance(profile, kind):
            return _remembered(kept, profile)
    return None


_known: dict[Path, Frozen] = {}
"""What this process has read, by where it is kept."""


def _remembered(kept: Path, profile: ProfileT) -> ProfileT:
    if "config" in type(profile).model_fields:  # a plain dict: spoiling one must not reach the next reader
        return profile
    while len(_known) >= MOST_SHARED:
        del _known[next(iter(_known))]
    _known[kept] = profile
    return profile


def kept_as(profile: Frozen) -> str:
    """The name of the file that a profile is kept in, which stands for its content; empty for one that was made."""
    return next((path.stem for path, one in _known.items() if one is profile), "")


_shared: list[Frozen] = []

MOST_SHARED = 64
"""Profiles whose first object serves all that read the same."""


def same(profile: ProfileT) -> ProfileT:
    """The first profile of this content that was asked about: what is kept by a profile's identity is kept for all."""
    if any(one is profile for one in _shared):
        return profile
    for one in _shared:
        if one == profile:
            return one
    _shared.append(profile)
    del _shared[:-MOST_SHARED]
    return profile


def keep(kept: Path | None, profile: Frozen) -> None:
    if kept is not None:
        with contextlib.suppress(OSError):  # a read-only home costs time, not the answer
            write_atomically(kept, pickle.dumps(profile, protocol=5))
        _remembered(kept, profile)
