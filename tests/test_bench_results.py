"""Results of load generators become rows of a table, whoever measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tensorcast as tc
from tensorcast.predict.bench_results import with_results
from tensorcast.predict.csv_table import read_table
from tensorcast.predict.predict import predict


def guidellm(strategy: dict[str, Any]) -> dict[str, Any]:
    """One benchmark of a file that guidellm 0.8.1 wrote against a server of our own, which sent the first of 100 tokens
    after 200 ms and one each 10 ms then, to 4 users: what is read of it."""

    def mean(value: float) -> dict[str, Any]:
        return {"successful": {"mean": value}}

    return {
        "type_": "generative_benchmark", "config": {"strategy": strategy}, "scheduler_metrics": {"requests_made": 24},
        "metrics": {
            "request_totals": {"successful": 24, "errored": 0, "incomplete": 0, "total": 24},
            "time_to_first_token_ms": mean(202.23), "time_per_output_token_ms": mean(11.92),
            "inter_token_latency_ms": mean(10.0), "output_tokens_per_second": mean(333.37),
            "prompt_token_count": mean(165.0), "output_token_count": mean(100.0),
        },
    }  # fmt: skip


def aiperf(*phases: dict[str, Any]) -> dict[str, Any]:
    """The same of aiperf 0.13.0 and the same server."""
    metrics = {
        "request_count": 24.0, "time_to_first_token": 209.83, "inter_token_latency": 10.05,
        "output_token_throughput": 326.16, "input_sequence_length": 158.0, "output_sequence_length": 100.0,
    }
    told = {name: {"unit": "ms", "avg": value} for name, value in metrics.items()}
    return {"schema_version": "1.4", "aiperf_version": "0.13.0", **told, "input_config": {"phases": list(phases)}}


def engine(**load: Any) -> dict[str, Any]:
    """What an engine's own client writes."""
    return {
        "completed": 24, "total_input_tokens": 24 * 165, "total_output_tokens": 2400, "mean_ttft_ms": 202.23,
        "mean_tpot_ms": 10.0, "output_throughput": 333.37, **load,
    }  # fmt: skip


