"""Servers lost and added, pools that differ, conversations: against what must hold whatever happens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduling import RULES, TIMES, asked

from tensorcast.deploy.options import Options
from tensorcast.errors import InputError
from tensorcast.profiles.scheduler import RoomFirst
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.scheduling.fleet import ROUTERS, Fleet, Pool
from tensorcast.scheduling.pools import Change, parse_changes, parse_servers
from tensorcast.scheduling.replay import priced_servers
from tensorcast.scheduling.requests import Length, Requests, drawn, sessions
from tensorcast.scheduling.rules import Role

ROOM_FIRST = st.sampled_from([None, 0, 25, 300])
"""Tokens that are left for each reply where room of a server that writes is taken first."""


def room_first(reserved_tokens: int | None, **few: int) -> RoomFirst | None:
    return None if reserved_tokens is None else RoomFirst(reserved_tokens=reserved_tokens, source="test", **few)


CHANGES = st.lists(st.tuples(st.floats(0, 3), st.integers(0, 2), st.booleans()), max_size=6)


def possible(wanted: list[tuple[float, int, bool]], counts: list[int]) -> tuple[Change, ...]:
    """Those of ``wanted`` that find a server to take; at the end every pool has one more, so that all can be served."""
    left, found = list(counts), []
    for when, pool, added in sorted(wanted):
        if pool < len(left) and (added or left[pool]):
            left[pool] += 1 if added else -1
            found.append(Change(when, 1 if added else -1, pool))
    return (*found, *(Change(4.0, 1, pool) for pool in range(len(left))))


def test_a_system_prompt_alone_keeps_no_conversation_together() -> None:
    """A router that knows of prefixes sends turns to who has their conversation, and conversations that share 64 of 464
    tokens to who has least to do; not even turns where one server has far more to do than another."""
    talks = sessions(60, 3, Length(400), Length(100), rate=20.0, think_s=1.0, shared_len=64)
    record = Fleet([Pool(RULES, TIMES, 3)], talks, router="prefix_aware").run()
    served = record.server.reshape(60, 3)
    assert np.all(served == served[:, :1]) and np.bincount(served[:, 0], minlength=3).min() >= 15
    same = Requests(
        arrival_s=np.zeros(400), input_len=np.full(400, 512), output_len=np.full(400, 50), block_tokens=16,
        blocks=(tuple(range(32)),) * 400,
    )  # fmt: skip
    first = replace(same, arrival_s=np.concatenate([[0.0], np.full(399, 0.05)]))
    record = Fleet([Pool(RULES, TIMES, 2)], first, router="prefix_aware").run()
    assert 60 < np.bincount(record.server, minlength=2).min() < 200


@settings(max_examples=60)
@given(
    requests=asked(), wanted=CHANGES, router=st.sampled_from(ROUTERS), pooled=st.booleans(),
    cache=st.sampled_from([1000.0, 1e6]), ranks=st.integers(1, 2), reserved=ROOM_FIRST,
)  # fmt: skip
def test_lost_servers_lose_no_request(
    *, requests: Requests, wanted: list[tuple[float, int, bool]], router: str, pooled: bool, cache: float, ranks: int,
    reserved: int | None,
) -> None:
    """All are served once, the reply's tokens in order; nobody is on a server before it came or after it was lost."""
    roles: tuple[Role, ...] = ("prefill", "decode") if pooled else ("both", "both")
    rules = replace(RULES, cache_tokens=cache, ranks=ranks)
    pools = [Pool(replace(rules, role=role), TIMES, 1, lambda tokens: 1e-3) for role in roles]
    if pooled:
        pools[1] = replace(pools[1], rules=replace(pools[1].rules, room_first=room_first(reserved)))
    changes = possible(wanted, [1, 1])
    fleet = Fleet(pools, requests, router=router, changes=changes)
    record = fleet.run()
    assert fleet.finished == len(requests) and not fleet.refused
    assert np.all(np.isfinite(record.last_s))
    for earlier, later in ((record.sent_s, record.admitted_s), (record.admitted_s, record.first_s)):
        assert np.all(earlier <= later + 1e-12)
    assert np.all(record.first_s <= record.last_s)
    for server in fleet.servers:
        here = record.server == server.number
        assert np.all(record.last_s[here] >= server.from_s) and np.all(record.last_s[here] <= server.lost_s)
        assert all(rank.load == 0 and rank.used == pytest.approx(0, abs=1e-6) for rank in server.ranks)
        assert all(0 <= row[4] <= 1 + 1e-9 for row in server.moments.rows)
    if not any(change.count < 0 for change in changes):
        assert not record.moved.any()


