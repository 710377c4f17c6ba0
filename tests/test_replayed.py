"""The best layouts of a comparison under a trace, against replays of the same servers asked for one by one."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tensorcast as tc
from tensorcast.cli import app
from tensorcast.errors import InputError
from tensorcast.scheduling.requests import Length, Requests, drawn
from tensorcast.search.compare import Comparison
from tensorcast.search.replayed import GOODPUT, KEPT_UP, replay_best

LENGTHS = Length(1500, 0.4), Length(150, 0.4)


def sent(rate: float) -> Requests:
    return drawn(200, *LENGTHS, rate=rate)


@pytest.fixture(scope="module")
def compared() -> Comparison:
    return tc.compare("qwen3-8b", device="h100", world_size=4, input_len=1500, output_len=150, ttft_s=1, tpot_s=0.04)


def test_a_layout_is_replayed_as_replay_does_it(compared: Comparison) -> None:
    found = replay_best(compared, sent(20), top=6)
    modes = {one.row["mode"] for one in found.candidates}
    assert modes == {"aggregated", "disaggregated"} and len(found.candidates) == 6
    for one in found.candidates:
        if one.row["mode"] == "aggregated":
            layout = f"{one.row['replicas']:.0f} x {one.row['layout']}"
        else:
            prefill, decode = (one.row["replicas"] * one.row[f"{role}_workers"] for role in ("prefill", "decode"))
            layout = f"{prefill:.0f} x {one.row['prefill_layout']} > {decode:.0f} x {one.row['layout']}"
        chunk = None if one.row["chunk_tokens"] != one.row["chunk_tokens"] else int(one.row["chunk_tokens"])
        alone = tc.replay("qwen3-8b", device="h100", layout=layout, requests=sent(20), ttft_s=1, tpot_s=0.04,
                          prefill_chunk=chunk)  # fmt: skip
        assert one.outcome is not None
        assert one.outcome.summary() == pytest.approx(alone.summary())


def test_those_that_keep_up_come_first_the_quicker_ones_before_the_others(compared: Comparison) -> None:
    for rate in (2, 200):
        found = replay_best(compared, sent(rate), top=6).frame()
        kept_up = found[GOODPUT] >= (1 - KEPT_UP) * found[GOODPUT].max()
        assert kept_up.tolist() == sorted(kept_up, reverse=True)
        assert found[kept_up]["tpot_p99_s"].is_monotonic_increasing
        assert found[~kept_up][GOODPUT].is_monotonic_decreasing


def test_the_largest_rate_of_each(compared: Comparison) -> None:
    found = replay_best(compared, sent(20), top=3, percentile=90).frame()
    assert found[GOODPUT].is_monotonic_decreasing and (found["within_limits"] >= 0.9).all()
    assert found["requests_per_s"].nunique() == 3


def test_layouts_that_read_long_prompts_sooner_are_replayed_too() -> None:
    """At the mean length pools of many ranks, in two stages, serve most; a prompt in ten takes one of them longer than
    the limit, while servers that cut it over eight GPUs keep up."""
    requests = drawn(300, Length(12_000, 1.2, "lognormal"), Length(200, 0.5), rate=3.0, seed=3)
    found = tc.compare(
        "deepseek-v3", device="h200", world_size=32, input_len=12_000, output_len=200, ttft_s=5, tpot_s=0.06
    )
    assert found.best is not None and found.best["prefill_layout"] == "tp1-dp4-ep4-pp2"
    alone = tc.replay(
        "deepseek-v3", device="h200", layout="4 x tp8-ep8", requests=requests, ttft_s=5, tpot_s=0.06
    ).summary()[GOODPUT]
    best, first = (replay_best(found, requests, top=top).candidates[0].numbers[GOODPUT] for top in (12, 1))
    assert best >= 0.95 * alone > 2 * first


def test_what_cannot_be(compared: Comparison) -> None:
    with pytest.raises(InputError, match="at least 1"):
        replay_best(compared, sent(20), top=0)
    with pytest.raises(InputError, match="no layout can be replayed"):
        replay_best(compared, drawn(3, Length(90_000), Length(10), rate=1), top=2)


def test_the_command_ranks_writes_and_tells(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    lines = [f"{i * 0.1},{1000 + 10 * i},{100 + i}" for i in range(60)]
    trace.write_text("\n".join(["arrival_s,input_len,output_len", *lines]) + "\n")
    asked = ["compare", "qwen3-8b", "-d", "h100", "-n", "2", "--tpot", "30ms", "--trace", str(trace)]
    asked += ["--replay-top", "3"]
    told = CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert told.exit_code == 0 and "Replayed, 60 requests" in told.output, told.output
    rows = list(csv.DictReader((tmp_path / "out" / "replayed.csv").open()))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Under the trace" in page and page.count(rows[0]["layout"]) > 1
    assert len(rows) == 3 and all(float(row["requests"]) == 60 for row in rows)
    record = json.loads(CliRunner().invoke(app, [*asked, "--json"], catch_exceptions=False).output)
    assert [row["candidate"] for row in record["replayed"]] == [row["candidate"] for row in rows]
    assert (record["input_len"], record["output_len"]) == (1295, 130)  # the trace's means
    trace.write_text(trace.read_text() + "9,many,3\n")
    broken, left_out = (CliRunner().invoke(app, [*asked, *more]) for more in ([], ["--skip-bad"]))
    assert broken.exit_code == 2 and "row 61: input_len 'many': must be a number; --skip-bad" in broken.output
    assert f"note: 1 rows of {trace} could not be read" in left_out.output and "60 requests" in left_out.output
    alone = CliRunner().invoke(app, ["compare", "qwen3-8b", "-d", "h100", "-n", "2", "--percentile", "99"])
    assert alone.exit_code == 2 and "--percentile 99: is about a --trace" in alone.output
