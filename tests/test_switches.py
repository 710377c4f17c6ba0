"""Switches of an engine's command: what is replayed from graphs, compiled, and how ranks add up."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pytest

import tensorcast as tc
from tensorcast.calibrate.engines.launches import launches
from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.layout import parse_layout
from tensorcast.deploy.options import Options
from tensorcast.errors import InputError
from tensorcast.launch.launch import Launch, launch
from tensorcast.predict.launch_records import POOLS
from tensorcast.predict.predict import predict
from tensorcast.profiles.store import load_device, load_engine, load_model

MODEL = load_model("qwen3-30b-a3b")


def made(engine: str = "vllm", phase: str = "decode", layout: str = "tp4", **options: Any) -> Deployment:
    return deploy(
        MODEL, load_device("h200"), load_engine(engine), parse_layout(layout), phase, options=Options(**options)
    )


def step_s(batch: float = 8, **asked: Any) -> float:
    return float(made(**asked).step.seconds(batch, 1, 2048))


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_the_less_is_replayed_the_longer_a_step_takes(engine: str) -> None:
    unasked = step_s(engine=engine)
    whole, pieces, none = (step_s(engine=engine, cuda_graphs=kind) for kind in ("full", "piecewise", "none"))
    assert whole == unasked
    assert whole <= pieces <= none
    assert whole < none


def test_pieces_cost_a_break_in_every_layer() -> None:
    """vllm#20059: 14 us a layer; every step of 48 layers."""
    more = step_s(cuda_graphs="piecewise") - step_s()
    assert more == pytest.approx(48 * 14e-6, rel=1e-6)
    assert step_s(engine="vllm==0.10.2") - step_s(engine="vllm==0.10.2", cuda_graphs="full") == pytest.approx(more)
    beyond = 700  # vLLM's graphs stop at 512 tokens: beyond them pieces are launched kernel by kernel
    assert step_s(beyond, cuda_graphs="piecewise") == pytest.approx(step_s(beyond, cuda_graphs="none"))


def test_what_the_compiler_makes_goes_without_it() -> None:
    def fusions(**options: Any) -> set[str]:
        return set(made(**options).step.pricer.engine.fusions)

    assert fusions(compiled=False) == {"merged_gemm", "pointwise"}
    assert step_s(compiled=False) > step_s()
    assert made(phase="prefill", compiled=False).step.pricer.graph_tokens == 0.0  # no pieces of prompts' steps
    assert made(phase="prefill").step.pricer.graph_tokens == 512
    # SGLang compiles nothing unasked: nothing changes
    assert fusions(engine="sglang", compiled=False) == fusions(engine="sglang")


def joined(**options: Any) -> int:
    """Norms that run in an all-reduce's kernel."""
    return sum("joined_tokens" in getattr(row, "attrs", {}) for row in made(**options).step.plan.rows)


def test_all_reduces_take_norms_along_where_asked() -> None:
    assert joined(allreduce_fusion="off") == 0 < joined() == joined(allreduce_fusion="on")
    assert step_s(allreduce_fusion="off") > step_s()
    old = "vllm==0.12.0"  # off unless asked for until 0.17.0
    assert joined(engine=old) == 0 < joined(engine=old, allreduce_fusion="on")
    assert joined(engine="sglang==0.5.6.post2") == 0 < joined(engine="sglang==0.5.6.post2", allreduce_fusion="on")


@pytest.mark.parametrize("device, quicker", [("h200", True), ("l20", False)])
def test_nccl_in_the_place_of_the_engines_own_kernels(device: str, quicker: bool) -> None:
    """A small all-reduce over NVLink is quicker in the engine's own kernel; datasheet links have no rings' start."""

    def all_reduces(**options: Any) -> tuple[float, set[str]]:
        found = deploy(
            MODEL, load_device(device), load_engine("sglang==0.5.6.post2"), parse_layout("tp4"), "decode",
            options=Options(**options),
        ).step.price(8, 1, 2048)  # fmt: skip
        rows = [row for part in found.parts for row in part.prices if row.family == "all_reduce"]
        return sum(float(row.seconds) for row in rows), {row.detail.split()[-1] for row in rows}

    (own, used), (nccl, instead) = all_reduces(), all_reduces(custom_all_reduce=False)
    assert not instead & {"one_shot", "two_shot"}
    assert own < nccl if quicker else own <= nccl
    assert used


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_a_share_of_memory_is_the_engines_own(engine: str) -> None:
    """vLLM's share holds everything, SGLang's weights and cache, TensorRT-LLM's is of what is left for the cache."""
    capacity = float(load_device("h200").memory_bytes)
    small, large = (made(engine, memory_fraction=share).memory(8, 1, 2048) for share in (0.6, 0.8))
    if engine == "trtllm":
        assert large.cache_budget == pytest.approx(small.cache_budget * 0.8 / 0.6)
    else:
        free = capacity - (float(made(engine).context_bytes) if engine == "sglang" else 0.0)  # before it starts
        assert large.cache_budget - small.cache_budget == pytest.approx(0.2 * free)
        assert engine == "vllm" or small.cache_budget + small.weights == pytest.approx(0.6 * free)
    assert "0.6" in command(engine, memory_fraction=0.6)
    with pytest.raises(InputError, match=r"--memory-fraction 1\.2: must be a share"):
        made(engine, memory_fraction=1.2)


