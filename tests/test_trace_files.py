"""Traces of requests: every kind of file that is read, and what is said of those that cannot be."""

from __future__ import annotations

import gzip
import json
import math
import re
import time
from pathlib import Path

import pandas as pd
import pytest

from tensorcast.errors import InputError
from tensorcast.scheduling.trace_files import read_trace

MOONCAKE = [
    {"timestamp": 3000, "input_length": 1100, "output_length": 7, "hash_ids": [0, 1, 9]},
    {"timestamp": 500, "input_length": 900, "output_length": 52, "hash_ids": [0, 1]},
]


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_mooncake_lines_come_in_order_with_their_blocks(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, MOONCAKE)).encode()))
    found = read_trace(path)
    asked = found.requests
    assert found.kind == "mooncake" and found.skipped == 0 and asked.block_tokens == 512 and not asked.fixed
    assert asked.arrival_s.tolist() == [0.0, 2.5] and asked.input_len.tolist() == [900, 1100]
    assert asked.output_len.tolist() == [52, 7] and asked.blocks == ((0, 1), (0, 1, 9))


def test_bailian_lines_are_seconds_and_blocks_of_sixteen(tmp_path: Path) -> None:
    """As its README.md has them, https://github.com/alibaba-edu/qwen-bailian-usagetraces-anon."""
    lines = [
        {"chat_id": 7, "parent_chat_id": -1, "timestamp": 61.5, "input_length": 40, "output_length": 3, "type": "text",
         "turn": 1, "hash_ids": [4, 5, 6]},
        {"chat_id": 8, "parent_chat_id": 7, "timestamp": 70.0, "input_length": 64, "output_length": 9, "type": "text",
         "turn": 2, "hash_ids": [4, 5, 8, 9]},
    ]  # fmt: skip
    found = read_trace(written(tmp_path, "qwen_traceA_blksz_16.jsonl", "\n".join(map(json.dumps, lines))))
    assert found.kind == "bailian" and found.requests.block_tokens == 16 and not found.requests.fixed
    assert found.requests.arrival_s.tolist() == [0.0, 8.5] and found.requests.blocks == ((4, 5, 6), (4, 5, 8, 9))


@pytest.mark.parametrize(
    "text",
    [
        "arrival_s,input_len,output_len\n1.5,100,20\n4.0,300,5\n",
        # Azure's columns
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,100,20\n2023-11-16 18:15:49.1805900,300,5\n",
        # BurstGPT's
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,100,20,120,x\n7.5,GPT-4,300,5,305,x\n",
        # Vidur's
        "arrived_at,num_prefill_tokens,num_decode_tokens\n0,100,20\n2.5,300,5\n",
        "arrival_ms,isl,osl\n0,100,20\n2500,300,5\n",
    ],
)
def test_tables_of_every_kind(tmp_path: Path, text: str) -> None:
    asked = read_trace(written(tmp_path, "t.csv", text)).requests
    assert asked.arrival_s.tolist() == pytest.approx([0.0, 2.5], abs=1e-6)
    assert asked.input_len.tolist() == [100, 300] and asked.output_len.tolist() == [20, 5]


def test_dates_are_nobody_elses_summer_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hours over the night in which clocks of Berlin skip one."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-03-31 01:30:00,9,9\n2024-03-31 03:30:00+00:00,9,9\n"
        assert read_trace(written(tmp_path, "t.csv", text)).requests.arrival_s.tolist() == [0.0, 7200.0]
        text = text.replace("+00:00", "")
        assert read_trace(written(tmp_path, "t.csv", text)).requests.arrival_s.tolist() == [0.0, 7200.0]
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("mark", [";", "\t"])
def test_columns_may_be_apart_by_other_marks(tmp_path: Path, mark: str) -> None:
    text = "arrival_s,input_len,output_len\n0.0,5,7\n2.5,6,8\n".replace(",", mark)
    assert read_trace(written(tmp_path, "t.csv", text)).requests.arrival_s.tolist() == [0.0, 2.5]


