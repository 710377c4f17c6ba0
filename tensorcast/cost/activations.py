"""The most that is live at once of what a step's rows hand on to others."""

from __future__ import annotations

import math
from functools import cache, reduce

import numpy as np

from tensorcast.cost.work import Size
from tensorcast.trace.dims import Dim, Sizes, product
from tensorcast.trace.table import DTYPE_BYTES, STATEFUL, OpTable, per_table


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


@cache
def _amount(seen: frozenset[_Seen]) -> tuple[_Amount, float]:
    """Bytes of a storage as an amount and how much of it: sizes that differ by a number alone are the same amount."""
    found: dict[tuple[Dim, ...], float] = {}
    for dims, dtype, expanded in seen:
        whole, *offset = product(dims, expanded)
        factors = (whole._replace(coef=1), *offset)
        found[factors] = max(found.get(factors, 0.0), whole.coef * DTYPE_BYTES[dtype])
    if len(found) > 1:
        return tuple(found.items()), 1.0
    ((factors, coef),) = found.items()
    return ((factors, 1.0),), coef


@per_table
def _liveness(table: OpTable) -> tuple[list[_Amount], list[tuple[tuple[int, float], ...]]]:
    """Amounts that storages hold; by moment how much of which lives (a storage counts what was seen in it so far).

    A moment at which no more lives than at another one is left out. States of sequences are the cache's.
    """
    states = {t.storage for op in table.ops if op.name in STATEFUL for t in (*op.inputs[3:], *op.outputs[1:])}
    last = {t.storage: i for i, op in enumerate(table.ops) for t in (*op.inputs, *op.outputs) if not t.weight}
    numbers: dict[_Amount, int] = {}
    kinds: dict[_Seen, int] = {}  # sizes are long to compare: each is looked up once, and by its number from then on
    amounts: dict[frozenset[int], tuple[int, float]] = {}
    seen: dict[int, frozenset[int]] = {}
    live: dict[int, tuple[int, float]] = {}
    moments: list[dict[int, float]] = []
    for i, op in enumerate(table.ops):
        touched = [t for t in (*op.inputs, *op.outputs) if not t.weight and t.storage not in states]
        for t in touched:
            one = kinds.setdefault((t.dims, t.dtype, t.expanded), len(kinds))
            before = seen.get(t.storage, frozenset())
            if one in before:
                continue
            seen[t.storage] = every = before | {one}
            if every not in amounts:
                amount, coef = _amount(frozenset(kind for kind, number in kinds.items() if number in every))
                amounts[every] = numbers.setdefault(amount, len(numbers)), coef
            live[t.storage] = amounts[every]
        moment: dict[int, float] = {}
        for number, coef in live.values():
            moment[number] = moment.get(number, 0.0) + coef
        moments.append(moment)
        for t in touched:
            if last[t.storage] == i:
                live.pop(t.storage, None)
                seen.pop(t.storage, None)
    largest: list[dict[int, float]] = []
    for moment in sorted(moments, key=lambda m: -sum(m.values())):
        if not any(all(coef <= other.get(n, 0.0) for n, coef in moment.items()) for other in largest):
            largest.append(moment)
    return list(numbers), [tuple(moment.items()) for moment in largest]