def test_what_is_no_choice_is_named() -> None:
    for option, value in (("cuda_graphs", "some"), ("allreduce_fusion", "maybe")):
        with pytest.raises(InputError, match=f"--{option.replace('_', '-')} '{value}': must be"):
            made(**{option: value})
    with pytest.raises(InputError, match="graphs in pieces"):
        raise InputError(started("trtllm", cuda_graphs="piecewise").problem)


def started(engine: str, **options: Any) -> Launch:
    return launch(engine, MODEL, parse_layout("tp4"), Options(**options), batch=64, input_len=2048, output_len=512)


def command(engine: str, **options: Any) -> str:
    found = started(engine, **options)
    return "\n".join([*found.commands, *found.config_files.values()])


def test_commands_set_the_switches() -> None:
    said = command("vllm", cuda_graphs="piecewise", allreduce_fusion="off")
    assert json.loads(said.split("--compilation-config '")[1].split("'")[0]) == {
        "cudagraph_mode": "PIECEWISE", "pass_config": {"fuse_allreduce_rms": False},
    }  # fmt: skip
    eager = command("vllm", cuda_graphs="none", compiled=False, custom_all_reduce=False)
    assert "--enforce-eager" in eager and "--disable-custom-all-reduce" in eager and "--compilation" not in eager
    said = command("sglang", cuda_graphs="none", custom_all_reduce=False, allreduce_fusion="on")
    for words in ("--cuda-graph-backend-decode disabled", "--disable-custom-all-reduce",
                  "--flashinfer-allreduce-fusion-backend auto"):  # fmt: skip
        assert words in said
    assert "--cuda-graph-max-bs-decode 64" in said  # memory is set aside by it under attention DP, captured or not
    said = command("trtllm", cuda_graphs="none", custom_all_reduce=False)
    assert "cuda_graph_config: null" in said and "allreduce_strategy: NCCL" in said


ROW = {"model": "qwen3-30b-a3b", "device": "h200", "engine": "vllm", "tp": 4, "isl": 1024, "osl": 256,
       "concurrency": 16}  # fmt: skip


def test_rows_of_tables_say_them() -> None:
    asked = [{}, {"cuda_graphs": "off"}, {"custom_all_reduce": "off"}, {"compiled": "off"}, {"compiled": "perhaps"}]
    found = predict(pd.DataFrame([{**ROW, **one} for one in asked]))
    first = found["tpot_s"][0]
    assert (found["tpot_s"][1:4] > first).all()
    assert found["problem"][4] == "compiled 'perhaps': must be on or off"
    simulated = tc.simulate(
        "qwen3-30b-a3b", device="h200", world_size=4, tp=4, engine="vllm", phase="decode", batch=8, context=2048,
        cuda_graphs="none",
    )  # fmt: skip
    assert simulated.step_s == pytest.approx(step_s(cuda_graphs="none"))


def test_scripts_of_public_records_are_read() -> None:
    """InferenceX, gpt-oss-120b: PIECEWISE on H100 under 0.11.0, norms joined on B200 under 0.13.0."""
    base = {"engine": "vllm", "serving_model": "openai/gpt-oss-120b", "hf_model": "", "device": "h100",
            "precision": "fp4", "mode": "agg", "role": "agg", "isl": 1024, "osl": 1024, "concurrency": 4, "tp": 4,
            "ep": 1, "dp_attn": 0, "max_num_tokens": 8192, "kv_cache_dtype": "", "other_options": "", "spec_depth": 0,
            "sched_recv_interval": None, "all2all_backend": None, **dict.fromkeys(POOLS)}  # fmt: skip
    table = pd.DataFrame([
        {**base, "engine_release": "0.11.0", "compilation_config": '{"cudagraph_mode":"PIECEWISE"}'},
        {**base, "engine_release": "0.13.0",
         "compilation_config": '{"pass_config":{"fuse_allreduce_rms":true,"eliminate_noops":true}}'},
        {**base, "engine_release": "0.18.0", "compilation_config": None},
        {**base, "engine": "sglang", "engine_release": "0.5.9", "allreduce_fusion": "True", "disable_cuda_graph": True},
    ])  # fmt: skip
    found = launches(table)
    said = dict(zip(found["release"], zip(found["cuda_graphs"], found["allreduce_fusion"], strict=True), strict=True))
    assert said == {"0.11.0": ("piecewise", ""), "0.13.0": ("", "on"), "0.18.0": ("", ""), "0.5.9": ("off", "on")}


