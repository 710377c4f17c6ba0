"""What cannot be launched: limits of the engines, of their buffers, of the model and of memory, each in one line."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

import tensorcast as tc
from tensorcast.cli import app
from tensorcast.deploy.engine_limits import Kernels, engine_can_run
from tensorcast.deploy.layout import Layout, parse_layout
from tensorcast.deploy.options import Options
from tensorcast.errors import InputError
from tensorcast.launch.launch import launch
from tensorcast.profiles.config_values import text_of
from tensorcast.profiles.facts import ModelFacts
from tensorcast.profiles.store import list_models, load_device, load_engine, load_model
from tensorcast.trace.cache import whole_model

ENGINES = ("vllm", "sglang", "trtllm")
DEEPSEEK, QWEN, LLAMA = load_model("deepseek-v3"), load_model("qwen3-235b-a22b"), load_model("llama-3.1-70b")
MOE = ModelFacts(num_experts=256, mtp_modules=1)


@pytest.mark.parametrize(
    ("engine", "layout", "options", "rule"),
    [
        ("vllm", "tp8-dp4-ep16", Options(), "whole experts or all cut"),
        ("vllm", "tp8-ep4", Options(), "whole experts or all cut"),
        ("vllm", "dp8-ep8", Options(all2all="direct"), "plain all-to-all"),
        ("vllm", "dp8-ep8", Options(dual_batch_overlap=True), "dual-batch overlap"),
        ("vllm", "tp8", Options(redundant_experts=8), "balanced experts"),
        ("vllm", "dp8-ep8", Options(redundant_experts=3), "balanced experts"),
        ("vllm", "dp8-ep8", Options(external_shared_experts=2), "external shared experts"),
        ("vllm", "tp12", Options(), "whole nodes"),
        ("vllm", "tp3-dp8", Options(), "data-parallel ranks on nodes"),
        ("sglang", "dp16-ep8", Options(all2all="low_latency"), "all-to-all over all ranks"),
        ("sglang", "tp8-ep8", Options(dual_batch_overlap=True), "dual-batch overlap"),
        ("sglang==0.5.14", "tp8-pp2", Options(mtp_depth=1), "drafts in a pipeline"),
        ("trtllm", "tp8-dp4-ep32", Options(), "attention over all ranks"),
        ("trtllm", "dp16-ep8", Options(all2all="high_throughput"), "all-to-all with whole experts"),
        ("trtllm", "dp8-ep8", Options(dual_batch_overlap=True), "dual-batch overlap"),
    ],
)
def test_refused_with_the_rule_that_is_broken(engine: str, layout: str, options: Options, rule: str) -> None:
    problem = engine_can_run(engine.partition("==")[0], parse_layout(layout), MOE, options)
    assert problem.startswith(f"{rule}: ") and "\n" not in problem
    found = launch(engine, DEEPSEEK, parse_layout(layout), options, batch=8, input_len=100, output_len=10)
    assert found.problem == problem and found.commands == () and found.flags == ()


def test_drafts_pass_a_pipeline_since_sglang_0_5_23() -> None:
    """arg_groups/validation_hook.py, check_pipeline_parallel_compat."""
    drafting, layout = Options(mtp_depth=1), parse_layout("tp8-pp2")
    sizes: Any = {"batch": 8, "input_len": 100, "output_len": 10}
    found = launch("sglang", DEEPSEEK, layout, drafting, **sizes)
    assert found.problem == "" and all(text.startswith("SGLANG_ENABLE_PP_SPEC=1 ") for text in found.commands)
    assert "PP_SPEC" not in launch("sglang", DEEPSEEK, layout, drafting, role="prefill", **sizes).commands[0]
    assert "servers of prompts" in launch("sglang", DEEPSEEK, layout, drafting, role="decode", **sizes).problem
    spread = launch("sglang", DEEPSEEK, parse_layout("dp8-ep8-pp2"), drafting, **sizes)
    assert "nothing drafts in a pipeline under attention DP" in spread.problem


def test_one_server_one_exchange() -> None:
    """vLLM and TensorRT-LLM choose it at start, for both phases; SGLang's DeepEP has a mode for each."""
    layout = parse_layout("dp8-ep8")
    decode, prefill = (Options(all2all=kind) for kind in ("low_latency", "high_throughput"))
    for engine in ENGINES:
        assert engine_can_run(engine, layout, MOE, decode, prefill=decode) == ""
        problem = engine_can_run(engine, layout, MOE, decode, prefill=prefill)
        assert problem.startswith("one exchange: a server has one") if engine != "sglang" else problem == ""
    whole = parse_layout("tp8-ep8")  # nothing to exchange
    assert engine_can_run("vllm", whole, MOE, decode, prefill=prefill) == ""


