"""Predicting tables: every row comes back, says what was assumed or what is wrong, and is scored as by hand."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tensorcast.cli import app
from tensorcast.deploy.layout import Layout
from tensorcast.errors import InputError
from tensorcast.predict.launch_records import counted_twice
from tensorcast.predict.predict import predict, predict_file
from tensorcast.predict.run_columns import (
    COLUMNS,
    WORKER_COLUMNS,
    canonical_columns,
    describe_columns,
    read_run,
)
from tensorcast.predict.score import choice, errors, summarise

SAMPLE = Path(__file__).parent / "data" / "serving_sample.csv"
ROW = {"model": "llama-3.1-8b", "device": "h100", "isl": "512", "osl": "128", "concurrency": "8"}


def table(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame([{**ROW, **row} for row in rows]).astype(object).where(lambda f: f.notna(), "")


@pytest.fixture(scope="module")
def sample() -> pd.DataFrame:
    rows = pd.read_csv(SAMPLE, comment="#", dtype=str, keep_default_na=False)
    return predict(rows.iloc[::3])


def test_sample_of_measured_runs(sample: pd.DataFrame) -> None:
    """Public runs, drawn at random: all predicted, time per token within what reports/serving.md states."""
    assert len(sample) == 20 and (sample["problem"] == "").all()
    off = (sample["tpot_s"] / sample["measured_tpot_s"] - 1).abs()
    assert off.median() < 0.16
    assert (sample["ttft_s"] / sample["measured_ttft_s"] - 1).abs().median() < 0.4
    for name in ("ttft", "tpot"):
        assert (sample[f"{name}_low_s"] < sample[f"{name}_s"]).all()
        assert (sample[f"{name}_s"] < sample[f"{name}_high_s"]).all()
    shares = sample[["share_measured", "share_calibrated", "share_datasheet"]].sum(axis=1)
    steady = sample["decode_step_s"].notna()  # one of attention DP ranks that wait for each other is replayed
    assert steady.sum() >= 19 and np.allclose(shares[steady].astype(float), 1)


def test_order_and_own_columns_stay() -> None:
    rows = table({"note": "b", "concurrency": "64"}, {"note": "a", "model": "nonesuch"}, {"note": "c"})
    out = predict(rows)
    assert list(out["note"]) == ["b", "a", "c"] and len(out) == 3
    assert list(out["problem"] == "") == [True, False, True]
    assert "nonesuch" in out["problem"][1] and math.isnan(out["tpot_s"][1])
    assert out["tpot_s"][0] > out["tpot_s"][2]


def test_names_of_other_tools_mean_the_same() -> None:
    ours = predict(table({"tp": "2", "engine": "trtllm", "precision": "fp8"}))
    theirs = pd.DataFrame([
        {
            "model_path": "meta-llama/Llama-3.1-8B-Instruct", "system": "h100_sxm", "backend": "trtllm",
            "input_len": 512, "output_len": 128, "max_concurrency": 8, "tp_size": 2.0, "precision": "FP8",
        }
    ])  # fmt: skip
    assert predict(theirs)["tpot_s"][0] == ours["tpot_s"][0]
    with pytest.raises(InputError, match="both mean concurrency"):
        predict(theirs.assign(conc=8))


def test_defaults_are_stated() -> None:
    out = predict(pd.DataFrame([{"model": "llama-3.1-8b", "device": "h100"}]))
    for said in ("engine vllm", "mode agg", "isl 1024", "osl 1024", "concurrency 1"):
        assert said in out["assumed"][0]
    given_batch = read_run({**ROW, "concurrency": "", "batch": "4", "dp": "2"})
    assert given_batch.concurrency == 8 and "concurrency 8" in given_batch.assumed


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"device": "toaster"}, "toaster"),
        ({"engine": "nothing"}, "nothing"),
        ({"mode": "sideways"}, "mode"),
        ({"concurrency": "many"}, "concurrency"),
        ({"concurrency": "-1"}, "concurrency"),
        ({"isl": "1.5"}, "isl"),
        ({"tp": "3"}, "heads"),
        ({"precision": "fp3"}, "fp3"),
        ({"kv_dtype": "int4"}, "kv_dtype"),
        ({"model": ""}, "model"),
        ({"length_ratio": "2"}, "length_ratio"),
        ({"prefix_cached": "512"}, "prefix_cached"),
        ({"model": "mixtral-8x7b", "tp": "8", "ep": "2", "moe_tp": "2"}, r"moe_tp\*ep = 2\*2"),
        ({"model": "llama-3.1-70b"}, "does not fit"),
        ({"mtp_depth": "1"}, "multi-token"),
        ({"chunk_tokens": "12.7"}, "chunk_tokens 12.7: must be a whole number"),
        ({"mode": "disagg", "prefill_workers": "1.5"}, "prefill_workers 1.5: must be a whole number"),
        ({"mode": "disagg", "decode_workers": "-1"}, "decode_workers -1: must be a whole number"),
        ({"model": "mixtral-8x7b", "tp": "8", "placement": "shuffled"}, "unknown placement 'shuffled'"),
        ({"layout": "tp2 >"}, "of pools both are named"),
    ],
)
def test_rows_that_cannot_be_say_why(row: dict[str, str], says: str) -> None:
    out = predict(table(row, {}))
    assert len(out) == 2 and out["problem"][1] == ""
    assert says in out["problem"][0].replace("\\", "") or pd.Series(out["problem"][:1]).str.contains(says).all()
    assert "\n" not in out["problem"][0] and math.isnan(out["ttft_s"][0])


CELL = st.one_of(
    st.sampled_from(["", "nan", "0", "1", "2", "-3", "1e9", "1.5", "x", "agg", "disagg", "fp8", "inf", "mixtral-8x7b"]),
    st.text(max_size=5),
)
FIELDS = [*COLUMNS, *WORKER_COLUMNS, "prefill_tp", "decode_workers"]


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from(FIELDS), CELL, max_size=6))
def test_no_cell_is_too_strange_to_read(row: dict[str, str]) -> None:
    """Whatever stands in a cell: the row is read, or an error names what is wrong."""
    try:
        run = read_run({**ROW, **row})
    except InputError as error:
        assert str(error)
    else:
        assert run.concurrency > 0 and run.isl >= 1 and run.gpus >= 1


def test_layouts_of_both_pools() -> None:
    run = read_run({
        **ROW, "model": "deepseek-v3", "mode": "disagg", "prefill_tp": "8", "prefill_ep": "8", "decode_dp": "16",
        "decode_ep": "16", "prefill_workers": "3", "decode_workers": "2",
    })  # fmt: skip
    assert run.prefill == Layout(8, 8, 1, 8) and run.decode == Layout(16, 1, 16, 16)
    assert run.workers == (3, 2) and run.gpus == 3 * 8 + 2 * 16
    # a size without prefix counts for both
    both = read_run({**ROW, "mode": "disagg", "tp": "4"})
    assert both.prefill == both.decode == Layout(4, 4)


@pytest.mark.parametrize(
    ("sizes", "launched"),
    [
        ((64, 1, 8, 8), (8, 1, 1, 8)),  # tp 8 and ep 8 on 8 GPUs
        ((1, 64, 8, 8), (1, 8, 1, 8)),  # the same with attention data-parallel
        ((4, 4, 1, 16), (4, 1, 1, 4)),
        ((8, 1, 1, 8), None),
        ((8, 1, 8, 1), None),
        ((4, 1, 1, 4), None),
        ((1, 8, 1, 8), None),
        ((8, 1, 2, 4), None),
    ],
)
def test_sizes_that_a_record_counts_twice(sizes: tuple[int, ...], launched: tuple[int, ...] | None) -> None:
    assert counted_twice(*sizes) == launched
    if launched:
        tp, dp, etp, ep = launched
        assert tp * dp == etp * ep and (tp * dp) ** 2 == sizes[0] * sizes[1]


def test_precision_follows_the_model_where_it_has_as_many_bits() -> None:
    def quant(model: str, **cells: str) -> str | None:
        return read_run({**ROW, "model": model, **cells}).options.quant

    assert quant("deepseek-v3", precision="fp8") is None  # its own blocks of fp8
    assert quant("gpt-oss-120b", precision="fp4") is None  # its own mxfp4
    assert quant("llama-3.1-8b", precision="fp8") == "linear=fp8,experts=fp8"
    assert quant("llama-3.1-8b", precision="bf16") is None
    assert quant("deepseek-v3", precision="nvfp4") == "linear=nvfp4,experts=nvfp4"
    assert quant("qwen3-30b-a3b", gemm_precision="bf16", moe_precision="fp8_block") == "experts=fp8_block"
    assert read_run({**ROW, "kv_dtype": "fp8_e4m3"}).options.kv_dtype == "fp8"


def test_models_by_any_name() -> None:
    for name in ("deepseek-ai/DeepSeek-V3", "DSV3", "deepseek-v3"):
        assert predict(table({"model": name, "tp": "16", "device": "h200"}))["problem"][0] == ""
    near = read_run({**ROW, "model": "nvidia/Llama-3.1-8B-Instruct-FP8"})
    assert near.model == "nvidia/Llama-3.1-8B-Instruct-FP8"  # a known release, whose cache is in FP8, too
    assert {"model llama-3.1-8b", "stored in fp8, the cache in fp8"} <= {*near.assumed}
    other = read_run({**ROW, "model": "someone/Llama-3.1-8B-FP8"})
    assert other.model == "llama-3.1-8b" and "model llama-3.1-8b" in other.assumed


def test_replicas_share_the_load() -> None:
    out = predict(table({"replicas": "4", "concurrency": "32"}, {"concurrency": "8"}))
    assert out["tpot_s"][0] == pytest.approx(out["tpot_s"][1])
    assert out["output_tokens_per_s"][0] == pytest.approx(4 * out["output_tokens_per_s"][1])
    assert out["gpus"][0] == 4


def test_processes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorcast.predict.predict.FEW", 1)
    rows = table(*({"concurrency": str(c), "tp": str(tp)} for tp in (1, 2) for c in (1, 5, 90)))
    pd.testing.assert_frame_equal(predict(rows), predict(rows, jobs=2))


def test_errors_by_hand() -> None:
    frame = pd.DataFrame({"tpot_s": [1.0, 1.1, 2.0, math.nan], "measured_tpot_s": [1.0, 1.0, 4.0, 1.0]})
    frame["tpot_low_s"], frame["tpot_high_s"] = frame["tpot_s"] * 0.9, frame["tpot_s"] * 1.05
    found = errors(frame, "tpot_s")
    assert found["rows"] == 3 and found["median"] == pytest.approx(0.1) and found["mean"] == pytest.approx(0.6 / 3)
    assert found["within_20"] == pytest.approx(2 / 3) and found["ratio"] == pytest.approx(1.0)
    assert found["inside"] == pytest.approx(2 / 3)
    assert errors(frame.iloc[3:], "tpot_s") == {"rows": 0}


@settings(max_examples=25)
@given(st.lists(st.tuples(st.floats(1, 9), st.floats(1, 9)), min_size=2, max_size=6))
def test_regret_against_brute_force(pairs: list[tuple[float, float]]) -> None:
    layouts = [f"tp{i}" for i in range(len(pairs))]
    frame = pd.DataFrame({"layout": layouts, "tpot_s": [p for p, _ in pairs], "measured_tpot_s": [m for _, m in pairs]})
    frame = frame.assign(model="m", device="d", isl=1, osl=1, concurrency=1)
    found = choice(frame, "tpot_s")
    picked = min(range(len(pairs)), key=lambda i: (pairs[i][0], layouts[i]))
    best = min(m for _, m in pairs)
    assert found["groups"] == 1
    assert found["regret"] == pytest.approx((pairs[picked][1] - best) / best)
    assert found["best"] == (1.0 if pairs[picked][1] == best else 0.0)


def test_only_the_layout_may_differ() -> None:
    rows = [{"layout": f"tp{i}", "concurrency": i, "tpot_s": 1.0, "measured_tpot_s": 1.0} for i in range(1, 4)]
    frame = pd.DataFrame(rows).assign(model="m", device="d", isl=1, osl=1)
    assert choice(frame, "tpot_s") == {"groups": 0}
    alike = frame.assign(concurrency=1, gpus=[1, 2, 2])
    assert choice(alike, "tpot_s")["pairs"] is None  # none measured apart
    assert choice(alike, "tpot_s", same_gpus=True)["groups"] == 1


def test_summary(sample: pd.DataFrame) -> None:
    summary = summarise(sample)
    assert summary["rows"] == summary["predicted"] == 20 and not summary["problems"]
    assert set(summary["by"]) == {"mode", "model", "device", "engine", "layout"}
    assert sum(e["tpot_s"]["rows"] for e in summary["by"]["engine"].values()) == 20
    assert json.loads(json.dumps(summary)) == summary


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["predict", *arguments], env={"COLUMNS": "120", "NO_COLOR": "1"})


def test_command_writes_rows_errors_and_report(tmp_path: Path) -> None:
    runs, out, report = tmp_path / "runs.csv", tmp_path / "out.csv", tmp_path / "serving.md"
    rows = table({"tp": "1"}, {"tp": "2"}, {"tp": "3"}).assign(measured_tpot_s=0.008, measured_ttft_s=0.05)
    runs.write_text("# a comment\n" + rows.to_csv(index=False))
    done = run(str(runs), "--out", str(out), "--report", str(report))
    assert done.exit_code == 0 and "2 of 3 rows predicted" in done.output
    written = pd.read_csv(out, keep_default_na=False)
    assert len(written) == 3 and "heads" in written["problem"][2]
    assert json.loads((tmp_path / "out.errors.json").read_text())["errors"]["tpot_s"]["rows"] == 2
    text = report.read_text()
    assert "time per token" in text and (tmp_path / "serving.png").stat().st_size > 10_000
    # what is written by hand below the mark outlives the next report
    report.write_text(text + "\n<!-- by hand: what follows is kept when the report is made again -->\nMine.\n")
    assert run(str(runs), "--out", str(out), "--report", str(report)).exit_code == 0
    assert report.read_text().endswith("\nMine.\n")
    assert predict_file(out)["problem"][0] == ""  # its own output can be predicted anew


def test_command_json_and_columns(tmp_path: Path) -> None:
    runs = tmp_path / "runs.csv"
    runs.write_text(table({}).to_csv(index=False))
    document = json.loads(run(str(runs), "--json").output)
    assert document["summary"]["predicted"] == 1 and document["rows"][0]["tpot_s"] > 0
    listed = run("--columns").output
    assert all(record["column"] in listed for record in describe_columns())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("# nothing but this\n\n", "is empty"),
        ("model,device\n", "no rows"),
        ("a,b\n1,2\n", "model and device"),
        ("model,model_path\nx,y\n", "both mean"),
        ("model,device,tp,tp\nx,y,1,2\n", "'tp' is there twice, as columns 3 and 4"),
        ("model,device,note,note\nx,y,1,2\n", "'note' is there twice"),
        ("# first\nmodel,device\nllama-3.1-8b,h100\nllama-3.1-8b,h100,4\n", "line 4: has 3 cells"),
        ('model,device\n"llama-3.1-8b,h100\nllama-3.1-8b,h100\n', "not a CSV"),
    ],
)
def test_bad_tables_are_one_line(tmp_path: Path, text: str, says: str) -> None:
    runs = tmp_path / "runs.csv"
    runs.write_text(text)
    done = run(str(runs))
    assert done.exit_code == 2 and says in done.output and done.output.count("\n") == 1
    assert run(str(tmp_path / "none.csv")).exit_code == 2
    assert run().exit_code == 2


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfmodel,device,isl\nllama-3.1-8b,h100,512\n",
        b"model;device;isl\r\nllama-3.1-8b;h100;512\r\n",
        b"model\tdevice\tisl\nllama-3.1-8b\th100\t512\n",
        b"# said before\n\nmodel, device, isl\n# and between\nllama-3.1-8b, h100, 512,,\n",
        b",model,device,isl\n0,llama-3.1-8b,h100,512\n",
        b'model,device,isl,osl\n"llama-3.1-8b",h100,512\n',
    ],
)
def test_tables_as_programs_write_them(tmp_path: Path, content: bytes) -> None:
    runs = tmp_path / "runs.csv"
    runs.write_bytes(content)
    out = predict_file(runs)
    alone = predict(pd.DataFrame([{"model": "llama-3.1-8b", "device": "h100", "isl": "512"}]))
    assert len(out) == 1 and out["problem"][0] == "" and out["tpot_s"][0] == alone["tpot_s"][0]


def test_numbers_with_commas() -> None:
    """Commas may part thousands; a comma for decimals is not read as a ten times larger number."""
    out = predict(table({"isl": "1,024"}, {"isl": "1024"}, {"length_ratio": "0,8"}, {"measured_tpot_s": "0,008"}))
    assert out["tpot_s"][0] == out["tpot_s"][1]
    assert "length_ratio '0,8': must be a number: 0.8, with a point" in out["problem"][2]
    assert "measured_tpot_s '0,008' is no number" in out["assumed"][3] and math.isnan(out["measured_tpot_s"][3])


def test_contexts_beyond_the_models_positions() -> None:
    row = {"model": "mixtral-8x7b", "tp": "2", "osl": "768"}  # 32,768 positions
    out = predict(table({**row, "isl": "32000"}, {**row, "isl": "32001"}))
    assert out["problem"][0] == ""
    assert out["problem"][1].startswith("context length: 32769 tokens, but mixtral-8x7b has 32768 positions")


def test_results_come_back_in_what_a_row_says() -> None:
    row = {"model": "deepseek-v3", "device": "h200", "dp": "32", "ep": "32", "all2all": "high_throughput"}
    out = predict(table({**row, "combine": "fp8"}, row, {**row, "combine": "fp7"}))
    assert out["tpot_s"][0] < out["tpot_s"][1]
    assert "fp7" in out["problem"][2]


def test_no_two_columns_share_a_name() -> None:
    columns = [*COLUMNS.items(), *WORKER_COLUMNS.items()]
    names = [name for key, (_, _, also) in columns for name in (key, *also)]
    assert len(names) == len(set(names))
    assert canonical_columns(["Model-Path", "TP_Size"]) == {"Model-Path": "model", "TP_Size": "tp"}


def test_range_ratio_of_either_client_is_read_and_said() -> None:
    """SGLang's client and vLLM's share a flag that means other lengths: taken as SGLang's, said where it may not be."""
    got = predict(table(*({"engine": engine, "random_range_ratio": "0"} for engine in ("sglang", "vllm"))))
    assert (got["problem"] == "").all() and list(got["assumed"].str.contains("random_range_ratio")) == [False, True]
    alike = predict(table({"engine": "sglang", "random_range_ratio": "1"}))
    assert (got["output_tokens_per_s"][0], got["tpot_s"][0]) != (alike["output_tokens_per_s"][0], alike["tpot_s"][0])
    assert "must be from 0" in predict(table({"length_ratio": "1.5"}))["problem"][0]
    burst = predict(table(*({"requests": "8", "length_ratio": ratio} for ratio in ("0", "0.001"))))
    assert (burst["problem"] == "").all() and burst["tpot_s"][0] == pytest.approx(burst["tpot_s"][1], rel=0.02)


