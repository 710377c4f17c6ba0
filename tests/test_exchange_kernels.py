"""Engines' exchange kernels without times of their own: priced as what moves the same bytes, where they can run."""

from __future__ import annotations

from typing import Any

import pytest

import tensorcast as tc
from tensorcast.deploy.engine_limits import KERNELS_OF, engine_can_run
from tensorcast.deploy.exchange_kernels import EXCHANGE_KERNELS, broken_exchange, priced_as
from tensorcast.deploy.layout import ALL2ALL, parse_layout
from tensorcast.deploy.options import Options
from tensorcast.launch.launch import launch
from tensorcast.profiles.store import load_device, load_engine, load_model

QWEN = load_model("qwen3-235b-a22b")
WIDE = parse_layout("dp8-ep8")


def simulated(all2all: str, device: str = "h200", **more: Any) -> tc.Simulation:
    more = {"world_size": 8, "dp": 8, "ep": 8, "batch": 32, **more}
    return tc.simulate("qwen3-235b-a22b", device=device, all2all=all2all, **more)


def test_every_kind_is_priced_as_one_with_constants() -> None:
    assert set(EXCHANGE_KERNELS) == {kind for kind in ALL2ALL if priced_as(kind) != kind}
    assert {one.like for one in EXCHANGE_KERNELS.values()} <= {"high_throughput", "low_latency", "direct"}


@pytest.mark.parametrize("kind", EXCHANGE_KERNELS)
def test_rows_move_the_bytes_of_what_they_are_priced_as(kind: str) -> None:
    """Dispatch and combine are those of the exchange that stands for it, and a note says so."""
    device = "mi300x" if "AMD" in EXCHANGE_KERNELS[kind].vendors else "h200"
    more = {"engine": "sglang", "routing": "balanced", "allow_oversize": True}
    own, like = simulated(kind, device, **more), simulated(priced_as(kind), device, **more)

    def moved(run: tc.Simulation) -> list[tuple[float, float]]:
        return [(r["wire_bytes"], r["seconds"]) for r in run.records() if r["shape"] in ("dispatch", "combine")]

    assert moved(own) == moved(like) and len(moved(own)) >= 2
    assert own.totals()["exchange_kernels"] == kind and like.totals()["exchange_kernels"] == ""
    assert any(note.startswith(f"{kind} is priced as {priced_as(kind)} exchange") for note in own.notes)


def test_only_deepeps_own_kernels_break_graphs() -> None:
    """vLLM launches DeepEP's high-throughput kernels one by one (config/compilation.py); DeepEP v2 is captured."""
    assert simulated("deepep_v2").step_s < simulated("high_throughput").step_s


@pytest.mark.parametrize(
    ("kind", "layout", "device", "says"),
    [
        ("mori_low_latency", "dp8-ep8", "h200", "--all2all mori_low_latency: AMD GPUs only, not h200-sxm (NVIDIA)"),
        ("nixl_ep", "dp8-ep8", "mi300x", "--all2all nixl_ep: NVIDIA GPUs only, not mi300x (AMD)"),
        ("flashinfer_nvlink_one_sided", "dp16-ep16", "h200",
         "--all2all flashinfer_nvlink_one_sided: over NVLink, which joins 8 of the 16 ranks on h200-sxm"),
        ("flashinfer_nvlink_one_sided", "dp16-ep16", "gb200", ""),
        ("nixl_ep", "dp16-ep16", "h200", ""),
    ],
)  # fmt: skip
def test_where_they_run(kind: str, layout: str, device: str, says: str) -> None:
    assert broken_exchange(kind, parse_layout(layout), load_device(device)) == says


def test_a_wrong_device_is_one_line() -> None:
    with pytest.raises(tc.InputError, match="all2all mori_low_latency: AMD GPUs only"):
        simulated("mori_low_latency")


@pytest.mark.parametrize("engine", ["vllm", "vllm==0.24.0", "sglang", "sglang==0.5.14", "trtllm"])
def test_engines_have_them_as_their_launch_tables_say(engine: str) -> None:
    profile = load_engine(engine)
    for kind in EXCHANGE_KERNELS:
        options = Options(all2all=kind)
        said = engine_can_run(profile.name, WIDE, QWEN.stated_facts, options, lifted=profile.lifted_rules)
        older = (engine, kind) in (("sglang==0.5.14", "deepep_v2"), ("vllm==0.24.0", "moonep"))
        assert (said == "") == (kind in KERNELS_OF[profile.name] and not older)
        found = launch(engine, QWEN, WIDE, options, batch=8, input_len=100, output_len=10)
        assert (found.problem == "") == (said == "")


