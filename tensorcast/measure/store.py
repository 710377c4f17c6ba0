"""Measurements on disk: one line of JSON each while a run goes on, one table when it is done.

A run that is interrupted, by whatever, leaves all lines that were written; the next one in the same folder goes on from
there. A kernel that ended the process twice is recorded with that and not tried again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorcast.cost.work import Tiling, Work
from tensorcast.errors import InputError
from tensorcast.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd

PARTIAL = "measurements.partial.jsonl"
TABLE = "measurements.parquet"
TEXT = "measurements.csv"

WORDS = (
    "level", "op", "module", "phase", "shape", "family", "dtype", "method", "problem", "works", "by_kind", "key",
    "evidence", "cause", "device", "torch", "date",
)
"""Columns of text: an empty one has no type of its own in a CSV."""

ATTEMPTS = 2
"""How often a kernel may end the process before it counts as crashed; an innocent one may be the last before a kill."""

CRASHED = "the process ended while this kernel ran"


def key_of(*parts: Any) -> str:
    """A name for what is measured, from everything that it depends on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


class Store:
    """Rows by key, appended to a file as they come. ``path=None`` keeps them in memory alone."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        self._begun: dict[str, int] = {}
        if path is None or not path.exists():
            return
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # the last line of a killed run may be torn
                found = json.loads(line)
                if "begun" in found:
                    self._begun[found["begun"]] = self._begun.get(found["begun"], 0) + 1
                else:
                    self.rows[found["key"]] = found
        torn = path.read_bytes()[-1:] not in (b"", b"\n")
        if torn:
            self._append("")  # what follows starts on a line of its own

    def crashed(self, key: str) -> bool:
        """Whether the kernel was begun often enough and never finished."""
        return key not in self.rows and self._begun.get(key, 0) >= ATTEMPTS

    def begin(self, key: str) -> None:
        """Say that a kernel is about to run."""
        self._append(json.dumps({"begun": key}))

    def add(self, key: str, **row: Any) -> dict[str, Any]:
        """Keep a finished row."""
        self.rows[key] = {"key": key, **row}
        self._append(json.dumps(self.rows[key]))
        return self.rows[key]

    def _append(self, line: str) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror or error}") from None

    def finish(self) -> None:
        """The run is complete: its lines are in the table now."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def write_table(frame: pd.DataFrame, directory: Path) -> list[Path]:
    """``measurements.csv``, and ``measurements.parquet`` where pyarrow is installed."""
    import io

    written = [directory / TEXT]
    write_atomically(written[0], frame.to_csv(index=False, lineterminator="\n"))
    with contextlib.suppress(ImportError):
        content = io.BytesIO()
        frame.to_parquet(content, index=False)
        write_atomically(directory / TABLE, content.getvalue())
        written.append(directory / TABLE)
    return written


def read_table(path: Path) -> pd.DataFrame:
    """A table of :func:`write_table`, parquet or CSV, or the lines of an unfinished run.

    Raises :class:`InputError` where it is missing, damaged, or lacks a column.
    """
    import pandas as pd

    path = Path(path)
    try:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path)
        elif path.suffix == ".jsonl":
            frame = pd.DataFrame(list(Store(path).rows.values()))
        else:
            frame = pd.read_csv(path, keep_default_na=True)
    except ImportError:
        raise InputError(f"{path}: reading parquet needs pyarrow (pip install pyarrow), or take {TEXT}") from None
    except (OSError, ValueError) as error:
        line = "no such file" if isinstance(error, FileNotFoundError) else str(error).strip().splitlines()[0][:160]
        raise InputError(f"cannot read measurements from {path}: {line}") from None
    needed = ("level", "family", "dtype", "seconds", "works", "device")
    for name in needed:
        if name not in frame.columns:
            raise InputError(f"{path}: no column {name!r}; a table of `tensorcast validate` has {', '.join(needed)}")
    seconds = pd.to_numeric(frame["seconds"], errors="coerce")
    if (wrong := seconds.isna() & frame["seconds"].notna() & (frame["seconds"] != "")).any():
        row = int(wrong.to_numpy().argmax())
        raise InputError(f"{path}, row {row + 1}: seconds {frame['seconds'].iloc[row]!r}: must be a number")
    frame = frame.assign(seconds=seconds)
    text = [name for name in WORDS if name in frame.columns]
    return frame.assign(**{name: frame[name].astype(object).fillna("").astype(str) for name in text})


def works_text(works: list[Work]) -> str:
    """The work of a row as JSON, numbers to ten digits, without what is as by default."""
    def plain(value: Any) -> Any:
        if isinstance(value, (Work, Tiling)):
            said = {f.name: getattr(value, f.name) for f in fields(value) if f.name != "sizes"}  # formulas do without
            defaults = {f.name: f.default for f in fields(value)}
            return {name: plain(one) for name, one in said.items() if not _is_default(one, defaults[name])}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return value if isinstance(value, (str, bool)) else float(f"{float(value):.10g}")

    return json.dumps([plain(work) for work in works], separators=(",", ":"))


def _is_default(value: Any, default: Any) -> bool:
    if default is MISSING:
        return False
    return bool(value == default) if isinstance(value, (str, bool, tuple)) else float(value) == default


def works_from(text: str) -> list[Work]:
    """The way back. Raises :class:`InputError` on text that no work is in."""
    known, parts = ({f.name for f in fields(kind)} - {"sizes"} for kind in (Work, Tiling))
    try:
        found = []
        for row in json.loads(text):
            tilings = tuple(Tiling(**{n: v for n, v in t.items() if n in parts}) for t in row.get("tilings", ()))
            found.append(Work(**{**{n: v for n, v in row.items() if n in known}, "tilings": tilings}))
        return found
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"column works: {str(error)[:120]} in {text[:60]!r}") from None
