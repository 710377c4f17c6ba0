"""Pipelines under load: replays against stages told one by one, the closed form against replays, and what must hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import naive_pipeline
import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_scheduling import RULES, TIMES, asked

from tensorcast.predict.predict import predict
from tensorcast.predict.run_columns import read_run
from tensorcast.predict.serve_runs import serve
from tensorcast.scheduling.fleet import Fleet, Pool
from tensorcast.scheduling.requests import Requests
from tensorcast.scheduling.rules import Role
from tensorcast.serving.curves import lasting, unevenly

KINDS: dict[str, dict[str, Any]] = {
    "prompts beside replies": {},
    "prompts alone": {"alone": True},
    "small chunks": {"chunk_tokens": 100},
    "few at a time": {"most_sequences": 5, "chunk_tokens": 300},
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(requests=asked(), stages=st.integers(2, 4))
def test_micro_batches_are_back_when_stages_told_one_by_one_say_so(
    kind: str, requests: Requests, stages: int
) -> None:
    """First tokens and ends; where all decode, micro-batches are taken to be back at even times."""
    rules = replace(RULES, lag=0, stages=stages, **KINDS[kind])
    times = replace(TIMES, alone=rules.alone)
    record = Fleet([Pool(rules, times, 1)], requests).run()
    wanted = naive_pipeline.NaivePipeline(requests, rules, times).simulate()
    every = range(len(requests))
    first, last = (np.array([of[i] for i in every]) for of in (wanted.first_s, wanted.last_s))
    round_s = stages * times.decoding(len(requests), 1000.0, len(requests))
    assert record.last_s.max() == pytest.approx(last.max(), rel=0.04, abs=4 * round_s)
    assert np.median(abs(record.first_s - first)) < 0.02 * last.max() + round_s
    assert np.median(abs(record.last_s - last)) < 0.02 * last.max() + round_s


def alone(input_len: int, output_len: int, **rules: Any) -> tuple[float, float]:
    """First token and end of one request on an idle server."""
    request = Requests(arrival_s=np.zeros(1), input_len=np.array([input_len]), output_len=np.array([output_len]))
    record = Fleet([Pool(replace(RULES, first_token_s=0.0, **rules), TIMES, 1)], request).run()
    return float(record.first_s[0]), float(record.last_s[0])


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("chunks", [1, 3, 8])
def test_one_prompt_passes_the_stages_chunk_behind_chunk(stages: int, chunks: int) -> None:
    """The last chunk has left the last stage after as many turns as there are chunks before it and stages."""
    first, last = alone(512 * chunks, 11, stages=stages, lag=0)
    each = [TIMES.own([(512, 512 * i)], 0, 0.0) for i in range(chunks)]  # each is longer than the one before it
    assert first == pytest.approx(sum(each[:-1]) + stages * each[-1])
    assert last - first == pytest.approx(10 * stages * TIMES.decoding(1, 512 * chunks + 5.5, 1), rel=1e-3)


@settings(max_examples=30)
@given(
    requests=asked(), stages=st.integers(2, 4), pooled=st.booleans(),
    changed=st.fixed_dictionaries({
        "ranks": st.integers(1, 2), "cache_tokens": st.sampled_from([1000.0, 3000.0, 1e6]), "alone": st.booleans(),
        "reserves_reply": st.booleans(), "tokens_per_step": st.sampled_from([1.0, 1.8]), "lag": st.integers(0, 1),
        "admits_chunks": st.booleans(), "chunk_tokens": st.sampled_from([64, 512]),
    }),
)  # fmt: skip
def test_nothing_is_lost_in_a_pipeline(
    requests: Requests, stages: int, pooled: bool, changed: dict[str, Any]
) -> None:
    """Every request ends once; caches are empty at the end and held no more than they can; tokens are written once. By
    no engine's rules prompts run alone and are let in by their first chunk: in stages such starve one another."""
    assume(not (changed["alone"] and changed["admits_chunks"]))
    rules = replace(RULES, stages=stages, **changed, verify=np.ceil(changed["tokens_per_step"]))
    times = replace(TIMES, alone=rules.alone, tokens_each=rules.verify)
    roles: tuple[Role, ...] = ("prefill", "decode") if pooled else ("both",)
    fleet = Fleet([Pool(replace(rules, role=role), times, 1, lambda tokens: 1e-3) for role in roles], requests)
    record = fleet.run()
    assert fleet.finished == len(requests) and not fleet.refused
    assert np.all(record.last_s >= record.first_s) and np.all(record.first_s >= record.sent_s)
    for server in fleet.servers:
        for rank in server.ranks:
            assert rank.load == 0 and rank.used == pytest.approx(0.0, abs=1e-6)
        assert all(-1e-9 <= row[4] <= 1 + 1e-9 for row in server.moments.rows)
    others = int((requests.output_len - 1).sum())
    if changed["tokens_per_step"] == 1.0:
        assert others - int(record.preemptions.sum()) <= sum(record.gaps) <= others


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("count", [1, 2, 4, 9, 30, 200])
def test_the_largest_micro_batch_is_that_of_a_multinomial_draw(stages: int, count: int) -> None:
    drawn = np.random.default_rng(0).multinomial(count, np.full(stages, 1 / stages), 20_000).max(axis=1).mean()
    found = float(unevenly(np.array(float(count)), float(stages), 0.0)) / stages
    assert found == pytest.approx(drawn, rel=0.15)
    assert unevenly(np.array(2.0), float(stages), lasting(8.0)) == 2 * stages  # two prompts in one step stay in one
    assert lasting(0.5) == 0 and lasting(0.5, reads=False) == np.inf


