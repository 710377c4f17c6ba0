"""Shipped models beside the first ones: caches and layers counted by hand, and the names that people write."""

from __future__ import annotations

from typing import Any

import pytest

import tensorcast as tc
from tensorcast.cost.memory import cache_bytes, kv_bytes_per_token
from tensorcast.deploy.model_names import named_model
from tensorcast.errors import InputError
from tensorcast.modeling.checkpoint.read import checkpoint, from_config
from tensorcast.modeling.config import hf_config
from tensorcast.modeling.quantization import override
from tensorcast.predict.run_columns import read_run
from tensorcast.profiles.store import list_devices, load_device, load_model
from tensorcast.trace.cache import traced

BF16 = {
    # 2 bytes * layers * (latent + rope)
    "deepseek-v2": 2 * 60 * (512 + 64),
    "deepseek-v2-lite": 2 * 27 * (512 + 64),
    # 2 bytes * layers with attention * KV heads * (key + value width)
    "glm-4.5-air": 2 * 46 * 8 * (128 + 128),
    "llama-3.1-405b": 2 * 126 * 8 * (128 + 128),
    "qwen2.5-7b": 2 * 28 * 4 * (128 + 128),
    "qwen3-next-80b-a3b": 2 * 12 * 2 * (256 + 256),
    "nemotron-3-super-120b-a12b": 2 * 8 * 2 * (128 + 128),
    "nemotron-h-56b": 2 * 10 * 8 * (128 + 128),
    "step-3.7-flash": 2 * 45 * 8 * (128 + 128),
    "mimo-v2-flash": 2 * (9 * 4 + 39 * 8) * (192 + 128),
    "gemma-4-31b": 2 * (50 * 16 * (256 + 256) + 10 * 4 * (512 + 512)),
    "glm-4.7-flash": 2 * 47 * (512 + 64),
    "hy3-preview": 2 * 80 * 8 * (128 + 128),
    "laguna-xs.2": 2 * 40 * 8 * (128 + 128),
    "ling-3.0-flash": 2 * 7 * (512 + 64),
    "solar-open-100b": 2 * 48 * 8 * (128 + 128),
}

LAYERS = {
    "deepseek-v2": [1, 59],  # dense, MoE
    "glm-4.5-air": [1, 45],
    "qwen3-next-80b-a3b": [12, 36],  # full attention, gated delta rule
    "nemotron-3-super-120b-a12b": [8, 40, 40],  # attention, Mamba-2, MoE
    "nemotron-h-56b": [10, 54, 54],  # attention, Mamba-2, MLP
    "step-3.7-flash": [1, 2, 11, 31],  # full dense, windowed dense, full MoE, windowed MoE
    "mimo-v2-flash": [1, 8, 39],  # full dense, full MoE, windowed MoE
    "gemma-4-31b": [10, 50],
    "laguna-xs.2": [1, 9, 30],  # full dense, full MoE, windowed MoE
    "ling-3.0-flash": [2, 7, 33],  # delta-rule dense, MLA MoE, delta-rule MoE
}


@pytest.mark.parametrize("name", BF16)
def test_cache_of_a_token_and_kinds_of_layers(name: str) -> None:
    table = traced(load_model(name), "decode")
    assert kv_bytes_per_token(table) == BF16[name]
    counts = sorted(table.layer_kinds.count(kind) for kind in set(table.layer_kinds))
    assert counts == LAYERS.get(name, counts)


@pytest.mark.parametrize(("name", "windowed", "window"), [("mimo-v2-flash", 39, 128), ("step-3.7-flash", 33, 512)])
def test_windowed_layers_keep_a_window(name: str, windowed: int, window: int) -> None:
    table = traced(load_model(name), "decode")
    lost = cache_bytes(table, "bf16", 1, window) * 5 - cache_bytes(table, "bf16", 1, window * 5)
    width = 2 * 8 * (192 + 128 if name == "mimo-v2-flash" else 128 + 128)
    assert lost == windowed * 4 * window * width


@pytest.mark.parametrize("name", ["laguna-xs.2", "ling-3.0-flash"])
def test_heads_of_every_layer_are_divided(name: str) -> None:
    """Heads that vary by layer (Laguna) or belong to delta-rule layers (Ling): a rank of two has half of each query."""
    whole, rank = (traced(load_model(name), "decode", tp) for tp in (1, 2))
    queries = {p.name: p.numel for p in whole.params if p.name.endswith("q_proj.weight")}
    assert queries
    assert {p.name: 2 * p.numel for p in rank.params if p.name in queries} == queries