def test_an_engine_is_asked_for_whose_experts_kernels_run() -> None:
    """B200, vLLM 0.17.0, MiniMax-M2.5 in FP8 blocks: DeepGEMM's unasked, Triton's with both others switched off."""
    def step(engine: str, **options: Any) -> float:
        return float(deploy(
            load_model("minimax-m2.5"), load_device("b200"), load_engine(engine), parse_layout("tp4"), "decode",
            options=Options(**options),
        ).step.seconds(8, 1, 2048))  # fmt: skip

    unasked, triton, same = (
        step("vllm==0.17.0"), step("vllm==0.17.0", experts_kernels="triton"),
        step("vllm==0.17.0", experts_kernels="deepgemm"),
    )
    assert same == unasked and triton < 0.95 * unasked
    assert step("vllm==0.24.0", experts_kernels="trtllm") == step("vllm==0.24.0") < triton
    assert step("trtllm", experts_kernels="trtllm") == step("trtllm") != step("trtllm", experts_kernels="deepgemm")
    with pytest.raises(InputError, match="--experts-kernels 'trition': must be engine or triton or cutlass"):
        step("vllm", experts_kernels="trition")
    flags = {"vllm": "--moe-backend triton", "sglang": "--moe-runner-backend triton", "trtllm": "backend: TRITON"}
    assert all(words in command(engine, experts_kernels="triton") for engine, words in flags.items())
    gpt_oss = launch("sglang", load_model("gpt-oss-120b"), parse_layout("tp4"), Options(experts_kernels="triton"),
                     batch=64, input_len=2048, output_len=512)  # fmt: skip
    assert "--moe-runner-backend triton_kernel" in "\n".join(gpt_oss.commands)


def test_scripts_say_whose_experts_kernels_run() -> None:
    """InferenceX: minimaxm2.5_fp8_b200.sh takes FlashInfer's and DeepGEMM's away, gptoss_fp4_h200.sh asks for Marlin's,
    its SGLang and TensorRT-LLM scripts name a backend."""
    base = {"engine": "vllm", "serving_model": "openai/gpt-oss-120b", "hf_model": "", "device": "h200",
            "precision": "fp4", "mode": "agg", "role": "agg", "isl": 1024, "osl": 1024, "concurrency": 4, "tp": 4,
            "ep": 1, "dp_attn": 0, "max_num_tokens": 8192, "kv_cache_dtype": "", "other_options": "", "spec_depth": 0,
            "sched_recv_interval": None, "all2all_backend": None, "env_switches": None, "moe_backend": None,
            **dict.fromkeys(POOLS)}  # fmt: skip
    found = launches(pd.DataFrame([
        {**base, "engine_release": "0.13.0", "env_switches": "TORCH_CUDA_ARCH_LIST=9.0;VLLM_MXFP4_USE_MARLIN=1"},
        {**base, "engine_release": "0.17.0", "precision": "fp8",
         "env_switches": "VLLM_MOE_USE_DEEP_GEMM=0;VLLM_USE_FLASHINFER_MOE_FP8=0"},
        {**base, "engine_release": "0.18.0", "precision": "fp8", "env_switches": "VLLM_MOE_USE_DEEP_GEMM=0"},
        {**base, "engine": "sglang", "engine_release": "0.5.9", "moe_backend": "flashinfer_trtllm"},
        {**base, "engine": "trtllm", "engine_release": "1.1.0", "moe_backend": "DEEPGEMM"},
        {**base, "engine": "trtllm", "engine_release": "1.2.0", "moe_backend": "CUTEDSL"},
    ]))  # fmt: skip
    assert dict(zip(found["release"], found["experts_kernels"], strict=True)) == {
        "0.13.0": "marlin", "0.17.0": "triton", "0.18.0": "", "0.5.9": "trtllm", "1.1.0": "deepgemm", "1.2.0": "",
    }  # fmt: skip
    pools = {**base, "engine": "trtllm", "mode": "disagg", **dict.fromkeys(POOLS, 1)}
    found = launches(pd.DataFrame([
        {**pools, "engine_release": release, "role": role, "moe_backend": backend}
        for release, backends in (("1.1.0", ("CUTLASS", "TRTLLM")), ("1.3.0", ("TRTLLM", "TRTLLM")))
        for role, backend in zip(("prefill", "decode"), backends, strict=True)
    ]))  # fmt: skip
    assert dict(zip(found["release"], found["experts_kernels"], strict=True)) == {"1.1.0": "", "1.3.0": "trtllm"}


