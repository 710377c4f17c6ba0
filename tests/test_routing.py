"""Expert load against Monte Carlo, brute force and published figures."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorcast.cost.recordings.recording import LayerCounts
from tensorcast.cost.routing import Routing, expected_distinct, expert_load, inclusion
from tensorcast.errors import InputError
from tensorcast.modeling.moe.fused import FusedMoETensorCast
from tensorcast.modeling.moe.placement import linear


def _sample(q_weights: np.ndarray, top_k: int, tokens: int, generator: np.random.Generator) -> np.ndarray:
    """Counts per expert of ``tokens`` tokens that pick k distinct experts, chance ~ weights (Gumbel top-k)."""
    noise = np.log(q_weights) + generator.gumbel(size=(tokens, len(q_weights)))
    chosen = np.argpartition(-noise, top_k - 1, axis=1)[:, :top_k]
    return np.bincount(chosen.reshape(-1), minlength=len(q_weights))


@pytest.mark.parametrize(("tokens", "ranks"), [(16, 1), (64, 1), (64, 8), (1024, 32)])
def test_uniform_load_agrees_with_monte_carlo(tokens: int, ranks: int) -> None:
    experts, k = 256, 8
    generator = np.random.default_rng(1)
    rows, hit = [], []
    for _ in range(300):
        counts = _sample(np.ones(experts), k, tokens, generator).reshape(ranks, -1)
        busiest = counts.sum(1).argmax()
        rows.append(counts[busiest].sum())
        hit.append((counts[busiest] > 0).sum())
    load = expert_load(Routing.parse("uniform"), experts, k, ranks).at(float(tokens))
    assert load.rows == pytest.approx(np.mean(rows), rel=0.05)
    assert load.hit == pytest.approx(np.mean(hit), rel=0.05)


def test_hit_experts_match_the_published_monte_carlo() -> None:
    """256 experts, top-8: 102.3 hit by 16 tokens, 222.3 by 64 (shared constants of public cost studies)."""
    load = expert_load(Routing.parse("uniform"), 256, 8, 1)
    assert load.at(16.0).hit == pytest.approx(102.3, rel=0.01)
    assert load.at(64.0).hit == pytest.approx(222.3, rel=0.01)


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_zipf_load_agrees_with_monte_carlo_over_placements(exponent: float) -> None:
    experts, k, ranks, tokens = 128, 8, 16, 2048
    routing = Routing.parse(f"zipf:{exponent}")
    q = inclusion(np.arange(1, experts + 1.0) ** -exponent, k)
    generator = np.random.default_rng(2)
    rows = []
    for _ in range(60):
        order = generator.permutation(experts)
        picks = generator.random((tokens, experts)) < q[order]  # independent picks with the right chances
        rows.append(picks.sum(0).reshape(ranks, -1).sum(1).max())
    assert expert_load(routing, experts, k, ranks).at(float(tokens)).rows == pytest.approx(np.median(rows), rel=0.08)


def test_inclusion_chances_sum_to_k_and_never_exceed_one() -> None:
    for exponent, k in itertools.product((0.0, 0.7, 1.5, 4.0), (1, 2, 8)):
        q = inclusion(np.arange(1, 65.0) ** -exponent, k)
        assert q.sum() == pytest.approx(k)
        assert q.max() <= 1.0 and (np.diff(q) <= 1e-12).all()


def test_balanced_load_is_exact_and_a_token_per_rank_costs_a_token_per_rank() -> None:
    load = expert_load(Routing.parse("balanced"), 256, 8, 32)
    assert load.at(32.0).rows == 8.0  # one token per rank at EP32: 8 of the 256 copies each
    assert load.at(32.0).hit == 8.0
    assert load.at(1.0).rows == 1.0  # the busiest rank has one row, never a fraction
    assert np.array_equal(load.at(np.array([32.0, 64.0])).rows, [8.0, 16.0])


def test_experts_that_do_not_divide_load_the_first_ranks_more() -> None:
    load = expert_load(Routing.parse("balanced"), 10, 2, 4)
    assert load.local_experts == 3
    assert load.at(100.0).rows == pytest.approx(200 * 3 / 10)


@given(st.integers(2, 300), st.integers(1, 16), st.integers(0, 40), st.sampled_from([1, 2, 5]))
def test_copies_placed_in_turn_load_as_the_layer_that_runs(experts: int, ranks: int, redundant: int, k: int) -> None:
    """Linear placement: copies of the first experts relieve their ranks; others keep theirs. The layer's own count."""
    ranks = min(ranks, experts)
    load = expert_load(Routing.parse("balanced"), experts, k, ranks, redundant=redundant)
    placement = linear(experts, ranks, redundant)
    stage = SimpleNamespace(placement=placement, num_experts=experts, zero_experts=0, external=0)
    rows = []
    for rank in range(ranks):
        slots = placement.slots(rank)
        stage.start, stage.count = slots.start, len(slots)
        rows.append(FusedMoETensorCast.expected_rows(stage, 1000 * experts, k, 1))  # type: ignore[arg-type]
    assert max(rows) == pytest.approx(load.at(1000.0 * experts).rows, abs=1)


