"""Engines' own rules, by release, each on an example that is worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_scheduling import RULES, TIMES

from tensorcast.deploy.options import Options
from tensorcast.predict.predict import predict
from tensorcast.profiles.scheduler import ExpectedReply
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.scheduling.fleet import Fleet, Pool
from tensorcast.scheduling.pools import parse_servers
from tensorcast.scheduling.record import Record
from tensorcast.scheduling.replay import priced_servers
from tensorcast.scheduling.requests import Requests
from tensorcast.scheduling.room import Expectation
from tensorcast.scheduling.server import Server

ALONE = replace(RULES, alone=True)


def expected(**changed: Any) -> ExpectedReply:
    return ExpectedReply(**{"first": 1.0, "least": 0.01, "steps": 10, "most_tokens": 4096, "spare_steps": 20} | changed)


def served(
    prompts: list[int], replies: list[int], times_s: list[float], fixed: bool = True, **changed: Any
) -> Record:
    requests = Requests(
        arrival_s=np.array(times_s), input_len=np.array(prompts), output_len=np.array(replies), fixed=fixed
    )
    times = replace(TIMES, alone=True)
    return Fleet([Pool(replace(ALONE, **changed), times, 1)], requests).run()


@pytest.mark.parametrize(
    ("found", "cached"), [("scheduled", [0, 384, 384]), ("chunk", [0, 0, 384]), ("prompt", [0, 0, 0])]
)
def test_blocks_are_found_from_when_the_engine_has_them(found: str, cached: list[int]) -> None:
    """Three prompts of 400 tokens that begin alike. By vLLM's rule all are read in one step of 512 tokens. By SGLang's
    that step has the first and 112 tokens of the second, and the third finds in the next one what the first left. In
    steps of 1,200 tokens, by all rules but vLLM's, all three are read whole.
    """
    requests = Requests(
        arrival_s=np.zeros(3), input_len=np.full(3, 400), output_len=np.full(3, 5), block_tokens=16,
        blocks=tuple((*range(24), 100 + i) for i in range(3)),
    )  # fmt: skip
    chunk = 512 if found != "prompt" else 1200
    fleet = Fleet([Pool(replace(RULES, blocks_found=found, chunk_tokens=chunk), TIMES, 1)], requests)
    assert fleet.run().cached_tokens.tolist() == cached


def test_no_step_with_prompts_is_shorter_than_its_launch() -> None:
    """Whatever its tokens: half a second, in which others of the same step are read, too; twice that in a draw; steps
    that are replayed from graphs take as long as their kernels."""
    assert TIMES.prompts is not None
    times = replace(TIMES, prompts=replace(TIMES.prompts, host_s=0.5))
    requests = Requests(arrival_s=np.zeros(2), input_len=np.array([10, 20]), output_len=np.full(2, 5))
    for factor, one in ((1, times), (2, times.scaled(1.0, 2.0))):
        record = Fleet([Pool(RULES, one, 1)], requests).run()
        assert record.first_s.tolist() == pytest.approx([0.003 + 0.5 * factor] * 2)
    captured = replace(TIMES, prompts=replace(TIMES.prompts, host_s=0.5, graph_tokens=30.0))
    assert Fleet([Pool(RULES, captured, 1)], requests).run().first_s.max() < 0.1


def test_who_begins_as_another_waits_for_its_blocks() -> None:
    """Under TensorRT-LLM; the third begins otherwise, and is read with the first."""
    requests = Requests(
        arrival_s=np.zeros(3), input_len=np.array([400, 400, 100]), output_len=np.full(3, 5), block_tokens=16,
        blocks=((*range(24), 100), (*range(24), 101), (*range(200, 206),)),
    )  # fmt: skip
    fleet = Fleet([Pool(replace(RULES, waits_for_blocks=True, chunk_tokens=1200), TIMES, 1)], requests)
    record = fleet.run()
    assert record.cached_tokens.tolist() == [0, 384, 0]
    assert record.first_s[0] == record.first_s[2] == record.admitted_s[1] < record.first_s[1]


@pytest.mark.parametrize("release", ["0.18.0", "0.19.0"])
def test_a_first_chunk_lets_a_prompt_in_until_vllm_0_19(release: str) -> None:
    """The second (600 tokens) has no room beside the first and its reply until that is written. Let in by its first 512
    tokens, it starts over whenever the next chunk finds none, and the first reply waits for its chunks."""
    chunks = load_engine(f"vllm=={release}").scheduler
    assert chunks is not None
    requests = Requests(arrival_s=np.array([0.0, 0.1]), input_len=np.array([300, 600]), output_len=np.array([100, 5]))
    record = Fleet(
        [Pool(replace(RULES, cache_tokens=890.0, admits_chunks=chunks.admits_chunks), TIMES, 1)], requests
    ).run()
    assert (record.preemptions[1] > 5) == (release == "0.18.0") and record.preemptions[0] == 0
    assert (record.others_s[0] > 0.05) == (release == "0.18.0")
    assert record.first_s[1] > record.last_s[0]


@pytest.mark.parametrize("asks_again", [False, True])
def test_who_was_refused_waits_for_one_to_leave(asks_again: bool) -> None:
    """The third (319 tokens) does not fit beside 210 and six tenths of the 150 that the others may still write; six
    steps later, when hardly anything is expected of them, it would. It is asked then only where each step asks."""
    record = served(
        [100, 100, 300], [81, 81, 20], [0.0, 0.0, 0.05], cache_tokens=600.0, expected=expected(), asks_again=asks_again
    )
    assert (record.admitted_s[2] < record.last_s[0] - 0.1) == asks_again
    assert asks_again or record.admitted_s[2] == pytest.approx(record.last_s[0])


@pytest.mark.parametrize(("fixed_whole", "fixed"), [(False, True), (True, False), (True, True)])
def test_replies_of_fixed_length_are_kept_room_for(fixed_whole: bool, fixed: bool) -> None:
    """Two with replies of 300 tokens in a cache of 700: whole, they are written one after the other. Replies that end
    by themselves are not kept room for whole."""
    whole = fixed_whole and fixed
    record = served(
        [100, 100], [300, 300], [0.0, 1.0], fixed, cache_tokens=700.0, expected=expected(fixed_whole=fixed_whole)
    )
    assert (record.admitted_s[1] < record.last_s[0]) != whole
    assert not whole or record.admitted_s[1] == pytest.approx(record.last_s[0])


def test_who_has_written_least_starts_over_and_comes_last() -> None:
    """Two are let in together, of whom the first has the longer prompt; when the cache is full, it starts over under
    SGLang, and the third, which fits, is let in before it; under vLLM the second starts over, ahead of the third."""
    asked: Any = ([300, 200, 290], [200, 200, 5], [0.0, 0.0, 0.3])
    few = expected(first=0.01, most_tokens=50)
    sglang, vllm = (served(*asked, cache_tokens=700.0, expected=one) for one in (few, None))
    assert sglang.preemptions.tolist() == [1, 0, 0] and vllm.preemptions.tolist() == [0, 1, 0]
    assert sglang.last_s[2] < sglang.last_s[1] < sglang.last_s[0]
    assert vllm.admitted_s[2] == pytest.approx(vllm.last_s[0])


def test_what_is_expected_after_one_starts_over() -> None:
    """The other has written 30 of 99 tokens, and would 20 more: half; or 49 of 60, and would 69 of 61: all."""
    one = Expectation(expected())
    one.fall(10)
    assert one.share == pytest.approx(0.01)
    one.start_over(written=30, whole=99, sequences=1)
    assert one.share == 0.5
    one.start_over(written=49, whole=60, sequences=1)
    assert one.share == 1.0
    one.fall(2)
    one.rests()
    assert one.share == 1.0 and one.most(9000.0, 2) == 8192


@pytest.mark.parametrize(
    ("weight", "from_used", "chosen"), [(0.0, 0.0, 1), (3.0, 0.0, 0), (6.0, 0.5, 0), (6.0, 0.9, 1)]
)
def test_who_waits_counts_more_in_the_choice_of_a_rank(weight: float, from_used: float, chosen: int) -> None:
    """Nine run on the first of two ranks; on the other six do and two wait, with 0.8 of its cache used."""
    rules = replace(RULES, ranks=2, cache_tokens=1000.0, queue_weight=weight, queue_from_used=from_used)
    requests = Requests(arrival_s=np.zeros(20), input_len=np.full(20, 10), output_len=np.full(20, 9))
    server = Server(rules, TIMES, Record(requests))
    for rank, running in zip(server.ranks, (9, 6), strict=True):
        rank.decoding = {i: None for i in range(running)}  # type: ignore[misc]
    server.ranks[1].waiting.extend((10, 11))
    server.ranks[1].used = 800.0
    server.put(12, 0.0)
    assert 12 in server.ranks[chosen].waiting


@pytest.mark.parametrize(
    ("engine", "model", "rules"),
    [
        ("sglang", "qwen3-30b-a3b", ("chunk", True, False, False)),
        ("sglang", "gpt-oss-120b", ("chunk", True, True, False)),
        ("sglang==0.5.14", "gpt-oss-120b", ("chunk", False, True, False)),
        ("sglang==0.5.10.post1", "gpt-oss-120b", ("chunk", False, False, False)),
        ("vllm", "gpt-oss-120b", ("scheduled", None, False, False)),
        ("trtllm", "gpt-oss-120b", ("prompt", None, False, True)),
    ],
)  # fmt: skip
def test_rules_are_those_of_the_release(engine: str, model: str, rules: tuple[Any, ...]) -> None:
    found = priced_servers(
        load_model(model), load_device("h200"), load_engine(engine), parse_servers("tp2"), longest=4096,
        options=Options(routing="balanced"),
    ).pools[0].rules  # fmt: skip
    whole = found.expected.fixed_whole if found.expected else None
    assert (found.blocks_found, whole, found.asks_again, found.waits_for_blocks) == rules


@pytest.mark.parametrize("ranks_wait", [False, True])
def test_ranks_that_draft_stand_still_while_another_reads(ranks_wait: bool) -> None:
    """One writes 50 tokens when the other rank's prompt comes: it is read in a step of its own, or beside a token."""
    rules = replace(ALONE, ranks=2, round_robin=True, ranks_wait=ranks_wait)
    requests = Requests(arrival_s=np.array([0.0, 0.1]), input_len=np.array([50, 400]), output_len=np.array([50, 1]))
    fleet = Fleet([Pool(rules, replace(TIMES, alone=True), 1)], requests)
    record = fleet.run()
    assert fleet.servers[0].steps == 1 + 49 + ranks_wait
    wanted = replace(TIMES, alone=True).own([(400, 0)], 0, 0.0) if ranks_wait else 0.0
    assert record.last_s[0] > record.first_s[0] + 49 * 0.01 + wanted


