"""The loop a user runs: measure, calibrate, measured again better; killed and resumed; two ranks; the GPU script."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from families import SMALL
from typer.testing import CliRunner

import tensorcast as tc
from tensorcast.calibrate.constants import this_machine as host
from tensorcast.cli import app
from tensorcast.measure.store import PARTIAL, Store, read_table
from tensorcast.profiles.store import load_device
from tensorcast.report.sections import markdown, page_html
from tensorcast.report.validate import finding, sections
from tensorcast.validate.run import Validation

ROOT = Path(__file__).resolve().parent.parent

SIZES = ["--effort", "0.05", "--batch", "1,2,8", "--context", "24", "--input-len", "8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of two layers, and this machine's profile, roughly measured, as a file."""
    folder = tmp_path_factory.mktemp("validate")
    (folder / "tiny").mkdir()
    config = {**SMALL["qwen3_moe"], "num_hidden_layers": 2}
    (folder / "tiny" / "config.json").write_text(json.dumps(config))
    profile = host.host_profile(0.02).model_dump(mode="json", exclude_defaults=True)
    (folder / "machine.yaml").write_text(yaml.safe_dump(profile, sort_keys=False))
    return folder


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "tensorcast", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def run(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def measured(place: Path) -> Path:
    out = place / "out"
    said = run("validate", place / "tiny", "--device", place / "machine.yaml", *SIZES, "--out", out)
    assert "ops are predicted within" in said and "Run under torchrun" in said and "report.html" in said
    return out


def test_everything_is_measured_and_told(measured: Path) -> None:
    frame = read_table(measured / "measurements.parquet")
    assert len(frame) > 150 and set(frame.level) == {"op"} and not frame.problem.any()
    assert (frame.seconds > 0).all() and (frame.predicted_s > 0).all() and (frame.low_s <= frame.high_s).all()
    assert set(frame.phase) == {"decode", "prefill"} and set(frame.evidence) == {"calibrated"}
    text = read_table(measured / "measurements.csv")
    pd.testing.assert_frame_equal(text, frame, check_dtype=False, rtol=1e-9)
    told = (measured / "report.md").read_text()
    for words in ("## Environment", "| torch |", "## The ten worst", "likely cause", "## Calibration",
                  "step of 2 layers", "## Correctness", "![Validation"):
        assert words in told, words
    errors = [float(line.split("|")[3]) for line in told.splitlines() if "float32" in line]
    assert len(errors) == 2 and max(errors) < 1e-5
    page = (measured / "report.html").read_text()
    assert "data:image/png;base64," in page and page.count("<table>") == told.count("\n|---")
    assert not (measured / PARTIAL).exists()


def test_layers_are_compared_with_the_sum_of_their_ops(measured: Path) -> None:
    frame = pd.read_csv(measured / "layers.csv")
    assert len(frame) == 3 * (3 + 3)  # two kinds of layer and the step, at six sizes
    assert (frame.seconds > 0).all() and (frame.ops_s > 0).all() and not frame.ops_missing.any()
    step, kinds = frame[frame.what.str.startswith("step")], frame[~frame.what.str.startswith("step")]
    assert step.ops_s.sum() > kinds.ops_s.sum()


def test_calibration_lowers_the_error_and_reads_back(place: Path, measured: Path) -> None:
    target = place / "fitted.yaml"
    arguments = ("--device", place / "machine.yaml", "--from", measured / "measurements.parquet", "--write", target)
    told = json.loads(run("calibrate", *arguments, "--json"))
    assert told["error_after"] < told["error_before"]
    assert all(fit["after"] < fit["before"] for fit in told["fits"] if not fit["verdict"])
    before, after = load_device(place / "machine.yaml"), load_device(target)
    assert after.name == "cpu" and after.calibration is not None and before.calibration is not None
    assert "left out" in after.calibration.provenance and "points" in after.calibration.provenance
    taken = {(f["family"], f["dtype"]): f for f in told["fits"] if not f["verdict"]}
    kept = {(c.family, c.dtype): c for c in after.calibration.kernels}
    for key, fit in taken.items():
        assert (kept[key].points, kept[key].held_out) == (fit["points"], fit["held_out"])
    untouched = {(c.family, c.dtype) for c in before.calibration.kernels} - set(taken)
    assert untouched <= set(kept)
    simulated = tc.simulate(
        str(place / "tiny"), device=str(target), engine="eager", batch=2, context=24, allow_oversize=True
    )
    assert set(simulated.ops.evidence) == {"calibrated"}
    # the same measurements again: nothing better is found, and the file stays
    content = target.read_bytes()
    again = CliRunner().invoke(app, ["calibrate", "--device", str(target), *map(str, arguments[2:])])
    assert again.exit_code in (0, 2) and (again.exit_code == 0 or target.read_bytes() == content)


@pytest.mark.parametrize(("arguments", "words"), [
    (["validate", "TINY", "--device", "h200"], "no CUDA device"),
    (["validate", "TINY", "--device", "MACHINE", "--layers", "3"], "has 2 layers"),
    (["validate", "TINY", "--device", "MACHINE", "--batch", "0"], "--batch '0'"),
    (["validate", "TINY", "--device", "MACHINE", "--phase", "both"], "must be prefill or decode"),
    (["validate", "TINY", "--device", "MACHINE", "--batch", "9999999", "--context", "99999"], "--shrink"),
    (["calibrate", "--device", "MACHINE", "--from", "none.parquet", "--write", "x.yaml"], "cannot read"),
    (["calibrate", "--from", "none.parquet"], "--device is missing"),
])
def test_bad_requests_are_one_line(place: Path, arguments: list[str], words: str) -> None:
    real = {"TINY": str(place / "tiny"), "MACHINE": str(place / "machine.yaml")}
    done = CliRunner().invoke(app, [real.get(a, a) for a in arguments])
    assert done.exit_code == 2 and words in done.output and len(done.output.strip().splitlines()) == 1


def test_killed_midway_goes_on_from_what_it_kept(place: Path) -> None:
    out = place / "killed"
    arguments = command(
        "validate", place / "tiny", "--device", place / "machine.yaml", "--effort", "0.1", "--batch", "1,3",
        "--phase", "decode", "--context", "16", "--out", out,
    )
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / PARTIAL).exists() and len((out / PARTIAL).read_text().splitlines()) > 30:
            break
        time.sleep(0.01)
    assert process.poll() is None, process.stdout.read().decode() if process.stdout else ""
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = Store(out / PARTIAL).rows
    assert len(kept) >= 10 and not (out / "report.md").exists()
    subprocess.run(arguments, env=environment(), check=True, capture_output=True, timeout=240)
    frame = read_table(out / "measurements.csv").set_index("key")
    for key, row in kept.items():
        assert frame.loc[[key]].seconds.iloc[0] == pytest.approx(row["seconds"], rel=1e-12)
    assert len(frame) > len(kept) and not (out / PARTIAL).exists()


