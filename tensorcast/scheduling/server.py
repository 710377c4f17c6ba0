"""A server: data-parallel ranks that step together, each with a scheduler and a cache of its own.

A step takes as long as its busiest rank; experts see the tokens of all. Decode steps between two events (a request
comes, one ends, the cache is full) are one stretch, whose steps grow evenly with what is cached: its time is a sum in
closed form, so that a replay costs time by events, not by tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from operator import attrgetter

from tensorcast.scheduling.rank import Rank
from tensorcast.scheduling.record import GAPS, Moments, Record
from tensorcast.scheduling.rules import Rules
from tensorcast.scheduling.step_times import StepTimes, Stretch

_sequences = attrgetter("sequences")
_crowd = attrgetter("crowd")


class Server:
    """One engine, the ``number``-th of a fleet, of its ``pool``-th pool; there ``from_s`` until it is lost."""

    def __init__(
        self, rules: Rules, times: StepTimes, record: Record, number: int = 0, pool: int = 0, *, tells: bool = True
    ) -> None:
        """``tells``: what requests' times go into, gaps between tokens, and moments, beside these times."""
        self.rules, self.times, self.record, self.number, self.pool = rules, times, record, number, pool
        self.from_s, self.idle_from_s, self.lost_s = 0.0, 0.0, math.inf
        self.ranks = [Rank(rules, record) for _ in range(rules.ranks)]
        self.batches = [rank.next for rank in self.ranks]
        self.stretch: Stretch | None = None
        self.is_due = False  # to compose its next step when all are there who come now
        self.load = 0  # requests here
        self.asking = 0  # of those, who wait for room before their prompts are read elsewhere
        self.moments = Moments()
        self.busy_s = self.prompts_s = 0.0
        self.steps = 0
        self._begun: deque[float] = deque(maxlen=rules.lag)  # of the last steps, in which the next was composed
        self._looked_s: float | None = None  # until when requests were seen, where not each step looks for them
        self._unlooked = 0  # decode steps since then
        self._delayed_s = 0.0  # that prompts have taken from sequences that decode meanwhile so far
        self._tells = tells
        self._until_kept = int(tells)  # stretches until the next moment that is kept; 0: none is
        self._held = 0  # steps in which no prompts were let in, as some rank had none
        self._gathered = 0  # steps that prompts have waited, where every rank has one
        self._next = 0
        self._places: dict[int, Rank] = {}  # where whose prompt is read elsewhere has or asks for room
        self.reads_alone = rules.role == "prefill"
        self._alone = rules.ranks == 1
        self._waits = rules.waits.any(rules.ranks)

    def put(self, request: int, now_s: float) -> bool:
        """A request comes, to the rank that the engine would choose. Whether the stretch under way ends earlier by
        that: with the step before the one in which it is seen, unless others wait before it."""
        stretch, rank = self.stretch, self._places.pop(request, None)
        if rank is None:
            rank = self._rank()
            self.load += 1
        else:
            rank.places.arrives(request)
        rank.waiting.append(request)
        if stretch is None or stretch.steps == 1 or (len(rank.waiting) > 1 and not self._waits):
            return False
        done = stretch.done_by(now_s)
        steps = done + 1
        if not self._waits:  # else every step counts in which prompts wait
            steps = self._next_look(max(steps, done + self.rules.lag + (stretch.after(done) < now_s)))
        if steps >= stretch.steps:
            return False
        stretch.cut(steps)
        return True

    def _rank(self) -> Rank:
        ranks = self.ranks
        if self.rules.round_robin:
            self._next += 1
            return ranks[(self._next - 1) % len(ranks)]
        return min(ranks, key=_crowd) if len(ranks) > 1 else ranks[0]

    def ask(self, request: int) -> None:
        """A request wants room here, to have its prompt read elsewhere."""
        rank = self._places[request] = self._rank()
        rank.places.asks.append(request)
        self.load += 1
        self.asking += 1

    def forget(self, request: int) -> None:
        """A prompt that is read elsewhere has no reply to write here."""
        rank = self._places.pop(request)
        rank.used -= rank.places.coming.pop(request, 0.0)
        self.load -= 1

    def take_places(self, now_s: float) -> tuple[list[int], bool]:
        """Who of those that asked has room now, and whether the stretch under way ends earlier, as it takes that."""
        stretch, taken = self.stretch, []
        done = 0 if stretch is None else stretch.done_by(now_s)
        for rank in self.ranks:
            taken += rank.take_places(done)
        self.asking -= len(taken)
        if not taken or stretch is None:
            return taken, False
        steps = max(done + 1, int(min(rank.decode_steps_left() for rank in self.ranks)))
        if steps >= stretch.steps:
            return taken, False
        stretch.cut(steps)
        return taken, True

    def found(self, blocks: tuple[int, ...], now_s: float) -> int:
        """Blocks of a prompt that the best rank has."""
        stretch = self.stretch
        steps = 0 if stretch is None or stretch.steps == 1 else stretch.done_by(now_s)
        return max(rank.found(blocks, steps) for rank in self.ranks)

    def start(self, now_s: float) -> Stretch | None:
        """Compose what comes next, if there is anything."""
        if self._alone and (steps := self.ranks[0].goes_on()):
            self.stretch = self._decoding_alone(steps, now_s)
        else:
            self._compose(now_s)
        self._until_kept -= 1
        if not self._until_kept:
            self._remember(now_s)
        return self.stretch

    def _next_look(self, steps: int) -> int:
        """The first steps of the stretch under way, so many at least, after which requests are looked for."""
        every = self.rules.look_steps
        return steps if every == 1 else steps + -(self._unlooked + steps) % every

    def _look(self, stretch: Stretch) -> None:
        """Requests were looked for, or were not, since the steps of a ``stretch`` began."""
        every = self.rules.look_steps
        unlooked = every if stretch.mixed else self._unlooked + stretch.steps
        self._unlooked = unlooked % every
        if unlooked >= every:
            self._looked_s = stretch.after(max(stretch.steps - self._unlooked - self.rules.lag, 0))

    def _seen(self, now_s: float) -> float:
        """Until when requests are seen by who composes now."""
        if self.rules.look_steps == 1:
            return self._begun[0] if self._begun else now_s
        if self._looked_s is None:
            self._looked_s = now_s
        return self._looked_s

    def _rest(self, now_s: float) -> None:
        """Nothing runs."""
        self.idle_from_s = now_s
        self._begun.clear()
        self._looked_s, self._unlooked = None, 0
        for rank in self.ranks:
            if rank.expected is not None:
                rank.expected.rests()

    def _compose(self, now_s: float) -> None:
        seen = self._seen(now_s)
        hold = self._waits and (self._waits_for_more(seen) if self._alone else self._waits_for_ranks(seen))
        mixed = running = False
        for rank in self.ranks:
            batch = rank.batch(seen, now_s, hold)
            if batch.prompts:
                mixed = True
            elif batch.sequences:
                running = True
        if mixed:
            seconds = self._mixed_s()
            self.stretch = Stretch(now_s, seconds, 0.0, 1, now_s + seconds, True)
        elif running:
            self.stretch = self._decoding(now_s, seen)
        else:
            self._rest(now_s)
            if seen < now_s and any(rank.waiting for rank in self.ranks):
                self._compose(now_s)  # nothing runs: whoever came meanwhile is seen at once

    def finish(self) -> list[int]:
        """The stretch under way ends: requests that are done here."""
        stretch, rules = self.stretch, self.rules
        assert stretch is not None
        seconds, steps = stretch.end_s - stretch.start_s, stretch.steps
        self.busy_s += seconds
        self.steps += steps
        tells, alone = self._tells, self._alone
        if self._waits and not alone:  # the first of them was counted when it was composed
            self._held = (self._held + steps - 1) % rules.waits.balance_steps
        ended: list[int] = []
        decoded, several, wait = 0, tells and not alone, stretch.mixed and rules.ranks_wait
        if tells and stretch.mixed:
            self._delay(seconds, wait)
        for rank in self.ranks:
            batch, before = rank.next, len(ended)
            if batch.sequences and not wait and not (batch.prompts and rules.alone):
                decoded += batch.sequences
                if rank.still.groups:
                    self._went_on(rank, seconds / (steps * rules.tokens_per_step))
                rank.decoded(steps, ended)
            if batch.prompts:
                rank.read(batch, stretch.end_s, ended)
            if several and len(ended) > before:
                self._left(ended[before:], rank.still.while_others_s)
        if tells:
            self._tell(seconds, steps * rules.tokens_per_step, decoded, ended)
        self.load -= len(ended)
        if rules.look_steps > 1:
            self._look(stretch)
        begun, lag = self._begun, rules.lag
        if lag == 1:
            begun.append(stretch.start_s if steps == 1 else stretch.after(steps - 1))
        else:
            begun.extend(stretch.after(step) for step in range(max(0, steps - lag), steps))
        self.stretch = None
        return ended

    def _tell(self, seconds: float, each: float, decoded: int, ended: list[int]) -> None:
        """Of so many sequences that ``decoded`` for so many seconds, ``each`` so many tokens."""
        if decoded:
            self.record.gaps[bisect_left(GAPS, seconds / each)] += decoded * each
        if ended:
            self._left(ended, self._delayed_s)

    def _left(self, ended: list[int], others_s: float) -> None:
        """Who is done: until then prompts have taken so many seconds, of which those before its own are gone."""
        each = self.record.each.others_s
        for request in ended:
            each[request] += others_s

    def _went_on(self, rank: Rank, gap_s: float) -> None:
        """Of a rank's sequences that write again the first gap is longer for those that stood still."""
        gaps, at = self.record.gaps, bisect_left(GAPS, gap_s)
        for count, stood_s in rank.still.go_on(rank.next.sequences):
            gaps[at] -= count
            gaps[bisect_left(GAPS, gap_s + stood_s, at)] += count

    def _delay(self, seconds: float, wait: bool) -> None:
        """What prompts took from replies under way, in a step of theirs: all of it from those that stood still, from
        others what it is longer than a step of these."""
        self.prompts_s += seconds
        alone, others_s = self.rules.alone, self.record.each.others_s
        going_s = min(self._undisturbed_s(wait), seconds)
        self._delayed_s = delayed_s = self._delayed_s + seconds - going_s
        for rank in self.ranks:
            batch = rank.next
            if batch.sequences and (wait or (alone and batch.prompts)):
                rank.still.stand(batch.sequences, seconds, going_s)
            if batch.done:
                gone_s = delayed_s + rank.still.while_others_s
                for one in batch.done:
                    others_s[one.request] -= gone_s

    def lose(self, now_s: float) -> list[int]:
        """The server is gone, with its cache: all who were here, those with replies under way first. What was written
        by now stays written."""
        stretch = self.stretch
        if stretch is not None:
            done = 0 if stretch.mixed else min(stretch.done_by(now_s), stretch.steps - 1)
            if done:
                stretch.cut(done)
                self.finish()
            self.busy_s += now_s - (stretch.end_s if done else self._since_s(stretch))
            self.idle_from_s = now_s
        here = self._all_leave()
        self.stretch, self.lost_s, self.load, self.asking = None, now_s, 0, 0
        self._places.clear()
        self.moments.add((now_s, 0, 0, 0, 0.0))
        return here

    def _since_s(self, stretch: Stretch) -> float:
        return stretch.start_s

    def _all_leave(self) -> list[int]:
        for rank in self.ranks:
            self.record.others_s[list(rank.decoding)] += self._delayed_s + rank.still.while_others_s
        return [request for rank in self.ranks for request in rank.lose()]

    def _undisturbed_s(self, wait: bool) -> float:
        """What a step with prompts would have taken the sequences that decode in it without them."""
        alone, busiest, most, total = self.rules.alone, None, 0, 0
        if wait or (alone and self._alone):
            return 0.0
        for batch in self.batches:
            if (count := batch.sequences) and not (alone and batch.prompts):
                total += count
                if count > most:
                    busiest, most = batch, count
        if busiest is None:
            return 0.0
        if self._alone:
            return self.times.decoding_line(most, busiest.context)[0]
        return self.times.decoding(most, busiest.context, total / len(self.batches))

    def _remember(self, now: float) -> None:
        used, reading, decoding, waiting = 0.0, 0, 0, 0
        for rank in self.ranks:
            used += rank.used
            reading, decoding = reading + len(rank.next.prompts), decoding + rank.next.sequences
            waiting += len(rank.waiting) + len(rank.places.asks)
        self.moments.add((now, reading, decoding, waiting, used / (len(self.ranks) * self.rules.cache_tokens)))
        self._until_kept = self.moments.every

    def _waits_for_ranks(self, seen_s: float) -> bool:
        """Whether prompts wait until every rank has one (attention DP's balance).

        Steps without any prompt count, too, so that one that comes alone waits for half of them in the mean.
        """
        waits = self.rules.waits
        writing = all(rank.decoding for rank in self.ranks)
        if all(rank.has_prompt(seen_s) for rank in self.ranks):
            self._held = 0
            if writing and self._gathered < waits.batching_steps:
                self._gathered += 1
                return True
            self._gathered = 0 if writing else self._gathered
            return False
        self._held += 1
        if self._held >= waits.balance_steps or not writing:
            self._held = 0
            return False
        return True

    def _waits_for_more(self, seen_s: float) -> bool:
        """Whether prompts of the only rank wait until there are enough for a step."""
        rank, rules = self.ranks[0], self.rules
        if not rank.decoding or not rank.has_prompt(seen_s):
            return False
        enough = rules.waits.batch_wait_share * rules.chunk_tokens
        if self._gathered >= rules.waits.batch_wait_steps or rank.would_hold(enough, seen_s):
            self._gathered = 0
            return False
        self._gathered += 1
        return True

    def _mixed_s(self) -> float:
        alone, wait, times = self.rules.alone, self.rules.ranks_wait, self.times
        busiest, tokens, decoding, ends, most = 0.0, 0.0, 0.0, 0.0, 0
        have_ends = times.prompts is not None and times.prompts.ends is not None
        for batch in self.batches:
            beside = 0 if wait or (alone and batch.prompts) else batch.sequences
            own = times.own(batch.prompts, beside, batch.context)
            busiest = own if own > busiest else busiest
            new, writes = batch.new_tokens, beside * times.tokens_each
            most = new if new > most else most
            tokens += new + writes
            decoding += writes
            if have_ends:
                ends += times.seen_at_ends(batch.prompts, writes)
        ranks = len(self.batches)
        seconds = busiest + times.shared(tokens / ranks, decoding / ranks, ends / ranks)
        return times.launched(seconds, most)

    def _decoding(self, now_s: float, seen_s: float) -> Stretch:
        steps = math.inf
        for rank in self.ranks:
            left = rank.decode_steps_left()
            if rank.waiting:
                closed = rank.closed_for(self._begun, seen_s)
                left = min(left, closed if rank.has_prompt(seen_s) else self._next_look(int(closed)))
            steps = left if left < steps else steps
        if self._waits and any(rank.waiting or rank.reading for rank in self.ranks):
            steps = 1  # every step counts in which prompts wait
        if self._alone:
            return self._decoding_alone(int(steps), now_s)
        first, slope, steps = self._busiest(steps)
        return Stretch(now_s, first, slope, int(steps), now_s + steps * first + slope * steps * (steps - 1) / 2)

    def _decoding_alone(self, steps: int, now_s: float) -> Stretch:
        """Up to ``steps`` decode steps of the only rank."""
        batch, each = self.batches[0], self.rules.tokens_per_step
        context = batch.context
        first, slope, until = self.times.decoding_line(batch.sequences, context)
        if context + each * (steps - 1) >= until:
            steps = self._up_to(until, context)
        slope *= each
        return Stretch(now_s, first, slope, steps, now_s + steps * first + slope * steps * (steps - 1) / 2)

    def _busiest(self, steps: float) -> tuple[float, float, float]:
        """Seconds of a decode step of several ranks, how much longer each after it is, and up to which of ``steps``."""
        batches, each, points = self.batches, self.rules.tokens_per_step, self.times.contexts
        mean = sum(batch.sequences for batch in batches) / len(batches)
        busiest = [max(batches, key=_sequences)]
        busiest.append(max(batches, key=lambda b: b.sequences * b.context))
        for batch in busiest:
            if (beyond := bisect_right(points, batch.context)) < len(points):
                steps = min(steps, self._up_to(points[beyond], batch.context))
        first = [self.times.decoding(b.sequences, b.context, mean) for b in busiest]
        leads = 0 if first[0] >= first[1] else 1
        if steps == 1:
            return first[leads], 0.0, steps
        last = [self.times.decoding(b.sequences, b.context + each * (steps - 1), mean) for b in busiest]
        slope = (last[leads] - first[leads]) / (steps - 1)
        ahead, behind = first[leads] - first[1 - leads], last[1 - leads] - last[leads]
        if behind > 0:  # the other one is busier from some step on
            steps = int((steps - 1) * ahead / (ahead + behind)) + 1
        return first[leads], slope, steps

    def _up_to(self, point: float, context: float) -> int:
        """Steps in which the context crosses no point of the table: a step's time grows by the same with each."""
        return max(1, math.ceil((point - context) / self.rules.tokens_per_step))