@pytest.mark.parametrize(("depth", "waits"), [(0, False), (1, True)])
def test_sglang_ranks_wait_where_they_draft(depth: int, waits: bool) -> None:
    options = Options(routing="balanced", mtp_depth=depth)
    for layout in ("tp8", "dp8-ep8"):
        rules = priced_servers(
            load_model("deepseek-v3"), load_device("h200"), load_engine("sglang"), parse_servers(layout), longest=4096,
            options=options,
        ).pools[0].rules  # fmt: skip
        assert rules.ranks_wait == waits


def test_data_parallel_ranks_expect_less() -> None:
    """SGLang lowers its schedule_conservativeness to three tenths for attention DP."""
    shares = []
    for layout in ("tp4", "dp4-ep4"):
        rules = priced_servers(
            load_model("qwen3-30b-a3b"), load_device("h200"), load_engine("sglang"), parse_servers(layout),
            longest=4096, options=Options(routing="balanced"),
        ).pools[0].rules  # fmt: skip
        assert rules.expected is not None
        shares.append((float(rules.expected.first), float(rules.expected.least)))
    assert shares == [(0.7, 0.098), pytest.approx((0.21, 0.0294))]


@pytest.mark.parametrize("engine", ["sglang", "sglang==0.5.14"])
def test_a_full_server_runs_as_many_as_the_closed_form_says(engine: str) -> None:
    """More users than there is room for. Before 0.5.23 replies outgrow their room, and some start over."""
    row = {
        "model": "qwen3-235b-a22b", "device": "h100", "engine": engine, "precision": "fp8", "tp": 8, "ep": 8,
        "isl": 1000, "osl": 3000, "concurrency": 500, "length_ratio": 0.6, "rounds": 8,
    }  # fmt: skip
    replayed, steady = predict(pd.DataFrame([row | {"max_num_seqs": 4096}, row])).to_dict("records")
    assert steady["mean_batch"] < 490
    for column in ("tpot_s", "output_tokens_per_s", "mean_batch"):
        assert replayed[column] == pytest.approx(steady[column], rel=0.08), column
