"""What happened to each request, and what servers did meanwhile."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tensorcast.scheduling.requests import Requests
from tensorcast.serving.traffic import Array

GAPS_S = np.geomspace(1e-4, 1e3, 1401)
"""Ends of the classes that gaps between tokens are counted in: 1.2 % wide each."""

GAPS: list[float] = GAPS_S.tolist()

MOST_SAMPLES = 1024
"""Moments of a server that are kept; of more, every other goes."""


BEGIN_AT = {"others_s": 0.0, "came_s": np.inf}
"""Columns that begin at a number."""


class Columns:
    """A number of each request ``[N]`` per name, in arrays that are read and written one by one several times as fast
    as NumPy's."""

    __slots__ = ("admitted_s", "came_s", "first_s", "last_s", "others_s", "sent_s")

    admitted_s: array[float]
    came_s: array[float]
    first_s: array[float]
    last_s: array[float]
    others_s: array[float]
    sent_s: array[float]

    def __init__(self, count: int) -> None:
        for name in self.__slots__:
            setattr(self, name, array("d", [BEGIN_AT.get(name, np.nan)]) * count)


class Record:
    """Times of requests ``[N]``, NaN until they come, and what scheduling needs to know of each.

    ``sent_s``: by the user, ``came_s``: to the scheduler of the server where it is, ``admitted_s``: the first step with
    its prompt begins, ``first_s`` and ``last_s``: the first and the last token reach the user. ``others_s``: time that
    others' prompts took from its reply. ``preemptions``: how often the cache was full, ``moved``: how often its
    server was lost. ``each``: the same times, to be written one by one.
    """

    def __init__(self, requests: Requests) -> None:
        self.requests = requests
        count = len(requests)
        self.blocks, self.block_tokens = requests.blocks, requests.block_tokens
        self._input: list[int] = requests.input_len.tolist()
        self._output: list[int] = requests.output_len.tolist()
        self._written = [0] * count  # tokens of the reply that were thrown out of the cache with their sequence
        each = self.each = Columns(count)
        self.came_s, self.sent_s, self.admitted_s = map(np.frombuffer, (each.came_s, each.sent_s, each.admitted_s))
        self.first_s, self.last_s, self.others_s = map(np.frombuffer, (each.first_s, each.last_s, each.others_s))
        self.cached_tokens = np.zeros(count)
        self.preemptions = np.zeros(count, dtype=np.int32)
        self.moved = np.zeros(count, dtype=np.int32)
        self.server = np.full(count, -1, dtype=np.int32)
        self.gaps = [0.0] * (len(GAPS_S) + 1)

    def prompt(self, request: int) -> int:
        """Tokens to read before the next token of the reply."""
        return self._input[request] + self._written[request]

    def left(self, request: int) -> int:
        """Tokens of the reply that decode steps bring: all but what was written before, and the one that comes with the
        prompt."""
        return self._output[request] - self._written[request] - 1

    def reply(self, request: int) -> int:
        """Tokens of the reply."""
        return self._output[request]

    def longest(self, request: int) -> int:
        """Tokens of prompt and reply."""
        return self._input[request] + self._output[request]

    def blocks_of(self, request: int) -> tuple[int, ...]:
        return () if self.blocks is None else self.blocks[request]

    def admit(self, request: int, now_s: float) -> None:
        admitted_s = self.each.admitted_s
        if admitted_s[request] != admitted_s[request]:  # NaN
            admitted_s[request] = now_s

    def unadmit(self, request: int) -> None:
        """Its prompt is lost before the first token: it queues anew."""
        if self.first_s[request] != self.first_s[request]:  # NaN
            self.admitted_s[request] = np.nan

    def cached(self, request: int, tokens: int) -> None:
        """Tokens of its prompt that were found in the cache; of one that starts over, only the first time."""
        if tokens and not self.preemptions[request] and not self.moved[request]:
            self.cached_tokens[request] = tokens

    def first_token(self, request: int, now_s: float) -> None:
        first_s = self.each.first_s
        if first_s[request] != first_s[request]:  # NaN
            first_s[request] = now_s

    def preempt(self, request: int, written: int) -> None:
        """The cache is full: it starts over with ``written`` more tokens to read."""
        self.preemptions[request] += 1
        self.wrote(request, written)

    def wrote(self, request: int, written: int) -> None:
        """So many tokens more are written of its reply and are to be read again."""
        self._written[request] = min(self._written[request] + written, self._output[request] - 1)

    def again(self) -> NDArray[np.bool_]:
        """Who had to read prompt and reply anew, ``[N]``."""
        return (self.preemptions > 0) | ((self.moved > 0) & (np.array(self._written) > 0))


@dataclass
class Moments:
    """A server over time, a moment as steps begin: ``time_s``, sequences that read and decode in them and that wait,
    and the share of the cache that is used."""

    rows: list[tuple[float, int, int, int, float]] = field(default_factory=list)
    every: int = 1

    def add(self, row: tuple[float, int, int, int, float]) -> None:
        """Keep a moment."""
        self.rows.append(row)
        if len(self.rows) > MOST_SAMPLES:
            self.rows = self.rows[::2]
            self.every *= 2

    @property
    def columns(self) -> dict[str, Array]:
        names = ("time_s", "reading", "decoding", "waiting", "cache_used")
        values = np.array(self.rows, dtype=float).reshape(-1, len(names))
        return dict(zip(names, values.T, strict=True))