def test_parquet_is_read_as_csv_is(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame({"arrival_s": [0.0, 1.0], "input_len": [5, 6], "output_len": [7, 8]})
    frame.to_parquet(tmp_path / "t.parquet")
    assert read_trace(tmp_path / "t.parquet").requests.output_len.tolist() == [7, 8]


def test_a_detailed_result_of_vllm_bench(tmp_path: Path) -> None:
    lists = {"input_lens": [5, 6, 7], "output_lens": [1, 2, 3], "start_times": [10.0, 10.0, 12.5]}
    result = {"max_concurrency": 2, **lists}
    asked = read_trace(written(tmp_path, "r.json", json.dumps(result))).requests
    assert asked.users == 2 and asked.arrival_s.tolist() == [0.0, 0.0, 2.5] and asked.input_len.tolist() == [5, 6, 7]


def test_results_that_a_client_appends_are_told_apart(tmp_path: Path) -> None:
    """vLLM 0.33.0 (``--append-result``) and SGLang 0.5.23 (always) add a line of JSON per run."""
    lists = {"input_lens": [5, 6], "output_lens": [1, 2]}
    lines = [json.dumps({"max_concurrency": users, "request_rate": math.inf, **lists}) for users in (4, 8)]
    path = written(tmp_path, "sglang.jsonl", "\n".join(lines) + "\n")
    assert read_trace(tmp_path / "sglang.jsonl#2").requests.users == 8
    with pytest.raises(InputError, match=r"holds 2 results; say which, as sglang\.jsonl#1"):
        read_trace(path)


def test_when_a_client_has_sent(tmp_path: Path) -> None:
    """All at once, as many as its users let through; as noted; at random where it only says its rate."""
    lists = {"input_lens": [5] * 400, "output_lens": [2] * 400}
    starts = {"start_times": [3.0 + 0.1 * i for i in range(400)]}
    for said, last in (
        ({"request_rate": "inf", "max_concurrency": 4, **starts}, 0.0),
        ({"request_rate": "inf", "ramp_up_strategy": "linear", **starts}, 39.9),
        ({"request_rate": 10.0, **starts}, 39.9),
        ({"request_rate": math.inf}, 0.0),
    ):
        asked = read_trace(written(tmp_path, "r.json", json.dumps({**lists, **said}))).requests
        assert asked.arrival_s[-1] == pytest.approx(last), said
    drawn = read_trace(written(tmp_path, "r.jsonl", json.dumps({**lists, "request_rate": 10.0}))).requests
    assert drawn.rate == pytest.approx(10.0, rel=0.15)
    with pytest.raises(InputError, match="request_rate 'trace': when requests were sent is not in it"):
        read_trace(written(tmp_path, "r.jsonl", json.dumps({**lists, "request_rate": "trace"})))


def test_a_result_without_its_requests_says_how_to_get_them(tmp_path: Path) -> None:
    text = json.dumps({"request_throughput": 3.0, "total_output_tokens": 5})
    with pytest.raises(InputError, match="has no requests: vllm bench serve writes them with --save-detailed"):
        read_trace(written(tmp_path, "r.json", text))


def test_failed_requests_of_vllm_bench_are_named_or_left_out(tmp_path: Path) -> None:
    lists = {"input_lens": [5, 6], "output_lens": [1, 0], "errors": ["", "Timeout"], "start_times": [1.0, 2.0]}
    path = written(tmp_path, "r.json", json.dumps(lists))
    with pytest.raises(InputError, match="request 2: errors 'Timeout': the request failed"):
        read_trace(path)
    found = read_trace(path, skip_bad=True)
    assert found.skipped == 1 and found.requests.input_len.tolist() == [5]


def test_a_result_of_guidellm(tmp_path: Path) -> None:
    """As guidellm 0.8.1 writes its report: computed fields of each request beside the metrics."""
    ran = [{"request_start_time": 100.5, "prompt_tokens": 10, "output_tokens": 3},
           {"request_start_time": 100.0, "prompt_tokens": 20, "output_tokens": 4}]  # fmt: skip
    benchmarks = [{"requests": {"successful": ran[:one], "errored": [], "incomplete": []}} for one in (1, 2)]
    path = written(tmp_path, "benchmarks.json", json.dumps({"metadata": {}, "benchmarks": benchmarks}, indent=1))
    asked = read_trace(tmp_path / "benchmarks.json#2").requests
    assert asked.arrival_s.tolist() == [0.0, 0.5] and asked.input_len.tolist() == [20, 10]
    with pytest.raises(InputError, match=r"holds 2 benchmarks; say which, as benchmarks.json#1"):
        read_trace(path)
    with pytest.raises(InputError, match=r"benchmarks.json#3: holds benchmarks 1 to 2"):
        read_trace(tmp_path / "benchmarks.json#3")
    for strategy, users, last in (
        ({"type_": "concurrent", "streams": 7}, 7, 0.0), ({"type_": "synchronous"}, 1, 0.0),
        ({"type_": "poisson", "rate": 2.0, "max_concurrency": 9}, 9, 0.5), ({"type_": "throughput"}, None, 0.0),
    ):
        one = {**benchmarks[1], "config": {"strategy": strategy}}
        asked = read_trace(written(tmp_path, "one.json", json.dumps({"benchmarks": [one]}))).requests
        assert asked.users == users and asked.arrival_s[-1] == last and asked.input_len.tolist() == [20, 10]


def test_lines_of_aiperf(tmp_path: Path) -> None:
    """As aiperf 0.13.0 writes ``profile_export.jsonl``."""
    def line(start: int, prompt: int, reply: int, error: str | None = None, phase: str = "profiling") -> str:
        metrics = {"input_sequence_length": {"value": prompt, "unit": "tokens"},
                   "output_sequence_length": {"value": reply, "unit": "tokens"}}  # fmt: skip
        metadata = {"request_start_ns": start, "benchmark_phase": phase}
        return json.dumps({"metadata": metadata, "metrics": metrics, "error": error})

    good = [line(1, 9, 9, phase="warmup"), line(2_000_000_000, 30, 4), line(1_500_000_000, 20, 5)]
    found = read_trace(written(tmp_path, "profile_export.jsonl", "\n".join(good)))
    assert found.kind == "aiperf" and found.requests.fixed and found.requests.arrival_s.tolist() == [0.0, 0.5]
    assert found.requests.input_len.tolist() == [20, 30] and found.requests.output_len.tolist() == [5, 4]
    for kind, users, last in (("concurrency", 8, 0.0), ("poisson", None, 0.5)):
        phases = [{"kind": "warmup", "type": "concurrency"}, {"type": kind, "concurrency": 8}]
        written(tmp_path, "profile_export_aiperf.json", json.dumps({"input_config": {"phases": phases}}))
        asked = read_trace(tmp_path / "profile_export.jsonl").requests
        assert asked.users == users and asked.arrival_s[-1] == last and asked.input_len.tolist() == [20, 30]
    path = written(tmp_path, "bad.jsonl", "\n".join([*good, line(1, 3, 3, "refused")]))
    with pytest.raises(InputError, match="line 4: error 'refused': the request failed"):
        read_trace(path)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.jsonl", json.dumps(MOONCAKE[0]) + "\n{broken\n", "line 2: '{broken' is no JSON"),
        ("t.jsonl", json.dumps({**MOONCAKE[0], "input_length": 0}), "line 1: input_length '0': must be a whole number"),
        ("t.jsonl", json.dumps({"timestamp": 1, "input_length": 3}), "line 1: no output_length"),
        ("t.jsonl", json.dumps({**MOONCAKE[0], "hash_ids": 7}), "line 1: hash_ids 7: must be a list of whole numbers"),
        ("t.jsonl", json.dumps({**MOONCAKE[0], "hash_ids": [0, 1, 2, 3]}), "line 1: hash_ids: are 4, more than 1100"),
        ("t.jsonl", "\n".join([*map(json.dumps, MOONCAKE), "", "{}, {}"]), "line 4: '{}, {}' is no JSON"),
        ("t.jsonl", "[1, 2]", "is one JSON list"),
        ("t.csv", "arrival_s,input_len,output_len\n0,5,5\n1,x,5\n", "row 2: input_len 'x': must be a number"),
        ("t.csv", "arrival_s,input_len,output_len\nsoon,5,5\n", "row 1: arrival_s 'soon': must be a number of seconds"),
        ("t.csv", "arrival_s,prompt\n0,5\n", "no column of input_len"),
        ("t.csv", "arrival_s,input_len,output_len\n", "no row could be read"),
        ("t.csv", "", "is empty"),
        ("t.json", json.dumps({"input_lens": [1], "output_lens": [1, 2]}), "no detailed result of vllm bench"),
        *(("t.json", json.dumps({"input_lens": [1], "output_lens": [2], "max_concurrency": users}),
           rf"max_concurrency {re.escape(repr(str(users)))}: must be a") for users in ([1], "many", -1, 1.5)),
        ("t.json", json.dumps({"benchmarks": 7}), "benchmarks '7': must be a list"),
        ("t.json", json.dumps({"benchmarks": [{"requests": {"successful": 7}}]}), "no list or object where one must"),
        ("t.json", json.dumps({"benchmarks": [{"requests": {"successful": [3]}}]}), "request 1: something in it is no"),
        ("t.jsonl", json.dumps({"metadata": [], "metrics": {}}), "line 1: something in it is no list or object"),
        ("t.csv", '"a\nb",input_len,output_len\n0,5,5\n', "no column of arrival .* it has a b, input_len"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        read_trace(written(tmp_path, name, text))
    assert "\n" not in str(caught.value)


def test_bad_rows_are_counted_where_they_may_be_skipped(tmp_path: Path) -> None:
    path = written(tmp_path, "t.csv", "arrival_s,input_len,output_len\n0,5,5\n1,x,5\n2,7,-1\n3,8,9\n")
    found = read_trace(path, skip_bad=True)
    assert found.skipped == 2 and found.requests.input_len.tolist() == [5, 8]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_trace(tmp_path / "none.csv")
