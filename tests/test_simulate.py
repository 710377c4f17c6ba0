"""The whole step through the public interface: totals that add up, anchors from publications, and bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import SMALL
from typer.testing import CliRunner

import tensorcast as tc
from tensorcast.cli import app
from tensorcast.cost.formulas import FORMULAS, Context, chunk_pairs, work_of
from tensorcast.deploy.workload import Workload
from tensorcast.trace.dims import Dim, Sizes
from tensorcast.trace.table import Op, Tensor

DEEPSEEK: dict[str, Any] = {"device": "h200", "world_size": 32, "tp": 1, "dp": 32, "ep": 32}


@pytest.fixture(scope="module")
def deepseek() -> Any:
    return tc.simulate("deepseek-v3", **DEEPSEEK, phase="decode", batch=128, context=4096)


def test_op_table_adds_up_to_the_step(deepseek: Any) -> None:
    frame = deepseek.ops
    seconds = frame["seconds"].sum() + float(deepseek.price.overhead_s)
    assert seconds - float(deepseek.price.hidden_s) == pytest.approx(deepseek.step_s)
    assert frame["share"].sum() == pytest.approx(1.0)
    assert (frame["seconds"].diff().dropna() <= 0).all()
    for key in ("evidence", "family", "bound"):
        assert sum(deepseek.time_by(key).values()) == pytest.approx(frame["seconds"].sum())


def test_deepseek_decode_flops_by_hand(deepseek: Any) -> None:
    """2 FLOPs per active weight and token, experts' rows as routed; attention 2*H*(2r+d_r) per query and key.

    Per rank: 128 tokens through attention, dense layers, shared experts, router and head; 1024 expert rows.
    """
    tokens, layers, moe, hidden = 128, 61, 58, 7168
    attention_weights = hidden * 1536 + 1536 * 128 * 192 + hidden * 576 + 512 * 128 * 256 + 128 * 128 * hidden
    expert = 3 * hidden * 2048
    weights = layers * attention_weights + 3 * 3 * hidden * 18432 + moe * (expert + 256 * hidden) + 129280 * hidden
    rows = tokens * 32 * 8 / 32
    core = layers * tokens * 2 * 128 * 4097 * (2 * 512 + 64)
    by_hand = 2 * tokens * weights + 2 * moe * rows * expert + core
    assert deepseek.ops["flops"].sum() == pytest.approx(by_hand, rel=1e-3)


def test_totals_are_json_and_consistent(deepseek: Any) -> None:
    totals = json.loads(json.dumps(deepseek.totals(), allow_nan=False))
    memory = totals["memory_bytes"]
    assert sum(memory[k] for k in ("weights", "kv_cache", "activations", "communication", "engine")) == memory["total"]
    assert memory["kv_cache"] == 128 * 4097 * 70_272
    assert totals["tokens_per_s_per_gpu"] == pytest.approx(128 / totals["step_s"])
    assert totals["step_low_s"] < totals["step_s"] < totals["step_high_s"]
    assert 0 < totals["mfu"] < 1 and 0 < totals["memory_bandwidth_use"] < 1
    assert totals["fits"] and totals["largest_batch_per_dp_rank"] > 128


def test_prefill_flops_by_hand() -> None:
    """Llama-3.1-8B, 2 sequences of 2048 tokens: 2 * weights * tokens (head: last tokens only) + causal attention."""
    run = tc.simulate("llama-3.1-8b", device="h100", phase="prefill", batch=2, input_len=2048)
    layer = 4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336
    pairs = 2048 * 2049 / 2
    by_hand = 2 * (32 * layer * 2 * 2048 + 2 * 128256 * 4096) + 32 * 2 * 2 * 32 * 128 * 2 * pairs
    assert run.ops["flops"].sum() == pytest.approx(by_hand, rel=1e-3)


def test_decode_reads_at_least_the_weights_and_the_cache() -> None:
    """Dense bf16 decode moves every weight and every cached token once, and little else."""
    run = tc.simulate("llama-3.1-8b", device="h100", batch=16, context=4096)
    floor = (8.03e9 - 128256 * 4096) * 2 + 16 * 4097 * 131_072
    assert floor < run.ops["bytes"].sum() < 1.05 * floor
    assert run.bandwidth_use < 1.0


def test_a_faster_device_is_faster() -> None:
    times = [
        tc.simulate("qwen3-30b-a3b", device=d, world_size=8, ep=8, batch=32).step_s for d in ("a100", "h100", "h200")
    ]
    assert times == sorted(times, reverse=True)


def test_eager_fusion_costs_more() -> None:
    fused, eager = (
        tc.simulate("qwen3-30b-a3b", device="h100", batch=8, context=512, fusion=f) for f in ("engine", "none")
    )
    assert len(eager.ops) > 3 * len(fused.ops)
    assert eager.step_s > 1.5 * fused.step_s


def test_quantising_shrinks_memory_and_time() -> None:
    whole, small = (
        tc.simulate("mixtral-8x7b", device="h200", batch=1, context=128, quant=q) for q in ("bf16", "fp8_block")
    )
    assert small.memory.weights == pytest.approx(whole.memory.weights / 2, rel=0.02)
    assert small.step_s < whole.step_s


def test_fp8_cache_fits_more_sequences() -> None:
    runs = [tc.simulate("qwen3-30b-a3b", device="h100", batch=1, context=8192, kv_dtype=kv) for kv in ("bf16", "fp8")]
    few = runs[0].largest_batch
    assert runs[1].largest_batch in (2 * few, 2 * few + 1)  # floors of a size and of its double


def test_largest_batch_fits_and_one_more_does_not() -> None:
    run = tc.simulate("qwen3-30b-a3b", device="h100", batch=1, context=8192)
    deployment, largest = run.deployment, run.largest_batch
    assert deployment.memory(largest, 1, 8192).fits
    assert not deployment.memory(largest + 1, 1, 8192).fits


def test_local_config_directory_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL["qwen3_moe"]))
    run = tc.simulate(str(tmp_path), device="h100", batch=4, context=64)
    assert run.deployment.raw.facts.num_experts == 16
    assert math.isfinite(run.step_s)


def test_a_class_that_derives_its_head_size_is_cut_all_the_same(tmp_path: Path) -> None:
    """OLMoE's heads are the hidden size over their number: fewer would be wider, so weights are cut, not the config."""
    config = {key: value for key, value in SMALL["olmoe"].items() if key != "head_dim"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    one, two = (tc.simulate(str(tmp_path), device="h100", world_size=n, tp=n, context=64) for n in (1, 2))
    whole = 2 * (5 * 64 + 2 * 8 * 64)  # bytes of norms and routers, which every rank has; those of heads are halved
    assert two.memory.weights == pytest.approx((one.memory.weights + whole) / 2)
    assert two.memory.kv_cache == one.memory.kv_cache / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "deepsek-v33"}, "unknown model .* did you mean .*deepseek-v3"),
        ({"device": "h1000"}, "unknown device 'h1000': did you mean .*h100[,?]"),
        ({"engine": "vlm"}, "unknown engine 'vlm': did you mean vllm"),
        ({"batch": 0}, "batch 0"),
        ({"context": -1}, "context -1"),
        ({"phase": "train"}, "phase 'train'"),
        ({"input_len": 5}, "a decode step has 1 new token"),
        ({"tp": 3}, "world_size|divide"),
        ({"dp": 0}, "at least 1"),
        ({"quant": "fp3"}, "unknown quantization scheme 'fp3'"),
        ({"kv_dtype": "int4"}, "unknown kv_dtype 'int4'"),
        ({"routing": "skewed"}, "routing 'skewed'"),
        ({"fusion": "all"}, "fusion 'all'"),
        ({"all2all": "magic", "tp": 1, "dp": 8, "ep": 8}, "unknown all2all 'magic'"),
        ({"dispatch": "fp7"}, "unknown dispatch dtype 'fp7'"),
        ({"batch": 100_000}, r"batch 100000 does not fit: needs .* over the budget .* the largest that fits is \d+"),
        ({"model": "deepseek-v3", "context": 10}, "not even one sequence"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: dict[str, Any], message: str) -> None:
    given = {"model": "qwen3-30b-a3b", "device": "h100", "world_size": 8, "batch": 1, **arguments}
    with pytest.raises(tc.InputError, match=message) as caught:
        tc.simulate(given.pop("model"), **given)
    assert "--" not in str(caught.value)  # from Python, arguments go by their own names
    assert "\n" not in str(caught.value)


