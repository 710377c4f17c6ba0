"""The price of one row of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tensorcast.cost.predict.model import NORMAL_80
from tensorcast.deploy.plan import Row

WITHIN_80 = NORMAL_80
"""Half an 80 % interval in median errors: of a normal error, 80 % lie within 1.9 times the median."""

PARTS = ("compute", "memory", "network", "latency")
"""What the seconds of a row are spent on."""


@dataclass(frozen=True)
class RowPrice:
    """One call of one row; numbers are floats or arrays. ``parts`` splits the seconds by what bounds them.

    ``error``: relative median error of the seconds. ``evidence``: ``measured``, ``calibrated`` or ``datasheet``, or an
    array of these where calls differ.
    """

    row: Row
    seconds: Any
    flops: Any
    bytes: Any
    wire_bytes: Any
    ideal_compute_s: Any
    parts: dict[str, Any]
    family: str
    evidence: Any
    error: Any
    has_formula: bool = True
    detail: str = ""

    @property
    def busy_s(self) -> Any:
        """Seconds in which the row keeps the device's arithmetic or memory busy."""
        return self.seconds - self.parts["latency"] - self.parts["network"]