ROW: dict[str, Any] = {"device": "h100", "length_ratio": 0.6, "rounds": 30}
LOADS = [
    {"model": "llama-3.1-8b", "engine": "vllm", "tp": 1, "pp": 4, "isl": 8000, "osl": 256, "concurrency": 57},
    {"model": "qwen3-30b-a3b", "engine": "vllm", "tp": 1, "pp": 4, "isl": 9283, "osl": 1001, "concurrency": 16},
    {"model": "mixtral-8x7b", "engine": "sglang", "tp": 2, "pp": 4, "isl": 7507, "osl": 336, "concurrency": 4},
    {"model": "qwen3-30b-a3b", "engine": "sglang", "tp": 1, "pp": 2, "isl": 6478, "osl": 1393, "concurrency": 26},
    {"model": "mixtral-8x7b", "engine": "trtllm", "tp": 2, "pp": 2, "isl": 14349, "osl": 1031, "concurrency": 95},
    {"model": "mixtral-8x7b", "engine": "trtllm", "tp": 4, "pp": 4, "isl": 318, "osl": 943, "concurrency": 230},
]


def test_the_closed_form_is_near_replays_of_pipelines() -> None:
    """Of long loops, in which who began together has come apart."""
    table = pd.DataFrame([{**ROW, **load} for load in LOADS])
    steady, replayed = predict(table), predict(table.assign(max_num_seqs=4096))
    for column in ("tpot_s", "output_tokens_per_s"):
        off = abs(steady[column].astype(float) / replayed[column].astype(float) - 1)
        assert off.median() < 0.04 and off.max() < 0.12, column


def test_stages_read_one_long_prompt_as_much_faster_as_was_published() -> None:
    """DeepSeek-V3.1 on H20 under SGLang, chunks of 12,288 tokens: 3.31 times as fast on four stages of eight GPUs as on
    eight GPUs (lmsys.org/blog/2026-01-15-chunked-pipeline, which adapts its chunks and names no length)."""
    row = {
        "model": "deepseek-v3", "device": "h20", "engine": "sglang", "tp": 8, "isl": 131072, "osl": 2, "concurrency": 1,
        "chunk_tokens": 12288, "memory_fraction": 0.97,
    }  # fmt: skip
    alone_s, staged_s = predict(pd.DataFrame([row | {"pp": 1}, row | {"pp": 4}]))["ttft_s"].astype(float)
    assert alone_s / staged_s == pytest.approx(3.31, rel=0.15)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_more_users_of_a_pipeline_write_no_less_and_never_more_than_its_stages_read(engine: str) -> None:
    """Prompts per second approach those of a stage that reads all the time, once enough of them wait."""
    users = [1, 2, 3, 4, 6, 8, 16, 32, 64, 128, 256, 512, 1024]
    row = {"model": "llama-3.1-8b", "device": "h100", "engine": engine, "tp": 1, "isl": 8000, "osl": 16}
    rates, most = dict[int, Any](), dict[int, float]()
    for pp in (1, 4):
        runs = serve([read_run({**row, "pp": pp, "concurrency": n}) for n in users])
        rates[pp] = np.array([float(run.output_tokens_per_s) for run in runs]) / 16
        most[pp] = pp / float(runs[0].prefill_step_s)  # a step passes all stages, each of which has it for a part of it
        assert np.all(np.diff(rates[pp]) > -1e-3 * rates[pp][1:])
        assert 0.7 * most[pp] < rates[pp][-1] < most[pp]
    assert rates[4][-1] > 3 * rates[1][-1]
