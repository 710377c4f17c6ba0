"""Values of whole checkpoints, each by arithmetic on published sizes or by what an engine logged."""

from __future__ import annotations

from typing import Any, NamedTuple

import public_configs
import pytest

import tensorcast as tc
from tensorcast.cost.memory import weight_bytes
from tensorcast.deploy.model_names import named_model
from tensorcast.modeling.checkpoint.read import checkpoint, from_config
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.store import load_model
from tensorcast.trace.cache import traced
from tensorcast.trace.precision import by_precision

FP8 = {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"},
       "input_activations": {"type": "float", "num_bits": 8, "strategy": "token", "dynamic": True}}  # fmt: skip
NVFP4 = {"weights": {"type": "float", "num_bits": 4, "group_size": 16},
         "input_activations": {"type": "float", "num_bits": 4, "group_size": 16, "dynamic": "local"}}  # fmt: skip
INT4 = {"weights": {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 128}}
TO_ATTENTION, TO_EXPERTS = {"targets": ["re:.*self_attn.*"]}, {"targets": ["re:.*experts.*"]}


def compressed(*groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    named = {f"group_{i}": group for i, group in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "config_groups": named, "ignore": ["lm_head"], **more}


# Qwen3-30B-A3B, billions of weights: attention 48 x 2048 x 128 x (32 + 4 + 4 + 32), experts 48 x 128 x 3 x 2048 x 768;
# embedding, head, routers and norms
ATTENTION, EXPERTS, ELSE = 0.906, 28.991, 0.635
HEAD = 0.311
NVFP4_BYTES, W4_BYTES, AFFINE_BYTES = 0.5 + 1 / 16, 0.5 + 2.5 / 128, 0.5 + 4 / 64

STORED = [
    # of an ignore list by layer: attention of layer 0 with its MLP, the MLP of the last; embedding and head
    ("llama-3.1-405b", {"quant_method": "fbgemm_fp8", "modules_to_not_convert": [
        *(f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"),
        *(f"model.layers.{i}.mlp.{name}_proj" for i in (0, 125) for name in ("gate", "up", "down"))]},
     395.84 + 10.01 * 2),
    ("qwen3-30b-a3b", compressed(FP8 | TO_ATTENTION, NVFP4 | TO_EXPERTS), ATTENTION + EXPERTS * NVFP4_BYTES + ELSE * 2),
    ("qwen3-30b-a3b", compressed(NVFP4 | TO_EXPERTS, FP8 | TO_ATTENTION), ATTENTION + EXPERTS * NVFP4_BYTES + ELSE * 2),
    ("qwen3-30b-a3b", compressed(INT4 | TO_EXPERTS), EXPERTS * W4_BYTES + (ATTENTION + ELSE) * 2),
    ("qwen3-30b-a3b", {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:.*self_attn.*": {}}},
     EXPERTS * W4_BYTES + (ATTENTION + ELSE) * 2),
    ("qwen3-30b-a3b", {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": [
        "lm_head", "*self_attn*"]}, "producer": {"name": "modelopt"}}, EXPERTS * NVFP4_BYTES + (ATTENTION + ELSE) * 2),
    ("qwen3-30b-a3b", {"quant_method": "modelopt", "quantization": {
        "quant_algo": "FP8", "exclude_modules": ["lm_head"]}}, ATTENTION + EXPERTS + ELSE * 2),
    ("qwen3-30b-a3b", {"quant_method": "mlx", "bits": 4, "group_size": 64},
     (ATTENTION + EXPERTS + 2 * HEAD) * AFFINE_BYTES + (ELSE - 2 * HEAD) * 2),
    ("qwen3-30b-a3b", {"quant_method": "quark", "exclude": ["lm_head", "*self_attn*"], "global_quant_config": {
        "weight": {"dtype": "fp4", "group_size": 32}, "input_tensors": {"dtype": "fp4", "group_size": 32}}},
     EXPERTS * (0.5 + 1 / 32) + (ATTENTION + ELSE) * 2),
    ("qwen3-235b-a22b", {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "*mlp.gate"]},
     233.8 * NVFP4_BYTES + 1.295 * 2),
    ("llama-3.1-70b", {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}, 68.45 + 2.102 * 2),
    ("deepseek-v4-flash", {"quant_method": "fp8", "weight_block_size": [128, 128], "moe_quant_algo": "NVFP4",
                           "group_size": 16}, 157.0 + 277.03 / 32),
]  # fmt: skip