def test_the_same_layouts_run_elsewhere() -> None:
    """Experts half spread, half cut: not in vLLM, but in SGLang (tokens gathered) and TensorRT-LLM."""
    assert engine_can_run("sglang", parse_layout("tp8-ep4"), MOE) == ""
    assert engine_can_run("sglang", parse_layout("dp16-ep8"), MOE) == ""
    assert engine_can_run("trtllm", parse_layout("dp16-ep8"), MOE) == ""
    assert engine_can_run("eager", parse_layout("tp8-dp2-ep4"), MOE) == ""  # no rules known


@pytest.mark.parametrize("engine", ENGINES)
def test_models_limit_options(engine: str) -> None:
    drafts = launch(engine, QWEN, Layout(8, 8), Options(mtp_depth=1), batch=8, input_len=100, output_len=10)
    assert drafts.problem.startswith("draft layers: ")
    long = launch(engine, QWEN, Layout(8, 8), batch=8, input_len=40000, output_len=1000)
    assert long.problem.startswith("context length: 41000 tokens, but qwen3-235b-a22b has 40960 positions")
    fp4 = launch(engine, DEEPSEEK, Layout(8, 8), Options(quant="nvfp4"), batch=8, input_len=100, output_len=10)
    assert fp4.problem.startswith("quantisation: the checkpoint is linear=fp8_block, experts=fp8_block; ")
    fp8 = launch(engine, QWEN, Layout(8, 8), Options(quant="fp8"), batch=8, input_len=100, output_len=10)
    assert (fp8.problem == "") == (engine != "trtllm")


def test_drafts_are_as_deep_as_engines_ever_go() -> None:
    """One layer is run again for more drafts; none of the engines tries more than seven by itself."""
    for engine in ENGINES:
        for depth, drafts in ((7, True), (8, False), (99, False)):
            found = launch(engine, DEEPSEEK, Layout(8, 8), Options(mtp_depth=depth), batch=8, input_len=9, output_len=9)
            assert (found.problem == "") == drafts
    assert found.problem.startswith("draft layers: 99 drafted tokens from 1 multi-token-prediction layer")


@pytest.mark.parametrize(("given", "tokens"), [({"chunk_tokens": 2048}, 2048), ({"batch": 1200}, 1200)])
def test_low_latency_buffers_are_small(given: dict[str, Any], tokens: int) -> None:
    sizes = {"batch": 64, "input_len": 4096, "output_len": 1024, "device": load_device("h200"), **given}
    found = launch("sglang", DEEPSEEK, parse_layout("dp8-ep8"), Options(all2all="low_latency"), **sizes)
    assert found.problem == (
        f"low-latency buffers: {tokens} tokens per rank and step, and they hold 1024 at most"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("qwen3-30b-a3b", "-d", "h100", "-l", "tp1", "-b", "4"), ""),
        (("qwen3-30b-a3b", "-d", "h100", "-l", "tp1", "-b", "4000"), "of 4000 sequences per data-parallel rank at"),
        (("llama-3.1-70b", "-d", "h100", "-l", "tp1"), "error: tp1-dp1 does not fit on h100-sxm: 141.1 GB of weights"),
    ],
)
def test_memory_is_looked_at(arguments: tuple[str, ...], said: str) -> None:
    """Too many sequences wait for each other, which is said; where not one fits there is nothing to launch."""
    result = CliRunner().invoke(app, ["launch", *arguments], env={"COLUMNS": "100", "NO_COLOR": "1"})
    assert result.exit_code == (2 if said.startswith("error") else 0)
    assert said in (result.stderr if result.exit_code else result.stdout) and result.stderr.count("\n") <= 1
    assert ("memory holds" in result.stdout) == ("sequences" in said)


