"""What holds of every replay, whatever the requests, pools and servers that are lost: tokens are written once, order is
kept, a faster device is never behind; and pools in a long closed loop serve what the closed form says."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pools import CHANGES, ROOM_FIRST, possible, room_first
from test_scheduling import RULES, TIMES, asked

from tensorcast.predict.predict import predict
from tensorcast.scheduling.fleet import ROUTERS, Fleet, Pool
from tensorcast.scheduling.requests import Requests
from tensorcast.scheduling.rules import Role
from tensorcast.scheduling.server import Server

CACHES = st.sampled_from([1000.0, 1500.0, 1e6])


def pools_of(pooled: bool, count: int, scale: float = 1.0, reserved: int | None = None, **rules: Any) -> list[Pool]:
    """Two equal pools of ``count`` servers, of one phase each if ``pooled``; steps ``scale`` times as long."""
    roles: tuple[Role, ...] = ("prefill", "decode") if pooled else ("both", "both")
    common = replace(RULES, **rules)
    times = replace(TIMES, alone=common.alone).scaled(scale, scale)
    firsts = [room_first(reserved) if role == "decode" else None for role in roles]
    return [
        Pool(replace(common, role=role, room_first=first), times, count, lambda tokens: scale * 1e-3)
        for role, first in zip(roles, firsts, strict=True)
    ]


@settings(max_examples=60)
@given(
    requests=asked(), wanted=CHANGES, router=st.sampled_from(ROUTERS), pooled=st.booleans(), cache=CACHES,
    ranks=st.integers(1, 2), alone=st.booleans(), reserved=ROOM_FIRST,
)  # fmt: skip
def test_every_token_is_written_once(
    *, requests: Requests, wanted: list[tuple[float, int, bool]], router: str, pooled: bool, cache: float, ranks: int,
    alone: bool, reserved: int | None,
) -> None:
    """Each reply has a first token, the others come in decode steps; of who starts over, reading again brings one."""
    pools = pools_of(pooled, 1, reserved=reserved, cache_tokens=cache, ranks=ranks, alone=alone)
    record = Fleet(pools, requests, router=router, changes=possible(wanted, [1, 1])).run()
    in_steps, others = sum(record.gaps), int((requests.output_len - 1).sum())
    begun_again = int(record.preemptions.sum() + record.moved.sum())
    assert others - begun_again <= in_steps <= others


@settings(max_examples=60)
@given(
    requests=asked(), wanted=CHANGES, router=st.sampled_from(ROUTERS), pooled=st.booleans(), count=st.integers(1, 3),
    cache=CACHES, alone=st.booleans(),
)  # fmt: skip
def test_who_came_first_is_read_first(
    *, requests: Requests, wanted: list[tuple[float, int, bool]], router: str, pooled: bool, count: int, cache: float,
    alone: bool,
) -> None:
    """On every server, in the order in which the router sent them; who was on a lost server is asked nothing."""
    came: dict[int, list[int]] = defaultdict(list)

    class Told(Server):
        def put(self, request: int, now_s: float) -> bool:
            came[self.number].append(request)
            return super().put(request, now_s)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tensorcast.scheduling.fleet.Server", Told)
        pools = pools_of(pooled, count, cache_tokens=cache, alone=alone)
        fleet = Fleet(pools, requests, router=router, changes=possible(wanted, [count, count]))
        record = fleet.run()
    assert sum(map(len, came.values())) >= len(requests)
    for server in fleet.servers:
        if server.rules.role != "decode":
            stayed = [request for request in came[server.number] if not record.moved[request]]
            assert np.all(np.diff(record.admitted_s[stayed]) >= 0)


@settings(max_examples=60)
@given(
    requests=asked(), pooled=st.booleans(), count=st.integers(1, 2),
    changed=st.sampled_from([{}, {"alone": True}, {"most_sequences": 3}]),
)  # fmt: skip
def test_pools_of_a_faster_device_have_finished_no_fewer(
    *, requests: Requests, pooled: bool, count: int, changed: dict[str, Any]
) -> None:
    """At no moment, where every step and every hand-over takes half as long."""
    slow, fast = (
        np.sort(Fleet(pools_of(pooled, count, scale, **changed), requests, router="round_robin").run().last_s)
        for scale in (1.0, 0.5)
    )
    assert np.all(fast <= slow + 1e-9)


POOLS: dict[str, Any] = {
    "model": "qwen3-30b-a3b", "device": "h200", "mode": "disagg", "prefill_tp": 1, "decode_tp": 2, "prefill_workers": 1,
    "decode_workers": 2, "isl": 2000, "osl": 400, "routing": "typical", "length_ratio": 0.6, "rounds": 30,
}  # fmt: skip


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
@pytest.mark.parametrize("users", [1, 16, 64])
def test_a_long_closed_loop_of_pools_is_what_the_closed_form_says(engine: str, users: int) -> None:
    """Told the most sequences of a step, more than there are, a row is replayed. First tokens come two steps sooner of
    an idle server that writes."""
    row = POOLS | {"engine": engine, "concurrency": users}
    replayed, steady = predict(pd.DataFrame([row | {"max_num_seqs": 4096}, row])).to_dict("records")
    for column in ("tpot_s", "output_tokens_per_s", "mean_batch"):
        assert replayed[column] == pytest.approx(steady[column], rel=0.02), column
    assert replayed["ttft_s"] <= steady["ttft_s"] <= replayed["ttft_s"] + 2.5 * steady["decode_step_s"]


def test_a_full_decode_pool_runs_as_many_as_the_closed_form_says() -> None:
    """DeepSeek-R1 on H200 under SGLang, 512 tokens left for each reply under way: users wait for room in both."""
    row = {
        "model": "deepseek-r1", "device": "h200", "engine": "sglang", "mode": "disagg", "prefill_tp": 8, "decode_tp": 8,
        "prefill_workers": 4, "decode_workers": 1, "isl": 2000, "osl": 800, "concurrency": 360, "length_ratio": 0.6,
        "memory_fraction": 0.72, "rounds": 12,
    }  # fmt: skip
    replayed, steady = predict(pd.DataFrame([row | {"max_num_seqs": 4096}, row])).to_dict("records")
    assert steady["mean_batch"] < 180
    for column in ("ttft_s", "tpot_s", "output_tokens_per_s", "mean_batch"):
        assert replayed[column] == pytest.approx(steady[column], rel=0.05), column


@settings(max_examples=40)
@given(
    requests=asked(), pooled=st.booleans(), cache=CACHES, ranks=st.integers(1, 3), alone=st.booleans(),
    wait=st.booleans(), weight=st.sampled_from([0.0, 2.0]),
)  # fmt: skip
def test_requests_times_do_not_hang_on_what_else_is_told(
    *, requests: Requests, pooled: bool, cache: float, ranks: int, alone: bool, wait: bool, weight: float
) -> None:
    """A replay that keeps nothing but times, as ``predict`` asks for, has those of one that tells everything."""
    pools = pools_of(
        pooled, 2, cache_tokens=cache, ranks=ranks, alone=alone, ranks_wait=alone and wait, queue_weight=weight
    )
    whole, bare = Fleet(pools, requests), Fleet(pools, requests, tells=False)
    told, times = whole.run(), bare.run()
    for name in ("sent_s", "came_s", "admitted_s", "first_s", "last_s"):
        np.testing.assert_array_equal(getattr(times, name), getattr(told, name))
    assert whole.refused == bare.refused
    assert not any(server.moments.rows for server in bare.servers)
    assert not sum(times.gaps)
