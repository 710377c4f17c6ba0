"""Constants fitted to whole attention modules, and steps that add up to modules as they were timed.

Times: aiconfigurator-core 0.12.0 (Apache-2.0), tables ``dsa_*_module``, ``dsv4_*_module``, ``msa_*_module`` and
``mhc_module``, in milliseconds.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tensorcast.calibrate.attention_modules import TABLES, Timed, fit, read_rows, timed_streams
from tensorcast.cost.roofline import constants_for, kernel_time
from tensorcast.cost.work import Work
from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import options_of
from tensorcast.deploy.plan.plan import Collective
from tensorcast.profiles.device import KernelConstants
from tensorcast.profiles.store import load_device, load_engine, load_model

pytest.importorskip("pyarrow")


@cache
def deployed(model: str, engine: str, phase: str, kv: str, *, tp: int = 8) -> Deployment:
    return deploy(load_model(model), load_device("b200"), load_engine(engine), Layout(world_size=tp, tp=tp), phase,
                  options=options_of({"kv_dtype": kv}))


def module_ms(one: Deployment, batch: int, new: int, past: int, *, ratio: int) -> float:
    """Of one layer's attention, from its first projection to its last."""
    price = one.step.price(float(batch), float(new), float(past))
    kind, module = next(
        (op.kind, op.module) for op in one.step.table.ops
        if op.name == "attention" and op.attrs.get("compress", 0) == ratio and (ratio or op.attrs["selected"])
    )
    rows = [row for row in price.rows if row.row.kind == kind and not isinstance(row.row, Collective)]
    return 1e3 * float(sum(np.ravel(row.seconds)[0] for row in rows if module in row.row.module))


@pytest.mark.parametrize(("model", "engine", "ratio", "batch", "past", "ms"), [
    ("deepseek-v3.2", "vllm", 0, 128, 8192, 0.284), ("deepseek-v4-flash", "vllm", 4, 64, 4096, 0.1031),
    ("deepseek-v4-flash", "vllm", 128, 64, 4096, 0.0545), ("deepseek-v4-flash", "sglang", 4, 64, 4096, 0.1664),
    ("deepseek-v4-flash", "sglang", 128, 256, 4096, 0.0903), ("deepseek-v4-flash", "trtllm", 4, 64, 4096, 0.1411),
])
def test_modules_of_decode(model: str, engine: str, *, ratio: int, batch: int, past: int, ms: float) -> None:
    """On a B200. vLLM's of DeepSeek-V3.2 was priced at half of this while its kernels were taken for SGLang's."""
    one = deployed(model, engine, "decode", "fp8")
    assert module_ms(one, batch, 1, past, ratio=ratio) == pytest.approx(ms, rel=0.2)


@pytest.mark.parametrize(("model", "engine", "ratio", "batch", "new", "ms"), [
    ("deepseek-v4-flash", "vllm", 128, 1, 8192, 1.0078), ("deepseek-v4-flash", "sglang", 128, 1, 8192, 0.9742),
    ("minimax-m3", "vllm", 0, 2, 4096, 0.4015),
])
def test_modules_of_prompts(model: str, engine: str, *, ratio: int, batch: int, new: int, ms: float) -> None:
    one = deployed(model, engine, "prefill", "fp8" if ratio else "bf16")
    assert module_ms(one, batch, new, 0, ratio=ratio) == pytest.approx(ms, rel=0.25)


@pytest.mark.parametrize(("tokens", "ms"), [(1024, 0.0689), (16384, 0.8272)])
def test_hyper_connections(tokens: int, ms: float) -> None:
    """Both sites of a layer, vLLM on a B200; six times this while streams were mixed by a GEMM's tiles."""
    one = deployed("deepseek-v4-flash", "vllm", "prefill", "fp8", tp=1)
    price = one.step.price(1.0, float(tokens), 0.0)
    rows = [row for row in price.rows if row.row.kind == 3 and "stream_mix" in getattr(row.row, "parts", ())]
    assert 1e3 * sum(float(np.ravel(row.seconds)[0]) for row in rows) == pytest.approx(ms, rel=0.2)


def test_a_device_without_such_tables_says_so() -> None:
    for name in ("a100", "mi300x"):
        for family, dtype in (("mla_sparse_decode", "fp8"), ("compressed_prefill", "fp8"), ("blocks_decode", "bf16")):
            assert constants_for(load_device(name), family, dtype, "vllm")[1] == "datasheet"