def test_redundant_experts_in_turn_do_not_help_the_busiest_rank() -> None:
    """128 experts and 16 copies on 8 ranks: 18 whole experts on one, 576 of 4,096 rows and not 512."""
    load = expert_load(Routing.parse("balanced"), 128, 8, 8, redundant=16)
    assert load.at(512.0).rows == pytest.approx(576)


def test_counts_file_sets_the_busiest_rank(tmp_path: Path) -> None:
    file = tmp_path / "load.csv"
    file.write_text(
        "layer,expert,count\n" + "".join(f"{layer},{e},{10 if e < 2 else 1}\n" for layer in (0, 1) for e in range(8))
    )
    load = expert_load(Routing.parse(str(file)), 8, 1, 4)
    share = 20 / 26  # the two popular experts sit on rank 0
    assert load.at(1e6).rows == pytest.approx(1e6 * share, rel=0.01)
    assert load.at(1e6).mean_rows == pytest.approx(1e6 / 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "needs a column 'count'"),
        ("count\n-1\n2\n", "at least 0"),
        ("count\n1\n1\n", "2 counts a layer, but the model has 8"),
    ],
)
def test_bad_counts_are_one_clear_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "bad.csv"
    file.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        expert_load(Routing.parse(str(file)), 8, 1, 4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["zipf:x", "zipf:-1", "random", "missing.csv"])
def test_unknown_routing_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--routing"):
        Routing.parse(text)


@pytest.mark.parametrize("policy", ["linear", "round_robin", "eplb"])
def test_placement_keeps_the_mean_and_eplb_lowers_the_busiest(policy: str) -> None:
    routing = Routing.parse("zipf:0.6")
    plain = expert_load(routing, 256, 8, 32).at(4096.0)
    placed = expert_load(routing, 256, 8, 32, policy=policy).at(4096.0)
    assert placed.mean_rows == plain.mean_rows
    assert placed.rows < 0.9 * plain.rows if policy == "eplb" else placed.rows == pytest.approx(plain.rows, rel=0.15)


@pytest.mark.parametrize("ranks", [1, 4, 8, 16, 32])
def test_typical_traffic_falls_on_ranks_as_counted_where_a_router_picks_groups(ranks: int) -> None:
    """Public counts of DeepSeek-R1, 8 groups of 32 experts: those of a group are popular together."""
    counted = expert_load(Routing.parse("recorded:deepseek-r1"), 256, 8, ranks).at(32.0)
    grouped, strewn = (expert_load(Routing.parse("typical"), 256, 8, ranks, groups=n).at(32.0) for n in (8, 1))
    assert grouped.hit == pytest.approx(counted.hit, rel=0.08)
    assert grouped.rows == pytest.approx(counted.rows, rel=0.12)
    if ranks == 8:  # a group each
        assert strewn.hit < 0.85 * counted.hit and strewn.rows < 0.85 * counted.rows
    dealt = expert_load(Routing.parse("typical"), 256, 8, ranks, groups=8, policy="round_robin").at(32.0)
    assert dealt.rows <= grouped.rows * 1.05  # each rank has some of every group


