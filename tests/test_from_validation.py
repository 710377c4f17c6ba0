"""Whose measurements may be folded into a profile, what the command refuses, and the report's headline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from test_validate import device, synthetic
from typer.testing import CliRunner

from tensorcast.calibrate.constants import from_validation as calibrate
from tensorcast.cli import app
from tensorcast.errors import InputError
from tensorcast.measure.store import read_table
from tensorcast.profiles.store import load_device
from tensorcast.report.validate import headline
from tensorcast.validate.run import Validation

GPU_NAMES = [
    ("NVIDIA H200", "h200", True), ("NVIDIA H100 80GB HBM3", "h100", True), ("NVIDIA A100-SXM4-80GB", "a100", True),
    ("NVIDIA GB200", "gb200", True), ("NVIDIA H20", "h20", True), ("Ascend910B3", "ascend-910b", True),
    ("NVIDIA H200", "h20", False), ("NVIDIA GB200", "b200", False), ("NVIDIA H100 PCIe", "h100", False),
    ("AMD EPYC", "h200", False), ("", "h200", False),
    ("NVIDIA H100 PCIe", "h100-pcie", True), ("NVIDIA A100 80GB PCIe", "a100-pcie", True), ("NVIDIA L4", "l4", True),
    ("NVIDIA L40S", "l4", False), ("NVIDIA H100 80GB HBM3", "h100-pcie", False), ("NVIDIA GB300", "b300", False),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000", True), ("AMD Instinct MI325X", "mi325x", True),
]


@pytest.mark.parametrize(("recorded", "name", "same"), GPU_NAMES)
def test_measurements_of_another_device_are_refused(recorded: str, name: str, same: bool) -> None:
    profile = load_device(name)
    assert calibrate.is_device(recorded, profile) == same
    frame = synthetic().assign(device=recorded)
    if not same:
        with pytest.raises(InputError, match=f"{profile.name}.* taken on {recorded or 'a device'}"):
            calibrate.calibrate(profile, frame)
        named = profile.model_copy(update={"aliases": (*profile.aliases, recorded)})
        assert not recorded or calibrate.is_device(recorded, named)


def test_a_host_is_its_processor() -> None:
    host = device(sources={"host": "measured", "book": "none"})
    assert calibrate.is_device("made up", host) and not calibrate.is_device("NVIDIA H200", host)
    with pytest.raises(InputError, match=r"cpu \(made up\): the measurements were taken on another"):
        calibrate.calibrate(host, synthetic().assign(device="another"))


def test_the_kept_cpu_run_makes_no_gpu_profile(tmp_path: Path) -> None:
    kept = Path(__file__).parent.parent / "reports" / "validate-cpu" / "measurements.parquet"
    target = tmp_path / "h200.yaml"
    done = CliRunner().invoke(app, ["calibrate", "-d", "h200", "--from", str(kept), "--write", str(target)])
    assert done.exit_code == 2 and len(done.output.strip().splitlines()) == 1 and not target.exists()
    assert "h200-sxm" in done.output and read_table(kept).device[0] in done.output


def test_the_headline_is_not_flattered_by_small_ops() -> None:
    """100 small ops are right, the one that takes nearly all the time is off by half."""
    small = [{"op": "mul", "family": "memory", "seconds": 1e-6, "error": 0.0, "count": 1, "key": str(i)}
             for i in range(100)]
    large = {"op": "mm", "family": "gemm", "seconds": 0.9, "error": -0.5, "count": 10, "key": "mm"}
    empty = pd.DataFrame()
    busy = {"device profile": "measured here, 2 threads, while other processes took 31% of the cores: far too slow"}
    result = Validation(
        title="toy", environment=busy, ops=pd.DataFrame([*small, large]), layers=empty, collectives=empty,
        checks=empty, fits=empty, left_out=empty, notes=(), device=load_device("h200"),
    )
    first, by_time, families, crowd = headline(result)
    assert "within 0.0%" in first and "is 50.0%" in by_time and "took 31% of the cores" in crowd
    assert families.index("dense GEMM 50.0% (1 ops, 100.0% of the time)") < families.index("norms")
    assert len(headline(replace(result, environment={"device profile": "measured here"}))) == 3


@pytest.mark.parametrize(("flags", "words"), [
    (["--engine", "vllm", "--write", "."], "--engine: for a validate run only"),
    (["--json", "--write", "."], "--json: for a validate run only"),
    ([], "--write is missing"), (["--write", "nowhere"], "no folder devices/"),
])
def test_from_tables_nothing_is_ignored_or_written_unasked(
    flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "profiles" / "devices").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["calibrate", "-d", "h200", "--from", str(tmp_path), *flags])
    assert done.exit_code == 2 and words in done.output and len(done.output.strip().splitlines()) == 1
    assert not list((tmp_path / "profiles").rglob("*.*"))
