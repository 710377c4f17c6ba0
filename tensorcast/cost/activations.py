"""The most that is live at once of what a step's rows hand on to others."""

from __future__ import annotations

import math
from functools import cache, reduce

import numpy as np

from tensorcast.cost.work import Array, Size
from tensorcast.trace.dims import Dim, Sizes, product
from tensorcast.trace.table import DTYPE_BYTES, STATEFUL, Op, OpTable, per_op, per_table


def activation_bytes(table: OpTable, sizes: Sizes, *, head: bool = True) -> Size:
    """Peak of live activations over a step: every tensor from the row that makes it to the last that reads it. Without
    the ``head`` of the rows alone that every token of a step passes: logits, and what is made of them, are of few."""
    amounts, *of_rows = _liveness(table)
    if not amounts:
        return 0.0
    moments = of_rows[not head]
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
    amounts, *_ = _liveness(table)
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
"""Moments at which most lives, that others are compared with, where there are more."""


@per_table
def _liveness(table: OpTable) -> tuple[list[_Amount], Array, Array]:
    """Amounts that storages hold, and by moment how much of each lives ``[moments, amounts]`` (a storage counts what
    was seen in it so far); the same of the rows before the head. States of sequences are the cache's."""
    ops = table.ops
    states = {t.storage for op in ops if op.name in STATEFUL for t in (*op.inputs[3:], *op.outputs[1:])}
    heads = (i for i, op in enumerate(ops) if op.kind < 0 and op.module.startswith("lm_head"))
    touched, head = list(map(_touched, ops)), next(heads, len(ops))
    seen: dict[int, frozenset[int]] = {}
    changes: list[tuple[int, int, frozenset[int]]] = []
    first: dict[tuple[int, int], int] = {}
    for i, some in enumerate(touched):
        for one in some:
            first.setdefault(one, i)
    for (storage, what), i in first.items():
        if storage not in states:
            every = seen[storage] = seen.get(storage, frozenset()) | {what}
            changes.append((i, storage, every))
    held = {every: _amount(every) for *_, every in changes}
    numbers = {amount: n for n, amount in enumerate(dict.fromkeys(amount for amount, _ in held.values()))}
    places = {every: (numbers[amount], coef) for every, (amount, coef) in held.items()}

    def until(end: int) -> Array:
        last = {storage: i for i, some in enumerate(touched[:end]) for storage, _ in some}
        live: dict[int, tuple[int, float]] = {}
        more: list[tuple[int, int, float]] = []
        for i, storage, every in changes:
            if i < end:
                if storage in live:
                    number, coef = live[storage]
                    more.append((i, number, -coef))
                number, coef = live[storage] = places[every]
                more.append((i, number, coef))
        more += [(last[storage] + 1, number, -coef) for storage, (number, coef) in live.items()]
        return _fullest(more, (end + 1, len(numbers)))

    return list(numbers), until(len(ops)), until(head)


def _fullest(changes: list[tuple[int, int, float]], shape: tuple[int, int]) -> Array:
    """How much of each amount lives ``[moments, amounts]``, by what changes at which moment, without moments at which
    no more lives than at the next one or at one of the fullest."""
    where = np.array([i * shape[1] + number for i, number, _ in changes], dtype=int)
    moments = np.bincount(where, [coef for *_, coef in changes], math.prod(shape)).reshape(shape).cumsum(axis=0)
    moments = moments[:-1][(moments[:-1] > moments[1:]).any(axis=1)]
    if len(moments) <= COMPARED:
        return moments
    moments = moments[np.argsort(-moments.sum(axis=1), kind="stable")]
    beaten = np.tril((moments[:, None] <= moments[:COMPARED]).all(axis=-1), -1).any(axis=1)  # by one before
    return moments[~beaten]