def test_dense_replicas() -> None:
    """Without experts data-parallel ranks are copies: SGLang deals them out on one node, TensorRT-LLM not at all."""
    found = launch("sglang", LLAMA, parse_layout("tp2-dp4"), batch=8, input_len=100, output_len=10)
    assert "--tp-size 2 " in found.commands[0] and "--enable-dp-attention" not in found.commands[0]
    facts = LLAMA.stated_facts
    assert engine_can_run("sglang", parse_layout("tp8-dp2"), facts).startswith("dense replicas on one node: ")
    assert engine_can_run("trtllm", parse_layout("tp2-dp4"), facts) == (
        "dense replicas: a dense model has no dp: start 4 engines of tp2"
    )


def test_facts_of_every_model() -> None:
    """Experts read from the config alone: none for the dense models, a number for all others."""
    for name in list_models():
        profile = load_model(name)
        facts, dense = profile.stated_facts, profile.active_params is None
        assert (facts.num_experts == 0) == dense and facts.heads > 0 and facts.layers > 0, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "vlm"}, "unknown engine 'vlm': did you mean vllm"),
        ({"engine": "eager"}, "unknown engine to launch 'eager': known: sglang, trtllm, vllm"),
        ({"batch": 0}, "batch = 0 must be at least 1"),
        ({"role": "both"}, "role 'both': choose prefill, decode or none"),
        ({"options": Options(kv_dtype="fp4")}, "unknown --kv-dtype 'fp4': did you mean fp8?"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "engine": "vllm", "model_profile": QWEN, "layout": Layout(8, 8), "batch": 1, "input_len": 10, "output_len": 10,
    }  # fmt: skip
    with pytest.raises(InputError) as raised:
        launch(**{**arguments, **change})
    assert str(raised.value).startswith(message)


# Generations of devices: compute capabilities as NVIDIA lists them, and what the engines' sources say of them

CAPABILITY = {"v100": 7.0, "a100": 8.0, "rtx-3090": 8.6, "l40s": 8.9, "rtx-4090": 8.9, "h100": 9.0, "h20": 9.0,
              "b200": 10.0, "gb300": 10.3, "rtx-pro-6000": 12.0}  # fmt: skip


def _on(device: str, model: str, engine: str, quant: str | None = None, **options: Any) -> str:
    profile, running = load_model(model), load_engine(engine)
    whole, name = whole_model(profile, "decode", quant), load_device(device).architecture
    kernels = Kernels(running.lacking, name, profile.config, whole)
    layout = parse_layout("dp8-ep8" if "all2all" in options else "tp1")
    return engine_can_run(
        running.name, layout, whole.facts, Options(quant=quant, **options), cuts=whole.cuts, kernels=kernels
    )


@pytest.mark.parametrize("engine", [*ENGINES, "vllm==0.24.0", "sglang==0.5.14", "eager"])
def test_chosen_latents_are_attended_over_from_hopper_on(engine: str) -> None:
    """vLLM's sparse backends name capabilities 9, 10 and 12; MiniMax-M3's blocks have kernels in Triton; `eager` has no
    kernels of its own. Models by the key that sets how many entries are chosen."""
    chosen = {name for name in list_models() if "index_topk" in text_of(load_model(name).config)}
    assert chosen == {
        "deepseek-v3.2", "deepseek-v4-flash", "deepseek-v4-pro", "deepseek-v4.1-flash", "glm-5", "glm-5.2",
    }
    for device, capability in CAPABILITY.items():
        for model in (*chosen, "minimax-m3", "llama-3.1-8b"):
            if "==" in engine and model == "deepseek-v4.1-flash":  # of a class that these have not
                continue
            said = _on(device, model, engine)
            if engine != "eager" and not (capability < 8 and engine != "vllm"):
                assert ("sparse attention kernels" in said) == (model in chosen and capability < 9), (device, model)
    assert said == ""