@pytest.mark.parametrize(("model", "entry", "gb"), STORED)
def test_a_checkpoint_has_the_bytes_of_its_parts(model: str, entry: dict[str, Any], gb: float) -> None:
    profile = load_model(model)
    found = from_config({**profile.config, "quantization_config": entry})
    held = weight_bytes(by_precision(traced(profile, "decode"), found), found)
    assert held / 1e9 == pytest.approx(gb, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "gb"),
    [  # weights in billions by their files' lists of modules
        ("nvidia/Qwen3.6-35B-A3B-NVFP4", 1.279 + 32.847 * NVFP4_BYTES + 0.535 * 2),
        ("nvidia/MiniMax-M3-NVFP4", 413.12 * NVFP4_BYTES + 10.55 * (1 + 1 / 32) + 2.50 * 2),
        # with what is not built, a vision tower, 444 GB (InferenceX, minimaxm3_fp8_b200.sh)
        ("MiniMaxAI/MiniMax-M3-MXFP8", (413.12 + 10.55) * (1 + 1 / 32) + 2.50 * 2),
    ],
)
def test_a_release_of_mixed_precision_has_the_bytes_of_its_parts(name: str, gb: float) -> None:
    model, _ = named_model(name)
    stored = checkpoint(model)
    held = weight_bytes(by_precision(traced(model, "decode"), stored), stored)
    assert held / 1e9 == pytest.approx(gb, rel=2e-3)


class Rank(NamedTuple):
    """What a GPU holds, and where that was read or how it comes about."""

    model: str
    device: str
    gpus: int
    gib: float
    within: float = 0.01


RANKS = [
    # vllm-project/vllm/issues/6746: 57.75 GiB logged; attention and two MLPs in bf16
    Rank("meta-llama/Meta-Llama-3.1-405B-Instruct-FP8", "h100", 8, 57.25, 0.01),
    # vllm-project/vllm/issues/23278 logs 65.97 on one GPU; widths of a rank in multiples of 128 on Marlin
    Rank("gpt-oss-120b", "a100", 1, 65.9), Rank("gpt-oss-120b", "a100", 2, 34.3), Rank("gpt-oss-120b", "a100", 8, 8.6),
    # in multiples of 256 in TensorRT-LLM's kernels: 360 becomes 512
    Rank("gpt-oss-120b", "b200", 1, 68.6), Rank("gpt-oss-120b", "b200", 4, 17.2), Rank("gpt-oss-120b", "b200", 8, 11.3),
]  # fmt: skip


@pytest.mark.parametrize("rank", RANKS, ids=lambda rank: f"{rank.model}-{rank.device}-{rank.gpus}")
def test_a_gpu_holds_what_the_engine_makes_of_its_part(rank: Rank) -> None:
    held = tc.simulate(rank.model, device=rank.device, world_size=rank.gpus, allow_oversize=True).memory.weights
    assert held / 2**30 == pytest.approx(rank.gib, rel=rank.within)


CACHED = [
    ("qwen3-30b-a3b", "h100", 1, 48 * 2 * 4 * 128),  # layers, keys and values, heads, width
    ("deepseek-r1", "h200", 8, 61 * 576),  # vllm 0.24.0, v1/kv_cache_interface.py
    ("deepseek-v3.2", "h200", 8, 61 * (656 + 132)), ("deepseek-v3.2", "b200", 8, 61 * (576 + 132)),
]  # fmt: skip


@pytest.mark.parametrize(("model", "device", "gpus", "size"), CACHED)
def test_a_token_takes_what_the_engine_caches_it_in(model: str, device: str, gpus: int, size: int) -> None:
    """In fp8, latents whole on every rank."""
    found = tc.simulate(model, device=device, world_size=gpus, kv_dtype="fp8", context=4095)
    assert found.memory.kv_cache == 4096 * size


