"""The space of layouts and options: complete, legal, and without two names for one deployment."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tensorcast as tc
from tensorcast.deploy.engine_limits import Kernels, engine_can_run
from tensorcast.deploy.layout import RULES, Layout, broken_rules, check
from tensorcast.deploy.options import Options, broken_option
from tensorcast.deploy.plan.plan import choose_all2all
from tensorcast.profiles.facts import ModelFacts
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.search import space as search_space
from tensorcast.search.axes import FULL, Axes
from tensorcast.search.search_task import SearchTask
from tensorcast.search.space import Variant, copies, divisors, family, layouts, space, variants
from tensorcast.serving.traffic import Traffic
from tensorcast.trace.cache import traced, whole_model


def facts_of(name: str) -> ModelFacts:
    return traced(load_model(name), "decode").facts


@given(st.integers(1, 96))
def test_layouts_are_every_factorisation(world: int) -> None:
    """tp * dp * pp = world with ep a divisor of tp * dp, counted by brute force."""
    sizes = range(1, world + 1)
    brute = {
        (tp, dp, ep, world // (tp * dp))
        for tp in sizes if world % tp == 0
        for dp in sizes if (world // tp) % dp == 0
        for ep in sizes if (tp * dp) % ep == 0
    }  # fmt: skip
    found = [(one.tp, one.dp, one.ep, one.pp) for one in layouts(world)]
    assert len(found) == len(set(found)) and set(found) == brute
    assert all(one.ep * one.etp == one.tp * one.dp for one in layouts(world))


@given(st.integers(1, 10_000))
def test_divisors(number: int) -> None:
    assert divisors(number) == [n for n in range(1, number + 1) if not number % n]


def test_what_is_pruned_breaks_a_rule_and_is_counted() -> None:
    facts, device = facts_of("gpt-oss-120b"), load_device("h200")
    every = [*layouts(48), *layouts(256)]
    first = {layout: next(broken_rules(layout, facts, device), ("", ""))[0] for layout in every}
    kept, pruned = {layout for layout in every if not first[layout]}, Counter(filter(None, first.values()))
    assert set(pruned) <= set(RULES) and pruned["expert width"] and pruned["heads per rank"]
    for layout in every:
        if layout in kept:
            check(layout, facts, device)
        else:
            with pytest.raises(tc.InputError, match="breaks rule"):
                check(layout, facts, device)


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3-235b-a22b", "llama-3.1-8b"])
@pytest.mark.parametrize("routing", ["balanced", "zipf:0.6"])
def test_variants_are_legal_and_distinct(name: str, routing: str) -> None:
    """What runs in each phase: no two variants of a layout are the same deployment, none breaks a rule."""
    facts, engine = facts_of(name), load_engine("vllm")
    for layout in layouts(16):
        if any(broken_rules(layout, facts, load_device("h200"))):
            continue
        base = Options(routing=routing if facts.num_experts else "balanced")
        found = variants(layout, facts, FULL, base, quantized_dispatch=name.startswith("deepseek"))
        assert found
        seen = set()
        for variant in found:
            kinds = []
            for phase in ("prefill", "decode"):
                options = getattr(variant, phase)
                kind = choose_all2all(options.all2all, layout, engine, phase)
                assert broken_option(options, layout, facts, kind) == ("", "")
                kinds.append((replace(options, all2all=kind), kind))
            seen.add(tuple(kinds))
        assert len(seen) == len(found)


@pytest.mark.parametrize(
    ("asked", "flag"),
    [
        ({"routing": "zipf:0.6"}, "--routing"),
        ({"all2all": "low_latency"}, "--all2all"),
        ({"all2all": "allgather_reducescatter"}, "--all2all"),
        ({"dispatch": "bf16"}, "--dispatch"),
        ({"combine": "fp8_block"}, "--combine"),
        ({"placement": "eplb"}, "--placement"),
        ({"dual_batch_overlap": True}, "--dual-batch-overlap"),
    ],
)
def test_a_dense_model_has_nothing_for_experts_options(asked: dict[str, Any], flag: str) -> None:
    facts = facts_of("llama-3.1-8b")
    name, problem = broken_option(Options(**asked), Layout(2, 1, 2), facts, "none")
    assert name == "experts to place" and problem == f"the model has no experts: {flag} does not apply"
    for default in ("balanced", "uniform"):
        assert broken_option(Options(routing=default), Layout(2, 1, 2), facts, "none") == ("", "")


def test_one_exchange_takes_deepep_apart() -> None:
    axes = Axes().for_one_exchange()
    assert axes.exchange == ("allgather_reducescatter", "high_throughput", "low_latency")
    assert set(axes.chunk_tokens) == {256, *Axes().chunk_tokens}
    assert Axes(exchange=("deepep",), chunk_tokens=(512,)).for_one_exchange().chunk_tokens == (512,)
    assert Axes(exchange=("auto", "direct")).for_one_exchange() == Axes(exchange=("auto", "direct"))


def counted(layout: Layout, facts: ModelFacts, axes: Axes = FULL) -> Counter[str]:
    found = variants(layout, facts, axes, quantized_dispatch=facts.num_experts > 0)
    return Counter(one.decode.all2all for one in found)


def test_options_that_change_nothing_do_not_multiply() -> None:
    """By hand: KV 2 x drafts 3 always; dispatch 2 where tokens travel, overlap 2 where they are sent."""
    facts = facts_of("deepseek-v3")
    assert counted(Layout(8, 8, 1, 1), facts) == {"auto": 6 * 2}  # shared expert cut or whole
    assert counted(Layout(8, 1, 8, 4), facts) == {"allgather_reducescatter": 6 * 2}  # experts cut: gathered
    assert counted(Layout(8, 1, 8, 8), facts) == {"allgather_reducescatter": 6 * 2, "low_latency": 6 * 2 * 2}
    # from k + 1 = 9 ranks on the shared expert may live on ranks of its own, with tp > 1 also whole on every rank
    assert counted(Layout(16, 1, 16, 16), facts)["low_latency"] == 6 * 2 * 2 * 2
    assert counted(Layout(16, 2, 8, 16), facts)["low_latency"] == 6 * 2 * 2 * 3
    dense = facts_of("llama-3.1-8b")
    assert counted(Layout(8, 1, 8, 1), dense) == {"auto": 2}


def test_options_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts' options for all depths of drafts and for every layout that tries them are one object, made once."""
    made, facts = list[Options](), facts_of("deepseek-v3")

    def counted_replace(base: Options, **changes: Any) -> Options:
        made.append(replace(base, **changes))
        return made[-1]

    monkeypatch.setattr(search_space, "replace", counted_replace)
    for function in (search_space._combined, search_space._both_phases, search_space._with, search_space._once):
        function.cache_clear()
    found = [v for layout in (Layout(16, 2, 8, 16), Layout(32, 4, 8, 32)) for v in variants(layout, facts, FULL)]
    every = [options for v in found for options in (v.prefill, v.decode)]
    assert len({id(options) for options in every}) == len({*every}) == len(made) < len(every)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_shared_experts_are_whole_beside_cut_only_where_it_differs(engine: str) -> None:
    task = SearchTask(
        model=load_model("deepseek-v3"), device=load_device("h200"), engine=load_engine(engine), gpus=8,
        load=Traffic(512, 64, 1), axes=Axes(),
    )  # fmt: skip
    tried = space(task, Counter())
    cut = {(v.layout, v.decode.all2all): v for v in tried if v.layout.tp > 1 and v.decode.shared_expert_tp}
    for v in cut.values():
        whole = Variant(v.layout, *(replace(o, shared_expert_tp=False) for o in (v.prefill, v.decode)))
        found = []
        for one in (v, whole):
            prefill, decode = (
                task.scenario.deployment(v.layout, phase, getattr(one, phase)) for phase in ("prefill", "decode")
            )
            taken = prefill.step.seconds(4.0, 64.0, 0.0), decode.step.seconds(4.0, 1.0, 256.0)
            found.append((*taken, decode.memory(4.0, 1, 256).weights))
        assert found[0] != found[1] or whole not in tried, v
    assert cut


