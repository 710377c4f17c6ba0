"""A server of pipeline stages told stage by stage and token by token: what replays of pipelines are held to. Every
micro-batch passes every stage as an event of its own, in plain loops; no two steps are taken together."""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush

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


@dataclass
class MicroBatch:
    """Its sequences between steps, and what one that is under way has."""

    running: list[Sequence] = field(default_factory=list)
    decodes: list[Sequence] = field(default_factory=list)
    done: list[Sequence] = field(default_factory=list)
    seconds: float = 0.0
    under_way: bool = False


class NaivePipeline:
    """``first_s`` and ``last_s`` by request. The host composes a micro-batch when the oldest one is back, of the
    sequences that it has, and then empty ones as long as there are prompts to read; with none under way at once."""

    def __init__(self, requests: Requests, rules: Rules, times: StepTimes) -> None:
        self.requests, self.rules, self.times = requests, rules, times
        self.first_s: dict[int, float] = {}
        self.last_s: dict[int, float] = {}
        self.batches = [MicroBatch() for _ in range(rules.stages)]
        self.queues: list[list[int]] = [[] for _ in range(rules.stages)]  # before each stage
        self.busy = [False] * rules.stages
        self.waiting: list[int] = []
        self.reading: list[Sequence] = []
        self.events: list[tuple[float, int, str, tuple[int, int]]] = []
        self.order: list[int] = []  # under way, the oldest first
        self.now, self.count, self.in_flight = 0.0, 0, 0
        self.unsent = list(range(len(requests)))

    def simulate(self) -> NaivePipeline:
        """Until nobody is left."""
        for request in range(len(self.requests)):
            self.at(float(self.requests.arrival_s[request]), "arrives", (request, 0))
        while self.events:
            self.now = self.events[0][0]
            back: int | None = None
            while self.events and self.events[0][0] <= self.now + 1e-12:  # all that comes now is seen now
                _, _, what, about = heappop(self.events)
                if what == "arrives":
                    self.send()
                elif what == "enters":
                    self.waiting.append(about[0])
                elif self.leaves(*about):
                    back = about[0]
            if back is not None or not self.order:
                self.compose(back or 0)
            self.move()
        return self

    def at(self, when: float, what: str, about: tuple[int, int]) -> None:
        self.count += 1
        heappush(self.events, (when, self.count, what, about))

    def send(self) -> None:
        users = self.requests.users
        while self.unsent and float(self.requests.arrival_s[self.unsent[0]]) <= self.now + 1e-12 and (
            users is None or self.in_flight < users
        ):
            self.in_flight += 1
            self.at(self.now + self.rules.first_token_s, "enters", (self.unsent.pop(0), 0))

    def leaves(self, number: int, stage: int) -> bool:
        """A micro-batch leaves a stage; whether that was the last one."""
        self.busy[stage] = False
        if stage + 1 < self.rules.stages:
            self.queues[stage + 1].append(number)
            return False
        one = self.batches[number]
        assert self.order.pop(0) == number  # none overtakes another
        one.under_way = False
        for sequence in one.decodes:
            sequence.tokens, sequence.left = sequence.tokens + 1, sequence.left - 1
            if not sequence.left:
                one.running.remove(sequence)
                self.ends(sequence)
        for sequence in one.done:
            self.reading.remove(sequence)
            self.first_s[sequence.request] = self.now
            sequence.tokens = sequence.to_read + 1
            if sequence.left:
                one.running.append(sequence)
            else:
                self.ends(sequence)
        return True

    def ends(self, sequence: Sequence) -> None:
        self.last_s[sequence.request] = self.now
        self.in_flight -= 1
        self.send()

    def move(self) -> None:
        for stage, queue in enumerate(self.queues):
            if queue and not self.busy[stage]:
                self.busy[stage] = True
                number = queue.pop(0)
                self.at(self.now + self.batches[number].seconds, "leaves", (number, stage))

    def compose(self, first: int) -> None:
        if not self.fill(first) and not self.order:
            return
        for i in range(1, self.rules.stages):
            number = (first + i) % self.rules.stages
            more = self.waiting or any(one.read < one.to_read for one in self.reading)
            if not more or (not self.batches[number].under_way and not self.fill(number)):
                return

    def fill(self, number: int) -> bool:
        """Compose that micro-batch; whether there was anything for it."""
        one, rules = self.batches[number], self.rules
        budget = rules.chunk_tokens - (0 if rules.alone else len(one.running))
        prompts, one.done = list[tuple[int, int]](), []
        for sequence in self.reading:
            budget -= self.take(sequence, budget, prompts, one)
        while self.waiting and budget > 0:
            if sum(len(other.running) for other in self.batches) + len(self.reading) >= rules.most_sequences:
                break
            request = self.waiting.pop(0)
            prompt, reply = int(self.requests.input_len[request]), int(self.requests.output_len[request])
            sequence = Sequence(request, prompt, reply - 1)
            self.reading.append(sequence)
            budget -= self.take(sequence, budget, prompts, one)
        one.decodes = [] if rules.alone and prompts else list(one.running)
        if not prompts and not one.decodes:
            return False
        count = len(one.decodes)
        context = sum(sequence.tokens for sequence in one.decodes) / count if count else 0.0
        one.seconds = self.times.own(prompts, count, context) if prompts else self.times.decoding(count, context, count)
        one.under_way = True
        self.order.append(number)
        self.queues[0].append(number)
        return True

    @staticmethod
    def take(sequence: Sequence, budget: int, prompts: list[tuple[int, int]], one: MicroBatch) -> int:
        new = min(sequence.to_read - sequence.read, max(budget, 0))
        if new > 0:
            prompts.append((new, sequence.read))
            sequence.read += new
            if sequence.read == sequence.to_read:
                one.done.append(sequence)
        return new
