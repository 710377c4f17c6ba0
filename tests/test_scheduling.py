"""Replays: against a scheduler told token by token, against the closed form, and what must be kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import naive_scheduler
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorcast.deploy.options import Options
from tensorcast.errors import InputError
from tensorcast.predict import predict
from tensorcast.profiles.scheduler import ExpectedReply
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.scheduling.capacity import at_the_limit
from tensorcast.scheduling.fleet import ROUTERS, Fleet, Pool
from tensorcast.scheduling.outcome import Limits
from tensorcast.scheduling.pools import parse_servers
from tensorcast.scheduling.replay import PricedServers, priced_servers
from tensorcast.scheduling.requests import Length, Requests, drawn, sessions
from tensorcast.scheduling.room import Batch, PrefixCache
from tensorcast.scheduling.rules import Role, Rules, Waits
from tensorcast.scheduling.step_times import Bilinear, DecodeTimes, PromptTimes, StepTimes

SERVED = Options(routing="typical")
WIDE = [0.0, 2.0**20]


def plane(fixed: float, down: float = 0.0, across: float = 0.0) -> Bilinear:
    """``fixed + down * d + across * a``: what lines between points tell exactly."""
    return Bilinear(WIDE, WIDE, [[fixed + down * d + across * a for a in WIDE] for d in WIDE])


TIMES = StepTimes(
    decode=DecodeTimes(own=plane(0.01, 1e-7, 1e-4), shared=plane(0.0), attention=plane(0.0, 0.0, 5e-5)),
    prompts=PromptTimes(own=plane(0.005, 0.0, 2e-5), shared=plane(0.0), attention=plane(1e-4, 1e-7, 1e-6), least=1e-4),
    tokens_each=1.0, alone=False, errors=(0.05, 0.05),
)  # fmt: skip
RULES = Rules(
    role="both", ranks=1, alone=False, chunk_tokens=512, splits=True, prompt_tokens=None, most_sequences=64,
    cache_tokens=1e6, block_tokens=1, reserves_reply=False, expected=None, tokens_per_step=1.0, verify=1.0, lag=1,
    waits=Waits(), first_token_s=0.003, prompt_token_s=0.0, prefix_cache=True, longest=1 << 30,
    round_robin=False,
)  # fmt: skip


@st.composite
def asked(draw: st.DrawFn) -> Requests:
    count = draw(st.integers(1, 25))
    lengths = st.lists(st.integers(1, 900), min_size=count, max_size=count)
    gaps = draw(st.lists(st.floats(0, 0.3), min_size=count, max_size=count))
    replies = draw(st.lists(st.integers(1, 60), min_size=count, max_size=count))
    return Requests(
        arrival_s=np.cumsum(gaps) * draw(st.sampled_from([0.0, 0.1, 1.0])), input_len=np.array(draw(lengths)),
        output_len=np.array(replies), users=draw(st.sampled_from([None, 1, 4])),
    )  # fmt: skip


KINDS: dict[str, dict[str, Any]] = {
    "prompts beside replies": {},
    "prompts alone": {"alone": True, "prompt_tokens": 700},
    "whole prompts, whole replies": {"splits": False, "reserves_reply": True, "chunk_tokens": 1000},
    "small cache": {"cache_tokens": 1100.0},
    "small cache, small chunks": {"cache_tokens": 1000.0, "chunk_tokens": 64},
    "room for chunks": {"cache_tokens": 1000.0, "chunk_tokens": 200, "admits_chunks": True},
    "few at a time": {"most_sequences": 3},
    "few at a time, seen late": {"most_sequences": 2, "lag": 3},
    "room for replies expected": {
        "alone": True, "cache_tokens": 1300.0,
        "expected": ExpectedReply(first=0.9, least=0.1, steps=25, most_tokens=45, spare_steps=20),
    },
    "room for replies expected, all in one step": {
        "cache_tokens": 1100.0, "lag": 0,
        "expected": ExpectedReply(first=1.0, least=0.05, steps=60, most_tokens=60, spare_steps=3),
    },
    "room for replies expected, asked in each step": {
        "alone": True, "cache_tokens": 1100.0, "asks_again": True,
        "expected": ExpectedReply(first=0.9, least=0.02, steps=25, most_tokens=45, spare_steps=2),
    },
    "room for whole replies expected": {
        "alone": True, "cache_tokens": 1100.0,
        "expected": ExpectedReply(first=0.9, least=0.1, steps=25, most_tokens=30, spare_steps=20, fixed_whole=True),
    },
    "seen at once": {"lag": 0},
    "seen late": {"lag": 2},
    "looked for now and then": {"alone": True, "look_steps": 7, "most_sequences": 6},
    "looked for now and then, seen at once": {"lag": 0, "look_steps": 5, "cache_tokens": 1100.0},
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(requests=asked())
def test_steps_are_those_of_a_scheduler_told_token_by_token(kind: str, requests: Requests) -> None:
    rules = replace(RULES, **KINDS[kind])
    times = replace(TIMES, alone=rules.alone)
    fleet = Fleet([Pool(rules, times, 1)], requests)
    record = fleet.run()
    wanted = naive_scheduler.Naive(requests, rules, times).simulate()
    every = range(len(requests))
    assert fleet.servers[0].steps == wanted.steps
    assert record.sent_s == pytest.approx([wanted.sent_s[i] for i in every], abs=1e-9)
    assert record.first_s == pytest.approx([wanted.first_s[i] for i in every], abs=1e-9)
    assert record.last_s == pytest.approx([wanted.last_s[i] for i in every], abs=1e-9)
    assert record.preemptions.sum() == wanted.preemptions
    assert wanted.most_used <= rules.cache_tokens


@settings(max_examples=25)
@given(
    requests=asked(), router=st.sampled_from(ROUTERS), count=st.integers(1, 3), pooled=st.booleans(),
    changed=st.fixed_dictionaries({
        "ranks": st.integers(1, 3), "cache_tokens": st.sampled_from([1000.0, 3000.0, 1e6]), "alone": st.booleans(),
        "reserves_reply": st.booleans(), "tokens_per_step": st.sampled_from([1.0, 1.8]), "ranks_wait": st.booleans(),
        "admits_chunks": st.booleans(), "look_steps": st.sampled_from([1, 4]),
        "chunk_tokens": st.sampled_from([2, 512]),
    }),
)  # fmt: skip
def test_nothing_is_lost(
    requests: Requests, router: str, count: int, pooled: bool, changed: dict[str, Any]
) -> None:
    """Every request ends once, or is refused; caches are empty at the end and never held more than they can."""
    rules = replace(RULES, **changed, verify=np.ceil(changed["tokens_per_step"]))
    times = replace(TIMES, alone=rules.alone, tokens_each=rules.verify)
    roles: tuple[Role, ...] = ("prefill", "decode") if pooled else ("both",)
    pools = [Pool(replace(rules, role=role), times, count, lambda tokens: 1e-3 + 1e-6 * tokens) for role in roles]
    fleet = Fleet(pools, requests, router=router)
    record = fleet.run()
    refused = set(fleet.refused)
    assert refused == {i for i in range(len(requests)) if record.longest(i) > rules.cache_tokens}
    served = np.array([i not in refused for i in range(len(requests))])
    for times_ in (record.first_s, record.last_s, record.admitted_s):
        assert np.all(np.isfinite(times_[served])) and np.all(np.isnan(times_[~served]))
    assert np.all(record.last_s[served] >= record.first_s[served])
    assert np.all(record.first_s[served] >= record.sent_s[served])
    assert fleet.finished == len(requests)
    for server in fleet.servers:
        for rank in server.ranks:
            assert rank.load == 0 and rank.used == pytest.approx(0.0, abs=1e-6)
        assert all(-1e-9 <= row[4] <= 1 + 1e-9 for row in server.moments.rows)


def test_drafts_that_take_a_whole_step_give_nobody_room() -> None:
    """Of five tokens of a step three replies check two each: a prompt of which one is read holds that meanwhile."""
    rules = replace(RULES, chunk_tokens=5, tokens_per_step=1.5, verify=2.0, admits_chunks=True, most_sequences=4)
    requests = Requests(
        arrival_s=np.array([0.0, 0.1, 0.1, 0.1]), input_len=np.array([2, 1, 1, 50]),
        output_len=np.array([90, 90, 90, 5]),
    )
    fleet = Fleet([Pool(rules, replace(TIMES, tokens_each=2.0), 1)], requests)
    (rank,), spare = fleet.servers[0].ranks, list[float]()
    composed = rank.batch

    def checked(seen_s: float, now_s: float, hold_prompts: bool = False) -> Batch:
        found = composed(seen_s, now_s, hold_prompts)
        spare.extend(one.held - one.read for one in rank.reading)
        return found

    rank.batch = checked  # type: ignore[method-assign]
    assert np.all(np.isfinite(fleet.run().last_s)) and spare and min(spare) >= 0


@pytest.mark.parametrize("lag", [0, 1])
def test_a_first_token_from_another_server_is_not_waited_for(lag: int) -> None:
    """It is sent on when the step that the reply joins is composed, which is ``lag`` steps before that one begins."""
    requests = Requests(arrival_s=np.array([0.0, 0.55]), input_len=np.array([1, 1]), output_len=np.array([200, 21]))
    each = StepTimes(
        decode=DecodeTimes(own=plane(0.01), shared=plane(0.0), attention=plane(0.0)),
        prompts=PromptTimes(own=plane(0.005), shared=plane(0.0), attention=plane(0.0), least=0.0),
        tokens_each=1.0, alone=False, errors=(0.0, 0.0),
    )  # fmt: skip
    roles: tuple[Role, ...] = ("prefill", "decode")
    rules = replace(RULES, lag=lag)
    record = Fleet([Pool(replace(rules, role=role), each, 1, lambda tokens: 1e-3) for role in roles], requests).run()
    assert record.last_s[1] - record.first_s[1] == pytest.approx((20 + lag) * 0.01)


def test_a_faster_server_is_done_earlier() -> None:
    requests = drawn(200, Length(300, 0.9), Length(40, 0.9), rate=30.0, seed=3)
    ends = [
        Fleet([Pool(RULES, TIMES.scaled(factor, factor), 1)], requests).run().last_s.max() for factor in (0.5, 1.0, 2.0)
    ]
    assert ends[0] < ends[1] < ends[2]


@settings(max_examples=40)
@given(requests=asked(), changed=st.sampled_from([{}, {"alone": True}, {"most_sequences": 3}]))
def test_a_faster_device_has_finished_no_fewer(requests: Requests, changed: dict[str, Any]) -> None:
    """Each of so many ends sooner where every step takes half as long, but for the two steps in which who comes then is
    not seen yet, where those of the slower one began just after."""
    rules = replace(RULES, **changed)
    times = replace(TIMES, alone=rules.alone)
    slow, fast = (
        np.sort(Fleet([Pool(rules, times.scaled(factor, factor), 1)], requests).run().last_s) for factor in (1.0, 0.5)
    )
    assert np.all(fast <= slow + 2 * times.scaled(0.5, 0.5).decoding(rules.most_sequences, 1000.0, 1.0))


@settings(max_examples=40)
@given(
    requests=asked(), families=st.lists(st.integers(0, 3), min_size=25, max_size=25),
    cache=st.sampled_from([1000.0, 1600.0, 4000.0]), count=st.integers(1, 2),
    found=st.sampled_from([
        {"blocks_found": "scheduled"}, {"blocks_found": "chunk"}, {"waits_for_blocks": True},
        {"admits_chunks": True, "chunk_tokens": 64},
    ]),
)  # fmt: skip
def test_blocks_are_kept_within_the_cache(
    requests: Requests, families: list[int], cache: float, count: int, found: dict[str, Any]
) -> None:
    """Prompts that begin alike: at every step tokens held, used and kept fit in, each block once; nobody reads more or
    less than its prompt, and finds no more than another's beginning."""
    size = 16
    blocks = tuple(
        tuple(1000 * family + k for k in range((int(n) + int(m)) // size))
        for family, n, m in zip(families, requests.input_len, requests.output_len, strict=False)
    )
    shared = replace(requests, blocks=blocks, block_tokens=size, reply_blocks=True)
    fleet = Fleet([Pool(replace(RULES, cache_tokens=cache, **found), TIMES, count)], shared, router="prefix_aware")
    read = dict.fromkeys(range(len(requests)), 0)
    for server in fleet.servers:
        for rank in server.ranks:
            composed = rank.batch

            def checked(*given: Any, rank: Any = rank, composed: Any = composed) -> Any:
                found = composed(*given)
                assert rank.used + rank.prefix.free_tokens <= cache + 1e-6
                assert rank.used >= -1e-6
                return found

            rank.batch = checked  # type: ignore[method-assign, assignment]
            admit = rank._admit

            def admitted(request: int, budget: int, admit: Any = admit) -> Any:
                one = admit(request, budget)
                if one is not None and not fleet.record.preemptions[request]:
                    read[request] = one.read
                return one

            rank._admit = admitted  # type: ignore[method-assign]
    record = fleet.run()
    assert np.all(np.isfinite(record.last_s))
    for i, (mine, family) in enumerate(zip(blocks, families, strict=False)):
        assert record.cached_tokens[i] == read[i] < requests.input_len[i] and read[i] % size == 0
        others = [len(theirs) for k, theirs in enumerate(blocks) if k != i and families[k] == family]
        assert read[i] <= size * min(len(mine), max(others, default=0)) or record.preemptions[i]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), max_size=40), st.integers(1, 8))
