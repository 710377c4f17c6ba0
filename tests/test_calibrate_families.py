"""One family of a device fitted anew: its constants, its kernel models and what is said of them, all else as it was."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from tensorcast.calibrate import devices
from tensorcast.calibrate.measured_rows import MeasuredKernel, MeasuredSystem
from tensorcast.cost.kernels.device_model import DeviceModel, read_model
from tensorcast.profiles.device import Calibration, DeviceProfile

SHIPPED = Path(__file__).parent.parent / "profiles"


def test_all_but_the_family_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, key = "mi300x", ("gemm", "fp8_block", "any", "")
    for file in (f"devices/{name}.yaml", f"calibration/{name}.yaml", f"calibration/{name}.npz"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(SHIPPED / file, tmp_path / file)
    before = read_model(tmp_path / "calibration" / f"{name}.npz")
    rows = MeasuredKernel(key, {"m": np.ones(3)}, np.ones(3), ("aiter 9.9",))
    other = MeasuredKernel(("all_reduce", "any", "any", ""), {"bytes": np.ones(3)}, np.ones(3), ("nccl 9.9",))
    dropped = {"gemm: of a new rule": 7, "all_reduce: of a new rule": 8}
    table = MeasuredSystem("toy", {key: rows, other.key: other}, dropped, source="toy")
    monkeypatch.setattr(devices, "read_device", lambda *_: table)

    def fitted(device: DeviceProfile, *_: object) -> Calibration:
        assert device.calibration is not None
        return device.calibration

    def fit_model(system: MeasuredSystem, device: DeviceProfile, source: str) -> DeviceModel:
        assert set(system.kernels) == {key}  # what a folder holds beside is not fitted
        anew = replace(before.kernels[key], report={**before.kernels[key].report, "points": 3})
        gemms = {k: kernel for k, kernel in before.kernels.items() if k[0] == "gemm"}
        return DeviceModel(device.name, gemms | {key: anew}, source)

    monkeypatch.setattr(devices.from_tables, "fit_families", fitted)
    monkeypatch.setattr(devices.residual, "fit_model", fit_model)
    devices.calibrate(tmp_path, tmp_path, [name], families=["gemm"])

    after = read_model(tmp_path / "calibration" / f"{name}.npz")
    assert list(after.kernels) == sorted(before.kernels) and after.provenance == before.provenance
    assert after.kernels[key].report["points"] == 3
    for other_key in set(before.kernels) - {key}:
        old, new = before.kernels[other_key], after.kernels[other_key]
        assert new.report == old.report and np.array_equal(new.trees.leaves, old.trees.leaves)
    said, was = (
        yaml.safe_load((root / "calibration" / f"{name}.yaml").read_text()) for root in (tmp_path, SHIPPED)
    )
    assert set(said["versions"].split(", ")) == {*was["versions"].split(", "), "aiter 9.9"}
    kept = {reason: n for reason, n in was["dropped"].items() if not reason.startswith("gemm:")}
    assert said["dropped"] == {**kept, "gemm: of a new rule": 7}
    gemms = {line["dtype"]: line["points"] for line in said["kernels"] if line["family"] == "gemm"}
    assert gemms == {"fp8_block": 3, "int8": before.kernels["gemm", "int8", "any", ""].report["points"]}
    assert [line for line in said["kernels"] if line["family"] != "gemm"] == [
        line for line in was["kernels"] if line["family"] != "gemm"
    ]
