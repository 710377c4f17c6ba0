"""What 'best' means, once for search, decision and report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd



@dataclass(frozen=True)
class Objective:
    """What is searched for. ``score``: a candidate frame's value of it, more is better."""

    name: str
    words: str
    score: Callable[[pd.DataFrame], Any]


OBJECTIVES = {
    one.name: one
    for one in (
        Objective("tokens_per_gpu", "most output tokens/s per GPU", lambda f: f["tokens_per_s_per_gpu"]),
        Objective("latency", "shortest time of a request", lambda f: -f["request_s"]),
        Objective("cost", "least cost per output token", lambda f: -f["cost_per_million_tokens"]),
        # of those with as few GPUs, the one with most to spare
        Objective("gpus", "fewest GPUs", lambda f: -f["gpus"] + 1e-9 * f["tokens_per_s_per_gpu"]),
    )
}
