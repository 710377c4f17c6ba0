"""Outside the data times never fall as a size grows, and go on from where the data ends."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_sweeps import ENGINES, price, sweeps

from tensorcast.cost.kernels.device_model import ATTENDED, ATTENTION, LINES
from tensorcast.cost.kernels.formula import formula_of
from tensorcast.cost.kernels.lattice import SIDES, Lattice
from tensorcast.cost.kernels.predictor import predictor_for
from tensorcast.cost.kernels.vocabulary import Columns
from tensorcast.profiles.store import load_device

MEASURED = ("a100-sxm", "h100-sxm", "h200-sxm", "b200-sxm", "gb200")

BOX = {"m": (1.0, 256.0), "k": (64.0, 1024.0)}


def rough(columns: Columns) -> np.ndarray:
    """A law that grows by and large, with steps up and down."""
    m, k = np.log2(columns["m"]), np.log2(columns["k"])
    kind = columns.get("kind", np.zeros(len(m)))
    return np.asarray(0.5 * m + 0.7 * k + 0.4 * np.sin(5.0 * m) * np.cos(3.0 * k) + kind)


def brute(m: int, k: int, tops: tuple[int, int]) -> float:
    """The middle between the largest of no larger nodes and the smallest of no smaller ones, one by one."""
    def at(i: int, j: int) -> float:
        return float(rough({"m": np.array([2.0**i]), "k": np.array([64.0 * 2.0**j])})[0])

    below = max(at(i, j) for i, j in itertools.product(range(m + 1), range(k + 1)))
    above = min(at(i, j) for i, j in itertools.product(range(m, tops[0] + 1), range(k, tops[1] + 1)))
    return (below + above) / 2.0


def test_nodes_are_the_middle_of_what_is_below_and_above() -> None:
    lattice = Lattice(SIDES["quantize"], BOX, rough)
    for m, k in itertools.product(range(9), range(5)):
        columns = {"m": np.array([2.0**m]), "k": np.array([64.0 * 2.0**k])}
        assert lattice.log_seconds(columns)[0] == pytest.approx(brute(m, k, (8, 4)))


@given(st.tuples(st.integers(0, 8), st.integers(0, 4)), st.tuples(st.integers(0, 8), st.integers(0, 4)))
@settings(max_examples=50, deadline=None)
def test_only_nodes_below_and_above_what_was_asked_are_priced(one: tuple[int, int], other: tuple[int, int]) -> None:
    """Of two questions: what lies between them counts as asked; no node twice."""
    priced: list[tuple[float, float]] = []

    def noted(columns: Columns) -> np.ndarray:
        priced.extend(zip(np.log2(columns["m"]).tolist(), np.log2(columns["k"] / 64.0).tolist(), strict=True))
        return rough(columns)

    lattice = Lattice(SIDES["quantize"], BOX, noted)
    for m, k in (one, other, one):
        found = lattice.log_seconds({"m": np.array([2.0**m]), "k": np.array([64.0 * 2.0**k])})
        assert found[0] == pytest.approx(brute(m, k, (8, 4)))
    low, high = np.minimum(one, other), np.maximum(one, other)
    every = np.array([*itertools.product(range(9), range(5))])
    wanted = every[(every <= high).all(axis=1) | (every >= low).all(axis=1)]
    assert sorted(priced) == sorted(map(tuple, wanted.astype(float).tolist()))


@given(m=st.floats(1.0, 4000.0), k=st.floats(64.0, 60000.0), more=st.floats(1.0, 3.0))
@settings(max_examples=150, deadline=None)
def test_it_never_falls_and_does_not_hang_on_what_else_is_asked(m: float, k: float, more: float) -> None:
    columns = {"m": np.array([m, m * more, m]), "k": np.array([k, k, k * more])}
    found = Lattice(SIDES["quantize"], BOX, rough).log_seconds(columns)
    assert found[1] >= found[0] - 1e-9 and found[2] >= found[0] - 1e-9
    alone = Lattice(SIDES["quantize"], BOX, rough)
    alone.log_seconds({"m": np.array([3.0]), "k": np.array([100.0])})
    for i in range(3):
        one = alone.log_seconds({name: values[i : i + 1] for name, values in columns.items()})
        inside = columns["m"][i] <= 256.0 and columns["k"][i] <= 1024.0
        if inside or more == 1.0:
            assert one[0] == pytest.approx(found[i])


@given(places=st.lists(st.tuples(st.floats(1.0, 4000.0), st.floats(64.0, 60000.0)), min_size=2, max_size=5))
@settings(max_examples=100, deadline=None)
def test_nothing_hangs_on_what_else_is_asked(places: list[tuple[float, float]]) -> None:
    """Where times grow beyond the data, as kernels' do: what steps there are inside stays as it is at the edge."""

    def law(columns: Columns) -> np.ndarray:
        held = {name: np.clip(columns[name], *BOX[name]) for name in BOX}
        slow = 3.0 * np.exp(-np.square(np.log2(held["m"]) - 7.0))
        return rough(held) + slow + sum(np.log2(columns[name] / held[name]) for name in BOX)

    columns = dict(zip(BOX, np.array(places).T, strict=True))
    together = Lattice(SIDES["quantize"], BOX, law).log_seconds(columns)
    for i, one in enumerate(together):
        alone = Lattice(SIDES["quantize"], BOX, law)
        assert alone.log_seconds({name: values[i : i + 1] for name, values in columns.items()})[0] == pytest.approx(one)


