"""Questions of the explorer's page: what its address may ask, what is refused, and that answers are ``compare``'s."""

from __future__ import annotations

import asyncio
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

import tensorcast as tc
from tensorcast.explore.answer import full, quick
from tensorcast.explore.details import details, versus
from tensorcast.explore.exports import exported
from tensorcast.explore.fields import fields
from tensorcast.explore.question import command, field_of, own_names, question, with_defaults
from tensorcast.report.compare.terminal import comparison_record
from tensorcast.report.glossary import glossary
from tensorcast.report.plain import to_json

STATE = {
    "model": "qwen3-30b-a3b", "device": "h100-sxm", "world_size": "4", "engine": "sglang", "input_len": "1024",
    "output_len": "256", "tpot_ms": "30",
}  # fmt: skip


@pytest.fixture(scope="module")
def compared() -> Any:
    return tc.compare(
        "qwen3-30b-a3b", device="h100", world_size=4, input_len=1024, output_len=256, ttft_s=2.0, tpot_s=0.03,
        engine="sglang",
    )


def test_answers_are_those_of_compare(compared: Any) -> None:
    page = full(question(STATE)).page
    keys = [column["key"] for column in page["columns"]]
    rows = [dict(zip(keys, cells, strict=True)) for cells in page["rows"]]
    best = next(row for row in rows if row["is_best"])
    for key in ("tokens_per_s_per_gpu", "ttft_s", "tpot_s", "output_tokens_per_s", "cost_per_million_tokens"):
        assert best[key][0] == pytest.approx(compared.best[key], rel=1e-5)
    assert best["usd_per_hour"][0] == pytest.approx(
        compared.best["cost_per_million_tokens"] * compared.best["output_tokens_per_s"] * 3600 / 1e6, rel=1e-5
    )
    front = compared.candidates[compared.candidates["pareto"]]
    assert len([row for row in rows if row["front"]]) == len(front)
    ours, theirs = json.loads(exported(question(STATE), "json")), json.loads(to_json(comparison_record(compared)))
    assert ours.pop("command").startswith("tensorcast compare qwen3-30b-a3b --device h100") and theirs.pop("command")
    assert ours == theirs


def test_a_quick_answer_of_all_known_variants_keeps_their_numbers() -> None:
    asked = question(STATE)
    whole = full(asked)
    fast = quick(asked, whole.known)
    both = [key for key in whole.behind if key in fast.behind]
    assert len(both) > 5 and fast.page["quick"] and not whole.page["quick"]
    front = [key for key in both if whole.behind[key].row["pareto"]]
    assert front
    for key in front:
        assert fast.behind[key].row["tpot_s"] == pytest.approx(whole.behind[key].row["tpot_s"], rel=1e-9)


def test_a_first_quick_answer_needs_nothing_known() -> None:
    assert len(quick(question({**STATE, "input_len": "777"}), ()).behind) > 5


def test_close_by_parts_add_up_to_the_row() -> None:
    asked = question(STATE)
    found = [one for one in full(asked).behind.values() if one.row["meets"]]
    told = details(asked, found[0])
    assert told["steps"][0]["seconds"] == pytest.approx(found[0].row["decode_step_s"], rel=1e-6)
    assert sum(part["seconds"] for part in told["steps"][0]["parts"]) == pytest.approx(
        told["steps"][0]["seconds"], rel=5e-3
    )
    assert sum(part["bytes"] for part in told["memory"]["parts"]) == pytest.approx(found[0].row["memory_bytes"])
    assert told["launch"][0]["engine"] == "sglang" and "sglang" in told["launch"][0]["script"]
    spans = told["line"]["spans"]
    assert all(one["end"] >= one["start"] >= 0 for one in spans) and spans[-1]["end"] == told["line"]["seconds"]
    pair = versus(asked, found[0], found[-1])
    for side, one in zip("ab", pair["steps"], strict=True):
        assert sum(group[f"seconds_{side}"] for group in pair["groups"]) == pytest.approx(one["seconds"], rel=1e-6)


