"""Servers behind a router, fed by the requests: who goes where, and when what happens."""

from __future__ import annotations

from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf
from operator import attrgetter
from typing import Literal

import numpy as np

from tensorcast.errors import InputError
from tensorcast.scheduling.pipeline import Pipeline
from tensorcast.scheduling.pools import Change
from tensorcast.scheduling.record import Record
from tensorcast.scheduling.requests import Requests
from tensorcast.scheduling.rules import Rules
from tensorcast.scheduling.server import Server
from tensorcast.scheduling.step_times import StepTimes

Router = Literal["round_robin", "least_work", "power_of_two", "prefix_aware"]
ROUTERS: tuple[str, ...] = ("round_robin", "least_work", "power_of_two", "prefix_aware")

UNEVEN_BY, UNEVEN_TIMES, MATCHED = 64, 1.5, 0.3
"""A router that knows of prefixes sends a request to who has most of it, if that is more than such a share of its
prompt, and by work where servers' requests differ by more than so many and more than so many times (sglang-router
0.3.2, router_args.py: ``balance_abs_threshold``, ``balance_rel_threshold``, ``cache_threshold``)."""

ARRIVAL, RETURN, ENTRY, HANDED_OVER, STEP_END, CHANGE, START = range(7)
"""What happens, in the order in which it does at one moment: a step is composed when all who come then are there."""

NOBODY = (inf, -1)
"""Who comes when all have come."""

