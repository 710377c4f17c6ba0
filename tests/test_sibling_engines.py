"""Kernels that were not timed as a server runs them, told by the other engines' times and by the bytes they read."""

from __future__ import annotations

import numpy as np
import pytest

from tensorcast.calibrate.measured_rows import Key, MeasuredKernel, MeasuredSystem
from tensorcast.calibrate.sibling_engines import GENERATED, as_served, weights_read
from tensorcast.cost.kernels.vocabulary import source_of

BANDWIDTH = 4.8e12
"""H200."""

TRITON, MARLIN = source_of("triton"), source_of("marlin")


def system(*kernels: MeasuredKernel) -> MeasuredSystem:
    return MeasuredSystem("toy", {rows.key: rows for rows in kernels})


def gemm(engine: str, dtype: str, times: float) -> MeasuredKernel:
    """``times`` as long as the weights take to read, and 4 us."""
    m, n = (side.ravel() for side in np.meshgrid(2.0 ** np.arange(13), [1024.0, 4096, 7168]))
    columns = {"m": m, "n": n, "k": np.full(len(m), 7168.0), "batch": np.ones(len(m))}
    return MeasuredKernel(("gemm", dtype, engine, ""), columns, times * (4e-6 + n * 7168 * 0.56 / BANDWIDTH))


def experts(
    engine: str, dtype: str, share: float, source: float = 0.0, *, hidden: float = 2880, weight_bytes: float = 0.53
) -> MeasuredKernel:
    """gpt-oss-120b's experts at ``share`` of the memory's speed, or another model's of another width."""
    tokens, tp = (side.ravel() for side in np.meshgrid([32.0, 48, 64, 96, 128, 1024], [1.0, 2, 4]))
    size = 128 * 3 * hidden * 2880 * weight_bytes / tp
    fixed = {"hidden": hidden, "inter": 2880.0, "topk": 4.0, "experts": 128.0, "slots": 128.0, "moe_ep": 1.0,
             "gated": 1.0, "skew": 0.0, "source": source}
    columns = {name: np.full(len(tokens), value) for name, value in fixed.items()} | {"tokens": tokens, "moe_tp": tp}
    return MeasuredKernel(("grouped_gemm", dtype, engine, ""), columns, size / (share * BANDWIDTH))


def both(one: MeasuredKernel, two: MeasuredKernel) -> MeasuredKernel:
    columns = {name: np.concatenate([one.columns[name], two.columns[name]]) for name in one.columns}
    return MeasuredKernel(one.key, columns, np.concatenate([one.seconds, two.seconds]))


def shares(rows: MeasuredKernel) -> list[float]:
    speed, tells = weights_read(rows)
    return sorted({round(float(one), 2) for one in speed[tells] / BANDWIDTH})


def test_gemms_slower_than_both_other_engines_go() -> None:
    """TensorRT-LLM's NVFP4 GEMMs: 1.7 and 2.5 times as long as vLLM's and SGLang's on B200."""
    found = system(gemm("vllm", "nvfp4", 1.5), gemm("sglang", "nvfp4", 1.0), gemm("trtllm", "nvfp4", 2.5))
    as_served(found)
    assert {key[2] for key in found.kernels} == {"vllm", "sglang"}
    (reason, count), = found.dropped.items()
    assert "trtllm's nvfp4" in reason and count == 39


@pytest.mark.parametrize("times", [(1.0, 1.1, 1.2), (1.0, 1.35, 1.6)])
def test_gemms_as_engines_differ_stay(times: tuple[float, float, float]) -> None:
    """Slower than one other is not slower than both."""
    engines = ("vllm", "sglang", "trtllm")
    found = system(*(gemm(engine, "fp8", one) for engine, one in zip(engines, times, strict=True)))
    as_served(found)
    assert len(found.kernels) == 3 and not found.dropped


def test_one_sibling_alone_proves_nothing_of_a_gemm() -> None:
    found = system(gemm("sglang", "fp8_block", 1.0), gemm("trtllm", "fp8_block", 3.0))
    as_served(found)
    assert len(found.kernels) == 2


def test_experts_at_a_tenth_of_the_memorys_speed_go() -> None:
    """vLLM's FP8 experts on H200: 0.12 of the peak where TensorRT-LLM's take 0.72."""
    slow, sound = experts("vllm", "fp8", 0.12, weight_bytes=1.0), experts("trtllm", "fp8", 0.72, weight_bytes=1.0)
    found = system(slow, sound)
    as_served(found)
    assert list(found.kernels) == [sound.key] and sum(found.dropped.values()) == len(slow)


def test_the_siblings_rows_take_the_place_of_one_library_of_several() -> None:
    """SGLang's table timed gpt-oss in unpacked weights (0.2), another model by Marlin (0.5); vLLM's in OpenAI's."""
    sglang = both(experts("sglang", "mxfp4", 0.2, TRITON), experts("sglang", "mxfp4", 0.5, MARLIN, hidden=4096))
    vllm = both(experts("vllm", "mxfp4", 0.46, TRITON), experts("vllm", "mxfp4", 0.49, MARLIN, hidden=4096))
    found = system(sglang, vllm, experts("trtllm", "bf16", 0.8, weight_bytes=2.0))
    as_served(found)
    rows = found.kernels[sglang.key]
    gpt_oss = rows.columns["hidden"] == 2880
    assert (rows.columns["source"] == np.where(gpt_oss, TRITON, MARLIN)).all() and gpt_oss.sum() == 18
    assert shares(rows.take(gpt_oss)) == [0.46] and shares(rows.take(~gpt_oss)) == [0.5]


def test_slow_experts_that_all_engines_have_stay() -> None:
    """4-bit weights unpacked to bf16 on Blackwell: slow everywhere, so that is what runs."""
    sound = experts("trtllm", "bf16", 0.8, weight_bytes=2.0)
    vllm, sglang = (experts(*one, weight_bytes=0.516) for one in (("vllm", "w4a16", 0.25), ("sglang", "w4a16", 0.22)))
    found = system(sound, vllm, sglang)
    as_served(found)
    assert len(found.kernels) == 3 and not found.dropped


def test_generated_experts_in_blocks_come_from_a_sibling() -> None:
    key: Key = ("grouped_gemm", "fp8_block", "trtllm", "")
    own = experts("trtllm", "fp8_block", 0.5, source_of("deepgemm"), weight_bytes=1.0)
    vllm = experts("vllm", "fp8_block", 0.75, source_of("flashinfer_trtllm_monolithic"), weight_bytes=1.0)
    found = system(own, vllm)
    as_served(found)
    rows = found.kernels[key]
    generated = rows.columns["source"] == GENERATED
    assert generated.sum() == len(vllm)
    assert shares(rows.take(generated)) == [0.75] and shares(rows.take(~generated)) == [0.5]
    hopper = system(own, experts("vllm", "fp8_block", 0.75, TRITON, weight_bytes=1.0))
    as_served(hopper)
    assert len(hopper.kernels[key]) == len(own)