@pytest.mark.parametrize(
    ("engine", "device", "model", "options", "rule"),
    [
        # v1/attention/backends/mla/triton_mla.py, triton_attn.py: fp8e4nv requires SM89
        ("vllm", "a100", "deepseek-v2-lite", {"kv_dtype": "fp8"}, "cache kernels"),
        ("vllm", "l40s", "deepseek-v2-lite", {"kv_dtype": "fp8"}, ""),
        ("vllm", "a100", "gpt-oss-20b", {"kv_dtype": "fp8"}, "cache kernels"),
        ("vllm", "a100", "gpt-oss-20b", {}, ""),
        ("vllm", "a100", "llama-3.1-8b", {"kv_dtype": "fp8"}, ""),  # by FlashInfer
        ("vllm", "v100", "llama-3.1-8b", {"kv_dtype": "fp8"}, "cache kernels"),
        ("sglang", "rtx-3090", "deepseek-v2-lite", {"kv_dtype": "fp8"}, "cache kernels"),
        # Marlin in vLLM; in SGLang for what is no expert (sglang#5871: Qwen3-30B-A3B-FP8 on an A10)
        ("vllm", "a100", "qwen3-30b-a3b-fp8", {}, ""),
        ("sglang", "a100", "qwen3-30b-a3b-fp8", {}, "precisions of the device"),
        ("sglang", "l40s", "qwen3-30b-a3b-fp8", {}, ""),
        ("sglang", "a100", "qwen3-32b-fp8", {}, ""),
        # fp8.py, get_min_capability
        ("sglang", "h100", "qwen3-32b", {"quant": "mxfp8"}, "precisions of the device"),
        ("sglang", "b200", "qwen3-32b", {"quant": "mxfp8"}, ""),
        ("sglang", "mi355x", "qwen3-30b-a3b", {"quant": "experts=nvfp4"}, "precisions of the device"),
        ("sglang", "h100", "qwen3-30b-a3b", {"quant": "experts=nvfp4"}, ""),
        ("sglang", "l40s", "qwen3-30b-a3b", {"quant": "experts=w4a8"}, "precisions of the device"),
        # hardware support matrix of features/quantization
        ("trtllm", "l40s", "qwen3-32b-fp8", {}, "precisions of the device"),
        ("trtllm", "l40s", "qwen3-32b", {"quant": "fp8"}, ""),
        ("trtllm", "a100", "qwen3-32b", {"quant": "fp8"}, "precisions of the device"),
        ("trtllm", "h100", "qwen3-32b", {"quant": "nvfp4"}, "precisions of the device"),
        ("vllm", "h100", "qwen3-32b", {"quant": "nvfp4"}, ""),
        ("vllm", "v100", "qwen3-32b-fp8", {}, "precisions of the device"),
        ("trtllm", "mi300x", "qwen3-32b", {}, "devices of the engine"),
        ("sglang", "v100", "qwen3-32b", {}, "devices of the engine"),
        ("vllm", "v100", "qwen3-32b", {}, ""),
        # DeepEP, setup.py
        ("vllm", "a100", "qwen3-30b-a3b", {"all2all": "low_latency"}, "DeepEP's devices"),
        ("vllm", "a100", "qwen3-30b-a3b", {"all2all": "high_throughput"}, ""),
        ("vllm", "l40s", "qwen3-30b-a3b", {"all2all": "high_throughput"}, "DeepEP's devices"),
        ("sglang", "rtx-pro-6000", "qwen3-30b-a3b", {"all2all": "low_latency"}, "DeepEP's devices"),
        ("sglang", "b200", "qwen3-30b-a3b", {"all2all": "low_latency"}, ""),
        ("sglang", "l40s", "qwen3-30b-a3b", {"all2all": "allgather_reducescatter"}, ""),
    ],
)
def test_kernels_by_generation(engine: str, device: str, model: str, options: dict[str, Any], rule: str) -> None:
    said = _on(device, model, engine, **options)
    assert said.startswith(f"{rule}: ") and said.count("; ") == 1 and "not on " in said if rule else said == ""


def test_what_no_kernel_does_has_no_price() -> None:
    """In simulate, compare and launch alike, with the way out."""
    way = "choose such a device; engine eager prices the arithmetic all the same"
    with pytest.raises(InputError, match=f"sparse attention kernels: .* not on Ampere; {way}"):
        tc.simulate("deepseek-v3.2", device="a100", world_size=16)
    with pytest.raises(InputError, match=f"no layout is left .*: vllm 0.33.0 cannot run it: sparse .*; {way}$"):
        tc.compare("glm-5", device="a100", world_size=16, input_len=1000, output_len=100)
    found = launch("vllm", load_model("glm-5"), parse_layout("tp16"), batch=8, input_len=9, output_len=9,
                   device=load_device("a100"))  # fmt: skip
    assert found.problem.startswith("sparse attention kernels: ") and found.problem.endswith("all the same")
    assert tc.simulate("deepseek-v3.2", device="a100", world_size=16, engine="eager").step_s > 0


