"""Mistakes at the command line: each is one line that names the option, its value and what would be right."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from tensorcast.cli import app
from tensorcast.cli.app import _doing

COMPARE = ("compare", "qwen3-30b-a3b", "-d", "h100", "-n", "4")
EXPLAIN = ("explain", "qwen3-30b-a3b", "-d", "h100", "-n", "4", "-l", "tp4", "-v", "tp4-ep4")
RUNS = "model,device,tp,concurrency\nqwen3-30b-a3b,h100,1,8\n"


def invoke(*arguments: str, columns: int = 80) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(columns), "NO_COLOR": "1"})


def refused(*arguments: str) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2 and result.stdout == "", (result.output, result.exception)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("simulate",), ("Missing argument 'model'", "--help")),
        (("simulate", "mixtral-8x7b"), ("--device",)),
        (("simulat",), ("'simulat'", "'simulate'")),
        (("--verbose",), ("--verbose",)),
        (("simulate", "mixtral-8x7b", "-d", "h100", "--bathc", "3"), ("--bathc", "--batch")),
        (("simulate", "mixtral-8x7b", "-d", "h100", "-b", "1e3"), ("--batch '1e3'", "must be a valid integer")),
        (("simulate", "mixtral-8x7b", "-d", "h100", "--top", "-1"), ("--top '-1'", "equal to 0")),
        ((*COMPARE, "--mtp-acceptance", "2"), ("mtp_acceptance = 2.0 (--mtp-acceptance)", "between 0 and 1")),
        ((*COMPARE, "-d", "h200"), ("-d: is given twice", "with commas")),
        ((*COMPARE, "--ttft=2s", "--ttft", "3s"), ("--ttft: is given twice",)),
        ((*COMPARE, "--out", ""), ("--out '': is empty",)),
        ((*COMPARE, "--price="), ("--price '': is empty",)),
        (("simulate", "m" * 300, "-d", "h100"), ("the name is too long", "300 characters")),
        (("simulate", "qwen3-8b", "-d", "h" * 5000), ("the name is too long", "5000 characters")),
        ((*COMPARE, "--ttft", "soon"), ("--ttft 'soon'", "50ms")),
        ((*COMPARE, "--ttft", "1e400"), ("--ttft '1e400'",)),
        ((*COMPARE, "--tpot", "50"), ("--tpot '50'", "50ms or 50s")),
        ((*COMPARE, "--tpot", "0ms"), ("--tpot '0ms'",)),
        (("compare", "qwen3-30b-a3b", "-d", ",", "-n", "4"), ("--device ','",)),
        ((*COMPARE, "--mode", ""), ("--mode '': is empty",)),
        ((*COMPARE, "--price", "h100=inf"), ("--price h100-sxm=inf", "more than 0")),
        ((*COMPARE, "--price", "=2"), ("--price '=2'", "DEVICE=USD")),
        (("simulate", "", "-d", "h100"), ("model: the name is empty", "tensorcast models")),
        (("simulate", "zzzz", "-d", "h100"), ("unknown model 'zzzz'", "more")),
        (("simulate", "mixtral-8x7b", "-d", "h100", "--fusion", "all"), ("--fusion 'all': must be",)),
        (("simulate", "qwen3-30b-a3b", "-d", "h100", "--redundant-experts", "999"), ("fewer --redundant-experts",)),
        (("launch", "mixtral-8x7b", "-d", "h100", "-l", "tp2", "--kv-dtype", "x"), ("--kv-dtype 'x'", "fp8")),
        ((*COMPARE, "--price", "h200=2"), ("--price h200-sxm=2", "--device h100-sxm")),
        ((*COMPARE, "--prefix-cached", "4096"), ("--prefix-cached 4096", "--input-len 4096")),
        ((*COMPARE, "--chunk-tokens", "8,0"), ("--chunk-tokens 0", "at least 1")),
        ((*COMPARE, "--kv-dtype", "bf16,int3"), ("--kv-dtype 'int3'",)),
        ((*COMPARE, "--combine", "logfmt10", "--all2all", "direct"), ("--combine logfmt10", "low_latency")),
        ((*COMPARE, "--combine", "fp7"), ("--combine 'fp7'", "fp8")),
        ((*COMPARE, "-i", "40000", "-o", "1000"), ("--input-len 40000", "--output-len 1000", "40960 positions")),
        ((*EXPLAIN, "-c", "40960"), ("--context 40960: 40961 tokens", "40960 positions")),
        ((*EXPLAIN, "-i", "100"), ("--input-len 100", "--context")),
        ((*EXPLAIN, "-o", "100", "-c", "10"), ("--output-len 100", "--context 10")),
        ((*EXPLAIN, "-o", "100", "--phase", "prefill"), ("--output-len 100", "--phase prefill")),
        (("simulate", "/etc/passwd", "-d", "h100"), ("model /etc/passwd: is a file of another kind", "config.json")),
        (("simulate", "mixtral-8x7b", "-d", "/etc"), ("device /etc: is a directory", "NAME.yaml")),
        ((*COMPARE, "--routing", "no-such.csv"), ("--routing no-such.csv: no such file",)),
        ((*COMPARE, "--request-rate", "-5"), ("--request-rate -5.0", "more than 0")),
        (("simulate", "deepseek-v3", "-d", "h200", "-n", "8", "--mtp-depth", "10000"), ("10000", "at most 128")),
        (("launch", "mixtral-8x7b", "-d", "h100", "--layout", "tp2", "--role", "both"), ("--role 'both'", "decode")),
        (("launch", "mixtral-8x7b", "-d", "h100", "--layout", "tp2 > tp2", "--role", "prefill"),
         ("--role prefill: --layout tp2 > tp2 says both",)),
        (("experts", "llama-3.1-8b", "-d", "h100", "-n", "2", "-l", "tp2"), ("llama-3.1-8b has no experts to place",)),
        (("predict", "no-such.csv"), ("no-such.csv", "no such file")),
        (("calibrate", "-d", "cpu", "--from", "no-such.parquet"), ("no-such.parquet: no such file",)),
        (("calibrate", "-d", "cpu", "--from", "x.csv", "--engine", "vlm"), ("'vlm'", "vllm")),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], said: tuple[str, ...]) -> None:
    message = refused(*arguments)
    assert all(text in message for text in said), message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[tp0]", ("'tp0'", "at least 1")), ("- tp: -4", ("'tp-4'", "tp1-dp32-ep32")), ("[tp4, xx9]", ("'xx9'",)),
        ("[tp4", ("not YAML",)), ("", ("must be a list",)), ("tp4", ("must be a list",)),
        ("layouts: [tp4]\nlayout: [tp2]", ("'layout' is not known",)),
    ],
)
def test_layouts_that_are_none_name_their_file(tmp_path: Path, content: str, said: tuple[str, ...]) -> None:
    (tmp_path / "layouts.yaml").write_text(content)
    message = refused(*COMPARE, "--layouts", str(tmp_path / "layouts.yaml"))
    assert "--layouts" in message and "layouts.yaml" in message and all(text in message for text in said), message


def test_another_file_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs.csv").write_text(RUNS)
    assert "model runs.csv: is a file of another kind" in refused("simulate", "runs.csv", "-d", "h100")


def test_what_is_not_listed_has_no_legend() -> None:
    lines = [invoke("simulate", "mixtral-8x7b", "-d", "h100", "-n", "2", "--top", n).stdout for n in ("0", "3")]
    assert ["n calls per step" in shown for shown in lines] == [False, True]


def test_predict_spares_its_table_and_says_where_it_cannot_write(tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    table.write_text(RUNS)
    assert "is the table itself" in refused("predict", str(table), "--out", str(table))
    assert "is a directory" in refused("predict", str(table), "--report", str(tmp_path))
    same = refused("predict", str(table), "--out", str(tmp_path / "a.txt"), "--report", str(tmp_path / "a.txt"))
    assert "is --out, too" in same
    assert "no such directory" in refused("predict", str(table), "--out", str(tmp_path / "none" / "x.csv"))
    assert table.read_text() == RUNS and os.listdir(tmp_path) == ["runs.csv"]
    table.write_text(RUNS.splitlines()[0])
    assert "no rows" in refused("predict", str(table))


@pytest.mark.parametrize(("content", "said"), [
    (b"PK\x03\x04" + bytes(60), "but an Excel workbook"), (b"PAR1" + bytes(60), "but a Parquet file"),
    (gzip.compress(RUNS.encode(), mtime=0), "but compressed with gzip"), (RUNS.encode("utf-16"), "but text in UTF-16"),
    (b'[{"model": "qwen3-8b"}]', "but JSON"), (RUNS.encode() + b"caf\xe9", "byte 0xe9 is not text in UTF-8"),
    (RUNS.replace(",", "|").encode(), "separated by comma, semicolon or tab"),
    (RUNS.split("\n", 1)[1].encode(), "the first line names columns"),
    (RUNS.encode() + b'"qwen3-8b,h100\n', "a quote opens and does not close"), (b"", "is empty"),
])  # fmt: skip
def test_another_file_is_no_table(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "runs.csv").write_bytes(content)
    message = refused("predict", str(tmp_path / "runs.csv"))
    assert said in message and message.count("runs.csv") == 1, message


@pytest.mark.parametrize(("flag", "name"), [("--out", "o.xlsx"), ("--out", "o.parquet"), ("--report", "r.html")])
def test_predict_writes_no_other_format_than_its_name_says(tmp_path: Path, flag: str, name: str) -> None:
    (tmp_path / "runs.csv").write_text(RUNS)
    assert "is written as" in refused("predict", str(tmp_path / "runs.csv"), flag, str(tmp_path / name))
    assert os.listdir(tmp_path) == ["runs.csv"]


def test_columns_that_are_replaced_or_not_read_are_told(tmp_path: Path) -> None:
    """Seconds under our own names are an earlier prediction where their intervals are beside them."""
    (tmp_path / "runs.csv").write_text("model,device,users,tpot_s,mine\nqwen3-30b-a3b,h100,8,0.05,x\n")
    shown = " ".join(invoke("predict", str(tmp_path / "runs.csv"), "--out", str(tmp_path / "o.csv")).stdout.split())
    assert "columns replaced: tpot_s (measured ones are called measured_tpot_s)" in shown
    assert "columns kept and not read: mine" in shown
    again = invoke("predict", str(tmp_path / "o.csv")).stdout
    assert "columns replaced" not in again and "mine" in again


def test_measured_cells_that_cannot_be_scored_are_counted(tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text(
        "model,device,concurrency,measured_tpot_s\n"
        "qwen3-30b-a3b,h100,8,50ms\nqwen3-30b-a3b,h100,8,\nqwen3-30b-a3b,h100,8,-1\n"
    )
    shown = " ".join(invoke("predict", str(tmp_path / "runs.csv")).stdout.split())
    assert "2 x a measured cell is no number more than 0 and is not scored" in shown and "By model" not in shown


def test_a_report_of_a_table_with_holes(tmp_path: Path) -> None:
    """Empty, negative and wordy cells, columns that are not there: what can be scored is, and nothing breaks."""
    table, page = tmp_path / "runs.csv", tmp_path / "errors.md"
    table.write_text(
        "model,device,concurrency,measured_ttft_s,measured_tpot_s\n"
        "qwen3-30b-a3b,h100,8,nan,\nqwen3-30b-a3b,h100,0,soon,0.01\nqwen3-30b-a3b,h100,8,0.1,-1\n"
        "qwen3-30b-a3b,h100,8,inf,inf\n"
    )
    result = invoke("predict", str(table), "--report", str(page))
    assert result.exit_code == 0 and "3 of 4 rows predicted" in result.stdout, (result.output, result.exception)
    assert "nan" not in result.stdout.split("tokens/s", 1)[1]
    assert "3 of 4 rows predicted" in page.read_text() and "inf" not in page.read_text()


def test_calibrate_names_the_row_that_is_no_number(tmp_path: Path) -> None:
    columns = ("level", "family", "dtype", "seconds", "works", "device")
    pd.DataFrame([("op", "gemm", "bf16", "fast", "[]", "CPU")], columns=columns).to_csv(tmp_path / "m.csv", index=False)
    message = refused("calibrate", "-d", "cpu", "--from", str(tmp_path / "m.csv"))
    assert "row 1" in message and "'fast'" in message
    assert "is a directory" in refused("calibrate", "-d", "cpu", "--from", "m.csv", "--write", str(tmp_path))


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize(
    "arguments",
    [
        ("simulate", "mixtral-8x7b", "-d", "h100", "-n", "2", "--top", "3"), ("models",), ("devices",), ("engines",),
        ("compare", "qwen3-30b-a3b", "-d", "h100,h200", "-n", "4", "--mode", "aggregated", "--top", "3",
         "--objective", "cost", "--price", "h100=2,h200=3"),
    ],
)  # fmt: skip
def test_numbers_are_whole_at_any_width(arguments: tuple[str, ...], columns: int) -> None:
    """No line is wider than the terminal, and no number is cut: an ellipsis is in names alone."""
    result = invoke(*arguments, columns=columns)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert not [line for line in lines if any(word.endswith("…") and word[:1].isdigit() for word in line.split())]


def test_progress_says_what_is_under_way() -> None:
    """The main thread is in none of our modules here, so the verb stands."""
    assert threading.current_thread() is threading.main_thread()
    assert _doing("mixtral-8x7b", "comparing layouts of") == "comparing layouts of mixtral-8x7b"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_write_leaves_no_half_file(tmp_path: Path) -> None:
    code = (
        "import os, signal\nreplace = os.replace\n"
        "def killed(old, new):\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if str(new) == 'o.csv' else replace(old, new)\n"
        "os.replace = killed\n"
        "from tensorcast.cli import main\nimport sys\n"
        "sys.argv = ['tensorcast', 'predict', 'runs.csv', '--out', 'o.csv']\nmain()"
    )
    (tmp_path / "runs.csv").write_text(RUNS)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False, timeout=120)
    assert done.returncode == -9 and not (tmp_path / "o.csv").exists()


@pytest.mark.parametrize("arguments", [("devices",), ("simulate", "qwen3-8b", "-d", "h100", "--json")])
def test_output_that_has_no_room_is_one_line(arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", "tensorcast", *arguments], stdout=full, stderr=subprocess.PIPE,
                              text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: standard output: cannot be written: No space left on device\n"


def test_output_that_goes_nowhere_is_one_line() -> None:
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m tensorcast devices >&-"], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: standard output: cannot be written: Bad file descriptor\n"


LONG = "q" * 300


@pytest.mark.parametrize("arguments", [
    ("simulate", "qwen3-8b", "-d", "h100", "--out", LONG), ("predict", f"{LONG}.csv"),
    ("compare", "qwen3-8b", "-d", "h100", "-n", "2", "--out", LONG),
    ("compare", "qwen3-8b", "-d", "h100", "-n", "2", "--layouts", f"{LONG}.yaml"),
    ("simulate", "qwen3-30b-a3b", "-d", "h100", "--routing", f"recorded:{LONG}.json"),
    ("calibrate", "--from", LONG, "-d", "h100"), ("launch", "qwen3-8b", "-d", "h100", "-l", "tp2", "--out", LONG),
])  # fmt: skip
def test_a_name_that_no_file_can_have_is_one_line(arguments: tuple[str, ...]) -> None:
    assert "the name is too long, 30" in refused(*arguments)


def test_a_misspelt_column_is_named(tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    table.write_text(RUNS.replace("concurrency", "concurency"))
    assert "column 'concurency' is not known: did you mean concurrency?" in refused("predict", str(table))
    table.write_text(RUNS.replace("\n", ",concurency_note\n", 1).replace("8\n", "8,mine\n"))
    assert invoke("predict", str(table)).exit_code == 0  # another's column, and ours is there


def test_a_shell_can_complete_commands() -> None:
    asked = {"_TENSORCAST_COMPLETE": "complete_bash", "COMP_WORDS": "tensorcast comp", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-m", "tensorcast"], env={**os.environ, **asked}, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.stdout.split() == ["compare"]


def test_gpus_follow_from_the_layout_where_no_number_is_said() -> None:
    shown = json.loads(invoke("simulate", "mixtral-8x7b", "-d", "h100", "--tp", "2", "--dp", "2", "--json").stdout)
    assert shown["world_size"] == 4 and shown["layout"] == "tp2-dp2"
    assert "world_size = 8" in refused("simulate", "mixtral-8x7b", "-d", "h100", "--layout", "tp2", "-n", "8")
