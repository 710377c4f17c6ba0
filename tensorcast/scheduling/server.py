"""A server: data-parallel ranks that step together, each with a scheduler and a cache of its own.

A step takes as long as its busiest rank; experts see the tokens of all. Decode steps between two events (a request
comes, one ends, the cache is full) are one stretch, whose steps grow evenly with what is cached: its time is a sum in
closed form, so that a replay costs time by events, not by tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field

from tensorcast.scheduling.rank import Batch, Rank
from tensorcast.scheduling.record import Moments, Record
from tensorcast.scheduling.rules import Rules
from tensorcast.scheduling.step_times import StepTimes


@dataclass(slots=True)
class Stretch:
    """Steps under way: the first begins at ``start_s`` and takes ``first_s``, each after it ``slope_s`` longer.
    ``mixed``: with prompts."""

    start_s: float
    first_s: float
    slope_s: float
    steps: int
    batches: list[Batch]
    mixed: bool = False
    end_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.end_s = self.after(self.steps)

    def cut(self, steps: int) -> None:
        """It ends after so many steps."""
        self.steps, self.end_s = steps, self.after(steps)

    def after(self, steps: float) -> float:
        """When so many of its steps are done."""
        return self.start_s + steps * self.first_s + self.slope_s * steps * (steps - 1) / 2

    def done_by(self, now_s: float) -> int:
        """Steps that are done at ``now_s``."""
        low = (now_s - self.start_s) / self.first_s
        if self.slope_s > 0:
            half = self.first_s / self.slope_s - 0.5
            low = math.sqrt(half * half + 2 * (now_s - self.start_s) / self.slope_s) - half
        return min(max(int(low + 1e-9), 0), self.steps)


class Server:
    """One engine, the ``number``-th of a fleet, of its ``pool``-th pool; there ``from_s`` until it is lost."""

    def __init__(self, rules: Rules, times: StepTimes, record: Record, number: int = 0, pool: int = 0) -> None:
        self.rules, self.times, self.record, self.number, self.pool = rules, times, record, number, pool
        self.from_s, self.lost_s = 0.0, math.inf
        self.ranks = [Rank(rules, record) for _ in range(rules.ranks)]
        self.stretch: Stretch | None = None
        self.load = 0  # requests here
        self.moments = Moments()
        self.busy_s = self.prompts_s = 0.0
        self.steps = 0
        self._begun: deque[float] = deque(maxlen=rules.lag)  # of the last steps, in which the next was composed
        self._delayed_s = 0.0  # that prompts have taken from decoding sequences so far
        self._stalled_s = 0.0  # that decoding sequences have stood still for prompts
        self._held = 0  # steps that prompts have waited for other ranks'
        self._next = 0

    def put(self, request: int) -> None:
        """A request comes, to the rank that the engine would choose."""
        ranks = self.ranks
        if self.rules.round_robin:
            rank = ranks[self._next % len(ranks)]
            self._next += 1
        else:
            rank = min(ranks, key=lambda one: one.load) if len(ranks) > 1 else ranks[0]
        rank.waiting.append(request)
        self.load += 1

    def arrive(self, now_s: float) -> bool:
        """Somebody came at ``now_s``: the stretch under way ends with its step. Whether that changes its end."""
        stretch = self.stretch
        if stretch is None or stretch.steps == 1:
            return False
        steps = min(stretch.done_by(now_s) + 1, stretch.steps)
        changed = steps != stretch.steps
        stretch.cut(steps)
        return changed

    def start(self, now_s: float) -> bool:
        """Compose what comes next; whether there is anything."""
        seen = self._begun[0] if self._begun else now_s
        hold = self._holds_prompts(seen)
        batches = [rank.batch(seen, now_s, hold) for rank in self.ranks]
        mixed = running = False
        for batch in batches:
            mixed, running = mixed or bool(batch.prompts), running or batch.sequences > 0
        if mixed:
            self.stretch = Stretch(now_s, self._mixed_s(batches), 0.0, 1, batches, mixed=True)
        elif running:
            self.stretch = self._decoding(batches, now_s)
        elif any(rank.waiting for rank in self.ranks) and seen < now_s:
            self._begun.clear()  # nothing runs: whoever came meanwhile is seen at once
            return self.start(now_s)
        else:
            self.stretch = None
            self._begun.clear()
            return False
        return True

    def finish(self) -> list[int]:
        """The stretch under way ends: requests that are done here."""
        stretch = self.stretch
        assert stretch is not None
        now, mixed = stretch.end_s, stretch.mixed
        ended: list[int] = []
        seconds = now - stretch.start_s
        self.busy_s += seconds
        self.steps += stretch.steps
        self.prompts_s += seconds if mixed else 0.0
        decoded = 0
        for rank, batch in zip(self.ranks, stretch.batches, strict=True):
            if batch.sequences and not (self.rules.alone and batch.prompts):
                decoded += batch.sequences
                ended += rank.decoded(stretch.steps)
            if batch.prompts:
                ended += rank.read(batch, now)
        if decoded:
            each = stretch.steps * self.rules.tokens_per_step
            gap = seconds / each
            if self._stalled_s:
                self.record.gap(gap + self._stalled_s, decoded)
                self._stalled_s, each = 0.0, each - 1
            self.record.gap(gap, decoded * each)
        elif any(batch.sequences for batch in stretch.batches):
            self._stalled_s += seconds
        others_s = self.record.others_s
        if mixed:
            self._delayed_s += seconds - self._undisturbed_s(stretch.batches)
            for batch in stretch.batches:
                for one in batch.done:
                    others_s[one.request] -= self._delayed_s
        for request in ended:
            others_s[request] += self._delayed_s
        self.load -= len(ended)
        self._remember(stretch)
        self.stretch = None
        return ended

    def lose(self, now_s: float) -> list[int]:
        """The server is gone, with its cache: all who were here, those with replies under way first. What was written
        by now stays written."""
        stretch = self.stretch
        if stretch is not None:
            done = 0 if stretch.mixed else min(stretch.done_by(now_s), stretch.steps - 1)
            if done:
                stretch.cut(done)
                self.finish()
            self.busy_s += now_s - (stretch.end_s if done else stretch.start_s)
        writing = [request for rank in self.ranks for request in rank.decoding]
        self.record.others_s[writing] += self._delayed_s
        here = [request for rank in self.ranks for request in rank.lose()]
        self.stretch, self.lost_s, self.load = None, now_s, 0
        self.moments.add((now_s, 0, 0, 0, 0.0))
        return here

    def _undisturbed_s(self, batches: list[Batch]) -> float:
        """What a step with prompts would have taken the decoding sequences without them."""
        if self.rules.alone:
            return 0.0
        busiest = max(batches, key=lambda batch: batch.sequences)
        if not busiest.sequences:
            return 0.0
        mean = sum(batch.sequences for batch in batches) / len(batches)
        return self.times.decoding(busiest.sequences, busiest.context, mean)

    def _remember(self, stretch: Stretch) -> None:
        for step in range(max(0, stretch.steps - self.rules.lag), stretch.steps):
            self._begun.append(stretch.after(step))
        if not self.moments.next():
            return
        free, reading, decoding, waiting = 0.0, 0, 0, 0
        for rank in self.ranks:
            free += rank.free
            reading, decoding = reading + len(rank.reading), decoding + len(rank.decoding)
            waiting += len(rank.waiting)
        cache = free / (len(self.ranks) * self.rules.cache_tokens)
        self.moments.add((stretch.end_s, reading, decoding, waiting, 1 - cache))

    def _holds_prompts(self, seen_s: float) -> bool:
        """Whether prompts wait until every rank has one (attention DP's balance)."""
        if not self.rules.balance_steps or len(self.ranks) == 1:
            return False
        has = [rank.has_prompt(seen_s) for rank in self.ranks]
        if all(has) or not any(has):
            self._held = 0
            return False
        self._held += 1
        if self._held >= self.rules.balance_steps or not all(rank.decoding for rank in self.ranks):
            self._held = 0
            return False
        return True

    def _mixed_s(self, batches: list[Batch]) -> float:
        alone, times = self.rules.alone, self.times
        own, tokens = 0.0, 0.0
        for batch in batches:
            beside = 0 if alone and batch.prompts else batch.sequences
            own = max(own, times.own(batch.prompts, beside, batch.context))
            tokens += batch.new_tokens + beside * times.tokens_each
        return own + times.shared(tokens / len(batches))

    def _decoding(self, batches: list[Batch], now_s: float) -> Stretch:
        each = self.rules.tokens_per_step
        steps = math.inf
        for rank in self.ranks:
            steps = min(steps, rank.decode_steps_left())
            if rank.waiting and self.rules.lag:
                steps = 1  # somebody may be seen after it
        if len(batches) == 1:
            batch = batches[0]
            first, slope = self.times.decoding_line(batch.sequences, batch.context)
            return Stretch(now_s, first, slope * each, int(self._up_to_a_point(steps, batch.context)), batches)
        mean = sum(batch.sequences for batch in batches) / len(batches)
        busiest = [max(batches, key=lambda b: b.sequences)]
        busiest.append(max(batches, key=lambda b: b.sequences * b.context))
        for batch in busiest:
            steps = self._up_to_a_point(steps, batch.context)
        first = max(self.times.decoding(b.sequences, b.context, mean) for b in busiest)
        slope = 0.0
        if steps > 1:
            more = each * (steps - 1)
            last = max(self.times.decoding(b.sequences, b.context + more, mean) for b in busiest)
            slope = (last - first) / (steps - 1)
        return Stretch(now_s, first, slope, int(steps), batches)

    def _up_to_a_point(self, steps: float, context: float) -> float:
        """While the context crosses no point of the table, a step's time grows by the same with every step."""
        points = self.times.contexts
        beyond = bisect_right(points, context)
        if beyond == len(points):
            return steps
        return min(steps, max(1, math.ceil((points[beyond] - context) / self.rules.tokens_per_step)))
