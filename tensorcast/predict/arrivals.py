"""How requests of a measured run came: at a rate, in a burst, under a limit of sequences, which no steady load says;
and what its client sends, where its source says it.

``sglang.bench_serving`` (0.5.8, bench_serving.py: ``sample_random_requests``, ``compute_random_lens``; ``--seed`` is 1
unless asked) draws lengths from NumPy's legacy generator, prompts' before replies', and takes the ``k``-th prompt from
the ``k``-th text of ShareGPT, shuffled by the same seed: repeated, and cut to its length. So a run of more requests
begins with those of a run of fewer, and one of longer prompts with beginnings of theirs. It tries the server with the
first request, and empties no cache unless asked (``--flush-cache``): prompts of earlier runs are found there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tensorcast.errors import InputError
from tensorcast.predict.cells import Cells, is_empty, plain_number
from tensorcast.scheduling.requests import Length, Lengths, Requests, drawn
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
    "client": ("whose draws of random lengths: sglang (seed 1), other; default: as the assumed column says", None, ()),
    "sent_before": (
        "requests of earlier runs on the same server with the same seed: 80, or by their isl 1000:80 8000:10", None, (),
    ),
}
"""Columns of a row that is replayed, request by request: what they say, default, other names."""

REQUESTS = 1000
"""Requests of a run that says its rate alone."""

BLOCK = 16
"""Tokens of the smallest block of a prefix cache that is told apart."""

SEED = 1
"""Of SGLang's client, unless asked."""

LISTED = "runs listed before"
"""Where rows are noted that come before one in its table: no column of a table."""

LOAD = frozenset({"isl", "osl", "concurrency", "requests", "request_rate", "burstiness", "rounds", "sent_before"})
"""Columns by which runs of one client on one server may differ."""


@dataclass(frozen=True)
class Earlier:
    """A run that the same client sent to the same server before: its longest prompt, and how many."""

    isl: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """``rate``: requests per second, endless where all come at once. ``count``: in all, ``None`` where not said.
    ``users``: most in flight, ``None`` without a limit. ``graph_sizes``: what its decode steps are padded to.
    ``waits``: for which others prompts wait. ``client``: whose lengths, and after which ``earlier`` runs."""

    rate: float = math.inf
    burstiness: float = 1.0
    count: int | None = None
    users: int | None = None
    graph_sizes: tuple[int, ...] = ()
    waits: Waits = field(default_factory=Waits)
    client: str = "other"
    earlier: tuple[Earlier, ...] = ()

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


def tell_earlier_runs(rows: Iterable[MutableMapping[str, Any]], measured: Collection[str]) -> None:
    """Note at rows of SGLang, which may be its client's, the rows before them of the same deployment, as one server's
    runs are listed. ``measured``: columns that say what came out."""
    seen: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for row in rows:
        if str(row.get("engine", "")).strip().lower() not in ("sglang", "sgl") or is_empty(row.get("requests")):
            continue
        known = {name: str(value) for name, value in row.items() if not is_empty(value)}
        key = tuple(sorted((name, value) for name, value in known.items() if name not in LOAD | {*measured}))
        earlier = seen.setdefault(key, [])
        if earlier:
            row[LISTED] = " ".join(earlier)
        earlier.append(f"{known.get('isl', '')}:{known['requests']}".removeprefix(":"))


def read_client(
    cells: Cells, arrivals: Arrivals | None, *, engine: str, public: bool, isl: int, ratio: float, users: float
) -> Arrivals | None:
    """``arrivals`` of a row as its client sends them; a closed loop whose lengths the client draws is one, too.

    ``public``: a record of InferenceX, which has a client of its own.
    """
    count = cells.number("requests", None)
    drawn = engine == "sglang" and not public and count is not None and ratio < 1
    client = cells.text("client", "sglang" if drawn else "other").lower()
    if client not in ("sglang", "other"):
        raise InputError(f"client {client!r}: must be sglang or other")
    listed = cells.cells.get(LISTED) if client == "sglang" else None
    earlier = _earlier(cells.text("sent_before", listed) or "", isl)
    apart = any(name in cells.cells for name in ("images_per_request", "prefix_cached"))
    if "sent_before" in cells.cells and (count is None or apart):
        needs = "no prefix_cached and no images beside" if apart else "requests, how many this run sent"
        raise InputError(f"sent_before {cells.cells['sent_before']}: needs {needs}")
    told = earlier or (client == "sglang" and (arrivals is not None or ratio < 1))
    if count is None or apart or not told:
        return arrivals  # replies of equal length stay in step in a replay
    if client == "sglang" and "client" not in cells.cells:
        after = f" after {', '.join(f'{one.count} of {one.isl}' for one in earlier)}" if earlier else ""
        cells.assumed.append(f"sent by SGLang's client{after}")
    found = arrivals or Arrivals(count=cells.whole("requests"), users=max(1, round(users)))
    return replace(found, client=client, earlier=earlier)


def _earlier(said: str, isl: int) -> tuple[Earlier, ...]:
    """Runs as ``sent_before`` has them."""
    found = []
    for word in said.replace(",", " ").split():
        length, _, count = word.rpartition(":")
        try:
            numbers = plain_number(length or isl), plain_number(count)
        except ValueError:
            numbers = 0.0, 0.0
        if min(numbers) < 1 or not all(number.is_integer() for number in numbers):
            raise InputError(f"sent_before {said!r}: must be numbers of requests, as 80, or 1000:80 8000:10 by isl")
        found.append(Earlier(*map(int, numbers)))
    return tuple(found)


def lengths(isl: int, osl: int, ratio: float, count: int) -> tuple[Lengths, Lengths]:
    """Prompts' and replies' tokens ``[count]`` as SGLang's client draws them, uniform from ``ratio`` of the most."""
    random = np.random.RandomState(SEED)
    return (
        random.randint(max(int(isl * ratio), 1), isl + 1, size=count).astype(np.int64),
        random.randint(max(int(osl * ratio), 1), osl + 1, size=count).astype(np.int64),
    )


def as_sent(
    requests: Requests, arrivals: Arrivals, longest: tuple[int, int], ratio: float, block_tokens: int
) -> Requests:
    """``requests`` with the lengths of the client of ``arrivals``, and with what the server has read of their prompts.
    ``longest``: prompt and reply; ``block_tokens``: of the engine's cache."""
    count, tried = len(requests), arrivals.client == "sglang"
    if tried:
        prompts, replies = lengths(*longest, ratio, count)
        requests = replace(requests, input_len=prompts, output_len=replies)
    kept = np.zeros(count, dtype=np.int64)
    kept[0] = requests.input_len[0] if tried else 0
    for one in arrivals.earlier:
        again = min(one.count, count)
        before = lengths(one.isl, 1, ratio, one.count)[0] if tried else np.full(one.count, one.isl)
        kept[:again] = np.maximum(kept[:again], np.minimum(before[:again], requests.input_len[:again]))
    if requests.blocks is not None or not kept.any():
        return requests
    size = max(block_tokens, BLOCK)
    whole = requests.input_len // size
    first = np.cumsum(whole) - whole
    blocks = tuple(tuple(range(start, start + own)) for start, own in zip(first.tolist(), whole.tolist(), strict=True))
    return replace(requests, blocks=blocks, block_tokens=size, kept_len=kept)
