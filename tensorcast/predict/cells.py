"""Cells of a table of runs as text and numbers, with their defaults; a deployment's one name as such cells."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping
from typing import Any

from tensorcast.deploy.layout import Layout
from tensorcast.errors import InputError
from tensorcast.scheduling.pools import parse_servers

_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d*)?")
_DECIMALS = re.compile(r"[+-]?\d+,\d+")
MOST_NAMED = 8
"""Columns that a message names."""

_NOTHING = ("", "nan", "none", "null", "na", "n/a", "-")


class Cells:
    """The filled cells of a row; what is asked for and missing takes its default, noted in ``assumed``.

    ``defaults``: of columns by name; ``worker_columns``: of those where 0 says nothing.
    """

    def __init__(
        self, cells: dict[str, Any], defaults: Mapping[str, Any], worker_columns: Container[str] = ()
    ) -> None:
        self.cells, self._defaults, self._worker_columns = cells, defaults, worker_columns
        self.assumed: list[str] = []

    def _get(self, name: str, role: str = "") -> Any:
        return self.cells.get(role + name, self.cells.get(name))

    def text(self, name: str, default: Any = "") -> Any:
        value = self._get(name)
        if value is not None:
            return str(value).strip()
        stated = self._defaults[name]
        if stated is None and default == "":
            raise InputError(f"{name}: this cell is empty and has no default")
        if name in ("engine", "mode"):
            self.assumed.append(f"{name} {stated}")
        return stated if default == "" else default

    def number(self, name: str, default: Any, role: str = "", *, endless: bool = False) -> Any:
        """``endless``: infinity is a value, too."""
        value = self._get(name, role)
        if value is None:
            return default
        try:
            number = plain_number(value)
        except ValueError:
            text = str(value).strip()
            right = f": {text.replace(',', '.')}, with a point" if _DECIMALS.fullmatch(text) else ""
            raise InputError(f"{role}{name} {value!r}: must be a number{right}") from None
        if not (math.isfinite(number) or (endless and number > 0)):
            raise InputError(f"{role}{name} {value!r}: must be a finite number")
        return number

    def switch(self, name: str, default: bool = True) -> bool:
        """Whether a cell says ``on``; ``off``, or ``default`` where it says nothing. Raises for other words."""
        said = self.text(name, "on" if default else "off").lower()
        if said not in ("on", "off"):
            raise InputError(f"{name} {said!r}: must be on or off")
        return said == "on"

    def whole(self, name: str, role: str = "", least: int = 1) -> int:
        default = self._defaults[name]
        number = self.number(name, None, role)
        if number is None or (number == 0 and least == 1 and name in self._worker_columns):
            if name in ("isl", "osl"):
                self.assumed.append(f"{role}{name} {default}")
            return int(default)
        if number != int(number) or number < least:
            raise InputError(f"{role}{name} {number:g}: must be a whole number of at least {least}")
        return int(number)


def plain_number(cell: Any) -> float:
    """The number that a cell says; commas may part thousands. Raises :class:`ValueError`."""
    text = str(cell).strip().replace("_", "")
    return float(text.replace(",", "") if _THOUSANDS.fullmatch(text) else text)


def is_empty(value: Any) -> bool:
    """Whether a cell says nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and value.strip().lower() in _NOTHING


def layout_cells(text: str) -> dict[str, str]:
    """Columns of a deployment by its one name, such as ``2 x tp4 > tp8-ep8``: those of a row that says its sizes."""
    if text.strip()[:1] in (">", "+") or text.strip()[-1:] in (">", "+"):
        raise InputError(f"layout {text!r}: of pools both are named, prefill > decode, as in 2 x tp8 > dp8-ep8")
    servers = parse_servers(text)
    if any(one.device for one in servers):
        raise InputError(f"layout {text!r}: a row is of one device, its own; leave out what is behind @")
    if len(servers) == 1:
        return {"mode": "aggregated", "replicas": str(servers[0].count), **_sizes("", servers[0].layout)}
    found = {"mode": "disaggregated"}
    for prefix, one in zip(("prefill_", "decode_"), servers, strict=True):
        found |= {f"{prefix}workers": str(one.count), **_sizes(prefix, one.layout)}
    return found


def _sizes(prefix: str, layout: Layout) -> dict[str, str]:
    return {f"{prefix}{name}": str(getattr(layout, name)) for name in ("tp", "dp", "ep", "pp")}
