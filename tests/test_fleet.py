"""Fleets: whatever is priced together costs what it costs alone, to the last digits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from one_deployment import OneCurve, OnePrefill

from tensorcast.cost.stages import stage_layers
from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.layout import parse_layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.step.pipeline_stages import FIRST, HAND_OVER, LAST, Stage, stages_of
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.search.axes import FULL
from tensorcast.search.search_task import SearchTask
from tensorcast.search.space import space
from tensorcast.search.variant_prices import VariantPrices
from tensorcast.serving.capacity import prefill_budget, prompts_that_fit, sequences_that_fit
from tensorcast.serving.prefill_costs import cut_prompts
from tensorcast.serving.traffic import Traffic


@pytest.mark.parametrize(("model", "engine"), [("deepseek-v3", "vllm"), ("qwen3-32b", "sglang")])
def test_curves_lines_and_room_are_those_of_each_deployment_alone(model: str, engine: str) -> None:
    """Every exchange, KV dtype, drafting depth, overlap and number of pipeline stages; engines' captured prefill."""
    load = Traffic(3000, 500, 1)
    task = SearchTask(
        model=load_model(model), device=load_device("h200"), engine=load_engine(engine), gpus=16, load=load, axes=FULL,
        runnable_only=False,
    )  # fmt: skip
    shop = VariantPrices(task.scenario, space(task, Counter()), (2048, 16384))
    generator = np.random.default_rng(5)
    some = generator.choice(len(shop.variants), min(25, len(shop.variants)), replace=False)
    assert {shop.variants[i].layout.pp for i in some} >= {1, 2, 4}
    for i in some:
        variant = shop.variants[i]
        decode = shop.scenario.deployment(variant.layout, "decode", variant.decode)
        prefill = shop.scenario.deployment(variant.layout, "prefill", variant.prefill)
        least = 0.0 if load.input_len > shop.scenario.own_chunk else 5.0
        curve = OneCurve(decode, float(load.context), float(shop.grid[-1]), float(shop.grid[0]), least=least)
        assert np.isin(shop.grid, curve.batch).all()
        # batches that fit, and the next
        fit = slice(int((shop.grid <= shop.room_decode[i]).sum()) + 1)
        for name in curve.columns:
            # what cancels is compared with what it is a part of
            alone = curve.at(name, shop.grid[fit])
            scale = 1e-12 * curve.at("seconds", shop.grid[fit]) if name.endswith("_s") else 1e-12
            assert (abs(shop.curves[name][i, fit] - alone) <= np.maximum(1e-12 * abs(alone), scale)).all(), (name, i)
        assert (shop.room_decode[i], shop.room_prefill[i]) == room_in_pools(shop, i)
        for chunk in shop.chunks:
            line = OnePrefill.of(prefill, load, chunk)
            for name in ("per_step", "fixed_s", "prompt_s", "token_s", "expert_s", "step_s", "error"):
                found = getattr(shop.prompts[chunk], name)[i]
                assert found == pytest.approx(getattr(line, name), rel=1e-12, abs=1e-12 * float(line.step_s)), (name, i)
            for kind, share in line.evidence.items():
                assert shop.prompts[chunk].evidence[kind][i] == pytest.approx(float(share), abs=1e-12)
            fits = sequences_that_fit(prefill, decode, cut_prompts(load, chunk), load.input_len, 500)
            assert shop.fits[chunk][i] == fits


def test_layouts_of_one_stage_hand_nothing_over_for_others_of_their_fleet() -> None:
    """Of one tp, dp and ep with stages and without, beside one whose stages lie on one node."""
    task = SearchTask(
        model=load_model("deepseek-v3"), device=load_device("h200"), engine=load_engine("vllm"), gpus=16,
        load=Traffic(3000, 500, 1), base=Options(routing="typical"), runnable_only=False,
    )  # fmt: skip
    wanted = [("tp1-dp4-ep4-pp2", False), ("tp1-dp8-ep8", False), ("tp1-dp8-ep8-pp2", True)]
    every = [v for v in space(task, Counter()) if v.decode.all2all == "low_latency" and v.decode.dispatch is None]
    some = [
        next(v for v in every if str(v.layout) == layout and (v.decode.redundant_experts > 0) == copies)
        for layout, copies in wanted
    ]
    shop = VariantPrices(task.scenario, some, (2048,))
    for i, v in enumerate(some):
        curve = OneCurve(shop.scenario.deployment(v.layout, "decode", v.decode), 3250.0, float(shop.grid[-1]), 1.0)
        fit = slice(int((shop.grid <= shop.room_decode[i]).sum()) + 1)
        for name in ("seconds", "exposed_comm_s"):
            np.testing.assert_allclose(shop.curves[name][i, fit], curve.at(name, shop.grid[fit]), rtol=1e-11)


