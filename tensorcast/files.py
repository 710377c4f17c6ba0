"""Files written whole or not at all; checked before the work."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tensorcast.errors import InputError


def check_directory(directory: Path) -> None:
    """Raise :class:`InputError` where ``directory`` cannot be one. Leaves nothing: ask before the work starts."""
    for path in (directory, *directory.parents):
        if path.is_dir():
            if not os.access(path, os.W_OK | os.X_OK):
                raise InputError(f"--out {directory}: no permission to write in {path}")
            with writing("--out", directory):
                os.rmdir(tempfile.mkdtemp(dir=path))  # some file systems take none, whatever permissions say
            return
        if path.exists() or path.is_symlink():
            raise InputError(f"--out {directory}: {path} is {'a file' if path.is_file() else 'there'}, not a directory")


def check_file(flag: str, path: Path) -> None:
    """Raise :class:`InputError` if no file can be written at ``path``. Leaves nothing: ask before the work starts."""
    folder = path.absolute().parent
    if path.is_dir():
        raise InputError(f"{flag} {path}: is a directory, must be a file")
    if not folder.is_dir():
        raise InputError(f"{flag} {path}: no such directory: {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {path}: no permission to write in {folder}")
    with writing(flag, path):
        os.rmdir(tempfile.mkdtemp(dir=folder))


@contextlib.contextmanager
def writing(flag: str, path: Path) -> Iterator[None]:
    """What the system refuses while ``path`` is written as an :class:`InputError` that names it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be written: {error.strerror or error}") from None


def cache_dir() -> Path | None:
    """Folder of the trace cache, or None when it is off."""
    chosen = os.environ.get("TENSORCAST_CACHE", "")
    if chosen.lower() == "off":
        return None
    return _folder(chosen, *map(os.environ.get, ("XDG_CACHE_HOME", "HOME")))


@functools.cache
def _folder(chosen: str, *homes: str | None) -> Path:
    """That of the cache, one object for all who ask where ``homes`` are the same."""
    return Path(chosen or f"{homes[0] or os.path.expanduser('~/.cache')}/tensorcast")


@functools.cache
def digest_of(files: tuple[Path, ...]) -> str:
    """What files hold, as a short text that changes with any of them; one that is not there counts as empty."""
    digest = hashlib.sha256()
    for file in files:
        with contextlib.suppress(OSError):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write to a temporary name beside ``path`` and rename: a reader sees the old file or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(name, path.stat().st_mode if path.exists() else 0o644)  # mkstemp makes it for the owner alone
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
