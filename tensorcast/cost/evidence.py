"""measured, calibrated, datasheet; 80 % intervals."""

from __future__ import annotations

LEVELS = ("datasheet", "calibrated", "measured")

NORMAL_80 = 1.2816 / 0.6745
"""Half an 80 % interval over the median absolute error of a normal law."""

EVIDENCE = ("measured", "calibrated", "datasheet")
