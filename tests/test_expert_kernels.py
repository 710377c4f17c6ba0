"""Whose experts' kernels an engine runs, with which tiles: engine profiles against what measured tables say ran."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorcast.calibrate.kernel_models.expert_libraries import known_models
from tensorcast.cost.kernels.device_model import CONFIGURATION, SOURCE_OF, UNTUNED
from tensorcast.cost.kernels.formula import formula_of
from tensorcast.cost.kernels.frames import predict_kernels
from tensorcast.cost.kernels.predictor import predictor_for
from tensorcast.cost.kernels.triton_tiles import NONE, TILES, TRITON, of_library
from tensorcast.cost.kernels.vocabulary import SOURCES, source_of
from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.plan.kernels import expert_sources
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.kernels import ExpertKernels, Library
from tensorcast.profiles.store import load_device, load_engine, load_model

DEVICES = ("h100-sxm", "h200-sxm", "b200-sxm", "gb200")

NOT_AS_RULED = {("sglang", "hopper", (1024.0, 2688.0, 22.0, 512.0))}
"""Nemotron Super's experts: the tables ran Triton's on Hopper, where the engine's code asks for CUTLASS."""


def library(engine: str, device: str, dtype: str, model: str, spread: bool = False) -> str:
    experts = load_engine(engine).experts
    assert experts is not None
    code = source_of(experts.library(load_device(device).architecture, dtype, load_model(model).config, spread))
    return SOURCES[int(code) - 1] if code else ""


MEASURED = {"vllm": "vllm==0.24.0", "sglang": "sglang==0.5.14"}
"""The releases that the tables timed."""


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("name", DEVICES)
def test_rules_name_the_library_that_ran(engine: str, name: str) -> None:
    """The tables' ``kernel_source``, in the shipped kernel models, against rules read from the engines' source."""
    device, model = load_device(name), predictor_for(load_device(name), engine).model
    experts = load_engine(MEASURED[engine]).experts
    assert model is not None and experts is not None
    compared = 0
    for kernel in model.kernels.values():
        if kernel.family != "grouped_gemm" or kernel.engine != engine or kernel.variant:
            continue
        for *sizes, spread, ran in kernel.sources:
            configs = known_models().get(tuple(sizes))
            if configs is None or (engine, device.architecture.lower(), tuple(sizes)) in NOT_AS_RULED:
                continue
            # which of the models with such experts was measured is not said
            named = {experts.library(device.architecture, kernel.dtype, config, bool(spread)) for config in configs}
            ruled = {source_of(kernels) for kernels in named}
            assert ran in ruled, (kernel.dtype, sizes, ruled, ran)
            compared += 1
    assert compared >= 20


def test_what_the_engines_source_says() -> None:
    """sglang 0.5.14 server_args.py; vllm 0.24.0 fused_moe/oracle."""
    assert library("sglang", "b200", "bf16", "qwen3-235b-a22b") == "trtllm_moe"
    assert library("sglang", "b200", "bf16", "mimo-v2-flash") == "triton"
    assert library("sglang", "b200", "bf16", "llama-4-scout") == "triton"
    assert library("sglang", "b200", "fp8_block", "llama-4-scout") == "trtllm_moe"
    assert library("sglang", "h200", "bf16", "nemotron-3-ultra-550b-a55b") == "cutlass"
    assert library("vllm", "h100", "fp8_block", "deepseek-v3", spread=True) == "cutlass"
    assert library("vllm", "h100", "fp8_block", "deepseek-v3", spread=False) == "triton"
    assert library("vllm", "b200", "bf16", "gemma-4-26b-a4b") == "cutlass"
    assert library("vllm", "b200", "fp8_block", "llama-4-scout") == "modular"
    assert library("vllm", "h100", "mxfp4", "gpt-oss-20b") == "triton"


