"""How requests of a measured run came: at a rate, in a burst, under a limit of sequences, which no steady load says."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tensorcast.errors import InputError
from tensorcast.scheduling.requests import Length, Requests, drawn

ARRIVAL_COLUMNS: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "request_rate": ("requests per second, at random times; inf: all at once", None, ("rate", "qps")),
    "burstiness": ("shape of the gaps between requests: 1 Poisson, less in bursts", 1.0, ()),
    "requests": ("how many were sent in all; all at once without a rate", None, ("num_prompts", "num_requests")),
    "max_num_seqs": ("sequences of a step per dp rank; default the engine's", None, ("max_batch_size",)),
}
"""Columns of a row that is replayed, request by request: what they say, default, other names."""

REQUESTS = 1000
"""Requests of a run that says its rate alone."""

BLOCK = 64
"""Tokens of a block of the prefix cache."""


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """``rate``: requests per second, endless where all come at once. ``count``: in all, ``None`` where not said.
    ``users``: most in flight, ``None`` without a limit. ``max_sequences``: of a step and rank."""

    rate: float = math.inf
    burstiness: float = 1.0
    count: int | None = None
    users: int | None = None
    max_sequences: int | None = None

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise InputError(f"request_rate {self.rate:g}: must be more than 0 requests per second")
        if not self.burstiness > 0:
            raise InputError(f"burstiness {self.burstiness:g}: must be more than 0")
        for name, value in (("requests", self.count), ("max_num_seqs", self.max_sequences)):
            if value is not None and value < 1:
                raise InputError(f"{name} {value}: must be at least 1")

    def requests(self, isl: int, osl: int, *, length_ratio: float, rounds: float, prefix_cached: int) -> Requests:
        """What was sent: lengths uniform between ``length_ratio`` of ``isl`` and ``osl`` and the whole."""
        mean, spread = (1 + length_ratio) / 2, (1 - length_ratio) / (1 + length_ratio)
        count = self.count or (REQUESTS if self.users is None else max(1, round(self.users * rounds)))
        rate = None if math.isinf(self.rate) else self.rate
        found = drawn(
            count, Length(max(1.0, isl * mean), spread), Length(max(1.0, osl * mean), spread), rate=rate,
            burstiness=self.burstiness, users=self.users,
        )
        return beginning_alike(found, prefix_cached) if prefix_cached else found


def beginning_alike(requests: Requests, tokens: int) -> Requests:
    """Requests whose first ``tokens`` are the same; the rest of each is its own."""
    common = tokens // BLOCK
    own = np.cumsum(requests.input_len // BLOCK + 1) + common
    blocks = tuple(
        (*range(min(common, n // BLOCK)), *range(last - max(0, n // BLOCK - common), last))
        for n, last in zip(requests.input_len.tolist(), own.tolist(), strict=True)
    )
    return replace(requests, blocks=blocks, block_tokens=BLOCK)