def test_prefix_blocks_against_a_plain_list(steps: list[tuple[int, int]], room: int) -> None:
    """Blocks are named by their prefix; the longest unused go first, the last blocks of a prompt before its first."""
    cache, free, held = PrefixCache(10), list[int](), list[tuple[int, ...]]()
    for family, length in steps:
        blocks = tuple(100 * family + i for i in range(length))
        there = {b for one in held for b in one} | set(free)
        expected = next((i for i, block in enumerate(blocks) if block not in there), len(blocks))
        assert cache.match(blocks, length) == expected
        cache.pin(blocks)
        held.append(blocks)
        free = [block for block in free if block not in blocks]
        if len(held) > 2:
            gone = held.pop(0)
            cache.unpin(gone)
            free += [block for block in reversed(gone) if not any(block in one for one in held)]
        cache.shrink(10.0 * room)
        free = free[max(0, len(free) - room) :]
        assert cache.free_tokens == 10 * len(free)
        assert cache.pinned_tokens == 10 * len({b for one in held for b in one})


@pytest.fixture(scope="module")
def priced() -> PricedServers:
    model, device, engine = load_model("qwen3-30b-a3b"), load_device("h100"), load_engine("vllm")
    return priced_servers(model, device, engine, parse_servers("tp2-ep2"), longest=6000, options=SERVED)