def test_older_releases_chose_others() -> None:
    """On Blackwell: vllm 0.17.0 and 0.19.0, fused_moe/oracle/fp8.py and unquantized.py with what trtllm_fp8_moe.py
    supports (routers without groups, as MiniMax-M2's, not before 0.24); 0.12.0 quantization/fp8.py."""
    def chosen(release: str, dtype: str, model: str) -> str:
        return library(f"vllm=={release}", "b200", dtype, model)

    releases = ("0.12.0", "0.17.0", "0.18.0", "0.19.0", "0.24.0")
    assert [chosen(release, "fp8_block", "minimax-m2.5") for release in releases] == [
        "deepgemm", "deepgemm", "modular", "modular", "_trtllm_",
    ]  # fmt: skip
    assert [chosen(release, "fp8_block", "qwen3-235b-a22b") for release in releases] == [
        "deepgemm", "_trtllm_", "modular", "modular", "_trtllm_",
    ]  # fmt: skip
    assert {chosen(release, "fp8_block", "deepseek-v3") for release in ("0.17.0", "0.19.0", "0.33.0")} == {"_trtllm_"}
    assert [chosen(release, "bf16", "qwen3-235b-a22b") for release in ("0.10.2", "0.19.0", "0.24.0")] == [
        "triton", "triton", "_trtllm_",
    ]  # fmt: skip
    assert chosen("0.19.0", "nvfp4", "minimax-m2.5") == "modular"


@pytest.mark.parametrize(("engine", "source", "whose", "dtype"), [
    ("vllm", "triton", "sglang", "fp8_block"), ("vllm", "deepgemm", "trtllm", "fp8_block"),
    ("vllm", "triton", "sglang", "bf16"),
])  # fmt: skip
def test_a_library_not_timed_under_an_engine_is_priced_by_the_table_that_has_it(
    engine: str, source: str, whose: str, dtype: str
) -> None:
    own, other = (predictor_for(load_device("b200"), name, served=True) for name in (engine, whose))
    dice = np.random.default_rng(7)
    tokens = np.exp2(dice.uniform(0, 13, 40))
    whole = {"hidden": 3072.0, "inter": 1536.0, "topk": 8.0, "experts": 256.0, "moe_tp": 4.0}
    size = {"tokens": tokens} | {name: np.full(40, value) for name, value in whole.items()}
    asked = np.where(dice.random(40) < 0.5, source_of(source), source_of("_trtllm_"))
    mixed = own.estimate("grouped_gemm", dtype, "", **size, source=asked)
    theirs = other.estimate("grouped_gemm", dtype, "", **size, source=np.full(40, source_of(source)))
    ours = own.estimate("grouped_gemm", dtype, "", **size, source=np.full(40, source_of("_trtllm_")))
    lent = asked == source_of(source)
    assert 10 < lent.sum() < 30
    assert np.allclose(mixed.seconds[lent], theirs.seconds[lent]) and set(mixed.evidence[lent]) == {"calibrated"}
    assert np.array_equal(mixed.seconds[~lent], ours.seconds[~lent])
    more = {"moe_ep": np.ones(40), "slots": size["experts"], "gated": np.ones(40), "skew": np.zeros(40)}
    formula = formula_of("grouped_gemm", dtype, "", size | more, load_device("b200"), engine=engine)
    assert np.allclose(mixed.factor * formula.seconds, mixed.seconds)


