"""The serving model against brute force: closed loops simulated step by step, hand counts, and laws that must hold."""

from __future__ import annotations

import functools
import heapq
from dataclasses import replace
from typing import Any

import numpy as np
import one_deployment
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.step.sizes import GRID
from tensorcast.errors import InputError
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.serving.capacity import own_chunk, room_for, sequences_that_fit
from tensorcast.serving.curves import DecodeCurve, decode_columns
from tensorcast.serving.hand_over import hand_over_s
from tensorcast.serving.prefill_costs import cut_prompts, prefill_columns, prefill_costs
from tensorcast.serving.steady_state import Aggregated, Disaggregated
from tensorcast.serving.traffic import ServingMetrics, Traffic

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
        self.token_s, self.expert_s, self.late_s, self.error, self.step_s = 0.0, 0.0, 0.0, 0.05, fixed_s + PROMPT_S
        self.evidence, self.stages, self.passes = {"calibrated": 1.0}, 1.0, 1.0
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
    load = Traffic(512, output_len + 1, float(users), spread=spread)
    # the line of prompts holds the decoding rows' share of a mixed step; engines that keep apart pay it on top
    prompts = Prompts(FIXED_S if alone else FIXED_S + PLAIN_S + PER_SEQUENCE_S * users)
    return Aggregated(
        traffic=load, engine=engine, decode_ranks=1, depth=0, decoding=Decoding(), prompts=prompts,  # type: ignore[arg-type]
    )  # fmt: skip


def solved(one: Any, users: int) -> Any:
    asked = np.array(float(users))
    return one.metrics(one.steady_batch(asked, asked), asked)


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


@pytest.mark.parametrize(("users", "output_len"), [(64, 100), (96, 60), (128, 150), (64, 400)])
def test_prompts_alone_keep_replies_of_differing_lengths_apart(users: int, output_len: int) -> None:
    """Nobody's reply ends while another's prompt runs: prompts come one by one, however long all of them are."""
    ttft, tpot = simulated(users, output_len, spread=0.11, alone=True)
    served = solved(model_of(users, output_len, spread=0.11, alone=True), users)
    assert served.tpot_s == pytest.approx(tpot, rel=0.04)
    assert ttft < served.ttft_s < 1.7 * ttft


RANKS, RANKED_S, EXPERTS_S = 8, 0.330, 0.285
"""Ranks in lockstep, and a prompt's time when all of them have one; of that the experts', shared by all ranks."""