_load = attrgetter("load")

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
        changes: Sequence[Change] = (), tells: bool = True,
    ) -> None:
        """``tells``: what times go into, and what servers did, beside when requests had their tokens."""
        if router not in ROUTERS:
            raise InputError(f"router {router!r}: must be one of {', '.join(ROUTERS)}")
        self.requests, self.record, self.router, self.pools = requests, Record(requests), router, pools
        self.changes, self._tells = changes, tells
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
        self._keep()
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
        self._places: dict[int, Server] = {}  # of requests whose prompts are not read yet: where they have or want room
        self._room_first = any(pool.rules.room_first is not None for pool in pools)
        self._sending: dict[int, tuple[int, int]] = {}  # prompts on their way: from which server, event's order
        self._later: deque[int] = deque()  # beyond the users
        self._in_flight = 0
        self._next = 0
        self._enters_s = inf  # when the next of those enters who send when they like
        self._after: dict[int, list[int]] = defaultdict(list)  # requests that wait for another's end
        for request, before in enumerate([] if requests.after is None else requests.after.tolist()):
            if before >= 0:
                self._after[before].append(request)

    def _keep(self) -> None:
        """Servers have of prompts what they read in the past: each rank its share of them, in turn."""
        kept, record = self.requests.kept_len, self.record
        ranks = [rank.prefix for server in self._there[0] for rank in server.ranks if rank.prefix is not None]
        if kept is None or not ranks:
            return
        for request in np.flatnonzero(kept).tolist():
            prefix = ranks[request % len(ranks)]
            prefix.keep(record.blocks_of(request)[: int(kept[request]) // record.block_tokens])
        for server in self._there[0]:
            for rank in server.ranks:
                if rank.prefix is not None:
                    rank.prefix.shrink(server.rules.cache_tokens)

    def run(self, watch: Watch | None = None) -> Record:
        """Until every request has its last token. With a ``watch`` Ctrl-C ends the replay and leaves what there is:
        ``stopped`` then says so."""
        if self.requests.users is not None:
            self._next_arrival()
        for i, change in enumerate(self.changes):
            self._at(change.when_s, CHANGE, i)
        try:
            self._run(watch)
        except KeyboardInterrupt:
            if watch is None:
                raise
            self.stopped = True
            self.record.sent_s[np.isinf(self.record.came_s)] = np.nan
        return self.record

    def _run(self, watch: Watch | None) -> None:
        events, due, servers, looked = self._events, self._due, self.servers, 0
        coming = self._coming() if self.requests.users is None else iter(())
        enters_s, enters = next(coming, NOBODY)
        self._enters_s = enters_s
        while events or enters >= 0:
            if events and events[0][0] < enters_s:
                now, kind, order, who = heappop(events)
            else:
                now, kind, order, who = enters_s, ENTRY, 0, enters
                enters_s, enters = next(coming, NOBODY)
                self._enters_s = enters_s
            if watch is not None:
                looked += 1
                if looked % WATCHED == 0:
                    self.now_s = now
                    watch(self.finished, now)
            if kind == STEP_END:
                if due[who] == order:  # else the step ends earlier by now
                    self._step_ended(servers[who], now)
            elif kind == START:
                self._start(servers[who], now, True)
            elif kind == ENTRY:
                self._put(who, 0, now)
            else:
                self._rarely(kind, order, who, now)

    def _rarely(self, kind: int, order: int, who: int, now: float) -> None:
        """What else happens."""
        if kind == HANDED_OVER:
            if self._sending.get(who, (0, 0))[1] == order:
                del self._sending[who]
                self._put(who, 1, now)
        elif kind == CHANGE:
            change = self.changes[who]
            if self.finished < len(self.requests):  # else nobody is left who would notice
                (self._add if change.count > 0 else self._lose)(change.pool, abs(change.count), now)
        else:
            self._later.append(who)
            if kind == ARRIVAL:
                self._next_arrival(now)
            self._send_waiting(now)

    def _coming(self) -> Iterator[tuple[float, int]]:
        """When whom enters of those who wait neither for a place nor for a reply; who is refused is over at once."""
        requests, rules, sent_s = self.requests, self.pools[0].rules, self.record.each.sent_s
        long = requests.input_len + requests.output_len > self._longest
        before_s = np.where(long, 0.0, rules.first_token_s + rules.prompt_token_s * requests.input_len)
        enters_s = requests.arrival_s + before_s
        order = np.argsort(enters_s, kind="stable")
        if requests.after is not None:
            order = order[requests.after[order] < 0]
        refused = set(np.flatnonzero(long).tolist())
        arrival_s, when = (array("d", times.astype(float).tobytes()) for times in (requests.arrival_s, enters_s[order]))
        for now, request in zip(when, array("q", order.astype(np.int64).tobytes()), strict=True):
            sent_s[request] = arrival_s[request]
            if request in refused:
                self.refused.append(request)
                self.finished += 1
                self._go_on(request, now)
            else:
                yield now, request

    def _at(self, when: float, kind: int, who: int) -> int:
        self._order += 1
        heappush(self._events, (when, kind, self._order, who))
        return self._order

    def _next_arrival(self, now: float = -inf) -> None:
        """Of those who wait for nobody's end who come ``now`` are here, and the one after them is seen to come."""
        after, arrival_s = self.requests.after, self.requests.arrival_s
        while (request := self._next) < len(arrival_s):
            self._next += 1
            if after is not None and after[request] >= 0:
                continue
            if (when := float(arrival_s[request])) != now:
                self._at(when, ARRIVAL, request)
                return
            self._later.append(request)

    def _send_waiting(self, now: float) -> None:
        """Users send their next requests."""
        users, record = self.requests.users, self.record
        while self._later and (users is None or self._in_flight < users):
            request = self._later.popleft()
            record.each.sent_s[request] = now
            if record.longest(request) > self._longest:
                self.refused.append(request)
                self.finished += 1
                self._go_on(request, now)
                continue
            self._in_flight += 1
            self._enter(request, now)

    def _enter(self, request: int, now: float) -> None:
        rules = self.pools[0].rules
        self._at(now + rules.first_token_s + rules.prompt_token_s * self.record.prompt(request), ENTRY, request)

    def _go_on(self, request: int, now: float) -> None:
        """A request ended or was refused: whoever waited for that thinks, and asks."""
        for other in self._after.pop(request, ()):
            think_s = 0.0 if self.requests.think_s is None else float(self.requests.think_s[other])
            self._at(max(now + think_s, float(self.requests.arrival_s[other])), RETURN, other)

    def _put(self, request: int, phase: int, now: float) -> None:
        if self._room_first and not phase and self._asks(request, now):
            return
        server = self._places.pop(request, None) if phase else None
        if server is None or server.lost_s <= now:
            server = self._choose(request, phase, now)
        if server is None:
            self._stranded[phase].append(request)
            return
        self.record.server[request] = server.number
        self.record.each.came_s[request] = now
        earlier = server.put(request, now)
        if server.stretch is None:
            self._start(server, now)
        elif earlier:
            self._due[server.number] = self._at(server.stretch.end_s, STEP_END, server.number)

    def _asks(self, request: int, now: float) -> bool:
        """A request wants room of a server that writes, if it has none yet and there is one; it goes on as it has."""
        had = self._places.get(request)
        if had is not None and had.lost_s > now:
            return False
        server = self._choose(request, 1, now)
        if server is None or server.rules.room_first is None:
            self._places.pop(request, None)
            return False
        self._places[request] = server
        server.ask(request)
        self._take_places(server, now)
        return True

    def _take_places(self, server: Server, now: float) -> None:
        taken, earlier = server.take_places(now)
        if earlier and server.stretch is not None:
            self._due[server.number] = self._at(server.stretch.end_s, STEP_END, server.number)
        for request in taken:
            self._put(request, 0, now)

    def _step_ended(self, server: Server, now: float) -> None:
        if ended := server.finish():
            if server.reads_alone:
                ended = [request for request in ended if self._is_read(server, request, now)]
            last_s, waits = self.record.each.last_s, bool(self._after)
            for request in ended:
                last_s[request] = now
                if waits:
                    self._go_on(request, now)
            self.finished += len(ended)
            self._in_flight -= len(ended)
            if self._later:
                self._send_waiting(now)
        if server.asking:
            self._take_places(server, now)
        self._start(server, now)

    def _start(self, server: Server, now: float, all_there: bool = False) -> None:
        """The server's next step begins, when all who come now are there."""
        events = self._events
        if all_there:
            server.is_due = False
        elif self._enters_s <= now or (events and events[0][0] <= now):
            if not server.is_due:
                server.is_due = True
                self._at(now, START, server.number)
            return
        if server.stretch is None and (stretch := server.start(now)) is not None:
            self._order = order = self._order + 1
            self._due[server.number] = order
            heappush(events, (stretch.end_s, STEP_END, order, server.number))

    def _is_read(self, server: Server, request: int, now: float) -> bool:
        """A prompt is read and on its way to who writes; or all there is to say is said."""
        if self.record.left(request) < 1:
            self.record.first_token(request, now)
            if (place := self._places.pop(request, None)) is not None and place.lost_s > now:
                place.forget(request)
                self._take_places(place, now)
            return True
        pool = self.pools[server.pool]
        ends = max(now, self._link_free[server.number])
        ends += pool.hand_over_s(self.record.prompt(request)) if pool.hand_over_s else 0.0
        self._link_free[server.number] = ends
        self._sending[request] = (server.number, self._at(ends + pool.meeting_s, HANDED_OVER, request))
        return False

    def _phase(self, pool: Pool) -> int:
        return int(pool.rules.role == "decode")

    def _add(self, pool: int, count: int, now: float) -> None:
        one = self.pools[pool]
        phase = self._phase(one)
        for _ in range(count):
            kind = Pipeline if one.rules.stages > 1 else Server
            server = kind(one.rules, one.times, self.record, len(self.servers), pool, tells=self._tells)
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

    def _choose(self, request: int, phase: int, now: float) -> Server | None:
        servers = self._there[phase]
        if (longest := self.record.longest(request)) > self._all_take:
            servers = [server for server in servers if longest <= server.rules.most_tokens]
        if len(servers) < 2:
            return servers[0] if servers else None
        if self.router == "round_robin":
            self._turn[phase] += 1
            return servers[(self._turn[phase] - 1) % len(servers)]
        if self.router == "power_of_two":
            one, other = self._random.choice(len(servers), 2, replace=False)
            return min(servers[one], servers[other], key=_load)
        least = min(servers, key=_load)
        if self.router != "prefix_aware" or self.record.blocks is None or phase:
            return least
        most = max(servers, key=_load).load
        if most - least.load > UNEVEN_BY and most > UNEVEN_TIMES * least.load:
            return least
        blocks = self.record.blocks_of(request)
        best = max(servers, key=lambda s: (s.found(blocks, now), -s.load))
        tokens = best.found(blocks, now) * self.record.block_tokens
        return best if tokens > MATCHED * self.record.prompt(request) else least