def test_own_all_reduces_stop_at_a_hosts_gpus() -> None:
    """GB200's domain joins trays of four: beyond these NCCL adds up, 28 us instead of 6 for 229 kB, but where a norm is
    joined (vLLM from 0.19.0, SGLang from 0.5.14) or TensorRT-LLM's kernels write to all (MNNVL)."""

    def share(engine: str, tp: int, device: str = "gb200", model: str = "qwen3-235b-a22b", **options: Any) -> float:
        made = deploy(load_model(model), load_device(device), load_engine(engine), parse_layout(f"tp{tp}"), "decode",
                      options=Options(**options))  # fmt: skip
        return sum(float(one.seconds) for one in made.step.price(16, 1, 2048).rows if one.family == "all_reduce")

    for engine in ("vllm", "vllm==0.19.0", "sglang==0.5.14", "trtllm"):
        assert share(engine, 8) < 2 * share(engine, 4), engine
    for engine in ("vllm==0.18.0", "vllm==0.12.0", "sglang==0.5.9"):
        assert share(engine, 8) > 3 * share(engine, 4), engine
        assert share(engine, 8, "b200") < 2 * share(engine, 4, "b200"), engine
        assert share(engine, 8) == pytest.approx(share(engine, 8, custom_all_reduce=False)), engine
    assert share("sglang", 8, model="llama-3.1-70b") > 3 * share("sglang", 4, model="llama-3.1-70b")  # joins none of it
    assert share("vllm", 8, allreduce_fusion="off") > 3 * share("vllm", 8)


@pytest.mark.parametrize(("model", "device", "engine", "asked", "flag"), [
    ("qwen3-8b", "b200", "sglang", {"attention_kernels": "triton"}, "--attention-backend triton"),
    ("qwen3-235b-a22b-fp8", "h100", "vllm", {"experts_kernels": "cutlass"}, "--moe-backend flashinfer_cutlass"),
])
def test_a_comparison_prices_and_launches_the_kernels_that_are_asked_for(
    model: str, device: str, engine: str, asked: dict[str, Any], flag: str
) -> None:
    """Steps of the best take what simulate says, no shorter than unasked (those were chosen for their speed)."""
    question: dict[str, Any] = {
        "device": device, "world_size": 4, "engine": engine, "layouts": ["tp4"], "modes": ["aggregated"],
        "input_len": 1000, "output_len": 200,
    }  # fmt: skip
    found, unasked = tc.compare(model, **question, **asked), tc.compare(model, **question)
    assert found.best and unasked.best
    assert found.best["tokens_per_s_per_gpu"] < unasked.best["tokens_per_s_per_gpu"]
    _, decode = found.deployments(found.best["candidate"])
    alone = tc.simulate(
        model, device=device, engine=engine, world_size=4, tp=4, batch=8, context=1000, routing=decode.options.routing,
        **asked,
    )  # fmt: skip
    assert float(decode.step.seconds(8, 1, 1000)) == pytest.approx(alone.step_s, rel=1e-9)
    layout = parse_layout("tp4")
    server = launch(engine, load_model(model), layout, decode.options, batch=8, input_len=1000, output_len=200)
    assert flag in "\n".join(server.commands)


def test_a_comparison_says_where_kernels_are_asked_for_in_vain() -> None:
    question: dict[str, Any] = {"device": "b200", "world_size": 2, "layouts": ["tp2"], "modes": ["aggregated"]}
    for kernels, idle in (("flashinfer", True), ("triton", False)):
        notes = tc.compare("qwen3-8b", input_len=500, output_len=100, attention_kernels=kernels, **question).notes
        assert any(note.startswith("no effect on the best: --attention-kernels") for note in notes) is idle
    with pytest.raises(InputError, match="has no experts: experts_kernels"):
        tc.compare("qwen3-8b", input_len=500, output_len=100, experts_kernels="triton", **question)
