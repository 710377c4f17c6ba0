"""Steps are priced by the kernel model where one speaks for a row, and by the formula alone where none does."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tensorcast.api import predict_kernels
from tensorcast.cost.evidence import LEVELS, NORMAL_80
from tensorcast.cost.kernels.corrections import corrections_for
from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.layout import Layout, parse_layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.plan.plan import Collective
from tensorcast.deploy.step import step as step_module
from tensorcast.deploy.step import sums as sums_module
from tensorcast.deploy.step.row_prices import EXPERTS_CALL, part_of_call
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.serving.curves import decode_columns
from tensorcast.trace.moe import EXPERT_STAGES
from tensorcast.trace.table import Op

LLAMA = {"heads": 32, "kv_heads": 8, "head_dim": 128, "hidden": 4096, "inter": 14336}  # Llama-3.1-8B's config.json
QWEN = {"hidden_size": 2048, "inter_size": 768, "topk": 8, "num_experts": 128}  # Qwen3-30B-A3B's
GEMM = {"m": 8.0, "n": 4096.0, "k": 4096.0, "batch": 1.0}


def deployment(
    model: str = "llama-3.1-8b", phase: str = "decode", device: DeviceProfile | None = None, **layout: Any
) -> Deployment:
    """On an H200 under vLLM, without gaps between kernels: tables time kernels alone."""
    engine = load_engine("vllm")
    none = {"graph_launch_gap_s": 0.0, "eager_launch_gap_s": 0.0}
    ranks = Layout(**{"world_size": 1, **layout})
    return deploy(load_model(model), device or load_device("h200"), engine.model_copy(update=none), ranks, phase)


def row(made: Deployment, module: str, *sizes: Any, name: str = "") -> Any:
    price = made.step.price(*sizes)
    return next(p for p in price.rows if module in p.row.module and name in getattr(p.row, "name", ""))


@pytest.mark.parametrize(("batch", "context"), [(1, 1000), (16, 4095), (100, 700)])
def test_decode_attention_costs_what_the_predictor_says(batch: int, context: int) -> None:
    found = row(deployment(), "self_attn", float(batch), 1.0, float(context), name="attention")
    shape = {"family": "attention_decode", "batch": batch, "past": context, "q_heads": LLAMA["heads"],
             "kv_heads": LLAMA["kv_heads"], "head_dim": LLAMA["head_dim"]}  # fmt: skip
    told = predict_kernels(pd.DataFrame([shape]), device="h200", engine="vllm").iloc[0]
    assert float(found.seconds) == pytest.approx(told.seconds, rel=1e-6)
    assert found.evidence == told.evidence == "measured"
    assert NORMAL_80 * float(found.error) == pytest.approx(np.log(told.high / told.low) / 2)


@pytest.mark.parametrize("tokens", [1, 37, 512, 5000])
def test_a_matmul_costs_what_the_predictor_says(tokens: int) -> None:
    found = row(deployment(phase="prefill"), "down_proj", 1.0, float(tokens), 0.0, name="mm")
    shape = {"family": "gemm", "m": tokens, "n": LLAMA["hidden"], "k": LLAMA["inter"], "dtype": "bf16"}
    told = predict_kernels(pd.DataFrame([shape]), device="h200", engine="vllm").iloc[0]
    assert float(found.seconds) == pytest.approx(told.seconds, rel=0.01)  # what a call does beside is another row


@pytest.mark.parametrize("ep", [1, 2])
def test_experts_rows_add_up_to_the_tables_call(ep: int) -> None:
    made = deployment("qwen3-30b-a3b", world_size=ep, tp=ep, ep=ep)
    price = made.step.price(256.0, 1.0, 1000.0)
    both = sum(float(p.seconds) for p in price.rows if p.family == "grouped_gemm")
    shape = {"family": "moe", "num_tokens": 256, "moe_tp_size": 1, "moe_ep_size": ep, "moe_dtype": "bf16",
             "distribution": "balanced", **QWEN}  # fmt: skip
    told = predict_kernels(pd.DataFrame([shape]), device="h200", engine="vllm").iloc[0]
    assert both == pytest.approx(told.seconds, rel=0.02)
    assert {p.evidence for p in price.rows if p.family == "grouped_gemm"} == {told.evidence}


@pytest.mark.parametrize("graphs", ["full", "none"])
def test_a_devices_gap_comes_once_for_every_kernel_of_a_replayed_graph(graphs: str) -> None:
    """Its kernels were timed alone; those launched one by one wait for the host, whose gap hides it."""
    device = load_device("mi355x")
    assert device.graph_gap_s is not None
    took, kernels = [], 0.0
    for one in (device, device.model_copy(update={"graph_gap_s": None})):
        options = Options(quant="bf16", cuda_graphs=graphs)
        made = deploy(load_model("llama-3.1-8b"), one, load_engine("vllm"), Layout(1), "decode", options=options)
        price = made.step.price(4.0, 1.0, 1000.0)
        took.append(sum(float(row.seconds) * float(calls) for row, calls in price.calls))
        kernels = sum(float(calls) for _, calls in price.calls)
    gaps = kernels * float(device.graph_gap_s) if graphs == "full" else 0.0
    assert took[0] - took[1] == pytest.approx(gaps, rel=1e-6, abs=1e-12)


TIMED = [
    ("h200", "trtllm", "gpt-oss-20b", None, 1024, 0.598),
    ("h200", "trtllm", "gpt-oss-120b", None, 8192, 4.302),
    ("h200", "trtllm", "qwen3-235b-a22b", "fp8_block", 8192, 4.954),
    ("h200", "trtllm", "qwen3-30b-a3b", "fp8", 8192, 1.071),
    ("b200", "trtllm", "qwen3-235b-a22b", "fp8", 2048, 0.574),
    ("h200", "vllm", "mixtral-8x7b", "bf16", 2048, 2.101),
    ("h200", "vllm", "qwen3-235b-a22b", "fp8_block", 8192, 4.512),
    ("b200", "vllm", "qwen3-30b-a3b", "nvfp4", 8192, 0.391),
    ("h200", "sglang", "qwen3-30b-a3b", "fp8_block", 8192, 1.198),
    ("b200", "sglang", "qwen3-235b-a22b", "nvfp4", 8192, 0.840),
]
"""Whole calls of experts on one GPU, balanced, in ms (aiconfigurator-core 0.12.0, moe tables)."""


@pytest.mark.parametrize("timed", TIMED, ids=str)
def test_experts_of_a_step_take_as_long_as_their_call_was_timed(timed: tuple[Any, ...]) -> None:
    """Permuting, activating, quantising and combining are in it, whatever the fit makes of their part."""
    device, engine, model, quant, tokens, took_ms = timed
    options = Options(quant=quant, routing="balanced")
    made = deploy(load_model(model), load_device(device), load_engine(engine), Layout(1), "prefill", options=options)
    took_s, products = 0.0, 0.0
    for price, calls in made.step.price(1.0, float(tokens), 0.0).calls:
        if not isinstance(price.row, Collective) and price.row.stage in EXPERT_STAGES:
            took_s += float(price.seconds) * float(calls)
            products += float(calls) * (price.row.name == "grouped_matmul")
    assert 1e3 * took_s / (products / 2) == pytest.approx(took_ms, rel=0.1)


def test_rows_of_experts_take_their_own_time_where_nothing_is_fused() -> None:
    """Each of their kernels is then launched by itself, as transformers does it."""
    permuted = []
    for fusion in ("engine", "none"):
        made = deploy(
            load_model("qwen3-30b-a3b"), load_device("h200"), load_engine("vllm"), Layout(1), "prefill",
            options=Options(fusion=fusion),
        )
        permuted.append(float(row(made, "", 1.0, 4096.0, 0.0, name="init_routing_v2").seconds))
    assert permuted[0] == 0.0 < permuted[1]


def test_a_users_own_constants_win() -> None:
    """A family whose constants are not those of the fit is priced by the formula alone; the others stay."""
    device = load_device("h200")
    assert device.calibration is not None
    slower = tuple(
        k.model_copy(update={"launch_s": k.launch_s * 1.1}) if k.family == "gemm" else k
        for k in device.calibration.kernels
    )
    own = device.model_copy(update={"calibration": device.calibration.model_copy(update={"kernels": slower})})
    sizes = 8.0, 1.0, 1000.0
    prices = deployment(device=own).step.price(*sizes).rows
    assert {p.evidence for p in prices if p.family == "gemm"} == {"calibrated"}
    assert {p.evidence for p in prices if p.family == "attention_decode"} == {"measured"}
    assert corrections_for(own, "vllm").at("gemm", "bf16", "", GEMM) is None
    assert corrections_for(device, "vllm").at("gemm", "bf16", "", GEMM) is not None


@pytest.mark.parametrize("device", ["mi300a", "ascend-910b"])
def test_other_vendors_devices_keep_the_formula(device: str) -> None:
    prices = deployment(device=load_device(device)).step.price(8.0, 1.0, 1000.0).rows
    assert {p.evidence for p in prices} == {"datasheet"}
    assert corrections_for(load_device(device), "vllm").at("gemm", "bf16", "", GEMM) is None


@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen3-30b-a3b"])
def test_arrays_are_priced_as_their_entries(model: str) -> None:
    """Batches up to far outside what was measured, so that evidence changes within the array."""
    made = deployment(model)
    batches = np.array([0.25, 1.0, 1.5, 33.0, 1024.0, 60000.0])
    together = made.step.price(batches, 1.0, 2000.0)
    shares = together.tally.evidence
    seconds, error = np.asarray(together.seconds), np.asarray(together.error)
    for i, batch in enumerate(batches):
        alone = made.step.price(batch, 1.0, 2000.0)
        assert seconds[i] == pytest.approx(float(alone.seconds), rel=1e-12)
        assert error[i] == pytest.approx(float(alone.error), rel=1e-9)
        for kind, share in alone.tally.evidence.items():
            assert np.broadcast_to(shares[kind], len(batches))[i] == pytest.approx(float(share), abs=1e-12)
    assert np.ptp(shares["measured"]) > 0.1


@pytest.mark.parametrize(("phase", "layout"), [("decode", {"tp": 2}), ("prefill", {"dp": 2, "ep": 2})])
def test_sums_are_those_of_all_calls_one_by_one(phase: str, layout: dict[str, Any]) -> None:
    made = deployment("qwen3-30b-a3b", phase, world_size=2, **layout)
    batches = np.array([1.0, 8.0, 300.0])
    price = made.step.price(batches, 1.0 if phase == "decode" else 512.0, 2000.0)
    totals: dict[str, Any] = defaultdict(float)
    families: dict[str, Any] = defaultdict(float)
    for row, calls in price.calls:
        one = row.row
        seconds = np.broadcast_to(row.seconds * calls, (3,))
        names = ["seconds"]
        if isinstance(one, Collective):
            names += ["communication"] + ["experts"] * (one.group in ("dp", "ep"))
        else:
            names += ["attention"] * (one.name == "attention") + ["experts"] * (one.stage in EXPERT_STAGES)
        for name in names:
            totals[name] += seconds
        families[row.family] += seconds * row.error
        for kind in LEVELS:
            totals[kind] += seconds * (np.asarray(row.evidence) == kind)
    for name in ("seconds", "communication", "attention", "experts"):
        assert np.broadcast_to(getattr(price.tally, name), (3,)) == pytest.approx(totals[name], rel=1e-12)
    for kind in LEVELS:
        share = np.broadcast_to(price.tally.evidence[kind], (3,))
        assert share == pytest.approx(totals[kind] / totals["seconds"], rel=1e-12, abs=1e-15)
    off = np.sqrt(sum(np.square(one) for one in families.values()) + price.overhead_error_s**2)
    assert price.error == pytest.approx(off / (totals["seconds"] + price.overhead_s), rel=1e-12)


def test_all_sums_take_one_pass_over_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, sums = list[Any](), step_module.sums_of_steps

    def counted(recipes: Any, prices: Any, places: Any, *more: Any) -> Any:
        asked.extend([prices[i] for i in place] for place in places)
        return sums(recipes, prices, places, *more)

    monkeypatch.setattr(step_module, "sums_of_steps", counted)
    price = deployment("qwen3-30b-a3b").step.price(8.0, 1.0, 2000.0)
    decode_columns(price)
    (prices,) = asked
    assert list(map(id, prices)) == [id(one) for part in price.parts for one in part.prices]


def test_totals_of_many_members_are_those_of_each_alone() -> None:
    """Sums that steps share and those of each member, at batches that run parts at cases of their own, time and again:
    to the last total what every member's own sums say."""
    draw = np.random.default_rng(3)
    made = [deployment("qwen3-30b-a3b"), deployment("qwen3-30b-a3b", world_size=2, dp=2, ep=2)]
    recipes = [one.step.recipe(drafting=True) for one in made]
    first, families, members, width, batches = recipes[0], 4, [1, 3], 5, 7
    parts, sizes = len(first.parts), len(first.weights[0]) + len(first.weights[1])
    count = sizes + len(first.parts) * (len(LEVELS) + families)
    shared, varied = draw.random((count, 2, width)), np.sort(draw.choice(count, 9, replace=False))
    own = draw.random((9, sum(members), width))
    sums = sums_module.SumsOfSteps(first, families, members, shared, own, varied)
    cases = [draw.integers(width, size=batches) for _ in range(parts)]
    times: list[Any] = [2.0, *(draw.random(batches) for _ in range(parts - 1))]
    member, batch = np.array([[3], [0], [2]]), draw.integers(batches, size=(3, 4))
    found = sums_module.TotalsOfSteps(sums, cases, times).at(member, batch)
    alone = sums.of_members()
    for i, j in np.ndindex(*batch.shape):
        here = [alone.at(np.array([member[i, 0] * width + case[batch[i, j]]])) for case in cases]
        own_times = [n if isinstance(n, float) else n[batch[i, j]] for n in times]
        told = here[0].totals([one.by_part()[k] for k, one in enumerate(here)], own_times)
        for name, values in found._asdict().items():
            np.testing.assert_allclose(values[..., i, j], np.asarray(getattr(told, name))[..., 0], rtol=1e-12)


