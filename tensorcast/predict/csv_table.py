"""Reading a table of text cells from a CSV file, and saying in one line what is wrong with one that is none."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tensorcast.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

DELIMITERS = (",", ";", "\t")
"""Cells are separated by the first of these that the header has, unless a line before it says by what."""

SAID = re.compile(r"sep=(.)\s*", re.IGNORECASE)
"""That line, as Excel reads and writes it."""

OTHERS = {
    b"PK\x03\x04": "an Excel workbook or another archive", b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"PAR1": "a Parquet file", b"\x1f\x8b": "compressed with gzip", b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16", b"[": "JSON", b"{": "JSON", b"<": "HTML or XML",
}
"""Files that people take for tables, by their first bytes."""

RIGHT = "save the table as CSV: text in UTF-8, cells separated by comma, semicolon or tab"


def read_table(path: Path) -> pd.DataFrame:
    """The cells of a CSV file as text. Lines that begin with ``#`` are comments, cells missing at a line's end empty.

    Comma, semicolon or tab, or what a first line ``sep=|`` says, with or without a byte order mark. Raises
    :class:`InputError` on anything else.
    """
    import pandas as pd

    if not path.is_file():
        raise InputError(f"{path}: {'is a directory' if path.is_dir() else 'no such file'}")
    with path.open("rb") as begun:
        first = begun.read(4)
    if other := next((what for bytes_, what in OTHERS.items() if first.startswith(bytes_)), ""):
        raise InputError(f"{path}: not a CSV table but {other}; {RIGHT}")
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = _Lines(file)
            names, rows = _cells(path, lines)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(f"{path}: not a CSV table: byte 0x{byte:02x} is not text in UTF-8; {RIGHT}") from None
    except csv.Error as error:
        why = "a quote opens and does not close" if "unexpected end" in str(error) else error
        raise InputError(f"{path}, line {lines.number}: not a CSV table: {why}") from None
    return pd.DataFrame(rows, columns=names, dtype=object)


class _Lines:
    """Lines of a file but its comments; ``number`` counts all of them."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.number = file, 0

    def __iter__(self) -> Iterator[str]:
        for line in self.file:
            self.number += 1
            if line.strip() and not line.lstrip().startswith("#"):
                yield line


def _cells(path: Path, lines: _Lines) -> tuple[list[str], list[list[str]]]:
    """Column names and rows."""
    each = iter(lines)
    header = next(each, "")
    if said := SAID.fullmatch(header):
        header = next(each, "")
    if not header:
        raise InputError(f"{path}: is empty, not a CSV table: its first line must name the columns")
    delimiter = said[1] if said else next((mark for mark in DELIMITERS if mark in header), ",")
    names = [
        name.strip() or f"Unnamed: {i}"  # as pandas writes the name of an index that has none
        for i, name in enumerate(next(csv.reader([header], delimiter=delimiter, skipinitialspace=True, strict=True)))
    ]
    rows = []
    for cells in csv.reader(each, delimiter=delimiter, skipinitialspace=True, strict=True):
        if any(cell.strip() for cell in cells[len(names) :]):
            raise InputError(
                f"{path}, line {lines.number}: has {len(cells)} cells, but there are {len(names)} columns; "
                f"a cell with {delimiter!r} in it needs quotes"
            )
        rows.append([*cells[: len(names)], *[""] * (len(names) - len(cells))])
    return names, rows