def test_formats_as_engines_flags_call_them() -> None:
    """``mxfp8`` and ``modelopt_fp4`` (SGLang's): another format than the model's own, its experts' bytes counted."""
    row = {"model": "deepseek-v3", "device": "b200", "tp": "8"}
    got = predict(table(*({**row, "precision": name} for name in ("mxfp8", "modelopt_fp4", "nvfp4"))))
    assert (got["problem"] == "").all()
    assert got["tpot_s"][1] == got["tpot_s"][2] < got["tpot_s"][0]


def test_engines_own_names_of_columns_are_read() -> None:
    ours = predict(table({"tp": 2, "isl": 900, "osl": 90, "precision": "fp8", "concurrency": 4}))
    theirs = {"tensor_parallel_size": 2, "random_input_len": 900, "random_output_len": 90, "max-concurrency": 4}
    for name in ("quant", "quantization"):
        frame = pd.DataFrame([{"model": ours["model"][0], "device": ours["device"][0], **theirs, name: "fp8"}])
        assert predict(frame)["tpot_s"][0] == pytest.approx(ours["tpot_s"][0])
    said = predict(table({"dtype": "fp8"})).attrs["notes"]
    assert any("precision" in note for note in said)
    said = predict(table({"dtype": "auto", "precision": "fp8"})).attrs["notes"]
    assert not any("precision" in note for note in said)


