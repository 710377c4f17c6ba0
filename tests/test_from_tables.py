"""Constants fitted to measured rows of a known law, and the block that is written into a device profile."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

from tensorcast.calibrate.constants import from_tables
from tensorcast.calibrate.constants.collectives import exchange_rows, fit_collective
from tensorcast.calibrate.constants.errors import kernel_seconds
from tensorcast.calibrate.measured_tables import MeasuredKernel, MeasuredSystem
from tensorcast.cost import roofline, work
from tensorcast.cost.kernels.vocabulary import PRECISION
from tensorcast.errors import InputError
from tensorcast.profiles.device import Calibration, CollectiveConstants, DeviceProfile, KernelConstants
from tensorcast.profiles.store import load_device
from tensorcast.validate.accuracy.sample import COLLECTIVES, read_sample

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


def gemms(count: int, device: DeviceProfile, truth: KernelConstants) -> MeasuredKernel:
    """Random GEMMs that take just what ``truth`` says."""
    sizes = np.ceil(2 ** np.random.default_rng(1).uniform(0, 14, size=(count, 3)))
    columns = dict(zip("mnk", sizes.T, strict=True)) | {"batch": np.ones(count)}
    rows = MeasuredKernel(("gemm", "bf16", "vllm", ""), columns, np.ones(count))
    rows.seconds = kernel_seconds(from_tables.works_of(rows, device), truth, truth, device)
    return rows


def test_fit_recovers_known_constants(device: DeviceProfile) -> None:
    truth = KernelConstants(
        family="gemm", compute_efficiency=0.72, memory_efficiency=0.85, launch_s=4e-6, step_s=1.2e-9, split_s=2.5e-6,
    )
    rows = gemms(3000, device, truth)
    rows.seconds = rows.seconds * np.exp(np.random.default_rng(2).normal(0, 0.02, len(rows)))
    found = from_tables.fit_kernel(rows, "any", device, truth)
    assert found.compute_efficiency == pytest.approx(0.72, rel=0.05)
    assert found.memory_efficiency == pytest.approx(0.85, rel=0.08)
    assert found.launch_s == pytest.approx(4e-6, rel=0.05)
    assert found.step_s == pytest.approx(1.2e-9, rel=0.15)
    assert found.smoothing == truth.smoothing
    assert found.row_s * 1e4 < 1e-7  # a term that is not there is not found
    assert found.median_error is not None and found.median_error < 0.025
    assert found.points + found.held_out <= len(rows)
    assert found.held_out > len(rows) / 6


def test_outliers_do_not_bend_the_fit(device: DeviceProfile) -> None:
    truth = KernelConstants(family="gemm", compute_efficiency=0.72, memory_efficiency=0.85, launch_s=4e-6)
    rows = gemms(2000, device, truth)
    rows.seconds[::10] *= 30.0
    found = from_tables.fit_kernel(rows, "any", device, truth)
    assert found.compute_efficiency == pytest.approx(0.72, rel=0.1)
    assert found.launch_s == pytest.approx(4e-6, rel=0.1)


def test_an_unnamed_engine_reaches_what_the_fastest_does(device: DeviceProfile) -> None:
    """Two engines, one twice as slow: three fits, of which the unnamed engine's is the fast one's."""
    truth = KernelConstants(family="gemm", compute_efficiency=0.72, memory_efficiency=0.85, launch_s=4e-6)
    fast = gemms(400, device, truth)
    slow = MeasuredKernel(("gemm", "bf16", "sglang", ""), fast.columns, 2.0 * fast.seconds)
    other = MeasuredKernel(("gemm", "bf16", "vllm", "absorb"), fast.columns, 9.0 * fast.seconds)
    system = MeasuredSystem("toy", {rows.key: rows for rows in (fast, slow, other)})
    fits, dropped = from_tables.fit_kernels(device, system)
    found = {one.engine: one for one in fits}
    assert set(found) == {"any", "sglang", "vllm"}
    assert found["any"] == found["vllm"].model_copy(update={"engine": "any"})
    assert found["sglang"].launch_s > 1.5 * found["any"].launch_s and not dropped


def test_constants_are_of_experts_that_the_formula_describes() -> None:
    """Balanced routing; of sglang's rows one rank's, as its kernel passes over other ranks' choices too."""
    columns = {"moe_ep": np.array([1.0, 1.0, 8.0, 8.0]), "skew": np.array([0.0, 1.2, 0.0, 1.2])}
    dropped: dict[str, int] = {}
    kept = {}
    for engine in ("sglang", "vllm"):
        rows = MeasuredKernel(("grouped_gemm", "bf16", engine, ""), columns, np.arange(4.0))
        kept[engine] = from_tables.described(rows, dropped).seconds.tolist()
    assert kept == {"sglang": [0.0], "vllm": [0.0, 2.0]}
    assert dropped == {f"grouped_gemm: {from_tables.OTHER_RANKS}": 2, f"grouped_gemm: {from_tables.SKEWED}": 3}


