"""Which GEMMs run kernels that the tables of their precision do not hold: as releases of engines choose."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorcast.cost import work
from tensorcast.cost.kernels.frames import predict_kernels
from tensorcast.cost.roofline import constants_for, kernel_time
from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.layout import parse_layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.step.price import StepPrice
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.trace.table import Op

SERVED = [(7168, 2112, 123e-6), (2048, 7168, 34e-6), (1536, 3072, 30e-6), (7168, 4608, 122e-6), (2304, 7168, 39e-6)]
"""Depth, columns and seconds at 64 rows on MI325X under SGLang 0.5.9 (SemiAnalysisAI/InferenceX#863)."""

FP8_BLOCKS = work.Precision("fp8_block", "fp8_block", 1.0, 1.03)


def one_tile_s(m: float, n: float, k: float, device: str = "mi325x") -> float:
    own = load_device(device)
    constants, evidence = constants_for(own, "gemm", "fp8_block", "sglang", "one_tile")
    assert evidence == "calibrated"
    return float(kernel_time(work.one_tile(work.gemm(m, n, k, FP8_BLOCKS)), constants, own).seconds)


@pytest.mark.parametrize(("k", "n", "measured_s"), SERVED)
def test_the_only_tile_of_triton_takes_what_it_was_seen_to_take(k: int, n: int, measured_s: float) -> None:
    assert one_tile_s(64.0, n, k) == pytest.approx(measured_s, rel=0.12)


@given(st.integers(1, 20_000), st.integers(128, 40_000), st.integers(128, 30_000))
def test_its_time_never_falls_with_size_nor_under_the_peak(m: int, n: int, k: int) -> None:
    seconds, device = one_tile_s(m, n, k), load_device("mi325x")
    assert one_tile_s(2 * m, n, k) >= seconds and one_tile_s(m, n, 2 * k) >= seconds
    assert seconds >= 2.0 * m * n * k / float(device.peak_flops["fp8"])
    assert one_tile_s(1, n, k) == pytest.approx(one_tile_s(128, n, k), rel=0.3) or m > 128


def step_of(engine: str, device: str, model: str, users: float = 4.0, **asked: Any) -> StepPrice:
    """A decode step at tp 8."""
    layout = parse_layout("tp8-ep8" if model == "minimax-m2.5" else "tp8")
    made = deploy(
        load_model(model), load_device(device), load_engine(engine), layout, "decode", options=Options(**asked)
    )
    return made.step.price(users, 1.0, 1536.0)


def kernels(engine: str, device: str, model: str = "deepseek-v3", **asked: Any) -> dict[str, str]:
    """Kernels of its matmuls, by module."""
    rows = [price.row for price in step_of(engine, device, model, **asked).rows]
    ops = [row for row in rows if isinstance(row, Op) and row.name == "mm"]
    return {op.module.rpartition(".")[-1]: op.attrs.get("kernels", "") for op in ops}


def test_sglang_multiplies_blocks_on_cdna_3_by_one_tile_unless_it_has_others() -> None:
    """quantization/fp8_utils.py of 0.5.6.post2 to 0.5.23, and AITER's files of tiles for gfx942 by then."""
    old, new = kernels("sglang==0.5.9", "mi300x"), kernels("sglang", "mi300x")
    assert old["o_proj"] == old["q_b_proj"] == old["down_proj"] == "one_tile"
    assert new["o_proj"] == new["q_b_proj"] == "" and new["down_proj"] == "one_tile"
    assert old["lm_head"] == old["gate"] == ""
    for engine, device in (("sglang==0.5.9", "mi355x"), ("sglang==0.5.9", "h200"), ("vllm", "mi300x")):
        assert not any(kernels(engine, device).values())
    assert not any(kernels("sglang==0.5.9", "mi300x", quant="bf16").values())


def test_gates_narrower_than_a_block_are_none_of_its() -> None:
    """Checkpoints of Qwen3.5 in FP8 leave in_proj_b, in_proj_a and the shared expert's gate as they are."""
    found = kernels("sglang==0.5.9", "mi300x", "qwen3.5-397b-a17b", quant="fp8_block")
    assert found["out_proj"] == "one_tile" and found["shared_expert_gate"] == found["in_proj_a"] == ""


def test_kin_tells_one_dtype_from_another_that_lends() -> None:
    """FP8 with and without blocks were both timed on MI308X, without 1.2 to 1.4 times as quick; on MI300X one was."""
    shapes = [(m, n, k) for m in (1, 64, 8192) for n, k in ((57344, 8192), (8192, 28672), (1280, 8192))]
    frame = pd.DataFrame([
        {"family": "gemm", "m": m, "n": n, "k": k, "dtype": dtype}
        for m, n, k in shapes for dtype in ("fp8_block", "fp8")
    ])
    found = predict_kernels(frame, device="mi300x", engine="vllm")
    blocks, plain = (found[found.dtype == dtype].seconds.to_numpy() for dtype in ("fp8_block", "fp8"))
    assert np.all(blocks / plain > 1.05) and np.all(blocks / plain < 1.6)
    assert set(found[found.dtype == "fp8"].evidence) == {"calibrated"}
    fastest = 2.0 * 8192 * 57344 * 8192 / plain[6]
    assert 0.5e15 < fastest < float(load_device("mi300x").peak_flops["fp8"])


@pytest.mark.parametrize(("users", "published"), [(1, 133.0), (8, 789.0)])
def test_mxfp4_experts_on_cdna_3_unpack_in_routed_tiles(users: int, published: float) -> None:
    """gpt-oss-120b at tp 8 on MI300X under vLLM with triton_kernels: tokens/s of 1,024 in and out, prompts included
    (vllm-project/vllm#55934). Nothing was fitted to it."""
    found = kernels("vllm", "mi300x", "gpt-oss-120b")
    assert found and "routed_tiles" not in found.values()  # of experts alone
    step = step_of("vllm", "mi300x", "gpt-oss-120b", float(users))
    experts = [row for row in step.rows if isinstance(row.row, Op) and row.row.name == "grouped_matmul"]
    assert {row.row.attrs["kernels"] for row in experts if isinstance(row.row, Op)} == {"routed_tiles"}
    assert users / float(step.seconds) == pytest.approx(published, rel=0.25)


def test_its_tile_takes_what_was_reported() -> None:
    """79 us for a token's four experts, 3,072 deep and 6,144 wide (ROCm/triton#970)."""
    device = load_device("mi300x")
    experts = work.grouped_gemm(4.0, 4.0, 6144.0, 3072.0, work.Precision("mxfp4", "mxfp4", 0.53125))
    constants, evidence = constants_for(device, "grouped_gemm", "mxfp4", "vllm", "routed_tiles")
    seconds = kernel_time(work.routed_tiles(experts, 6144.0, 3072.0), constants, device).seconds
    assert seconds - constants.launch_s == pytest.approx(79e-6, rel=0.05) and evidence == "datasheet"
    alone, _ = constants_for(device, "grouped_gemm", "mxfp4", "vllm")
    assert kernel_time(experts, alone, device).seconds < seconds  # what weights streamed would take


@pytest.mark.parametrize(("m", "measured_s"), [
    (1, 7.5e-6), (4, 20.2e-6), (8, 16.7e-6), (16, 22.3e-6), (32, 63.2e-6), (64, 63.3e-6), (128, 69.3e-6),
    (256, 77.8e-6), (1024, 111e-6),
])  # fmt: skip
def test_routers_of_fp32_take_what_was_reported(m: int, measured_s: float) -> None:
    """[M, 6144] x [6144, 256] by torch on GB200 (vllm-project/vllm#47973)."""
    device = load_device("gb200")
    constants, _ = constants_for(device, "gemm", "fp32", "sglang", "fp32")
    seconds = float(kernel_time(work.fp32_gemm(float(m), 256.0, 6144.0), constants, device).seconds)
    assert seconds == pytest.approx(measured_s, rel=0.32)


def test_sglang_routes_minimax_in_fp32() -> None:
    """models/minimax_m2.py; it is 9 % of a decode step of 64 at tp 8, ep 8 (sgl-project/sglang#22744)."""
    found = kernels("sglang==0.5.8", "b200", "minimax-m2.5")
    assert found["gate"] == "fp32" and not any(kernel for name, kernel in found.items() if name != "gate")
    assert kernels("sglang==0.5.8", "b200", "qwen3-235b-a22b")["gate"] == ""
    assert kernels("vllm", "b200", "minimax-m2.5")["gate"] == ""
    step = step_of("sglang==0.5.8", "b200", "minimax-m2.5", 64.0)
    rows = [row for row in step.rows if isinstance(row.row, Op) and row.row.attrs.get("kernels") == "fp32"]
    assert 0.06 < 62 * sum(float(row.seconds) for row in rows) / float(step.seconds) < 0.15
