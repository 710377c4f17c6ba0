"""The kernel predictor: trees against a slow reading of them, loads against counting, bounds and order everywhere."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorcast.cost.kernels.device_model import DeviceModel, pack, read_model
from tensorcast.cost.kernels.expert_load import rank_load
from tensorcast.cost.kernels.formula import formula_of
from tensorcast.cost.kernels.frames import predict_kernels
from tensorcast.cost.kernels.kept_answers import model_path
from tensorcast.cost.kernels.predictor import Predictor, from_other_devices, predictor_for
from tensorcast.cost.kernels.trees import Trees
from tensorcast.errors import InputError
from tensorcast.profiles.store import load_device

MEASURED = ("a100-sxm", "h100-sxm", "h200-sxm", "b200-sxm", "gb200")

WIDEST: dict[str, dict[str, float]] = {
    "gemm": {"m": 2e5, "n": 2e5, "k": 2e5},
    "attention_decode": {"batch": 4096.0, "past": 1e6},
    "attention_prefill": {"batch": 1024.0, "new": 65536.0},
    "grouped_gemm": {"tokens": 5e5},
}
"""Sizes beyond what was measured, which are then grown further."""

FIXED: dict[str, dict[str, Any]] = {
    "gemm": {"m": 64.0, "n": 4096.0, "k": 4096.0},
    "attention_decode": {"batch": 8.0, "past": 2048.0, "q_heads": 32.0, "kv_heads": 8.0, "head_dim": 128.0},
    "attention_prefill": {"batch": 1.0, "new": 1024.0, "q_heads": 32.0, "kv_heads": 8.0, "head_dim": 128.0},
    "grouped_gemm": {"tokens": 64.0, "hidden": 4096.0, "inter": 1536.0, "topk": 8.0, "experts": 128.0, "moe_ep": 8.0},
}


def random_trees(count: int, depth: int, features: int) -> Trees:
    rng = np.random.default_rng(count)
    borders = tuple(np.sort(rng.normal(size=rng.integers(1, 9))).astype(np.float32) for _ in range(features))
    feature = rng.integers(0, features, (count, depth)).astype(np.uint8)
    border = np.array([[rng.integers(0, len(borders[f])) for f in row] for row in feature], dtype=np.uint8)
    leaves = rng.normal(size=(count, 1 << depth)).astype(np.float32)
    names = tuple(f"x{i}" for i in range(features))
    return Trees(names=names, borders=borders, feature=feature, border=border, leaves=leaves, bias=0.25)


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (7, 5), (40, 3000), (3, 70_000)])
def test_trees_equal_asking_one_question_after_the_other(count: int, rows: int) -> None:
    trees = random_trees(count, 4, 5)
    rng = np.random.default_rng(rows)
    columns = {name: rng.normal(size=rows).astype(np.float32).astype(float) for name in trees.names}
    found = trees.values(columns)
    for row in rng.integers(0, rows, 20):
        expected = trees.bias
        for tree in range(count):
            leaf = 0
            for level in range(4):
                name = trees.feature[tree, level]
                leaf |= int(columns[f"x{name}"][row] > trees.borders[name][trees.border[tree, level]]) << level
            expected += float(trees.leaves[tree, leaf])
        assert found[row] == pytest.approx(expected, abs=1e-4)


def test_a_prefix_of_the_trees_is_the_sum_of_the_first() -> None:
    trees = random_trees(9, 3, 4)
    columns = {name: np.linspace(-2, 2, 50) for name in trees.names}
    first = replace(trees, feature=trees.feature[:4], border=trees.border[:4], leaves=trees.leaves[:4])
    assert np.allclose(trees.values(columns, 4), first.values(columns))
    assert np.allclose(trees.values(columns, 0), trees.bias)


@given(
    tokens=st.integers(1, 4096), top_k=st.integers(1, 8), ranks=st.sampled_from([1, 2, 4, 8]),
    skew=st.sampled_from([-1.0, 0.0, 0.6, 1.01, 1.2]),
)
@settings(max_examples=60, deadline=None)
def test_busiest_rank_holds_its_share_and_no_more_than_there_is(
    tokens: int, top_k: int, ranks: int, skew: float
) -> None:
    one = [np.array([float(x)]) for x in (tokens, 64, top_k, ranks, skew, 64)]
    load = rank_load(*one[:4], skew=one[4], slots=one[5])
    choices = tokens * top_k
    assert choices / ranks * (1 - 1e-9) - 1 <= load.rows[0] <= choices * (1 + 1e-6) + 0.5
    assert 0 < load.hit[0] <= 64 / ranks + 1e-6
    assert load.tiles_64[0] >= load.tiles_128[0] * (1 - 1e-9) > 0
    assert load.largest[0] <= max(load.rows[0], 1.0) * (1 + 1e-6)


def test_balanced_load_is_dealing_cards() -> None:
    for tokens, top_k, ranks in ((1, 8, 8), (40, 2, 4), (7, 1, 2)):
        dealt = np.zeros((ranks, 64 // ranks))
        for choice in range(tokens * top_k):
            dealt[choice % ranks, choice // ranks % (64 // ranks)] += 1
        *sizes, skew, slots = (np.array([float(x)]) for x in (tokens, 64, top_k, ranks, 0, 64))
        load = rank_load(*sizes, skew=skew, slots=slots)
        assert load.rows[0] == dealt.sum(axis=1).max()
        assert load.hit[0] == (dealt[0] > 0).sum()


@pytest.mark.parametrize("device", MEASURED)
def test_models_belong_to_this_formula(device: str) -> None:
    """A residual fits one formula: where that has changed since, the model must be fitted anew."""
    profile, path = load_device(device), model_path(device)
    assert path is not None and path.stat().st_size < 1_000_000
    stale = []
    for key, kernel in read_model(path).kernels.items():
        sizes = {name: np.array([value]) for name, value in kernel.report["probe"].items()}
        found = formula_of(kernel.family, kernel.dtype, kernel.variant, sizes, profile, engine=kernel.engine).seconds[0]
        if found != pytest.approx(kernel.report["probe_formula_s"], rel=1e-6):
            stale.append(key)
    assert not stale, f"calibrate anew: {stale[:5]} and {len(stale)} in all"


@pytest.mark.parametrize("device", MEASURED)
def test_stored_model_predicts_what_the_fit_saw(device: str) -> None:
    profile = load_device(device)
    for engine in ("vllm", "sglang", "trtllm"):
        predictor = predictor_for(profile, engine)
        assert predictor.model is not None
        for kernel in predictor.model.kernels.values():
            if kernel.engine == engine:
                sizes = {name: np.array([value]) for name, value in kernel.report["probe"].items()}
                found = predictor.price(kernel.family, kernel.dtype, kernel.variant, sizes)
                assert found.evidence[0] == "measured"
                assert found.seconds[0] == pytest.approx(kernel.report["probe_s"], rel=1e-4)


def test_a_configuration_keeps_its_own_level_and_no_other() -> None:
    """A remembered level moves exactly its configuration, by exactly that factor, at every number of tokens."""
    predictor = predictor_for(load_device("h200"), "trtllm")
    assert predictor.model is not None
    kernel = predictor.model.kernels["grouped_gemm", "bf16", "trtllm", ""]
    assert len(kernel.levels) > 20
    names = ("hidden", "inter", "topk", "experts", "moe_tp", "moe_ep", "skew")
    table = {name: np.array([line[i] for line in kernel.levels]) for i, name in enumerate(names)}
    assert np.allclose(kernel.level(table), [line[-1] for line in kernel.levels])
    assert np.all(np.asarray(kernel.level({**table, "hidden": table["hidden"] + 128.0})) == 0.0)


def test_intervals_for_new_models_are_wide_where_few_models_were_measured() -> None:
    """One model alone says nothing of another: then no narrower than datasheet constants deserve."""
    row = {"family": "moe", "num_tokens": 256, "hidden_size": 5555, "inter_size": 2048, "topk": 8, "num_experts": 256}
    found = predict_kernels(pd.DataFrame([row | {"dtype": d} for d in ("w4a16", "fp8_block")]), device="h200",
                            engine="vllm")
    above = np.log(found.high.to_numpy() / found.seconds.to_numpy())  # the lower end may stop at what physics allows
    assert above[0] >= 1.9 * 0.4 and above[0] > 2 * above[1]


def test_packing_keeps_the_model(tmp_path: Path) -> None:
    path = model_path("a100-sxm")
    assert path is not None
    model = read_model(path)
    (tmp_path / "copy.npz").write_bytes(pack(model))
    again = read_model(tmp_path / "copy.npz")
    assert again.kernels.keys() == model.kernels.keys()
    for key, kernel in model.kernels.items():
        assert np.allclose(again.kernels[key].trees.leaves, kernel.trees.leaves, atol=1e-6)
        assert again.kernels[key].box == kernel.box and again.kernels[key].seen == kernel.seen


def test_a_damaged_or_newer_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"no zip")
    with pytest.raises(InputError, match="not a kernel model"):
        read_model(tmp_path / "bad.npz")
    data = pack(DeviceModel("toy", {}))
    (tmp_path / "new.npz").write_bytes(data)
    with np.load(tmp_path / "new.npz") as found:
        arrays = dict(found)
    arrays["about"] = np.frombuffer(arrays["about"].tobytes().replace(b'"format": 2', b'"format": 9'), dtype=np.uint8)
    np.savez(tmp_path / "new.npz", **arrays)
    with pytest.raises(InputError, match="format 9"):
        read_model(tmp_path / "new.npz")


def predictors() -> list[tuple[str, Predictor]]:
    own = [(name, predictor_for(load_device(name), "trtllm")) for name in ("h200-sxm", "b200-sxm", "l20", "mi300a")]
    return [*own, ("l20", from_other_devices(load_device("l20"), "trtllm"))]


PREDICTORS = predictors()


@given(
    which=st.integers(0, len(PREDICTORS) - 1), family=st.sampled_from(sorted(WIDEST)), data=st.data(),
    dtype=st.sampled_from(["bf16", "fp8"]),
)
@settings(max_examples=150, deadline=None)
def test_beyond_the_data_time_grows_with_every_size(which: int, family: str, data: st.DataObject, dtype: str) -> None:
    _, predictor = PREDICTORS[which]
    grown = data.draw(st.sampled_from(sorted(WIDEST[family])))
    steps = np.sort(np.array(data.draw(st.lists(st.floats(1.0, 8.0), min_size=3, max_size=3))))
    sizes = FIXED[family] | {grown: np.round(WIDEST[family][grown] * steps)}
    found = predictor.estimate(family, dtype, **sizes)
    assert (np.diff(found.seconds) >= -1e-9 * found.seconds[1:]).all()


@given(
    which=st.integers(0, len(PREDICTORS) - 1), family=st.sampled_from(sorted(FIXED)),
    scale=st.dictionaries(st.sampled_from(["m", "n", "k", "batch", "past", "new", "tokens"]), st.floats(0.02, 50.0)),
    dtype=st.sampled_from(["bf16", "fp8", "fp8_block", "nvfp4"]),
)
@settings(max_examples=150, deadline=None)
def test_never_faster_than_physics_and_inside_its_interval(
    which: int, family: str, scale: dict[str, float], dtype: str
) -> None:
    _, predictor = PREDICTORS[which]
    sizes = {name: np.maximum(np.round(v * scale.get(name, 1.0)), 1.0) for name, v in FIXED[family].items()}
    found = predictor.estimate(family, dtype, **sizes)
    columns = {name: np.atleast_1d(np.asarray(v, dtype=float)) for name, v in sizes.items()}
    defaults = {"batch": 1.0, "past": 0.0, "new": 1.0, "window": 0.0, "kv_bytes": 2.0, "moe_tp": 1.0, "gated": 1.0,
                "skew": 0.0, "slots": 128.0}
    columns = {name: np.array([value]) for name, value in defaults.items()} | columns
    floor = formula_of(family, dtype, "", columns, predictor.device, engine="trtllm").floor
    assert (found.seconds >= floor * (1 - 1e-9)).all()
    assert (found.low <= found.seconds * (1 + 1e-9)).all() and (found.seconds <= found.high * (1 + 1e-9)).all()
    assert np.isfinite(found.high).all() and (found.low > 0).all()


def test_evidence_says_measured_between_points_calibrated_beyond_datasheet_without() -> None:
    shapes = pd.DataFrame({"family": "gemm", "dtype": "bf16", "m": [300, 200_000], "n": 5000, "k": 5000})
    assert predict_kernels(shapes, device="h200", engine="vllm").evidence.tolist() == ["measured", "calibrated"]
    for other in ("l20", "mi300a", "h20", "mi300x"):  # of the last two FP8 GEMMs alone were timed
        assert set(predict_kernels(shapes, device=other).evidence) == {"datasheet"}
    blocks = shapes.assign(dtype="fp8_block", m=[300, 131_072 * 2], n=4096, k=4096)
    assert predict_kernels(blocks, device="h20").evidence.tolist() == ["measured", "calibrated"]
    experts = pd.DataFrame({
        "family": "moe", "dtype": "fp8_block", "num_tokens": 100, "hidden_size": [7168, 5555], "inter_size": 2048,
        "topk": 8, "num_experts": 256,
    })
    found = predict_kernels(experts, device="h200", engine="trtllm")
    assert found.evidence.tolist() == ["measured", "calibrated"]
    width = np.log(found.high / found.low)
    assert width[1] > width[0]


def test_tables_words_and_ours_give_the_same_answer_in_any_order() -> None:
    theirs = pd.DataFrame([
        {"family": "gemm", "gemm_dtype": "bfloat16", "m": 64, "n": 4096, "k": 2048},
        {"family": "generation_attention", "kv_cache_dtype": "fp8", "batch_size": 16, "isl": 1, "step": 1023,
         "num_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "window_size": 0},
        {"family": "moe", "moe_dtype": "fp8_block", "num_tokens": 64, "hidden_size": 4096, "inter_size": 1536,
         "topk": 8, "num_experts": 128, "moe_tp_size": 1, "moe_ep_size": 8, "distribution": "power_law_1.2"},
        {"family": "nccl", "op_name": "all_reduce", "nccl_dtype": "half", "num_gpus": 8, "message_size": 65536},
    ])
    ours = pd.DataFrame([
        {"family": "gemm", "dtype": "bf16", "m": 64, "n": 4096, "k": 2048},
        {"family": "attention_decode", "dtype": "fp8", "batch": 16, "past": 1023, "q_heads": 32, "kv_heads": 8,
         "head_dim": 128, "kv_bytes": 1},
        {"family": "grouped_gemm", "dtype": "fp8_block", "tokens": 64, "hidden": 4096, "inter": 1536, "topk": 8,
         "experts": 128, "moe_ep": 8, "skew": 1.2},
        {"family": "all_reduce", "ranks": 8, "payload_bytes": 131072, "variant": "nccl"},
    ])
    a = predict_kernels(theirs, device="h200", engine="vllm")
    alone = [predict_kernels(ours.iloc[[i]].dropna(axis=1), device="h200", engine="vllm") for i in range(4)]
    assert np.allclose(a.seconds, [one.seconds.iloc[0] for one in alone])
    back = predict_kernels(theirs.iloc[::-1], device="h200", engine="vllm")
    assert np.allclose(back.seconds.to_numpy()[::-1], a.seconds)
    assert list(back.index) == [3, 2, 1, 0]


def test_bad_frames_are_one_clear_line() -> None:
    with pytest.raises(InputError, match="family"):
        predict_kernels(pd.DataFrame({"m": [1]}), device="h200")
    with pytest.raises(InputError, match="op family"):
        predict_kernels(pd.DataFrame({"family": ["gem"], "m": [1]}), device="h200")
    with pytest.raises(InputError, match="'k' is missing"):
        predict_kernels(pd.DataFrame({"family": ["gemm"], "m": [1], "n": [1]}), device="h200")
    empty = predict_kernels(pd.DataFrame({"family": [], "m": []}), device="h200")
    assert len(empty) == 0 and "seconds" in empty


GEMM = {"family": "gemm", "dtype": "bf16", "m": 8, "n": 128, "k": 128}
EXPERTS = {"family": "moe", "num_tokens": 8, "hidden_size": 128, "inter_size": 64, "topk": 2, "num_experts": 64}


@pytest.mark.parametrize(("row", "words"), [
    (GEMM | {"m": 0}, "m 0 in row 1: must be above 0"), (GEMM | {"m": -5}, "m -5 in row 1"),
    (GEMM | {"k": float("inf")}, "k inf in row 1: must be above 0 and finite"), (GEMM | {"n": "wide"}, "'n' must hold"),
    (GEMM | {"dtype": "banana"}, "dtype 'banana' in row 1: must be one of bf16"),
    (EXPERTS | {"topk": 200}, "topk 200 in row 1: more than its experts, 64"),
    (EXPERTS | {"moe_ep_size": 128}, "moe_ep_size 128 in row 1: more than its experts, 64"),
    (EXPERTS | {"num_tokens": 0}, "num_tokens 0 in row 1"), (GEMM | {"engine": "nosuchengine"}, "'nosuchengine'"),
    ({"family": "all_reduce", "ranks": 0, "payload_bytes": 64}, "ranks 0 in row 1"),
])
def test_what_no_kernel_can_be_is_one_line(row: dict[str, Any], words: str) -> None:
    good = (GEMM if row["family"] == "gemm" else EXPERTS if row["family"] == "moe" else row | {"ranks": 8})
    good = {"engine": "vllm", **good}
    assert predict_kernels(pd.DataFrame([good]), device="h200").seconds[0] > 0
    with pytest.raises(InputError, match=re.escape(words)) as refused:
        predict_kernels(pd.DataFrame([good, good | row]), device="h200")
    assert "\n" not in str(refused.value)


def test_engines_by_alias_and_rows_without_one() -> None:
    frame = pd.DataFrame([GEMM | {"engine": name} for name in ("sglang", "SGL", None, "any")])
    found = predict_kernels(frame, device="h200")
    assert found.seconds[0] == found.seconds[1] > 0 and found.seconds[2] == found.seconds[3] > 0


def test_another_variants_kernel_is_not_measured() -> None:
    frame = pd.DataFrame([GEMM | {"n": 4096, "k": 4096, "variant": name} for name in ("", "nosuchvariant")])
    found = predict_kernels(frame, device="h200", engine="vllm")
    assert found.evidence.tolist() == ["measured", "calibrated"]


@given(
    n=st.integers(64, 65536), k=st.integers(64, 65536), dtype=st.sampled_from(["bf16", "fp8", "fp8_block"]),
    engine=st.sampled_from(["trtllm", "vllm", "sglang"]), m=st.lists(st.integers(1, 80_000), min_size=2, max_size=40),
)
@settings(max_examples=60, deadline=None)
def test_without_own_data_a_larger_gemm_is_never_faster(n: int, k: int, dtype: str, engine: str, m: list[int]) -> None:
    """What other devices need over the formula knows nothing of this one's tiles."""
    predictor = from_other_devices(load_device("l20"), engine)
    sizes = np.unique(np.concatenate([m, np.asarray(m) + 1])).astype(float)
    found = predictor.estimate("gemm", dtype, m=sizes, n=float(n), k=float(k))
    assert (np.diff(found.seconds) >= -1e-9 * found.seconds[1:]).all()
    assert (found.low <= found.seconds).all() and (found.seconds <= found.high).all()
    one = predictor.estimate("gemm", dtype, m=sizes[-1], n=float(n), k=float(k))
    assert one.seconds[0] == pytest.approx(found.seconds[-1], rel=1e-9)


def test_exchange_without_a_phase_is_dispatch_and_combine() -> None:
    row = {"family": "deepep_ll", "num_token": 128, "hidden_size": 7168, "num_topk": 8, "num_experts": 256}
    whole = predict_kernels(pd.DataFrame([row]), device="h200").seconds[0]
    parts = [predict_kernels(pd.DataFrame([row | {"phase": p}]), device="h200").seconds[0]
             for p in ("dispatch", "combine")]
    assert whole == pytest.approx(sum(parts), rel=1e-6)
