"""Any report as plain values and valid JSON."""

from __future__ import annotations

import json
import math
from typing import Any


def to_json(document: Any, indent: int | None = None) -> str:
    """Valid JSON of any report: numbers that are none become null, numpy scalars plain numbers."""
    separators = None if indent else (",", ":")
    return json.dumps(_plain(document), indent=indent, separators=separators, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
