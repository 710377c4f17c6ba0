"""Runs as SGLang's client sends them: lengths that its public runs report, and prompts that the server has read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_scheduling import RULES, TIMES

from tensorcast.errors import InputError
from tensorcast.predict.arrivals import Arrivals, Earlier, as_sent, lengths
from tensorcast.predict.predict import predict
from tensorcast.predict.run_columns import read_run
from tensorcast.scheduling.fleet import Fleet, Pool
from tensorcast.scheduling.requests import Requests

PAGE = (
    ((1000, 1000, 10), (6101, 4220)), ((1000, 1000, 80), (39668, 40805)), ((1000, 1000, 500), (249831, 252662)),
    ((8000, 1000, 10), (41941, 4220)), ((8000, 1000, 80), (300020, 41669)), ((8000, 1000, 320), (1273893, 170000)),
)  # fmt: skip
"""Longest prompt and reply and requests of runs, and "Total input tokens" and "Total generated tokens" of them
(https://github.com/sgl-project/sgl-cookbook docs/autoregressive/Llama/Llama3.1.md at 7b5bd9c)."""

ROW = {"model": "llama-3.1-70b", "device": "a100", "engine": "sglang", "tp": 8, "isl": 8000, "osl": 1000}


@pytest.mark.parametrize(("asked", "reported"), PAGE)
def test_lengths_add_up_to_what_the_client_reported(asked: tuple[int, int, int], reported: tuple[int, int]) -> None:
    isl, osl, count = asked
    prompts, replies = lengths(isl, osl, 0.0, count)
    assert (prompts.sum(), replies.sum()) == reported


def test_prompts_of_earlier_runs_are_kept_as_far_as_both_are_alike() -> None:
    sent = Requests(arrival_s=np.zeros(80), input_len=np.ones(80, np.int64), output_len=np.ones(80, np.int64))
    arrivals = Arrivals(count=80, client="sglang", earlier=(Earlier(8000, 10), Earlier(1000, 40)))
    found = as_sent(sent, arrivals, (8000, 1000), 0.0, 16)
    assert found.kept_len is not None and found.blocks is not None
    short = lengths(1000, 1, 0.0, 40)[0]
    assert np.array_equal(found.kept_len[:10], found.input_len[:10])
    assert np.array_equal(found.kept_len[10:40], np.minimum(short[10:], found.input_len[10:40]))
    assert not found.kept_len[40:].any()
    blocks = [block for own in found.blocks for block in own]
    assert len(set(blocks)) == len(blocks), "prompts of one run have nothing in common"
    alone = as_sent(sent, Arrivals(count=80, client="sglang"), (8000, 1000), 0.0, 16)
    assert alone.kept_len is not None and np.flatnonzero(alone.kept_len).tolist() == [0], "the client tries the server"


@given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 3), st.sampled_from([400, 2000, 100_000]))
def test_what_is_kept_is_found_as_far_as_there_is_room(count: int, kept: int, users: int, room: int) -> None:
    prompts = np.full(count, 160, dtype=np.int64)
    blocks = tuple(tuple(range(10 * k, 10 * k + 10)) for k in range(count))
    requests = Requests(
        arrival_s=np.zeros(count), input_len=prompts, output_len=np.full(count, 4), users=users, blocks=blocks,
        block_tokens=16, kept_len=np.where(np.arange(count) < kept, prompts, 0),
    )
    fleet = Fleet([Pool(replace(RULES, cache_tokens=float(room)), TIMES, 1)], requests)
    (rank,) = fleet.servers[0].ranks
    assert rank.prefix is not None and rank.prefix.free_tokens <= room
    record = fleet.run()
    again = min(kept, count)
    assert np.all(np.isfinite(record.last_s)), "nobody is lost"
    assert not record.cached_tokens[again:].any(), "others' prompts were never read"
    assert np.all(record.cached_tokens[:again] <= 144), "the last token is always read"
    if room == 100_000:
        assert np.all(record.cached_tokens[:again] == 144)
    if again * 160 > room:
        assert record.cached_tokens[0] < 144, "what is longest unused goes first"


def test_rows_of_one_server_are_runs_after_one_another() -> None:
    loads = ({"concurrency": 16, "requests": 80}, {"concurrency": 64, "requests": 320})
    rows = [{**ROW, "length_ratio": 0.0, **load} for load in loads]
    both, alone = predict(pd.DataFrame(rows)), predict(pd.DataFrame(rows[1:]))
    assert both["ttft_s"][1] < 0.5 * alone["ttft_s"][0], "the first 64 prompts are in the cache"
    assert both["assumed"][1].endswith("sent by SGLang's client after 80 of 8000")
    assert alone["assumed"][0].endswith("sent by SGLang's client")
    said = predict(pd.DataFrame([{**rows[1], "sent_before": 80}]))
    assert said["ttft_s"][0] == both["ttft_s"][1]
    other = predict(pd.DataFrame([{**rows[0], "tp": 4}, rows[1]]))
    assert other["ttft_s"][1] == alone["ttft_s"][0], "another server has not read them"
    off = predict(pd.DataFrame([rows[0], {**rows[1], "client": "other"}]))
    steady = predict(pd.DataFrame([{**rows[1], "requests": None, "rounds": 5}]))
    assert off["ttft_s"][1] == steady["ttft_s"][0]


def test_runs_of_others_and_of_equal_lengths_are_as_before() -> None:
    for row in ({**ROW, "engine": "vllm", "length_ratio": 0.0}, {**ROW, "length_ratio": 1.0}):
        assert read_run({**row, "concurrency": 16, "requests": 80}).arrivals is None


@pytest.mark.parametrize("said", ["none of them", "80.5", "1000:", "-1", "0:80", "inf", "1e400"])
def test_what_was_sent_before_is_numbers_of_requests(said: str) -> None:
    with pytest.raises(InputError, match=f"sent_before '{said}'.*as 80, or 1000:80 8000:10"):
        read_run({**ROW, "concurrency": 16, "requests": 80, "length_ratio": 0.0, "sent_before": said})
    with pytest.raises(InputError, match="client 'me': must be sglang or other"):
        read_run({**ROW, "client": "me"})


def test_equal_prompts_that_were_sent_before_are_found() -> None:
    row = {"model": "qwen3-8b", "device": "h100", "engine": "vllm", "isl": 4000, "osl": 100, "requests": 64}
    table = pd.DataFrame([{**row, "concurrency": 32, "sent_before": before} for before in (None, 32, 64)])
    never, half, all_of_them = predict(table)["ttft_s"]
    assert all_of_them < half < never


def test_a_run_that_says_nothing_of_its_requests_has_none_before() -> None:
    with pytest.raises(InputError, match="sent_before 80: needs requests, how many this run sent"):
        read_run({**ROW, "concurrency": 16, "sent_before": 80})
    with pytest.raises(InputError, match="sent_before 80: needs no prefix_cached and no images beside"):
        read_run({**ROW, "concurrency": 16, "requests": 80, "sent_before": 80, "prefix_cached": 100})


def test_the_shipped_pages_are_listed_as_they_were_run() -> None:
    """Requests of a page grow with users, so that a run's first prompts are those of the one before it."""
    table = pd.read_csv(Path(__file__).parent.parent / "benchmarks/cookbook_pages.csv")
    names = ["model", "device", "release", "tp", "ep", "isl", "osl"]
    for _, runs in table.groupby(names, sort=False):
        assert runs["requests"].is_monotonic_increasing