def room_in_pools(shop: VariantPrices, i: int) -> tuple[float, float]:
    """Sequences of a rank of a decode pool and of a pool of prompts, each laid out alone as servers of one phase."""
    variant, scenario = shop.variants[i], replace(shop.scenario, engine=shop.scenario.engine.in_pools())
    load, cut = scenario.load, cut_prompts(scenario.load, scenario.own_chunk)
    prefill = scenario.deployment(variant.layout, "prefill", variant.prefill)
    decode = scenario.deployment(variant.layout, "decode", variant.decode)
    writes = sequences_that_fit(prefill, decode, None, load.input_len, load.output_len)
    return float(writes), float(prompts_that_fit(prefill, prefill_budget(prefill, cut), load.input_len))


@pytest.mark.parametrize("engine", ["sglang", "sglang==0.5.6.post2", "vllm", "trtllm"])
@pytest.mark.parametrize("model", ["qwen3-next-80b-a3b", "gpt-oss-120b"])
def test_room_in_pools_of_states_and_windows_is_that_of_servers_of_one_phase(model: str, engine: str) -> None:
    """Random layouts: such servers keep fewer states of a sequence, other windows, and leave other memory free."""
    task = SearchTask(
        model=load_model(model), device=load_device("h200"), engine=load_engine(engine), gpus=8,
        load=Traffic(2000, 500, 1), axes=replace(FULL, mtp_depth=(0,)), runnable_only=False,
    )  # fmt: skip
    shop = VariantPrices(task.scenario, space(task, Counter()), (4096,))
    generator = np.random.default_rng(7)
    some = generator.choice(len(shop.variants), min(25, len(shop.variants)), replace=False)
    for i in some:
        assert (shop.room_decode[i], shop.room_prefill[i]) == room_in_pools(shop, i), shop.variants[i]
    if model.startswith("qwen3") and engine.startswith("sglang"):  # one state of each sequence, no copies
        there = some[shop.fits[4096][some] > 0]
        assert np.median(shop.room_decode[there] / shop.fits[4096][there]) > 2


def test_a_decode_pool_keeps_what_its_engine_reserves_for_each_reply() -> None:
    """SGLang lets a prompt in with 512 tokens left for every reply under way (disaggregation/decode.py)."""
    model, device, engine = load_model("deepseek-v3"), load_device("h200"), load_engine("sglang").in_pools()
    decode = deploy(model, device, engine, parse_layout("tp8-ep8"), "decode")
    cache = float(decode.memory(1, 1, 2000).cache_budget)
    per_token = (float(decode.held(1.0, 3000)[1]) - float(decode.held(1.0, 2000)[1])) / 1000
    fits = float(sequences_that_fit(decode, decode, None, 2000, 500))
    assert fits == pytest.approx(cache / (per_token * (2000 + 250 + 512)), rel=0.05)
    beside = sequences_that_fit(decode, decode, cut_prompts(Traffic(2000, 500, 1), 2000), 2000, 500)
    assert fits < float(beside) * (2000 + 250 + 300) / (2000 + 250 + 512)


KINDS = st.lists(st.integers(0, 2), min_size=4, max_size=20)
PIPELINES = st.lists(st.integers(1, 4), min_size=1, max_size=5)


def seconds(stage: Stage, per_place: dict[int, float]) -> np.ndarray:
    return np.asarray(sum(np.asarray(calls) * per_place[place] for place, calls in stage))


@given(KINDS, PIPELINES)
def test_stages_of_several_pipelines_are_those_of_each(kinds: list[int], sizes: list[int]) -> None:
    """The slowest and the last stage, by counting layers."""
    per_place = {0: 1.0, 1: 2.5, 2: 7.25, FIRST: 0.5, LAST: 4.0, HAND_OVER: 0.125}
    together = [seconds(stage, per_place) for stage in stages_of(kinds, np.array(sizes))]
    for i, pp in enumerate(sizes):
        expected = [sum(per_place[kind] for kind in kinds[layers]) for layers in stage_layers(len(kinds), pp)]
        expected[0] += per_place[FIRST]
        expected[-1] += per_place[LAST]
        expected = [one + per_place[HAND_OVER] for one in expected[:-1]] + expected[-1:]
        assert max(one[i] for one in together) == max(expected)
        assert together[-1][i] == expected[-1] == seconds(stages_of(kinds, pp)[-1], per_place)
