"""Running rows for real: kernels and their operands, the store, predictions, fits, layers against transformers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorcast.calibrate.constants import from_validation as calibrate
from tensorcast.cost import work
from tensorcast.cost.roofline import kernel_time
from tensorcast.cost.row_seconds import predict
from tensorcast.cost.work import Work
from tensorcast.deploy.deployment import Deployment
from tensorcast.deploy.workload import Workload
from tensorcast.errors import InputError
from tensorcast.measure import kernels, layers
from tensorcast.measure import ops as oprun
from tensorcast.measure import timing as bench
from tensorcast.measure.operands import Buffers, Unsupported
from tensorcast.measure.store import CRASHED, Store, key_of, read_table, works_from, works_text, write_table
from tensorcast.modeling.config import hf_config
from tensorcast.profiles.device import DeviceProfile, KernelConstants
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.store import load_engine, load_model
from tensorcast.trace.cache import traced
from tensorcast.validate import beside_measured as compare
from tensorcast.validate.run import Request, _deployment, _watcher, cut

CPU = torch.device("cpu")

NO_KERNEL = {"glm_moe_dsa": {"attention"}, "qwen3_next": {"linear_attention", "causal_conv1d"}}
"""Attention over selected tokens, and what is only ever traced."""


def device(**changes: Any) -> DeviceProfile:
    """A made-up machine with round numbers."""
    figure = {"value": 1.0, "source": "book"}
    return DeviceProfile.model_validate({
        "name": "cpu", "vendor": "none", "architecture": "none", "description": "made up", "sources": {"book": "none"},
        "processors": 1, "whole_tiles": False, "memory_bytes": {**figure, "value": 1e10},
        "peak_flops": {"bf16": {**figure, "value": 1e11}, "fp32": {**figure, "value": 5e10}},
        "memory_bandwidth_bytes_per_s": {**figure, "value": 1e10},
        "interconnect": [{
            "name": "host", "size": 8, "bandwidth_bytes_per_s": {**figure, "value": 5e9},
            "latency_s": {**figure, "value": 5e-5},
        }], **changes,
    })


def model(family: str) -> ModelProfile:
    return ModelProfile(name=family, hf_id=family, description="d", sources={}, config=SMALL[family])


def request_of(family: str, **changes: Any) -> Request:
    return Request(model(family), device(), load_engine("eager"), **changes)


def rows_of(family: str, workload: Workload, **changes: Any) -> tuple[Deployment, list[oprun.Row]]:
    request = request_of(family, **changes)
    deployment = _deployment(request, request.model, workload.phase)
    return deployment, oprun.rows_of(deployment, workload, _watcher(request, request.model))


@pytest.fixture(scope="module")
def buffers() -> Buffers:
    return Buffers(CPU, pool_bytes=1 << 22)


@pytest.mark.parametrize("family", sorted(SMALL))
@pytest.mark.parametrize("workload", [Workload("decode", 3, 1, 20), Workload("prefill", 2, 12, 0)], ids=repr)
def test_every_row_runs(family: str, workload: Workload, buffers: Buffers) -> None:
    """All ops of all families have a kernel, whose result is as large as the row says."""
    _, rows = rows_of(family, workload)
    stuck = set()
    for row in rows:
        try:
            build = kernels._KERNELS.get(row.op.name, kernels.replayed)
            with torch.inference_mode():
                out = build(kernels.Case(row.op, row.at, buffers, row.template))()
        except (Unsupported, ValueError):
            stuck.add(row.op.name)
            continue
        plain = row.op.name not in ("kv_cache_write", "mla_absorb", "attention", "topk", "sort")
        if plain and isinstance(out, torch.Tensor) and len(row.op.outputs) == 1:
            wanted = math.prod(kernels.whole(d.at(row.at.sizes)) for d in row.op.outputs[0].dims)
            assert out.numel() == wanted, (row.op.name, row.op.module, tuple(out.shape))
    assert stuck <= NO_KERNEL.get(family, set())


def test_equal_kernels_are_one_row(buffers: Buffers) -> None:
    """Counts per step add up to the ops of the table, layers counted."""
    deployment, rows = rows_of("qwen3_moe", Workload("decode", 4, 1, 16))
    table = deployment.step.table
    assert sum(row.count for row in rows) == sum(table.count(op) for op in table.ops)
    assert len({row.identity for row in rows}) == len(rows) < len(table.ops)


def test_one_rank_of_a_shard_is_smaller() -> None:
    workload = Workload("decode", 4, 1, 16)
    (_, whole), (_, shard) = rows_of("qwen3_moe", workload), rows_of("qwen3_moe", workload, tp=2, ep=2)

    def weights(rows: list[oprun.Row]) -> float:
        experts = [row for row in rows if row.op.name == "grouped_matmul"]
        return sum(float(t.numel(row.at.sizes)) for row in experts for t in row.op.inputs if t.weight)

    assert weights(shard) * 2 == weights(whole)


@pytest.mark.parametrize("scheme", ["fp8", "fp8_block", "int8", "w4a16", "mxfp4"])
def test_quantised_experts_have_operands_of_their_scheme(scheme: str, buffers: Buffers) -> None:
    """The op that a GPU times, here by unpacking; on a CPU the row says so instead of being timed."""
    config = {**SMALL["qwen3_moe"], "hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 32}
    request = replace(request_of("qwen3_moe"), quant=f"experts={scheme}")
    request.model = request.model.model_copy(update={"config": config})
    deployment = _deployment(request, request.model, "decode")
    rows = oprun.rows_of(deployment, Workload("decode", 4, 1, 16), None)
    row = next(r for r in rows if r.op.name == "grouped_matmul" and r.op.attrs["projection"] == "up")
    case = kernels.Case(row.op, row.at, buffers)
    with pytest.raises(Unsupported, match="on a CPU"):
        kernels.grouped_matmul(case)
    assert kernels.quantised_grouped(case)().shape == (16, 256)


@given(st.integers(0, 500), st.integers(1, 64), st.integers(1, 64))
def test_rows_are_spread_evenly_over_the_hit_experts(rows: int, hit: int, experts: int) -> None:
    counts = kernels.spread(rows, hit, experts, CPU)
    used = counts[counts > 0]
    assert counts.shape == (experts,) and int(counts.sum()) == rows
    assert len(used) == min(hit, experts, rows) if rows else not len(used)
    assert not len(used) or int(used.max() - used.min()) <= 1


@given(st.integers(1, 40), st.integers(1, 8), st.integers(8, 40))
def test_choices_are_distinct_and_even(tokens: int, top_k: int, experts: int) -> None:
    chosen = Buffers(CPU, 1 << 16).choices(tokens, top_k, experts)
    assert all(len(set(row)) == top_k for row in chosen.tolist())
    counts = torch.bincount(chosen.reshape(-1), minlength=experts)
    assert int(counts.max() - counts.min()) <= 1


def test_operands_rotate_and_are_random() -> None:
    pool = Buffers(CPU, pool_bytes=1 << 16)
    first, second = pool.take((64,), torch.bfloat16), pool.take((64,), torch.bfloat16)
    assert first.data_ptr() != second.data_ptr() and not torch.equal(first, second)
    assert bool((first != 0).any()) and first.float().std() > 0.5
    assert pool.take((1 << 16,), torch.float32).numel() == 1 << 16  # larger than the pool: one of its own
    wide = pool.strided((4, 3), (1, 4), torch.float32)
    assert wide.stride() == (1, 4)


def test_calls_take_their_operands_in_turn() -> None:
    ran: list[int] = []
    timing = bench.time_calls([lambda i=i: ran.append(i) for i in range(3)], CPU, effort=0.2)  # type: ignore[misc]
    assert ran[:5] == [0, 1, 0, 1, 2] and set(ran) == {0, 1, 2}
    assert timing.calls == len(ran) - 2 and timing.method == "clock"
    assert 0 <= timing.low_s <= timing.median_s <= timing.high_s and timing.seconds == timing.low_s


def test_what_does_not_fit_is_refused_or_shrunk() -> None:
    _, rows = rows_of("qwen3_moe", Workload("decode", 512, 1, 4096))
    largest = max(rows, key=lambda row: kernels.operand_bytes(row.op, row.at))
    need = kernels.operand_bytes(largest.op, largest.at)
    with pytest.raises(InputError, match=r"attention 512x4x1x16 .* needs 0\.3 GB.*--shrink"):
        oprun.check_memory(rows, need)
    oprun.check_memory(rows, need / kernels.ROOM)
    for limit in (need / 3, need / 100):
        at = oprun.shrunk(largest.op, largest.at, limit)
        assert kernels.operand_bytes(largest.op, at) <= limit and 1 <= at.sizes.B < 512
    experts = next(row for row in rows if row.op.name == "grouped_matmul")
    at = oprun.shrunk(experts.op, experts.at, 20e3)
    assert 1 <= at.sizes.E < 16 and at.hit <= at.sizes.E


def runner(store: Store) -> oprun.OpRunner:
    return oprun.OpRunner(CPU, Buffers(CPU, 1 << 20), store, "here", 0.05)


def test_a_failing_kernel_is_a_row_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: kernels.Case) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setitem(kernels._KERNELS, "embedding", broken)
    _, rows = rows_of("llama", Workload("decode", 2, 1, 8))
    records = [oprun.record(*found) for found in runner(Store(None)).run(rows, False, lambda text: None)]
    failed = [record for record in records if record["problem"]]
    assert [record["op"] for record in failed] == ["embedding"] and len(records) == len(rows)
    assert failed[0]["problem"] == "CUDA out of memory. Tried to allocate 2 GiB" and failed[0]["seconds"] is None


def test_a_lost_context_ends_the_run_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(case: kernels.Case) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(kernels._KERNELS, "embedding", lost)
    _, rows = rows_of("llama", Workload("decode", 2, 1, 8))
    with pytest.raises(InputError, match="run the same command again"):
        list(runner(Store(None)).run(rows, False, lambda text: None))


def test_a_kernel_that_ended_the_process_twice_is_not_tried_again(tmp_path: Path) -> None:
    _, rows = rows_of("llama", Workload("decode", 2, 1, 8))
    key = key_of("op", kernels.identity(rows[0].op, rows[0].at), "here")
    path = tmp_path / "kept.jsonl"
    for attempt in range(2):
        path.open("a").write(json.dumps({"begun": key}) + "\n")
        found = next(iter(runner(Store(path)).run(rows[:1], False, lambda text: None)))[2]
        assert found.get("problem", "") == (CRASHED if attempt else "")
        if not attempt:  # it ran: as if it had not
            path.write_text(json.dumps({"begun": key}) + "\n")


def test_the_store_survives_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    store = Store(path)
    store.begin("a")
    store.add("a", seconds=1.5)
    with path.open("a") as file:
        file.write('{"key": "b", "sec')
    again = Store(path)
    assert again.rows == {"a": {"key": "a", "seconds": 1.5}}
    again.add("c", problem="x")
    assert set(Store(path).rows) == {"a", "c"}
    again.finish()
    assert not path.exists()


WORKS = st.one_of(
    st.builds(work.gemm, st.integers(1, 10**4), st.integers(1, 10**4), st.integers(1, 10**4)),
    st.builds(work.grouped_gemm, st.integers(1, 10**4), st.integers(1, 64), st.integers(1, 4096), st.integers(1, 4096)),
    st.builds(lambda n: replace(work.memory(float(n), 2.0 * n), kernel="mul"), st.integers(1, 10**9)),
)


@given(st.lists(WORKS, min_size=1, max_size=3))
def test_works_come_back_from_text(works: list[Work]) -> None:
    constants = KernelConstants(family="gemm", compute_efficiency=0.5, memory_efficiency=0.5, launch_s=1e-6)
    for old, new in zip(works, works_from(works_text(works)), strict=True):
        assert (old.family, old.dtype, old.kernel) == (new.family, new.dtype, new.kernel)
        a, b = (float(kernel_time(w, constants, device(whole_tiles=True)).seconds) for w in (old, new))
        assert a == pytest.approx(b, rel=1e-8)


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"family": "gemm"}]', '[{"tilings": [{}]}]'])
def test_damaged_works_are_one_error(text: str) -> None:
    with pytest.raises(InputError, match="column works"):
        works_from(text)


@settings(max_examples=25)
@given(st.lists(st.text(min_size=1), unique=True, min_size=1, max_size=40), st.randoms())
def test_which_shapes_are_left_out_depends_on_them_alone(texts: list[str], random: Any) -> None:
    held = dict(zip(texts, calibrate.left_out(texts), strict=True))
    shuffled = random.sample(texts, len(texts))
    assert held == dict(zip(shuffled, calibrate.left_out(shuffled), strict=True))
    assert sum(held.values()) == (len(texts) + 1) // 3


TRUTH = {
    "gemm": KernelConstants(family="gemm", compute_efficiency=0.6, memory_efficiency=0.4, launch_s=5e-6),
    "memory": KernelConstants(family="memory", compute_efficiency=1.0, memory_efficiency=0.25, launch_s=2e-6),
}


def synthetic(noise: float = 0.0, outliers: int = 0) -> pd.DataFrame:
    """Timings that known constants would give, some of them far off."""
    generator = np.random.default_rng(0)
    rows = []
    for m in (1, 3, 9, 40, 150, 600):
        for n in (64, 700, 3000):
            for w in (work.gemm(m, n, 512), replace(work.memory(4.0 * m * n, 2.0 * m * n), kernel="mul")):
                seconds = float(kernel_time(w, TRUTH[w.family], device()).seconds)
                rows.append({
                    "level": "op", "op": w.kernel or "mm", "family": w.family, "dtype": "bf16", "shape": f"{m}x{n}",
                    "seconds": seconds * math.exp(generator.normal(0, noise)), "works": works_text([w]),
                    "device": "made up",
                })
    for i in range(outliers):
        rows[5 * i] |= {"seconds": 30.0 * float(str(rows[5 * i]["seconds"]))}
    return pd.DataFrame(rows)


def test_a_fit_finds_the_constants_behind_the_timings() -> None:
    found, fits = calibrate.calibrate(device(), synthetic(noise=0.02, outliers=3))
    assert {fit.family for fit in fits} == {"gemm", "memory", "memory/mul"}
    assert found.calibration is not None
    for entry in found.calibration.kernels:
        true = TRUTH[entry.family.partition("/")[0]]
        assert entry.memory_efficiency == pytest.approx(true.memory_efficiency, rel=0.15)
        assert entry.launch_s == pytest.approx(true.launch_s, rel=0.3)
        assert entry.median_error is not None and entry.median_error < 0.1
    assert "one shape in 3 left out" in found.calibration.provenance


def test_a_fit_that_is_worse_is_refused() -> None:
    standing, _ = calibrate.calibrate(device(), synthetic())
    with pytest.raises(InputError, match=r"no fit is better .* nothing is written"):
        calibrate.calibrate(standing, synthetic())  # no better than itself
    misled = synthetic(noise=0.5)  # what stands is right on the shapes left out
    held = calibrate._shapes(misled).held
    misled.loc[held[held].index, "seconds"] = synthetic().seconds
    fits = calibrate.fit_kernels(misled, standing)
    assert fits and all(fit.verdict.startswith("refused") and not fit.taken for fit in fits)
    kept = calibrate.calibrated(standing, fits, "p")
    assert kept.calibration is not None and standing.calibration is not None
    assert kept.calibration.kernels == standing.calibration.kernels


def test_what_cannot_be_fitted_is_said() -> None:
    with pytest.raises(InputError, match="measured shapes"):
        calibrate.calibrate(device(), synthetic().head(3))
    with pytest.raises(InputError, match="no measurements"):
        calibrate.calibrate(device(), pd.DataFrame())


def test_tables_come_back_and_damaged_ones_do_not(tmp_path: Path) -> None:
    frame = synthetic()
    for path in write_table(frame, tmp_path):
        pd.testing.assert_frame_equal(read_table(path), frame, check_dtype=False)
    (tmp_path / "bad.csv").write_text("level,family\nop,gemm\n")
    (tmp_path / "bad.parquet").write_text("no")
    for name, words in (("bad.csv", "no column 'dtype'"), ("bad.parquet", "cannot read"), ("none.csv", "cannot read")):
        with pytest.raises(InputError, match=words):
            read_table(tmp_path / name)


@pytest.mark.parametrize(("measured_over_predicted", "flops", "moved", "words"), [
    (1.1, 1e9, 1e6, ""), (2.0, 1e3, 1e3, "launch-bound"), (9.0, 1e3, 1e3, "fallback kernel"),
    (0.5, 1e6, 1e7, "cache-resident"),
    (0.5, 1e6, 1e9, "faster kernel"), (5.0, 1e6, 1e9, "fallback kernel"), (2.0, 1e6, 1e9, "slower kernel"),
    (2.0, 1e11, 1e6, "tile quantisation"),
])
def test_likely_cause(measured_over_predicted: float, flops: float, moved: float, words: str) -> None:
    works = [Work("gemm", "bf16", flops, moved, flops * (2.0 if flops > 1e10 else 1.0))]
    found = predict(works, device(), "eager")
    cause = compare.likely_cause(found.seconds * measured_over_predicted, found, works, "cpu")
    assert cause.startswith(words) and bool(cause) == bool(words)


def test_first_layers_of_a_class_of_ones_own_are_its_arguments() -> None:
    own = ModelProfile(name="own", model="own_model:House", config={"floors": 3, "width": 64})
    with pytest.raises(InputError, match=r"no field of own's config is known .*set its argument \(floors, width\)"):
        cut(own, 1)


def test_first_layers_of_a_model() -> None:
    small = cut(model("gpt_oss"), 2)
    assert hf_config(small).num_hidden_layers == 2 and traced(small, "decode").layer_kinds == (0, 1)
    assert cut(model("qwen3_moe"), 1).config["mlp_only_layers"] == []
    hybrid = cut(load_model("nemotron-3-nano-30b-a3b"), 2)  # a letter per layer
    assert hybrid.config["hybrid_override_pattern"] == "ME" and hf_config(hybrid).num_hidden_layers == 2
    for layers_ in (0, 99):
        with pytest.raises(InputError, match="--layers"):
            cut(model("llama"), layers_)


@pytest.mark.parametrize("family", [name for name in SMALL if name != "glm_moe_dsa"])
def test_rewritten_layers_equal_transformers_and_run_after_a_cache(family: str) -> None:
    profile = model(family)
    table, config = traced(profile, "decode"), hf_config(profile)
    torch.manual_seed(1)
    built = layers.stock_model(config, torch.float32, CPU)
    checks = layers.check_layers(built, config, table.layer_kinds, table.kind_names)
    assert len(checks) == len(table.kind_names)
    assert max(check.relative_error for check in checks) < 1e-5
    found = list(layers.time_layers(built, config, Workload("decode", 2, 1, 16), table.layer_kinds, 0.05))
    assert [m.kind for m in found] == [*range(len(table.kind_names)), -1]
    assert all(m.timing.seconds > 0 and not m.problem for m in found)


def test_a_cache_that_holds_the_past_gives_what_one_pass_gives() -> None:
    """The layers' cache takes new tokens behind those it holds, call after call alike."""
    cache = layers.RunCache()
    cache.past_len = 5
    new = torch.randn(2, 3, 4, 8)
    first = cache.update(new, new, 0)[0].clone()
    assert first.shape == (2, 3, 9, 8) and torch.equal(first[..., 5:, :], new)
    assert torch.equal(cache.update(new, new, 0)[0], first) and cache.get_seq_length() == 5
