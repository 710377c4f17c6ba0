"""Measured tables as they are read: which rows, in which words, which are left out by which rule, which held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tensorcast.calibrate.measured_tables import REPEATS, MeasuredKernel, held_out, joined, read_system
from tensorcast.errors import InputError

GEMM = {"m": 1, "n": 2, "k": 3, "gemm_dtype": "bfloat16", "latency": 0.25}

EXPERTS = {
    "num_tokens": 64, "hidden_size": 7168, "inter_size": 2048, "topk": 8, "num_experts": 256, "moe_tp_size": 1,
    "moe_ep_size": 8, "moe_dtype": "fp8_block", "distribution": "balanced", "latency": 0.1,
}

PROMPT = {
    "batch_size": 1, "isl": 64, "num_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "window_size": 0, "step": 0,
    "attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "latency": 0.1,
}


def write(folder: Path, engine: str, table: str, rows: list[dict[str, Any]]) -> None:
    """``folder/toy_gpu/any/ENGINE_TABLE_perf.parquet``."""
    pytest.importorskip("pyarrow")
    place = folder / "toy_gpu" / "any"
    place.mkdir(parents=True, exist_ok=True)
    common = {"engine": engine, "engine_version": "1", "kernel_source": "any"}
    pd.DataFrame([common | row for row in rows]).to_parquet(place / f"{engine}_{table}_perf.parquet")


def test_rows_are_tidied_and_bad_ones_counted(tmp_path: Path) -> None:
    """Milliseconds in, seconds out, of repeats the median; every engine and dtype a kernel of its own."""
    repeats = [GEMM | {"latency": ms} for ms in (0.125, 0.25, 0.75)]
    write(tmp_path, "vllm", "gemm", [*repeats, GEMM | {"m": 2, "latency": 0.0}])
    write(tmp_path, "sglang", "gemm", [GEMM, GEMM | {"gemm_dtype": "fp8_block"}])
    read = read_system(tmp_path, "toy_gpu")
    seconds = {key: rows.seconds.tolist() for key, rows in read.kernels.items()}
    assert seconds == {
        ("gemm", "bf16", "vllm", ""): [0.00025], ("gemm", "bf16", "sglang", ""): [0.00025],
        ("gemm", "fp8_block", "sglang", ""): [0.00025],
    }
    assert read.dropped == {"gemm: no time or under 1 us": 1, f"gemm: {REPEATS}": 2}


def test_ungraphed_vllm_rows_go(tmp_path: Path) -> None:
    block = GEMM | {"gemm_dtype": "fp8_block"}
    write(tmp_path, "vllm", "gemm", [block, GEMM | {"gemm_dtype": "fp8"}])
    write(tmp_path, "trtllm", "gemm", [block])
    read = read_system(tmp_path, "toy_gpu")
    assert {key[1:3] for key in read.kernels} == {("fp8", "vllm"), ("fp8_block", "trtllm")}
    (reason, count), = read.dropped.items()
    assert "graph capture" in reason and count == 1


@pytest.mark.parametrize(("extra_ms", "stay"), [(0.013, 4), (0.002, 6)])
def test_one_row_goes_where_it_takes_a_constant_more(tmp_path: Path, extra_ms: float, stay: int) -> None:
    """Of a kernel whose one row waits for something else, as most of its matrices say; single slow rows stay."""
    sizes = [(n, 0.005 + n * 1e-6) for n in (64, 4096)]
    fp8 = [
        GEMM | {"gemm_dtype": "fp8", "m": m, "n": n, "latency": ms + (extra_ms if m == 1 else 0.0)}
        for n, ms in sizes for m in (1, 2, 64)
    ]
    write(tmp_path, "vllm", "gemm", fp8)
    write(tmp_path, "sglang", "gemm", [row | {"latency": 0.006} for row in fp8])
    read = read_system(tmp_path, "toy_gpu")
    assert len(read.kernels["gemm", "fp8", "vllm", ""]) == stay and len(read.kernels["gemm", "fp8", "sglang", ""]) == 6
    assert sum(read.dropped.values()) == 6 - stay


def test_tied_routing_goes_for_the_models_and_engines_that_have_it(tmp_path: Path) -> None:
    """DeepSeek-V3's experts under EP on sglang and vllm; another model of 256 experts and top-8 stays."""
    rows = [EXPERTS, EXPERTS | {"moe_ep_size": 1}, EXPERTS | {"hidden_size": 4096}]
    for engine in ("sglang", "vllm", "trtllm"):
        write(tmp_path, engine, "moe", rows)
    read = read_system(tmp_path, "toy_gpu")
    assert {key[2]: len(kept) for key, kept in read.kernels.items()} == {"sglang": 2, "vllm": 2, "trtllm": 3}
    assert sum(read.dropped.values()) == 2 and all("ties" in reason for reason in read.dropped)