def test_flags() -> None:
    def command(engine: str, kind: str) -> str:
        found = launch(engine, QWEN, WIDE, Options(all2all=kind), batch=8, input_len=100, output_len=10)
        return found.commands[0].replace(" \\\n  ", " ").replace(" \\\n", " ")

    assert "--all2all-backend nixl_ep" in command("vllm", "nixl_ep")
    assert "--moe-a2a-backend nixl" in command("sglang", "nixl_ep")
    assert "--deepep-mode" not in command("sglang", "deepep_v2")
    assert "TRTLLM_FORCE_COMM_METHOD=NVLINK_ONE_SIDED" in command("trtllm", "flashinfer_nvlink_one_sided")
    cut = engine_can_run("sglang", parse_layout("tp2-dp4-ep8"), QWEN.stated_facts,
                         Options(all2all="flashinfer_nvlink_one_sided"))
    assert cut.startswith("exchange kernels: flashinfer_nvlink_one_sided runs with attention data-parallel")


def test_dual_batch_overlap_runs_with_nixl_under_vllm() -> None:
    facts, both = QWEN.stated_facts, Options(all2all="nixl_ep", dual_batch_overlap=True)
    assert engine_can_run("vllm", WIDE, facts, both) == ""
    assert engine_can_run("sglang", WIDE, facts, both).startswith("dual-batch overlap: ")


def layer_seconds(run: tc.Simulation) -> tuple[float, float]:
    """Of all exchanges, and of all experts, as if nothing ran beside them."""
    rows = run.records()
    moved = sum(r["seconds"] for r in rows if r["shape"] in ("dispatch", "combine"))
    experts = sum(r["seconds"] for r in rows if r["op"] == "grouped_matmul" and "experts" in r["module"])
    return moved, experts


@pytest.mark.parametrize("batch", [4, 64, 512])
def test_tokens_inside_the_experts_kernel_take_the_longer_of_both(batch: int) -> None:
    """As aiconfigurator-core 0.12.0 timed DeepGEMM's mega-MoE (benchmarks/mega_moe.py): a model without shared experts
    hides the shorter of exchange and experts, no more and nothing else."""
    more = {"engine": "vllm", "batch": batch, "allow_oversize": True}
    apart, inside = (simulated(kind, "gb200", **more) for kind in ("low_latency", "mega_moe"))
    moved, experts = layer_seconds(apart)
    assert layer_seconds(inside) == (moved, experts)
    saved = apart.step_s - inside.step_s
    assert saved > 0 and saved >= min(moved, experts) * 0.98  # rows around the products are experts', too
    assert saved <= min(moved, 1.2 * experts) * 1.02
    with pytest.raises(tc.InputError, match="here it is mega_moe"):
        simulated("mega_moe", "gb200", dual_batch_overlap=True, **more)


def test_moonep_spreads_rows_evenly_and_holds_every_expert() -> None:
    """vllm 0.33.0, prepare_finalize/moonep.py: rows [0, E) in global order and four slots more on every rank."""
    sizes = {"model": "qwen3-30b-a3b", "device": "h200", "world_size": 8, "dp": 8, "ep": 8, "batch": 32}
    runs = {kind: tc.simulate(all2all=kind, **sizes) for kind in ("moonep", "high_throughput")}  # type: ignore[arg-type]
    even = tc.simulate(all2all="high_throughput", routing="balanced", **sizes)  # type: ignore[arg-type]
    one_expert = 3 * 2048 * 768 * 2.0
    held = {kind: run.memory.weights for kind, run in runs.items()}
    assert held["moonep"] - held["high_throughput"] == pytest.approx(48 * (128 + 4 - 16) * one_expert, rel=1e-6)
    assert layer_seconds(runs["moonep"])[1] == pytest.approx(layer_seconds(even)[1], rel=1e-9)
    said = engine_can_run("vllm", WIDE, QWEN.stated_facts, Options(all2all="moonep", redundant_experts=8),
                          lifted=load_engine("vllm").lifted_rules)  # fmt: skip
    assert said == "exchange kernels: moonep copies experts itself: no redundant experts, placement linear"


@pytest.mark.parametrize(
    ("engine", "model", "device", "says"),
    [
        ("sglang", "deepseek-v4-pro", "b200", ""), ("sglang", "deepseek-v3", "h200", ""),
        ("sglang", "qwen3-235b-a22b", "b200", "experts that are neither in MXFP4 nor in NVFP4"),
        ("sglang==0.5.14", "deepseek-v3", "h200", "mega-MoE runs on compute capability 10"),
        ("vllm", "deepseek-v4-pro", "b200", ""), ("vllm", "kimi-k3", "b300", ""),
        ("vllm", "deepseek-v3", "b200", "models other than DeepSeek-V4"),
        ("vllm==0.24.0", "kimi-k3", "b300", "models other than DeepSeek-V4"),
        ("vllm", "deepseek-v4-flash", "h200", "mega-MoE runs on compute capability 10"),
    ],
)  # fmt: skip
def test_where_mega_moe_runs(engine: str, model: str, device: str, says: str) -> None:
    found = launch(engine, load_model(model), WIDE, Options(all2all="mega_moe"), batch=8, input_len=100, output_len=10,
                   device=load_device(device))  # fmt: skip
    assert (says in found.problem) if says else not found.problem
    name = engine.partition("==")[0]
    flag = {"sglang": "--moe-a2a-backend megamoe", "vllm": "--moe-backend deep_gemm_mega_moe"}[name]
    assert says or flag in found.commands[0]
