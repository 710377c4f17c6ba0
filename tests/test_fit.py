"""Fitting constants, reading tables, writing the calibration block, and the sample's accuracy."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from tensorcast.calibrate.constants import from_tables as fit
from tensorcast.calibrate.constants import tables
from tensorcast.calibrate.constants.collectives import fit_collective
from tensorcast.calibrate.constants.errors import kernel_seconds
from tensorcast.cost import roofline
from tensorcast.errors import InputError
from tensorcast.profiles.device import Calibration, CollectiveConstants, DeviceProfile, KernelConstants
from tensorcast.validate.accuracy import sample as accuracy

SAMPLE = Path(__file__).parent / "data" / "kernel_sample.csv"

HAND_WRITTEN = """# made-up device
name: toy   # odd spacing stays
vendor: none
architecture: none
description: round numbers
sources: {book: none}
processors: 100
peak_flops:
  bf16: {value: 1.0e15, source: book}
memory_bytes: {value: 1.0e11, source: book}
memory_bandwidth_bytes_per_s: {value: 4e12, source: book}
interconnect:
  - {name: link, size: 8, bandwidth_bytes_per_s: {value: 4e11, source: book}, latency_s: {value: 1e-6, source: book}}
"""


@pytest.fixture
def device() -> DeviceProfile:
    return DeviceProfile.model_validate(yaml.safe_load(HAND_WRITTEN))


def calibration() -> Calibration:
    return Calibration(
        provenance="made up: 'quotes', #hash and {braces}", date="2026-01-02", dropped={"gemm: slow: really": 3},
        kernels=(
            KernelConstants(
                family="gemm", dtype="bf16", engine="vllm", compute_efficiency=0.8123, memory_efficiency=0.9,
                launch_s=2.5e-6, step_s=1e-9, smoothing=4.0, points=10, held_out=3, median_error=0.05,
            ),
        ),
        collectives=(
            CollectiveConstants(
                op="all_reduce", tier="link", algorithm="ring", latency_s=6e-6, bandwidth_efficiency=1.1,
            ),
        ),
    )


def gemm_shapes(count: int) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    sizes = 2 ** rng.uniform(0, 14, size=(count, 3))
    return pd.DataFrame(np.ceil(sizes).astype(int), columns=["m", "n", "k"])


def test_fit_recovers_known_constants(device: DeviceProfile) -> None:
    truth = KernelConstants(
        family="gemm", compute_efficiency=0.72, memory_efficiency=0.85, launch_s=4e-6, step_s=1.2e-9, split_s=2.5e-6,
    )
    frame = gemm_shapes(3000)
    noise = np.exp(np.random.default_rng(2).normal(0, 0.02, len(frame)))
    frame["seconds"] = kernel_seconds(tables.works_of("gemm", "bf16", frame), truth, truth, device) * noise
    found = fit.fit_kernel("gemm", "bf16", "any", frame, device, truth)
    assert found.compute_efficiency == pytest.approx(0.72, rel=0.05)
    assert found.memory_efficiency == pytest.approx(0.85, rel=0.08)
    assert found.launch_s == pytest.approx(4e-6, rel=0.05)
    assert found.step_s == pytest.approx(1.2e-9, rel=0.15)
    assert found.smoothing == truth.smoothing
    assert found.row_s * 1e4 < 1e-7  # a term that is not there is not found
    assert found.median_error is not None and found.median_error < 0.025
    assert found.points + found.held_out <= len(frame)
    assert found.held_out > len(frame) / 6


def test_outliers_do_not_bend_the_fit(device: DeviceProfile) -> None:
    truth = KernelConstants(family="gemm", compute_efficiency=0.72, memory_efficiency=0.85, launch_s=4e-6)
    frame = gemm_shapes(2000)
    frame["seconds"] = kernel_seconds(tables.works_of("gemm", "bf16", frame), truth, truth, device)
    frame.loc[frame.index % 10 == 0, "seconds"] *= 30.0
    found = fit.fit_kernel("gemm", "bf16", "any", frame, device, truth)
    assert found.compute_efficiency == pytest.approx(0.72, rel=0.1)
    assert found.launch_s == pytest.approx(4e-6, rel=0.1)


def test_collective_fit_recovers_alpha_and_beta(device: DeviceProfile) -> None:
    rows = [(n, 2.0**e) for n in (2, 4, 8) for e in range(9, 31)]
    frame = pd.DataFrame(rows, columns=["ranks", "payload_bytes"])
    wire = 2.0 * (frame.ranks - 1) / frame.ranks * frame.payload_bytes
    frame["seconds"] = 6e-6 + 1.5e-6 * (frame.ranks - 2) + wire / (4e11 * 0.8)
    found = fit_collective("all_reduce", "ring", frame, device)
    assert found.latency_s == pytest.approx(6e-6, rel=0.03)
    assert found.step_latency_s == pytest.approx(1.5e-6, rel=0.05)
    assert found.bandwidth_efficiency == pytest.approx(0.8, rel=0.03)
    assert found.median_error is not None and found.median_error < 0.02


def test_balanced_rows_equal_dealing_cards() -> None:
    """Choices are dealt to the ranks in turn, and on a rank to its experts in turn; the fullest rank counts."""
    for tokens, topk, experts, ranks in itertools.product((1, 2, 7, 40), (1, 2, 8), (8, 32), (1, 4, 8)):
        dealt = np.zeros((ranks, experts // ranks))
        for choice in range(tokens * topk):
            rank, turn = choice % ranks, choice // ranks
            dealt[rank, turn % (experts // ranks)] += 1
        frame = pd.DataFrame([{"tokens": tokens, "topk": topk, "experts": experts, "moe_ep": ranks}])
        rows, hit = tables.balanced_rows(frame)
        busiest = dealt.sum(axis=1).argmax()
        assert (rows[0], hit[0]) == (dealt[busiest].sum(), (dealt[busiest] > 0).sum())


def test_distinct_ranks_equal_enumeration() -> None:
    """All pairs and triples of 6 experts on 3 ranks of 2, counted one by one."""
    for topk in (1, 2, 3):
        seen = [len({expert // 2 for expert in chosen}) for chosen in itertools.combinations(range(6), topk)]
        frame = pd.DataFrame([{"ranks": 3, "experts": 6, "copies": topk}])
        assert tables.distinct_ranks(frame)[0] == pytest.approx(np.mean(seen))


def test_held_out_depends_on_the_shape_alone() -> None:
    frame = gemm_shapes(4000)
    out = tables.held_out(frame, ("m", "n", "k"))
    assert 0.2 < out.mean() < 0.3
    assert np.array_equal(out, tables.held_out(frame.astype(float), ("m", "n", "k")))
    shuffled = frame.sample(frac=1.0, random_state=3)
    assert np.array_equal(out[shuffled.index.to_numpy()], tables.held_out(shuffled, ("m", "n", "k")))


def write_gemm_table(folder: Path, engine: str, rows: list[dict[str, Any]]) -> None:
    pytest.importorskip("pyarrow")
    folder.mkdir(parents=True, exist_ok=True)
    common = {"engine": engine, "engine_version": "1", "kernel_source": "any"}
    pd.DataFrame([common | row for row in rows]).to_parquet(folder / f"{engine}_gemm_perf.parquet")


def test_tables_are_tidied_and_bad_rows_counted(tmp_path: Path) -> None:
    row = {"m": 1, "n": 2, "k": 3, "gemm_dtype": "bfloat16", "latency": 0.25}
    folder = tmp_path / "toy_gpu" / "gemm"
    write_gemm_table(folder, "vllm", [row, row | {"latency": 0.125}, row | {"m": 2, "latency": 0.0}])
    write_gemm_table(folder, "sglang", [row, row | {"gemm_dtype": "fp8_block"}])
    write_gemm_table(folder.parent.parent / "other" / "gemm", "sglang", [row])
    read = tables.read_tables(tmp_path, ("toy_gpu",))
    gemm = read.family("gemm").sort_values("seconds")
    assert gemm.seconds.tolist() == [0.000125, 0.00025, 0.00025]  # milliseconds in, seconds out, fastest repeat kept
    assert set(gemm.dtype) == {"bf16", "fp8_block"}
    assert set(read.dropped.values()) == {1}
    assert {reason for _, _, reason in read.dropped} == {"no time or under 1 us", tables.SLOWER}


def test_ungraphed_vllm_rows_go(tmp_path: Path) -> None:
    row = {"m": 1, "n": 2, "k": 3, "gemm_dtype": "fp8_block", "latency": 0.06}
    write_gemm_table(tmp_path / "toy_gpu" / "gemm", "vllm", [row, row | {"gemm_dtype": "fp8"}])
    read = tables.read_tables(tmp_path)
    assert read.family("gemm").dtype.tolist() == ["fp8"]
    assert any("graph capture" in reason for _, _, reason in read.dropped)


def test_missing_tables_and_missing_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no folder"):
        tables.read_tables(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no measured tables"):
        tables.read_tables(tmp_path)
    (tmp_path / "gpu" / "gemm").mkdir(parents=True)
    (tmp_path / "gpu" / "gemm" / "vllm_gemm_perf.parquet").write_bytes(b"")

    def absent(_path: Path) -> pd.DataFrame:
        raise ImportError("pyarrow")

    monkeypatch.setattr(pd, "read_parquet", absent)
    with pytest.raises(InputError, match="pyarrow"):
        tables.read_tables(tmp_path)


def test_calibration_round_trips_and_leaves_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(HAND_WRITTEN)
    before = DeviceProfile.model_validate(yaml.safe_load(path.read_text()))
    fit.write_calibration(path, calibration())
    once = path.read_bytes()
    assert once.startswith(HAND_WRITTEN.encode())
    after = DeviceProfile.model_validate(yaml.safe_load(once))
    assert after.calibration == calibration()
    assert after.model_copy(update={"calibration": None}) == before
    fit.write_calibration(path, calibration())
    assert path.read_bytes() == once
    fit.write_calibration(path, calibration().model_copy(update={"date": "2027-01-01"}))
    assert path.read_bytes().startswith(HAND_WRITTEN.encode())
    assert path.read_bytes().count(b"calibration:") == 1


def test_a_failed_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(HAND_WRITTEN)

    def fail(*_args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        fit.write_calibration(path, calibration())
    assert path.read_text() == HAND_WRITTEN
    assert list(tmp_path.iterdir()) == [path]


def test_hand_written_calibration_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(HAND_WRITTEN + "calibration: {provenance: mine, date: today}\n")
    with pytest.raises(InputError, match="did not write"):
        fit.write_calibration(path, calibration())


@pytest.fixture(scope="module")
def predicted() -> pd.DataFrame:
    return accuracy.predict(accuracy.read_sample(SAMPLE))


def test_sample_shapes_were_held_out() -> None:
    sample = accuracy.read_sample(SAMPLE)
    assert SAMPLE.stat().st_size < 60_000
    for family, rows in sample.groupby("family"):
        assert tables.held_out(rows, tables.SHAPE[str(family)]).all(), family


def test_sample_is_predicted_well(predicted: pd.DataFrame) -> None:
    """Held-out medians are 2-15 % for most fits; a few rows per fit scatter, so a family may show up to 20 %."""
    by_family = accuracy.summary(predicted, ["family"]).set_index("family")
    assert set(by_family.index) == {*fit.KERNEL_FAMILIES, *accuracy.COLLECTIVES}
    assert (by_family["median"] <= 0.20).all(), by_family
    assert predicted.error.median() <= 0.12
    assert (by_family["median"] < by_family.roofline_median).all(), by_family


def test_every_measured_device_is_calibrated(predicted: pd.DataFrame) -> None:
    assert set(predicted.device) == {"a100-sxm", "h100-sxm", "h200-sxm", "b200-sxm", "gb200"}
    assert (predicted.evidence == "calibrated").all()
    kernels = predicted[~predicted.family.isin(accuracy.COLLECTIVES)]
    assert (kernels.predicted >= kernels.roofline * (1 - 1e-9)).all()


def test_datasheet_fractions_are_no_better_than_stated(predicted: pd.DataFrame) -> None:
    """What a device without fits gets, on devices where it can be checked: within what its error promises."""
    from tensorcast.profiles.store import load_device

    errors: list[float] = []
    for (name, family, dtype), rows in predicted.groupby(["device", "family", "dtype"]):
        if family in accuracy.COLLECTIVES:
            continue
        bare = load_device(str(name)).model_copy(update={"calibration": None})
        constants, evidence = roofline.constants_for(bare, str(family), str(dtype))
        others, _ = roofline.constants_for(bare, "memory", "bf16")
        assert evidence == "datasheet"
        seconds = kernel_seconds(tables.works_of(str(family), str(dtype), rows), constants, others, bare)
        errors += list(np.abs(seconds / rows.seconds - 1.0))
    assert 0.3 * roofline.DATASHEET_ERROR < np.median(errors) <= roofline.DATASHEET_ERROR


def test_page_says_what_it_must(predicted: pd.DataFrame, tmp_path: Path) -> None:
    text = accuracy.page(predicted)
    for word in ("aiconfigurator-core 0.12.0", "Apache-2.0", "held out", "plain roofline", "Not measured", "h20"):
        assert word in text
    out = tmp_path / "page.md"
    assert accuracy.main(["--sample", str(SAMPLE), "--out", str(out)]) == 0
    assert out.read_text() == text


def test_unreadable_sample_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        accuracy.read_sample(tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_text("system,seconds\nx,1\n")
    with pytest.raises(InputError, match="is missing"):
        accuracy.read_sample(tmp_path / "bad.csv")
