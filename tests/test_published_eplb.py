"""DeepSeek's balancer: slot for slot what the published code gives, and what its description says told item by item."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import pytest

from tensorcast.errors import InputError
from tensorcast.modeling.moe.balancing.published_eplb import choose_nodes, published_eplb

Case = tuple[np.ndarray, int, int, int, int]

DIGEST = "284c7d311dc6edbd7fb731e253ac132d6e2d77a9cefac3486a6a7307f126284c"
"""SHA-256 of ``physical_to_logical_map`` (int64, in turn) that github.com/deepseek-ai/EPLB at d52c72d gives for
:func:`drawn_cases`, run with torch 2.13 and a stable sort (which of equal loads comes first is left open there)."""


def drawn_cases(count: int = 1000) -> Iterator[Case]:
    """Loads ``[layers, experts]``, slots, ranks, nodes and groups: any sizes that divide, with and without ties."""
    rng, found = np.random.default_rng(20260), 0
    while found < count:
        groups, nodes = int(rng.choice([1, 2, 4, 8])), int(rng.choice([1, 2, 3, 4, 9]))
        experts, ranks = groups * int(rng.choice([1, 2, 4, 8, 16])), nodes * int(rng.choice([1, 2, 4]))
        slots = experts + -experts % ranks + ranks * int(rng.integers(0, 3))
        if groups % nodes == 0 and slots % nodes:
            continue
        layers = int(rng.integers(1, 3))
        laws = (
            rng.integers(0, 6, (layers, experts)), np.round(rng.lognormal(8, 1.2, (layers, experts))),
            rng.integers(0, 2**23, (layers, experts)), np.minimum(rng.zipf(1.5, (layers, experts)), 10**6),
        )
        yield laws[found % 4].astype(float), slots, ranks, nodes, groups
        found += 1


def test_equals_the_published_code_on_a_thousand_cases() -> None:
    digest, hierarchical = hashlib.sha256(), 0
    for loads, slots, ranks, nodes, groups in drawn_cases():
        hierarchical += nodes > 1 and groups % nodes == 0
        digest.update(published_eplb(loads, slots, ranks, nodes=nodes, groups=groups).astype("<i8").tobytes())
    assert hierarchical > 100
    assert digest.hexdigest() == DIGEST


def test_the_published_example() -> None:
    """Two layers of 12 experts, as the published README has them: on 2 nodes of 4 GPUs, and over 4 GPUs at once."""
    loads = np.array([
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ])  # fmt: skip
    assert published_eplb(loads, 16, 8, nodes=2, groups=4).tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert published_eplb(loads, 16, 4, nodes=3, groups=4).tolist() == published_eplb(loads, 16, 4).tolist()


def told_item_by_item(load: np.ndarray, slots: int, ranks: int) -> list[list[int]]:
    """One node's ranks with their experts: copies to the hottest, then heaviest first to the lightest with room."""
    held = {expert: 1 for expert in range(len(load))}
    copies = list(range(len(load)))
    while len(copies) < slots:
        hottest = max(held, key=lambda e: (load[e] / held[e], -e))
        held[hottest] += 1
        copies.append(hottest)
    share = [load[e] / held[e] for e in copies]
    placed: list[list[int]] = [[] for _ in range(ranks)]
    for slot in sorted(range(slots), key=lambda s: (-share[s], s)):
        room = [rank for rank in range(ranks) if len(placed[rank]) < slots // ranks]
        placed[min(room, key=lambda rank: (sum(share[s] for s in placed[rank]), rank))].append(slot)
    return [[copies[slot] for slot in rank] for rank in placed]


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_description(seed: int) -> None:
    """Powers of two as loads: sums are exact, so that order of addition cannot matter."""
    rng = np.random.default_rng(seed)
    ranks = int(rng.choice([2, 4, 8]))
    load = 2.0 ** rng.integers(0, 20, 32) * rng.choice([1, 3, 5], 32)
    slots = 32 + ranks * int(rng.integers(0, 4))
    ours = published_eplb(load[None], slots, ranks).reshape(ranks, -1)
    busiest = [
        max(sum(load[e] / np.bincount(np.ravel(rows), minlength=32)[e] for e in rank) for rank in rows)
        for rows in (ours.tolist(), told_item_by_item(load, slots, ranks))
    ]
    assert busiest[0] == pytest.approx(busiest[1], rel=1e-5)
    assert sorted(map(sorted, ours.tolist())) == sorted(map(sorted, told_item_by_item(load, slots, ranks)))


def test_groups_stay_on_nodes_where_they_divide() -> None:
    loads = np.random.default_rng(0).lognormal(0, 1, (3, 64))
    placed = published_eplb(loads, 72, 8, nodes=4, groups=8)
    for row in placed:
        homes: dict[int, set[int]] = {}
        for slot, expert in enumerate(row.tolist()):
            homes.setdefault(expert // 8, set()).add(slot // 18)
        assert all(len(nodes) == 1 for nodes in homes.values())
    assert [choose_nodes(8, nodes, 8 * nodes) for nodes in (1, 2, 4, 8, 9)] == [1, 2, 4, 8, 1]
    assert choose_nodes(8, 4, 6) == 1 and choose_nodes(1, 4, 32) == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((10, 4, 1, 1), "10 slots do not divide by 4"), ((6, 2, 1, 1), "6 slots for 8 experts"),
        ((12, 3, 2, 2), "3 ranks do not divide by 2"), ((9, 9, 3, 3), "8 experts do not divide by 3"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes: tuple[int, int, int, int], message: str) -> None:
    slots, ranks, nodes, groups = sizes
    with pytest.raises(InputError, match=message):
        published_eplb(np.ones((1, 8)), slots, ranks, nodes=nodes, groups=groups)
