"""What 'best' means: once for the search, its decision, its report, and the score of predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

PER_GPU = "tokens_per_s_per_gpu"
"""What decides between candidates that an objective cannot tell apart: more is better."""

BOUND = "lower_bound"


@dataclass(frozen=True)
class Objective:
    """A column of served candidates that is to be large, or small (``less``); ``words``: it with its unit.

    Where candidates have a ``lower_bound`` of it, which is reached with a chance, that decides.
    """

    name: str
    column: str
    less: bool
    words: str

    def score(self, columns: Mapping[str, NDArray[np.float64]] | pd.DataFrame) -> NDArray[np.float64]:
        """Of each candidate; more is better. Of as many GPUs, those with most tokens lead."""
        value = np.asarray(columns[BOUND if BOUND in columns else self.column], dtype=float)
        spare = 1e-9 * np.asarray(columns[PER_GPU], dtype=float) if self.column == "gpus" else 0.0
        return (-value if self.less else value) + spare

    def order(self, columns: Mapping[str, NDArray[Any]] | pd.DataFrame) -> NDArray[np.int_]:
        """Positions with the best first: what meets the limits before what does not, ties by tokens per GPU."""
        value = np.asarray(columns[BOUND if BOUND in columns else self.column], dtype=float)
        late = ~np.asarray(columns["meets"], dtype=bool)
        return np.lexsort((-np.asarray(columns[PER_GPU], dtype=float), value if self.less else -value, late))


OBJECTIVES = {
    one.name: one
    for one in (
        Objective("tokens_per_gpu", PER_GPU, False, "tokens/s per GPU"),
        Objective("latency", "request_s", True, "for a whole request"),
        Objective("cost", "cost_per_million_tokens", True, "USD per million output tokens"),
        Objective("gpus", "gpus", True, "GPUs"),
        Objective("throughput", "output_tokens_per_s", False, "tokens/s of all GPUs"),
        Objective("users", "concurrency", False, "users at once"),
    )
}
"""What ``--objective`` may ask for."""
