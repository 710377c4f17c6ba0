"""Blocks of prompts that stay in a rank's cache for prompts that begin alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


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
