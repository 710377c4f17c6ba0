"""The machine as a device: plausible figures, measured once and kept."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tensorcast as tc
from tensorcast.calibrate.constants import this_machine as host
from tensorcast.cost.roofline import constants_for
from tensorcast.files import write_atomically
from tensorcast.measure import probes
from tensorcast.measure.environment import threads as host_threads
from tensorcast.profiles.device import DeviceProfile

EFFORT = 0.02
"""Rough figures in about a second."""


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> DeviceProfile:
    """Measured once for this module; whether it was kept depends on what else this machine is doing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORCAST_CACHE", str(tmp_path_factory.mktemp("measured")))
        return host.host_profile(EFFORT)


@pytest.fixture
def cache(profile: DeviceProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that holds ``profile``; its file."""
    monkeypatch.setenv("TENSORCAST_CACHE", str(tmp_path))
    path = host._file(EFFORT)
    assert path is not None
    write_atomically(path, profile.model_dump_json(exclude_defaults=True))
    return path


@pytest.fixture
def canned(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Measuring is replaced by made-up figures; the list says with which efforts it was asked for."""
    asked: list[float] = []

    def measure(threads: int, effort: float) -> probes.ProbedHost:
        asked.append(effort)
        return probes.ProbedHost({"bf16": 2e11, "fp32": 1e11}, 3e10, 2e-6, {})

    monkeypatch.setattr(probes, "measure", measure)
    return asked


def test_profile_is_plausible(profile: DeviceProfile) -> None:
    assert profile.name == "cpu" and profile.processors == host_threads()
    assert {"bf16", "fp32"} <= set(profile.peak_flops)
    assert all(1e8 < float(rate) < 1e15 for rate in profile.peak_flops.values())
    assert 1e9 < float(profile.memory_bandwidth_bytes_per_s) < 2e12
    assert 1e8 < float(profile.memory_bytes) < 1e14
    assert profile.interconnect[0].name == "host"
    assert f"torch {torch.__version__}" in profile.sources["host"] and "threads" in profile.sources["host"]


def test_profile_says_how_sure_it_is(profile: DeviceProfile) -> None:
    assert profile.calibration is not None
    for family in probes.PROBES:
        for dtype in probes.DTYPES:
            constants, evidence = constants_for(profile, family, dtype)
            assert (constants.family, constants.dtype, evidence) == (family, dtype, "calibrated")
            assert constants.points >= 4 and constants.held_out >= 2
            assert constants.median_error is not None and constants.median_error >= 0
            assert 0 < constants.launch_s < 1e-2


def test_profile_survives_its_file(profile: DeviceProfile) -> None:
    assert DeviceProfile.model_validate_json(profile.model_dump_json(exclude_defaults=True)) == profile


def test_second_call_reads_the_file(cache: Path, canned: list[float], profile: DeviceProfile) -> None:
    assert host.host_profile(EFFORT) == profile
    assert canned == []


@pytest.mark.parametrize("content", ["", "{", '{"name": "cpu"}', "\x00\xff"])
def test_damaged_file_is_measured_anew(cache: Path, canned: list[float], content: str) -> None:
    cache.write_text(content, encoding="latin-1")
    assert float(host.host_profile(EFFORT).peak_flops["bf16"]) == 2e11
    assert canned == [EFFORT]
    assert float(host.host_profile(EFFORT).peak_flops["bf16"]) == 2e11  # and the file is whole again
    assert canned == [EFFORT]
    assert os.listdir(cache.parent) == [cache.name]  # no temporary file is left


def test_cache_off_measures_every_time(canned: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORCAST_CACHE", "off")
    host.host_profile()
    host.host_profile()
    assert canned == [1.0, 1.0]


def test_crowded_machine_is_not_measured_for_keeps(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.unlink()
    crowded = probes.ProbedHost({"bf16": 2e11, "fp32": 1e11}, 3e10, 2e-6, {}, crowding=0.4)
    monkeypatch.setattr(probes, "measure", lambda threads, effort: crowded)
    assert "other processes took 40%" in host.host_profile(EFFORT).sources["host"]
    assert not cache.exists() and "far too slow" in caplog.text
    crowded.crowding = 0.01
    assert "other processes" not in host.host_profile(EFFORT).sources["host"]
    assert cache.exists()


def test_unwritable_cache_costs_only_time(
    canned: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("TENSORCAST_CACHE", str(tmp_path / "file"))
    assert host.host_profile().name == "cpu"


def test_file_depends_on_threads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "threads", lambda: 1234)
    assert host._file(EFFORT) != cache


def test_threads_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert host_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert host_threads() >= 1


def test_measuring_leaves_torch_as_it_was(profile: DeviceProfile) -> None:
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_reading_the_file_needs_no_torch(cache: Path) -> None:
    code = (
        f"import sys; from tensorcast.calibrate.constants.this_machine import host_profile; host_profile({EFFORT}); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_simulate_on_this_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that no laptop holds can still be priced, when asked to."""
    monkeypatch.setattr(host, "host_profile", functools.partial(host.host_profile, EFFORT))
    run = tc.simulate("qwen3-30b-a3b", device="cpu", tp=1, batch=1, context=128, engine="eager", allow_oversize=True)
    assert run.deployment.device.name == "cpu"
    assert 1e-3 < run.step_s < 1e3
    assert set(run.ops.evidence) == {"calibrated"}
