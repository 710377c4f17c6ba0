"""The most that is live at once of what a step's rows hand on to others."""

from __future__ import annotations

import math
from functools import cache, reduce

import numpy as np

from tensorcast.cost.work import Array, Size
from tensorcast.trace.dims import Dim, Sizes, product
from tensorcast.trace.table import DTYPE_BYTES, STATEFUL, Op, OpTable, per_op, per_table


def activation_bytes(table: OpTable, sizes: Sizes) -> Size:
    """Peak of live activations over a step: every tensor from the row that makes it to the last that reads it."""
    amounts, moments = _liveness(table)
    values = [
        reduce(np.maximum, [coef * math.prod((dim.at(sizes) for dim in factors), start=1.0) for factors, coef in some])
        for some in amounts
    ]
    if not values:
        return 0.0
    most: Size = np.tensordot(moments, np.stack(np.broadcast_arrays(*values)), axes=1).max(axis=0)
    return most


@per_table
def sees_cached_tokens(table: OpTable) -> bool:
    """Whether activations grow with the tokens that are cached."""
    amounts, _ = _liveness(table)
    return any(dim.P or dim.L for amount in amounts for factors, _ in amount for dim in factors)


_Amount = tuple[tuple[tuple[Dim, ...], float], ...]
"""Bytes of a storage: the largest of what is seen in it, each as factors that hang on the sizes and a number."""


_Seen = tuple[tuple[Dim, ...], str, tuple[int, ...]]
"""What is seen of a storage: a tensor's sizes, dtype and which sizes are only expanded views."""

_seen: dict[_Seen, int] = {}
_amounts: dict[_Amount, int] = {}
"""All that was seen, and all amounts, by number: sizes are long to compare, and rows of all models are much alike."""


@per_op
def _touched(op: Op) -> tuple[tuple[int, int], ...]:
    """Storages that a row reads or writes, weights aside, and what is seen of each."""
    every = [t for t in (*op.inputs, *op.outputs) if not t.weight]
    return tuple([(t.storage, _seen.setdefault((t.dims, t.dtype, t.expanded), len(_seen))) for t in every])


@cache
def _amount(seen: frozenset[int]) -> tuple[int, float]:
    """Bytes of a storage as an amount and how much of it: sizes that differ by a number alone are the same amount."""
    found: dict[tuple[Dim, ...], float] = {}
    for dims, dtype, expanded in (one for one, number in _seen.items() if number in seen):
        whole, *offset = product(dims, expanded)
        factors = (whole._replace(coef=1), *offset)
        found[factors] = max(found.get(factors, 0.0), whole.coef * DTYPE_BYTES[dtype])
    amount, size = tuple(found.items()), 1.0
    if len(found) == 1:
        ((factors, size),) = amount
        amount = ((factors, 1.0),)
    return _amounts.setdefault(amount, len(_amounts)), size


@per_table
def _liveness(table: OpTable) -> tuple[list[_Amount], Array]:
    """Amounts that storages hold, and how much of each lives ``[moments, amounts]`` (a storage counts what was seen in
    it so far).

    A moment at which no more lives than at another one is left out. States of sequences are the cache's.
    """
    states = {t.storage for op in table.ops if op.name in STATEFUL for t in (*op.inputs[3:], *op.outputs[1:])}
    rows = [[one for one in _touched(op) if one[0] not in states] for op in table.ops]
    last = {storage: i for i, touched in enumerate(rows) for storage, _ in touched}
    seen: dict[int, frozenset[int]] = {}
    live: dict[int, tuple[int, float]] = {}
    now: dict[int, float] = {}
    moments: list[dict[int, float]] = []

    def end(storage: int) -> None:
        number, coef = live.pop(storage)
        now[number] -= coef
        if not now[number]:
            del now[number]

    for i, touched in enumerate(rows):
        for storage, one in touched:
            before = seen.get(storage, frozenset())
            if one not in before:
                seen[storage] = before | {one}
                if storage in live:
                    end(storage)
                live[storage] = number, coef = _amount(seen[storage])
                now[number] = now.get(number, 0.0) + coef
        moments.append(now.copy())
        for storage in {storage for storage, _ in touched if last[storage] == i}:
            end(storage)
    places = {number: i for i, number in enumerate(dict.fromkeys(number for moment in moments for number in moment))}
    lives, every = np.zeros((len(moments), len(places))), list(_amounts)
    for row, moment in zip(lives, moments, strict=True):
        row[[places[number] for number in moment]] = list(moment.values())
    lives = lives[np.argsort(-lives.sum(axis=1), kind="stable")]
    beaten = np.tril((lives[:, None] <= lives).all(axis=-1), -1).any(axis=1)  # by one before
    lives = lives[~beaten]
    held, numbers = np.flatnonzero(lives.any(axis=0)), [*places]
    return [every[numbers[i]] for i in held.tolist()], lives[:, held]
