"""The most that is live at once of what a step's rows hand on to others."""

from __future__ import annotations

import math
from functools import cache, reduce
from typing import NamedTuple

import numpy as np

from tensorcast.cost.work import Array, Size
from tensorcast.trace.dims import Dim, Sizes, product
from tensorcast.trace.table import DTYPE_BYTES, STATEFUL, Op, OpTable, per_op, per_table, shape_number


def activation_bytes(table: OpTable, sizes: Sizes, *, head: bool = True) -> Size:
    """Peak of live activations over a step: every tensor from the row that makes it to the last that reads it. Without
    the ``head`` of the rows alone that every token of a step passes: logits, and what is made of them, are of few."""
    amounts = _storages(table).amounts
    if not amounts:
        return 0.0
    moments = _moments(table, head)
    held = [
        reduce(np.maximum, [coef * math.prod([dim.at(sizes) for dim in factors], start=1.0) for factors, coef in some])
        for some in amounts
    ]
    peak: Size
    if not any(map(np.ndim, held)):
        peak = (moments @ np.array(held)).max()
        return peak
    shape = np.broadcast_shapes(*{np.shape(one) for one in held})
    each = np.empty((len(held), *shape))
    for i, one in enumerate(held):
        each[i] = one
    peak = (moments @ each.reshape(len(held), -1)).max(axis=0).reshape(shape)
    return peak


@per_table
def sees_cached_tokens(table: OpTable) -> bool:
    """Whether activations grow with the tokens that are cached."""
    return any(dim.P or dim.L for amount in _storages(table).amounts for factors, _ in amount for dim in factors)


_Amount = tuple[tuple[tuple[Dim, ...], float], ...]
"""Bytes of a storage: the largest of what is seen in it, each as factors that hang on the sizes and a number."""


_Seen = tuple[int, str, tuple[int, ...]]
"""What is seen of a storage: a tensor's sizes by number, dtype and which sizes are only expanded views."""

_seen: dict[_Seen, int] = {}
_each: list[tuple[tuple[Dim, ...], str, tuple[int, ...]]] = []
"""All that was seen, by number, with the sizes: rows of all models are much alike."""


@per_op
def _touched(op: Op) -> tuple[tuple[int, int], ...]:
    """Storages that a row reads or writes, weights aside, and what is seen of each."""
    found = []
    for t in (*op.inputs, *op.outputs):
        if not t.weight:
            one = shape_number(t.dims), t.dtype, t.expanded
            if one not in _seen:
                _seen[one] = len(_each)
                _each.append((t.dims, t.dtype, t.expanded))
            found.append((t.storage, _seen[one]))
    return tuple(found)


_numbers: dict[_Amount, int] = {}
_amounts: list[_Amount] = []
"""By number, of all tables."""


@cache
def _amount(seen: frozenset[int]) -> tuple[int, float]:
    """Bytes of a storage as an amount, by number, and how much of it: sizes that differ by a number alone are the same
    amount."""
    found: dict[tuple[Dim, ...], float] = {}
    for dims, dtype, expanded in map(_each.__getitem__, seen):
        whole, *offset = product(dims, expanded)
        factors = (whole._replace(coef=1), *offset)
        found[factors] = max(found.get(factors, 0.0), whole.coef * DTYPE_BYTES[dtype])
    amount, coef = tuple(found.items()), 1.0
    if len(found) == 1:
        ((factors, coef),) = found.items()
        amount = ((factors, 1.0),)
    if amount not in _numbers:
        _numbers[amount] = len(_amounts)
        _amounts.append(amount)
    return _numbers[amount], coef


COMPARED = 16
"""Moments at which most lives, that others are compared with, where there are more."""


class _Storages(NamedTuple):
    """What a table's rows hold, states of sequences aside, which are the cache's: ``amounts``; and whenever something
    new is seen of a storage ``[5, times]``: the row, amount by number and how much of it, less where that was seen
    before, the row behind the last that touches the storage, and behind the last of those before the head, which
    begins at row ``head`` of so many ``rows``."""

    amounts: list[_Amount]
    seen: Array
    head: int
    rows: int


@per_table
def _storages(table: OpTable) -> _Storages:
    ops = table.ops
    states = {t.storage for op in ops if op.name in STATEFUL for t in (*op.inputs[3:], *op.outputs[1:])}
    heads = (i for i, op in enumerate(ops) if op.kind < 0 and op.module.startswith("lm_head"))
    head, first = next(heads, len(ops)), dict[tuple[int, int], int]()
    last, last_before = dict[int, int](), dict[int, int]()
    for i, op in enumerate(ops):
        if i == head:
            last_before = last.copy()
        for one in _touched(op):
            first.setdefault(one, i)
            last[one[0]] = i
    every, numbers, seen = dict[int, frozenset[int]](), dict[int, int](), list[tuple[float, ...]]()
    for (storage, what), i in first.items():
        if storage not in states:
            own, ends = frozenset((what,)), (last[storage] + 1, last_before.get(storage, i) + 1)
            if storage in every:  # in place of what was seen so far
                amount, coef = _amount(every[storage])
                seen.append((i, numbers[amount], -coef, *ends))
                own |= every[storage]
            every[storage] = own
            amount, coef = _amount(own)
            seen.append((i, numbers.setdefault(amount, len(numbers)), coef, *ends))
    changes = np.array(seen, dtype=float).reshape(-1, 5).T
    return _Storages([_amounts[number] for number in numbers], changes, head, len(ops))


@per_table
def _moments(table: OpTable, with_head: bool) -> Array:
    """How much of each amount lives by moment ``[moments, amounts]``: a storage from the row that makes it, as large as
    what was seen in it so far, to the last that reads it. Of all rows, or of those before the head alone."""
    amounts, seen, head, rows = _storages(table)
    end = rows if with_head else head
    first, number, coef, *ends = seen[:, seen[0] < end]
    where = (np.append(first, ends[0 if with_head or head == rows else 1]) * len(amounts) + np.tile(number, 2))
    shape = end + 1, len(amounts)
    changes = np.bincount(where.astype(int), np.append(coef, -coef), math.prod(shape))
    return _fullest(changes.reshape(shape).cumsum(axis=0))


def _fullest(moments: Array) -> Array:
    """Without moments at which no more lives than at the next one or at one of the fullest."""
    moments = moments[:-1][(moments[:-1] > moments[1:]).any(axis=1)]
    if len(moments) <= COMPARED:
        return moments
    moments = moments[np.argsort(-moments.sum(axis=1), kind="stable")]
    beaten = np.tril((moments[:, None] <= moments[:COMPARED]).all(axis=-1), -1).any(axis=1)  # by one before
    return moments[~beaten]