@pytest.mark.parametrize(("device", "zero"), [
    ("b200", {"permute", "activation"}), ("mi355x", {"activation"}), ("h20", set()),
])  # fmt: skip
def test_rows_around_experts_take_what_their_table_left_out(device: str, zero: set[str]) -> None:
    """aiconfigurator times an engine's call of experts; AITER's tuner its two stages, with the activation and the sum
    over experts in them (aiter/fused_moe.py, fused_moe_2stages); InferSim the grouped GEMMs."""
    gpu = load_device(device)

    def around(gpu: DeviceProfile) -> dict[str, float]:
        engine = load_engine("vllm")  # whose compiler quantises in the kernels before
        made = deploy(load_model("qwen3-235b-a22b-fp8"), gpu, engine, parse_layout("tp4-ep4"), "decode")
        took: dict[str, float] = defaultdict(float)
        for row in made.step.price(64.0, 1.0, 2048.0).rows:
            if isinstance(row.row, Op) and row.row.stage in EXPERT_STAGES:
                took[part_of_call(row.row)] += float(row.seconds)
        assert set(took) == EXPERTS_CALL - {"quantise"}
        return took

    took, apart = around(gpu), around(gpu.model_copy(update={"experts_held": ()}))
    assert {part for part, seconds in took.items() if not seconds} == zero
    # what is left of the sum is the norm that reads it
    assert (took["unpermute"] < apart["unpermute"]) is bool(zero) and all(apart.values())