def simulated_ranks(users: int, output_len: int, rounds: int = 12) -> tuple[float, float]:
    """Tokens per second and mean TTFT of a closed loop over ranks in lockstep, two prompts a step and rank at most."""
    random = np.random.default_rng(0)
    replies = iter(random.integers(int(output_len * 0.5), int(output_len * 1.5) + 1, 100 * users * rounds).tolist())
    left: list[list[int]] = [[] for _ in range(RANKS)]
    waiting: list[list[float]] = [[] for _ in range(RANKS)]
    coming: list[float] = []
    waited: list[float] = []
    for user in range(users):  # as if under way for long
        left[user % RANKS].append(int(random.integers(1, output_len)))
    clock, tokens, begun = 0.0, 0, 0.0
    while len(waited) < rounds * users:
        taken = [rank[:2] for rank in waiting]
        waiting = [rank[2:] for rank in waiting]
        most = max(map(len, taken))
        clock += PLAIN_S + PER_SEQUENCE_S * sum(map(len, left)) / RANKS
        if most:
            clock += FIXED_S + RANKED_S * most - EXPERTS_S * (most - sum(map(len, taken)) / RANKS)
        if len(waited) >= users * rounds // 3 and not begun:
            begun, tokens = clock, 0
        for at in coming:  # clients answer within the next step; routed to the rank with the fewest
            min(zip(left, waiting, strict=True), key=lambda rank: len(rank[0]) + len(rank[1]))[1].append(at)
        coming = []
        for rank, new in enumerate(taken):
            tokens += len(left[rank])
            coming += [clock] * sum(1 for steps in left[rank] if steps == 1)
            left[rank] = [steps - 1 for steps in left[rank] if steps > 1] + [next(replies) for _ in new]
            waited += [clock - at for at in new]
    return tokens / (clock - begun), float(np.mean(waited[len(waited) // 3 :]))


def model_of_ranks(users: int, output_len: int, per_step: float) -> Any:
    one = model_of(users, output_len, spread=0.5, alone=False)
    one.prompts.prompt_s, one.prompts.expert_s, one.prompts.per_step = RANKED_S, EXPERTS_S, per_step
    one.prompts.fixed_s = FIXED_S + PLAIN_S + PER_SEQUENCE_S * users / RANKS
    one.prompts.most_per_s = per_step / (one.prompts.fixed_s + RANKED_S * max(per_step, 1))
    return replace(one, decode_ranks=RANKS)


def solved_ranks(users: int, output_len: int, per_step: float = 2.0) -> Any:
    one, asked = model_of_ranks(users, output_len, per_step), np.array(float(users))
    return one.metrics(one.steady_batch(asked / RANKS, asked), asked)


@pytest.mark.parametrize(("users", "output_len"), [(64, 900), (256, 900), (512, 900), (256, 300)])
def test_ranks_in_lockstep_agree_with_a_simulated_loop(users: int, output_len: int) -> None:
    """A prompt that one rank alone has costs its own part and an eighth of the experts', not all ranks' whole.

    The model's arrivals are spread in time and meet long steps more often than the loop's, which follow steps: its
    first tokens are later, by less than three times.
    """
    tokens_per_s, ttft = simulated_ranks(users, output_len)
    served = solved_ranks(users, output_len)
    assert served.output_tokens_per_s == pytest.approx(tokens_per_s, rel=0.15)
    assert 0.9 * ttft < served.ttft_s < 3 * ttft


@given(users=st.integers(16, 900), output_len=st.integers(200, 2000), per_step=st.sampled_from([2.0, 4.0, 8.0]))
def test_more_users_never_bring_fewer_tokens_over_ranks_in_lockstep(
    users: int, output_len: int, per_step: float
) -> None:
    few, many = (solved_ranks(n, output_len, per_step) for n in (users, users + users // 4))
    assert many.output_tokens_per_s > 0.99 * few.output_tokens_per_s
    prompts_per_s = many.output_tokens_per_s / (output_len + 1)
    assert prompts_per_s < RANKS * model_of_ranks(users, output_len, per_step).prompts.most_per_s


@pytest.mark.parametrize("per_step", [0.25, 2.0])
def test_a_prompt_alone_among_ranks_takes_its_own_part(per_step: float) -> None:
    """Of one user other ranks read nothing, as they hardly ever do of two: its experts' part is an eighth, not all."""
    one, two = (solved_ranks(users, 900, per_step) for users in (1, 2))
    assert one.ttft_s <= two.ttft_s < 1.1 * one.ttft_s
    whole = (FIXED_S + RANKED_S + 3 * PLAIN_S) / min(per_step, 1.0)
    assert one.ttft_s < whole - 0.8 * EXPERTS_S / min(per_step, 1.0)


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
        deploy(load_model(model), load_device("h100"), load_engine(engine), layout, phase, options=Options(**options))
        for phase in ("prefill", "decode")
    ]
    return made[0], made[1]


def served(
    prefill: Deployment, decode: Deployment, traffic: Traffic, workers: tuple[int, int] | None = None,
    chunk_tokens: int | None = None,
) -> ServingMetrics:  # fmt: skip
    """One deployment under every number of users of ``traffic``; ``workers`` (prefill, decode): as pools."""
    users = np.atleast_1d(np.asarray(traffic.concurrency, dtype=float))
    cut = cut_prompts(traffic, chunk_tokens or own_chunk(prefill))
    price = prefill.step.price(np.array(cut.batches), cut.tokens, cut.past)
    spent = prefill.engine.overhead.prefill_factor, prefill.engine.overhead.prefill_error
    columns = {name: np.broadcast_to(v, (1, 3)) for name, v in prefill_columns(price, *spent).items()}
    rows = np.zeros(len(users), dtype=int)
    found = decode_columns(decode.step.price(np.maximum(GRID, 1 / decode.layout.dp), 1.0, float(traffic.context)))
    ranks = decode.layout.dp * (workers[1] if workers else 1)
    given: dict[str, Any] = {
        "traffic": traffic, "engine": decode.engine, "decode_ranks": ranks, "depth": decode.options.mtp_depth,
        "decoding": DecodeCurve(GRID, {name: np.broadcast_to(v, (1, len(GRID))) for name, v in found.items()}, rows),
        "prompts": prefill_costs(columns, cut.tokens, cut.per_step, cut.rises).where(rows),
    }  # fmt: skip
    lengths = int(traffic.input_len), float(traffic.reply_in_flight)
    fits = sequences_that_fit(prefill, decode, None if workers else cut, *lengths)
    if workers is None:
        model: Any = Aggregated(**given)
    else:
        hand_over = hand_over_s(prefill, decode.layout.world_size, sum(workers), lengths[0])
        model = Disaggregated(**given, prefill_ranks=workers[0] * prefill.layout.dp, hand_over_s=hand_over)
    found_metrics: ServingMetrics = model.metrics(model.steady_batch(np.minimum(users / ranks, fits), users), users)
    return found_metrics


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.tuples(st.integers(1, 9000), st.integers(1, 3000)),
    users=st.lists(st.floats(0.01, 1e5), min_size=1, max_size=4),
    prefix=st.floats(0, 0.9), spread=st.floats(0, 1), rounds=st.sampled_from([1.0, 10.0, np.inf]),
    wait=st.floats(0, 30), chunk=st.sampled_from([None, 512, 2048]), which=st.sampled_from(["vllm", "sglang", "moe"]),
    workers=st.one_of(st.none(), st.tuples(st.integers(1, 3), st.integers(1, 3))),
)  # fmt: skip
def test_arrays_are_the_numbers_of_each_load_alone(
    *, lengths: tuple[int, int], users: list[float], prefix: float, spread: float, rounds: float, wait: float,
    chunk: int | None, which: str, workers: tuple[int, int] | None,
) -> None:  # fmt: skip
    """Against the scalar oracle: one engine and pools, prompts cut and whole, engines that mix prompts in or not."""
    pair = some_pair(which)
    rest: dict[str, Any] = {
        "prefix_cached": int(prefix * lengths[0]), "spread": spread, "rounds": rounds, "wait_steps": wait,
    }  # fmt: skip
    with np.errstate(all="ignore"):
        whole = served(*pair, Traffic(*lengths, np.array(users), **rest), workers, chunk)
        for i, some in enumerate(users):
            traffic = Traffic(*lengths, some, **rest)
            one = (
                one_deployment.aggregated(*pair, traffic, chunk) if workers is None
                else one_deployment.disaggregated(*pair, *workers, traffic, chunk_tokens=chunk)
            )  # fmt: skip
            assert not one.problem
            mine = whole.one(i)
            for name in ("batch", "ttft_s", "tpot_s", "request_s", "output_tokens_per_s", "ttft_error", "tpot_error",
                         "decode_step_s", "prefill_step_s", "exposed_comm_s", "hidden_comm_s"):
                assert getattr(mine, name) == pytest.approx(getattr(one, name), rel=1e-9, abs=1e-12), name
            assert mine.evidence == pytest.approx(one.evidence, abs=1e-9)


@functools.cache
def some_pair(which: str) -> tuple[Deployment, Deployment]:
    if which == "moe":
        return pair_of("qwen3-30b-a3b", Layout(4, 1, 4, 4), "sglang")
    return pair_of("llama-3.1-8b", Layout(2, 2), which)


def test_more_users_more_tokens_and_more_time(pair: tuple[Deployment, Deployment]) -> None:
    for workers in (None, (1, 1)):
        found = served(*pair, Traffic(1000, 200, np.exp2(np.arange(14.0))), workers)
        tokens = np.asarray(found.output_tokens_per_s)
        assert (np.diff(tokens) > -1e-6 * tokens[1:]).all()
        assert (np.diff(found.request_s) > 0).all()


def test_a_full_cache_makes_requests_wait(pair: tuple[Deployment, Deployment]) -> None:
    found = served(*pair, Traffic(8000, 500, np.array([64.0, 4000.0, 8000.0])))
    decode = pair[1]
    per_sequence = decode.memory(1, 1, 8249).kv_cache  # a reply is half done in the mean
    memory = decode.memory(1, 1, 8000)
    room = (memory.budget - memory.total + memory.kv_cache) / per_sequence
    batch, tokens, request = (np.asarray(v) for v in (found.batch, found.output_tokens_per_s, found.request_s))
    assert batch[1] == pytest.approx(room, rel=0.1) and batch[1] == batch[2]
    # throughput stands still, so twice the users wait twice as long
    assert tokens[1] == pytest.approx(tokens[2])
    assert request[2] == pytest.approx(2 * request[1])


def test_a_model_that_does_not_fit_says_so() -> None:
    prefill, decode = pair_of("llama-3.1-70b", Layout(1))
    cut = cut_prompts(Traffic(100, 100, 1.0), 2048)
    for pooled in (False, True):
        fits, problem = room_for(prefill, decode, cut, Traffic(100, 100, 1.0), pooled)
        assert fits < 1 and "does not fit: no room for one sequence of 100 tokens" in problem


def test_step_without_other_users_is_the_decode_step(pair: tuple[Deployment, Deployment]) -> None:
    found = served(*pair, Traffic(512, 256, 1.0))
    alone = float(pair[1].step.seconds(1.0, 1.0, 512 + 128.0))
    assert found.tpot_s == pytest.approx(alone, rel=0.02)
    assert found.ttft_s >= float(pair[0].step.seconds(1.0, 512.0, 0.0))


def test_cached_prefix_and_smaller_chunks(pair: tuple[Deployment, Deployment]) -> None:
    plain = served(*pair, Traffic(6000, 200, 16.0))
    cached = served(*pair, Traffic(6000, 200, 16.0, prefix_cached=5000))
    chunked = served(*pair, Traffic(6000, 200, 16.0), chunk_tokens=512)
    assert cached.ttft_s < plain.ttft_s and cached.tpot_s < plain.tpot_s
    assert chunked.ttft_s > plain.ttft_s


@given(acceptance=st.floats(0.05, 0.95), depth=st.integers(0, 4))
def test_drafted_tokens(acceptance: float, depth: int) -> None:
    traffic = Traffic(10, 10, 1.0, mtp_acceptance=acceptance)
    assert 9 / traffic.decode_steps(depth) == pytest.approx((1 - acceptance ** (depth + 1)) / (1 - acceptance))


def test_the_first_burst_counts_by_its_share(pair: tuple[Deployment, Deployment]) -> None:
    endless, ten, five = (served(*pair, Traffic(2000, 500, 64.0, rounds=n)).ttft_s for n in (np.inf, 10, 5))
    assert five - endless == pytest.approx(2 * (ten - endless), rel=0.05) and ten > endless


def test_hand_over_of_a_latent_cache() -> None:
    prefill, decode = pair_of("deepseek-v3", Layout(8, 8, 1, 8))
    device = load_device("h100")
    seconds = hand_over_s(prefill, decode.layout.world_size, 2, 4096)
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
        Traffic(**{"input_len": 100, "output_len": 100, "concurrency": 1.0, **wrong})


def test_a_step_takes_at_least_a_token() -> None:
    with pytest.raises(InputError, match="chunk_tokens = -1: must be at least 1"):
        cut_prompts(Traffic(10, 10, 1.0), -1)
