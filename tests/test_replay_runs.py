"""Rows of ``predict`` that say a rate, a burst or a limit of sequences: replayed, as ``replay`` does it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

import tensorcast as tc
from tensorcast.errors import InputError
from tensorcast.predict.arrivals import BLOCK, Arrivals
from tensorcast.predict.predict import predict
from tensorcast.predict.run_columns import Run, read_run
from tensorcast.profiles.store import load_engine
from tensorcast.scheduling.requests import Length, drawn

CELLS = {"model": "qwen3-8b", "device": "h100", "engine": "vllm", "tp": 1, "isl": 1024, "osl": 128}


def read(**cells: object) -> Run:
    return read_run({**CELLS, **cells})


def rows(*cells: dict[str, object]) -> list[dict[str, Any]]:
    found = predict(pd.DataFrame([CELLS | one for one in cells])).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in found]


def test_a_row_is_what_replay_finds() -> None:
    found, = rows({"request_rate": 6.0, "requests": 200, "length_ratio": 0.8})
    sent = drawn(200, Length(1024 * 0.9, 1 / 9), Length(128 * 0.9, 1 / 9), rate=6.0)
    alone = tc.replay("qwen3-8b", device="h100", layout="tp1", engine="vllm", requests=sent).summary()
    for column, name in (("ttft_s", "ttft_mean_s"), ("tpot_s", "tpot_mean_s"), ("output_tokens_per_s",) * 2):
        assert found[column] == pytest.approx(alone[name], rel=0.01)  # tables of steps reach a rounder length
    assert found["tpot_low_s"] < found["tpot_s"] < found["tpot_high_s"]


def test_one_request_at_a_time_is_the_steady_state_of_one_user() -> None:
    """But for the steps under way that a request waits for under load: an idle server begins at once."""
    replayed, steady = rows({"request_rate": 0.01, "requests": 20}, {"concurrency": 1})
    waited = load_engine("vllm").arrival_wait_steps * steady["decode_step_s"]
    assert replayed["ttft_s"] == pytest.approx(steady["ttft_s"] - waited, rel=0.05)
    assert replayed["tpot_s"] == pytest.approx(steady["tpot_s"], rel=0.02)


def test_faster_arrivals_and_bursts_take_longer() -> None:
    slow, fast, burst = rows(
        {"request_rate": 2, "requests": 200}, {"request_rate": 12, "requests": 200}, {"requests": 200}
    )
    assert slow["tpot_s"] < fast["tpot_s"] and slow["ttft_s"] < fast["ttft_s"] < burst["ttft_s"]
    assert burst["output_tokens_per_s"] > fast["output_tokens_per_s"] > slow["output_tokens_per_s"]


def test_evenly_spaced_requests_wait_for_less() -> None:
    every: list[dict[str, object]] = [
        {"request_rate": 12, "requests": 300, "burstiness": shape} for shape in ("inf", 1e6, 1, 0.2)
    ]
    even, nearly, poisson, bursts = (one["ttft_s"] for one in rows(*every))
    assert even == pytest.approx(nearly, rel=0.01) and even < poisson < bursts


LOOPS = [
    ("qwen3-32b", "h100", 4, 4096, 128, 128), ("qwen3-32b", "h100", 8, 2048, 512, 64),
    ("qwen3-30b-a3b", "h200", 2, 1024, 512, 64), ("gpt-oss-120b", "h200", 2, 8192, 256, 32),
]  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS, ids=str)
@pytest.mark.parametrize("engine", ["sglang", "vllm", "trtllm"])
def test_a_long_closed_loop_is_what_the_closed_form_says(engine: str, loop: tuple[Any, ...]) -> None:
    """Also where prompts stop all replies and take most of the time."""
    cells = dict(zip(("model", "device", "tp", "isl", "osl", "concurrency"), loop, strict=True))
    cells |= {"engine": engine, "length_ratio": 0.8, "rounds": 30}
    replayed, steady = rows(cells | {"max_num_seqs": 1024}, cells)
    assert replayed["tpot_s"] == pytest.approx(steady["tpot_s"], rel=0.1)
    assert replayed["output_tokens_per_s"] == pytest.approx(steady["output_tokens_per_s"], rel=0.1)


def loop(model: str, depth: int, users: int, ratio: float, **cells: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """Data-parallel ranks, under SGLang if not told otherwise, replayed and in closed form."""
    row: dict[str, object] = {
        "model": model, "device": "h200", "engine": "sglang", "tp": 1, "dp": 8, "ep": 8, "isl": 2000, "osl": 500,
        "concurrency": users, "length_ratio": ratio, "rounds": 20, "mtp_depth": depth,
    }  # fmt: skip
    replayed, steady = rows(row | cells | {"max_num_seqs": 6 if depth else 1024}, row | cells)
    return replayed, steady


@pytest.mark.parametrize(("depth", "users", "ratio"), [
    (0, 16, 0.8), (0, 64, 0.8), (0, 512, 0.8), (0, 512, 1.0), (2, 16, 0.8), (2, 48, 0.8), (2, 48, 1.0),
])  # fmt: skip
def test_ranks_that_begin_together_read_together(depth: int, users: int, ratio: float) -> None:
    """Under SGLang, where others' replies go on meanwhile unless steps draft: the longer the more alike replies are."""
    replayed, steady = loop("deepseek-v3" if depth else "qwen3-235b-a22b-fp8", depth, users, ratio)
    assert replayed["tpot_s"] == pytest.approx(steady["tpot_s"], rel=0.1)
    assert replayed["output_tokens_per_s"] == pytest.approx(steady["output_tokens_per_s"], rel=0.1)