def test_a_lost_server_costs_its_requests_what_they_had_read() -> None:
    """By hand: one request writes when its server goes; another server reads prompt and the written tokens anew."""
    requests = Requests(arrival_s=np.zeros(1), input_len=np.array([200]), output_len=np.array([50]))
    plain = Fleet([Pool(RULES, TIMES, 2)], requests).run()
    lost_at = 0.25
    changes = (Change(lost_at, -2), Change(1.0, 1))
    fleet = Fleet([Pool(RULES, TIMES, 2)], requests, router="round_robin", changes=changes)
    record = fleet.run()
    first = float(plain.first_s[0])
    written, now = 1, first
    while (now := now + TIMES.decoding(1, 200 + written, 1)) <= lost_at:
        written += 1
    again = TIMES.own([(200 + written, 0)], 0, 0.0)
    rest = sum(TIMES.decoding(1, 200 + one, 1) for one in range(written + 1, 50))
    assert record.first_s[0] == pytest.approx(first) and record.moved[0] == 1
    assert record.last_s[0] == pytest.approx(1.0 + again + rest, rel=1e-9)


def test_without_a_server_requests_wait_and_are_counted() -> None:
    requests = drawn(20, Length(100), Length(20), rate=10.0)
    fleet = Fleet([Pool(RULES, TIMES, 1)], requests, changes=(Change(0.5, -1),))
    record = fleet.run()
    served = np.isfinite(record.last_s)
    assert 0 < served.sum() < 20 and np.all(record.last_s[served] <= 0.5) and not fleet.refused


def test_more_servers_are_never_slower() -> None:
    requests = drawn(300, Length(300, 0.9), Length(40, 0.9), rate=60.0, seed=3)
    ends = [
        Fleet([Pool(RULES, TIMES, 1)], requests, changes=changes).run().last_s.mean()
        for changes in ((), (Change(2.0, 1),), (Change(2.0, 3),))
    ]
    assert ends[0] > ends[1] > ends[2]


def test_long_requests_go_where_they_fit() -> None:
    """Pools that differ: what one cannot take the other does, and only what none takes is refused."""
    pools = [Pool(replace(RULES, cache_tokens=size), TIMES, 2) for size in (500.0, 2000.0)]
    requests = Requests(
        arrival_s=np.arange(6) / 10, input_len=np.array([100, 700, 400, 1500, 2500, 90]), output_len=np.full(6, 20)
    )
    fleet = Fleet(pools, requests, router="round_robin")
    record = fleet.run()
    assert fleet.refused == [4]
    assert all(record.server[i] >= 2 for i in (1, 3)) and {0, 1} & set(record.server[[0, 2, 5]].tolist())


