"""What a rank's cache holds: running sequences, blocks of prompts, kept for prompts that begin alike, and room that
replies have before their prompts are read."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


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

    def shrink(self, room: float) -> None:
        """Throw free blocks away until they take no more than ``room`` tokens."""
        free, most = self._free, room // self.block_tokens
        while len(free) > most and free:
            free.popitem(last=False)


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