def test_redundant_experts_cost_memory_and_save_time_under_skew() -> None:
    def run(**options: Any) -> Any:
        return tc.simulate(
            "deepseek-v3", **DEEPSEEK, batch=192, context=4096, all2all="low_latency", routing="zipf:0.8", **options
        )

    plain, placed, copied = run(), run(placement="eplb"), run(placement="eplb", redundant_experts=32)
    assert plain.step_s > placed.step_s > copied.step_s
    expert = 3 * 7168 * 2048 * (1 + 4 / 128**2)
    assert copied.memory.weights - placed.memory.weights == pytest.approx(58 * expert)  # one more per rank and layer
    with pytest.raises(tc.InputError, match="has no experts"):
        tc.simulate("llama-3.1-8b", device="h100", redundant_experts=8)


def test_oversized_batches_can_be_priced_on_request() -> None:
    run = tc.simulate("qwen3-30b-a3b", device="h100", batch=100_000, allow_oversize=True)
    assert not run.memory.fits and run.step_s > 0


def test_workload_defaults_and_lengths() -> None:
    assert Workload("decode", 1, 1, 100).length == 101
    assert Workload("prefill", 1, 100, 28).length == 128


@pytest.mark.parametrize("seed", range(20))
def test_chunked_attention_pairs_equal_brute_force(seed: int) -> None:
    generator = np.random.default_rng(seed)
    new, past, chunk = (int(generator.integers(1, n)) for n in (60, 90, 25))
    brute = sum(position % chunk + 1 for position in range(past, past + new))
    assert chunk_pairs(float(new), float(past), chunk) == brute


