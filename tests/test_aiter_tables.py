"""AMD's tuned kernels as ROCm/aiter's files hold them: whose they are, which dtype, which lines are no measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tensorcast.calibrate import aiter_tables
from tensorcast.calibrate.aiter_tables import quicker_than_half, read_system
from tensorcast.cost.roofline import constants_for
from tensorcast.profiles.store import load_device

FILES = Path("aiter") / "configs"

LINE = {"gfx": "gfx942", "cu_num": 304, "M": 16, "N": 7168, "K": 2048, "us": 20.0}

FUSED = {
    "cu_num": 256, "token": 64, "model_dim": 7168, "inter_dim": 256, "expert": 257, "topk": 9,
    "act_type": "ActivationType.Silu", "q_dtype_a": "torch.float4_e2m1fn_x2", "q_dtype_w": "torch.float4_e2m1fn_x2",
    "q_type": "QuantType.per_1x32", "use_g1u1": 1, "doweight_stage1": 0, "us1": 30.0, "us2": 20.0, "us": 50.0,
}


def write(folder: Path, name: str, lines: list[dict[str, Any]]) -> None:
    path = folder / FILES / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(lines).to_csv(path, index=False)


def test_a_files_name_says_the_dtype_and_a_column_integers(tmp_path: Path) -> None:
    """Lines of other GPUs, of tables that are yet to be tuned and of batched ones are not read."""
    write(tmp_path, "a8w8_blockscale_tuned_gemm.csv", [LINE, LINE | {"gfx": "gfx950", "cu_num": 256}])
    write(tmp_path, "model_configs/dsv3_bf16_tuned_gemm.csv", [LINE | {"us": 30.0}])
    write(tmp_path, "model_configs/kimik3_a4w4_blockscale_tuned_gemm.csv", [LINE | {"us": 25.0}])
    both = [LINE | {"q_dtype_w": "torch.int8"}, LINE | {"q_dtype_w": "torch.float8_e4m3fnuz", "us": 19.0}]
    write(tmp_path, "model_configs/glm5_a8w8_bpreshuffle_tuned_gemm.csv", both)
    write(tmp_path, "a8w8_blockscale_untuned_gemm.csv", [LINE | {"us": 1.0}])
    write(tmp_path, "bf16_tuned_batched_gemm.csv", [LINE | {"B": 16}])
    assert aiter_tables.holds(tmp_path) and not aiter_tables.holds(tmp_path / "aiter")
    kernels = read_system(tmp_path, aiter_tables.SYSTEMS["mi300x"]).kernels
    assert {key[1]: round(1e6 * float(rows.seconds[0]), 6) for key, rows in kernels.items()} == {
        "fp8_block": 20.0, "bf16": 30.0, "w4a4": 25.0, "int8": 20.0, "fp8": 19.0,
    }
    assert all(key[2] == "any" for key in kernels)


def test_of_a_shapes_entries_the_fastest_runs(tmp_path: Path) -> None:
    """As the library merges its files; what is quicker than half the rows or has no time goes."""
    shapes = [LINE | {"M": m, "us": us} for m, us in ((16, 20.0), (16, 18.0), (32, 16.0), (64, 22.0), (128, 1.0))]
    write(tmp_path, "bf16_tuned_gemm.csv", shapes)
    read = read_system(tmp_path, "gfx942-304")
    rows, = read.kernels.values()
    assert dict(zip(rows.columns["m"], (1e6 * rows.seconds).round(6), strict=True)) == {16.0: 18.0, 64.0: 22.0}
    assert read.dropped == {
        f"gemm: {aiter_tables.NO_TIME}": 1, f"gemm: {aiter_tables.SLOWER}": 1, f"gemm: {aiter_tables.QUICKER}": 1,
    }


def test_copied_times_of_experts_go(tmp_path: Path) -> None:
    """One time for several numbers of tokens: none is known to have run. Of two models': that of more choices stays."""
    copied = [FUSED | {"token": tokens, "us1": 99.0, "us": 119.0} for tokens in (2048, 4096)]
    twin = FUSED | {"expert": 256, "topk": 8}
    write(tmp_path, "tuned_fmoe.csv", [FUSED, twin, *copied, FUSED | {"token": 1, "doweight_stage1": 1}])
    read = read_system(tmp_path, aiter_tables.SYSTEMS["mi355x"])
    (key, rows), = read.kernels.items()
    assert key == ("grouped_gemm", "w4a4", "any", "") and rows.seconds == pytest.approx([50e-6])
    assert {name: float(values[0]) for name, values in rows.columns.items()} == {
        "tokens": 64, "hidden": 7168, "inter": 256, "topk": 9, "experts": 257, "slots": 257, "moe_tp": 1, "moe_ep": 1,
        "gated": 1, "skew": -1,
    }
    assert sorted(read.dropped.values()) == [1, 1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_quicker_than_half_by_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lines = pd.DataFrame({
        "m": rng.integers(1, 64, 40).astype(float), "n": rng.integers(0, 3, 40), "seconds": rng.random(40),
    }).drop_duplicates(["m", "n"])
    sizes = lines.to_numpy(float).tolist()
    expected = [
        any(other == n and fewer <= m / 2 and took < aiter_tables.FALLS * seconds for fewer, other, seconds in sizes)
        for m, n, took in sizes
    ]
    assert quicker_than_half(lines, "m").tolist() == expected


PAGE = """
| batch | q_nheads | kv_nheads | seqlen_q | seqlen_kv | hdim | causal | FWD(TFLOPS) |      | BWD |
|-------|----------|-----------|----------|-----------|------|--------|-------------|------|-----|
|       |          |           |          |           |      |        | MI300X | MI355X | MI300X |
| 1     | 32       | 8         | 8192     | 8192      | 128  | 0      | 558.17 | 1396     | 524.15 |
| 1     | 32       | 8         | 8192     | 8192      | 128  | 1      | 522.68 | 1247.73  | 524.15 |
"""


@pytest.mark.parametrize(("system", "rate"), [("gfx942-304", 522.68e12), ("gfx950-256", 1247.73e12)])
def test_prompts_attention_is_what_its_page_states_where_masks_are_causal(
    tmp_path: Path, system: str, rate: float
) -> None:
    """Two products of 8,192 x 8,192 x 128 in each of 32 heads, half of which a causal mask leaves."""
    (tmp_path / aiter_tables.PROMPTS).parent.mkdir(parents=True)
    (tmp_path / aiter_tables.PROMPTS).write_text(PAGE)
    rows = read_system(tmp_path, system).kernels["attention_prefill", "bf16", "any", ""]
    assert rows.seconds == pytest.approx([32 * 2 * (2 * 8192 * 8192 * 128) / 2 / rate])
    assert {name: float(values[0]) for name, values in rows.columns.items()} == {
        "batch": 1, "new": 8192, "past": 0, "q_heads": 32, "kv_heads": 8, "head_dim": 128, "window": 0, "kv_bytes": 2,
    }


def test_a_checkout_without_the_page_and_a_device_that_it_leaves_out(tmp_path: Path) -> None:
    assert not read_system(tmp_path, "gfx942-304").kernels
    (tmp_path / aiter_tables.PROMPTS).parent.mkdir(parents=True)
    (tmp_path / aiter_tables.PROMPTS).write_text(PAGE)
    assert not read_system(tmp_path, "gfx942-80").kernels


@pytest.mark.parametrize(("device", "published"), [("mi300x", 541.55e12), ("mi355x", 1392.485e12)])
def test_latents_of_prompts_are_no_quicker_than_attention_was(device: str, published: float) -> None:
    """64 heads, 16,384 tokens; latents expanded to heads of 192 and 128 run in the same library."""
    profile = load_device(device)
    constants, evidence = constants_for(profile, "mla_prefill", "bf16")
    assert evidence == "datasheet" and constants_for(profile, "attention_prefill", "bf16")[1] == "calibrated"
    rate = constants.compute_efficiency * float(profile.peak_flops["bf16"])
    assert published < rate < 1.5 * published
