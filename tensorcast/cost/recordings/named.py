"""Recordings by what ``--routing`` says: a file, several, one for each phase, or a shipped one's name."""

from __future__ import annotations

import functools
from pathlib import Path

from tensorcast.cost.recordings.formats import read_counts
from tensorcast.cost.recordings.recording import EITHER, PHASES, LayerCounts, Recording, merged
from tensorcast.errors import InputError, unknown_name
from tensorcast.profiles.store import profile_roots

PREFIX = "recorded:"


def recording(text: str) -> Recording:
    """The recording that ``text`` names, without :data:`PREFIX`.

    A file or folder (:mod:`tensorcast.cost.recordings.formats`), the name of a shipped one, or several of these:
    ``A.json,B.json`` are added up, ``prefill=A.json,decode=B.json`` are kept apart. Raises :class:`InputError`.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise InputError(f"--routing {PREFIX}: needs a file or a name: {', '.join(shipped()) or 'none is shipped'}")
    found: dict[str, list[LayerCounts]] = {}
    sources = []
    for part in parts:
        phase, _, rest = part.partition("=")
        if phase not in PHASES:
            phase, rest = EITHER, part
        one = _one(rest)
        sources.append(one.source)
        for own, counts in one.phases.items():
            found.setdefault(phase or own, []).append(one.of(phase) if phase else counts)
            if phase:
                break
    phases = {phase: merged(f"--routing {text}", counts) for phase, counts in found.items()}
    return Recording(text, phases, "; ".join(dict.fromkeys(filter(None, sources))))


def shipped() -> dict[str, Path]:
    """Files of recorded popularity by name: those of a user's own profiles hide shipped ones."""
    found: dict[str, Path] = {}
    for root in reversed(profile_roots()):
        found |= {path.stem: path for path in sorted((root / "expert_load").glob("*.csv"))}
    return found


def _one(text: str) -> Recording:
    path = Path(text)
    if path.exists():
        status = path.stat()
        return _read(path, status.st_mtime_ns, status.st_size)
    for root in profile_roots():
        if (own := root / "expert_load" / f"{text}.csv").is_file():
            return _read(own, 0, 0)
    if path.suffix or "/" in text:
        read_counts(path)  # says what is wrong
    raise unknown_name("recording", text, shipped())


@functools.lru_cache(maxsize=64)
def _read(path: Path, changed: int, size: int) -> Recording:
    """A file's counts, read once as long as it is the same."""
    lines = []
    if path.suffix == ".csv":
        with path.open(encoding="utf-8") as file:
            lines = [line[1:].strip() for line in file if line.startswith("#")]
    return Recording(path.stem, read_counts(path), " ".join(lines))
