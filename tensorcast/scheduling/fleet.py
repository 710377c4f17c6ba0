"""Servers behind a router, fed by the requests: who goes where, and when what happens."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tensorcast.errors import InputError
from tensorcast.scheduling.pools import Change
from tensorcast.scheduling.record import Record
from tensorcast.scheduling.requests import Requests
from tensorcast.scheduling.rules import Rules
from tensorcast.scheduling.server import Server
from tensorcast.scheduling.step_times import StepTimes

Router = Literal["round_robin", "least_work", "power_of_two", "prefix_aware"]
ROUTERS: tuple[str, ...] = ("round_robin", "least_work", "power_of_two", "prefix_aware")

ARRIVAL, RETURN, ENTRY, HANDED_OVER, STEP_END, CHANGE, START = range(7)
"""What happens, in the order in which it does at one moment: a step is composed when all who come then are there."""

WATCHED = 4096
"""Events between two looks of whoever watches."""

Watch = Callable[[int, float], None]
"""Told now and then how many requests are finished, and the second that it is."""


@dataclass(frozen=True)
class Pool:
    """``count`` equal servers. ``hand_over_s``: of those that read prompts alone, seconds that a prompt of so many
    tokens takes on its way to the servers that write; it keeps its sender's link busy, so that others wait for it.
    ``meeting_s``: what each hand-over takes beside, which nobody else waits for."""

    rules: Rules
    times: StepTimes
    count: int
    hand_over_s: Callable[[int], float] | None = None
    meeting_s: float = 0.0


class Fleet:
    """Pools whose servers do both, or some that read prompts and some that write replies.

    ``changes``: servers that are lost or added. Whoever was on a lost server goes through the router again and reads
    prompt and what was written of the reply anew; where no server is left, requests wait for the next one.
    """

    def __init__(
        self, pools: Sequence[Pool], requests: Requests, *, router: str = "least_work", seed: int = 0,
        changes: Sequence[Change] = (),
    ) -> None:
        if router not in ROUTERS:
            raise InputError(f"router {router!r}: must be one of {', '.join(ROUTERS)}")
        self.requests, self.record, self.router, self.pools = requests, Record(requests), router, pools
        self.changes = changes
        self.servers: list[Server] = []
        self.finished, self.now_s, self.stopped = 0, 0.0, False
        self.refused: list[int] = []
        # servers that are there, of the first phase and of the second
        pooled = any(pool.rules.role == "decode" for pool in pools)
        self._there: list[list[Server]] = [[], []] if pooled else [[]]
        self._stranded: list[deque[int]] = [deque() for _ in self._there]  # for want of any server
        self._link_free: list[float] = []
        self._due: list[int] = []  # the order number of each server's end of a step that holds
        for pool in range(len(pools)):
            self._add(pool, pools[pool].count, 0.0)
        # tokens of the longest request that some server of each phase takes
        self._longest = min(
            max(pool.rules.most_tokens for pool in pools if self._phase(pool) == phase)
            for phase in range(len(self._there))
        )
        self._all_take = min(pool.rules.most_tokens for pool in pools)
        self._events: list[tuple[float, int, int, int]] = []  # (when, kind, order, of whom)
        self._order = 0
        self._random = np.random.default_rng(seed)
        self._turn = [0] * len(self._there)
        self._sending: dict[int, tuple[int, int]] = {}  # prompts on their way: from which server, event's order
        self._later: deque[int] = deque()  # beyond the users
        self._in_flight = 0
        self._next = 0
        self._after: dict[int, list[int]] = defaultdict(list)  # requests that wait for another's end
        for request, before in enumerate([] if requests.after is None else requests.after.tolist()):
            if before >= 0:
                self._after[before].append(request)

    def run(self, watch: Watch | None = None) -> Record:
        """Until every request has its last token. With a ``watch`` Ctrl-C ends the replay and leaves what there is:
        ``stopped`` then says so."""
        self._next_arrival()
        for i, change in enumerate(self.changes):
            self._at(change.when_s, CHANGE, i)
        try:
            self._run(watch)
        except KeyboardInterrupt:
            if watch is None:
                raise
            self.stopped = True
        return self.record

    def _run(self, watch: Watch | None) -> None:
        events, looked = self._events, 0
        while events:
            now, kind, order, who = heapq.heappop(events)
            looked += 1
            if watch is not None and looked % WATCHED == 0:
                self.now_s = now
                watch(self.finished, now)
            if kind == STEP_END:
                if self._due[who] == order:  # else the step ends earlier by now
                    self._step_ended(self.servers[who], now)
            elif kind == START:
                self._start(self.servers[who], now)
            elif kind == ENTRY:
                self._put(who, 0, now)
            elif kind == HANDED_OVER:
                if self._sending.get(who, (0, 0))[1] == order:
                    del self._sending[who]
                    self._put(who, 1, now)
            elif kind == CHANGE:
                change = self.changes[who]
                if self.finished == len(self.requests):
                    continue  # nobody is left who would notice
                (self._add if change.count > 0 else self._lose)(change.pool, abs(change.count), now)
            else:
                if kind == ARRIVAL:
                    self._next_arrival()
                self._ask(who, now)

    def _at(self, when: float, kind: int, who: int) -> int:
        self._order += 1
        heapq.heappush(self._events, (when, kind, self._order, who))
        return self._order

    def _next_arrival(self) -> None:
        after = self.requests.after
        while after is not None and self._next < len(after) and after[self._next] >= 0:
            self._next += 1
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
                self._is_over(request, now)
                continue
            self._in_flight += 1
            self._enter(request, now)

    def _enter(self, request: int, now: float) -> None:
        rules = self.pools[0].rules
        self._at(now + rules.first_token_s + rules.prompt_token_s * self.record.prompt(request), ENTRY, request)

    def _is_over(self, request: int, now: float) -> None:
        """A request ended or was refused: whoever waited for that thinks, and asks."""
        self.finished += 1
        for other in self._after.pop(request, ()):
            think_s = 0.0 if self.requests.think_s is None else float(self.requests.think_s[other])
            self._at(max(now + think_s, float(self.requests.arrival_s[other])), RETURN, other)

    def _put(self, request: int, phase: int, now: float) -> None:
        server = self._choose(request, phase)
        if server is None:
            self._stranded[phase].append(request)
            return
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
        last = server.rules.role != "prefill"
        for request in server.finish():
            if last or self.record.left(request) < 1:
                self.record.first_token(request, now)
                self.record.last_s[request] = now
                self._in_flight -= 1
                self._is_over(request, now)
            else:
                pool = self.pools[server.pool]
                ends = max(now, self._link_free[server.number])
                ends += pool.hand_over_s(self.record.prompt(request)) if pool.hand_over_s else 0.0
                self._link_free[server.number] = ends
                self._sending[request] = (server.number, self._at(ends + pool.meeting_s, HANDED_OVER, request))
        if self._later:
            self._send_waiting(now)
        if self._events and self._events[0][0] <= now:
            self._at(now, START, server.number)  # whoever comes now is there first
        else:
            self._start(server, now)

    def _phase(self, pool: Pool) -> int:
        return int(pool.rules.role == "decode")

    def _add(self, pool: int, count: int, now: float) -> None:
        one = self.pools[pool]
        phase = self._phase(one)
        for _ in range(count):
            server = Server(one.rules, one.times, self.record, len(self.servers), pool)
            server.from_s = now
            self.servers.append(server)
            self._there[phase].append(server)
            self._due.append(-1)
            self._link_free.append(now)
        waiting, self._stranded[phase] = self._stranded[phase], deque()
        for request in waiting:
            self._put(request, phase, now)

    def _lose(self, pool: int, count: int, now: float) -> None:
        """The servers that came last are gone, with all that they held."""
        there = self._there[self._phase(self.pools[pool])]
        for server in [one for one in there if one.pool == pool][-count:]:
            there.remove(server)
            self._due[server.number] = -1
            on_way = [request for request, (number, _) in self._sending.items() if number == server.number]
            for request in on_way:
                del self._sending[request]
            for request in [*server.lose(now), *on_way]:
                self.record.moved[request] += 1
                self._enter(request, now)

    def _choose(self, request: int, phase: int) -> Server | None:
        servers = self._there[phase]
        longest = self.record.longest(request)
        if longest > self._all_take:
            servers = [server for server in servers if longest <= server.rules.most_tokens]
        if len(servers) < 2:
            return servers[0] if servers else None
        if self.router == "round_robin":
            self._turn[phase] += 1
            return servers[(self._turn[phase] - 1) % len(servers)]
        if self.router == "power_of_two":
            one, other = self._random.choice(len(servers), 2, replace=False)
            return min(servers[one], servers[other], key=lambda s: s.load)
        if self.router == "prefix_aware" and self.record.blocks is not None and not phase:
            return max(servers, key=lambda s: (_found(s, self.record.blocks_of(request)), -s.load))
        return min(servers, key=lambda s: s.load)


def _found(server: Server, blocks: tuple[int, ...]) -> int:
    """Blocks of a prompt that the server's best rank has."""
    return max((rank.prefix.match(blocks, len(blocks)) for rank in server.ranks if rank.prefix is not None), default=0)