def test_collective_fit_recovers_alpha_and_beta(device: DeviceProfile) -> None:
    ranks, payload = np.array([(n, 2.0**e) for n in (2, 4, 8) for e in range(9, 31)]).T
    wire = 2.0 * (ranks - 1) / ranks * payload
    seconds = 6e-6 + 1.5e-6 * (ranks - 2) + wire / (4e11 * 0.8)
    rows = MeasuredKernel(("all_reduce", "any", "any", "nccl"), {"ranks": ranks, "payload_bytes": payload}, seconds)
    found = fit_collective("all_reduce", "ring", rows, device)
    assert found.latency_s == pytest.approx(6e-6, rel=0.03)
    assert found.step_latency_s == pytest.approx(1.5e-6, rel=0.05)
    assert found.bandwidth_efficiency == pytest.approx(0.8, rel=0.03)
    assert found.median_error is not None and found.median_error < 0.02


def exchanges(backend: str, rows: list[tuple[float, float, float]]) -> MeasuredKernel:
    """Exchanges of 100 tokens: (ranks, processors, seconds)."""
    ranks, sms, seconds = np.array(rows).T
    sizes = {"tokens": 100.0, "hidden": 4096.0, "topk": 8.0, "experts": 256.0, "nodes": 1.0, "copy_bytes": 2.0}
    columns = {name: np.full(len(rows), value) for name, value in sizes.items()} | {"ranks": ranks, "sms": sms}
    return MeasuredKernel(("moe_exchange", "any", "any", f"{backend}:combine"), columns, seconds)


def test_exchange_constants_are_of_one_node_and_enough_processors() -> None:
    """Of the processors tried the quickest counts, from 20 on; low-latency kernels choose theirs."""
    rows = [(8.0, 24.0, 3.0), (8.0, 20.0, 4.0), (8.0, 4.0, 1.0), (16.0, 24.0, 2.0)]
    system = MeasuredSystem("toy")
    for backend in ("high_throughput", "low_latency", "other:twice"):
        kernel = exchanges(backend, rows)
        system.kernels[kernel.key] = kernel
    found = {name: kept.seconds.tolist() for name, kept in exchange_rows(system, 8)}
    assert found == {"high_throughput_combine": [3.0], "low_latency_combine": [1.0]}