def test_a_law_without_steps_comes_back_and_others_sizes_are_kept_apart() -> None:
    def straight(columns: Columns) -> np.ndarray:
        return np.log(columns["m"] * columns["k"] ** 0.5) + columns["kind"]

    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, 200).astype(float)
    columns = {"m": rng.uniform(1, 999, 200), "k": rng.uniform(64, 9999, 200), "kind": kind}
    lattice = Lattice(SIDES["quantize"], BOX, straight)
    assert lattice.log_seconds(columns) == pytest.approx(straight(columns))
    near = Lattice(SIDES["quantize"], BOX, straight, reach=1)
    assert near.log_seconds(columns) == pytest.approx(straight(columns))


def test_choices_end_with_all_experts_and_heads_count_by_cached_ones() -> None:
    asked: list[Columns] = []

    def node(columns: Columns) -> np.ndarray:
        asked.append(columns)
        size = columns["topk"] if "topk" in columns else columns["q_heads"]
        return np.log(size)

    sizes = {"tokens": 8.0, "hidden": 512.0, "inter": 512.0, "topk": 6.0, "experts": 6.0}
    box = {name: (value, value) for name, value in sizes.items()}
    experts = Lattice(SIDES["grouped_gemm"], box, node).log_seconds({n: np.array([v]) for n, v in sizes.items()})
    assert experts == pytest.approx(np.log(6.0)) and asked[-1]["topk"].max() == 6.0
    heads = {"batch": 1.0, "new": 1.0, "past": 1.0, "q_heads": 24.0, "kv_heads": 3.0, "head_dim": 64.0, "window": 0.0}
    box = {name: (value, value) for name, value in heads.items()}
    found = Lattice(SIDES["attention_decode"], box, node).log_seconds({n: np.array([v]) for n, v in heads.items()})
    assert found == pytest.approx(np.log(24.0))
    assert not asked[-1]["window"].any() and "windowed" not in asked[-1]
    assert (asked[-1]["q_heads"] % 3.0 == 0).all()


@given(
    data=st.data(), family=st.sampled_from(sorted(SIDES)), device=st.sampled_from(MEASURED),
    engine=st.sampled_from(ENGINES[:3]), ranks=st.sampled_from([2.0, 3.0, 8.0, 16.0, 32.0]),
)
@settings(max_examples=150, deadline=None)
def test_outside_the_data_no_time_falls_as_a_size_grows(
    data: st.DataObject, family: str, device: str, engine: str, ranks: float
) -> None:
    """Between calls that are all outside. Head sizes and windows: where none of them is a measured one."""
    predictor = predictor_for(load_device(device), engine)
    assert predictor.model is not None
    variants = sorted({k[3] for k in predictor.model.kernels if k[0] == family and k[2] in (engine, "any")} | {""})
    kernels = sorted(k for k in predictor.model.kernels if k[0] == family and k[2] in (engine, "any"))
    _, dtype, _, variant = data.draw(st.sampled_from(kernels)) if kernels else ("", "bf16", "", variants[0])
    grown, columns = data.draw(sweeps(family))
    if "ranks" in columns:
        columns["ranks"] = np.full_like(columns["ranks"], ranks)
    found = price(predictor, family, dtype, columns, variant)
    kernel = predictor.model.find(family, dtype, engine, variant)
    outside = found.level == 1
    if kernel is not None:
        known = kernel.measured_shape(columns)
        stands_in = (kernel.engine not in (engine, "any")) | (kernel.variant != variant)
        outside &= ~(stands_in & known & (kernel.beyond(columns) <= 0))
        if grown in ("head_dim", "window"):
            outside &= ~known
        # as the longest contexts of these sizes were measured, which may fall as another size grows
        outside &= ~kernel.longer(columns) | ((grown in ATTENDED) & (columns[grown] > kernel.box.get(grown, (0, 0))[1]))
    both = outside[1:] & outside[:-1]
    assert (np.diff(found.seconds) >= -1e-9 * found.seconds[1:])[both].all()


