"""Rows whose price hangs on a layer's expert load: priced once for each group of layers, then their mean.

A row runs in every layer of its kind, so its mean price over layers times their number is the sum over layers.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tensorcast.cost.formulas import Context
from tensorcast.cost.work import Array, Size
from tensorcast.deploy.step.price import RowPrice, Where, one_level
from tensorcast.trace.dims import Sizes


def spread_out(at: Context) -> Context:
    """Every case once per group of layers, groups of a case side by side on the last axis."""
    points = at.points
    assert points is not None
    count = points.weights.shape[-1]

    def each(value: Size) -> Size:
        return np.repeat(value, count, axis=-1) if np.ndim(value) and np.shape(value)[-1] > 1 else value

    def flat(values: Array) -> Array:
        return values.reshape(*values.shape[:-2], -1) if values.ndim > 1 else values

    beside = points.each(flat)
    sizes = {name: each(getattr(at.sizes, name)) for name in ("B", "S", "P", "E", "X")}
    hit, capacity, verify, kv = beside.hit, each(at.capacity), each(at.verify), each(at.kv_bytes)
    return replace(
        at, sizes=Sizes(**sizes, R=beside.rows), hit=hit, capacity=capacity, verify=verify, kv_bytes=kv, points=beside
    )


def loads_of(at: Context, members: np.ndarray | slice) -> Context:
    """The loads of some of a fleet's members."""
    if at.points is None:
        return at
    points = at.points.each(lambda loads: loads[members])
    return replace(at, points=points._replace(weights=points.weights[members]) if points.weights.ndim == 3 else points)


def mean_over_layers(price: RowPrice, weights: Array, single: bool, where: Where = None) -> RowPrice:
    """The mean price of a row that was priced at sizes that are :func:`spread_out`; of a ``single`` case a number.

    ``where``: which of these each case has, where cases are in pipeline stages and weigh layers each in their way.
    """
    count = weights.shape[-1]

    def mean(value: Size) -> Size:
        if not np.ndim(value):
            return value
        whole = np.asarray(value, dtype=float)
        if whole.shape[-1] > 1 and weights.ndim == 1:
            whole = whole.reshape(*whole.shape[:-1], -1, count) @ weights
        elif whole.shape[-1] > 1:
            whole = whole.reshape(*whole.shape[:-1], -1, count)
            whole = np.einsum("...g,...g->...", whole if where is None else whole[..., where, :], weights)
        return float(whole[0]) if single else whole

    level = price.level
    if isinstance(level, np.ndarray):  # the least of the groups
        level = level.min() if single else level.reshape(*level.shape[:-1], -1, count).min(axis=-1)
        level = level if where is None or not np.ndim(level) else level[..., where]
    return replace(
        price, seconds=mean(price.seconds), waits_s=mean(price.waits_s), error=mean(price.error),
        level=one_level(level), spend=lambda: price.spending.each(mean),
    )
