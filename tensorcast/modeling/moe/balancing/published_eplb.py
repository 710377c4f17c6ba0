"""DeepSeek's expert-parallel load balancer as published and as engines run it, for all layers at once.

Three steps (github.com/deepseek-ai/EPLB, its README and the behaviour of ``rebalance_experts`` at 05ef05b; SGLang
0.5.14 ``srt/eplb/eplb_algorithms/deepseek.py`` and vLLM 0.24.0 ``distributed/eplb/policy/default.py`` run the same):

1. groups of the router's group-limited top-k go to nodes, heaviest first, each to the lightest node with room;
2. inside a node the expert with most load per copy gets one copy more, until all slots are taken;
3. copies go to the node's ranks, heaviest first, each to the lightest rank with room.

Where groups do not divide over nodes, all is one node and one group. Loads are single precision, ties go to the lower
index: the published outcome is reproduced slot for slot.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tensorcast.errors import InputError

Ints = NDArray[np.int64]
Loads = NDArray[np.float32]


def choose_nodes(groups: int, nodes: int, ranks: int) -> int:
    """Nodes that the balancer keeps groups on, as engines choose: 1 (all ranks at once) where groups do not divide.

    SGLang 0.5.14 ``eplb_algorithms/__init__.py`` (``auto``); vLLM 0.24.0 ``distributed/eplb/eplb_state.py``: one node
    where ranks do not divide either.
    """
    return nodes if groups % nodes == 0 and ranks % nodes == 0 else 1


def published_eplb(loads: NDArray[np.float64], slots: int, ranks: int, *, nodes: int = 1, groups: int = 1) -> Ints:
    """The logical expert in each slot, ``[layers, slots]``, rank after rank, for ``loads [layers, experts]``.

    Raises :class:`InputError` for sizes that do not divide.
    """
    weight = np.asarray(loads, dtype=np.float32)
    if weight.ndim != 2:
        raise InputError(f"eplb: loads must be [layers, experts], got shape {list(weight.shape)}")
    experts = weight.shape[1]
    if groups % nodes:
        nodes = groups = 1
    for what, whole, parts in (
        (f"{slots} slots", slots, ranks), (f"{ranks} ranks", ranks, nodes), (f"{experts} experts", experts, groups),
    ):
        if whole % parts:
            raise InputError(f"eplb: {what} do not divide by {parts}")
    if slots < experts:
        raise InputError(f"eplb: {slots} slots for {experts} experts: at least one each")
    layers, size = len(weight), experts // groups
    node, place = _pack(weight.reshape(layers, groups, size).sum(-1), nodes)
    moved = ((node * (groups // nodes) + place) * size)[..., None] + np.arange(size)
    own = _inverse(moved.reshape(layers, experts))  # experts in the order of nodes, [layers, experts]
    local = np.take_along_axis(weight, own, 1).reshape(layers * nodes, experts // nodes)
    copied, counts = _replicate(local, slots // nodes)
    # single precision by whole numbers is single precision, as published
    share: Loads = np.take_along_axis(np.divide(local, counts, dtype=np.float32), copied, 1)
    rank, place = _pack(share, ranks // nodes)
    placed = np.take_along_axis(copied, _inverse(rank * (slots // ranks) + place), 1).reshape(layers, nodes, -1)
    first = np.arange(nodes)[:, None] * (experts // nodes)
    return np.take_along_axis(own, (placed + first).reshape(layers, slots), 1)


def _replicate(weight: Loads, slots: int) -> tuple[Ints, Ints]:
    """The expert of each copy ``[rows, slots]``, one of each first, and copies of each expert ``[rows, experts]``."""
    rows, experts = weight.shape
    logical = np.broadcast_to(np.arange(slots), (rows, slots)).copy()
    counts, every = np.ones((rows, experts), dtype=np.int64), np.arange(rows)
    each = weight.copy()
    for slot in range(experts, slots):
        hottest = each.argmax(1)
        logical[:, slot] = hottest
        counts[every, hottest] += 1
        each[every, hottest] = weight[every, hottest] / counts[every, hottest].astype(np.float32)
    return logical, counts


def _pack(weight: Loads, bins: int) -> tuple[Ints, Ints]:
    """Bin of each item and its place there, ``[rows, items]`` each: heaviest first, to the lightest bin with room."""
    rows, items = weight.shape
    room = items // bins
    if room == 1:  # as published: item i to bin i
        return np.broadcast_to(np.arange(items), (rows, items)), np.zeros((rows, items), dtype=np.int64)
    order, every = np.argsort(-weight, axis=1, kind="stable"), np.arange(rows)
    heaviest_first = np.take_along_axis(weight, order, 1).T.copy()
    filled, held = np.zeros((rows, bins), dtype=np.float32), np.zeros((rows, bins), dtype=np.int64)
    into, place = np.empty((items, rows), dtype=np.int64), np.empty((items, rows), dtype=np.int64)
    for i, load in enumerate(heaviest_first):
        into[i] = lightest = filled.argmin(1)
        place[i] = count = held[every, lightest]
        held[every, lightest] = count + 1
        filled[every, lightest] = np.where(count + 1 < room, filled[every, lightest] + load, np.inf)
    bin_of, place_in = np.empty((rows, items), dtype=np.int64), np.empty((rows, items), dtype=np.int64)
    np.put_along_axis(bin_of, order, into.T, 1)
    np.put_along_axis(place_in, order, place.T, 1)
    return bin_of, place_in


def _inverse(order: Ints) -> Ints:
    found = np.empty_like(order)
    np.put_along_axis(found, order, np.broadcast_to(np.arange(order.shape[1]), order.shape), 1)
    return found
