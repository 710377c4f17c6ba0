"""What a steady load pays where replies fill the cache: some start over, are read again and keep their users waiting.

An engine that lets prompts in as soon as these fit, and keeps no room for replies (vLLM), fills its cache to the last
prompt. From then on each token that is written takes the room of one that is thrown away: until a request ends as many
tokens are read again as it writes, whatever the lengths. Those thrown out came last and stand first in the queue.

How many wait is the mean of what the tokens of all that have begun, were there room, exceed the cache by. Between two
ends they grow by a reply's tokens in the mean, at random, and an end takes prompt and reply away, so that they drift by
a prompt: a walk that goes up evenly and jumps down, begun a part of a prompt below the brim. The time that it spends
above follows from the positive root of ``t = 1 - exp(-t (1 + prompt / reply))`` (the scale function of such a walk).
Ends of so many replies are no chance alone, as each ends once in a round: that takes from it as of :data:`ROUND`. Where
several end in a step, what it writes takes their room first, and nobody's where enough do.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorcast.profiles.engine import EngineProfile
from tensorcast.serving.entries import Entries
from tensorcast.serving.traffic import Array, Mask, Number, Traffic

ROUND = 3.0
"""How fast waiting falls where few run: with so many times the ends that one waits, as a part of those of a round. Of
loops of replies half shorter to half longer, 40 to 300 at once, prompts of 200 to 4,000 tokens and replies of 1,000 to
6,000: within a fifth of their replays."""

MOST_ENDS = 24
"""Ends in a step that are told apart: where that many come, next to nothing starts over."""

FAR = 1e9
"""More sequences than any rank runs."""

ROOT = float(np.sqrt(2 * np.pi))

NEAR = 0.25
"""The part of the room from which on sequences may fill it: fewer do once in a hundred thousand times."""

NEWTON = 60
"""Steps of Newton's method, which comes from above and needs a few."""


def starts_over(engine: EngineProfile) -> bool:
    """Whether replies that fill the cache are thrown out as they come: nothing is kept for them, nor expected."""
    scheduler = engine.scheduler
    return not engine.reserves_reply and scheduler is not None and scheduler.expected_reply is None


@dataclass(frozen=True)
class FullCache(Entries):
    """Of a rank that has ``room`` for so many sequences in the mean of their replies: at the brim ``most`` wait with
    their first token, each of ``held`` tokens as it is thrown out; ``again``: the part of what is written then that is
    read again. ``widths``: tokens of a sequence in the mean by those that they differ by over its reply, standard
    deviation; ``spread``: that by ``held``."""

    room: Array
    most: Array
    again: Array
    widths: Array
    spread: Array

    @classmethod
    def of(cls, traffic: Traffic, room: Number, steps: Array) -> FullCache:
        """``steps``: decode steps of a reply."""
        prompt, reply = np.asarray(traffic.input_len, float), np.asarray(traffic.output_len, float)
        room, ratio = np.minimum(np.asarray(room, dtype=float), FAR), reply / prompt
        again = _uncovered(room / steps, 1 + prompt / reply)
        ends = _above(prompt, reply) - (1 - again) * ratio * -np.expm1(-1 / ratio)  # until the first end: by steps
        most = ends / (1 + ROUND * ends / np.maximum(room, 1.0))
        # what is written while as long below the brim as above, half of it in the mean
        held = prompt + np.minimum(most / np.maximum(room, 1.0), 1.0) * reply / 2
        deviation = reply / np.sqrt(12)
        every = room, most, again, traffic.context / deviation, deviation / held
        return cls(*np.broadcast_arrays(*every))

    def at(self, batch: Array) -> tuple[Array, Array]:
        """Of ``batch`` sequences that run: how many wait with their first token, and which part of what replies write
        is read again."""
        batch, room, most, again, widths, spread = np.broadcast_arrays(batch, *vars(self).values())
        waiting, share = np.zeros(batch.shape), np.zeros(batch.shape)
        near = batch > NEAR * room
        root = np.sqrt(batch[near])
        z = np.maximum(room[near] - batch[near], 0.0) * widths[near] / root
        beyond = _beyond(z)
        beside = spread[near] * root * np.maximum(np.exp(z * z / -2) / ROOT - z * beyond, 0.0)
        waiting[near], share[near] = np.minimum(beside, most[near]), beyond * again[near]
        return waiting, share

    def brims(self, batch: Array) -> Mask:
        """Where so many sequences fill it."""
        found: Mask = batch >= self.room * (1 - 1e-9)
        return found

    def filled(self, waiting: Array, share: Array, more: Array) -> tuple[Array, Array]:
        """What :meth:`at` says of a full one where ``more`` have begun than run and wait, as far as that goes."""
        added = np.clip(more, 0.0, self.most - waiting)
        part = added / np.maximum(self.most - waiting, 1e-9)
        return waiting + added, share + (self.again - share) * part


def _uncovered(ends: Array, size: Array) -> Array:
    """The part of what steps write that no end makes room for, where so many ``ends`` come per step in the mean, at
    random, and each frees ``size`` times what is written for one."""
    ends, found, chance = np.maximum(ends, 1e-9), np.zeros(()), np.exp(-ends)
    for count in range(MOST_ENDS):
        found = found + chance * np.maximum(1 - count * size / ends, 0.0)
        chance = chance * ends / (count + 1)
    return found


def _above(prompt: Array, reply: Array) -> Array:
    """Ends of others that a request waits for with its first token, where ends are as random as can be."""
    if prompt.ndim or reply.ndim:
        found: Array = np.vectorize(_one_above, otypes=[float])(prompt, reply)
        return found
    return np.asarray(_one_above(float(prompt), float(reply)))


@functools.lru_cache(maxsize=4096)
def _one_above(prompt: float, reply: float) -> float:
    drop, root = 1 + prompt / reply, 1.0
    for _ in range(NEWTON):
        falls: Any = np.exp(-drop * root)
        root -= (root - 1 + falls) / (1 - drop * falls)
    begins = root * prompt / reply
    return float(-np.expm1(-begins) / begins / (root * (1 - drop * (1 - root))))


def _beyond(z: Array) -> Array:
    """The part of a normal law beyond ``z`` (to 2e-4: logistic in an odd cubic, Bowling et al. 2009)."""
    found: Array = 1 / (1 + np.exp(np.minimum(z * (1.5976 + 0.07056 * z * z), 700.0)))
    return found
