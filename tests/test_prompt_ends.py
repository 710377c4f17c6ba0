"""Layers that run on the ends of prompts alone: their tokens in a step, however it is priced, and in schedules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import tensorcast as tc
from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.step.many import sums_of_many
from tensorcast.deploy.step.sizes import Ends
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.scheduling.step_times import step_times
from tensorcast.trace.table import EVERY_TOKEN, Op
from tensorcast.trace.tracer import Phase

NAME = "deepseek-v4.1-flash"


def served(layout: Layout, phase: Phase = "prefill") -> Deployment:
    model, device, engine = load_model(NAME), load_device("b200"), load_engine("vllm")
    return deploy(model, device, engine, layout, phase, options=Options(routing="typical"))


TP8, DP8 = Layout(8, 8, 1, 8), Layout(8, 1, 8, 8)


def flops(at: Deployment, batch: float, new: float, past: float) -> tuple[float, float]:
    """Of all rows in layers for prompts' ends, those with every token and the others."""
    price, ends = at.step.price(batch, new, past), at.raw.ends
    found = [0.0, 0.0]
    for row, calls in price.calls:
        if isinstance(row.row, Op) and row.row.kind in ends:
            found[EVERY_TOKEN not in row.row.module] += float(np.asarray(row.flops * calls))
    return found[0], found[1]


def test_late_layers_have_the_ends_of_prompts_alone() -> None:
    """A step of 4,096 tokens costs the last 20 layers what one of 128 tokens after 3,968 does, but for what is cached
    of every token. In one of 128 nothing is left out."""
    at = served(TP8)
    every, ends = flops(at, 1, 4096, 0)
    short_every, short = flops(at, 1, 128, 3968)
    assert every == pytest.approx(32 * short_every) and ends == pytest.approx(short)
    two_every, two = flops(at, 2, 4096, 0)
    assert two_every == pytest.approx(2 * every) and two == pytest.approx(2 * ends, rel=0.02)
    whole = replace(at.step, sizes=replace(at.step.sizes, ends=None))
    assert float(at.step.seconds(1, 100, 500)) == pytest.approx(float(whole.seconds(1, 100, 500)))
    assert float(at.step.seconds(1, 8192, 0)) < 0.65 * float(whole.seconds(1, 8192, 0))
    assert float(served(TP8, "decode").step.seconds(64, 1, 4000)) > 0


@pytest.mark.parametrize(
    ("engine", "device", "layout", "above"),
    [
        ("vllm", "h200", TP8, 512), ("vllm", "b200", TP8, 767), ("vllm", "b200", DP8, 767),
        ("vllm", "b200", Layout(8, 4, 2, 8), None), ("sglang", "b200", TP8, 0),
        ("sglang", "b200", DP8, 0), ("sglang", "b200", Layout(8, 2, 4, 8), None),
    ],
)  # fmt: skip
def test_engines_do_so_by_their_own_rules(engine: str, device: str, layout: Layout, above: float | None) -> None:
    """vLLM 0.33.0 runs small graphs whole, and all where tensor-parallel ranks slice tokens; SGLang 0.5.23 all where
    data-parallel ranks share attention."""
    options = Options(routing="typical", all2all="allgather_reducescatter" if layout.dp > 1 else "auto")
    at = deploy(load_model(NAME), load_device(device), load_engine(engine), layout, "prefill", options=options)
    assert at.step.sizes.ends == (None if above is None else Ends(128.0, above))
    decode = deploy(load_model(NAME), load_device(device), load_engine(engine), layout, "decode", options=options)
    assert decode.step.sizes.ends is None


@pytest.mark.parametrize("layout", [TP8, DP8], ids=str)
@pytest.mark.parametrize("chunk", [0, 1024])
def test_many_steps_are_priced_as_one_by_one(layout: Layout, chunk: int) -> None:
    at = served(layout)
    step = replace(at.step, sizes=replace(at.step.sizes, chunk_tokens=chunk))
    batch, new, past = np.array([0.5, 1.0, 3.0]), np.array([90.0, 700.0, 8192.0]), np.array([0.0, 5000.0, 100.0])
    every = step.price(batch, new, past)
    alone = [step.price(*one) for one in zip(batch.tolist(), new.tolist(), past.tolist(), strict=True)]
    parts = [(step, batch[i : i + 1], new[i : i + 1], past[i : i + 1]) for i in range(3)]
    many = list(sums_of_many([(step, batch, new, past), *parts]))
    for name in ("seconds", "error", "exposed_comm_s"):
        expected = np.array([float(getattr(price, name)) for price in alone])
        np.testing.assert_allclose(getattr(every, name), expected, rtol=1e-9)
        np.testing.assert_allclose(getattr(many[0], name), expected, rtol=1e-9)
        np.testing.assert_allclose(np.ravel([getattr(price, name) for price in many[1:]]), expected, rtol=1e-9)


@pytest.mark.parametrize("layout", [TP8, DP8], ids=str)
def test_schedules_tell_ends_of_several_prompts_apart(layout: Layout) -> None:
    """One prompt, prompts that are all end, prompts beside replies: as the step itself is priced."""
    prefill, decode = served(layout), served(layout, "decode")
    times = step_times(prefill, decode, most_sequences=256, chunk_tokens=8192, longest=9000)
    factor = prefill.engine.overhead.prefill_factor

    def seconds(prompts: list[tuple[int, int]]) -> float:
        tokens = sum(new for new, _ in prompts)
        return times.own(prompts, 0, 0.0) + times.shared(tokens, ends=times.seen_at_ends(prompts, 0))

    for count, new, past in ((1, 4096, 0), (1, 1000, 3000), (20, 128, 0), (8, 512, 0), (2, 3000, 0), (40, 100, 0)):
        own = factor * float(prefill.step.price(float(count), float(new), float(past)).seconds)
        assert seconds([(new, past)] * count) == pytest.approx(own, rel=0.055)  # of others, too, over several ranks


def test_prompts_cost_half_of_what_their_tokens_would_in_replies() -> None:
    """8 B active parameters a token of a prompt, 16 B one of a reply: so many FLOPs, attention aside."""
    found = {}
    for phase, batch, context in (("prefill", 1, 8192), ("decode", 4096, 1)):
        run = tc.simulate(
            NAME, device="b300", engine="vllm", world_size=8, tp=8, ep=8, phase=phase, batch=batch, context=context,
            kv_dtype="fp8", routing="balanced",
        )  # fmt: skip
        products = run.ops[run.ops["op"].isin(["mm", "bmm", "grouped_matmul"])]
        tokens = 8192 if phase == "prefill" else 4096
        found[phase] = float(products["flops"].sum()) * 8 / tokens / 2
    assert found["prefill"] < 0.62 * found["decode"]
