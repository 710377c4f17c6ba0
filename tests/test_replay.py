"""``tensorcast replay`` and ``tc.replay``: what a user types and reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

import tensorcast as tc
from tensorcast.cli import app
from tensorcast.report.replay.files import _busy
from tensorcast.scheduling.requests import Length, drawn

BASE = ["replay", "qwen3-30b-a3b", "-d", "h100"]
DRAWN = ["--rate", "8", "-r", "60", "-i", "800", "--output-len", "60", "--spread", "0.5"]


def run(*arguments: str) -> Any:
    layout = [] if "--layout" in arguments else ["--layout", "tp2-ep2"]
    return CliRunner().invoke(app, [*BASE, *layout, *arguments])


def test_words_json_and_files_say_the_same(tmp_path: Path) -> None:
    limits = ["--ttft", "300ms", "--tpot", "20ms"]
    said = run(*DRAWN, *limits)
    assert said.exit_code == 0, said.output
    assert "60 of 60 requests served" in said.output
    assert "TTFT 300 ms, TPOT 20.0 ms" in " ".join(said.output.split())
    assert all(len(line) <= 80 for line in said.output.splitlines())
    document = json.loads(run(*DRAWN, *limits, "--json", "--out", str(tmp_path)).output)
    found = tc.replay(
        "qwen3-30b-a3b", device="h100", layout="tp2-ep2", ttft_s=0.3, tpot_s=0.02,
        requests=drawn(60, Length(800, 0.5), Length(60, 0.5), rate=8.0),
    )  # fmt: skip
    for name, value in found.summary().items():
        assert document[name] == pytest.approx(value), name
    frame = pd.read_csv(tmp_path / "requests.csv")
    assert frame["ttft_s"].mean() == pytest.approx(document["ttft_mean_s"])
    assert frame["within_limits"].mean() == pytest.approx(document["within_limits"])
    assert json.loads((tmp_path / "summary.json").read_text())["layout"] == "tp2-dp1-ep2"
    assert (tmp_path / "replay.png").stat().st_size > 10_000
    kept = pd.read_parquet(tmp_path / "requests.parquet")
    pd.testing.assert_frame_equal(kept, frame.drop(columns="request"), check_dtype=False, check_index_type=False,
                                  check_names=False, rtol=1e-12)  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64," in page and page.count("<table>") == 4 and "P99.9" in page
    spans = pd.DataFrame(json.loads((tmp_path / "trace.json").read_text())["traceEvents"]).query("cat == 'request'")
    ends = spans.pivot_table(index=["id", "name"], columns="ph", values="ts", sort=False)
    took = (ends["e"] - ends["b"]).unstack() / 1e6
    assert len(took) == len(frame) and (took >= 0).all(axis=None)
    assert took["request"].to_numpy() == pytest.approx(frame["request_s"].to_numpy(), abs=1e-5)
    assert took[["queue", "prompt"]].sum(axis=1).to_numpy() == pytest.approx(frame["ttft_s"].to_numpy(), abs=1e-5)


def test_the_found_rate_keeps_the_limits() -> None:
    asked = ["-r", "60", "-i", "800", "--output-len", "60", "--ttft", "300ms", "--percentile", "90"]
    document = json.loads(run(*asked, "--find-rate", "--json").output)
    assert document["within_limits"] >= 0.9 and document["requests_per_s"] > 1
    both = run(*asked, "--find-rate", "--json", "--layout", "tp2-ep2, tp2")  # rows say the rate that was found
    for row in json.loads(both.output)["replays"]:
        assert row["within_limits"] >= 0.9 and row["rate"] > row["requests_per_s"]
    assert document["sent_per_s"] > document["requests_per_s"]
    said = " ".join(run(*asked, "--find-rate").output.split())
    assert f"note: {document['sent_per_s']:.3g} requests per second is the largest rate at which 90 %" in said
    assert f"sent at {document['sent_per_s']:.3g}" in said
    assert "60 requests at" in said and "too few to tell a rate that can be kept up" in said


def test_the_page_says_when_servers_were_there(tmp_path: Path) -> None:
    asked = ["--rate", "8", "-r", "60", "-i", "500", "--output-len", "30", "--layout", "2 x tp2-ep2"]
    assert run(*asked, "--workers", "2s -1, 3s +1", "--out", str(tmp_path)).exit_code == 0
    page = (tmp_path / "report.html").read_text()
    assert all(f">{said}</td>" in page for said in ("always", "until 2 s", "from 3 s"))


def test_how_busy_servers_are_over_time_is_their_share_in_the_mean() -> None:
    found = tc.replay(
        "qwen3-30b-a3b", device="h100", layout="2 x tp2", requests=drawn(100, Length(500), Length(60), rate=3.0)
    )
    middles, busy = _busy(found, found.seconds)
    assert 0.2 < found.summary()["busy_share"] < 0.8 and middles[-1] < found.seconds
    assert busy.mean() == pytest.approx(found.summary()["busy_share"], abs=0.03)


def test_requests_too_long_to_be_served_are_said_where_no_rate_is_found(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,input_len,output_len\n0,500,10\n1,900000,10\n")
    found = run("--trace", str(path), "--find-rate", "--ttft", "1s")
    assert "only 50.0 % of the requests keep the limits, 99 % are asked for; 1 of 2 are longer than any" in found.output


def test_a_trace_at_another_rate(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,input_len,output_len\n" + "".join(f"{i},500,{20 + i}\n" for i in range(20)))
    slow, fast = (json.loads(run("--trace", str(path), "--json", *more).output) for more in ((), ("--rate", "10")))
    assert slow["duration_s"] > 19 > 5 > fast["duration_s"] and slow["served"] == fast["served"] == 20
    together = json.loads(run("--trace", str(path), "--json", "--rate", "inf").output)
    assert together["duration_s"] < fast["duration_s"] and together["served"] == 20


def test_draws_say_where_percentiles_lie() -> None:
    said = run(*DRAWN, "--draws", "3").output.replace("\xa0", " ").splitlines()
    at = next(i for i, line in enumerate(said) if line.startswith("time per output token"))
    low, middle, high = (re.findall(r"[\d.]+", said[i].replace("80 %", ""))[0] for i in (at + 1, at, at + 2))
    assert "80 % from" in said[at + 1] and float(low) < float(middle) < float(high)


def test_what_is_left_without_a_server_is_said() -> None:
    """Prompts that nobody takes over keep their own servers busy, after the last token that a user gets as well."""
    assert "0 of 60 requests served; no server was left" in run(*DRAWN, "--workers", "0s -1").output
    late = " ".join(run(*DRAWN, "--workers", "900s +1").output.split())
    assert "workers '900s +1': nothing changes from 900 s on, as the last reply ends at" in late
    found = json.loads(run(*DRAWN, "--layout", "tp2-ep2 > tp2-ep2", "--workers", "1s -1 of 2", "--json").output)
    assert found["unserved"] > 0 and all(0 < server["busy_share"] <= 1 for server in found["servers"])


def test_what_it_costs() -> None:
    found = json.loads(run(*DRAWN, "--ttft", "1s", "--usd-per-gpu-hour", "3.6", "--json").output)
    assert found["usd_per_million_output_tokens"] == pytest.approx(2 * 1e-3 * 1e6 / found["output_tokens_per_s"])
    assert found["goodput_requests_per_usd"] == pytest.approx(found["goodput_requests_per_s"] / 2e-3)
    assert "US dollars per million output tokens at 3.6 per GPU hour" in " ".join(
        run(*DRAWN, "--usd-per-gpu-hour", "3.6").output.split()
    )


def test_conversations_wait_and_keep_what_was_said() -> None:
    asked = ["--users", "4", "-r", "6", "--turns", "3", "-i", "300", "--output-len", "40", "--shared-len", "640"]
    at_once, later = (json.loads(run(*asked, "--json", *more).output) for more in ((), ("--think", "20s")))
    assert at_once["served"] == later["served"] == 18
    assert at_once["cache_hit_share"] > 0.5 and later["duration_s"] > at_once["duration_s"] + 20


def test_a_sweep_is_its_replays_one_by_one(tmp_path: Path) -> None:
    asked = ["-r", "40", "-i", "500", "--output-len", "30", "--law", "lognormal", "--spread", "0.5", "--seed", "1"]
    rows = json.loads(run(*asked, "--rate", "4,16,inf", "--json", "--out", str(tmp_path)).output)["replays"]
    for rate, row in zip(("4", "16", "inf"), rows, strict=True):
        alone = json.loads(run(*asked, "--rate", rate, "--json").output)
        assert {name: row[name] for name in alone if name in row} == {n: v for n, v in alone.items() if n in row}
    assert pd.read_csv(tmp_path / "sweep.csv")["ttft_p99_s"].tolist() == [row["ttft_p99_s"] for row in rows]
    said = run(*asked, "--rate", "4,16,inf").output
    assert "all at once" in said and all(len(line) <= 80 for line in said.splitlines())
    unfit = " ".join(run(*asked, "--rate", "4,16", "--layout", "tp2-ep2,tp3").output.split())
    assert unfit.count("note: tp3 was not replayed: ") == 1


def test_requests_beyond_a_limit_are_named_with_their_cause(tmp_path: Path) -> None:
    asked = ["--rate", "inf", "-r", "80", "-i", "2000", "--output-len", "20", "--ttft", "1s", "--tpot", "9ms"]
    said = run(*asked, "--out", str(tmp_path))
    assert "limit 1.00 s; queue" in " ".join(said.output.split())
    assert all(len(line) <= 80 for line in said.output.splitlines()[:-2])
    frame, requests = pd.read_csv(tmp_path / "broken.csv"), pd.read_csv(tmp_path / "requests.csv")
    for name, limit in (("ttft", 1.0), ("tpot", 0.009)):
        over = requests[requests[f"{name}_s"] > limit]
        assert set(frame[frame["limit"] == name]["request"]) == set(over["request"]) and len(over)
    late = frame[frame["limit"] == "ttft"]
    assert (late["because"] == "queue").mean() > 0.9 and (late["seconds"] / late["limit_s"]).is_monotonic_decreasing


def test_ctrl_c_leaves_what_was_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorcast.scheduling import fleet

    ended = fleet.Fleet._step_ended
    asked = ["--rate", "8", "-r", "60", "-i", "500", "--output-len", "30"]
    assert run(*asked, "--out", str(tmp_path / "whole")).exit_code == 0
    whole = pd.read_parquet(tmp_path / "whole" / "requests.parquet")

    def interrupted(self: fleet.Fleet, *arguments: Any) -> None:
        ended(self, *arguments)
        if self.finished == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(fleet.Fleet, "_step_ended", interrupted)
    found = run(*asked, "--out", str(tmp_path))
    assert found.exit_code == 130 and "interrupted: 20 of 60 requests were served by then" in found.output
    kept = pd.read_parquet(tmp_path / "requests.parquet").query("request_s == request_s")
    assert len(kept) == 20 and kept["request_s"].tolist() == whole.loc[kept.index, "request_s"].tolist()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "needs --trace FILE, --rate N or --users N"),
        (["--rate", "-2"], "--rate '-2': must be numbers of more than 0"),
        (["--rate", "1", "--router", "best"], "router 'best'"),
        (["--rate", "1", "--find-rate"], "needs a limit"),
        (["--users", "3", "--find-rate", "--ttft", "1s"], "leave one of both out"),
        (["--rate", "1", "--spread", "2"], "spread 2"),
        (["--trace", "nothing.csv"], "nothing.csv: cannot be read"),
        (["--rate", "1", "--engine", "eager"], "has no scheduler"),
        (["--rate", "1", "--ttft", "300"], "a time needs its unit"),
        (["--rate", "1", "-i", "900000", "-r", "1"], "none can be served"),
        (["--rate", "1", "--think", "2s"], "--think: is about conversations"),
        (["--users", "4", "--ramp", "2s"], "ramp = 2: is of requests that come at a rate"),
        (["--rate", "inf", "--burstiness", "0.5"], "burstiness = 0.5: is of requests that come at a rate"),
        (["--rate", "1", "--law", "normal"], "length law 'normal'"),
        (["--rate", "1", "--seed", "x"], "--seed 'x': must be whole numbers"),
        (["--rate", "1,2", "--draws", "3"], "--draws 3: is about one replay, and 2 are asked for"),
        (["--rate", "1", "--scale-input", "2"], "--scale-input 2: is about a --trace"),
        (["--rate", "1", "--skip-bad"], "--skip-bad: is about a --trace"),
        (["--rate", "1", "--percentile", "90"], "--percentile 90: is about --find-rate"),
        (["--rate", "1", "--find-rate", "--ttft", "1s", "--percentile", "101"], "--percentile '101': must be less"),
        (["--rate", "1", "--batch-wait-share", "0.5"], "--batch-wait-share 0.5: is about --batch-wait-steps"),
        (["--trace", "nothing.csv", "--turns", "3"], "--turns: is about drawn requests"),
        (["--rate", "1", "--workers", "soon -1"], "--workers 'soon -1': must be a time"),
        (["--rate", "1", "--workers", "5s -2"], "2 servers fewer at 5 s, but pool 1 has 1"),
        (["--rate", "1,2", "--find-rate", "--ttft", "1s"], "--rate 1,2: --find-rate finds the rate"),
        (["--rate", "1", "--mtp-acceptance", "1.5"], "--mtp-acceptance 1.5: must be a chance from 0 to 1"),
        (["--rate", "1", "--batch-wait-steps", "3"], "batch_wait_steps 3: under vllm prompts cannot be told to wait"),
        (["--rate", "1", "--engine", "trtllm", "--balance-steps", "4"], "balance_steps 4: .* here nobody would"),
    ],
)
def test_mistakes_are_one_clear_line(arguments: list[str], says: str) -> None:
    found = run(*arguments)
    assert found.exit_code == 2
    text = found.stderr.strip()
    assert text.startswith("error: ") and "\n" not in text
    assert re.search(says, text), text
