"""Servers behind a router, fed by the requests: who goes where, and when what happens."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tensorcast.errors import InputError
from tensorcast.scheduling.record import Record
from tensorcast.scheduling.requests import Requests
from tensorcast.scheduling.rules import Rules
from tensorcast.scheduling.server import Server
from tensorcast.scheduling.step_times import StepTimes

Router = Literal["round_robin", "least_work", "power_of_two", "prefix_aware"]
ROUTERS: tuple[str, ...] = ("round_robin", "least_work", "power_of_two", "prefix_aware")

ARRIVAL, ENTRY, HANDED_OVER, STEP_END, START = range(5)
"""What happens, in the order in which it does at one moment: a step is composed when all who come then are there."""


@dataclass(frozen=True)
class Pool:
    """``count`` equal servers."""

    rules: Rules
    times: StepTimes
    count: int


class Fleet:
    """One pool that does both, or a pool that reads prompts and one that writes replies.

    ``hand_over_s``: of a prompt of so many tokens, between the pools; ``link_s``: how long it keeps its sender's link
    busy, so that others wait for it.
    """

    def __init__(
        self, pools: Sequence[Pool], requests: Requests, *, router: str = "least_work",
        hand_over_s: Callable[[int], float] | None = None, seed: int = 0,
    ) -> None:
        if router not in ROUTERS:
            raise InputError(f"router {router!r}: must be one of {', '.join(ROUTERS)}")
        self.requests, self.record, self.router = requests, Record(requests), router
        numbers = iter(range(sum(pool.count for pool in pools)))
        self.pools = [
            [Server(pool.rules, pool.times, self.record, next(numbers)) for _ in range(pool.count)] for pool in pools
        ]
        self.servers = [server for pool in self.pools for server in pool]
        self.hand_over_s = hand_over_s or (lambda tokens: 0.0)
        self.refused: list[int] = []
        self.finished = 0
        # tokens of the longest request that any server takes
        self._longest = min(min(p.rules.cache_tokens - p.rules.waste, p.rules.longest) for p in pools)
        self._events: list[tuple[float, int, int, int]] = []  # (when, kind, order, of whom)
        self._order = 0
        self._due = [-1] * len(self.servers)  # the order number of each server's end of a step that holds
        self._random = np.random.default_rng(seed)
        self._turn = [0] * len(self.pools)
        self._link_free = [0.0] * len(self.servers)
        self._later: deque[int] = deque()  # beyond the users
        self._in_flight = 0
        self._next = 0

    def run(self) -> Record:
        """Until every request has its last token."""
        self._next_arrival()
        events = self._events
        while events:
            now, kind, order, who = heapq.heappop(events)
            if kind == STEP_END and self._due[who] != order:
                continue  # the step ends earlier by now
            if kind == ARRIVAL:
                self._next_arrival()
                self._ask(who, now)
            elif kind == ENTRY:
                self._put(who, 0, now)
            elif kind == HANDED_OVER:
                self._put(who, 1, now)
            elif kind == STEP_END:
                self._step_ended(self.servers[who], now)
            else:
                self._start(self.servers[who], now)
        return self.record

    def _at(self, when: float, kind: int, who: int) -> int:
        self._order += 1
        heapq.heappush(self._events, (when, kind, self._order, who))
        return self._order

    def _next_arrival(self) -> None:
        if self._next < len(self.requests):
            self._at(float(self.requests.arrival_s[self._next]), ARRIVAL, self._next)
            self._next += 1

    def _ask(self, request: int, now: float) -> None:
        self._later.append(request)
        self._send_waiting(now)

    def _send_waiting(self, now: float) -> None:
        """Users send their next requests."""
        users, record = self.requests.users, self.record
        while self._later and (users is None or self._in_flight < users):
            request = self._later.popleft()
            record.sent_s[request] = now
            if record.longest(request) > self._longest:
                self.refused.append(request)
                self.finished += 1
                continue
            self._in_flight += 1
            rules = self.servers[0].rules
            self._at(now + rules.first_token_s + rules.prompt_token_s * record.prompt(request), ENTRY, request)

    def _put(self, request: int, pool: int, now: float) -> None:
        server = self._choose(request, pool)
        self.record.server[request] = server.number
        self.record.came_s[request] = now
        server.put(request)
        if server.stretch is None:
            self._at(now, START, server.number)
        elif server.arrive(now):
            self._due[server.number] = self._at(server.stretch.end_s, STEP_END, server.number)

    def _start(self, server: Server, now: float) -> None:
        if server.stretch is None and server.start(now):
            assert server.stretch is not None
            self._due[server.number] = self._at(server.stretch.end_s, STEP_END, server.number)

    def _step_ended(self, server: Server, now: float) -> None:
        last = len(self.pools) == 1 or server.rules.role == "decode"
        for request in server.finish():
            if last or self.record.left(request) < 1:
                self.record.first_token(request, now)
                self.record.last_s[request] = now
                self._in_flight -= 1
                self.finished += 1
            else:
                took = self.hand_over_s(self.record.prompt(request))
                begins = max(now, self._link_free[server.number])
                self._link_free[server.number] = begins + took
                self._at(begins + took, HANDED_OVER, request)
        self._send_waiting(now)
        self._at(now, START, server.number)

    def _choose(self, request: int, pool: int) -> Server:
        servers = self.pools[pool]
        if len(servers) == 1:
            return servers[0]
        if self.router == "round_robin":
            self._turn[pool] += 1
            return servers[(self._turn[pool] - 1) % len(servers)]
        if self.router == "power_of_two":
            one, other = self._random.choice(len(servers), 2, replace=False)
            return min(servers[one], servers[other], key=lambda s: s.load)
        if self.router == "prefix_aware" and self.record.blocks is not None and not pool:
            return max(servers, key=lambda s: (_found(s, self.record.blocks_of(request)), -s.load))
        return min(servers, key=lambda s: s.load)


def _found(server: Server, blocks: tuple[int, ...]) -> int:
    """Blocks of a prompt that the server's best rank has."""
    return max((rank.prefix.match(blocks, len(blocks)) for rank in server.ranks if rank.prefix is not None), default=0)
