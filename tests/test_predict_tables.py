"""Tables of runs as people write them: what separates cells, and the units of what they measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from tensorcast.cli import app
from tensorcast.errors import InputError
from tensorcast.predict.predict import predict, predict_file

RUN = {"model": "llama-3.1-8b", "device": "h100", "tp": 2, "osl": 128, "concurrency": 8}


@pytest.mark.parametrize(("column", "unit", "said"), [
    ("measured_tpot_s", 1e3, "a column in milliseconds is called measured_tpot_ms"),
    ("measured_ttft_s", 1e3, "a column in milliseconds is called measured_ttft_ms"),
    ("measured_tpot_ms", 1.0, "a column in seconds is called measured_tpot_s"),
    ("measured_tpot_s", 1.0, ""), ("measured_tpot_ms", 1e3, ""),
])  # fmt: skip
def test_times_in_another_unit_than_their_column_says_are_told(column: str, unit: float, said: str) -> None:
    rows: list[dict[str, Any]] = [{**RUN, "isl": isl} for isl in (512, 4096)]
    predicted = predict(pd.DataFrame(rows))[column.removeprefix("measured_").partition("_")[0] + "_s"]
    measured = [{**row, column: 1.5 * float(s) * unit} for row, s in zip(rows, predicted, strict=True)]
    notes = predict(pd.DataFrame([*measured, {**RUN, "isl": 64}])).attrs["notes"]
    assert any(said in note for note in notes) if said else not notes


@pytest.mark.parametrize("mark", [";", "|"])
def test_a_first_line_may_say_what_separates_cells(mark: str, tmp_path: Path) -> None:
    cells = "model,device,concurrency\nllama-3.1-8b,h100,8\n".replace(",", mark)
    (tmp_path / "runs.csv").write_text(f"sep={mark}\n{cells}")
    (tmp_path / "only.csv").write_text(f"sep={mark}\n")
    assert predict_file(tmp_path / "runs.csv")["problem"].tolist() == [""]
    with pytest.raises(InputError, match="is empty"):
        predict_file(tmp_path / "only.csv")


def test_problems_are_told_once_for_all_layouts_and_the_rarest_in_the_table_alone(tmp_path: Path) -> None:
    rows = [f"qwen3-30b-a3b,mi300x,trtllm,{tp},8" for tp in (1, 2, 4)]
    rows += [f"qwen3-30b-a3b,h100,vllm,1,[{word}]" for word in "abcdefghijklmnop"]
    (tmp_path / "runs.csv").write_text("\n".join(["model,device,engine,tp,concurrency", *rows]))
    shown = CliRunner().invoke(app, ["predict", str(tmp_path / "runs.csv")], env={"COLUMNS": "200"}).stdout
    (line,) = (one for one in shown.splitlines() if "cannot run it" in one)
    assert line.strip().startswith("3 x trtllm")
    assert "1 x concurrency '[a]': must be a number" in shown
    assert "+ 5 rows with 5 other problems: column problem" in shown


def test_a_table_without_one_prediction_is_told_by_the_exit_code(tmp_path: Path) -> None:
    head, bad = "model,device,concurrency", "qwen3-8b,h1000,4"
    (tmp_path / "none.csv").write_text(f"{head}\n{bad}\n")
    (tmp_path / "some.csv").write_text(f"{head}\n{bad}\nqwen3-8b,h100,4\n")
    none = CliRunner().invoke(app, ["predict", str(tmp_path / "none.csv"), "--out", str(tmp_path / "out.csv")])
    assert none.exit_code == 2
    assert none.stderr.strip().endswith("none.csv: no row can be predicted: unknown device 'h1000': did you mean h100, "
                                        "h100-80gb, v100?")  # fmt: skip
    assert "h1000" in (tmp_path / "out.csv").read_text()  # each row says why, as always
    assert CliRunner().invoke(app, ["predict", str(tmp_path / "some.csv")]).exit_code == 0