def test_int4_experts_of_kimi_k2_thinking() -> None:
    """INT4 in groups of 32 for routed experts; attention, shared experts, the dense layer and the head stay bf16."""
    found = from_config(load_model("moonshotai/Kimi-K2-Thinking").config)
    bf16 = ("self_attn.o_proj", "mlp.shared_experts.up_proj", "mlp.down_proj")
    assert found.scheme("model.layers.7.mlp.experts.gate_up_proj", "experts").name == "w4a16_g32"
    assert {found.scheme(f"model.layers.0.{module}.weight", "linear").name for module in bf16} == {"bf16"}
    assert found.scheme("lm_head.weight", "linear").name == "bf16"


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_may_be_said_of_the_whole_model(tied: bool) -> None:
    profile = load_model("qwen3-vl-32b")
    profile.config["tie_word_embeddings"] = tied
    assert "tie_word_embeddings" not in profile.config["text_config"]
    assert hf_config(profile).tie_word_embeddings is tied


def both(scheme: str) -> str:
    return f"linear={scheme},experts={scheme}"


NAMES = [
    ("nvidia/DeepSeek-R1-0528-FP4-v2", "deepseek-r1", both("nvfp4")),
    ("nvidia/Qwen3-235B-A22B-NVFP4", "qwen3-235b-a22b", both("nvfp4")),
    ("RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic", "llama-3.1-70b", both("fp8")),
    ("RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w8a8", "llama-3.1-8b", both("int8")),
    ("amd/DeepSeek-R1-0528-MXFP4-Preview", "deepseek-r1", both("mxfp4")),
    ("amd/Llama-3.1-405B-Instruct-FP8-KV", "llama-3.1-405b", both("fp8")),
    ("Qwen/Qwen3-8B-FP8", "qwen3-8b", both("fp8_block")),
    ("Qwen/Qwen3-32B-FP8-Static-PerTensor", "qwen3-32b", both("fp8")),
    ("Qwen/Qwen2.5-72B-Instruct-GPTQ-Int4", "qwen2.5-72b", both("w4a16")),
    ("nvidia/Kimi-K2-Thinking-NVFP4", "kimi-k2.5", both("nvfp4")),  # not its own INT4
    ("unsloth/DeepSeek-V3-0324-BF16", "deepseek-v3", both("bf16")),
    ("deepseek-ai/DeepSeek-V3-0324-FP8", "deepseek-v3", None),  # ships in FP8
]


@pytest.mark.parametrize(("name", "model", "quant"), NAMES)
def test_a_name_says_model_and_precision(name: str, model: str, quant: str | None) -> None:
    row: dict[str, Any] = {"model": name, "device": "h200", "concurrency": "8"}
    run = read_run(row)
    stored = override(checkpoint(named_model(run.model)[0]), run.options.quant)
    meant = override(checkpoint(load_model(model)), quant)
    assert (stored.linear.kernel, stored.experts.kernel) == (meant.linear.kernel, meant.experts.kernel)
    assert f"model {model}" in run.assumed and any(word.startswith(("precision ", "stored ")) for word in run.assumed)
    stated = read_run({**row, "precision": "w8a16"})  # a column has the last word
    assert stated.options.quant == read_run({**row, "model": model, "precision": "w8a16"}).options.quant
    assert not any(word.startswith("precision ") for word in stated.assumed)


SAME = [
    ("Qwen/Qwen3-32B-FP8", "qwen3-32b-fp8"), ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.1-70b"),
    ("deepseek-ai/DeepSeek-R1-0528", "deepseek-r1"), ("deepseek-ai/DeepSeek-V3.1-Terminus", "deepseek-v3"),
    ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"), ("zai-org/GLM-5.1-FP8", "glm-5"),
    ("Qwen/Qwen3.6-35B-A3B", "qwen3.5-35b-a3b"), ("MiniMaxAI/MiniMax-M2.7", "minimax-m2.5"),
    ("moonshotai/Kimi-K2.6", "kimi-k2.5"), ("Qwen/Qwen3-Coder-30B-A3B-Instruct", "qwen3-30b-a3b-2507"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "profile"), SAME)
def test_releases_of_one_network(name: str, profile: str) -> None:
    assert load_model(name).name == profile
    assert read_run({"model": name, "device": "h200", "concurrency": "8"}).options.quant is None


def test_other_networks_are_not_taken_for_near_ones() -> None:
    for name in ("deepseek-ai/DeepSeek-V9-Flash", "Qwen/Qwen3-1.5B", "meta-llama/Llama-3.2-70B", "zai-org/GLM-4-9B"):
        with pytest.raises(InputError, match="unknown model"):
            read_run({"model": name, "device": "h200", "concurrency": "8"})


@pytest.mark.parametrize("name", [name for name in list_devices() if load_device(name).calibration is None])
def test_devices_without_measurements_are_datasheet_estimates(name: str) -> None:
    """One token of Qwen3-0.6B reads its weights once: no faster than memory, and within launches of it."""
    step = tc.simulate("qwen3-0.6b", device=name, batch=1, context=128)
    assert set(step.time_by("evidence")) == {"datasheet"}
    read_s = 2 * 0.596e9 / float(load_device(name).memory_bandwidth_bytes_per_s)
    assert read_s < step.step_s < read_s * 1.5 + 5e-3