MEASURED_CELLS = {"measured_ttft_s": 0.05, "measured_tpot_s": 0.008, "measured_output_tokens_per_s": 900.0}


@pytest.mark.parametrize("measured", [names for n in range(4) for names in itertools.combinations(MEASURED_CELLS, n)])
def test_any_of_the_measured_columns_will_do(tmp_path: Path, measured: tuple[str, ...]) -> None:
    """Terminal, table, report and JSON of one row; what was measured is scored."""
    runs, out, report = tmp_path / "runs.csv", tmp_path / "out.csv", tmp_path / "page.md"
    table({}).assign(**{name: MEASURED_CELLS[name] for name in measured}).to_csv(runs, index=False)
    said = run(str(runs), "--out", str(out), "--report", str(report))
    assert said.exit_code == 0, said.output
    document = json.loads(run(str(runs), "--json").stdout)
    scored = {name.removeprefix("measured_") for name in measured}
    assert scored <= set(document["summary"]["errors"])
    words = {"ttft_s": "time to first token", "tpot_s": "time per token", "output_tokens_per_s": "tokens/s"}
    for name in scored:
        assert document["summary"]["errors"][name]["rows"] == 1
        assert words[name] in said.output and words[name] in report.read_text()
    assert ("Errors" in said.output) == bool(measured) and len(pd.read_csv(out)) == 1
