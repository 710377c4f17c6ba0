"""The shipped profiles: every file loads, every figure says where it comes from, no two share a name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

import tensorcast.profiles as profiles
from tensorcast.profiles.sourced import Figure
from tensorcast.report import catalog

LOADERS: dict[str, Any] = {
    "model": (profiles.list_models, profiles.load_model),
    "device": (profiles.list_devices, profiles.load_device),
    "engine": (profiles.list_engines, profiles.load_engine),
}

MODELS = [
    "deepseek-v3",
    "deepseek-r1",
    "qwen3-30b-a3b",
    "qwen3-30b-a3b-fp8",
    "qwen3-235b-a22b",
    "qwen3-235b-a22b-fp8",
    "mixtral-8x7b",
    "mixtral-8x22b",
    "gpt-oss-20b",
    "gpt-oss-120b",
    "llama-4-scout",
    "llama-4-maverick",
    "minimax-m2.5",
    "kimi-k2",
    "glm-5",
    "ernie-4.5-21b-a3b",
    "ernie-4.5-300b-a47b",
    "llama-3.1-8b",
    "llama-3.1-70b",
    "qwen3-32b",
    "llama-3.1-405b",
    "qwen3-8b",
    "qwen3-32b-fp8",
    "qwen3-next-80b-a3b",
    "qwen3-vl-235b-a22b",
    "qwen3.5-122b-a10b",
    "qwen2.5-72b",
    "glm-4.5",
    "kimi-k2.5",
    "deepseek-v2-lite",
    "mimo-v2-flash",
    "step-3.7-flash",
    "gemma-4-31b",
    "nemotron-3-super-120b-a12b",
    "nemotron-h-56b",
    "mistral-small-24b",
    "glm-4.7-flash",
    "laguna-xs.2",
    "ling-3.0-flash",
    "solar-open-100b",
    "hy3-preview",
]
DEVICES = [
    "a100-sxm", "h100-sxm", "h200-sxm", "b200-sxm", "gb200", "h20", "mi300x", "ascend-910b", "ascend-a3",
    "b300-sxm", "gb300", "h100-pcie", "a100-pcie", "l40s", "l4", "a30", "rtx-pro-6000", "mi325x", "mi355x",
]  # fmt: skip
ENGINES = ["vllm", "sglang", "trtllm", "eager"]


@pytest.fixture(autouse=True)
def _shipped_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(profiles.USER_DIRECTORY, raising=False)


def every_profile() -> Iterator[Any]:
    for names, load in LOADERS.values():
        for name in names():
            yield load(name)


def figures(value: Any, path: str = "") -> Iterator[tuple[str, Figure]]:
    """All figures inside a profile, with the path of each."""
    if isinstance(value, Figure):
        yield path, value
    elif isinstance(value, BaseModel):
        for field in type(value).model_fields:
            yield from figures(getattr(value, field), f"{path}.{field}")
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from figures(part, f"{path}.{key}")
    elif isinstance(value, tuple | list):
        for index, part in enumerate(value):
            yield from figures(part, f"{path}.{index}")


def test_everything_promised_is_there() -> None:
    assert set(MODELS) <= set(profiles.list_models())
    assert set(DEVICES) <= set(profiles.list_devices())
    assert set(ENGINES) <= set(profiles.list_engines())


@pytest.mark.parametrize("kind", LOADERS)
def test_names_equal_file_names(kind: str) -> None:
    names, load = LOADERS[kind]
    assert [load(name).name for name in names()] == list(names())


@pytest.mark.parametrize("kind", LOADERS)
def test_names_and_aliases_are_unique_and_all_resolve(kind: str) -> None:
    names, load = LOADERS[kind]
    answers: Counter[str] = Counter()
    for name in names():
        profile = load(name)
        spoken = {name, *profile.aliases} | ({profile.hf_id.lower()} if kind == "model" else set())
        assert all(alias == alias.lower() for alias in profile.aliases), name
        answers.update(spoken)
        for alias in spoken:
            assert load(alias.upper()).name == name
    assert [name for name, count in answers.items() if count > 1] == []


def test_every_figure_has_a_source() -> None:
    for profile in every_profile():
        for path, figure in figures(profile):
            resolves = figure.source in profile.sources
            sentence = " " in figure.source
            assert resolves or sentence, f"{profile.name}{path}: {figure.source!r} is neither a source nor a sentence"


def test_sources_are_links_or_say_what_they_are() -> None:
    for profile in every_profile():
        for key, source in profile.sources.items():
            assert source.startswith("https://") or " " in source, f"{profile.name}.sources.{key}"


def test_no_source_is_listed_for_nothing() -> None:
    # These stand behind fields that are not figures.
    general = {"config", "training", "report", "cores", "arguments", "fusion", "graphs", "transformers", "copy"}
    for profile in every_profile():
        used = {figure.source for _, figure in figures(profile)}
        assert set(profile.sources) - used - general == set(), profile.name


def test_models_name_their_config_and_published_counts() -> None:
    for name in profiles.list_models():
        model = profiles.load_model(name)
        assert model.sources["config"].endswith("config.json"), name
        assert model.config["model_type"], name
        assert model.total_params is not None, name
        text = model.config.get("text_config", model.config)
        mixture = any("expert" in key for key in text)
        assert (model.active_params is not None) == mixture, name
        assert "auto_map" not in model.config, name
        # of a vision tower no more than what SGLang's share of memory follows from
        assert len(model.config.get("vision_config", {})) in (0, 2), name


def test_every_reader_of_a_config_agrees_about_experts_and_drafts() -> None:
    """Against fields found by what their names contain, in the part of the config that speaks of language."""
    drafting = []
    for name in profiles.list_models():
        model = profiles.load_model(name)
        text = model.config.get("text_config", model.config)
        routed = {value for key, value in text.items() if re.search("^(n|moe_n).*(?<!shared_)experts$", key)}
        drafts = {value for key, value in text.items() if re.search("nextn|mtp_num_hidden_layers", key)}
        assert {model.num_experts} == ({value for value in routed if value} or {0}), name
        if not {"Qwen3NextForCausalLM", "MiMoV2FlashForCausalLM"} & set(model.config["architectures"]):
            blocks = "dspark_block_size" in text  # what is said to predict next tokens are those that draft together
            assert {model.mtp_modules} == ((not blocks and drafts) or {0}), name
        facts, record = model.stated_facts, catalog.model_record(model)
        assert (facts.num_experts, facts.mtp_modules) == (model.num_experts, model.mtp_modules)
        assert (record["experts"] or 0, record["top_k"] or 0) == (model.num_experts, model.experts_per_token)
        assert (model.num_experts > 0) == (model.active_params is not None), name
        drafting += [name] if model.mtp_modules else []
    assert {"deepseek-v3", "step-3.7-flash", "qwen3.5-27b", "glm-5"} <= set(drafting)
    # a layer each that no field counts: vLLM 0.33.0, models/qwen3_next_mtp.py and mimo_v2_mtp.py
    assert {"qwen3-next-80b-a3b", "mimo-v2-flash"} <= set(drafting)


def test_config_numbers_are_numbers() -> None:
    def strings(value: Any) -> Iterator[str]:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        for part in parts:
            if isinstance(part, str):
                yield part
            yield from strings(part)

    for name in profiles.list_models():
        for text in strings(profiles.load_model(name).config):
            with pytest.raises(ValueError, match="could not convert"):
                float(text)


def test_deepseek_kv_cache_is_the_published_figure() -> None:
    model = profiles.load_model("deepseek-v3")
    config = model.config
    derived = config["num_hidden_layers"] * (config["kv_lora_rank"] + config["qk_rope_head_dim"]) * 2
    assert model.kv_bytes_per_token is not None
    assert float(model.kv_bytes_per_token) == derived == 70272


@pytest.mark.parametrize(
    ("name", "bf16", "bandwidth", "scale_up"),
    [
        ("a100", 312e12, 2.039e12, 8),
        ("h100", 989.4e12, 3.35e12, 8),
        ("h200", 989.4e12, 4.8e12, 8),
        ("b200", 2.25e15, 8e12, 8),
        ("gb200", 2.5e15, 8e12, 72),
        ("h20", 148e12, 4e12, 8),
        ("mi300x", 1307.4e12, 5.3e12, 8),
        ("ascend-910b", 294.9e12, 1.6e12, 8),
        ("ascend-a3", 707.8e12, 3.2e12, 384),
        ("b300", 2.25e15, 7.75e12, 8),
        ("gb300", 2.5e15, 8e12, 72),
        ("h100-pcie", 756e12, 2e12, 8),
        ("a100-pcie", 312e12, 1.935e12, 8),
        ("l40s", 362.05e12, 864e9, 8),
        ("l4", 121e12, 300e9, 8),
        ("a30", 165e12, 933e9, 8),
        ("rtx-pro-6000", 467.8e12, 1.597e12, 8),
        ("mi325x", 1307.4e12, 6e12, 8),
        ("mi355x", 2516.6e12, 8e12, 8),
        ("h800", 989.4e12, 3.35e12, 8),
        ("a800", 312e12, 2.039e12, 8),
        ("h20-3e", 148e12, 4.8e12, 8),
        ("h100-nvl", 835.5e12, 3.9e12, 2),
        ("l40", 181.05e12, 864e9, 8),
        ("a100-40gb", 312e12, 1.555e12, 8),
        ("rtx-4090", 165.2e12, 1.008e12, 8),
        ("rtx-3090", 71e12, 936e9, 2),
        ("rtx-5090", 209.5e12, 1.792e12, 8),
        ("l20", 119.5e12, 864e9, 8),
        ("rtx-6000-ada", 364.2e12, 960e9, 8),
        ("mi308x", 188.4e12, 5.3e12, 8),
        ("mi300a", 980.6e12, 5.3e12, 4),
        ("gaudi3", 1835e12, 3.67e12, 8),
        ("910c", 707.8e12, 3.2e12, 384),
    ],
)
def test_device_figures(name: str, bf16: float, bandwidth: float, scale_up: int) -> None:
    device = profiles.load_device(name)
    assert float(device.peak_flops["bf16"]) == pytest.approx(bf16)
    assert float(device.memory_bandwidth_bytes_per_s) == pytest.approx(bandwidth)
    assert device.interconnect[0].size == scale_up
    assert device.world_limit > scale_up


def test_devices_with_one_tier_or_without_bf16() -> None:
    spark, volta = profiles.load_device("dgx-spark"), profiles.load_device("v100")
    assert (spark.world_limit, float(spark.memory_bandwidth_bytes_per_s)) == (2, 273e9)
    assert "bf16" not in volta.peak_flops and float(volta.peak_flops["fp16"]) == 125e12


@pytest.mark.parametrize(("cut", "whole"), [("h800", "h100"), ("a800", "a100")])
def test_export_models_are_the_same_chip_with_slower_links(cut: str, whole: str) -> None:
    ours, theirs = profiles.load_device(cut), profiles.load_device(whole)
    assert {k: float(v) for k, v in ours.peak_flops.items()} == {k: float(v) for k, v in theirs.peak_flops.items()}
    links = [float(device.interconnect[0].bandwidth_bytes_per_s) for device in (ours, theirs)]
    assert links[0] == 200e9 < links[1]


def test_devices_are_plausible() -> None:
    for name in profiles.list_devices():
        device = profiles.load_device(name)
        bandwidths = [float(tier.bandwidth_bytes_per_s) for tier in device.interconnect]
        assert bandwidths == sorted(bandwidths, reverse=True), name
        assert 2**34 < float(device.memory_bytes) < 2**39, name
        assert all(1e-7 < float(tier.latency_s) < 1e-4 for tier in device.interconnect), name
        peaks = device.peak_flops
        for fast, slow in (("fp8", "bf16"), ("int8", "bf16"), ("fp4", "fp8"), ("bf16", "tf32"), ("tf32", "fp32")):
            if fast == "int8" and name in ("b300-sxm", "gb300"):  # Blackwell Ultra has few INT8 units
                continue
            if fast == "tf32" and name == "l40":  # as fast as its vector units
                continue
            if fast == "fp8" and name == "gaudi3":  # its matrix engines are as fast in bf16
                continue
            if fast in peaks and slow in peaks:
                assert float(peaks[fast]) > float(peaks[slow]), (name, fast)


def test_engines_are_plausible() -> None:
    known = {"allgather_reducescatter", "high_throughput", "low_latency"}
    for name in profiles.list_engines():
        engine = profiles.load_engine(name)
        assert set(engine.all2all) == {"prefill", "decode"} and set(engine.all2all.values()) <= known, name
        assert 0.5 < float(engine.memory_fraction) <= 1, name
        assert float(engine.graph_launch_gap_s) <= float(engine.eager_launch_gap_s) < 1e-4, name
    assert profiles.load_engine("eager").fusions == ()


def test_profiles_are_immutable() -> None:
    device = profiles.load_device("h200")
    with pytest.raises(ValidationError):
        device.processors = 1
    with pytest.raises(ValidationError):
        device.memory_bytes.value = 1.0
    # A config is a plain dict, for transformers takes no other: spoiling one must not reach the next reader.
    profiles.load_model("deepseek-v3").config["hidden_size"] = 1
    assert profiles.load_model("deepseek-v3").config["hidden_size"] == 7168


@pytest.mark.parametrize(
    ("said", "name"),
    [("RTX 4090", "rtx-4090"), ("h20_3e", "h20-141gb"), ("H100 NVL", "h100-nvl"), ("dgx spark", "gb10")],
)
def test_devices_are_found_with_blanks_in_their_names(said: str, name: str) -> None:
    assert profiles.load_device(said).name == name