def cells(tmp_path: Path, *results: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of a table of one deployment with these results, in a file of each kind."""
    (tmp_path / "runs.csv").write_text("model,device\nqwen3-8b,h100\n")
    whole = {"benchmarks": list(results)} if "scheduler_metrics" in results[0] else results[0]
    (tmp_path / "result.json").write_text(json.dumps(whole))
    found = with_results(read_table(tmp_path / "runs.csv"), [tmp_path / "result.json"])
    return [{str(name): str(cell) for name, cell in row.items()} for row in found.to_dict("records")]


STEADY = {"concurrency": "4"}


@pytest.mark.parametrize(("result", "load"), [
    (guidellm({"type_": "concurrent", "streams": 4, "max_concurrency": 4}), STEADY),
    (guidellm({"type_": "synchronous"}), {"concurrency": "1"}),
    (guidellm({"type_": "throughput", "max_concurrency": 4}), STEADY),
    (guidellm({"type_": "poisson", "rate": 8.0, "max_concurrency": 10240}),
     {"concurrency": "10240", "request_rate": "8", "burstiness": "1"}),
    (guidellm({"type_": "constant", "rate": 8.0, "max_concurrency": None}), {"request_rate": "8", "burstiness": "inf"}),
    (aiperf({"kind": "warmup", "type": "concurrency", "concurrency": 1},
            {"kind": "profiling", "type": "concurrency", "concurrency": 4}), STEADY),
    (aiperf({"kind": "profiling", "type": "gamma", "rate": 2.5, "smoothness": 0.5}),
     {"request_rate": "2.5", "burstiness": "0.5"}),
    (aiperf({"kind": "profiling", "type": "constant", "rate": 2.5, "concurrency": 8}),
     {"concurrency": "8", "request_rate": "2.5", "burstiness": "inf"}),
    (engine(max_concurrency=4, request_rate="inf", burstiness=1.0), STEADY),
    (engine(max_concurrency=None, request_rate="inf"), {"request_rate": "inf"}),
    (engine(max_concurrency=None, request_rate=2.5, burstiness=0.5), {"request_rate": "2.5", "burstiness": "0.5"}),
])  # fmt: skip
def test_a_load_is_read_as_it_was_sent(tmp_path: Path, result: dict[str, Any], load: dict[str, str]) -> None:
    (row,) = cells(tmp_path, result)
    told = {name: row[name] for name in ("concurrency", "request_rate", "burstiness") if name in row}
    assert told == load
    assert row["requests"] == "24" and row["osl"] == "100" and row["isl"] in ("165", "158")
    assert float(row["measured_ttft_s"]) == pytest.approx(0.2022, rel=0.04)
    assert float(row["measured_tpot_s"]) == pytest.approx(0.010, rel=0.01)
    assert float(row["measured_output_tokens_per_s"]) == pytest.approx(333.37, rel=0.03)


def test_each_benchmark_of_a_sweep_is_a_row(tmp_path: Path) -> None:
    rows = cells(tmp_path, *(guidellm({"type_": "concurrent", "streams": users}) for users in (1, 2, 8)))
    assert [row["concurrency"] for row in rows] == ["1", "2", "8"]


@pytest.mark.parametrize(("result", "says"), [
    (guidellm({"type_": "trace"}), "config.strategy.type_ = 'trace': no steady load: see tensorcast replay"),
    (guidellm({}), "config.strategy.type_ = None: must be a name"),
    (guidellm({"type_": "concurrent"}), "config.strategy.streams = None: must be a number more than 0"),
    (aiperf(), "input_config.phases: 0 were measured, and not one"),
    (aiperf({"kind": "profiling", "type": "fixed_schedule"}), "type = 'fixed_schedule': no steady load"),
    ({**aiperf({"type": "concurrency"}), "time_to_first_token": None}, "time_to_first_token.avg = None: must be"),
    (engine(), "has no max_concurrency and no request_rate"),
    (engine(request_rate="trace"), "came as a trace says"),
    (engine(request_rate=1.0, ramp_up_strategy="linear"), "at a growing rate"),
    (engine(max_concurrency=True), "max_concurrency = True: must be a number more than 0"),
    (engine(request_rate=1.0, burstiness=-1.0), "burstiness = -1.0: must be a number more than 0"),
])  # fmt: skip
def test_a_load_that_is_not_steady_is_refused(tmp_path: Path, result: dict[str, Any], says: str) -> None:
    with pytest.raises(tc.InputError, match=r"--result .*result\.json: ") as told:
        cells(tmp_path, result)
    assert says in str(told.value)


@pytest.mark.parametrize(("column", "times", "told"), [
    ("tp", {"mean_tpot_ms": 3.4, "mean_itl_ms": 10.3}, True), ("tp", {"mean_itl_ms": 10.3}, False), ("tp", {}, False),
    ("mtp_depth", {"mean_tpot_ms": 3.4, "mean_itl_ms": 10.3}, False),
])  # fmt: skip
def test_tokens_that_a_client_did_not_time_are_told(
    tmp_path: Path, column: str, times: dict[str, float], told: bool
) -> None:
    """100 thoughts and 50 words of an SGLang server, 10 ms apart, as the client of vLLM 0.33.0 times them
    (findings/vllm_client_hears_no_thinking.sh)."""
    (tmp_path / "runs.csv").write_text(f"model,device,engine,{column}\ndeepseek-v3,h200,sglang,1\n")
    (tmp_path / "result.json").write_text(json.dumps(engine(max_concurrency=4) | times))
    table = with_results(read_table(tmp_path / "runs.csv"), [tmp_path / "result.json"])
    notes = predict(table).attrs["notes"]
    says = f"--result {tmp_path / 'result.json'}: 3.4 ms per token, but 10.3 between chunks"
    assert [note.partition(": the server")[0] for note in notes] == ([says] if told else [])
