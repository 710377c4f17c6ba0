"""Expert placement: valid whatever the policy, as balanced as the published load balancer or better, and traceable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tensorcast.errors import InputError
from tensorcast.modeling.moe.placement import (
    Placement,
    assign_experts,
    choose_replica,
    eplb,
    linear,
    physical_choice,
    round_robin,
)

E, K, TOKENS = 256, 8, 128
"""DeepSeek-V3's routed experts and top-k, and tokens per GPU, of the Monte-Carlo figures."""


# --- the published algorithm, from its description ------------------------------------------------------------------


def greedy_replicas(load: np.ndarray, total: int) -> np.ndarray:
    """Logical expert of each of ``total`` copies: one each, then one at a time where a copy carries the most."""
    copies = np.ones(len(load))
    chosen = list(range(len(load)))
    while len(chosen) < total:
        hottest = int(np.argmax(load / copies))
        copies[hottest] += 1
        chosen.append(hottest)
    return np.array(chosen)


def greedy_bins(weight: np.ndarray, bins: int) -> np.ndarray:
    """Bin of each item: from the heaviest down, into the lightest bin that is not full (all bins hold as many)."""
    room = np.full(bins, len(weight) // bins)
    filled = np.zeros(bins)
    bin_of = np.empty(len(weight), dtype=int)
    for item in np.argsort(-weight, kind="stable"):
        open_bins = np.flatnonzero(room)
        bin_of[item] = into = open_bins[np.argmin(filled[open_bins])]
        room[into] -= 1
        filled[into] += weight[item]
    return bin_of


def published(load: np.ndarray, ranks: int, redundant: int, nodes: int, groups: int) -> Placement:
    """Groups to nodes, copies within each node, copies to the node's ranks; one node and group if they do not fit."""
    if groups % nodes:
        nodes = groups = 1
    count = len(load)
    group_of = np.arange(count) // (count // groups)
    node_of = greedy_bins(np.bincount(group_of, weights=load), nodes)[group_of]
    slots: list[int] = []
    for node in range(nodes):
        here = np.flatnonzero(node_of == node)
        copy = greedy_replicas(load[here], (count + redundant) // nodes)
        share = (load[here] / np.bincount(copy))[copy]
        bin_of = greedy_bins(share, ranks // nodes)
        for rank in range(ranks // nodes):
            slots.extend(here[copy[bin_of == rank]].tolist())
    return Placement(count, ranks, tuple(slots), ((count + redundant) // ranks,) * ranks)


# --- helpers --------------------------------------------------------------------------------------------------------


def draw_load(law: str, count: int, rng: np.random.Generator) -> np.ndarray:
    if law == "zipf":
        return rng.permutation(np.arange(1, count + 1) ** -rng.uniform(0.2, 1.5))
    if law == "lognormal":
        return rng.lognormal(0, rng.uniform(0.2, 2), count)
    if law == "uniform":
        return rng.uniform(0, 1, count)
    return rng.integers(0, 6, count).astype(float)  # few values: many ties


def wasted(placement: Placement) -> int:
    """Copies that lie on a rank beside another of the same expert."""
    on_rank = [[placement.physical_to_logical[p] for p in placement.slots(r)] for r in range(placement.ranks)]
    return sum(len(held) - len(set(held)) for held in on_rank)


def check_valid(placement: Placement, counts: np.ndarray) -> None:
    ids = [p for rank in range(placement.ranks) for p in placement.slots(rank)]
    assert ids == list(range(placement.num_physical))
    assert [placement.rank_of(p) for p in ids] == np.repeat(range(placement.ranks), placement.experts_per_rank).tolist()
    table = placement.logical_to_physical()
    for expert in range(placement.num_experts):
        copies = placement.replicas(expert)
        assert copies and len(copies) == placement.replica_counts[expert]
        assert all(placement.physical_to_logical[p] == expert for p in copies)
        assert table[expert].tolist() == [*copies, *[-1] * (table.shape[1] - len(copies))]
    assert placement.replica_counts.sum() == placement.num_physical
    assert placement.loads(counts).sum() == pytest.approx(counts.sum())
    assert 0 < placement.balancedness(counts) <= 1 + 1e-12


sizes = st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(0, 30), st.integers(0, 2**32 - 1))


@st.composite
def loads_for_eplb(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """Counts, ranks and a redundancy that divides."""
    ranks, extra = draw(st.integers(1, 12)), draw(st.integers(0, 3))
    counts = draw(st.lists(st.one_of(st.integers(0, 9), st.floats(0, 1e6)), min_size=1, max_size=40))
    return np.array(counts, dtype=float), ranks, -len(counts) % ranks + extra * ranks


# --- assignment and policies ----------------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(1, 80))
@settings(max_examples=60, deadline=None)
def test_assign_experts_covers_all_in_order(num_experts: int, world: int) -> None:
    parts = [assign_experts(num_experts, world, rank) for rank in range(world)]
    assert [e for start, count in parts for e in range(start, start + count)] == list(range(num_experts))
    more = num_experts % world
    assert [count for _, count in parts] == [num_experts // world + 1] * more + [num_experts // world] * (world - more)


def test_policies_by_hand() -> None:
    assert linear(8, 3).experts_per_rank == (3, 3, 2)
    assert linear(4, 3, redundant=5).physical_to_logical == (0, 1, 2, 3, 0, 1, 2, 3, 0)
    robin = round_robin(8, 3)
    assert robin.physical_to_logical == (0, 3, 6, 1, 4, 7, 2, 5)
    assert robin.experts_per_rank == (3, 3, 2)
    assert [robin.rank_of(robin.replicas(e)[0]) for e in range(8)] == [e % 3 for e in range(8)]
    assert [robin.replicas(e)[0] - robin.slots(e % 3).start for e in range(8)] == [e // 3 for e in range(8)]
    double = linear(3, 2, redundant=1)
    assert double.logical_to_physical().tolist() == [[0, 3], [1, -1], [2, -1]]
    assert double.loads([10, 4, 1]).tolist() == [9, 6]
    assert double.balancedness([10, 4, 1]) == pytest.approx(7.5 / 9)
    assert double.balancedness([0, 0, 0]) == 1


@given(sizes)
@settings(max_examples=60, deadline=None)
def test_linear_and_round_robin_are_valid(size: tuple[int, int, int, int]) -> None:
    count, ranks, redundant, seed = size
    counts = np.random.default_rng(seed).uniform(0.1, 5, count)
    if ranks <= count:
        check_valid(round_robin(count, ranks), counts)
    if ranks <= count + redundant:
        check_valid(linear(count, ranks, redundant), counts)


@given(loads_for_eplb())
@settings(max_examples=150, deadline=None)
def test_eplb_is_valid_and_no_worse_than_linear(case: tuple[np.ndarray, int, int]) -> None:
    counts, ranks, redundant = case
    placement = eplb(counts, ranks, redundant)
    check_valid(placement, counts)
    assert len(set(placement.experts_per_rank)) == 1
    best = max(
        linear(len(counts), ranks, redundant).balancedness(counts),
        published(counts, ranks, redundant, 1, 1).balancedness(counts),
    )
    assert placement.balancedness(counts) >= best * (1 - 1e-9)


# --- against the published balancer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["zipf", "lognormal", "uniform", "ties"])
def test_eplb_matches_or_beats_the_published_algorithm(law: str) -> None:
    rng = np.random.default_rng(7)
    gains: list[float] = []
    nested = together = 0
    while len(gains) < 150:
        count, ranks = int(rng.choice([8, 16, 32, 60, 64, 128, 160, 256])), int(2 ** rng.integers(1, 7))
        redundant, (nodes, groups) = int(rng.integers(0, 33)), [(1, 1), (2, 4), (4, 8), (3, 8)][rng.integers(4)]
        hierarchical = nodes > 1 and groups % nodes == 0
        if (count + redundant) % ranks or (hierarchical and (ranks % nodes or count % groups)):
            continue
        load = draw_load(law, count, rng)
        ours = eplb(load, ranks, redundant, nodes, groups)
        theirs = published(load, ranks, redundant, nodes, groups)
        gains.append(ours.balancedness(load) / theirs.balancedness(load))
        nested += hierarchical
        apart_on = ranks // nodes if hierarchical else ranks
        together += wasted(ours) > np.maximum(ours.replica_counts - apart_on, 0).sum()
        assert gains[-1] >= 1 - 1e-9, (count, ranks, redundant, nodes, groups)
        if hierarchical:  # each group on one node
            homes: dict[int, set[int]] = {}
            for physical, logical in enumerate(ours.physical_to_logical):
                homes.setdefault(logical // (count // groups), set()).add(ours.rank_of(physical) // (ranks // nodes))
            assert all(len(home) == 1 for home in homes.values())
    assert nested > 10
    assert np.mean(gains) > 1.001  # the swaps are worth something on every law
    assert together < 25  # few keep two copies on a rank that could lie apart, and give up balance for it


def test_copies_stay_apart_unless_that_costs_balance() -> None:
    rng = np.random.default_rng(3)
    laws = ("zipf", "lognormal", "uniform") * 20
    kept = [wasted(eplb(draw_load(law, 64, rng), 16, 16)) for law in laws]
    assert sum(copies > 0 for copies in kept) <= 6
    # A's copies (5 and 5) on one rank balance B and C (8 and 2) exactly; apart, the best is 13 against 7
    assert eplb([10, 8, 2], 2, 1).balancedness([10, 8, 2]) == 1
    # nothing to gain: no expert has two copies on a rank, though the published rule would give all of them to expert 0
    assert eplb(np.zeros(8), 4, 8).replica_counts.tolist() == [2] * 8
    assert wasted(eplb(np.zeros(8), 4, 8)) == 0
    # more copies than ranks can hold apart
    assert wasted(eplb([5, 3], 2, 6)) == 4


# --- Monte-Carlo figures --------------------------------------------------------------------------------------------


def routed(exponent: float, order: np.ndarray, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Rows per expert, ``[E]``, when every token draws k different experts in proportion to Zipf popularity."""
    logits = -exponent * np.log1p(order).astype(np.float32)
    keys = rng.gumbel(size=(tokens, E)).astype(np.float32) + logits  # the k largest: k draws without replacement
    return np.bincount(np.argpartition(keys, E - K, axis=1)[:, E - K :].ravel(), minlength=E)


def study(ranks: int, exponent: float, seeds: int, layouts: list[tuple[int, int, int]]) -> np.ndarray:
    """Balancedness on counts drawn anew, ``[seeds, 1 + 2 * layouts]``: linear, then per layout published and ours.

    A layout is (redundant, nodes, groups); placed by the counts of one step, judged by those of another.
    """
    rows = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        order = rng.permutation(E)
        seen, later = (routed(exponent, order, ranks * TOKENS, rng) for _ in range(2))
        plans = [make(seen, ranks, *layout) for layout in layouts for make in (published, eplb)]
        rows.append([linear(E, ranks).balancedness(later), *(plan.balancedness(later) for plan in plans)])
    return np.array(rows)


FIGURES = {0.6: (0.37, 0.58, 0.89), 1.0: (0.19, 0.30, 0.69)}


@pytest.mark.parametrize("exponent", FIGURES)
def test_monte_carlo_ep32(exponent: float) -> None:
    """An earlier study of the project, E256 k8, 128 tokens a GPU, EP32: linear, EPLB, EPLB with 32 redundant experts.

    What reproduces it: k different experts a token, popularity in random order, balance judged on counts drawn anew,
    and the hierarchical policy, 8 groups on 4 nodes. (The global one reaches 0.93 with 32 redundant experts at either
    exponent; draws with replacement give 0.52 and 0.19 without any.) The study was of one random order, and two of its
    figures depend on that: linear, and the redundant one, where hot groups crowd a node. Over orders they have a
    standard deviation of 0.058 and 0.037 at Zipf 0.6, 0.035 and 0.080 at 1.0 (150 orders), so they need only lie within
    two of our mean. EPLB without copies is bound by the hottest expert, in any order: that one must agree closely.
    """
    got = study(32, exponent, 30, [(0, 4, 8), (32, 4, 8)])
    line, plain, ours, redundant, ours_redundant = got.mean(axis=0)
    stated = FIGURES[exponent]
    assert plain == pytest.approx(stated[1], abs=0.015)
    assert abs(line - stated[0]) < 2 * got[:, 0].std()
    assert abs(redundant - stated[2]) < 2 * got[:, 3].std()
    assert line < plain < redundant
    assert ours > plain - 0.005 and ours_redundant > redundant - 0.005  # noise: it was placed by other counts


@pytest.mark.parametrize(("exponent", "stated"), [(0.0, 0.83), (0.6, 0.74), (1.0, 0.53)])
def test_monte_carlo_ep144(exponent: float, stated: float) -> None:
    """144 ranks of two slots, 32 experts redundant: the global policy (8 groups do not divide over 18 nodes)."""
    theirs, ours = study(144, exponent, 3, [(32, 18, 8)])[:, 1:].mean(axis=0)
    assert theirs == pytest.approx(stated, abs=0.015)
    assert ours > theirs - 0.01


def test_even_popularity_is_bound_by_experts_without_a_copy() -> None:
    """288 slots on 144 ranks, 256 experts: 32 copies leave 224 experts without one, so some rank holds two of these.

    It carries 2 where the mean is 256 / 144: no more than 16 / 18.
    """
    even = np.ones(E)
    assert eplb(even, 144, 32).balancedness(even) == pytest.approx(16 / 18, abs=1e-12)
    assert linear(E, 144, 32).balancedness(even) <= 16 / 18 + 1e-12


# --- the replica of a token -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", [linear(6, 2), linear(6, 4, redundant=8), round_robin(6, 4)])
def test_physical_choice_numpy_and_torch_agree(placement: Placement) -> None:
    logical = np.random.default_rng(0).integers(0, 6, (50, 3))
    chosen = physical_choice(logical, placement)
    assert (np.array(placement.physical_to_logical)[chosen] == logical).all()
    for dtype in (torch.int32, torch.int64):
        found = physical_choice(torch.tensor(logical, dtype=dtype), placement)
        assert found.dtype == dtype
        assert (found.numpy() == chosen).all()


def test_replicas_share_a_hot_expert_evenly() -> None:
    placement = eplb([100, 10, 10, 10], 4, 4)
    copies = placement.replicas(0)
    assert len(copies) == 4
    hot = np.zeros((103, 1), dtype=np.int64)
    share = np.bincount(physical_choice(hot, placement).ravel(), minlength=placement.num_physical)[list(copies)]
    assert share.sum() == 103 and share.max() - share.min() <= 1
    # ranks of one token each, which say where their tokens start, do not crowd on one replica
    assert {int(physical_choice(hot[:1], placement, first_token=rank)[0, 0]) for rank in range(4)} == set(copies)


def test_physical_choice_traces_without_values() -> None:
    placement = linear(6, 4, redundant=2)
    meta = physical_choice(torch.empty(5, 2, dtype=torch.int64, device="meta"), placement)
    assert meta.device.type == "meta" and meta.shape == (5, 2)
    with FakeTensorMode():
        assert physical_choice(torch.zeros(5, 2, dtype=torch.int64), placement).shape == (5, 2)
    table, counts = torch.tensor(placement.logical_to_physical()), torch.tensor(placement.replica_counts)
    exported = torch.export.export(
        Choice(table, counts),
        (torch.zeros(5, 2, dtype=torch.int64),),
        dynamic_shapes={"indices": {0: torch.export.Dim("tokens", min=1)}},
    )
    logical = torch.randint(0, 6, (11, 2))
    assert torch.equal(exported.module()(logical), physical_choice(logical, placement))


class Choice(torch.nn.Module):
    def __init__(self, table: torch.Tensor, counts: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.register_buffer("counts", counts)

    def forward(self, indices: torch.Tensor) -> Any:
        return choose_replica(indices, self.table, self.counts)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: assign_experts(8, 2, 2), "rank 2: must be from 0 to 1"),
        (lambda: assign_experts(8, 0, 0), "world_size 0"),
        (lambda: linear(8, 16), "16 expert-parallel ranks, but only 8 experts .* 8 ranks or at least 8 redundant"),
        (lambda: round_robin(8, 9), "at most 8 ranks"),
        (lambda: linear(8, 2, redundant=-1), "-1 redundant"),
        (lambda: eplb(np.ones(256), 30, 32), r"288 .* 30 ranks: use 14 or 44 redundant experts"),
        (lambda: eplb(np.ones(6), 4, 0), "use 2 redundant experts"),
        (lambda: eplb(np.ones(8), 6, 4, nodes=4, groups=4), "6 ranks must divide by 4 nodes"),
        (lambda: eplb(np.ones(10), 2, 0, nodes=2, groups=4), "10 experts by 4 groups"),
        (lambda: eplb(np.ones(8), 2, nodes=0), "nodes 0"),
        (lambda: eplb(np.ones((2, 8)), 2), r"one layer's loads \[experts\], got shape \[2, 8\]"),
        (lambda: eplb([1, -1], 2), "at least 0"),
        (lambda: eplb([1, float("nan")], 2), "finite"),
        (lambda: linear(8, 2).loads([1, 2]), r"shape \[2\], expected \[8\]"),
        (lambda: linear(8, 2).rank_of(8), "0 to 7"),
        (lambda: linear(8, 2).slots(2), "0 to 1"),
        (lambda: linear(8, 2).replicas(-1), "0 to 7"),
        (lambda: Placement(2, 1, (0, 0), (2,)), "expert 1 is on no rank"),
        (lambda: Placement(2, 1, (0, 1, 2), (3,)), "expert 2 is not one of 0..1"),
        (lambda: Placement(2, 2, (0, 1), (2,)), "1 experts_per_rank for 2 ranks"),
        (lambda: Placement(2, 2, (0, 1), (1, 2)), "adds up to 3, physical_to_logical has 2"),
        (lambda: Placement(2, 2, (0, 1), (3, -1)), "fewer than 0"),
    ],
)
def test_bad_input_is_one_clear_line(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