def test_a_library_timed_at_anothers_shape_is_a_kernel_of_its_own(tmp_path: Path) -> None:
    """The plain kernel has the library with most rows, and the other's for heads that it was not timed with."""
    usual = [PROMPT | {"kernel_source": "trtllm_mha", "batch_size": n, "latency": 0.025 * n} for n in (1, 2, 3, 4)]
    others = [
        PROMPT | {"kernel_source": "triton"}, PROMPT | {"kernel_source": "triton", "batch_size": 9, "latency": 0.9},
        PROMPT | {"kernel_source": "triton", "head_dim": 192, "latency": 0.05},
    ]  # fmt: skip
    write(tmp_path, "sglang", "context_attention", [*usual, *others])
    kernels = {key[3]: kernel for key, kernel in read_system(tmp_path, "toy_gpu").kernels.items()}
    assert sorted(kernels[""].seconds.tolist()) == pytest.approx([25e-6, 50e-6, 50e-6, 75e-6, 100e-6])
    assert sorted(kernels["triton"].seconds.tolist()) == pytest.approx([50e-6, 100e-6, 900e-6]) and len(kernels) == 2


def test_missing_tables_and_missing_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no measured tables of toy_gpu"):
        read_system(tmp_path, "toy_gpu")
    (tmp_path / "toy_gpu" / "gemm").mkdir(parents=True)
    (tmp_path / "toy_gpu" / "gemm" / "vllm_gemm_perf.parquet").write_bytes(b"")

    def absent(_path: Path) -> pd.DataFrame:
        raise ImportError("pyarrow")

    monkeypatch.setattr(pd, "read_parquet", absent)
    with pytest.raises(InputError, match="pyarrow"):
        read_system(tmp_path, "toy_gpu")


def shapes(count: int) -> dict[str, np.ndarray]:
    sizes = np.ceil(2 ** np.random.default_rng(1).uniform(0, 14, size=(count, 3)))
    return dict(zip("mnk", sizes.T, strict=True)) | {"batch": np.ones(count)}


def test_held_out_depends_on_the_shape_alone() -> None:
    columns = shapes(4000)
    out = held_out("gemm", columns)
    assert 0.2 < out.mean() < 0.3
    order = np.random.default_rng(3).permutation(4000)
    assert np.array_equal(out[order], held_out("gemm", {name: values[order] for name, values in columns.items()}))


def test_the_fastest_of_every_shape() -> None:
    """By brute force, over two kernels of which one alone says which library ran."""
    rng = np.random.default_rng(0)
    sizes = {name: rng.integers(1, 4, 60).astype(float) for name in ("m", "n", "k")}
    one = MeasuredKernel(("gemm", "bf16", "vllm", ""), sizes | {"source": rng.integers(0, 3, 60).astype(float)},
                         rng.random(60))
    two = MeasuredKernel(("gemm", "bf16", "sglang", ""), sizes, rng.random(60))
    least: dict[tuple[float, ...], float] = {}
    for part in (one, two):
        for *shape, seconds in zip(*sizes.values(), part.seconds, strict=True):
            least[tuple(shape)] = min(seconds, least.get(tuple(shape), np.inf))
    found = joined([one, two]).fastest()
    kept = zip(*(found.columns[name] for name in ("m", "n", "k")), found.seconds, strict=True)
    assert {tuple(shape): seconds for *shape, seconds in kept} == least and len(found) == len(least)


def test_a_table_of_linear_attention_holds_four_kernels(tmp_path: Path) -> None:
    """Sizes by hand: 16 key and 32 value heads of 128 are 8,192 channels; states as each engine keeps them."""
    row = {
        "op_name": "gdn", "batch_size": 8, "seq_len": 512, "d_conv": 4, "num_k_heads": 16, "head_k_dim": 128,
        "num_v_heads": 32, "head_v_dim": 128, "latency": 0.1,
    }
    kernels = [("causal_conv1d_fn", "context"), ("chunk_gated_delta_rule", "context"),
               ("causal_conv1d_update", "generation"), ("fused_recurrent_gated_delta_rule", "generation")]
    rows = [row | {"kernel_source": kernel, "phase": phase} for kernel, phase in kernels]
    for engine in ("sglang", "trtllm"):
        write(tmp_path, engine, "gdn", [one | {"framework": engine} for one in rows])
    read = read_system(tmp_path, "toy_gpu").kernels
    assert {key[0] for key in read} == {"conv_prefill", "linear_prefill", "conv_decode", "linear_decode"}
    assert read["conv_prefill", "bf16", "sglang", ""].columns["channels"].tolist() == [8192]
    decode = [read["linear_decode", "bf16", engine, ""].columns for engine in ("sglang", "trtllm")]
    assert [c["state_bytes"].tolist() for c in decode] == [[4], [2]]
    assert [c["new"].tolist() for c in decode] == [[1], [1]]
    assert read["linear_prefill", "bf16", "sglang", ""].columns["new"].tolist() == [512]