def test_constants_are_found_again() -> None:
    """Modules made of known constants and other rows: what is fitted predicts those that were held out."""
    rng = np.random.default_rng(0)
    device = load_device("b200")
    truth = {
        "mla_sparse_decode": (0.5, 0.6, 4e-5, 1e-9), "indexer_decode": (0.3, 0.4, 5e-6, 2e-7),
    }
    parts = []
    for others in (3e-5, 8e-5):
        batch, keys = (np.exp2(rng.integers(*span, 200)).astype(np.float64) for span in ((0, 10), (4, 17)))
        works = tuple(
            Work(family, "fp8", flops=batch * keys * f, bytes=batch * keys * b, issued_flops=batch * keys * f,
                 rows=batch)
            for family, f, b in (("mla_sparse_decode", 3e5, 600.0), ("indexer_decode", 2e4, 140.0))
        )
        made = [
            kernel_time(work, KernelConstants(
                family=work.family, dtype="fp8", engine="vllm", smoothing=1.0, compute_efficiency=c,
                memory_efficiency=m, launch_s=launch, row_s=row,
            ), device).seconds
            for work, (c, m, launch, row) in zip(works, truth.values(), strict=True)
        ]
        parts.append(Timed(np.asarray(others + sum(made)), np.full(200, others), works, rng.random(200) < 0.25))
    found = fit(parts, device, "vllm", [])
    assert {one.family for one in found} == set(truth)
    assert all(one.median_error is not None and one.median_error < 0.03 for one in found)
    assert fit(parts, device, "vllm", found) == []  # nothing is left to fit


def test_modules_of_another_kernel_have_no_constants() -> None:
    rng = np.random.default_rng(1)
    works = (Work("blocks_prefill", "bf16", flops=np.ones(200), bytes=np.ones(200), issued_flops=np.ones(200),
                  rows=np.ones(200)),)
    noise = Timed(1e-3 * 10.0 ** rng.uniform(-2, 2, 200), np.zeros(200), works, rng.random(200) < 0.25)
    assert fit([noise], load_device("b200"), "trtllm", []) == []


def test_rows_that_tell_nothing_are_left_out(tmp_path: Path) -> None:
    """Another precision, modules without an indexer, SGLang's dense kernels, an unknown model, the host's time."""
    row: dict[str, Any] = {
        "model": "deepseek-ai/DeepSeek-V3.2", "op_name": "dsa_context_module", "kernel_source": "sparse",
        "kv_cache_dtype": "fp8", "gemm_type": "fp8_block", "num_heads": 16, "batch_size": 2, "isl": 4096, "step": 128,
        "latency": 3.0,
    }
    bad: list[dict[str, Any]] = [
        {"gemm_type": "nvfp4"}, {"op_name": "dsa_context_module_skip_indexer"}, {"model": "someone/else"},
        {"kernel_source": "sglang_dsa_dense_mha_trtllm_ragged"}, {"isl": 16, "latency": 0.7},
    ]
    floor = [{"isl": n, "latency": 0.69} for n in (1, 2, 4, 8)]
    path = tmp_path / "sglang_dsa_context_module.parquet"
    pd.DataFrame([row, *({**row, **change} for change in (*bad, *floor))]).to_parquet(path)
    (table,) = (one for one in TABLES if one.name == "dsa_context_module")
    (kept,) = read_rows(path, table).to_dict("records")
    assert [kept[name] for name in ("tp", "kv", "batch", "new", "past", "seconds")] == [8, "fp8", 2, 4096, 128, 3e-3]


@pytest.mark.parametrize("device", ["l40s", "rtx-pro-6000", "a100", "h200"])
def test_streams_are_timed_on_devices_that_do_not_run_the_whole_model(tmp_path: Path, device: str) -> None:
    """DeepSeek-V4's hyper-connections are timed on Ada and Ampere, too, which lack kernels for its attention."""
    path = tmp_path / "mhc_module.parquet"
    pd.DataFrame({
        "hidden_size": 4096, "num_tokens": [1, 1, 64, 64], "latency": [0.01, 0.02, 0.02, 0.03],
    }).to_parquet(path)  # fmt: skip
    (found,) = timed_streams(path, load_device(device), "trtllm")
    assert found.seconds.tolist() == pytest.approx([3e-5, 5e-5]) and len(found.works) >= 1