def test_copies_of_experts_even_the_load_out() -> None:
    assert [copies(256, ranks) for ranks in (32, 144, 100)] == [32, 32, 44]
    skewed = variants(Layout(32, 1, 32, 32), facts_of("deepseek-v3"), Axes(), Options(routing="zipf:0.6"))
    assert {v.decode.redundant_experts for v in skewed if not v.decode.external_shared_experts} == {0, 32}
    even = variants(Layout(32, 1, 32, 32), facts_of("deepseek-v3"), Axes())
    assert {v.decode.redundant_experts for v in even if not v.decode.external_shared_experts} == {0}


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (Layout(8, 8), "TP"),
        (Layout(8, 8, 1, 8), "TP+EP"),
        (Layout(8, 8, 1, 4), "TP+EPxTP"),
        (Layout(8, 1, 8, 8), "DP+EP"),
        (Layout(8, 1, 8, 1), "DP+TP"),
        (Layout(16, 2, 4, 8, 2), "PP+TP+DP+EP"),
        (Layout(1), "1 GPU"),
    ],
)
def test_families_have_names(layout: Layout, name: str) -> None:
    assert family(layout) == name


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"exchange": ("magic",)}, "unknown --all2all 'magic'"),
        ({"kv_dtype": ("int4",)}, "unknown --kv-dtype 'int4'"),
        ({"mtp_depth": (-1,)}, "--mtp -1: must be at least 0"),
        ({"chunk_tokens": (0,)}, "--chunk-tokens 0: must be at least 1"),
    ],
)
def test_values_of_axes_are_checked(axes: dict[str, Any], message: str) -> None:
    with pytest.raises(tc.InputError, match=message):
        Axes(**axes)