@settings(max_examples=30)
@given(
    st.integers(1, 6), st.integers(1, 4), st.floats(0, 3), st.integers(0, 300), st.sampled_from([None, 1, 2]),
)  # fmt: skip
def test_turns_come_after_replies(count: int, turns: int, think: float, shared: int, users: int | None) -> None:
    """A turn is sent after the reply before it, never sooner than its user thought, and holds all that was said."""
    lengths = Length(80, 0.5), Length(30, 0.5)
    requests = sessions(count, turns, *lengths, rate=2.0, think_s=think, shared_len=shared, users=users)
    record = Fleet([Pool(RULES, TIMES, 2)], requests).run()
    assert requests.after is not None and requests.think_s is not None and requests.blocks is not None
    for i, before in enumerate(requests.after.tolist()):
        if before < 0:
            continue
        assert record.sent_s[i] >= record.last_s[before] + requests.think_s[i] - 1e-9
        assert requests.input_len[i] > requests.input_len[before] + requests.output_len[before]
        assert requests.blocks[i][: len(requests.blocks[before])] == requests.blocks[before]
    begun = np.array([len(one) for one in requests.blocks])
    assert np.all(begun == (requests.input_len + requests.output_len) // requests.block_tokens)
    own = [set(one) - set(range(shared // 64)) for one in requests.blocks[turns - 1 :: turns]]
    assert len(set().union(*own)) == sum(map(len, own))  # conversations share the system prompt alone


def test_a_turn_reads_only_what_is_new() -> None:
    """With room for all and one server, everything said before is found again, in whole blocks, but the last token."""
    requests = sessions(3, 4, Length(200), Length(90), rate=1.0, think_s=0.5, shared_len=640)
    record = Fleet([Pool(RULES, TIMES, 1)], requests).run()
    assert requests.after is not None
    for i, before in enumerate(requests.after.tolist()):
        if before >= 0:
            said = int(requests.input_len[before] + requests.output_len[before] - 1)
            assert record.cached_tokens[i] == said // 64 * 64


def test_of_a_prompt_cut_short_the_rest_is_no_reply() -> None:
    """Blocks of a trace are those of prompts alone: scaled to half, nobody finds more than the half that was read."""
    requests = Requests(
        arrival_s=np.array([0.0, 5.0]), input_len=np.array([640, 640]), output_len=np.array([600, 5]),
        blocks=(tuple(range(10)),) * 2, block_tokens=64,
    ).scaled(input_len=0.5)
    later = replace(requests, input_len=np.array([320, 640]))
    assert Fleet([Pool(RULES, TIMES, 1)], later).run().cached_tokens.tolist() == [0, 320]


@pytest.mark.parametrize(
    ("text", "says"),
    [("5 -1", "must be a time"), ("5s", "must be a time"), ("5s +0", "must be a time"),
     ("5s -1", "of which of the 2 pools"), ("5s -1 of 3", "no pool 3")],
)  # fmt: skip
def test_bad_changes(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_changes(text, 2)


def test_pools_as_they_are_written() -> None:
    first, second, third = parse_servers("2 x tp8-ep8 & tp4@h100 > 3 x dp8-ep8")
    assert (first.count, second.count, third.count) == (2, 1, 3)
    assert (first.role, second.role, third.role) == ("prefill", "prefill", "decode")
    assert second.device is not None and second.device.name.startswith("h100") and first.device is None
    assert parse_changes("3min -1 of 2, 5s +2 of 1", 2) == (Change(5.0, 2, 0), Change(180.0, -1, 1))


def test_what_hand_overs_take_beside_the_link_keeps_nobody_else_waiting() -> None:
    """Ten prompts come at once: each meets its server half a second later, not one after the other."""
    requests = Requests(
        arrival_s=np.zeros(10), input_len=np.full(10, 100), output_len=np.full(10, 5), users=None
    )
    roles: tuple[Role, ...] = ("prefill", "decode")

    def first_tokens(meeting_s: float) -> np.ndarray:
        pools = [Pool(replace(RULES, role=role), TIMES, 1, lambda tokens: 1e-3, meeting_s) for role in roles]
        return Fleet(pools, requests).run().first_s

    later = first_tokens(0.5) - first_tokens(0.0)
    assert np.all(later > 0.4) and np.all(later < 0.6)


@settings(max_examples=40)
@given(
    requests=asked(), router=st.sampled_from(ROUTERS), counts=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    reserved=ROOM_FIRST.filter(lambda tokens: tokens is not None), most=st.sampled_from([1, 3, 64]),
    ranks=st.integers(1, 2), cache=st.sampled_from([1000.0, 2500.0, 1e6]), reserves=st.booleans(),
)  # fmt: skip
def test_room_that_is_taken_first_is_never_more_than_there_is(
    *, requests: Requests, router: str, counts: tuple[int, int], reserved: int, most: int, ranks: int, cache: float,
    reserves: bool,
) -> None:
    """Whoever is served has had room before its prompt was read; nobody waits for ever, caches are empty at the end."""
    first = room_first(reserved, few_sequences=1, few_times=2)
    rules = replace(RULES, cache_tokens=cache, ranks=ranks, most_sequences=most, reserves_reply=reserves)
    read = Pool(replace(rules, role="prefill"), TIMES, counts[0], lambda tokens: 1e-3)
    writes = Pool(replace(rules, role="decode", room_first=first), TIMES, counts[1])
    fleet = Fleet([read, writes], requests, router=router)
    record = fleet.run()
    served = np.array([i not in fleet.refused for i in range(len(requests))])
    assert fleet.finished == len(requests) and np.all(np.isfinite(record.last_s[served]))
    for server in fleet.servers:
        assert server.load == 0 and all(0 <= row[4] <= 1 + 1e-9 for row in server.moments.rows)
        for rank in server.ranks:
            assert rank.load == 0 and not rank.places.here and rank.used == pytest.approx(0.0, abs=1e-6)
    plain = replace(writes, rules=replace(writes.rules, room_first=None))
    if cache > 1e5 and most == 64 and counts[1] * ranks == 1:  # room for all, and nothing to choose
        other = Fleet([read, plain], requests, router=router).run()
        assert record.last_s[served] == pytest.approx(other.last_s[served], abs=1e-9)


def test_a_prompt_is_read_when_the_server_that_writes_has_room() -> None:
    """By hand: a cache for one request; the other's prompt is read once the first reply is written, not meanwhile."""
    requests = Requests(arrival_s=np.zeros(2), input_len=np.array([400, 300]), output_len=np.array([50, 20]))
    reads = Pool(replace(RULES, role="prefill"), TIMES, 1, lambda tokens: 1e-3)
    writes = Pool(replace(RULES, role="decode", cache_tokens=600.0, lag=0), TIMES, 1)
    ends = []
    for first in (None, room_first(100)):
        pools = [reads, replace(writes, rules=replace(writes.rules, room_first=first))]
        ends.append(Fleet(pools, requests).run())
    together = TIMES.own([(400, 0), (112, 0)], 0, 0.0)  # chunks of 512 tokens
    assert ends[0].admitted_s == pytest.approx([0.003, 0.003])
    assert ends[0].first_s[0] == pytest.approx(0.003 + together + 0.001)
    assert ends[1].first_s[0] == pytest.approx(0.003 + TIMES.own([(400, 0)], 0, 0.0) + 0.001)
    assert ends[1].last_s[0] == pytest.approx(
        ends[1].first_s[0] + sum(TIMES.decoding(1, 400 + one, 1) for one in range(1, 50))
    )
    assert ends[1].admitted_s[1] == pytest.approx(ends[1].last_s[0])
    assert ends[1].first_s[1] == pytest.approx(ends[1].last_s[0] + TIMES.own([(300, 0)], 0, 0.0) + 0.001)


@pytest.mark.parametrize(
    ("engine", "tokens"), [("sglang", 512), ("sglang==0.5.6.post2", 512), ("trtllm", None), ("vllm", None)]
)
def test_sglang_takes_room_before_it_reads(engine: str, tokens: int | None) -> None:
    """num_reserved_decode_tokens, and 96 places where 32 sequences may run (0.5.2 and 0.5.23, disaggregation)."""
    served = priced_servers(
        load_model("qwen3-30b-a3b"), load_device("h200"), load_engine(engine), parse_servers("1 x tp2 > 1 x tp2"),
        longest=4096, options=Options(routing="balanced"),
    )
    reads, writes = (pool.rules.room_first for pool in served.pools)
    assert reads is None and (writes.reserved_tokens if writes else None) == tokens
    if writes:
        assert [writes.most(count) for count in (8, 32, 33)] == [24, 96, 33]


def test_a_reply_takes_room_from_whose_prompt_is_being_read() -> None:
    """The first reply fills the cache before the second prompt is there, which then waits as if it had had no room."""
    requests = Requests(arrival_s=np.zeros(2), input_len=np.array([500, 499]), output_len=np.array([60, 60]))
    reads = Pool(replace(RULES, role="prefill"), TIMES, 1, lambda tokens: 0.1)
    writes = Pool(replace(RULES, role="decode", cache_tokens=1000.0, room_first=room_first(0)), TIMES, 1)
    fleet = Fleet([reads, writes], requests)
    record = fleet.run()
    assert record.admitted_s[1] < record.first_s[0] and record.first_s[1] >= record.last_s[0] - 0.03
    assert all(row[4] <= 1 for row in fleet.servers[1].moments.rows) and not record.preemptions.any()


def test_who_comes_from_a_lost_server_takes_the_place_of_who_has_not_come() -> None:
    """Two servers that write: one is lost while its prompt is read; on the other a place leaves no room for that."""
    requests = Requests(arrival_s=np.array([0.0, 0.2]), input_len=np.array([500, 600]), output_len=np.array([20, 20]))
    reads = Pool(replace(RULES, role="prefill"), TIMES, 2, lambda tokens: 0.5 if tokens == 500 else 1.0)
    writes = [
        Pool(replace(RULES, role="decode", cache_tokens=1000.0, room_first=room_first(0)), TIMES, 1) for _ in range(2)
    ]
    fleet = Fleet([reads, *writes], requests, router="round_robin", changes=(Change(0.3, -1, 1),))
    record = fleet.run()
    assert record.first_s[0] == pytest.approx(0.003 + TIMES.own([(500, 0)], 0, 0.0) + 0.5)
    assert record.first_s[1] > record.first_s[0] and np.all(np.isfinite(record.last_s)) and not record.moved.any()
    assert all(row[4] <= 1 for row in fleet.servers[3].moments.rows)