def test_the_command_of_a_step_prices_that_step() -> None:
    import typer.testing

    from tensorcast.cli import app

    asked = question(STATE)
    kept = (one for one in full(asked).behind.values() if one.row["mode"] == "aggregated" and one.row["meets"])
    found = max(kept, key=lambda one: one.row["redundant_experts"] + one.row["dual_batch_overlap"])
    told = details(asked, found)
    done = typer.testing.CliRunner().invoke(app, [*shlex.split(told["simulate"])[1:], "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["step_s"] == pytest.approx(found.row["decode_step_s"], rel=2e-3)


def test_replies_may_be_on_another_device() -> None:
    """Every number of the page is that of ``compare``; the pools' steps are told each on its own device."""
    asked = question({**STATE, "decode_device": "h200", "decode_world_size": "4", "price": "3"})
    whole, same = full(asked), tc.compare(
        "qwen3-30b-a3b", device="h100", world_size=4, input_len=1024, output_len=256, ttft_s=2.0, tpot_s=0.03,
        engine="sglang", decode_device="h200", decode_world_size=4, prices={"h100": 3.0, "h200": 3.0},
    )  # fmt: skip
    found = next(one for one in whole.behind.values() if one.row["is_best"])
    assert found.row["device"] == "h100-sxm > h200-sxm"
    for key in ("tokens_per_s_per_gpu", "ttft_s", "tpot_s", "cost_per_million_tokens", "gpus"):
        assert same.best and found.row[key] == pytest.approx(same.best[key], rel=1e-9)
    told = details(asked, found)
    assert told["steps"][0]["seconds"] == pytest.approx(found.row["decode_step_s"], rel=1e-6)
    assert "--device h200-sxm" in told["simulate"]
    fast = quick(asked, whole.known).behind
    assert next(one for one in fast.values() if one.row["is_best"]).row["ttft_s"] == found.row["ttft_s"]
    assert "--decode-device h200 --decode-world-size 4" in command(asked)


def test_users_and_rate_are_limits() -> None:
    every = full(question(STATE))
    users = sorted(one.row["concurrency"] for one in every.behind.values() if one.row["meets"])
    wanted = int(users[-1])
    found = full(question({**STATE, "users": str(wanted)}))
    kept = [one.row for one in found.behind.values() if one.row["meets"]]
    assert kept and min(row["concurrency"] for row in kept) >= wanted
    none = full(question({**STATE, "request_rate": "100000"}))
    assert "the limit on requests binds" in none.page["missed"] and none.page["cards"][0]["title"] == "Closest"


@pytest.mark.parametrize(("key", "value", "says"), [
    ("input_len", "abc", "--input-len 'abc': must be a whole number"), ("output_len", "0", "--output-len '0'"),
    ("tpot_ms", "-1", "--tpot '-1'"), ("cached", "100", "cached share '100'"),
    ("mtp_acceptance", "2", "--mtp-acceptance"), ("model", "deepsek-v3", "did you mean deepseek-v3"),
    ("device", "h2000", "unknown device"), ("engine", "vlm", "unknown engine"),
    ("engine", "vllm==0.0.1", "0.0.1"), ("engine", "../vllm==0.24.0", "unknown engine"),
    ("model", "/etc/passwd", "unknown model"), ("model", "./x.yaml", "unknown model"),
    ("device", "../h100.yaml", "unknown device"), ("routing", "recorded:/etc/passwd", "recording by name"),
    ("routing", "counts.csv", "recording by name"), ("placement", "/etc/passwd", "unknown placement"),
    ("draft_model", "/etc/passwd", "unknown draft_model"), ("speculative_method", "guess", "must be one of"),
    ("mtp_acceptance", "nothing", "a task of published tables"), ("dcp", "0", "--dcp '0'"),
    ("layouts", "tp3", "layout tp3-dp1 takes 3 GPUs"), ("price", "b300=1,x", "--price"),
    ("mode", "both", "unknown mode"), ("decode_device", "/etc/passwd", "unknown decode_device"),
    ("decode_world_size", "8", "is of --decode-device"),
    ("world_size", "4,8,16,32,64,128,256", "at most 6"), ("quant", "fp3", "unknown quantization scheme"),
    ("objective", "gpus", "--request-rate"), ("input_len", "9" * 401, "at most 400 characters"),
])  # fmt: skip
def test_bad_input_is_one_line_at_its_field(key: str, value: str, says: str) -> None:
    with pytest.raises(tc.InputError) as error:
        question({**STATE, key: value}).tasks()
    line = error.value.typed or str(error.value)
    assert says in line and "\n" not in line
    assert field_of(line) == key


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(tc.InputError, match="unknown field 'tpott_ms': did you mean"):
        with_defaults({"tpott_ms": "3"})


def test_aliases_are_names_and_files_only_what_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert question({**STATE, "device": "h100"}).devices == ("h100-sxm",)
    assert question({**STATE, "engine": "vllm==0.24.0"}).tasks()[0].engine.version == "0.24.0"
    own = tmp_path / "mine"
    own.mkdir()
    (own / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(tc.InputError, match="unknown model 'mine'"):
        question({**STATE, "model": "mine"})
    assert own_names("qwen3-30b-a3b", "h100", "vllm") == (
        {"model": "qwen3-30b-a3b", "device": "h100-sxm", "engine": "vllm"}, ()
    )  # fmt: skip


def test_the_command_asks_the_same() -> None:
    asked = question({**STATE, "price": "2.5", "cached": "50", "mtp_depth": "", "kv_dtype": "bf16,fp8"})
    words = shlex.split(command(asked))
    given = dict(zip(words[3::2], words[4::2], strict=True))
    assert words[:3] == ["tensorcast", "compare", "qwen3-30b-a3b"]
    assert given == {
        "--device": "h100-sxm", "--world-size": "4", "--engine": "sglang", "--input-len": "1024",
        "--output-len": "256", "--ttft": "2000ms", "--tpot": "30ms", "--price": "h100-sxm=2.5",
        "--kv-dtype": "bf16,fp8", "--prefix-cached": "512",
    }  # fmt: skip


def opened_with(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """The state that ``tensorcast explore`` would serve, and the files that the page may name."""
    pytest.importorskip("starlette")
    from test_cli import invoke

    import tensorcast.explore.server

    served: list[Any] = []
    monkeypatch.setattr(tensorcast.explore.server, "serve", lambda *given: served.extend(given))
    done = invoke("explore", *words)
    assert done.exit_code == 0, done.output
    return served[0], served[3]


def test_it_opens_with_a_kept_question(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compared: Any
) -> None:
    from tensorcast.report.question import config, flags

    kept = tmp_path / "question.yaml"
    kept.write_text(config(flags(compared)))
    state, _ = opened_with(monkeypatch, "--config", str(kept), "--ttft", "3s", "--users", "10")
    asked = question(state)
    assert (asked.model, asked.devices, asked.sizes) == ("qwen3-30b-a3b", ("h100-sxm",), (4,))
    assert asked.engines == ("sglang",)
    assert asked.asked["tpot_s"] == 0.03 and asked.asked["ttft_s"] == 3.0 and asked.asked["users"] == 10
    kept.write_text(exported(question({**STATE, "ttft_ms": "", "cached": "50", "kv_dtype": "fp8"}), "config"))
    state, _ = opened_with(monkeypatch, "--config", str(kept))
    asked = question(state)
    assert asked.asked["ttft_s"] is None and asked.asked["prefix_cached"] == 512
    assert asked.asked["searched"]["kv_dtype"] == ["fp8"]


def test_files_named_at_the_start_may_be_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counts = tmp_path / "counts.csv"
    counts.write_text("count\n" + "1\n" * 128)
    state, named = opened_with(
        monkeypatch, "qwen3-30b-a3b", "-d", "h100", "-n", "4", "--routing", f"recorded:{counts}", "--dcp", "1,2",
        "--price", "h100=2",
    )
    assert question(state, named).asked["routing"] == f"recorded:{counts}" and state["price"] == "2"
    with pytest.raises(tc.InputError, match="recording by name"):
        question(state)


def test_drafts_and_shared_caches_are_asked_for() -> None:
    asked = question({
        **STATE, "model": "gpt-oss-120b", "speculative_method": "eagle3", "mtp_depth": "0,3", "dcp": "1,2",
        "mtp_acceptance": "mt-bench",
    })
    task = asked.tasks()[0]
    assert task.base.speculative_method == "eagle3" and task.axes.mtp_depth == (0, 3) and task.axes.dcp == (1, 2)
    assert sum(task.load.mtp_acceptance**i for i in range(4)) == pytest.approx(2.41)
    words = shlex.split(command(asked))
    assert words[words.index("--speculative-method") + 1] == "eagle3"


def test_fields_name_flags_that_there_are() -> None:
    import typer

    import tensorcast.cli.compare  # noqa: F401  makes the command
    from tensorcast.cli.app import _alone

    flags = {flag for one in typer.main.get_command(_alone["compare"]).params for flag in one.opts}
    assert {one.flag for one in fields() if one.flag.startswith("--")} <= flags


def test_options_say_what_their_own_metadata_says() -> None:
    from tensorcast.deploy.options import ABOUT, flag

    told = {one.key: one for one in fields()}
    for name in ("quant", "kv_dtype", "routing", "placement", "dispatch", "combine", "all2all"):
        assert told[name].help == ABOUT[name].help and told[name].flag == flag(name)


def test_tooltips_are_the_glossary() -> None:
    words = glossary()
    assert words["tp"].startswith("ranks that cut") and words["layout"].startswith("how a model lies on GPUs")
    assert "meaning" not in words and len(words) > 30


def test_lanes_drop_what_is_stale_and_outlive_their_process() -> None:
    pytest.importorskip("starlette")
    import os
    import signal

    from tensorcast.explore.lanes import Lane, Superseded
    from tensorcast.explore.work import Reply, answer_all

    async def told() -> tuple[list[Any], Reply, int]:
        lane = Lane()
        try:
            first = await lane.ready()
            bad = [{**with_defaults(STATE), "input_len": f"x{i}"} for i in range(4)]
            asked = [asyncio.create_task(lane.ask("one", answer_all, state, ())) for state in bad]
            asked.append(asyncio.create_task(lane.ask("another", answer_all, bad[0], ())))
            found = await asyncio.gather(*asked, return_exceptions=True)
            os.kill(first, signal.SIGKILL)
            lost = await lane.ask("one", answer_all, bad[0], ())
            return found, lost, await lane.ready() - first
        finally:
            lane.close()

    found, lost, moved = asyncio.run(told())
    stale = [isinstance(one, Superseded) for one in found]
    assert stale.count(True) >= 2 and not stale[3] and not stale[4]  # each browser's newest is answered
    assert "x3" in found[3].text and found[3].wrong
    assert lost.wrong and "was killed" in lost.text and moved != 0
