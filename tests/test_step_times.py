"""Steps of a server as tables have them: as they are priced, padded to graphs, prompts beside those who decode."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.scheduling.step_times import padded, step_times

SERVED = Options(routing="typical")


def test_steps_are_priced_as_simulate_prices_them() -> None:
    model, device, engine = load_model("qwen3-30b-a3b"), load_device("h100"), load_engine("vllm")
    layout = Layout(4, 1, 4, 4)
    prefill, decode = (deploy(model, device, engine, layout, phase) for phase in ("prefill", "decode"))
    times = step_times(prefill, decode, most_sequences=256, chunk_tokens=8192, longest=9000)
    for batch, context in ((1, 4096), (37, 3000), (256, 811)):
        own = float(decode.step.price(float(batch), 1.0, float(context)).seconds)
        assert times.decoding(batch, context, batch) == pytest.approx(own, rel=0.01)
    factor = engine.overhead.prefill_factor
    for new, past in ((4096, 0), (1000, 3000), (333, 100)):
        own = factor * float(prefill.step.price(1.0, float(new), float(past)).seconds)
        assert times.own([(new, past)], 0, 0.0) + times.shared(new) == pytest.approx(own, rel=0.03)


@pytest.mark.parametrize("layout", [Layout(1), Layout(2, 1, 2, 2)], ids=str)
def test_the_factor_on_prompts_is_not_on_those_who_decode_beside(layout: Layout) -> None:
    """A prompt alone takes as much longer as the factor says; one token beside many replies hardly any longer, and
    replies beside a prompt never make its step shorter."""
    model, device, engine = load_model("qwen3-30b-a3b"), load_device("h200"), load_engine("vllm")
    assert engine.fitted is not None
    times = []
    for factor in (1.0, 1.2):
        own = engine.model_copy(update={"fitted": engine.fitted.model_copy(update={"prefill_factor": factor})})
        pair = [deploy(model, device, own, layout, phase, options=SERVED) for phase in ("prefill", "decode")]
        times.append(step_times(*pair, most_sequences=256, chunk_tokens=8192, longest=9000))
    plain, slower = (
        [
            one.own([(n, 0)], beside, 1000.0) + one.shared(n + beside, beside)
            for n, beside in ((4096, 0), (1, 200), (333, 0), (333, 1), (333, 2))
        ]
        for one in times
    )
    assert slower[0] == pytest.approx(1.2 * plain[0], rel=1e-9)
    assert plain[1] <= slower[1] < 1.03 * plain[1]
    assert slower[2] < slower[3] < slower[4]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("layout", [Layout(8, 8, 1, 8), Layout(8, 1, 8, 8)], ids=str)
def test_prompts_of_usual_lengths_take_what_simulate_says(layout: Layout, engine: str) -> None:
    """Also where the host's launches are what takes the time: powers of two are points of the table."""
    model, device, profile = load_model("deepseek-v3"), load_device("b200"), load_engine(engine)
    prefill, decode = (
        deploy(model, device, profile, layout, phase, options=Options(routing=model.traffic))
        for phase in ("prefill", "decode")
    )
    times = step_times(prefill, decode, most_sequences=64, chunk_tokens=8192, longest=16384)
    for tokens in (1, 64, 512, 1024, 2048, 4096, 8192):
        own = profile.overhead.prefill_factor * float(np.asarray(prefill.step.price(1.0, float(tokens), 0.0).seconds))
        found = times.own([(tokens, 0)], 0, 0.0) + times.shared(tokens, 0, tokens)
        assert times.launched(found, tokens) == pytest.approx(own, rel=2e-3)


def test_padded_steps_are_run_as_the_next_graph() -> None:
    """Attention and the engine's work are those of the sequences that are there; steps with prompts are not padded."""
    model, device, engine = load_model("qwen3-30b-a3b"), load_device("h200"), load_engine("trtllm")
    pair = [deploy(model, device, engine, Layout(1), phase, options=SERVED) for phase in ("prefill", "decode")]
    plain, padding = (
        step_times(*pair, most_sequences=300, chunk_tokens=8192, longest=4000, graph_sizes=sizes)
        for sizes in ((), (64, 128, 4096))
    )
    for size in (64, 128, 300):
        assert padding.decoding(size, 900.0, size) == pytest.approx(plain.decoding(size, 900.0, size), rel=1e-3)
    for batch, run_as in ((20, 64), (65, 128), (100, 128), (129, 300)):
        price = [pair[1].step.price(float(n), 1.0, 900.0) for n in (batch, run_as)]
        own, pads = (float(one.tally.attention) + float(one.request_overhead_s) for one in price)
        told = float(price[1].seconds) - pads + own
        assert padding.decoding(batch, 900.0, batch) == pytest.approx(told, rel=0.02)
        assert padding.decoding(batch, 900.0, batch) > plain.decoding(batch, 900.0, batch)
        mixed = [one.own([(512, 0)], batch, 900.0) for one in (plain, padding)]
        assert mixed[1] == pytest.approx(mixed[0], rel=0.01)


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 600), min_size=1, max_size=8), batches=st.lists(st.integers(1, 600), min_size=1),
    most=st.integers(1, 600),
)
def test_every_batch_runs_as_the_smallest_graph_that_holds_it(
    sizes: list[int], batches: list[int], most: int
) -> None:
    every, run_as = padded(np.unique(np.array(batches, dtype=float)), sizes, float(most))
    captured = {size for size in sizes if size < most} | ({most} if max(sizes) >= most else set())
    assert set(map(float, batches)) <= set(every)
    for batch, found in zip(every, run_as, strict=True):
        assert found == min((size for size in captured if size >= batch), default=batch)


def test_a_server_may_read_one_token_a_step() -> None:
    """The shortest chunk still has a line to be read from: a prompt of one token takes what a prefill of it does."""
    model, device, engine = load_model("qwen3-30b-a3b"), load_device("h200"), load_engine("vllm")
    prefill, decode = (
        deploy(model, device, engine, Layout(1), phase, options=SERVED) for phase in ("prefill", "decode")
    )
    times = step_times(prefill, decode, most_sequences=1, chunk_tokens=1, longest=64)
    whole = engine.overhead.prefill_factor * float(prefill.step.price(1.0, 1.0, 0.0).seconds)
    assert times.own([(1, 0)], 0, 0.0) + times.shared(1.0) == pytest.approx(whole)