@pytest.mark.parametrize("engine", ["vllm", "trtllm"])
@pytest.mark.parametrize("ratio", [0.8, 1.0])
def test_ranks_whose_prompts_ride_along_do_so_too(engine: str, ratio: float) -> None:
    replayed, steady = loop("qwen3-235b-a22b-fp8", 0, 256, ratio, engine=engine, isl=4000, osl=1000)
    assert replayed["tpot_s"] == pytest.approx(steady["tpot_s"], rel=0.2)
    assert replayed["output_tokens_per_s"] == pytest.approx(steady["output_tokens_per_s"], rel=0.2)


@pytest.mark.parametrize("layout", [{}, {"tp": 8, "dp": 1}], ids=["ranks", "one"])
def test_prompts_alone_may_take_most_steps(layout: dict[str, object]) -> None:
    """Nobody's reply ends while they are read: however long that takes, all users' sequences run."""
    replayed, steady = loop("qwen3-235b-a22b-fp8", 0, 128, 0.8, isl=16000, osl=64, **layout)
    assert steady["mean_batch"] == pytest.approx(replayed["mean_batch"], rel=0.1)
    assert replayed["tpot_s"] == pytest.approx(steady["tpot_s"], rel=0.2)
    assert replayed["output_tokens_per_s"] == pytest.approx(steady["output_tokens_per_s"], rel=0.15)


def test_users_whose_replies_fill_the_cache_are_replayed() -> None:
    """Under vLLM, where they start over: their tokens come more slowly than at the mean. Few of them, replies that
    hardly grow, and engines that keep room for replies are served steadily."""
    cells: dict[str, object] = {"isl": 1024, "osl": 2048, "concurrency": 400, "rounds": 3}
    some: list[dict[str, object]] = [{"isl": 8192, "osl": 256}, {"engine": "trtllm"}, {"concurrency": 50}]
    full, *others = rows(cells, *(cells | one for one in some))
    assert "replies fill the cache: replayed" in full["assumed"] and math.isnan(full["decode_step_s"])
    assert not any("replayed" in one["assumed"] for one in others)
    asked, = rows(cells | {"max_num_seqs": 1024})
    assert all(full[name] == pytest.approx(asked[name]) for name in ("ttft_s", "tpot_s", "output_tokens_per_s"))
    many, = rows(cells | {"concurrency": 4000, "rounds": 10})
    assert many["tpot_s"] > full["tpot_s"] and many["ttft_s"] > full["ttft_s"]


def test_steps_padded_to_few_graphs_take_longer() -> None:
    burst: dict[str, object] = {"requests": 40, "engine": "trtllm"}
    plain, listed, zero = rows(burst, burst | {"graph_sizes": "[8, 256]"}, burst | {"graph_sizes": "0 8"})
    assert plain["output_tokens_per_s"] > 1.01 * listed["output_tokens_per_s"]
    assert "graph_sizes 0: must be at least 1" in zero["problem"]


