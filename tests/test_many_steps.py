"""Steps of any models, devices, engines and layouts that are priced as one cost what each of them costs alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.plan import plan as plan_module
from tensorcast.deploy.step import many as many_module
from tensorcast.deploy.step import step as step_module
from tensorcast.deploy.step.many import sums_of_many
from tensorcast.deploy.step.price import StepPrice
from tensorcast.deploy.step.row_prices import RowPricer
from tensorcast.deploy.step.step import Asked, Step
from tensorcast.errors import InputError
from tensorcast.profiles.store import load_device, load_engine, load_model

MODELS = ("deepseek-v3", "gpt-oss-120b", "llama-3.1-8b", "qwen3-next-80b-a3b")
DEVICES = ("h200-sxm", "b200-sxm", "mi300x", "l40s")
ENGINES = ("vllm", "sglang", "trtllm")
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "prefill": ({}, {"kv_dtype": "fp8"}, {"chunk_tokens": 512}, {"routing": "balanced"}, {"routing": "measured"}),
    "decode": ({}, {"kv_dtype": "fp8"}, {"mtp_depth": 2}, {"chunk_tokens": 16}, {"dual_batch_overlap": True}),
}
FIELDS = (
    "seconds", "overhead_s", "request_overhead_s", "micro_batches", "hidden_s", "hidden_comm_s", "exposed_comm_s",
    "error",
)


def asked_at_random(dice: random.Random, model: str, device: str, engine: str) -> Asked | None:
    """A step at random sizes; None where the layout cannot be."""
    phase, (tp, dp, pp) = dice.choice(("prefill", "decode")), (dice.choice((1, 2, 4, 8)) for _ in range(3))
    ep = dice.choice((1, tp * dp)) if model != "llama-3.1-8b" else 1
    options = Options(**dice.choice(OPTIONS[phase]))
    profiles = load_model(model), load_device(device), load_engine(engine)
    try:
        step = deploy(*profiles, Layout(tp * dp * pp, tp, dp, ep, pp), phase, options=options).step
    except InputError:
        return None
    past = np.array([[float(dice.randint(0, 9000))] for _ in range(dice.randint(1, 3))])
    if phase == "decode":
        return step, np.array([0.3, 1.0, 7.0, float(dice.randint(8, 600))]), 1.0, past
    return step, np.array([[0.5, 1.0, 3.0]]), past + 17.0, past


def alike(found: StepPrice, wanted: StepPrice) -> None:
    """All that is told of steps as a whole."""
    shape = np.shape(found.seconds)
    for name in FIELDS:
        ours, theirs = np.broadcast_to(getattr(found, name), shape), np.broadcast_to(getattr(wanted, name), shape)
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-18, err_msg=name)
    for name in ("seconds", "communication", "attention", "experts"):
        np.testing.assert_allclose(getattr(found.tally, name), getattr(wanted.tally, name), rtol=1e-11, atol=1e-18)
    for kind, share in wanted.tally.evidence.items():
        np.testing.assert_allclose(found.tally.evidence[kind], share, rtol=1e-11, atol=1e-14)


def test_as_each_alone() -> None:
    dice = random.Random(11)
    tries = [asked_at_random(dice, *map(dice.choice, (MODELS, DEVICES, ENGINES))) for _ in range(120)]
    asked = [one for one in tries if one is not None]
    assert len(asked) > 60
    assert len({(step.table.phase, step.pricer.device.name, step.pricer.engine.name) for step, *_ in asked}) > 12
    for (step, *at), found in zip(asked, sums_of_many(asked), strict=True):
        alike(found, step.price(*at))


@pytest.mark.parametrize("engine", ENGINES)
def test_all_reduces_with_norms_joined_and_others(engine: str) -> None:
    """Layouts on one machine, and so all-reduces among as many ranks, whose kernels a norm is joined to or not."""
    profiles = load_model("qwen3-235b-a22b"), load_device("gb200"), load_engine(engine)
    at, asked = (np.array([1.0, 40.0]), 1.0, np.array([[100.0]])), list[Asked]()
    for dp in (1, 2):
        for options in (Options(), Options(fusion="none")):
            step = deploy(*profiles, Layout(8 * dp, 8, dp, 8 * dp), "decode", options=options).step
            asked.append((step, *at))
    for (step, *sizes), found in zip(asked, sums_of_many(asked), strict=True):
        alike(found, step.price(*sizes))
    for (step, *sizes), found in zip(reversed(asked), sums_of_many(asked[::-1]), strict=True):
        alike(found, step.price(*sizes))


def test_passes_over_arrays_do_not_grow_with_devices_and_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = 0
    seconds = RowPricer.seconds

    def counted(self: RowPricer, *args: Any) -> Any:
        nonlocal passes
        passes += 1
        return seconds(self, *args)

    monkeypatch.setattr(RowPricer, "seconds", counted)

    def passes_for(devices: tuple[str, ...], engines: tuple[str, ...]) -> int:
        nonlocal passes
        asked: list[Asked] = []
        for device in devices:
            for engine in engines:
                for tp in (1, 2, 4, 8):
                    profiles = load_model("qwen3-235b-a22b"), load_device(device), load_engine(engine)
                    step = deploy(*profiles, Layout(8, tp, 8 // tp, 8), "decode").step
                    asked.append((step, np.array([1.0, 8.0, 64.0]), 1.0, np.array([[100.0], [1000.0]])))
        passes = 0
        sums_of_many(asked)
        return passes

    one = passes_for(("h200-sxm",), ("vllm",))
    # where experts were timed as one call, as GEMMs alone or not at all, and under other engines, their rows are others
    several = passes_for(("h100-sxm", "h200-sxm", "h20", "h800", "l20"), ("vllm",))
    assert several < 2 * one
    assert passes_for(("a100-sxm", "h100-sxm", "h200-sxm", "h20", "h800", "l40s", "l20"), ("vllm",)) <= several + 1
    assert passes_for(("h200-sxm",), ENGINES) < 3 * one


def test_steps_that_differ_in_sizes_alone_are_added_up_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their data-parallel ranks; and collectives are priced once for each group of ranks."""
    passes: Counter[str] = Counter()
    for name in ("_collective", "seconds"):
        monkeypatch.setattr(RowPricer, name, counting(passes, name, getattr(RowPricer, name)))
    monkeypatch.setattr(Step, "composed", counting(passes, "composed", Step.composed))
    profiles = load_model("qwen3-235b-a22b"), load_device("h200-sxm"), load_engine("vllm")

    def passes_for(sizes: tuple[int, ...]) -> Counter[str]:
        asked: list[Asked] = []
        for dp in sizes:
            step = deploy(*profiles, Layout(4 * dp, 4, dp, 4 * dp), "decode").step
            asked.append((step, np.array([1.0, 8.0, 64.0]), 1.0, np.array([[100.0], [1000.0]])))
        passes.clear()
        sums_of_many(asked)
        return passes.copy()

    few, many = passes_for((2, 4)), passes_for((2, 4, 8, 16))
    assert few["composed"] == many["composed"] == 1
    assert many["seconds"] == few["seconds"]
    assert many["_collective"] < 2 * few["_collective"]  # groups of other sizes are others