def test_a_closed_loop_is_what_the_closed_form_says(priced: PricedServers) -> None:
    """One user, and sixteen whose replies differ in length: equal ones stay in step, which the form leaves out."""
    row = {"model": "qwen3-30b-a3b", "device": "h100", "engine": "vllm", "tp": 2, "ep": 2, "isl": 2000, "osl": 300}
    for users, spread, tolerance in ((1, 0.0, 0.01), (16, 0.3, 0.03)):
        closed = predict.predict(pd.DataFrame([{**row, "concurrency": users}])).iloc[0]
        found = priced.run(drawn(30 * users, Length(2000), Length(300, spread), users=users)).summary()
        assert found["tpot_mean_s"] == pytest.approx(closed["tpot_s"], rel=tolerance)
        assert found["output_tokens_per_s"] == pytest.approx(closed["output_tokens_per_s"], rel=tolerance)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_one_user_of_attention_dp_is_what_the_closed_form_says(engine: str) -> None:
    """Experts see a quarter of a sequence per rank, which tables that begin at one do not tell."""
    row = {"model": "qwen3-30b-a3b", "device": "h100", "engine": engine, "dp": 4, "ep": 4, "isl": 2000, "osl": 200}
    closed = predict.predict(pd.DataFrame([{**row, "concurrency": 1, "routing": "typical"}])).iloc[0]
    servers = priced_servers(
        load_model("qwen3-30b-a3b"), load_device("h100"), load_engine(engine), parse_servers("dp4-ep4"), longest=6000,
        options=SERVED,
    )  # fmt: skip
    found = servers.run(drawn(20, Length(2000), Length(200), users=1)).summary()
    assert found["tpot_mean_s"] == pytest.approx(closed["tpot_s"], rel=0.02)
    assert found["output_tokens_per_s"] == pytest.approx(closed["output_tokens_per_s"], rel=0.02)