@pytest.mark.parametrize("device", MEASURED)
@pytest.mark.parametrize("engine", ENGINES[:3])
def test_longer_contexts_than_were_timed_take_no_less(device: str, engine: str) -> None:
    """Of few sequences and heads, whose times jump in the tables: 132,000 tokens took a third of 131,000 on an RTX PRO
    6000, a half under TensorRT-LLM's MLA."""
    predictor, dice = predictor_for(load_device(device), engine, served=True), np.random.default_rng(11)
    assert predictor.model is not None
    for family, dtype, who, variant in predictor.model.kernels:
        if family not in ATTENTION or who != engine:
            continue
        box = predictor.model.kernels[family, dtype, who, variant].box
        sizes: Columns = {}
        for name, ends in box.items():
            low, high = np.log2(np.maximum(ends, 1.0))
            sizes[name] = np.round(2 ** dice.uniform(low, high, 40))
        if "kv_heads" in sizes:
            sizes["kv_heads"] = np.minimum(sizes["kv_heads"], 8.0)
            sizes |= {"q_heads": 8 * sizes["kv_heads"], "head_dim": np.full(40, 128.0), "window": np.zeros(40)}
        sizes["kv_bytes"] = np.full(40, box["kv_bytes"][1])
        for side in ATTENDED:
            most = np.full(40, box[side][1])
            short, long = (
                predictor.price(family, dtype, variant, {**sizes, side: end}).seconds for end in (most, 1.3 * most + 1)
            )
            assert (long >= 0.999 * short).all(), (family, dtype, side, (long / short).min())


@pytest.mark.parametrize("device", MEASURED)
def test_times_go_on_from_where_the_data_ends(device: str) -> None:
    """A hundredth beyond the largest measured size: hardly another time. By kernel, a few are rough."""
    steps = []
    for engine in ENGINES[:3]:
        predictor = predictor_for(load_device(device), engine)
        assert predictor.model is not None
        for kernel in predictor.model.kernels.values():
            sizes = [n for n in SIDES[kernel.family] if n not in LINES[kernel.family] and n != "q_heads"]
            for name in sizes if kernel.engine == engine else ():
                top = kernel.box[name][1]
                if top > 0:
                    probe = {n: np.full(2, v) for n, v in kernel.report["probe"].items()}
                    columns = probe | {name: top * np.array([1.0, 1.01])}
                    found = predictor.price(kernel.family, kernel.dtype, kernel.variant, columns)
                    assert found.evidence.tolist() == ["measured", "calibrated"]
                    steps.append(np.log(found.seconds[1] / found.seconds[0]))
    assert 0.0 < np.median(steps) < 0.02
    assert np.quantile(np.abs(steps), 0.8) < 0.06


def test_a_load_that_is_given_takes_what_the_lattice_says_of_its_tokens() -> None:
    """Rows and experts hit as uniform routing has them: the same time as by tokens alone."""
    device = load_device("h200")
    predictor = predictor_for(device, "vllm")
    tokens = np.array([16.0, 256.0, 4000.0])
    shape = {"hidden": 3072.0, "inter": 1280.0, "topk": 4.0, "experts": 96.0, "slots": 96.0, "moe_tp": 1.0,
             "moe_ep": 2.0, "gated": 1.0, "skew": -1.0}
    columns = {name: np.full(3, value) for name, value in shape.items()} | {"tokens": tokens}
    load = {n: np.exp2(formula_of("grouped_gemm", "bf16", "", columns, device, engine="vllm").features[f"log_{n}"])
            for n in ("rows", "hit")}
    by_tokens = predictor.price("grouped_gemm", "bf16", "", columns)
    given_load = predictor.price("grouped_gemm", "bf16", "", columns | load)
    assert given_load.seconds == pytest.approx(by_tokens.seconds, rel=1e-6)
    twice = predictor.price("grouped_gemm", "bf16", "", columns | {**load, "rows": 2.0 * load["rows"]})
    assert (twice.seconds > by_tokens.seconds).all()


def test_more_ranks_than_were_measured_keep_the_links_shares_of_the_measured_ones() -> None:
    """A formula that is slower over several nodes is not made quicker again by trees that saw one."""
    predictor = predictor_for(load_device("h200"), "vllm")
    tokens = np.array([64.0, 512.0, 4096.0])
    shape = {"hidden": 7168.0, "topk": 8.0, "experts": 256.0, "ranks": 32.0, "nodes": 4.0, "sms": 20.0,
             "copy_bytes": 1.03125}
    columns = {name: np.full(3, value) for name, value in shape.items()} | {"tokens": tokens}
    found = predictor.price("moe_exchange", "any", "low_latency:dispatch", columns)
    assert (np.abs(np.log(found.factor)) < 0.2).all()