def test_no_more_sequences_run_than_are_allowed() -> None:
    few, many = rows({"concurrency": 32, "max_num_seqs": 4}, {"concurrency": 32, "max_num_seqs": 64})
    assert few["mean_batch"] <= 4 < many["mean_batch"]
    assert few["tpot_s"] < many["tpot_s"] and few["ttft_s"] > 10 * many["ttft_s"]


def test_users_in_a_closed_loop_are_served_steadily() -> None:
    """Replayed, users whose replies are equally long would stay in step, which measured ones do not."""
    for rate in ({}, {"request_rate": "inf"}):
        run = read(concurrency=16, requests=160, **rate)
        assert run.arrivals is None and run.rounds == 10
    burst = read(concurrency=64, requests=64)
    assert burst.arrivals == Arrivals(count=64, users=64) and math.isinf(burst.arrivals.rate)


@pytest.mark.parametrize(("cells", "words"), [
    ({"request_rate": 0}, "request_rate 0: must be more than 0"), ({"requests": 0}, "requests 0"),
    ({"requests": 2.5}, "requests 2.5: must be a whole number"), ({"max_num_seqs": 0}, "max_num_seqs 0"),
    ({"request_rate": 1, "burstiness": 0}, "burstiness 0: must be more than 0"),
    ({"burstiness": 0.5}, "burstiness 0.5: is of requests that come at a request_rate"),
    ({"request_rate": "inf", "requests": 9, "burstiness": 2}, "burstiness 2: is of requests that come at"),
    ({"requests": 9, "graph_sizes": "1, 2, many"}, "graph_sizes '1, 2, many': must be whole numbers of sequences"),
    ({"request_rate": "-inf"}, "request_rate '-inf': must be a finite number"),
    ({"request_rate": "fast"}, "request_rate 'fast': must be a number"),
])
def test_what_cannot_be_is_one_line(cells: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words.replace(".", r"\.")):
        read(**cells)


def test_cached_beginnings_are_shared_blocks() -> None:
    sent = Arrivals(count=50).requests(1000, 10, length_ratio=0.5, rounds=10, prefix_cached=640)
    assert sent.blocks is not None and sent.block_tokens == BLOCK
    shared = 640 // BLOCK
    common = set.intersection(*map(set, sent.blocks))
    assert common == set(range(min(shared, int(sent.input_len.min()) // BLOCK)))
    assert [len(one) for one in sent.blocks] == (sent.input_len // BLOCK).tolist()
    own = [set(one) - set(range(shared)) for one in sent.blocks]
    assert len(set().union(*own)) == sum(map(len, own)) == int(np.maximum(sent.input_len // BLOCK - shared, 0).sum())


def test_cached_beginnings_shorten_first_tokens() -> None:
    none, most = rows({"request_rate": 4, "requests": 100}, {"request_rate": 4, "requests": 100, "prefix_cached": 960})
    assert most["ttft_s"] < 0.7 * none["ttft_s"]


def test_no_more_run_than_the_engine_lets_unasked() -> None:
    """SGLang's 48 requests with drafts, over all ranks: in closed form as in a replay that is told 48; without drafts
    all run."""
    row = {"model": "deepseek-v3", "device": "h200", "engine": "sglang", "tp": "8", "isl": "512", "osl": "128",
           "concurrency": "96"}  # fmt: skip
    told = {"max_num_seqs": "48", "requests": "960", "mtp_depth": "1"}
    found = predict(pd.DataFrame([{**row, "mtp_depth": "1"}, {**row, **told}, {**row, "mtp_depth": "0"}]).fillna(""))
    assert (found["problem"] == "").all()
    batches = found["mean_batch"].astype(float)
    assert 35 < batches[1] < 48 == batches[0] and batches[2] > 60  # a replay's: in the mean of the whole run
    for name in ("tpot_s", "output_tokens_per_s", "ttft_s"):
        assert found[name][0] == pytest.approx(found[name][1], rel=0.15)
