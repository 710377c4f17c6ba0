"""One data-parallel rank: who waits, reads its prompt or writes its reply, and the cache that they take."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush

from tensorcast.scheduling.record import Record
from tensorcast.scheduling.room import Batch, Cache, Decoding, Expectation, Places, Reading, Standing
from tensorcast.scheduling.rules import Rules


class Rank(Cache):
    """The state of a rank; the server says when steps begin and end."""

    def __init__(self, rules: Rules, record: Record) -> None:
        super().__init__(rules, record)
        self.waiting: deque[int] = deque()
        self.reading: list[Reading] = []
        self.decoding: dict[int, Decoding] = {}  # in the order in which they were let in
        self.steps = 0  # decode steps so far
        self._tokens = 0.0  # of decoding sequences at step 0, were they as long ago: those now are _tokens + n e steps
        self._last = 0  # sum of the steps at which they end
        self._ends: list[tuple[int, int]] = []  # those of who starts over stay until they come first
        self.places, self.next, self.still = Places(), Batch(), Standing()
        self.expected = Expectation(rules.expected, record.requests.fixed) if rules.expected else None
        self._shut = False  # nobody is let in until a sequence has left
        self._closed_for = math.inf  # decode steps in which the head of the queue is not let in, unless a sequence ends
        self._each, self._only_writes = rules.tokens_per_step, rules.role == "decode"
        self._grows = 0.0 if rules.reserves_reply else rules.tokens_per_step  # of the cache, a step and sequence

    @property
    def load(self) -> int:
        """Requests here."""
        asking = len(self.places.asks) + len(self.places.coming)
        return len(self.waiting) + len(self.reading) + len(self.decoding) + self.elsewhere + asking

    @property
    def crowd(self) -> float:
        """Requests here as who chooses a rank counts them."""
        rules, waiting = self.rules, len(self.waiting)
        # who asks for room, or has it, is of a pool that writes
        here = self.load if self._only_writes else waiting + len(self.reading) + len(self.decoding)
        if not rules.queue_weight or not waiting:
            return here
        beyond = max(0.0, self.used / self._holds - rules.queue_from_used) if rules.queue_from_used else 1.0
        return here + rules.queue_weight * beyond * waiting

    @property
    def growth(self) -> float:
        """Tokens of the cache that a step of all sequences takes."""
        return (len(self.decoding) + self.elsewhere) * self._grows

    def batch(self, seen_s: float, now_s: float, hold_prompts: bool = False) -> Batch:
        """The next step, of requests that arrived by ``seen_s``, until the one after it. ``hold_prompts``: no prompt is
        read."""
        sequences = len(self.decoding)
        if sequences and self._holds - self.used < (sequences + self.elsewhere) * self._grows:
            self._make_room()
            sequences = len(self.decoding)
        if self._only_writes and self.waiting:
            self._take_over(seen_s, now_s)
            sequences = len(self.decoding)
        found = self.next
        found.sequences = sequences
        found.context = self._tokens / sequences + self._each * self.steps if sequences else 0.0
        if found.prompts:
            found.clear()
        if (self.reading or self.waiting) and self.has_prompt(seen_s) and not hold_prompts and not self._only_writes:
            self._read(found, seen_s, now_s)
        return found

    def goes_on(self) -> int:
        """Steps for which its sequences decode on, with nobody who waits or reads, and :attr:`next` composed of them; 0
        where there is more to ask, of :meth:`batch`."""
        sequences = len(self.decoding)
        if not sequences or self.waiting or self.reading:
            return 0
        free, growth = self._holds - self.used, sequences * self._grows
        steps = self._ends[0][0] - self.steps
        if free < growth * steps:
            if free < growth:
                return 0
            steps = int(free / growth)
        batch = self.next
        batch.sequences = sequences
        batch.context = self._tokens / sequences + self._each * self.steps
        if batch.prompts:
            batch.clear()
        return steps

    def has_prompt(self, seen_s: float) -> bool:
        """Whether a prompt could be read that arrived by ``seen_s``."""
        return bool(self.reading or (self.waiting and self.record.each.came_s[self.waiting[0]] <= seen_s))

    def would_hold(self, tokens: float, seen_s: float) -> bool:
        """Whether a step that decodes and reads what arrived by ``seen_s`` would hold so many ``tokens``."""
        rules, record = self.rules, self.record
        found = len(self.decoding) * rules.verify + sum(one.tokens for one in self.reading)
        for request in self.waiting:
            prompt = record.prompt(request)
            unfit = not rules.splits and prompt > rules.chunk_tokens - found
            if found >= tokens or unfit or record.each.came_s[request] > seen_s:
                break
            found += prompt
        return found >= tokens

    def take_places(self, steps: int) -> list[int]:
        """Who of those that ask has room from now on, when ``steps`` decode steps more have taken theirs."""
        first, places = self.rules.room_first, self.places
        if first is None or not places.asks or (self.waiting and self.waiting[0] not in places.here):
            return []  # who starts over is let in before anybody new
        free, most = self.free - self.growth * steps, first.most(self.rules.most_sequences)
        taken = places.take(self._held, len(self.decoding), most=most, free=free, reserved=first.reserved_tokens)
        self.used += sum(taken.values())
        return list(taken)

    def _held(self, request: int) -> float:
        """Tokens of the cache that a sequence takes as it starts to write."""
        reply = self.record.left(request) if self.rules.reserves_reply else 0
        return self.record.prompt(request) + self.rules.waste + reply

    def decode_steps_left(self) -> float:
        """Decode steps until a sequence ends or the cache is full."""
        if not self._ends:
            return math.inf
        steps = self._ends[0][0] - self.steps
        return steps if self._holds - self.used >= self.growth * steps else max(1, int(self.free / self.growth))

    def closed_for(self, begun: Sequence[float], seen_s: float) -> float:
        """Decode steps from now in which nobody of those who wait is let in, unless a sequence ends; 1 at least.

        ``begun``: when the last steps began, in which the next ones' requests are seen, now those by ``seen_s``.
        """
        came = self.record.each.came_s[self.waiting[0]]
        if came <= seen_s:
            return self._closed_for
        seen = next((i for i, when in enumerate(begun) if came <= when), len(begun))
        return max(seen + self.rules.lag - len(begun), 1)

    def decoded(self, steps: int, ended: list[int]) -> None:
        """``steps`` decode steps have passed, all at once; who ends with the last one is put into ``ended``."""
        self.steps += steps
        self.used += len(self.decoding) * self._grows * steps
        ends, prefix = self._ends, self.prefix
        if self.expected is not None:
            self.expected.fall(steps)
        if prefix is not None:
            prefix.shrink(self._holds - self.used)
        while ends and ends[0][0] <= self.steps:
            request = ends[0][1]
            if prefix is not None and self.record.requests.reply_blocks:
                self._keep_reply(request)
            self._leave(request)
            ended.append(request)

    def found(self, blocks: Sequence[int], steps: int) -> int:
        """How many of the first ``blocks`` are there when ``steps`` decode steps more have taken their room."""
        if self.prefix is None:
            return 0
        if steps:
            self.prefix.shrink(self.free - self.growth * steps)
        return self.prefix.match(blocks, len(blocks))

    def lose(self) -> list[int]:
        """Everything is gone; who was here, in the order in which they were let in. Replies go on after what is written
        of them, the token that came with the prompt included."""
        rules, record = self.rules, self.record
        for request, one in self.decoding.items():
            record.wrote(request, 1 + int((self.steps - one.joined) * rules.tokens_per_step))
        here = [*self.decoding, *(one.request for one in self.reading), *self.waiting, *self.places.asks]
        for request in here[len(self.decoding) :]:
            record.unadmit(request)
        self.waiting.clear()
        self.reading.clear()
        self.decoding.clear()
        self._ends.clear()
        self.places = Places()
        self.used = self._tokens = 0.0
        self._last = 0
        self.prefix = None
        return here

    def read(self, batch: Batch, now_s: float, ended: list[int]) -> None:
        """The step's prompts have been read; who has its whole reply with that (or its prompt, where that is all) is
        put into ``ended``."""
        if self.prefix is not None and self.rules.blocks_found != "scheduled":
            for one in self.reading if self.rules.blocks_found == "chunk" else batch.done:
                self._share_blocks(one)
        for one in batch.done:
            self.reading.remove(one)
            request = one.request
            if self.rules.role == "both":
                self.record.first_token(request, now_s)
            if self.rules.role == "prefill" or self.record.left(request) < 1:
                self._release(one.held, one.blocks)
                ended.append(request)
            else:
                self._join(request, one.tokens + 1, one.held, one.blocks)

    def _read(self, found: Batch, seen_s: float, now_s: float) -> None:
        rules, record = self.rules, self.record
        beside = 0.0 if rules.alone else found.sequences * rules.verify
        budget = int(rules.chunk_tokens - beside)
        whole = rules.prompt_tokens or budget
        self._closed_for = math.inf
        later: list[int] = []
        for one in tuple(self.reading):
            if rules.admits_chunks and not self._holds_chunk(one, budget):
                return
            budget -= self._take(found, one, budget)
        while budget > 0 and whole > 0 and self.waiting and record.each.came_s[self.waiting[0]] <= seen_s:
            if self._shut or len(self.decoding) + self.elsewhere + len(self.reading) >= rules.most_sequences:
                break
            request = self.waiting[0]
            if rules.waits_for_blocks and self._may_find_more(request):
                later.append(self.waiting.popleft())
                continue
            fresh = self._admit(request, budget)
            if fresh is None:
                break
            self.waiting.popleft()
            record.admit(request, now_s)
            self.reading.append(fresh)
            taken = self._take(found, fresh, budget)
            budget, whole = budget - taken, whole - taken
        if later:
            self.waiting.extendleft(reversed(later))

    def _holds_chunk(self, one: Reading, budget: int) -> bool:
        """Room for what a step reads next of a prompt; without it, it starts over, and the step reads nothing more."""
        new = max(min(one.tokens - one.read, budget), 0)  # none where drafts alone take more than a step's tokens
        if new > self.free - self.growth:
            self.reading.remove(one)
            self._release(one.held, one.blocks)
            self.record.preempt(one.request, 0)
            self.waiting.appendleft(one.request)
            self._closed_for = 1
            return False
        one.held += new
        self.used += new
        if self.prefix is not None:
            self.prefix.shrink(self.free)
        return True

    def _may_find_more(self, request: int) -> bool:
        """Whether another prompt that is being read has what comes behind the blocks that this one would find."""
        blocks, prefix = self.record.blocks_of(request), self.prefix
        if prefix is None or not self.reading:
            return False
        found = prefix.match(blocks, len(blocks))
        others = (self.record.blocks_of(one.request)[len(one.blocks) :][:1] for one in self.reading)
        return blocks[found : found + 1] in [other for other in others if other]

    def _take(self, found: Batch, one: Reading, budget: int) -> int:
        new = left = one.tokens - one.read
        if left > budget:
            # a prompt longer than any step is read in several all the same
            new = budget if self.rules.splits or one.read or one.tokens > self.rules.chunk_tokens else 0
        if new <= 0:
            return 0
        found.new_tokens += new
        found.prompts.append((new, one.read))
        one.read += new
        if new == left:
            found.done.append(one)
            if self.expected is not None:
                found.replies += self.expected.most(self.record.left(one.request), 1)
        if self.prefix is not None and self.rules.blocks_found == "scheduled":
            self._share_blocks(one)
        return new

    def _admit(self, request: int, budget: int) -> Reading | None:
        """Room for a prompt (and what the engine wants beside), or nothing."""
        rules, record, prefix = self.rules, self.record, self.prefix
        prompt, reply = record.prompt(request), record.left(request)
        shared: tuple[int, ...] = ()
        if prefix is not None:
            blocks = record.blocks_of(request)
            shared = blocks[: prefix.match(blocks, (prompt - 1) // record.block_tokens)]
        cached = len(shared) * record.block_tokens
        if not rules.splits and budget < prompt - cached <= rules.chunk_tokens:
            return None
        fresh = min(prompt - cached, budget) if rules.admits_chunks else prompt - cached
        held = fresh + rules.waste + (reply if rules.reserves_reply else 0)
        beside = 0.0
        expected = self.expected if rules.role == "both" else None
        if expected is not None:
            beside = expected.most(reply, 1) + self.next.replies  # those of this step are counted whole
            beside += expected.share * expected.most(self._ahead(), len(self.decoding))
        if prefix is not None and shared:
            self.used += prefix.pin(shared)
        room = self.free - self.growth
        # who is alone is let in if it fits at all
        if held > room or (held + beside > room and (self.reading or self.decoding or self.elsewhere)):
            self._shut = self.expected is not None and not rules.asks_again and bool(self.decoding or self.elsewhere)
            if expected is not None and rules.asks_again and held <= room:
                falls = expected.falls_by(self._ahead(), len(self.decoding), self._each, self._grows)
                self._closed_for = max(int((held + beside - room) / falls), 1) if falls > 0 else math.inf
            self._release(0.0, shared)
            return None
        self.used += held
        if prefix is not None:
            prefix.shrink(self.free)
        record.cached(request, cached)
        return Reading(request, prompt, cached, held, shared)

    def _ahead(self) -> float:
        """Tokens that running replies may still write."""
        return (self._last - len(self.decoding) * self.steps) * self._each

    def _take_over(self, seen_s: float, now_s: float) -> None:
        """Prompts that another pool has read start to write their replies."""
        rules, record, places = self.rules, self.record, self.places
        self._closed_for = math.inf
        while self.waiting and len(self.decoding) + self.elsewhere < rules.most_sequences:
            request = self.waiting[0]
            if record.each.came_s[request] > seen_s:
                return
            has = places.here.get(request, 0.0)
            held = has or self._held(request)
            wanted = held - has + rules.tokens_per_step + self.growth  # it decodes at once
            alone = not (self.decoding or self.elsewhere)
            while wanted > self.free and alone and (freed := places.give_up(but=request)):
                self.used -= freed
            if wanted > self.free and not alone:
                return
            places.here.pop(request, None)
            self.used += held - has
            self.waiting.popleft()
            record.first_token(request, seen_s)  # it came with the cache, and is sent on as the step is composed
            self._join(request, record.prompt(request) + 1, held, ())

    def _join(self, request: int, tokens: int, held: float, blocks: tuple[int, ...]) -> None:
        steps, each = self.steps, self.rules.tokens_per_step
        ends = steps + math.ceil(self.record.left(request) / each - 1e-9)
        self.decoding[request] = Decoding(steps, ends, tokens, held, blocks)
        self._tokens += tokens - each * steps
        self._last += ends
        heappush(self._ends, (ends, request))

    def _leave(self, request: int) -> None:
        """Takes a decoding sequence out."""
        one, ends, decoding = self.decoding.pop(request), self._ends, self.decoding
        while ends and ((first := decoding.get(ends[0][1])) is None or first.ends != ends[0][0]):
            heappop(ends)
        self._shut = False
        self._tokens -= one.tokens - self.rules.tokens_per_step * one.joined
        self._last -= one.ends
        self._release(one.held + self._grows * (self.steps - one.joined), one.blocks)

    def _keep_reply(self, request: int) -> None:
        """Blocks of the reply stay for whoever goes on with it. The last token was never read."""
        assert self.prefix is not None
        one, size = self.decoding[request], self.record.block_tokens
        fresh = self.record.blocks_of(request)[len(one.blocks) : (self.record.longest(request) - 1) // size]
        one.held -= len(fresh) * size
        self.used += self.prefix.pin(fresh) - len(fresh) * size
        one.blocks += fresh

    def _starts_over(self) -> int:
        """Who of the decoding sequences gives its room up: who was let in last, or, where room for replies is
        expected, who has written least of its own, of those the one with the longest prompt."""
        if self.expected is None:
            return next(reversed(self.decoding))
        prompts = self.record.requests.input_len
        return min(reversed(self.decoding), key=lambda one: (self._written(one), -prompts[one]))

    def _written(self, request: int) -> int:
        """Tokens of the reply of a decoding sequence so far."""
        steps = self.steps - self.decoding[request].joined
        return self.record.reply(request) - self.record.left(request) + int(steps * self.rules.tokens_per_step)

    def _make_room(self) -> None:
        """Where the cache has no room for another step, sequences start over."""
        rules = self.rules
        while self.free < self.growth:
            if self.reading and not rules.alone:  # where prompts run alone, replies stand still meanwhile
                one = self.reading.pop()
                self._release(one.held, one.blocks)
                request, written = one.request, 0
            elif self.decoding and len(self.decoding) + self.elsewhere > 1:
                request = self._starts_over()
                steps = self.steps - self.decoding[request].joined
                self._leave(request)
                with_prompt = rules.role == "both"  # where the prompt is read here, its first token came with it
                written = with_prompt + int(steps * rules.tokens_per_step)
            elif freed := self.places.give_up():
                self.used -= freed
                continue
            else:
                return
            self.record.preempt(request, written)
            last = self.expected is not None and rules.role == "both"
            (self.waiting.append if last else self.waiting.appendleft)(request)
            if self.expected is not None:
                written, whole = (sum(map(each, self.decoding)) for each in (self._written, self.record.reply))
                self.expected.start_over(written, whole, len(self.decoding))
