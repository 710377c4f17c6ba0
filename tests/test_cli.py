"""The command line: what it prints where, and what it says when asked for something that cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tensorcast import __version__, profiles
from tensorcast.cli import app
from tensorcast.profiles.store import USER_DIRECTORY

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("simulate", "qwen3-30b-a3b", "--device", "h100")
MIXTRAL = ("simulate", "mixtral-8x7b", "--device", "h100", "--world-size", "2")


def invoke(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100", "NO_COLOR": "1", **environment})


def started(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A real process, as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "tensorcast", *arguments], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "COLUMNS": "80"}, timeout=120, **options,
    )  # fmt: skip


def refused(*arguments: str, **environment: str) -> str:
    """The one line that bad input gets: on stderr, exit code 2, nothing on stdout, no traceback."""
    result = invoke(*arguments, **environment)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr
    return result.stderr


# Simulating


def test_simulate_prints_tables_and_nothing_on_stderr() -> None:
    result = invoke(*SMALL, "--batch", "8", "--top", "3")
    assert result.exit_code == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == "qwen3-30b-a3b decode on 1 x h100-sxm, tp1-dp1, vllm"
    assert lines[1] == "8 sequences, each 1 new token after 4,096 cached"
    assert "more ops" in result.stdout and max(map(len, lines)) <= 100


def test_json_is_alone_on_stdout() -> None:
    result = invoke(*SMALL, "--batch", "8", "--json")
    assert result.exit_code == 0 and result.stderr == ""

    def no_constants(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    document = json.loads(result.stdout, parse_constant=no_constants)
    assert document["model"] == "qwen3-30b-a3b" and document["batch_per_dp_rank"] == 8
    assert sum(op["seconds"] for op in document["ops"]) + document["overhead_s"] == pytest.approx(document["step_s"])
    columns = {"op", "module", "shape", "count", "flops", "bytes", "seconds", "bound", "evidence"}
    assert all(columns <= set(op) for op in document["ops"])


def test_json_of_a_real_process() -> None:
    """Nothing that the libraries print gets in its way."""
    done = started(*SMALL, "--batch", "8", "--json")
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout)["device"] == "h100-sxm"


def test_every_option_arrives() -> None:
    result = invoke(
        "simulate", "mixtral-8x7b", "-d", "h200", "-n", "4", "--tp", "2", "--dp", "2", "--ep", "4", "--pp", "1",
        "--phase", "prefill", "-b", "3", "-c", "100", "-i", "512", "-e", "sglang", "--quant", "fp8",
        "--kv-dtype", "fp8", "--routing", "zipf:0.5", "--fusion", "none", "--all2all", "direct",
        "--dispatch", "bf16", "--combine", "fp8_block", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    wanted = {
        "device": "h200-sxm", "engine": "sglang", "world_size": 4, "tp": 2, "dp": 2, "ep": 4, "pp": 1,
        "phase": "prefill", "batch_per_dp_rank": 3, "batch_total": 6, "input_len": 512, "context": 100,
        "routing": "zipf:0.5", "fusion": "none", "all2all": "direct", "dispatch_dtype": "bf16",
        "combine_dtype": "fp8_block", "quantization": "linear=fp8,experts=fp8,kv=fp8",
    }  # fmt: skip
    document = json.loads(result.stdout)
    assert {key: document[key] for key in wanted} == wanted


def test_out_writes_and_says_where(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "er"
    result = invoke(*SMALL, "--out", str(folder))
    assert result.exit_code == 0
    assert {path.name for path in folder.iterdir()} == {"report.md", "ops.csv", "summary.json", "trace.json"}
    assert result.stdout.endswith(f"wrote report.md, ops.csv, summary.json and trace.json to {folder}\n")
    alone = invoke(*SMALL, "--out", str(folder), "--json")
    assert json.loads(alone.stdout)["model"] == "qwen3-30b-a3b"


def test_allow_oversize() -> None:
    result = invoke(*MIXTRAL, "--batch", "4096", "--allow-oversize", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["fits"] is False


# Refusing


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("simulate", "mixtral-8x7", "-d", "h100"), ("mixtral-8x7b", "mixtral-8x22b")),
        (("simulate", "qwen3-30b-a3b", "-d", "h1000"), ("h1000", "did you mean h100")),
        ((*SMALL, "--engine", "vlm"), ("vlm", "vllm")),
        ((*SMALL, "-n", "4", "--tp", "3"), ("tp*dp*pp", "world_size = 4")),
        ((*SMALL, "-n", "3"), ("32 attention heads", "tp = 3")),
        ((*SMALL, "-n", "4", "--ep", "3"), ("ep = 3",)),
        ((*SMALL, "--dp", "0"), ("--dp '0'", "greater than or equal to 1")),
        ((*SMALL, "--routing", "zipf:steep"), ("--routing", "zipf:steep")),
        ((*SMALL, "--routing", "fair"), ("--routing", "balanced, uniform, zipf:S")),
        ((*SMALL, "--phase", "warmup"), ("--phase", "prefill or decode")),
        ((*SMALL, "--batch", "0"), ("--batch '0'",)),
        ((*SMALL, "--input-len", "7"), ("--input-len 7", "--context")),
        ((*SMALL, "--context", "-1"), ("--context -1",)),
        ((*SMALL, "--fusion", "some"), ("--fusion", "engine or none")),
        ((*SMALL, "--quant", "fp6"), ("fp6", "fp8")),
        ((*SMALL, "--kv-dtype", "int3"), ("int3", "fp8")),
        ((*SMALL, "-n", "2", "--dp", "2", "--ep", "2", "--all2all", "pigeon"), ("pigeon",)),
        ((*SMALL, "-n", "2", "--dp", "2", "--ep", "2", "--dispatch", "pigeon"), ("pigeon",)),
    ],
)
def test_bad_input_is_one_clear_line(arguments: tuple[str, ...], said: tuple[str, ...]) -> None:
    message = refused(*arguments)
    assert all(text in message for text in said), message


def test_a_batch_that_does_not_fit_says_by_how_much_and_what_fits() -> None:
    message = refused(*MIXTRAL, "--batch", "4096")
    assert "--batch 4096 does not fit" in message and "GB over the budget" in message
    largest = message.split("the largest that fits is ")[1].split()[0]
    assert invoke(*MIXTRAL, "--batch", largest, "--top", "0").exit_code == 0
    refused(*MIXTRAL, "--batch", str(int(largest) + 1))


def test_a_model_that_does_not_fit_at_all() -> None:
    assert "not even one sequence" in refused("simulate", "mixtral-8x22b", "-d", "h100")


def test_out_that_is_a_file_is_refused_before_any_work(tmp_path: Path) -> None:
    file = tmp_path / "report"
    file.write_text("mine")
    message = refused("simulate", "no-such-model", "-d", "h100", "--out", str(file))
    assert "--out" in message and "not a directory" in message
    assert file.read_text() == "mine"


def test_refused_input_writes_nothing(tmp_path: Path) -> None:
    refused(*MIXTRAL, "--batch", "4096", "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [(*SMALL, "--bathc", "8"), ("simulate", "x"), ("simulat",), (*SMALL, "-b", "many")]
)
def test_unknown_options_exit_2(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.stderr


def test_interrupting_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tensorcast.api.simulate", interrupted)
    result = invoke(*SMALL)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_a_bug_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("tensorcast.api.simulate", broken)
    assert isinstance(invoke(*SMALL).exception, ZeroDivisionError)


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_a_reader_that_leaves_is_no_error() -> None:
    """``| head`` closes the pipe: no traceback, no complaint at exit."""
    command = f"{sys.executable} -m tensorcast models --json | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
    assert done.stdout == "[\n" and done.stderr == ""


# Listing


@pytest.mark.parametrize("command", ["models", "devices", "engines"])
def test_listings_hold_every_profile(command: str) -> None:
    names = set(getattr(profiles, f"list_{command}")())
    table = invoke(command)
    assert table.exit_code == 0
    assert names <= {line.split(" ")[0] for line in table.stdout.splitlines()}
    found = json.loads(invoke(command, "--json").stdout)
    assert {row["name"] for row in found} == names
    assert all(row["sources"] and row["description"] for row in found)


def test_a_broken_profile_does_not_hide_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "devices"
    folder.mkdir()
    (folder / "mine.yaml").write_text("name: mine\nmemory: lots\n")
    result = invoke("devices", **{USER_DIRECTORY: str(tmp_path)})
    assert result.exit_code == 2
    assert "h100-sxm" in result.stdout
    assert result.stderr.startswith("error: ") and "mine.yaml" in result.stderr and result.stderr.count("\n") == 1


def in_a_fresh_process(code: str) -> subprocess.CompletedProcess[str]:
    """``code`` where nothing but typer's runner and the app is imported."""
    prelude = "import sys\nfrom typer.testing import CliRunner\nfrom tensorcast.cli import app\n"
    command = [sys.executable, "-c", prelude + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)