def test_an_op_without_a_formula_is_traffic_and_reported() -> None:
    x = Tensor((Dim(1, B=1), Dim(64)), "bfloat16", 0)
    op = Op("brand_new_kernel", "m", 0, (x,), (x,))
    (work,) = work_of(op, Context(Sizes(B=10.0, S=1.0, P=0.0)))
    assert op.name not in FORMULAS
    assert (work.family, work.bytes) == ("memory", 2 * 10 * 64 * 2)


def test_embedding_reads_rows_not_the_table() -> None:
    table, ids = Tensor((Dim(50_000), Dim(64)), "bfloat16", 0, "w"), Tensor((Dim(1, B=1), Dim(1)), "int64", 1)
    out = Tensor((Dim(1, B=1), Dim(1), Dim(64)), "bfloat16", 2)
    (work,) = work_of(Op("embedding", "m", -1, (table, ids), (out,)), Context(Sizes(B=10.0, S=1.0, P=0.0)))
    assert work.bytes == 2 * 10 * 64 * 2 + 10 * 8


def test_a_server_of_pools_keeps_one_state_of_a_sequence() -> None:
    """SGLang's servers of both phases keep four copies more; layouts of pools are servers of one phase."""
    asked: dict[str, Any] = {"device": "h200", "world_size": 2, "tp": 2, "batch": 10, "engine": "sglang"}

    def cache(context: int, pooled: bool) -> float:
        return float(tc.simulate("qwen3-next-80b-a3b", context=context, pooled=pooled, **asked).memory.kv_cache)

    # of 48 layers 12 cache 2 x 256 numbers in bf16 of each token and rank (2 heads over 2 ranks)
    each = 10 * 12 * 2 * 256 * 2.0
    one = cache(1000, True) - 1001 * each
    assert cache(9000, True) == pytest.approx(9001 * each + one)
    assert cache(1000, False) > 5 * one > 0
    words = ["simulate", "qwen3-next-80b-a3b", "-d", "h200", "-e", "sglang", "--batch", "10", "--context", "1000"]
    found = CliRunner().invoke(app, [*words, "--layout", "2 x tp2 > tp2", "--json"])
    assert json.loads(found.output)["memory_bytes"]["kv_cache"] == pytest.approx(cache(1000, True))
    assert "in pools decode steps take" in found.output
