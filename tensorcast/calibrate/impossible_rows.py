"""Rows that are faster than a device's datasheet allows: read from its cache, or not the call that they say.

A table's collector calls one kernel again and again on the same arrays. What fits the last-level cache stays there (96
MB on an L40S, 128 MB on an RTX PRO 6000: GEMMs of those sizes run at twice the memory's speed, all larger ones at 0.85
to 0.95 of it), which a step's weights and caches do not: by the time that a layer comes round again, all others have
passed.
"""

from __future__ import annotations

from tensorcast.calibrate.measured_rows import MeasuredSystem
from tensorcast.cost.kernels.formula import WORKS, formula_of
from tensorcast.profiles.device import DeviceProfile

ROUNDING = 0.98
"""Of the least time that peaks allow: datasheets round, and clocks are not held to the last percent."""

IMPOSSIBLE = "faster than the datasheet's peaks allow (read from the cache, or not the call it says)"


def without_impossible(system: MeasuredSystem, device: DeviceProfile) -> None:
    """Leave out the rows that ``device`` cannot have run from its memory, counted."""
    bare = device.model_copy(update={"calibration": None})
    for key, rows in list(system.kernels.items()):
        family, dtype, engine, variant = key
        if family not in WORKS:
            continue
        least = formula_of(family, dtype, variant, rows.columns, bare, engine=engine).floor
        fine = rows.seconds >= ROUNDING * least
        system.drop(family, IMPOSSIBLE, int((~fine).sum()))
        if not fine.all():
            system.kernels[key] = rows.take(fine)
        if not fine.any():
            del system.kernels[key]
