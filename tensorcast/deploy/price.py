"""The price of one row of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tensorcast.deploy.plan import Row

PARTS = ("compute", "memory", "network", "latency")
"""What the seconds of a row are spent on."""


@dataclass(frozen=True)
class RowPrice:
    """One call of one row; numbers are floats or arrays. ``parts`` splits the seconds by what bounds them."""

    row: Row
    seconds: Any
    flops: Any
    bytes: Any
    wire_bytes: Any
    ideal_compute_s: Any
    parts: dict[str, Any]
    family: str
    evidence: str
    error: Any
    has_formula: bool = True
    detail: str = ""

    @property
    def busy_s(self) -> Any:
        """Seconds in which the row keeps the device's arithmetic or memory busy."""
        return self.seconds - self.parts["latency"] - self.parts["network"]
