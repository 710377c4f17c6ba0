"""How sure a number is: what stands behind it, and the interval in which 80 % of measurements should lie."""

from __future__ import annotations

from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

Evidence = Literal["measured", "calibrated", "datasheet"]
"""``measured``: on or between measured sizes; ``calibrated``: fitted constants or a fitted model carry measurements
further; ``datasheet``: nothing was measured, published figures and assumed efficiencies."""

EVIDENCE: tuple[Evidence, ...] = ("measured", "calibrated", "datasheet")
"""In the order in which pages list it, the surest first."""

LEVELS: tuple[Evidence, ...] = EVIDENCE[::-1]
"""The least sure first: a ``level`` counts in these, and the level of a whole is the lowest of its parts'."""

NORMAL_90 = 1.2816
"""Standard deviations of a normal law from its middle to the ends that hold 80 % of it."""

NORMAL_80 = NORMAL_90 / 0.6745
"""Half an 80 % interval in median errors: of a normal error, 80 % lie within 1.9 times the median."""

Value = TypeVar("Value", float, NDArray[np.float64])


def interval(value: Value, error: Value) -> tuple[Value, Value]:
    """Ends of the 80 % interval of ``value`` where ``error`` is its median relative error: as far below as above, as
    a factor."""
    factor = 1.0 + NORMAL_80 * error
    return value / factor, value * factor