def test_listing_needs_no_torch() -> None:
    done = in_a_fresh_process(
        "for name in ('models', 'devices', 'engines'): assert CliRunner().invoke(app, [name]).exit_code == 0\n"
        "print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_small_products_are_not_spread_over_threads() -> None:
    """Unless the user asks for threads, NumPy's BLAS is told to take one before it is read."""
    code = (
        "import os, sys, tensorcast.cli, tensorcast.__main__ as m\n"
        "tensorcast.cli.main = lambda: print(os.environ['OPENBLAS_NUM_THREADS'], 'numpy' in sys.modules)\n"
        "m.main()"
    )
    for own, told in (({}, "1"), ({"OPENBLAS_NUM_THREADS": "4"}, "4")):
        env = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"} | own
        done = subprocess.check_output([sys.executable, "-c", code], text=True, env=env, cwd=ROOT)
        assert done.split() == [told, "False"]


def test_a_command_ends_with_all_that_was_registered_for_its_end_and_nothing_else_taken_apart() -> None:
    code = (
        "import atexit, sys, tensorcast.__main__ as m\n"
        "class Held:\n    def __del__(self): print('taken apart')\n"
        "held = Held()\natexit.register(print, 'registered')\nsys.argv = ['tensorcast', *sys.argv[1:]]\nm.main()"
    )
    for arguments, status in ((["devices"], 0), (["simulate", "no-such-model"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert done.returncode == status, done.stderr
        assert done.stdout.endswith("registered\n") and "taken apart" not in done.stdout


# Help


def test_help_of_a_real_process() -> None:
    done = started("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert all(name in done.stdout for name in ("simulate", "models", "devices", "engines"))


def test_help_of_all_commands_imports_none_of_them_and_says_of_each_what_its_own_help_says() -> None:
    done = in_a_fresh_process(
        "print(CliRunner().invoke(app, ['--help'], env={'COLUMNS': '200'}).output)\n"
        "print([m for m in sys.modules if m in ('pydantic', 'numpy') or m.startswith('tensorcast.cli.')])"
    )
    *shown, imported = done.stdout.strip().splitlines()
    assert imported == "['tensorcast.cli.app']", done.stdout + done.stderr
    for name in ("simulate", "predict", "devices"):
        line = next(line for line in shown if line.startswith(f"│ {name} "))
        summary = line.strip("│ ").removeprefix(name).strip()
        own = " ".join(invoke(name, "--help", COLUMNS="200").stdout.split())
        assert len(summary) > 20 and summary.rstrip(".") in own


def test_help_teaches_by_example_and_the_examples_run() -> None:
    text = invoke("simulate", "--help", COLUMNS="200").stdout
    examples = [line.split() for line in text.splitlines() if line.strip().startswith("tensorcast simulate")]
    assert len(examples) >= 3 and "per data-parallel rank" in text
    options = {option for words in examples for option in words if option.startswith("-")}
    assert options <= set(text.replace(",", " ").split())
    shown = next(words for words in examples if "qwen3-235b-a22b" in words)
    # the arguments themselves, without tracing so large a model here
    assert invoke(*shown[1:], "--out", os.devnull).exit_code == 2


def test_version_and_no_arguments() -> None:
    assert invoke("--version").stdout == f"tensorcast {__version__}\n"
    assert "Usage" in invoke().output
