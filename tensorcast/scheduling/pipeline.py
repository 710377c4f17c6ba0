"""A server with pipeline stages: as many micro-batches are under way as there are stages.

The sequences that decode are spread over micro-batches and write a token when theirs is back; prompts wait in one
queue and are read by whichever micro-batch is composed next, a prompt in chunks by one after another. A stage runs one
at a time, in the order in which they were composed, and each is composed when the oldest one is back: a long one holds
up those behind it at every stage. Step times are of one stage.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from typing import Any

from tensorcast.scheduling.rank import Rank
from tensorcast.scheduling.record import GAPS, Record
from tensorcast.scheduling.room import Batch, Standing
from tensorcast.scheduling.rules import Rules
from tensorcast.scheduling.server import Server
from tensorcast.scheduling.step_times import StepTimes, Stretch

OWN = ("decoding", "steps", "_tokens", "_last", "_ends", "still", "next")
"""What of a rank each of its micro-batches has of its own."""


class PipelinedRank(Rank):
    """A rank whose decoding sequences are those of one micro-batch at a time."""

    def __init__(self, rules: Rules, record: Record) -> None:
        super().__init__(rules, record)
        self._meant = 0
        self._others: list[dict[str, Any]] = [
            {"decoding": {}, "steps": 0, "_tokens": 0.0, "_last": 0, "_ends": [], "still": Standing(), "next": Batch()}
            for _ in range(rules.stages)
        ]

    def turn_to(self, number: int) -> None:
        """The micro-batch whose sequences are meant from now on."""
        if number == self._meant:
            return
        mine = vars(self)
        self._others[self._meant] = {name: mine[name] for name in OWN}
        self.elsewhere += len(self.decoding)
        mine.update(self._others[number])
        self.elsewhere -= len(self.decoding)
        self._meant = number

    @property
    def context(self) -> float:
        """Cached tokens of its sequences, in the mean."""
        return self._tokens / len(self.decoding) + self._each * self.steps if self.decoding else 0.0

    @property
    def unread(self) -> bool:
        """Whether prompts that were let in have tokens that no micro-batch has taken."""
        return any(one.read < one.tokens for one in self.reading)

    def steps_left(self) -> float:
        """Its decode steps until a sequence ends."""
        return self._ends[0][0] - self.steps if self._ends else math.inf

    def read(self, batch: Batch, now_s: float, ended: list[int]) -> None:
        """As :meth:`Rank.read`; who started over while it was under way is not among them."""
        batch.done = [one for one in batch.done if any(one is other for other in self.reading)]
        super().read(batch, now_s, ended)


class Pipeline(Server):
    """A :class:`Server` with pipeline stages. Its steps are those of one micro-batch."""

    def __init__(
        self, rules: Rules, times: StepTimes, record: Record, number: int = 0, pool: int = 0, *, tells: bool = True
    ) -> None:
        super().__init__(rules, times, record, number, pool, tells=tells)
        self.piped = [PipelinedRank(rules, record) for _ in range(rules.ranks)]
        self.ranks = list(self.piped)
        self._free_s = [0.0] * rules.stages  # when each stage has done what it has
        self._under_way: deque[int] = deque()  # micro-batches in the order in which they were composed
        self._done_s = [0.0] * rules.stages  # when each of them is back
        self._stage_s = [0.0] * rules.stages  # seconds that it keeps a stage
        self._back_s = [0.0] * rules.stages  # when it was back last
        self._mixed = [False] * rules.stages  # whether it has prompts
        self._again = 0  # the one that is back
        self._now_s = 0.0  # since when all is as it is

    def put(self, request: int, now_s: float) -> bool:
        """As :meth:`Server.put`; a request is seen as a micro-batch is back."""
        stretch = self.stretch
        if stretch is None or not stretch.mixed:
            return super().put(request, now_s)
        self.stretch = None
        super().put(request, now_s)
        self.stretch = stretch
        return False

    def start(self, now_s: float) -> Stretch | None:
        """Compose the micro-batch that is back, and others if there are prompts for them and nothing in them."""
        seen, stages = self._seen(now_s), self.rules.stages
        self._composes(self._again, now_s, seen)
        if not self._under_way:
            self._rest(now_s)
            if seen >= now_s or not any(rank.waiting for rank in self.ranks):
                return None
            seen = now_s  # nothing runs: whoever came meanwhile is seen at once
            if not self._composes(self._again, now_s, seen):
                return None
        for number in range(self._again + 1, self._again + stages):
            if not self._more(seen):
                break
            if number % stages not in self._under_way and not self._composes(number % stages, now_s, seen):
                break
        self._now_s = now_s
        self.stretch = self._next_back(now_s, seen)
        self._until_kept -= 1
        if not self._until_kept:
            self._remember(now_s)
        return self.stretch

    def _more(self, seen_s: float) -> bool:
        """Whether there are prompts to read that came by ``seen_s``."""
        came_s = self.record.each.came_s
        return any(rank.unread or (rank.waiting and came_s[rank.waiting[0]] <= seen_s) for rank in self.piped)

    def _composes(self, number: int, now_s: float, seen_s: float) -> bool:
        """Compose that micro-batch, if there is anything for it, and send it through the stages."""
        hold = self._waits and (self._waits_for_more(seen_s) if self._alone else self._waits_for_ranks(seen_s))
        mixed = running = False
        for rank in self.piped:
            rank.turn_to(number)
            batch = rank.batch(seen_s, now_s, hold)
            mixed, running = mixed or bool(batch.prompts), running or bool(batch.sequences)
        self.batches = [rank.next for rank in self.ranks]
        if not mixed and not running:
            return False
        self._mixed[number], self._stage_s[number] = mixed, self._mixed_s() if mixed else self._decoding_s()
        at, free = now_s, self._free_s
        for stage, until in enumerate(free):
            at = free[stage] = max(at, until) + self._stage_s[number]
        self._done_s[number] = at
        self._under_way.append(number)
        return True

    def _decoding_s(self, steps: float = 0.0) -> float:
        """Seconds of a stage in which the micro-batch that is meant decodes, after so many more ``steps``."""
        more = self.rules.tokens_per_step * steps
        if self._alone:
            rank = self.piped[0]
            return self.times.decoding_line(len(rank.decoding), rank.context + more)[0] if rank.decoding else 0.0
        mean = sum(len(rank.decoding) for rank in self.piped) / len(self.piped)
        each = [self.times.decoding(len(one.decoding), one.context + more, mean) for one in self.piped if one.decoding]
        return max(each, default=0.0)

    def _next_back(self, now_s: float, seen_s: float) -> Stretch:
        """Until the oldest micro-batch is back; or, where all decode and nobody is to be let in, until one ends."""
        order, done_s = self._under_way, self._done_s
        back_s = max(done_s[order[0]], now_s)
        if any(self._mixed[number] for number in order) or any(rank.unread for rank in self.piped):
            return Stretch(now_s, back_s - now_s, 0.0, 1, back_s, True)
        steps = self._undisturbed(seen_s)
        if steps <= 1:
            return Stretch(now_s, back_s - now_s, 0.0, 1, back_s)
        # each is back once in a round, which takes as long as the longest one takes all stages
        count = len(order)
        rounds = [self._longest(0.0), self._longest((steps - 1) / count)]
        each, last = (self.rules.stages * seconds / count for seconds in rounds)
        slope = (last - each) / (steps - 1)
        stretch = Stretch(back_s - each, each, slope, steps, 0.0)
        stretch.end_s = stretch.after(steps)
        return stretch

    def _longest(self, steps: float) -> float:
        """Seconds of the longest stage, after so many more ``steps`` of each micro-batch."""
        found = 0.0
        for number in self._under_way:
            for rank in self.piped:
                rank.turn_to(number)
            found = max(found, self._decoding_s(steps))
        return found

    def _undisturbed(self, seen_s: float) -> int:
        """How often a micro-batch is back until a sequence ends, somebody may be let in, or the cache is full."""
        order, found = self._under_way, math.inf
        count, points, each = len(order), self.times.contexts, self.rules.tokens_per_step
        for rank in self.piped:
            if rank.waiting:
                closed = rank.closed_for(self._begun, seen_s)
                found = min(found, closed if self.rules.splits else 1)
            if rank.growth:
                found = min(found, count * (int(rank.free / rank.growth) - 1))
            for place, number in enumerate(order, 1):
                rank.turn_to(number)
                found = min(found, place + count * (rank.steps_left() - 1))
                if rank.decoding and (beyond := bisect_right(points, rank.context)) < len(points):
                    found = min(found, count * max(1, math.ceil((points[beyond] - rank.context) / each)))
        if self._waits and any(rank.waiting or rank.reading for rank in self.piped):
            return 1
        return max(1, int(found))

    def finish(self) -> list[int]:
        """Micro-batches are back that were to be: requests that are done here."""
        stretch, rules, order = self.stretch, self.rules, self._under_way
        assert stretch is not None
        seconds, steps, count = stretch.end_s - self._now_s, stretch.steps, len(order)
        self.busy_s += seconds
        self.steps += steps
        if self._waits and not self._alone:
            self._held = (self._held + steps - 1) % rules.waits.balance_steps
        plain_s = self._plain_s() if stretch.mixed else 0.0
        if stretch.mixed:
            self.prompts_s += seconds
            self._delayed_s += max(seconds - plain_s / count, 0.0)
        ended: list[int] = []
        for place in range(1, min(steps, count) + 1):
            number, times = order[0], (steps - place) // count + 1
            last = place + (times - 1) * count
            at = stretch.end_s if last == steps else stretch.after(last)
            order.popleft()
            self._is_back(number, times, at, plain_s, ended)
            order.append(number)
            self._back_s[number] = at
        if steps > count:
            order.rotate(-(steps % count))
        if steps > 1:
            self._goes_on(stretch)
        self._again = order.pop()
        self._mixed[self._again], self._stage_s[self._again] = False, 0.0
        if ended:
            self._left(ended, self._delayed_s)
            self.load -= len(ended)
        if rules.look_steps > 1:
            self._look(stretch)
        begun, lag = self._begun, rules.lag
        begun.extend(self._now_s if step == 0 else stretch.after(step) for step in range(max(0, steps - lag), steps))
        self.stretch = None
        return ended

    def _goes_on(self, stretch: Stretch) -> None:
        """Where micro-batches are after a stretch in which all decode, the last of which is back."""
        order, stages = self._under_way, self.rules.stages
        each = stretch.first_s + stretch.slope_s * (stretch.steps - 1)
        for place, number in enumerate(order):
            for rank in self.piped:
                rank.turn_to(number)
            self._stage_s[number] = self._decoding_s()
            if number != order[-1]:
                self._done_s[number] = stretch.end_s + (place + 1) * each
        behind = order[-2] if len(order) > 1 else order[-1]
        done_s, stage_s = (self._done_s[behind], self._stage_s[behind]) if behind != order[-1] else (stretch.end_s, 0.0)
        self._free_s = [done_s - (stages - 1 - stage) * stage_s for stage in range(stages)]

    def _is_back(self, number: int, times: int, at_s: float, plain_s: float, ended: list[int]) -> None:
        """A micro-batch is back, ``times`` since all is as it is, the last time at ``at_s``."""
        rules, gap_s = self.rules, (at_s - self._back_s[number]) / (times * self.rules.tokens_per_step)
        wait = self._mixed[number] and rules.ranks_wait
        for rank in self.piped:
            rank.turn_to(number)
            batch, before, sequences = rank.next, len(ended), len(rank.decoding)
            batch.sequences = sequences
            if sequences and (wait or (batch.prompts and rules.alone)):
                rank.still.stand(sequences, at_s - self._back_s[number], plain_s)
            elif sequences:
                if rank.still.groups:
                    self._went_on(rank, gap_s)
                self.record.gaps[bisect_left(GAPS, gap_s)] += sequences * times * rules.tokens_per_step
                rank.decoded(times, ended)
            others_s = self.record.each.others_s
            for one in batch.done:
                others_s[one.request] -= self._delayed_s + rank.still.while_others_s
            if batch.prompts:
                rank.read(batch, at_s, ended)
                batch.clear()
            self._left(ended[before:], rank.still.while_others_s)

    def _plain_s(self) -> float:
        """What a round would take if nobody read."""
        return self.rules.stages * self._longest(0.0)

    def found(self, blocks: tuple[int, ...], now_s: float) -> int:
        """Blocks of a prompt that the best rank has."""
        return max(rank.found(blocks, 0) for rank in self.ranks)

    def take_places(self, now_s: float) -> tuple[list[int], bool]:
        """As :meth:`Server.take_places`."""
        stretch, taken, count = self.stretch, [], max(len(self._under_way), 1)
        done = 0 if stretch is None else stretch.done_by(now_s)
        for rank in self.ranks:
            taken += rank.take_places(-(-done // count))
        self.asking -= len(taken)
        if not taken or stretch is None:
            return taken, False
        rounds = min(int(rank.free / rank.growth) if rank.growth else stretch.steps for rank in self.ranks)
        steps = max(done + 1, count * (rounds - 1))
        if steps >= stretch.steps:
            return taken, False
        stretch.cut(steps)
        return taken, True

    def _since_s(self, stretch: Stretch) -> float:
        """Since when all is as it is."""
        return self._now_s

    def _all_leave(self) -> list[int]:
        """What micro-batches under way would have written is lost."""
        here: list[int] = []
        for number in range(self.rules.stages):
            for rank in self.piped:
                rank.turn_to(number)
            here += super()._all_leave()
        self._under_way.clear()
        return here

    def _remember(self, now: float) -> None:
        used, reading, decoding, waiting = 0.0, 0, 0, 0
        for rank in self.ranks:
            used += rank.used
            reading, decoding = reading + len(rank.reading), decoding + len(rank.decoding) + rank.elsewhere
            waiting += len(rank.waiting) + len(rank.places.asks)
        self.moments.add((now, reading, decoding, waiting, used / (len(self.ranks) * self.rules.cache_tokens)))
        self._until_kept = self.moments.every
