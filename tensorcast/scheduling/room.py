"""What a rank's cache holds: running sequences, blocks of prompts, kept for prompts that begin alike, and room that
replies have before their prompts are read."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tensorcast.profiles.scheduler import ExpectedReply
from tensorcast.scheduling.record import Record
from tensorcast.scheduling.rules import Rules


@dataclass(slots=True)
class Decoding:
    """A sequence that writes its reply: the rank's decode step at which it joined, and its tokens then.

    ``ends``: the step at which it ends; ``held``: tokens of the cache that it alone took when it joined; ``blocks``:
    shared ones that it uses.
    """

    joined: int
    ends: int
    tokens: int
    held: float
    blocks: tuple[int, ...]


@dataclass(slots=True)
class Reading:
    """A sequence that reads its prompt: tokens to read in all, and read so far, those found in the cache included."""

    request: int
    tokens: int
    read: int
    held: float
    blocks: tuple[int, ...]


@dataclass(slots=True)
class Batch:
    """What a rank does in a step: decoding sequences and their mean cached tokens, prompts as (new, cached) tokens, all
    their new tokens, who of them is done, and tokens that their replies are expected to take."""

    sequences: int = 0
    context: float = 0.0
    new_tokens: int = 0
    prompts: list[tuple[int, int]] = field(default_factory=list)
    done: list[Reading] = field(default_factory=list)
    replies: float = 0.0

    def clear(self) -> None:
        """No prompts."""
        self.new_tokens, self.prompts, self.done, self.replies = 0, [], [], 0.0


class Standing:
    """Sequences that stand still while their rank reads prompts: ``groups``, so many each, from when on, the longest
    first; and ``while_others_s`` for which others that go on would have written in these steps without any prompts."""

    __slots__ = ("_clock", "_count", "groups", "while_others_s")

    def __init__(self) -> None:
        self.groups: list[tuple[int, float]] = []
        self.while_others_s = self._clock = 0.0
        self._count = 0

    def stand(self, sequences: int, seconds: float, others_s: float) -> None:
        """So many do, in a step."""
        if sequences > self._count:
            self.groups.append((sequences - self._count, self._clock))
            self._count = sequences
        self._clock += seconds
        self.while_others_s += others_s

    def go_on(self, sequences: int) -> list[tuple[int, float]]:
        """How many of so many that go on stood still for how long: who has started over meanwhile came last."""
        found, clock = [], self._clock
        for count, since in self.groups:
            count = count if count < sequences else sequences
            found.append((count, clock - since))
            sequences -= count
        self.groups, self._count = [], 0
        return found


class Expectation:
    """Room that running replies are expected to take: of what they may write a share, which falls with decode steps."""

    def __init__(self, rules: ExpectedReply, fixed: bool = True) -> None:
        """``fixed``: replies run to the length that is asked for."""
        self.rules, self._whole = rules, rules.fixed_whole and fixed
        self._first, self._least, self._falls = float(rules.first), float(rules.least), rules.falls
        if self._whole:
            self._first, self._least, self._falls = 1.0, 1.0, 0.0
        self.share = self._first

    def rests(self) -> None:
        """Nothing runs on its server: it begins anew."""
        self.share = self._first

    def fall(self, steps: int) -> None:
        """So many decode steps have passed."""
        self.share = max(self._least, self.share - self._falls * steps)

    def start_over(self, written: int, whole: int, sequences: int) -> None:
        """One starts over: the other ``sequences`` are expected to write on as they have of their ``whole`` replies."""
        if not self._whole:
            self.share = min(1.0, (written + self.rules.spare_steps * sequences) / (whole + 1))

    def most(self, left: float, sequences: int) -> float:
        """Tokens that so many replies with ``left`` tokens to write are counted with at most."""
        return min(left, sequences * self.rules.most_tokens)

    def falls_by(self, left: float, sequences: int, each: float, grows: float) -> float:
        """By how many tokens, at most, what is expected of them falls in a decode step that brings ``each`` to a
        sequence, which then holds ``grows`` more: never faster than now, as fewer of a smaller share are ahead."""
        return sequences * (self.share * each - grows) + self._falls * self.most(left, sequences)


class PrefixCache:
    """Blocks by id, in tokens: those that running sequences use, and free ones, of which the longest unused goes first.

    A block's id stands for the whole prefix that ends with it, as hashes of engines do.
    """

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._users: dict[int, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict()

    @property
    def pinned_tokens(self) -> int:
        """Tokens of blocks that running sequences use; each counts once."""
        return len(self._users) * self.block_tokens

    @property
    def free_tokens(self) -> int:
        """Tokens of blocks that may be thrown away."""
        return len(self._free) * self.block_tokens

    def match(self, blocks: Sequence[int], most: int) -> int:
        """How many of the first ``blocks`` are there, at most ``most``."""
        users, free = self._users, self._free
        for i, block in enumerate(blocks):
            if i >= most or (block not in users and block not in free):
                return min(i, most)
        return min(len(blocks), most)

    def pin(self, blocks: Sequence[int]) -> int:
        """Use ``blocks``; those that are not there yet, now are. By how many tokens more running sequences use."""
        users, free = self._users, self._free
        before = len(users)
        for block in blocks:
            if block in users:
                users[block] += 1
            else:
                users[block] = 1
                free.pop(block, None)
        return (len(users) - before) * self.block_tokens

    def unpin(self, blocks: Sequence[int]) -> int:
        """One user less; blocks without any are free from now on, a prompt's last blocks the first to go. By how many
        tokens more running sequences use: none, or fewer than none."""
        users, free = self._users, self._free
        before = len(users)
        for block in reversed(blocks):
            left = users[block] - 1
            if left:
                users[block] = left
            else:
                del users[block]
                free[block] = None
        return (len(users) - before) * self.block_tokens

    def keep(self, blocks: Sequence[int]) -> None:
        """``blocks`` of a prompt that was read in the past are there, as long as nobody needs their room."""
        self.pin(blocks)
        self.unpin(blocks)

    def shrink(self, room: float) -> None:
        """Throw free blocks away until they take no more than ``room`` tokens."""
        free, most = self._free, room // self.block_tokens
        while len(free) > most and free:
            free.popitem(last=False)


class Cache:
    """A rank's cache: what its sequences hold of it, and blocks of prompts that are kept."""

    def __init__(self, rules: Rules, record: Record) -> None:
        self.rules, self.record = rules, record
        keeps = rules.prefix_cache and rules.role != "decode" and record.blocks is not None
        self.prefix = PrefixCache(record.block_tokens) if keeps else None
        self.used = 0.0  # tokens that sequences hold, those of shared blocks once
        self.elsewhere = 0  # sequences that decode in other micro-batches, where there are pipeline stages
        self._holds = rules.cache_tokens

    @property
    def free(self) -> float:
        """Tokens that a new sequence could take, those of blocks that nobody uses included."""
        return self._holds - self.used

    def _release(self, held: float, blocks: tuple[int, ...]) -> None:
        self.used -= held
        if blocks and self.prefix is not None:
            self.used += self.prefix.unpin(blocks)

    def _share_blocks(self, one: Reading) -> None:
        """What was read of a prompt is there for others, and no longer its reader's alone."""
        assert self.prefix is not None
        blocks = self.record.blocks_of(one.request)[: one.read // self.record.block_tokens]
        fresh = blocks[len(one.blocks) :]
        alone = len(fresh) * self.record.block_tokens
        one.held -= alone
        self.used += self.prefix.pin(fresh) - alone
        one.blocks = blocks


@dataclass(slots=True)
class Places:
    """Of a rank that writes what others read: who ``asks`` for room, who has it while the prompt is queued or read
    elsewhere (``coming``), and who is ``here`` and not let in yet; the latter two with the tokens that they hold."""

    asks: deque[int] = field(default_factory=deque)
    coming: dict[int, float] = field(default_factory=dict)
    here: dict[int, float] = field(default_factory=dict)

    def take(
        self, held_of: Callable[[int], float], running: int, *, most: int, free: float, reserved: int
    ) -> dict[int, float]:
        """Give room to who asks, in order, as far as there is: those who get it and the tokens that they hold.

        Of ``free`` tokens as many as ``reserved`` stay for each that is ``running`` or has room, who are ``most`` at
        most; who would be alone gets room all the same.
        """
        taken: dict[int, float] = {}
        count = running + len(self.coming) + len(self.here)
        while self.asks:
            held = held_of(self.asks[0])
            if count and (count >= most or held + reserved * (count + 1) > free):
                break
            taken[self.asks.popleft()] = held
            count, free = count + 1, free - held
        self.coming |= taken
        return taken

    def arrives(self, request: int) -> None:
        """The prompt is read and here."""
        held = self.coming.pop(request, None)
        if held is not None:
            self.here[request] = held

    def give_up(self, but: int = -1) -> float:
        """Who got room last, ``but`` for one, no longer has it: tokens that are free by that, 0 if nobody has any."""
        for held in (self.coming, self.here):
            for request in reversed(held):
                if request != but:
                    return held.pop(request)
        return 0.0
