"""Which limits are broken and why: parts that add up, against replays and against what one request alone takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tensorcast as tc
from tensorcast.cli import app
from tensorcast.errors import InputError
from tensorcast.predict.steady_limits import SteadyLimits
from tensorcast.scheduling.outcome import Outcome
from tensorcast.scheduling.pools import filling
from tensorcast.scheduling.requests import Length, drawn

MODEL = "qwen3-30b-a3b"


def steady(layout: str, users: int, **more: object) -> SteadyLimits:
    found = tc.explain_limits(
        MODEL, device="h100", layout=layout, users=users, input_len=3000, output_len=300, ttft_s=0.3, tpot_s=0.01,
        request_s=3.0, **more,  # type: ignore[arg-type]
    )
    assert isinstance(found, SteadyLimits)
    return found


@pytest.mark.parametrize("layout", ["tp2-ep2", "2 x tp2-ep2", "2 x tp1 > tp2-ep2", "dp2-ep2"])
@pytest.mark.parametrize("users", [1, 40])
def test_parts_make_up_the_times(layout: str, users: int) -> None:
    found = steady(layout, users)
    for name, took in found.times.items():
        assert sum(found.parts[name].values()) == pytest.approx(took)
        assert min(found.parts[name].values()) >= 0
    assert 0 < found.decoding <= users


@pytest.mark.parametrize("chunk", [None, 1000])
def test_one_user_waits_for_its_own_prompt_alone(chunk: int | None) -> None:
    """Which takes what simulate says of its steps, and the engine's factor on these."""
    parts = steady("tp2-ep2", 1, prefill_chunk=chunk).parts["ttft_s"]
    steps = [(1000, 0), (1000, 1000), (1000, 2000)] if chunk else [(3000, 0)]
    alone = sum(
        tc.simulate(MODEL, device="h100", world_size=2, tp=2, ep=2, phase="prefill", batch=1, input_len=new,
                    context=past, routing="typical").step_s
        for new, past in steps
    )  # fmt: skip
    assert alone < parts["own prompt"] < 1.5 * alone and parts["queue"] < 0.03  # front end, steps under way


@pytest.mark.parametrize("users", [8, 64])
def test_means_go_into_what_a_replay_of_them_says(users: int) -> None:
    """Of users whose replies differ in length, and so fall out of step."""
    closed = steady("tp2-ep2", users)
    replayed = tc.explain_limits(
        MODEL, device="h100", layout="tp2-ep2", ttft_s=0.3, tpot_s=0.01,
        requests=drawn(20 * users, Length(3000), Length(300, 0.5), users=users),
    )
    assert isinstance(replayed, Outcome)
    frame = replayed.causes().loc["all"]
    writing = closed.parts["request_s"]["others' prompts"], closed.parts["request_s"]["decoding"]
    assert frame["decoding"] == pytest.approx(writing[1], rel=0.1)
    assert frame["others' prompts"] == pytest.approx(writing[0], rel=0.2)
    assert closed.broken == [name for name, limit in vars(closed.limits).items() if closed.times[name] > limit]


def test_one_server_fills_the_gpus_that_there_are() -> None:
    assert filling("tp2-ep2", 8) == "4 x tp2-dp1-ep2"
    assert filling("2 x tp2", 8) == "2 x tp2" and filling("tp2 > tp4", 8) == "tp2 > tp4" and filling("tp3", 8) == "tp3"
    with pytest.raises(InputError, match="has 16 GPUs, more than --world-size 8"):
        filling("2 x tp8", 8)


def told(*words: str) -> str:
    found = CliRunner().invoke(app, ["explain", MODEL, "-d", "h100", *words])
    assert found.exit_code == 0, found.output
    return " ".join(found.output.split())


def test_the_command_says_which_requests_and_by_what(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    lines = [f"{i * 0.02},{30_000 if i == 20 else 2000},60" for i in range(60)]
    trace.write_text("\n".join(["arrival_s,input_len,output_len", *lines]))
    asked = ["-l", "tp1", "-v", "2 x tp1", "--trace", str(trace), "--ttft", "400ms"]
    said, record = told(*asked), json.loads(told(*asked, "--json"))
    assert "A tp1-dp1: 60 of 60 requests served" in said and "30,000 + 60 tokens: TTFT" in said
    counts = said[said.index("Within the limits: in both ") :].replace(",", "").replace(".", "").split()
    both, a, b, none = (int(counts[i]) for i in (5, 9, 13, 16))
    assert both + a + b + none == 60 and b > a
    broken = {row["request"]: row["because"] for row in record["a"]["broken"]}
    assert len(broken) == 60 - both - a and broken[20] == "own prompt" and broken[30] == "queue"
    assert record["a"]["requests"] == 60 and "B 2 x tp1-dp1" in said
    trace.write_text(trace.read_text() + "\n9,many,3\n")
    assert f"note: 1 rows of {trace} could not be read" in told(*asked, "--skip-bad")


def test_the_command_explains_a_steady_load() -> None:
    asked = ["-n", "4", "-l", "tp2-ep2", "--users", "400", "-i", "3000", "-o", "300", "--ttft", "10s", "--tpot", "9ms"]
    said = told(*asked)
    assert "2 x tp2-dp1-ep2, 4 GPUs: 400 requests in flight" in said and "keeps 10.0 s" in said
    assert "breaks 9.00 ms, by " in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--users", "3"], "--users 3: is about limits"),
        (["--ttft", "1s"], "need a load, one of --trace FILE, --rate N and --users N"),
        (["--ttft", "1s", "--users", "3", "--rate", "2"], "--users 3: are always there"),
        (["--ttft", "1s", "--users", "3", "-r", "2"], "--requests 2: is about requests"),
        (["--ttft", "1s", "--users", "3", "-b", "2"], "--batch 2: is about one step"),
        (["-n", "2"], "--versus: is needed"),
        (["-v", "tp2"], "--world-size: is needed"),
        (["--ttft", "1s", "--users", "3", "-n", "1", "-v", "tp2"], "has 2 GPUs, more than --world-size 1"),
    ],
)
def test_what_cannot_be_asked(words: list[str], says: str) -> None:
    found = CliRunner().invoke(app, ["explain", MODEL, "-d", "h100", "-l", "tp1", *words])
    assert found.exit_code == 2 and says in " ".join(found.output.split()), found.output