def test_two_ranks_measure_collectives_and_expert_parallelism(place: Path) -> None:
    out = place / "ranks"
    arguments = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        *command("validate", place / "tiny", "--device", place / "machine.yaml", "--effort", "0.05", "--batch", "3",
                 "--phase", "decode", "--context", "8", "--ops-only", "--out", out)[1:],
    ]
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    frame = pd.read_csv(out / "collectives.csv")
    moved = frame[frame.level == "collective"]
    assert set(moved.op) == {"all_reduce", "all_gather", "reduce_scatter", "all_to_all"} and set(moved.ranks) == {2}
    assert (moved.seconds > 0).all() and (moved.predicted_s > 0).all() and moved.payload_bytes.nunique() >= 6
    layer = frame[frame.level == "expert_parallel"]
    assert len(layer) == 1 and layer.relative_error.iloc[0] < 1e-5 and "ep2" in layer["shape"].iloc[0]
    told = (out / "report.md").read_text()
    assert "## Collectives" in told and "## Expert parallelism" in told and "not measured" not in told


def _script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_short_gpu_script_holds_every_part_against_the_cpu(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "moe-gpu"
    assert _script("moe_gpu").main(["--device", str(place / "machine.yaml"), "--tiny", "--out", str(out)]) == 0
    assert "all as on the CPU" in capsys.readouterr().out
    rows = pd.read_csv(out / "moe_gpu.csv")
    assert rows.ok.all() and set(rows.part) == {"op", "layer", "quantised", "time"}
    assert (rows[rows.part == "time"][["seconds", "predicted_s"]] > 0).all(axis=None)
    assert "torch" in (out / "moe_gpu.json").read_text()


def test_gpu_script_runs_at_toy_sizes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = _script("validate_gpu")
    out = place / "gpu"
    assert script.main(["--device", str(place / "machine.yaml"), "--tiny", "--out", str(out)]) == 0
    assert "all parts ran" in capsys.readouterr().out
    numerics = pd.read_csv(out / "numerics.csv")
    assert numerics.ok.all() and len(numerics) == 2 * 2 * 5
    layers = pd.read_csv(out / "moe_layers.csv")
    assert len(layers) == 2 * 5 and (layers.seconds > 0).all() and (layers.relative_error < 5e-2).all()
    assert load_device(out / "machine-fitted.yaml").calibration is not None
    assert {"deepseek-v3", "qwen3-235b-a22b"} == set(script.MOE_LAYERS) and len(script.FAMILIES) == 10
    assert script.main([]) == 2  # no CUDA device here


def test_a_result_without_measurements_still_makes_a_page() -> None:
    empty = pd.DataFrame()
    device = load_device("h200")
    result = Validation(
        title="nothing <b>", environment={"device": "x"}, ops=empty, layers=empty, collectives=empty, checks=empty,
        fits=empty, left_out=empty, notes=("a note",), device=device,
    )
    page = sections(result)
    assert finding(result) == "No op was measured" and "- " not in markdown(page)
    assert "nothing &lt;b&gt;" in page_html(page) and "a note" in markdown(page)