def test_a_library_timed_for_one_model_is_lent_to_it() -> None:
    """INT4 experts of Kimi-K2 in TensorRT-LLM's generated kernels, which vLLM runs if a variable asks for them:
    SGLang's table alone has them, for that model alone. Marlin's, which run unasked, take longer on B200."""
    own, other = (predictor_for(load_device("b200"), name, served=True) for name in ("vllm", "sglang"))
    experts = load_engine("vllm").experts
    assert experts is not None
    kimi, mine = load_model("kimi-k2-instruct").config, experts.model_copy(update={"asked": "trtllm"})
    code = source_of(mine.library("blackwell", "w4a16", kimi, False))
    assert code == source_of("trtllm_moe") != source_of(experts.library("blackwell", "w4a16", kimi, False))
    size = {"tokens": np.array([4.0, 64.0, 1024.0])} | {
        name: np.full(3, value) for name, value in
        {"hidden": 7168.0, "inter": 2048.0, "topk": 8.0, "experts": 384.0, "moe_tp": 8.0}.items()
    }  # fmt: skip
    asked = own.estimate("grouped_gemm", "w4a16", "", **size, source=np.full(3, code))
    theirs = other.estimate("grouped_gemm", "w4a16", "", **size, source=np.full(3, code))
    assert np.allclose(asked.seconds, theirs.seconds) and set(asked.evidence) == {"calibrated"}
    unasked = own.estimate("grouped_gemm", "w4a16", "", **size, source=np.full(3, source_of("marlin")))
    assert (asked.seconds < unasked.seconds).all()
    new = own.estimate("grouped_gemm", "w4a16", "", **size | {"hidden": np.full(3, 4096.0)}, source=np.full(3, code))
    plain = own.estimate("grouped_gemm", "w4a16", "", **size | {"hidden": np.full(3, 4096.0)})
    assert np.array_equal(new.seconds, plain.seconds)  # nobody timed that library for this one


def test_lent_kernels_are_nearer_than_those_that_run_now() -> None:
    """What vLLM 0.22.0's table timed of Triton on B200, which no fit has seen: SGLang's table of the library against
    vLLM's of the kernels that it runs since."""
    rows = pd.read_csv(Path(__file__).parent / "data" / "vllm_triton_b200.csv", comment="#")
    rows = rows.rename(columns={"moe_dtype": "dtype"}).assign(family="moe")
    measured = rows.pop("latency").to_numpy() / 1e3
    lent, now = (
        predict_kernels(rows.assign(kernel_source=name), device="b200", engine="vllm")
        for name in ("vllm_fused_moe_triton", "vllm_flashinfer_trtllm_moe")
    )
    off, before = (np.abs(np.log(found["seconds"] / measured)) for found in (lent, now))
    assert off.median() < 0.3 < before.median() and (off < before).mean() > 0.7
    assert set(lent["evidence"]) == {"calibrated"}
    assert 0.6 < ((lent["low"] < measured) & (measured < lent["high"])).mean() < 0.95


def test_generated_kernels_without_a_router_take_as_their_twins_by_what_other_models_took() -> None:
    """vllm's table timed MiniMax-M2's FP8 blocks with the router in the call, 0.19 runs them without."""
    predictor = predictor_for(load_device("b200"), "vllm", served=True)
    modular, whole = source_of("modular"), source_of("_trtllm_")
    size = {"hidden": 3072.0, "inter": 1536.0, "topk": 8.0, "experts": 256.0, "moe_tp": 4.0}
    tokens = np.array([1.0, 16, 64, 300, 4096])

    def priced(source: float, hidden: float = 3072.0) -> tuple[np.ndarray, set[str]]:
        found = predictor.estimate("grouped_gemm", "fp8_block", "", **{**size, "hidden": hidden}, tokens=tokens,
                                   source=np.full(5, source))  # fmt: skip
        assert (found.low <= found.seconds).all() and (found.seconds <= found.high).all()
        return found.seconds, set(found.evidence)

    timed, how = priced(whole)
    assert how == {"measured"}
    twin, how = priced(modular)
    assert how == {"calibrated"} and (twin / timed > 0.9).all() and (twin / timed < 1.5).all()
    like = priced(modular, 3073.0)[0] / priced(whole, 3073.0)[0]  # of a model that nobody timed, nearly as large
    assert np.allclose(twin / timed, like, rtol=2e-3)
    # whatever is asked beside it: Triton's are lent by another engine's table
    beside = predictor.estimate(
        "grouped_gemm", "fp8_block", "", **size, tokens=np.append(tokens, 64.0),
        source=np.array([*[modular] * 5, source_of("triton")]),
    )  # fmt: skip
    assert np.array_equal(beside.seconds[:5], twin)