def test_unasked_tokens_are_gathered_where_deepep_has_no_kernels() -> None:
    """SGLang's profile takes DeepEP where it runs; on Ada and Ampere its servers gather, in price and command alike."""
    for device, exchange, flag in (("l40s", "allgather_reducescatter", "none"), ("h100", "low_latency", "deepep")):
        found = tc.simulate("qwen3-30b-a3b", device=device, world_size=8, tp=1, dp=8, ep=8, engine="sglang")
        assert found.totals()["all2all"] == exchange
        command = launch("sglang", load_model("qwen3-30b-a3b"), parse_layout("dp8-ep8"), batch=8, input_len=100,
                         output_len=10, device=load_device(device)).commands[0]  # fmt: skip
        assert f"--moe-a2a-backend {flag} " in command


HALVED = Options(all2all="low_latency", dual_batch_overlap=True)


@pytest.mark.parametrize(
    ("release", "model", "layout", "options", "says"),
    [
        ("0.5.23", "glm-5.2", "dp8-ep8", Options(all2all="low_latency", dual_batch_overlap=True), "indexer chose"),
        ("0.5.23", "glm-5", "dp8-ep8", Options(all2all="low_latency", dual_batch_overlap=True), ""),
        ("0.5.23", "deepseek-v4-flash", "tp8", Options(mtp_depth=2, speculative_method="eagle3"), "DeepSeek-V4 drafts"),
        ("0.5.23", "deepseek-v4-flash", "tp8", Options(mtp_depth=2, speculative_method="dspark"), ""),
        ("0.5.14", "deepseek-v4-flash", "tp8", Options(mtp_depth=1), ""),
        ("0.5.23", "glm-5", "tp8", Options(mtp_depth=2, speculative_method="ngram"), "pages of 64"),
        ("0.5.23", "minimax-m3", "tp8", Options(mtp_depth=2, speculative_method="ngram"), "pages of 128"),
        ("0.5.23", "deepseek-v3", "tp8", Options(mtp_depth=2, speculative_method="ngram"), ""),
        ("0.5.23", "gpt-oss-120b", "dp8-ep8", Options(all2all="deepep_v2"), "not let run this model's class"),
        ("0.5.23", "deepseek-v3", "dp8-ep8", Options(all2all="deepep_v2"), ""),
        ("0.5.23", "qwen2.5-72b", "tp8", Options(quant="nvfp4"), "makes nvfp4 on blackwell alone"),
        ("0.5.14", "qwen2.5-72b", "tp8", Options(quant="fp8"), ""),
        ("0.5.23", "glm-4.5", "dp8-ep8", HALVED, "no stages of this model's layers"),
        ("0.5.14", "minimax-m2.5", "dp8-ep8", HALVED, "no stages of this model's layers"),
        ("0.5.23", "qwen3-235b-a22b", "dp8-ep8", HALVED, ""),
        ("0.5.14", "mimo-v2-flash", "dp8-ep8", HALVED, ""),
        ("0.5.23", "deepseek-v4-flash", "dp8-ep8", HALVED, ""),
        ("0.5.14", "deepseek-v4-flash", "dp8-ep8", HALVED, "no stages of this model's layers"),
        ("0.5.23", "deepseek-v4-flash", "dp8-ep8-pp2", HALVED, "no pipeline stages"),
    ],
)
def test_what_sglang_refuses_after_parsing(
    release: str, model: str, layout: str, options: Options, says: str
) -> None:
    """Found by running its resolution of arguments (run_resolution_pipeline) on every printed command: 0.5.23,
    arg_groups/model_hook.py, deepseek_v4_hook.py, speculative_hook.py, moe_hook.py, overrides.py; of halved steps
    batch_overlap/operations_strategy.py of each release (init_new_tbo)."""
    found = launch(f"sglang=={release}", load_model(model), parse_layout(layout), options, batch=16, input_len=1000,
                   output_len=100, device=load_device("h200"))  # fmt: skip
    assert (says in found.problem) if says else not found.problem
    if options.mtp_depth and options.speculative_method == "mtp":
        assert "--speculative-algorithm EAGLE" in found.commands[0]  # NEXTN is refused for DeepSeek-V4


