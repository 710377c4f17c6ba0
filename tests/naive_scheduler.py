"""A scheduler told token by token, in plain loops: what :mod:`tensorcast.scheduling` is held to.

One server of one rank. A step is composed of what was seen ``lag`` steps before; sequences and their caches are counted
one by one, and no two steps are taken together.
"""

from __future__ import annotations

from dataclasses import dataclass

from tensorcast.scheduling.requests import Requests
from tensorcast.scheduling.rules import Rules
from tensorcast.scheduling.step_times import StepTimes


@dataclass
class Sequence:
    request: int
    to_read: int
    left: int
    read: int = 0
    tokens: int = 0
    written: int = 0


class Naive:
    """``first_s, last_s, sent_s`` by request; the most tokens that the cache held; ``steps`` and ``preemptions``."""

    def __init__(self, requests: Requests, rules: Rules, times: StepTimes) -> None:
        self.requests, self.rules, self.times = requests, rules, times
        self.first_s: dict[int, float] = {}
        self.last_s: dict[int, float] = {}
        self.sent_s: dict[int, float] = {}
        self.most_used, self.steps, self.preemptions = 0.0, 0, 0
        self.now, self.in_flight, self.budget, self.whole = 0.0, 0, 0, 0
        self.share, self.shut = 0.0, False
        self.rest()
        self.coming = list(range(len(requests)))
        self.later: list[int] = []
        self.entering: list[tuple[float, int]] = []
        self.waiting: list[tuple[float, int]] = []
        self.again: dict[int, int] = {}  # tokens of a reply whose sequence was thrown out
        self.reading: list[Sequence] = []
        self.running: list[Sequence] = []
        self.begun: list[float] = []
        self.unlooked, self.seen = 0, 0.0  # decode steps since the last look for requests, and until when it saw them
        self.prompts: list[tuple[int, int]] = []
        self.done: list[Sequence] = []

    def simulate(self) -> Naive:
        """Every step of the server until nobody is left."""
        while self.step():
            pass
        return self

    def rest(self) -> None:
        expected = self.rules.expected
        self.share = 0.0 if expected is None else 1.0 if expected.fixed_whole else expected.first

    def send(self, when: float) -> None:
        users = self.requests.users
        while self.later and (users is None or self.in_flight < users):
            request = self.later.pop(0)
            self.sent_s[request] = when
            self.in_flight += 1
            self.entering.append((when + self.rules.first_token_s, request))

    def advance(self, until: float) -> None:
        """Everyone who comes by ``until`` stands in the queue."""
        while self.coming and float(self.requests.arrival_s[self.coming[0]]) <= until:
            request = self.coming.pop(0)
            self.later.append(request)
            self.send(float(self.requests.arrival_s[request]))
        self.entering.sort()
        while self.entering and self.entering[0][0] <= until:
            self.waiting.append(self.entering.pop(0))

    def held(self, one: Sequence) -> int:
        if self.rules.reserves_reply:
            return int(self.requests.input_len[one.request]) + int(self.requests.output_len[one.request]) - 1
        if self.rules.admits_chunks and not one.tokens:
            return one.read
        return one.tokens - 1 if one.tokens else one.to_read

    def free(self) -> float:
        return self.rules.cache_tokens - sum(map(self.held, self.reading)) - sum(map(self.held, self.running))

    def growth(self) -> int:
        return 0 if self.rules.reserves_reply else len(self.running)

    def make_room(self) -> None:
        while self.free() < self.growth():
            reading = bool(self.reading) and not self.rules.alone
            if not reading and len(self.running) < 2:
                return
            expected = self.rules.expected
            if reading:
                one = self.reading.pop()
            elif expected is None:
                one = self.running.pop()
            else:
                order = sorted(range(len(self.running)), key=lambda i: (self.so_far(i), -self.asked(i), -i))
                one = self.running.pop(order[0])
            self.again[one.request] = self.again.get(one.request, 0) + one.written
            self.waiting.insert(0 if expected is None else len(self.waiting), (-1.0, one.request))
            self.preemptions += 1
            self.shut = False
            if expected is not None and not expected.fixed_whole:
                written = sum(self.so_far(i) + expected.spare_steps for i in range(len(self.running)))
                whole = sum(int(self.requests.output_len[other.request]) for other in self.running)
                self.share = min(1.0, written / (whole + 1))

    def so_far(self, i: int) -> int:
        one = self.running[i]
        return int(self.requests.output_len[one.request]) - one.left

    def asked(self, i: int) -> int:
        return int(self.requests.input_len[self.running[i].request])

    def take(self, one: Sequence) -> None:
        left = one.to_read - one.read
        new = min(left, self.budget)
        if not self.rules.splits and new < left and not one.read and one.to_read <= self.rules.chunk_tokens:
            new = 0
        if new > 0:
            self.prompts.append((new, one.read))
            one.read += new
            self.budget, self.whole = self.budget - new, self.whole - new
            if one.read == one.to_read:
                self.done.append(one)

    def may_come_in(self) -> Sequence | None:
        rules, request = self.rules, self.waiting[0][1]
        written = self.again.get(request, 0)
        prompt, reply = int(self.requests.input_len[request]), int(self.requests.output_len[request])
        one = Sequence(request, prompt + written, reply - written - 1)
        waits = not rules.splits and self.budget < one.to_read <= rules.chunk_tokens
        full = len(self.running) + len(self.reading) >= rules.most_sequences
        room = self.free() - self.growth()  # running ones get their next tokens first
        held = min(one.to_read, self.budget) if rules.admits_chunks else self.held(one)
        crowded = bool(self.running or self.reading) and held + self.expected(one) > room
        return None if waits or full or crowded or held > room else one

    def expected(self, one: Sequence) -> float:
        """Tokens that its reply and those of running ones are expected to take."""
        if self.rules.expected is None:
            return 0.0
        most = self.rules.expected.most_tokens
        ahead = min(sum(other.left for other in self.running), len(self.running) * most)
        beside = sum(min(other.left, most) for other in self.done)
        return min(one.left, most) + beside + self.share * ahead

    def compose(self) -> None:
        rules, begun = self.rules, self.begun
        if begun:
            self.unlooked += rules.look_steps if self.prompts else 1
        if not begun or self.unlooked >= rules.look_steps:
            self.unlooked, self.seen = 0, begun[-min(rules.lag, len(begun))] if rules.lag and begun else self.now
        seen = self.seen
        self.budget = rules.chunk_tokens - (0 if rules.alone else len(self.running))
        self.prompts, self.done = [], []
        for one in list(self.reading):
            if rules.admits_chunks and min(one.to_read - one.read, self.budget) > self.free() - self.growth():
                self.reading.remove(one)
                self.waiting.insert(0, (-1.0, one.request))
                self.preemptions += 1
                return
            self.take(one)
        self.whole = rules.prompt_tokens or self.budget
        while not self.shut and self.budget > 0 and self.whole > 0 and self.waiting and self.waiting[0][0] <= seen:
            fresh = self.may_come_in()
            if fresh is None:
                self.shut = rules.expected is not None and not rules.asks_again and bool(self.running)
                break
            self.waiting.pop(0)
            self.reading.append(fresh)
            self.take(fresh)

    def step(self) -> bool:
        """One step, or a wait for the next request; whether there was either."""
        self.advance(self.now)
        if not self.rules.reserves_reply:
            self.make_room()
        decoding = list(self.running)
        self.compose()
        self.most_used = max(self.most_used, self.rules.cache_tokens - self.free())
        if not self.prompts and not decoding:
            return self.wait()
        self.begun.append(self.now)
        self.steps += 1
        end = self.now + self.seconds(decoding)
        self.advance(end - 1e-12)
        self.now = end
        self.finish([] if self.rules.alone and self.prompts else decoding)
        return True

    def seconds(self, decoding: list[Sequence]) -> float:
        count = len(decoding)
        context = sum(one.tokens for one in decoding) / count if count else 0.0
        if not self.prompts:
            return self.times.decoding(count, context, count)
        beside = 0 if self.rules.alone else count
        tokens = sum(new for new, _ in self.prompts) + beside
        return self.times.own(self.prompts, beside, context) + self.times.shared(tokens, beside)

    def wait(self) -> bool:
        seen_late, self.begun = bool(self.waiting), []
        self.rest()
        if seen_late:  # nothing runs: whoever came meanwhile is seen at once
            return True
        ahead = [float(self.requests.arrival_s[self.coming[0]])] if self.coming else []
        ahead += [when for when, _ in self.entering]
        self.now = min(ahead, default=self.now)
        return bool(ahead)

    def finish(self, decoding: list[Sequence]) -> None:
        expected = self.rules.expected
        if expected is not None and decoding and not expected.fixed_whole:
            falls = (expected.first - expected.least) / expected.steps
            self.share = max(expected.least, self.share - falls)
        for one in decoding:
            one.tokens, one.left, one.written = one.tokens + 1, one.left - 1, one.written + 1
            if one.left == 0:
                self.running.remove(one)
                self.shut = False
                self.end(one)
        for one in self.done:
            self.reading.remove(one)
            self.first_s.setdefault(one.request, self.now)
            if one.left < 1:
                self.end(one)
            else:
                one.tokens, one.written = one.to_read + 1, 1
                self.running.append(one)
        self.send(self.now)

    def end(self, one: Sequence) -> None:
        self.last_s[one.request] = self.now
        self.in_flight -= 1