def test_tensorrt_llm_runs_generated_experts_on_blackwell() -> None:
    """As launch scripts set moe_config.backend: TRTLLM, and under attention DP CUTLASS or DEEPGEMM."""
    engine, config = load_engine("trtllm"), load_model("deepseek-r1").config
    for device in ("b200", "gb200"):
        alone, own = (expert_sources(engine, load_device(device), config, layout) for layout in (
            Layout(8, tp=8), Layout(8, tp=1, dp=8, ep=8),
        ))
        assert {dtype: SOURCES[int(code) - 1] for dtype, code in alone.items() if code} == {
            "nvfp4": "min_latency", "fp8_block": "min_latency",
        }
        assert {dtype: SOURCES[int(code) - 1] for dtype, code in own.items() if code} == {
            "nvfp4": "cutlass", "fp8_block": "deepgemm",
        }
    assert not any(expert_sources(engine, load_device("h200"), config, Layout(8, tp=8)).values())


def test_of_two_measured_libraries_the_named_one_is_priced() -> None:
    """B200, DeepSeek-V3's experts in NVFP4 cut over 8: the tables have CUTLASS at 304 us for 64 tokens, generated
    kernels at 100 (aiconfigurator-core 0.12.0, TensorRT-LLM 1.3.0rc20)."""
    size: dict[str, float] = {"tokens": 64.0, "hidden": 7168, "inter": 2048, "topk": 8, "experts": 256, "moe_tp": 8}
    predictor = predictor_for(load_device("b200"), "trtllm", served=True)
    us = {
        name: 1e6 * float(predictor.estimate("grouped_gemm", "nvfp4", "", **size, source=source_of(name)).seconds[0])
        for name in ("cutlass", "min_latency")
    }
    assert us == pytest.approx({"cutlass": 304, "min_latency": 100}, rel=0.12)


def test_the_first_rule_that_holds_counts() -> None:
    rules = ExpertKernels(source="nowhere", libraries=(
        Library(kernels="one", devices=("hopper",), dtypes=("fp8",)), Library(kernels="two", architectures=("A", "B")),
        Library(kernels="three", activations=("gelu",), spread=True), Library(kernels="own", attention_dp=True),
        Library(kernels="four", dtypes=("bf16",)),
    ))
    text = {"text_config": {"hidden_activation": "gelu"}}
    assert rules.library("Hopper", "fp8", {"architectures": ["B"]}, False) == "one"
    assert rules.library("Ampere", "fp8", {"architectures": ["B"]}, False) == "two"
    assert rules.library("Ampere", "bf16", text, True) == "three"
    assert rules.library("Ampere", "bf16", text, False) == "four"
    assert rules.library("Ampere", "fp8", text, False) == ""
    assert rules.library("Ampere", "fp8", text, False, attention_dp=True) == "own"


sizes = st.fixed_dictionaries({
    "tokens": st.integers(1, 20000), "experts": st.sampled_from([8, 64, 128, 512]),
    "inter": st.sampled_from([768, 1536, 2048]), "moe_tp": st.sampled_from([1, 2, 4]),
    "moe_ep": st.sampled_from([1, 2, 8]),
})


@cache
def device_of(name: str) -> DeviceProfile:
    return load_device(name)


def tiles(engine: str, dtype: str, given: dict[str, int], device: str = "h100") -> dict[str, float]:
    columns = {"hidden": 4096, "topk": 4, "slots": given["experts"], "gated": 1, "skew": 0, **given}
    found = formula_of("grouped_gemm", dtype, "", {n: np.array([float(v)]) for n, v in columns.items()},
                       device_of(device), engine=engine).features
    return {name: float(found[name][0]) for name in TILES if name in found}