def test_the_rate_at_the_limit(priced: PricedServers) -> None:
    requests = drawn(150, Length(1000, 0.5), Length(100, 0.5), rate=1.0, seed=5)
    limits = Limits(ttft_s=0.5, tpot_s=0.03)
    found = at_the_limit(priced, requests, limits, share=0.9)
    at, above = (priced.run(one, limits=limits).summary() for one in (found, found.scaled(rate=1.05)))
    assert at["within_limits"] >= 0.9 > above["within_limits"]
    with pytest.raises(InputError, match="even at"):
        at_the_limit(priced, requests, Limits(ttft_s=1e-4), share=0.9)
    with pytest.raises(InputError, match="all come at once"):
        at_the_limit(priced, replace(requests, arrival_s=np.zeros(150)), limits, share=0.9)


def test_shared_prefixes_are_read_once(priced: PricedServers) -> None:
    requests = sessions(12, 4, Length(200), Length(50), rate=2.0, think_s=5.0, shared_len=640)
    plain = replace(requests, blocks=None)
    shared, alone = priced.run(requests).summary(), priced.run(plain).summary()
    assert shared["cache_hit_share"] > 0.5 and alone["cache_hit_share"] == 0.0
    assert shared["ttft_mean_s"] < alone["ttft_mean_s"]