def test_a_variant_says_how_each_phase_runs() -> None:
    found = variants(Layout(8, 1, 8, 8), facts_of("deepseek-v3"), Axes(exchange=("deepep",), mtp_depth=(1,)))
    assert all(isinstance(one, Variant) for one in found)
    assert {(v.prefill.all2all, v.decode.all2all) for v in found} == {("high_throughput", "low_latency")}
    assert {(v.prefill.mtp_depth, v.decode.mtp_depth) for v in found} == {(0, 1)}


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_every_variant_is_one_that_its_engine_runs(engine: str) -> None:
    """Asked one by one, with every option; what tokens travel in among them, which no rule reads."""
    task = SearchTask(
        model=load_model("deepseek-v3"), device=load_device("h200"), engine=load_engine(engine), gpus=16,
        load=Traffic(1024, 128, 1.0), axes=FULL,
    )
    found = space(task, Counter())
    whole = whole_model(task.model, "decode")
    node = task.device.interconnect[0].size
    kernels = Kernels(task.engine.lacking, task.device.architecture, task.model.config, whole)

    def can(v: Variant, **options: Any) -> bool:
        return not engine_can_run(
            engine, v.layout, whole.facts, gpus_per_node=node, cuts=whole.cuts, kernels=kernels,
            lifted=task.engine.lifted_rules, **options,
        )  # fmt: skip

    one_by_one = [
        v for layout in {v.layout: None for v in found}
        for v in variants(layout, whole.facts, FULL, quantized_dispatch=True)
        if can(v, options=v.prefill) and (v.decode == v.prefill or can(v, options=v.decode, prefill=v.prefill))
    ]
    assert {v.decode.dispatch for v in found} > {None}
    assert set(found) <= set(one_by_one)
    # the others are cut or whole alike
    assert all(not v.decode.shared_expert_tp for v in set(one_by_one) - set(found))
