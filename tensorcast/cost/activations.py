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
    if not amounts:
        return 0.0
    held = [
        reduce(np.maximum, [coef * math.prod([dim.at(sizes) for dim in factors], start=1.0) for factors, coef in some])
        for some in amounts
    ]
    shape = np.broadcast_shapes(*{np.shape(one) for one in held})
    each = np.empty((len(held), *shape))
    for i, one in enumerate(held):
        each[i] = one
    live: Array = moments @ each.reshape(len(held), -1)
    peak: Size = live.max(axis=0).reshape(shape)[()]
    return peak


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
_each: list[_Seen] = []
"""All that was seen, by number: sizes are long to compare, and rows of all models are much alike."""


@per_op
def _touched(op: Op) -> tuple[tuple[int, int], ...]:
    """Storages that a row reads or writes, weights aside, and what is seen of each."""
    found = []
    for t in (*op.inputs, *op.outputs):
        if not t.weight:
            one = t.dims, t.dtype, t.expanded
            if one not in _seen:
                _seen[one] = len(_each)
                _each.append(one)
            found.append((t.storage, _seen[one]))
    return tuple(found)


@cache
def _amount(seen: frozenset[int]) -> tuple[_Amount, float]:
    """Bytes of a storage as an amount and how much of it: sizes that differ by a number alone are the same amount."""
    found: dict[tuple[Dim, ...], float] = {}
    for dims, dtype, expanded in map(_each.__getitem__, seen):
        whole, *offset = product(dims, expanded)
        factors = (whole._replace(coef=1), *offset)
        found[factors] = max(found.get(factors, 0.0), whole.coef * DTYPE_BYTES[dtype])
    if len(found) > 1:
        return tuple(found.items()), 1.0
    ((factors, coef),) = found.items()
    return ((factors, 1.0),), coef


COMPARED = 16
"""Moments at which most lives, that others are compared with."""


@per_table
def _liveness(table: OpTable) -> tuple[list[_Amount], Array]:
    """Amounts that storages hold, and by moment how much of each lives ``[moments, amounts]`` (a storage counts what
    was seen in it so far).

    A moment at which no more lives than at one of the fullest is left out. States of sequences are the cache's.
    """
    states = {t.storage for op in table.ops if op.name in STATEFUL for t in (*op.inputs[3:], *op.outputs[1:])}
    seen: dict[int, frozenset[int]] = {}
    last: dict[int, int] = {}
    changes: list[tuple[int, int, frozenset[int]]] = []
    for i, op in enumerate(table.ops):
        for storage, one in _touched(op):
            last[storage] = i
            before = seen.get(storage, frozenset())
            if one not in before:
                seen[storage] = before | {one}
                changes.append((i, storage, seen[storage]))
    held = {every: _amount(every) for every in dict.fromkeys(every for *_, every in changes)}
    numbers = {amount: n for n, amount in enumerate(dict.fromkeys(amount for amount, _ in held.values()))}
    places = {every: (numbers[amount], coef) for every, (amount, coef) in held.items()}
    more: list[tuple[int, int, float]] = []
    live: dict[int, tuple[int, float]] = {}
    for i, storage, every in changes:
        if storage not in states:
            if storage in live:
                number, coef = live[storage]
                more.append((i, number, -coef))
            live[storage] = number, coef = places[every]
            more.append((i, number, coef))
    more += [(last[storage] + 1, number, -coef) for storage, (number, coef) in live.items()]
    shape = len(table.ops) + 1, len(numbers)
    where = np.array([i * shape[1] + number for i, number, _ in more], dtype=int)
    moments = np.bincount(where, [coef for *_, coef in more], math.prod(shape)).reshape(shape).cumsum(axis=0)
    moments = moments[:-1][(moments[:-1] > moments[1:]).any(axis=1)]  # others have no more than the next one
    moments = moments[np.argsort(-moments.sum(axis=1), kind="stable")]
    beaten = np.tril((moments[:, None] <= moments[:COMPARED]).all(axis=-1), -1).any(axis=1)  # by one before
    return list(numbers), moments[~beaten]
