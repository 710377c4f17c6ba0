"""What a user is shown: numbers in words, tables that fit their terminal, files that say the same as the frame."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import tensorcast as tc
from tensorcast.errors import InputError
from tensorcast.profiles.store import list_devices, list_engines, list_models, load_device, load_engine, load_model
from tensorcast.report import catalog, units
from tensorcast.report.plain import to_json
from tensorcast.report.simulate import words
from tensorcast.report.simulate.chrome_trace import TRACKS, chrome_trace
from tensorcast.report.simulate.files import NAMES, markdown, write_report
from tensorcast.report.simulate.rows import calls, records
from tensorcast.report.simulate.terminal import fit, fit_path, print_simulation
from tensorcast.report.units import plural

MODEL = "qwen3-30b-a3b"
RUNS: dict[str, dict[str, Any]] = {
    "decode": {"world_size": 2, "dp": 2, "ep": 2, "batch": 16},
    "pipelined": {"world_size": 4, "tp": 2, "pp": 2, "batch": 8},
    "prefill": {"world_size": 2, "ep": 2, "phase": "prefill", "batch": 2, "input_len": 2048},
    "oversize": {"world_size": 1, "batch": 4096, "allow_oversize": True},
}


@pytest.fixture(scope="module", params=list(RUNS))
def run(request: pytest.FixtureRequest) -> Any:
    return tc.simulate(MODEL, device="h100", **RUNS[request.param])


@pytest.fixture(scope="module")
def decode() -> Any:
    return tc.simulate(MODEL, device="h100", **RUNS["decode"])


def shown(run: Any, width: int, top: int = 20, encoding: str = "utf-8") -> list[str]:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict" if encoding == "utf-8" else "replace")
    print_simulation(run, Console(file=stream, width=width, highlight=False), top)
    stream.seek(0)
    return stream.read().splitlines()


# Units


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"), (1.23e-9, "1.23 ns"), (12.34e-6, "12.3 us"), (999.4e-6, "999 us"), (999.6e-6, "1.00 ms"),
        (4.56e-3, "4.56 ms"), (0.1, "100 ms"), (1.2, "1.20 s"), (998.0, "998 s"), (86_400.0, "86,400 s"),
    ],
)  # fmt: skip
def test_seconds(value: float, text: str) -> None:
    assert units.seconds(value) == text


def test_other_units() -> None:
    assert units.nbytes(4.561e9) == "4.56 GB"
    assert units.nbytes(999.9e6) == "1.00 GB"
    assert units.nbytes(0) == "0 B"
    assert units.nbytes(0.25) == "0.250 B"  # no millibytes
    assert units.flops(1.2e12) == "1.20 TFLOP"
    assert units.flop_rate(989e12) == "989 TFLOP/s"
    assert units.byte_rate(4.8e12) == "4.80 TB/s"
    assert units.parameters(671e9) == "671B"
    assert units.parameters(36.6e9) == "36.6B"
    assert units.parameters(1.03e12) == "1.03T"
    assert units.short(0) == "-" and units.short(8.47e12) == "8.47T" and units.short(776) == "776"
    assert units.count(56_482.4) == "56,482"
    assert units.rate(13.81) == "13.8" and units.rate(1765.04) == "1,765"
    assert units.percent(0.2849) == "28.5%" and units.percent(1e-6) == "<0.1%" and units.percent(0) == "0.0%"
    assert units.span(0.0636, 0.0825) == "63.6-82.5 ms"
    assert units.span(0.9e-3, 1.1e-3) == "900 us - 1.10 ms"
    assert units.nbytes(-2e9) == "-2.00 GB"
    assert units.digits(math.nan) == "?" and units.count(math.inf) == "?" and units.percent(math.nan) == "?"


@pytest.mark.parametrize("power", range(-9, 16))
def test_three_digits_at_every_size(power: int) -> None:
    """What is written, read back, is the number to half a unit of its third digit."""
    prefixes = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
    for mantissa in (1.0, 1.004, 2.345, 9.994, 9.996):
        number, prefix = units.scaled(mantissa * 10.0**power)
        assert float(number) * prefixes[prefix] == pytest.approx(mantissa * 10.0**power, rel=5.1e-3)
        assert 1 <= float(number) < 1000 and len(number.replace(".", "")) == 3


# Terminal


@pytest.mark.parametrize("width", [80, 100, 140])
def test_tables_fit_their_terminal(run: Any, width: int) -> None:
    lines = shown(run, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    t = run.totals()
    assert lines[0] == words.headline(t)
    assert units.seconds(t["step_s"]) in text and "MFU" in text and "KV cache" in text
    assert words.verdict(t).split(":")[0] in text
    rows = records(run)
    rest = len(rows) - 20
    assert (f"+ {plural(rest, 'more op')}" in text) == (rest > 0)
    for row in rows[:3]:
        assert units.seconds(row["seconds"]) in text and units.percent(row["share"]) in text


def test_every_number_of_a_row_is_whole_on_the_narrowest_terminal(run: Any) -> None:
    lines = shown(run, 80)
    start = next(i for i, line in enumerate(lines) if line.startswith("op "))
    for row, line in zip(records(run)[:20], lines[start + 2 :], strict=False):
        cells = (units.count(row["count"]), units.seconds(row["seconds"]), units.percent(row["share"]), row["bound"])
        assert all(text in line for text in cells)
        assert line.rstrip().endswith(f" {row['evidence'][0]}")


def test_collectives_show_group_and_tier(decode: Any) -> None:
    assert any("all_gather" in line and "dp2 nvlink" in line for line in shown(decode, 80))
    assert any("reduce_scatter" in line and "combine dp2 nvlink" in line for line in shown(decode, 140))


def test_rest_is_summed(decode: Any) -> None:
    rest = records(decode)[5:]
    line = next(line for line in shown(decode, 140, top=5) if line.startswith(f"+ {len(rest)} more ops"))
    assert units.seconds(sum(row["seconds"] for row in rest)) in line
    assert not any("more op" in line for line in shown(decode, 140, top=1000))
    assert any(line.startswith(f"+ {len(rest) + 5} more ops") for line in shown(decode, 80, top=0))


def test_memory_that_does_not_fit_is_said_plainly() -> None:
    run = tc.simulate(MODEL, device="h100", **RUNS["oversize"])
    text = " ".join(" ".join(line.strip("│ ") for line in shown(run, 80)).split())
    over = float(run.memory.total - run.memory.budget)
    assert f"DOES NOT FIT: {units.nbytes(over)} over" in text
    assert f"largest batch that fits: {run.largest_batch:,} sequences" in text


def test_plain_terminals_get_plain_characters(decode: Any) -> None:
    """Without UTF-8, frames and bars are drawn in ASCII; only the sign of a shortened text is lost."""
    text = "\n".join(shown(decode, 80, encoding="ascii"))
    assert "+- Step" in text and "####" in text
    assert "?" not in text.split("Costliest")[0]


def test_colour_says_nothing_alone(decode: Any) -> None:
    def printed(**colour: Any) -> str:
        file = io.StringIO()
        print_simulation(decode, Console(file=file, width=100, highlight=False, force_terminal=True, **colour))
        return file.getvalue()

    assert "\x1b[" in printed(color_system="standard")
    assert "\x1b[3" not in printed(no_color=True)  # bold stays, colours go


def test_shortening() -> None:
    assert fit("reduce_scatter", 14) == "reduce_scatter" and fit("reduce_scatter", 8) == "reduce_…"
    assert fit_path("layers[3-60].self_attn.o_proj", 18) == "…self_attn.o_proj"
    assert fit_path("lm_head", 18) == "lm_head"
    for width in range(6, 40):
        assert len(fit_path("layers[3-60].mlp.shared_experts.gate_proj+up_proj", width)) <= width


def test_words_of_a_dense_model() -> None:
    """No experts, no exchange, one sequence: none of them is mentioned."""
    run = tc.simulate("llama-3.1-8b", device="h100")
    t = run.totals()
    assert words.workload(t) == "1 sequence, 1 new token after 4,096 cached"
    assert words.numerics(t) == "linears bf16, KV cache bf16"
    assert "rank" not in words.largest(t)


# Files


def test_csv_is_the_frame(run: Any, tmp_path: Path) -> None:
    write_report(run, tmp_path)
    with (tmp_path / "ops.csv").open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    expected = records(run)
    assert [list(row) for row in read] == [list(row) for row in expected]
    for row, wanted in zip(read, expected, strict=True):
        assert {key: type(wanted[key])(text) for key, text in row.items()} == wanted


def test_summary_is_the_totals(run: Any, tmp_path: Path) -> None:
    write_report(run, tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(run.totals()))


def test_files_are_replaced_and_nothing_else_is_left(decode: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "ops.csv").write_text("old")
    written = write_report(decode, tmp_path / "." / "", top=3)
    assert {path.name for path in written} == set(NAMES)
    assert {path.name for path in tmp_path.iterdir()} == {*NAMES, "notes.txt"}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "ops.csv").read_text() != "old"


def test_a_failed_write_leaves_what_was_there(decode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ops.csv").write_text("old")

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match=r"--out .*: cannot be written: No space left on device"):
        write_report(decode, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["ops.csv"]
    assert (tmp_path / "ops.csv").read_text() == "old"


def test_markdown(run: Any) -> None:
    text = markdown(run, top=5)
    t = run.totals()
    assert text.startswith(f"# {words.headline(t)}\n")
    for name, value in words.step_lines(t):
        assert f"| {name} | {value} |" in text
    lines = text.splitlines()
    tables = [line for line in lines if line.startswith("| ")]
    assert len(tables) == (1 + len(words.step_lines(t))) + (1 + len(words.memory_rows(t))) + (1 + 5)
    assert all(note in text for note in t["notes"])


def test_json_has_no_nan_and_no_numpy() -> None:
    document = {"a": math.nan, "b": [math.inf, 1.5], 3: (np.float64(2.5), np.int64(7), np.float64("nan")), "c": None}
    text = to_json(document)
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "3": [2.5, 7, None], "c": None}


# Chrome trace


def test_trace_is_well_formed(run: Any) -> None:
    document = json.loads(to_json(chrome_trace(run)))
    assert isinstance(document["traceEvents"], list)
    named = {e["tid"]: e["args"]["name"] for e in document["traceEvents"] if e["name"] == "thread_name"}
    assert named == {number: name for name, number in TRACKS.items()}
    assert any(e["name"] == "process_name" for e in document["traceEvents"])
    ends: dict[int, float] = {}
    for event in document["traceEvents"]:
        assert event["ph"] in "MX" and event["pid"] == 1 and isinstance(event["name"], str)
        if event["ph"] == "X":
            assert {"ts", "dur", "tid", "cat", "args"} <= set(event)
            assert event["dur"] >= 0 and event["tid"] in named
            assert event["ts"] >= ends.get(event["tid"], 0.0) - 1e-6  # events of one track do not overlap
            ends[event["tid"]] = event["ts"] + event["dur"]
            if named[event["tid"]] != "host":
                assert {"module", "shape", "bound", "evidence"} <= set(event["args"])


def test_trace_adds_up_to_the_kernels_time(run: Any) -> None:
    events = [e for e in chrome_trace(run)["traceEvents"] if e["ph"] == "X"]
    kernels = [e for e in events if e["tid"] != TRACKS["host"]]
    frame = run.ops
    assert len(kernels) == frame["count"].sum()
    assert sum(e["dur"] for e in kernels) == pytest.approx(frame["seconds"].sum() * 1e6, rel=1e-6)
    wire = sum(e["dur"] for e in kernels if e["tid"] == TRACKS["communication"])
    assert wire == pytest.approx(frame.loc[frame["op"].isin(words.COLLECTIVES), "seconds"].sum() * 1e6, rel=1e-4)
    assert Counter(e["name"] for e in kernels) == frame.groupby("op")["count"].sum().to_dict()
    if run.deployment.layout.pp == 1:
        assert max(e["ts"] + e["dur"] for e in events) == pytest.approx(run.step_s * 1e6, rel=1e-5)


def test_trace_runs_layers_in_order(run: Any) -> None:
    order = calls(run)
    kinds = run.deployment.step.table.layer_kinds
    layers = [call.layer for call in order if call.layer is not None]
    assert layers == sorted(layers) and set(layers) == set(range(len(kinds)))
    assert order[0].layer is None and {call.record["op"] for call in order if call.layer is None} >= {"embedding"}
    assert order[-1].layer is None and "lm_head" in order[-1].record["module"]
    inside = [call.record["op"] for call in order if call.layer == 1]
    experts = [i for i, op in enumerate(inside) if op == "grouped_matmul"]
    assert inside.index("attention") < experts[0] and len(experts) == 2


def test_trace_names_single_layers_and_single_calls(decode: Any) -> None:
    events = [e for e in chrome_trace(decode)["traceEvents"] if e["name"] == "attention"]
    assert [e["args"]["module"] for e in events[:2]] == ["layers[0].self_attn", "layers[1].self_attn"]
    row = next(row for row in records(decode) if row["op"] == "attention")
    assert events[0]["args"]["flops"] == pytest.approx(row["flops"] / row["count"])


def test_stages_hand_over_between_their_layers() -> None:
    run = tc.simulate(MODEL, device="h100", **RUNS["pipelined"])
    order = calls(run)
    at = [i for i, call in enumerate(order) if call.record["op"] == "send_recv"]
    assert len(at) == 1
    assert order[at[0] - 1].layer == 23 and order[at[0] + 1].layer == 24
    assert any("all 2 stages" in line for line in shown(run, 80))


# Catalogue


@pytest.mark.parametrize("width", [80, 120, 160])
def test_catalogue_fits_and_lists_all(width: int) -> None:

    models = [catalog.model_record(load_model(name)) for name in list_models()]
    devices = [catalog.device_record(load_device(name)) for name in list_devices()]
    engines = [catalog.engine_record(load_engine(name)) for name in list_engines()]
    for found, show in (
        (models, catalog.print_models), (devices, catalog.print_devices), (engines, catalog.print_engines),
    ):  # fmt: skip
        file = io.StringIO()
        show(found, Console(file=file, width=width, highlight=False))
        lines = file.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        firsts = {line.split(" ")[0] for line in lines}
        assert {row["name"] for row in found} <= firsts


@pytest.mark.parametrize(
    ("model", "attention", "experts", "dtype"),
    [
        ("deepseek-v3", "MLA", (256, 8), "fp8_block"),
        ("deepseek-v3.2", "MLA, sparse 2048", (256, 8), "fp8_block"),
        ("gpt-oss-120b", "GQA 64/8, window 128", (128, 4), "mxfp4"),
        ("mixtral-8x7b", "GQA 32/8", (8, 2), "bf16"),
        ("qwen3-30b-a3b", "GQA 32/4", (128, 8), "bf16"),
        ("llama-4-scout", "GQA 40/8, chunks 8192", (16, 1), "bf16"),
        ("llama-3.1-8b", "GQA 32/8", (None, None), "bf16"),
        ("nemotron-3-nano-30b-a3b", "GQA 32/2 + mamba", (128, 6), "bf16"),
        ("qwen3.5-35b-a3b", "GQA 16/2 + linear", (256, 8), "bf16"),
        ("gemma-4-26b-a4b", "GQA 16/8, window 1024", (128, 8), "bf16"),
        ("ernie-4.5-21b-a3b", "GQA 20/4", (64, 6), "bf16"),
    ],
)
def test_model_records(model: str, attention: str, experts: tuple[int, int], dtype: str) -> None:
    from tensorcast.profiles.store import load_model

    record = catalog.model_record(load_model(model))
    assert record["attention"] == attention
    assert (record["experts"], record["top_k"]) == experts
    assert record["expert_dtype"] == dtype


def test_records_agree_with_the_traced_model() -> None:
    """Experts and layers read off field names are those that the model itself has."""
    from tensorcast.profiles.store import load_model

    record = catalog.model_record(load_model(MODEL))
    run = tc.simulate(MODEL, device="h100")
    facts = run.deployment.raw.facts
    assert (record["experts"], record["top_k"], record["layers"]) == (
        facts.num_experts, facts.top_k, len(run.deployment.raw.layer_kinds),
    )  # fmt: skip


@pytest.mark.parametrize("more", [
    {"dual_batch_overlap": True, "batch": 256}, {"dual_batch_overlap": True, "batch": 64, "engine": "sglang"},
    {"batch": 8},
])
def test_what_is_hidden_is_drawn_behind_other_kernels(more: dict[str, Any]) -> None:
    """A step that overlaps lasts as long on the page as it is priced; kernels keep their own times."""
    asked = {"device": "h200", "world_size": 16, "dp": 16, "ep": 16, "context": 2000, "allow_oversize": True,
             "all2all": "low_latency", **more}  # fmt: skip
    run = tc.simulate("deepseek-v3", **asked)
    events = [e for e in chrome_trace(run)["traceEvents"] if e["ph"] == "X"]
    assert run.totals()["hidden_s"] > 0
    assert max(e["ts"] + e["dur"] for e in events) == pytest.approx(run.step_s * 1e6, rel=0.01)
    kernels = sum(e["dur"] for e in events if e["tid"] != TRACKS["host"])
    assert kernels == pytest.approx(run.ops["seconds"].sum() * 1e6, rel=1e-6)
    assert kernels + 1e6 * run.totals()["overhead_s"] > run.step_s * 1e6 * (1 + 1e-6)
