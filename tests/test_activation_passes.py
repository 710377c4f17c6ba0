"""GEMMs of the tables without the quantising of activations that their calls hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tensorcast.calibrate.activation_passes import BLURRED, Pass
from tensorcast.calibrate.measured_tables import read_system

SIZE = {"m": 16, "n": 7168, "k": 7168}

# H200, aiconfigurator-core 0.12.0 (Apache-2.0): microseconds of one FP8 GEMM under three engines, and of the passes at
# as many elements
GEMM_US = {"trtllm": 25.8, "sglang": 18.9, "vllm": 19.2}
PASSES_US = {("trtllm", "computescale"): 7.4, ("trtllm", "scale_matrix"): 1.4,
             ("vllm", "computescale"): 0.9, ("vllm", "scale_matrix"): 2.4, ("sglang", "computescale"): 0.0}


def write(folder: Path, engine: str, table: str, rows: list[dict[str, Any]]) -> None:
    pytest.importorskip("pyarrow")
    place = folder / "toy_gpu" / "any"
    place.mkdir(parents=True, exist_ok=True)
    common = {"engine": engine, "engine_version": "1", "kernel_source": "any", "quant_dtype": "fp8"}
    pd.DataFrame([common | row for row in rows]).to_parquet(place / f"{engine}_{table}_perf.parquet")


def tables(folder: Path, dtype: str, gemm_us: dict[str, float], size: dict[str, int]) -> None:
    for engine, us in gemm_us.items():
        write(folder, engine, "gemm", [size | {"gemm_dtype": dtype, "latency": us / 1e3}])
    for (engine, table), us in PASSES_US.items():
        both = (size["m"], 2 * size["m"])
        write(folder, engine, table, [{"m": m, "k": size["k"], "latency": us / 1e3} for m in both])


def test_engines_agree_on_what_is_left_of_an_fp8_gemm(tmp_path: Path) -> None:
    """36 % apart as the tables have them, 8 % without what each passes over the activation."""
    tables(tmp_path, "fp8", GEMM_US, SIZE)
    left = {key[2]: float(rows.seconds[0]) * 1e6 for key, rows in read_system(tmp_path, "toy_gpu").kernels.items()
            if key[0] == "gemm"}
    assert left == pytest.approx({"trtllm": 25.8 - 8.8, "sglang": 18.9 - 3.3, "vllm": 19.2 - 3.3}, abs=0.01)
    assert max(GEMM_US.values()) / min(GEMM_US.values()) > 1.35
    assert max(left.values()) / min(left.values()) < 1.1


@pytest.mark.parametrize("dtype", ["fp8_block", "nvfp4"])
def test_blocks_find_their_scale_in_the_pass_that_casts(tmp_path: Path, dtype: str) -> None:
    tables(tmp_path, dtype, {"sglang": 12.0}, SIZE)
    rows = read_system(tmp_path, "toy_gpu").kernels["gemm", dtype, "sglang", ""]
    assert float(rows.seconds[0]) == pytest.approx(12.0e-6 - 2.4e-6)


def test_bf16_and_systems_without_the_tables_stay(tmp_path: Path) -> None:
    tables(tmp_path, "bfloat16", GEMM_US, SIZE)
    kernels = read_system(tmp_path, "toy_gpu").kernels
    assert float(kernels["gemm", "bf16", "trtllm", ""].seconds[0]) == pytest.approx(25.8e-6)
    write(tmp_path / "bare", "trtllm", "gemm", [SIZE | {"gemm_dtype": "fp8", "latency": 0.0258}])
    alone = read_system(tmp_path / "bare", "toy_gpu").kernels["gemm", "fp8", "trtllm", ""]
    assert float(alone.seconds[0]) == pytest.approx(25.8e-6)


def test_rows_that_are_mostly_quantising_go(tmp_path: Path) -> None:
    tables(tmp_path, "fp8", {"trtllm": 10.0}, SIZE | {"n": 64})
    read = read_system(tmp_path, "toy_gpu")
    assert ("gemm", "fp8", "trtllm", "") not in read.kernels and read.dropped[f"gemm: {BLURRED}"] == 1


def test_a_pass_never_gets_shorter_with_more_elements() -> None:
    one = Pass(np.log([10.0, 100.0, 1000.0]), np.log([1e-6, 2e-6, 8e-6]))
    seconds = one.seconds(np.array([1.0, 10.0, 31.6, 100.0, 1000.0, 1e6]))
    assert (np.diff(seconds) >= 0).all() and seconds[0] == pytest.approx(1e-6) and seconds[-1] == pytest.approx(8e-6)
    assert seconds[2] == pytest.approx(2**0.5 * 1e-6, rel=0.01)