def test_deepseek_v4_halves_prompts_alone() -> None:
    """SGLang 0.5.23, models/deepseek_v4.py (_can_run_tbo): decode steps stay whole; DeepSeek-V3's do not."""
    def step_s(model: str, phase: str, exchange: str, halved: bool) -> float:
        sizes: Any = {"batch": 128, "context": 1000} if phase == "decode" else {"batch": 4, "input_len": 4096}
        return tc.simulate(
            model, device="h200", world_size=16, tp=1, dp=16, ep=16, engine="sglang", phase=phase, all2all=exchange,
            dual_batch_overlap=halved, allow_oversize=True, **sizes,
        ).step_s  # fmt: skip

    for model, phase, exchange, same in (
        ("deepseek-v4-flash", "decode", "low_latency", True),
        ("deepseek-v4-flash", "prefill", "high_throughput", False),
        ("deepseek-v3", "decode", "low_latency", False),
    ):
        whole, halved = (step_s(model, phase, exchange, one) for one in (False, True))
        assert (whole == halved) == same, (model, phase)


@pytest.mark.parametrize(
    ("engine", "model", "options", "says"),
    [
        ("vllm==0.24.0", "deepseek-v3", Options(mtp_depth=1), "own layers do not draft in a pipeline"),
        ("vllm==0.24.0", "nemotron-3-super-120b-a12b", Options(mtp_depth=1), ""),
        ("vllm==0.24.0", "deepseek-v3", Options(), ""), ("vllm", "deepseek-v3", Options(mtp_depth=1), ""),
        ("vllm==0.24.0", "kimi-k3", Options(), "model classes: this release"), ("vllm", "kimi-k3", Options(), ""),
        ("sglang==0.5.14", "minimax-m3", Options(), "model classes: this release"),
        ("vllm==0.24.0", "minimax-m3", Options(), "has no pipeline"),
        ("sglang", "ling-3.0-flash", Options(), ""),
    ],
)  # fmt: skip
def test_what_older_releases_do_not_have(engine: str, model: str, options: Options, says: str) -> None:
    """vllm 0.24.0, models/registry.py and config/model.py (verify_with_parallel_config, of the draft's class)."""
    found = launch(engine, load_model(model), parse_layout("tp8-pp2"), options, batch=4, input_len=100, output_len=10,
                   device=load_device("b300"))  # fmt: skip
    assert (says in found.problem) if says else not found.problem


def test_what_sglang_wants_with_its_exchange_kernels() -> None:
    """0.5.23, arg_groups/moe_hook.py: FlashInfer's with a library's experts, DeepEP v2 with room for a chunk."""
    sizes: dict[str, Any] = {"batch": 16, "input_len": 1000, "output_len": 100, "device": load_device("h200")}
    said = {
        kind: launch("sglang", QWEN, parse_layout("dp8-ep8"), Options(all2all=kind), **sizes).commands[0]
        for kind in ("flashinfer_nvlink_one_sided", "deepep_v2", "nixl_ep")
    }
    assert "--moe-runner-backend flashinfer_cutlass" in said["flashinfer_nvlink_one_sided"]
    assert "SGLANG_DEEPEP_V2_NUM_MAX_DISPATCH_TOKENS_PER_RANK=1024 " in said["deepep_v2"]
    assert "--moe-runner-backend" not in said["nixl_ep"] and "DISPATCH_TOKENS" not in said["nixl_ep"]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_models_whose_configuration_is_their_own_code(engine: str) -> None:
    """Neither transformers nor the engines read ``bailing_moe`` (Ling 2.0); Kimi-K3 and Step-3 engines do."""
    for name, needed in (("ling-mini-2.0", True), ("kimi-k3", False), ("step-3", False), ("qwen3-30b-a3b", False)):
        found = launch(engine, load_model(name), parse_layout("tp8"), batch=4, input_len=100, output_len=10)
        assert ("--trust-remote-code" in found.commands[0]) == needed