def test_bands_hold_the_middle_and_grow_with_draws(priced: PricedServers) -> None:
    found = priced.run(drawn(40, Length(500), Length(50), users=4), draws=6)
    for name in ("ttft_mean_s", "tpot_mean_s", "output_tokens_per_s"):
        low, high = found.bands()[name]
        assert low < found.summary()[name] < high < 3 * low


def test_prompts_that_fill_steps_up_take_nothing_from_replies() -> None:
    """Where a step with prompts is no longer than one without, as here with graphs for few tokens alone."""
    assert TIMES.prompts is not None
    slow = replace(TIMES, prompts=replace(TIMES.prompts, own=plane(0.001, 0.0, 2e-5)))
    found = Fleet([Pool(RULES, slow, 1)], drawn(60, Length(20), Length(40, 0.5), rate=30.0)).run()
    assert found.others_s.min() >= 0 and found.others_s.max() == 0


def test_causes_make_up_the_whole(priced: PricedServers) -> None:
    found = priced.run(drawn(60, Length(1500, 0.5), Length(80, 0.5), rate=20.0), limits=Limits(ttft_s=0.2))
    frame = found.per_request()
    parts = frame[["queue_s", "own_prompt_s", "others_prompts_s", "decoding_s", "started_over_s"]]
    assert parts.sum(axis=1).to_numpy() == pytest.approx(frame["request_s"].to_numpy())
    assert (parts.to_numpy() >= -1e-9).all() and parts["others_prompts_s"].sum() > 0


@pytest.mark.parametrize(
    ("text", "says"),
    [("tp8 > tp8 > tp8", "at most two phases"), ("0 x tp8", "at least 1"), ("nonsense", "layout 'nonsense'"),
     ("tp8 >", "layout 'tp8 >': a layout is missing"), ("4 x @h100", "a layout is missing")],
)
def test_bad_layouts(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_servers(text)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: drawn(0, Length(1), Length(1)), "requests = 0"),
        (lambda: drawn(1, Length(0.5), Length(1)), "at least 1 token"),
        (lambda: drawn(1, Length(5, 1.5), Length(1)), "spread 1.5"),
        (lambda: drawn(1, Length(5, 0.1, "normal"), Length(1)), "length law"),
        (lambda: drawn(1, Length(5), Length(1), rate=-1.0), "rate = -1"),
        (lambda: drawn(3, Length(5), Length(1)).scaled(rate=0.0), "scale of rate"),
    ],
)
def test_bad_requests(make: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()


@given(st.floats(0.5, 50), st.floats(0.2, 5), st.integers(0, 5))
def test_arrivals_come_at_their_rate(rate: float, burstiness: float, seed: int) -> None:
    found = drawn(3000, Length(10), Length(10), rate=rate, burstiness=burstiness, seed=seed)
    assert found.rate == pytest.approx(rate, rel=6 / np.sqrt(3000 * burstiness))


@pytest.mark.parametrize(
    ("model", "layout", "plain", "drafting"),
    [
        ("deepseek-v3", "tp8", 4096, 48), ("deepseek-v3", "dp8-ep8", 1024, 6), ("deepseek-v4-flash", "tp8", 256, 256),
        ("deepseek-v4-flash", "dp8-ep8", 32, 32),
    ],
)  # fmt: skip
def test_sglang_runs_few_requests_unless_told(model: str, layout: str, plain: int, drafting: int) -> None:
    """sglang 0.5.14 and 0.5.23, arg_groups/speculative_hook.py and deepseek_v4_hook.py: max_running_requests is 48 with
    drafts and 256 for DeepSeek-V4, over all ranks, unless it is given; DeepEP sends 1,024 a rank at most."""

    def sequences(depth: int, asked: int | None = None) -> int:
        found = priced_servers(
            load_model(model), load_device("h200"), load_engine("sglang"), parse_servers(layout), longest=4096,
            options=Options(mtp_depth=depth), max_sequences=asked,
        )  # fmt: skip
        return found.pools[0].rules.most_sequences

    assert (sequences(0), sequences(1)) == (plain, drafting)
    assert sequences(1, 64) == 64