def test_plans_that_differ_in_sizes_alone_have_one_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found and asked for once, whatever their data-parallel ranks; another number of stages is another plan."""
    made: Counter[str] = Counter()
    monkeypatch.setattr(step_module, "recipe_of", counting(made, "recipes", step_module.recipe_of))
    monkeypatch.setattr(many_module, "content_of", counting(made, "contents", many_module.content_of))
    monkeypatch.setattr(plan_module, "_frames", {})
    profiles = load_model("qwen3-235b-a22b"), load_device("h200-sxm"), load_engine("vllm")

    def made_for(*layouts: tuple[int, int]) -> Counter[str]:
        made.clear()
        steps = [deploy(*profiles, Layout(4 * dp * pp, 4, dp, 4 * dp, pp), "decode").step for dp, pp in layouts]
        sums_of_many([(step, np.array([1.0, 8.0]), 1.0, np.array([[100.0]])) for step in steps])
        assert len({id(step.recipe(False)) for step in steps}) == 1
        return made.copy()

    one, two = made_for((2, 1), (4, 1), (8, 1)), made_for((2, 2), (4, 2))
    assert one["recipes"] == two["recipes"] == 1
    assert one["contents"] == two["contents"] > 0
    assert not made_for((2, 1), (16, 1)), "found again"


def test_collectives_of_steps_with_graphs_and_without_are_priced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: Counter[str] = Counter()
    monkeypatch.setattr(RowPricer, "_collective", counting(passes, "_collective", RowPricer._collective))
    profiles = load_model("qwen3-235b-a22b"), load_device("h200-sxm"), load_engine("vllm")
    steps = [deploy(*profiles, Layout(8, 8, 1, 8), phase).step for phase in ("prefill", "decode")]
    assert steps[0].pricer.graph_tokens < steps[1].pricer.graph_tokens
    batch, new = np.array([1.0, 8.0, 64.0]), (100.0, 1.0)
    asked: list[Asked] = [(step, batch, tokens, np.array([[50.0]])) for step, tokens in zip(steps, new, strict=True)]
    sums_of_many(asked[:1])
    one = passes.pop("_collective")
    for (step, *at), found in zip(asked, sums_of_many(asked), strict=True):
        both = passes["_collective"]
        alike(found, step.price(*at))
        passes["_collective"] = both
    assert passes["_collective"] == one > 1


def counting(passes: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its calls counted."""

    def counted(*args: Any, **named: Any) -> Any:
        passes[name] += 1
        return function(*args, **named)

    return counted


def test_plans_on_several_devices_share_the_kernels_that_sum_a_norms_squares() -> None:
    """MiniMax-M2's norms of q and k are over a width that tensor parallelism cuts."""
    model, engine = load_model("minimax-m2.5"), load_engine("vllm")
    plans = [
        deploy(model, load_device(device), engine, Layout(gpus, 4, gpus // 4, gpus), "decode").step.plan
        for device, gpus in (("h100", 8), ("h200", 8), ("h200", 16))
    ]
    labels = [getattr(row, "attrs", {}).get("label") for row in plans[0].rows]
    assert "sum_of_squares" in labels
    assert len({id(plan.frame) for plan in plans}) == 1
