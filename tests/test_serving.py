"""The serving model against brute force: closed loops simulated step by step, hand counts, and laws that must hold."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options
from tensorcast.errors import InputError
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.serving.hand_over import transfer_s
from tensorcast.serving.load import Load
from tensorcast.serving.steady_state import Aggregated, aggregated, disaggregated

PLAIN_S, PER_SEQUENCE_S, FIXED_S, PROMPT_S = 0.010, 0.00008, 0.004, 0.020


class Decoding:
    """Decode steps of 10 ms and 80 us per sequence; attention takes no time of its own."""

    def at(self, column: str, batch: Any) -> Any:
        known = {"seconds": PLAIN_S + PER_SEQUENCE_S * np.asarray(batch), "error": 0.05}
        return known.get(column, 0.0 * np.asarray(batch))


class Prompts:
    """Prompts of 20 ms, eight to a step; ``fixed_s`` includes what a step with prompts takes for the decoding rows."""

    def __init__(self, fixed_s: float, per_step: float = 8.0) -> None:
        self.fixed_s, self.per_step, self.prompt_s = fixed_s, per_step, PROMPT_S
        self.token_s, self.expert_s, self.error, self.step_s = 0.0, 0.0, 0.05, fixed_s + PROMPT_S
        self.evidence = {"calibrated": 1.0}
        self.most_per_s = per_step / (fixed_s + PROMPT_S * per_step)


def simulated(users: int, output_len: int, spread: float, alone: bool, rounds: int = 60) -> tuple[float, float]:
    """Mean TTFT and TPOT of a closed loop, every step played, the first half of the rounds left out."""
    random = np.random.default_rng(0)
    total = rounds * users
    replies = random.integers(int(output_len * (1 - spread)), int(output_len * (1 + spread)) + 1, total)
    clock, sent = 0.0, users
    coming = [(random.uniform(0, output_len * PLAIN_S) if spread else 0.0, i) for i in range(users)]
    heapq.heapify(coming)
    waiting: list[int] = []
    left: dict[int, int] = {}
    arrived: dict[int, float] = {}
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    while coming or waiting or left:
        while coming and coming[0][0] <= clock:
            at, i = heapq.heappop(coming)
            arrived[i] = at
            waiting.append(i)
        if not waiting and not left:
            clock = coming[0][0]
            continue
        prompts, waiting = waiting[:8], waiting[8:]
        plain = PLAIN_S + PER_SEQUENCE_S * len(left)
        if prompts and alone:
            clock += FIXED_S + PROMPT_S * len(prompts)
        else:
            clock += FIXED_S + plain + PROMPT_S * len(prompts) if prompts else plain
            for i in list(left):
                left[i] -= 1
                if not left[i]:
                    del left[i]
                    last[i] = clock
                    if sent < total:
                        heapq.heappush(coming, (clock + 1e-6, sent))  # its client answers within the next step
                        sent += 1
        for i in prompts:
            first[i], left[i] = clock, int(replies[i])
    steady = range(total // 3, total - users)
    ttft = np.mean([first[i] - arrived[i] for i in steady])
    return float(ttft), float(np.mean([(last[i] - first[i]) / replies[i] for i in steady]))


def model_of(users: int, output_len: int, spread: float, alone: bool) -> Any:
    engine = load_engine("vllm").model_copy(
        update={"prefill_alone": alone, "arrival_wait_steps": 1.0, "first_token_overhead_s": None, "fitted": None}
    )
    load = Load(512, output_len + 1, float(users), spread=spread)
    # the line of prompts holds the decoding rows' share of a mixed step; engines that keep apart pay it on top
    prompts = Prompts(FIXED_S if alone else FIXED_S + PLAIN_S + PER_SEQUENCE_S * users)
    return Aggregated(load, engine, 1, 0, Decoding(), prompts)  # type: ignore[arg-type]


def solved(one: Any, users: int) -> Any:
    from tensorcast.serving.steady_state import steady_batch

    batch = steady_batch(one.in_flight, np.array(float(users)), np.array(float(users)))
    return one.served(batch, np.array(float(users)))


@pytest.mark.parametrize(("users", "output_len"), [(8, 100), (32, 100), (32, 400), (96, 300)])
def test_mixed_steps_agree_with_a_simulated_loop(users: int, output_len: int) -> None:
    ttft, tpot = simulated(users, output_len, spread=0.9, alone=False)
    served = solved(model_of(users, output_len, spread=0.9, alone=False), users)
    assert served.tpot_s == pytest.approx(tpot, rel=0.06)
    assert served.ttft_s == pytest.approx(ttft, rel=0.30)


@pytest.mark.parametrize(("users", "output_len"), [(16, 100), (64, 100), (64, 400)])
def test_prompts_alone_come_in_waves_where_replies_are_equally_long(users: int, output_len: int) -> None:
    ttft, tpot = simulated(users, output_len, spread=0.0, alone=True)
    served = solved(model_of(users, output_len, spread=0.0, alone=True), users)
    assert served.tpot_s == pytest.approx(tpot, rel=0.08)
    assert served.ttft_s == pytest.approx(ttft, rel=0.30)
    # all work is in the request time, however it is told apart
    assert served.request_s == pytest.approx(ttft + output_len * tpot, rel=0.1)


@given(
    users=st.integers(1, 200),
    output_len=st.integers(2, 2000),
    spread=st.floats(0, 1),
    alone=st.booleans(),
    per_step=st.sampled_from([0.25, 0.5, 1.0, 8.0]),
)
def test_laws(users: int, output_len: int, spread: float, alone: bool, per_step: float) -> None:
    one = model_of(users, output_len, spread, alone)
    one.prompts.per_step = per_step
    served = solved(one, users)
    assert 0 < served.batch <= users
    assert served.tpot_s > 0 and served.ttft_s >= PROMPT_S
    # Little: requests in flight are the rate times the time of each
    rate = served.output_tokens_per_s / (output_len + 1)
    assert rate * served.request_s == pytest.approx(users, rel=1e-6)


@pytest.fixture(scope="module")
def pair() -> tuple[Deployment, Deployment]:
    return pair_of("llama-3.1-8b", Layout(2, 2))


def pair_of(model: str, layout: Layout, engine: str = "vllm", **options: Any) -> tuple[Deployment, Deployment]:
    made = [
        deploy(load_model(model), load_device("h100"), load_engine(engine), layout, phase, Options(**options))
        for phase in ("prefill", "decode")
    ]
    return made[0], made[1]


def test_arrays_equal_scalars(pair: tuple[Deployment, Deployment]) -> None:
    users = np.array([1.0, 7.0, 64.0, 5000.0])
    together = aggregated(*pair, Load(700, 300, users))
    pools = disaggregated(*pair, 2, 3, Load(700, 300, users))
    for i, some in enumerate(users):
        for whole, one in (
            (together, aggregated(*pair, Load(700, 300, float(some)))),
            (pools, disaggregated(*pair, 2, 3, Load(700, 300, float(some)))),
        ):
            for name in ("batch", "ttft_s", "tpot_s", "output_tokens_per_s", "tpot_error", "exposed_comm_s"):
                assert getattr(whole, name)[i] == pytest.approx(getattr(one, name), rel=1e-6), name
            assert isinstance(one.ttft_s, float) and one.problem == ""


def test_more_users_more_tokens_and_more_time(pair: tuple[Deployment, Deployment]) -> None:
    for served in (
        aggregated(*pair, Load(1000, 200, 2.0 ** np.arange(14))),
        disaggregated(*pair, 1, 1, Load(1000, 200, 2.0 ** np.arange(14))),
    ):
        assert (np.diff(served.output_tokens_per_s) > -1e-6 * served.output_tokens_per_s[1:]).all()
        assert (np.diff(served.request_s) > 0).all()


def test_a_full_cache_makes_requests_wait(pair: tuple[Deployment, Deployment]) -> None:
    served = aggregated(*pair, Load(8000, 500, np.array([64.0, 4000.0, 8000.0])))
    decode = pair[1]
    per_sequence = decode.memory(1, 1, 8249).kv_cache  # a reply is half done in the mean
    memory = decode.memory(1, 1, 8000)
    room = (memory.budget - memory.total + memory.kv_cache) / per_sequence
    assert served.batch[1] == pytest.approx(room, rel=0.1) and served.batch[1] == served.batch[2]
    # throughput stands still, so twice the users wait twice as long
    assert served.output_tokens_per_s[1] == pytest.approx(served.output_tokens_per_s[2])
    assert served.request_s[2] == pytest.approx(2 * served.request_s[1])


def test_a_model_that_does_not_fit_says_so() -> None:
    served = aggregated(*pair_of("llama-3.1-70b", Layout(1)), Load(100, 100, np.array([1.0, 2.0])))
    assert np.isnan(served.tpot_s).all() and all("does not fit" in problem for problem in served.problem)


def test_step_without_other_users_is_the_decode_step(pair: tuple[Deployment, Deployment]) -> None:
    served = aggregated(*pair, Load(512, 256, 1.0))
    alone = float(pair[1].step.seconds(1.0, 1.0, 512 + 128.0))
    assert served.tpot_s == pytest.approx(alone, rel=0.02)
    assert served.ttft_s >= float(pair[0].step.seconds(1.0, 512.0, 0.0))


def test_cached_prefix_and_smaller_chunks(pair: tuple[Deployment, Deployment]) -> None:
    plain = aggregated(*pair, Load(6000, 200, 16.0))
    cached = aggregated(*pair, Load(6000, 200, 16.0, prefix_cached=5000))
    chunked = aggregated(*pair, Load(6000, 200, 16.0), chunk_tokens=512)
    assert cached.ttft_s < plain.ttft_s and cached.tpot_s < plain.tpot_s
    assert chunked.ttft_s > plain.ttft_s


@given(acceptance=st.floats(0.05, 0.95), depth=st.integers(0, 4))
def test_drafted_tokens(acceptance: float, depth: int) -> None:
    load = Load(10, 10, 1.0, mtp_acceptance=acceptance)
    assert load.tokens_per_step(depth) == pytest.approx((1 - acceptance ** (depth + 1)) / (1 - acceptance))


def test_the_first_burst_counts_by_its_share(pair: tuple[Deployment, Deployment]) -> None:
    endless, ten, five = (aggregated(*pair, Load(2000, 500, 64.0, rounds=n)).ttft_s for n in (np.inf, 10, 5))
    assert five - endless == pytest.approx(2 * (ten - endless), rel=0.05) and ten > endless


def test_hand_over_of_a_latent_cache() -> None:
    prefill, decode = pair_of("deepseek-v3", Layout(8, 8, 1, 8))
    device = load_device("h100")
    seconds = transfer_s(prefill, decode, 4096, workers=2)
    far = device.interconnect[-1]
    # DeepSeek-V3: 70,272 bytes per token in bf16
    expected = float(far.latency_s) + 4096 * 70272 / float(far.bandwidth_bytes_per_s)
    assert seconds == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"input_len": 0}, "input_len"),
        ({"output_len": 0}, "output_len"),
        ({"concurrency": 0.0}, "concurrency"),
        ({"prefix_cached": 100}, "prefix_cached"),
        ({"mtp_acceptance": 1.5}, "mtp_acceptance"),
        ({"rounds": 0.5}, "rounds"),
    ],
)
def test_bad_loads(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Load(**{"input_len": 100, "output_len": 100, "concurrency": 1.0, **wrong})


def test_bad_pools(pair: tuple[Deployment, Deployment]) -> None:
    with pytest.raises(InputError, match="prefill_workers"):
        disaggregated(*pair, 0, 1, Load(10, 10, 1.0))
    with pytest.raises(InputError, match="chunk_tokens"):
        aggregated(*pair, Load(10, 10, 1.0), chunk_tokens=-1)