def dealt(tokens: int, topk: int, experts: int, ranks: int) -> tuple[float, float]:
    """Rows and hit experts of the fullest rank: choices are dealt to ranks in turn, on a rank to experts in turn."""
    cards = np.zeros((ranks, experts // ranks))
    for choice in range(tokens * topk):
        rank, turn = choice % ranks, choice // ranks
        cards[rank, turn % (experts // ranks)] += 1
    busiest = cards.sum(axis=1).argmax()
    return float(cards[busiest].sum()), float((cards[busiest] > 0).sum())


def written_out(row: SimpleNamespace) -> list[work.Work]:
    """The kernels behind one measured row, each as its family counts its work."""
    c, p = row, PRECISION[row.dtype]
    if row.family == "gemm":
        return [work.gemm(c.m, c.n, c.k, p)]
    if row.family == "grouped_gemm":
        rows, hit = dealt(int(c.tokens), int(c.topk), int(c.experts), int(c.moe_ep))
        inter, gates = c.inter / c.moe_tp, 1.0 + c.gated
        return [
            work.grouped_gemm(rows, hit, inter * gates, c.hidden, p),
            work.memory(rows * inter * gates * 2.0, rows * inter * p.activation_bytes),
            work.grouped_gemm(rows, hit, c.hidden, inter, p),
        ]
    if row.family.startswith("attention"):
        return [work.attention(
            c.batch, c.new, c.past, c.q_heads, c.kv_heads, qk_dim=c.head_dim, v_dim=c.head_dim,
            kv_bytes=c.kv_bytes, window=c.window, decode=row.family == "attention_decode", dtype=row.dtype,
        )]
    return [work.mla(
        c.batch, c.new, c.past, c.q_heads, latent=512, rope=64, nope=128, v_dim=128, kv_bytes=c.kv_bytes,
        decode=row.family == "mla_decode", dtype=row.dtype,
    )]


def test_rows_are_priced_as_their_work_written_out() -> None:
    """Every row of the sample but those of skewed routing, priced one by one: the same seconds to the last digit."""
    sample, compared = read_sample(SAMPLE), 0
    plain = sample[~sample.family.isin((*COLLECTIVES, "quantize")) & ~(sample["skew"].abs() > 0)]
    plain = plain[~plain.family.str.startswith(("linear_", "conv_"))]  # by hand in test_cost_work.py
    for row in plain.to_dict("records"):
        one = SimpleNamespace(**{str(name): value for name, value in row.items()})
        if one.family == "grouped_gemm" and one.tokens * one.topk > 50_000:  # dealt card by card
            continue
        device = load_device(one.system.replace("_", "-"))
        constants, _ = roofline.constants_for(device, one.family, one.dtype, one.engine)
        others, _ = roofline.constants_for(device, "memory", "bf16")
        columns = {name: np.array([float(row[name])]) for name in sample.columns[5:-1] if pd.notna(row[name])}
        rows = MeasuredKernel((one.family, one.dtype, one.engine, ""), columns, np.ones(1))
        ours, = kernel_seconds(from_tables.works_of(rows, device), constants, others, device)
        assert ours == float(kernel_seconds(written_out(one), constants, others, device)), one
        compared += 1
    assert compared > 250


def test_calibration_round_trips_and_leaves_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(HAND_WRITTEN)
    before = DeviceProfile.model_validate(yaml.safe_load(path.read_text()))
    from_tables.write_calibration(path, calibration())
    once = path.read_bytes()
    assert once.startswith(HAND_WRITTEN.encode())
    after = DeviceProfile.model_validate(yaml.safe_load(once))
    assert after.calibration == calibration()
    assert after.model_copy(update={"calibration": None}) == before
    from_tables.write_calibration(path, calibration())
    assert path.read_bytes() == once
    from_tables.write_calibration(path, calibration().model_copy(update={"date": "2027-01-01"}))
    assert path.read_bytes().startswith(HAND_WRITTEN.encode())
    assert path.read_bytes().count(b"calibration:") == 1


def test_a_failed_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(HAND_WRITTEN)

    def fail(*_args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        from_tables.write_calibration(path, calibration())
    assert path.read_text() == HAND_WRITTEN
    assert list(tmp_path.iterdir()) == [path]


def test_hand_written_calibration_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(HAND_WRITTEN + "calibration: {provenance: mine, date: today}\n")
    with pytest.raises(InputError, match="did not write"):
        from_tables.write_calibration(path, calibration())