PUBLIC = {one.name: one.config for one in public_configs.load()}
NETWORKS: list[tuple[dict[str, Any], float]] = [
    ({"model_type": "qwen2_5_vl", "hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64,
      "num_hidden_layers": 80, "num_key_value_heads": 8, "vocab_size": 152064, "vision_config": {"depth": 32}}, 72.7),
    ({"model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_attention_heads": 16,
      "num_key_value_heads": 16, "num_hidden_layers": 16, "num_experts": 64, "num_experts_per_tok": 8,
      "vocab_size": 50304}, 6.919),
    ({"model_type": "gemma3", "hidden_size": 5376, "num_hidden_layers": 62, "num_attention_heads": 32, "head_dim": 128,
      "num_key_value_heads": 16, "intermediate_size": 21504, "vocab_size": 262208}, 27.0),
    ({"model_type": "minimax", "hidden_size": 6144, "intermediate_size": 9216, "num_attention_heads": 64,
      "head_dim": 128, "num_key_value_heads": 8, "num_hidden_layers": 80, "num_local_experts": 32,
      "num_experts_per_tok": 2, "vocab_size": 200064,
      "layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 10}, 456.1),
    ({"model_type": "hunyuan", "architectures": ["HunYuanMoEV1ForCausalLM"], "attention_head_dim": 128,
      "hidden_size": 4096, "intermediate_size": 3072, "moe_intermediate_size": [3072] * 32, "moe_topk": [8] * 32,
      "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32, "num_experts": 64,
      "num_shared_expert": [1] * 32, "tie_word_embeddings": True, "vocab_size": 128167, "use_cla": False,
      "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}}, 80.4),
    ({"model_type": "kimi_vl", "architectures": ["KimiVLForConditionalGeneration"], "vision_config": {"hidden_size": 8},
      "text_config": {
          "model_type": "deepseek_v3", "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
          "num_key_value_heads": 16, "intermediate_size": 11264, "moe_intermediate_size": 1408, "n_routed_experts": 64,
          "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "q_lora_rank": None,
          "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_group": 1,
          "topk_group": 1, "vocab_size": 163840}}, 15.96),
    (PUBLIC["phimoe"], 41.87),
]  # fmt: skip
"""As published, with the billions of parameters of the language model that their makers or weights say."""


@pytest.mark.parametrize(("config", "billions"), NETWORKS, ids=lambda one: str(one)[16:28])
def test_a_file_is_the_network_that_it_says(config: dict[str, Any], billions: float) -> None:
    """Its cut over ranks: ``test_cut.py``."""
    profile = ModelProfile(name="x", hf_id="x", description="", sources={}, config=config)
    assert traced(profile, "decode").total_params() / 1e9 == pytest.approx(billions, rel=2e-3)


def test_compressed_caches_bound_the_batch() -> None:
    """vllm-project/vllm/issues/51454: 20.4 sequences of 1M tokens on a group of 8 B200, 19.6 on each of 8 alone."""
    cut, own = (
        tc.simulate("deepseek-v4-flash", device="b200", world_size=8, dp=dp, ep=8, kv_dtype="fp8", context=2**20 - 1)
        for dp in (1, 8)
    )
    assert 15 <= own.largest_batch <= cut.largest_batch <= 45


def test_experts_in_fp4_are_read_in_less_time_than_in_bf16_where_they_are_unpacked() -> None:
    """Hopper has no FP4 arithmetic: weights of 0.56 bytes are read and unpacked, as MXFP4's are (vLLM 0.24.0,
    marlin_utils_fp4.py), which the whole step shows."""
    nvfp4, mxfp4, bf16 = (
        tc.simulate("qwen3-235b-a22b", device="h200", world_size=8, tp=4, dp=2, batch=16, quant=f"experts={one}").step_s
        for one in ("nvfp4", "mxfp4", "bf16")
    )
    assert nvfp4 < bf16 and nvfp4 == pytest.approx(mxfp4, rel=0.35)
