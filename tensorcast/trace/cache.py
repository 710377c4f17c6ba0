"""Op tables on disk: a second run of the same model, phase and tp needs neither torch nor transformers.

The key covers the config, the stored format, and the source of the stages that make a table, so a changed tracer never
reads an old table. ``TENSORCAST_CACHE`` moves the folder; ``TENSORCAST_CACHE=off`` switches it off.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from functools import cache
from pathlib import Path

from tensorcast.files import cache_dir, write_atomically
from tensorcast.profiles.model import ModelProfile
from tensorcast.trace.table import FORMAT, OpTable


@cache
def _code_version() -> str:
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    stated = (root / "profiles" / name for name in ("facts.py", "model.py"))  # what a config says, as stored in tables
    sources = (file for part in ("ops", "modeling", "trace") for file in sorted((root / part).rglob("*.py")))
    for file in (*stated, *sources):
        digest.update(file.read_bytes())
    for package, version in (("torch", "version.py"), ("transformers", "__init__.py")):  # the files with their versions
        found = importlib.util.find_spec(package)  # does not import it
        with contextlib.suppress(OSError):
            digest.update((Path(found.origin).parent / version).read_bytes() if found and found.origin else b"")
    return digest.hexdigest()


def _own_code(profile: ModelProfile) -> str:
    """The class that a profile names and, where it lies in a file, that file's text."""
    path = Path((profile.model or "").rpartition(":")[0])
    return f"{profile.model}\n{path.read_text('utf-8') if path.suffix == '.py' and path.is_file() else ''}"


def _file(profile: ModelProfile, phase: str, tp: int) -> Path | None:
    folder = cache_dir()
    if folder is None:
        return None
    said = [profile.name, profile.config, profile.moe.model_dump(), profile.sharded, _own_code(profile)]
    key = json.dumps([FORMAT, _code_version(), *said, phase, tp], sort_keys=True)
    return folder / "traces" / f"{profile.name}-{phase}-tp{tp}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def traced(profile: ModelProfile, phase: str, tp: int = 1) -> OpTable:
    """The op table of ``profile`` at ``tp``: from the cache, or traced now and stored."""
    path = _file(profile, phase, tp)
    if path is not None and path.exists():
        with contextlib.suppress(ValueError, KeyError, TypeError, OSError):  # damaged: trace again
            return OpTable.from_json(json.loads(path.read_text(encoding="utf-8")))
    whole = traced(profile, phase) if tp > 1 else None
    from tensorcast.trace.tracer import trace  # torch and transformers load only here

    table = trace(profile, phase, tp, whole)  # type: ignore[arg-type]
    if path is not None:
        with contextlib.suppress(OSError):  # a read-only home costs time, not the answer
            write_atomically(path, json.dumps(table.to_json(), separators=(",", ":")))
    return table
