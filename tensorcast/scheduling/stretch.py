"""Steps under way on a server: those between two events, whose times grow evenly."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Stretch:
    """Steps under way: the first begins at ``start_s`` and takes ``first_s``, each after it ``slope_s`` longer; the
    last is done at ``end_s``. ``mixed``: with prompts."""

    start_s: float
    first_s: float
    slope_s: float
    steps: int
    end_s: float
    mixed: bool = False

    def cut(self, steps: int) -> None:
        """It ends after so many steps."""
        self.steps, self.end_s = steps, self.after(steps)

    def after(self, steps: float) -> float:
        """When so many of its steps are done."""
        return self.start_s + steps * self.first_s + self.slope_s * steps * (steps - 1) / 2

    def done_by(self, now_s: float) -> int:
        """Steps that are done at ``now_s``."""
        low = (now_s - self.start_s) / self.first_s
        if self.slope_s > 0:
            half = self.first_s / self.slope_s - 0.5
            low = math.sqrt(half * half + 2 * (now_s - self.start_s) / self.slope_s) - half
        return min(max(int(low + 1e-9), 0), self.steps)
