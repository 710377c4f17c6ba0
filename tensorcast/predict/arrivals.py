"""How requests of a measured run came: at a rate, in a burst, under a limit of sequences, which no steady load says."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tensorcast.errors import InputError
from tensorcast.predict.cells import Cells
from tensorcast.scheduling.requests import Length, Requests, drawn
from tensorcast.scheduling.rules import Waits, read_graph_sizes

ARRIVAL_COLUMNS: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "request_rate": ("requests per second, at random times; inf: all at once", None, ("rate", "qps")),
    "burstiness": ("shape of the gaps between requests: 1 Poisson, less in bursts, inf evenly spaced", 1.0, ()),
    "requests": ("how many were sent in all; all at once without a rate", None, ("num_prompts", "num_requests")),
    "max_num_seqs": (
        "sequences of a step per dp rank; default the engine's", None, ("max_batch_size", "max_running_requests"),
    ),
    "graph_sizes": (
        "batches that decode steps are padded to, as 1 2 4 8: TensorRT-LLM's cuda_graph_config; default: none", None,
        ("cuda_graph_sizes",),
    ),
    "balance_steps": (
        "steps that prompts wait until every attention DP rank has one: TensorRT-LLM's timeout_iters", 0,
        ("adp_timeout_iters",),
    ),
    "batching_steps": (
        "and that they gather once every rank has one: its batching_wait_iters", 0, ("adp_batching_wait_iters",),
    ),
    "batch_wait_steps": (
        "steps that prompts wait for more of them, without attention DP: TensorRT-LLM's batch_wait_timeout_iters", 0,
        ("batch_wait_timeout_iters",),
    ),
    "batch_wait_share": (
        "share of a step's tokens that is enough: its batch_wait_max_tokens_ratio", 0.9,
        ("batch_wait_max_tokens_ratio",),
    ),
}
"""Columns of a row that is replayed, request by request: what they say, default, other names."""

REQUESTS = 1000
"""Requests of a run that says its rate alone."""

BLOCK = 16
"""Tokens of the smallest block of a prefix cache that is told apart."""


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """``rate``: requests per second, endless where all come at once. ``count``: in all, ``None`` where not said.
    ``users``: most in flight, ``None`` without a limit. ``graph_sizes``: what its decode steps are padded to.
    ``waits``: for which others prompts wait."""

    rate: float = math.inf
    burstiness: float = 1.0
    count: int | None = None
    users: int | None = None
    graph_sizes: tuple[int, ...] = ()
    waits: Waits = field(default_factory=Waits)

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise InputError(f"request_rate {self.rate:g}: must be more than 0 requests per second")
        if not self.burstiness > 0:
            raise InputError(f"burstiness {self.burstiness:g}: must be more than 0")
        if self.count is not None and self.count < 1:
            raise InputError(f"requests {self.count}: must be at least 1")

    def requests(
        self, isl: int, osl: int, *, length_ratio: float, rounds: float, prefix_cached: int, block_tokens: int = BLOCK
    ) -> Requests:
        """What was sent: lengths uniform between ``length_ratio`` of ``isl`` and ``osl`` and the whole.
        ``block_tokens``: of the engine's cache."""
        count = self.count or (REQUESTS if self.users is None else max(1, round(self.users * rounds)))
        rate = None if math.isinf(self.rate) else self.rate
        found = drawn(
            count, up_to(isl, length_ratio), up_to(osl, length_ratio), rate=rate, burstiness=self.burstiness,
            users=self.users,
        )
        return beginning_alike(found, prefix_cached, block_tokens) if prefix_cached else found


def up_to(longest: int, ratio: float) -> Length:
    """Lengths uniform from ``ratio`` of the ``longest``, one token at least, up to it."""
    least = max(1.0, longest * ratio)
    return Length((least + longest) / 2, (longest - least) / (longest + least))


def read_arrivals(cells: Cells, users: float | None) -> Arrivals | None:
    """How requests came, if a row says more of it than how many were in flight.

    So many users who send one request after another are no such row: how often they do is its ``rounds``.
    """
    rate = cells.number("request_rate", None, endless=True)
    burstiness = cells.number("burstiness", 1.0, endless=True)
    if burstiness != 1 and rate in (None, math.inf):
        raise InputError(f"burstiness {burstiness:g}: is of requests that come at a request_rate, and none is said")
    count, most = (cells.number(name, None) for name in ("requests", "max_num_seqs"))
    graphs = read_graph_sizes(cells.text("graph_sizes", ""), "graph_sizes") if "graph_sizes" in cells.cells else ()
    if rate is None and count is None and most is None and not graphs:
        return None
    steady = most is None and not graphs and rate in (None, math.inf)
    if steady and users is not None and count is not None and count > users:
        cells.cells.setdefault("rounds", count / users)
        return None
    return Arrivals(
        rate=math.inf if rate is None else rate, burstiness=burstiness,
        count=None if count is None else cells.whole("requests"), users=None if users is None else max(1, round(users)),
        graph_sizes=graphs,
    )


def with_waits(cells: Cells, ranks: int, users: float, arrivals: Arrivals | None) -> Arrivals | None:
    """The ``arrivals`` of a row where prompts of a server of so many data-parallel ranks (0: of pools, where none does)
    wait for others, which no steady load says."""
    waits = Waits(
        **{name: cells.whole(name, least=0) for name in ("balance_steps", "batching_steps", "batch_wait_steps")},
        batch_wait_share=cells.number("batch_wait_share", Waits.batch_wait_share),
    )
    if not waits.any(ranks):
        return arrivals
    return replace(arrivals or Arrivals(users=max(1, round(users))), waits=waits)


def beginning_alike(requests: Requests, tokens: int, block_tokens: int = BLOCK) -> Requests:
    """Requests whose first ``tokens`` are the same; the rest of each is its own. Blocks are :data:`BLOCK` at least."""
    size = max(block_tokens, BLOCK)
    common = tokens // size
    own = np.cumsum(requests.input_len // size + 1) + common
    blocks = tuple(
        (*range(min(common, n // size)), *range(last - max(0, n // size - common), last))
        for n, last in zip(requests.input_len.tolist(), own.tolist(), strict=True)
    )
    return replace(requests, blocks=blocks, block_tokens=size)
