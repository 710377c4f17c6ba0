"""The most that is live at once of what a step's rows hand on to others."""

from __future__ import annotations

import math
from functools import cache, reduce

import numpy as np

from tensorcast.cost.work import Size
from tensorcast.trace.dims import Dim, Sizes, product
from tensorcast.trace.table import DTYPE_BYTES, STATEFUL, Op, OpTable, per_op, per_table


def activation_bytes(table: OpTable, sizes: Sizes) -> Size:
    """Peak of live activations over a step: every tensor from the row that makes it to the last that reads it."""
    amounts, moments = _liveness(table)
    values = [
        reduce(np.maximum, [coef * math.prod((dim.at(sizes) for dim in factors), start=1.0) for factors, coef in some])
        for some in amounts
    ]
    nothing: Size = 0.0
    return reduce(np.maximum, [sum((coef * values[i] for i, coef in moment), 0.0) for moment in moments], nothing)


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
def _liveness(table: OpTable) -> tuple[list[_Amount], list[tuple[tuple[int, float], ...]]]:
    """Amounts that storages hold; by moment how much of which lives (a storage counts what was seen in it so far).

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
    largest: list[dict[int, float]] = []
    for moment in sorted(moments, key=lambda m: -sum(m.values())):
        if not any(all(coef <= other.get(n, 0.0) for n, coef in moment.items()) for other in largest):
            largest.append(moment)
    numbers, every = dict.fromkeys(number for moment in largest for number in moment), list(_amounts)
    places = {number: i for i, number in enumerate(numbers)}
    return [every[n] for n in numbers], [tuple([(places[n], coef) for n, coef in m.items()]) for m in largest]