@given(sizes)
def test_default_tiles_are_the_engines(given: dict[str, int]) -> None:
    """By hand from ``get_default_config`` of each engine, where no tuned file is."""
    held, tokens = given["experts"] // given["moe_ep"], given["tokens"]
    for engine in ("sglang", "vllm"):
        found = tiles(engine, "bf16", given)
        if engine == "sglang":
            block = (16, 32, 64) if tokens <= held else (64, 64, 32)
        else:
            rows = 16 if tokens <= 32 else 32 if tokens <= 96 else 64 if tokens <= 512 else 128
            block = (rows, 64, 128) if tokens <= 64 else (rows, 128, 64)
        assert found["tokens_per_held"] == pytest.approx(np.log2(tokens / held))
        sides = [found[f"block_{side}"] for side in ("rows", "columns", "depth")]
        assert sides == ([NONE] * 3 if found["tuned"] else pytest.approx(np.log2(block)))


def test_tuned_files_are_of_one_device_dtype_and_width() -> None:
    """sglang ships ``E=128,N=384,device_name=NVIDIA_H100_80GB_HBM3.json``, and none of N=1536."""
    size = {"tokens": 100, "experts": 128, "inter": 1536, "moe_tp": 4, "moe_ep": 1}
    assert tiles("sglang", "bf16", size)["tuned"] == 1
    assert tiles("sglang", "bf16", size | {"moe_tp": 1})["tuned"] == 0
    assert tiles("sglang", "bf16", size, "a100")["tuned"] == 0
    assert tiles("sglang", "nvfp4", size, "b200") == dict.fromkeys(TILES, NONE)
    assert tiles("trtllm", "bf16", size) == {}


def test_other_libraries_have_no_triton_tiles() -> None:
    features = {"tuned": np.ones(3), "block_rows": np.full(3, 4.0), "log_rows": np.arange(3.0)}
    seen = of_library(features, np.array([TRITON, TRITON + 1, 0.0]))
    assert seen["tuned"].tolist() == [1, NONE, 1] and seen["block_rows"].tolist() == [4, NONE, 4]
    assert seen["log_rows"].tolist() == [0, 1, 2] and of_library(features, None) is features


def test_a_step_prices_the_library_of_its_model() -> None:
    """A model that was not measured, of a class to which sglang gives another library than to most."""
    engine, device, model = load_engine("sglang"), load_device("b200"), load_model("glm-4.5-air")
    sources = expert_sources(engine, device, model.config, Layout(4, tp=4))
    assert sources["bf16"] == TRITON and sources["nvfp4"] == source_of("flashinfer_trtllm_moe")
    step = deploy(model, device, engine, Layout(4, tp=4), "decode").step
    assert step.pricer.sources == sources
    ruled = float(step.price(64, 1, 1000).seconds)
    plain = replace(step, pricer=replace(step.pricer, sources={}))
    assert abs(float(plain.price(64, 1, 1000).seconds) / ruled - 1.0) > 0.02


def test_an_engine_runs_tuned_kernels_where_untuned_ones_were_measured() -> None:
    device = load_device("h200")
    plain, served = (predictor_for(device, "trtllm", served=flag) for flag in (False, True))
    assert plain.model is not None
    kernel = plain.model.kernels["grouped_gemm", "bf16", "trtllm", ""]
    lines = np.array(kernel.levels)
    columns = {name: lines[:, i] for i, name in enumerate(CONFIGURATION["grouped_gemm"])}
    gated = np.array([not any(tuple(line[:4]) == tuple(known[:4]) and SOURCES[int(known[-1]) - 1] == "nongated"
                              for known in kernel.sources) for line in lines], dtype=float)
    columns |= {"tokens": np.full(len(lines), 256.0), "slots": columns["experts"], "gated": gated}
    assert len(SOURCE_OF) == 4
    there, here = (p.price("grouped_gemm", "bf16", "", columns) for p in (plain, served))
    untuned = lines[:, -1] > UNTUNED
    assert untuned.sum() > 50 and (~untuned).sum() > 50
    assert np.allclose(np.log(there.seconds / here.seconds)[untuned], lines[untuned, -1], atol=0.02)
    assert np.array_equal(there.seconds[~untuned], here.seconds[~untuned])
    assert set(here.evidence[untuned]) == {"calibrated"}