def test_tokens_of_requests_that_resemble_one_another_hit_fewer_experts() -> None:
    """Counts of DeepSeek-R1, whose tokens are of requests that have nothing to do with each other: of 32, 64 and 128
    tokens that pick on their own 145, 199 and 237 experts are hit."""
    tokens = np.array([1.0, 32.0, 64.0, 128.0])
    own, alike = (
        np.asarray(expert_load(Routing.parse(law), 256, 8, 1, groups=8).at(tokens).hit) for law in ("typical", "alike")
    )
    np.testing.assert_allclose(own[1:], [145, 199, 237], rtol=0.03)
    np.testing.assert_allclose(alike, expert_load(Routing.parse("typical"), 256, 8, 1, groups=8).at(tokens**0.85).hit)
    assert own[0] == alike[0] and (own > alike)[1:].all()


def test_copies_of_hot_experts_share_their_load() -> None:
    """One expert takes all tokens: with 3 copies on 4 ranks each of three ranks gets a third."""
    routing = Routing("file", counts=LayerCounts("file", np.array([[1.0, 1e-9, 1e-9, 1e-9, 1e-9, 1e-9]])))
    load = expert_load(routing, 6, 1, 4, redundant=2, policy="eplb")
    assert load.local_experts == 2
    assert load.at(9e6).rows == pytest.approx(3e6, rel=0.01)
    assert expert_load(routing, 6, 1, 4).at(9e6).rows == pytest.approx(9e6, rel=0.01)


@pytest.mark.parametrize(
    ("policy", "redundant", "message"),
    [
        ("random", 0, "unknown --placement 'random'"),
        ("round_robin", 4, "round_robin places no copies"),
        ("eplb", 3, "do not divide by 4 ranks: use 0 or 4 redundant experts"),
        ("linear", -1, "--redundant-experts -1"),
    ],
)
def test_placements_that_cannot_be_are_refused(policy: str, redundant: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        expert_load(Routing.parse("balanced"), 8, 2, 4, redundant=redundant, policy=policy)


def test_load_grows_with_skew() -> None:
    rows = [
        float(expert_load(Routing.parse(r), 128, 8, 16).at(4096.0).rows)
        for r in ("balanced", "uniform", "zipf:0.5", "zipf:1")
    ]
    assert rows == sorted(rows)


@pytest.mark.parametrize(
    ("parts", "groups", "chosen", "expected"),
    # DeepEP's tables: 2, 4 and 8 nodes without a limit; 8 nodes with 4 of 8 groups; 64 ranks without and with it
    [(2, 1, 1, 1.99), (4, 1, 1, 3.61), (8, 1, 1, 5.30), (8, 8, 4, 3.63), (64, 1, 1, 7.68), (64, 8, 4, 7.36)],
)
def test_expected_distinct_destinations(parts: int, groups: int, chosen: int, expected: float) -> None:
    assert expected_distinct(256, 8, parts, groups, chosen) == pytest.approx(expected, abs=0.01)


def test_expected_distinct_equals_brute_force() -> None:
    """All ways to pick 2 of 4 groups, then 3 experts of the 8 inside, over 8 experts' 2 halves."""
    experts, k, groups, chosen, parts = 16, 3, 4, 2, 2
    total, ways = 0, 0
    for picked in itertools.combinations(range(groups), chosen):
        pool = [e for e in range(experts) if e * groups // experts in picked]
        for combination in itertools.combinations(pool, k):
            total += len({e * parts // experts for e in combination})
            ways += 1
    assert expected_distinct(experts, k, parts, groups, chosen) == pytest.approx(total / ways)
