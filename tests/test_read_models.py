"""Models of released files that are read in spite of what their classes do: loops, angles by data, shared weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tensorcast.cost.memory import cache_bytes, cache_entries, kv_bytes_per_token
from tensorcast.errors import InputError
from tensorcast.modeling.config import hf_config
from tensorcast.modeling.experts import adapt_experts
from tensorcast.profiles.model import ModelProfile
from tensorcast.trace.tracer import Phase, trace

SIZES = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
    "intermediate_size": 192, "vocab_size": 512, "max_position_embeddings": 256,
}  # fmt: skip
PHASES: tuple[Phase, ...] = ("prefill", "decode")
LINEAR: dict[str, Any] = {
    "model_type": "minimax", **SIZES, "num_local_experts": 8, "num_experts_per_tok": 2,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}  # fmt: skip


def profile(**config: Any) -> ModelProfile:
    return ModelProfile(name="x", hf_id="x", description="", sources={}, config=config)


def test_lightning_attention_is_linear_in_tokens_and_its_state_is_kept() -> None:
    """Each layer's state is heads x width x width in fp32, whatever the length (2501.08313)."""
    for phase in PHASES:
        table = trace(profile(**LINEAR), phase)
        scans = [op for op in table.ops if op.name == "linear_attention"]
        assert sum(table.count(op) for op in scans) == 3
    states = 3 * 8 * 16 * 16 * 4
    full = 2 * 4 * 16 * 2  # keys and values of the one full layer, bf16
    assert cache_bytes(table, "bf16", 5.0, 100.0) == 5 * (states + 100 * full)
    shard = trace(profile(**LINEAR), "decode", 4)
    assert cache_bytes(shard, "bf16", 5.0, 0.0) == 5 * states / 4


def test_a_release_with_code_of_its_own_is_the_type_that_transformers_has() -> None:
    released = {name: value for name, value in LINEAR.items() if name != "layer_types"} | {
        "model_type": "minimax_m1", "architectures": ["MiniMaxM1ForCausalLM"], "attn_type_list": [0, 0, 0, 1],
    }  # fmt: skip
    ours, theirs = trace(profile(**released), "decode"), trace(profile(**LINEAR), "decode")
    assert ours.total_params() == theirs.total_params()
    assert ours.layer_kinds == theirs.layer_kinds


LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("model_type", "rope", "more"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 2.0}, {}),
        ("llama", {"type": "longrope", "factor": 2.0, **LONG}, {}),
        ("phi3", {"type": "longrope", **LONG}, {}),
        ("phimoe", {"type": "longrope", "short_mscale": 1.2, "long_mscale": 1.2, **LONG},
         {"num_local_experts": 8, "num_experts_per_tok": 2}),
    ],
)  # fmt: skip
def test_angles_by_length_cost_what_usual_ones_do(model_type: str, rope: dict[str, Any], more: dict[str, Any]) -> None:
    config = {"model_type": model_type, **SIZES, **more, "pad_token_id": 0}
    scaled, plain = (trace(profile(**config, **scaling), "decode") for scaling in ({"rope_scaling": rope}, {}))
    assert [(op.name, op.outputs) for op in scaled.ops] == [(op.name, op.outputs) for op in plain.ops]


def test_a_head_width_under_a_released_name_is_read() -> None:
    """Hunyuan-A13B's file: lists by layer, attention_head_dim, dynamic RoPE with alpha."""
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    more = {"num_experts": 8, "moe_topk": [2] * 4, "moe_intermediate_size": [192] * 4, "attention_head_dim": 32}
    rope = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}
    table = trace(profile(model_type="hunyuan_v1_moe", **sizes, **more, rope_scaling=rope), "decode")
    attention = next(op for op in table.ops if op.name == "attention")
    assert attention.inputs[0].dims[-1].coef == 32
    assert table.facts.num_experts == 8 and table.facts.top_k == 2


DBRX: dict[str, Any] = {
    "model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40, "vocab_size": 100352, "max_seq_len": 32768,
    "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
}  # fmt: skip


def test_experts_that_lie_one_below_another_are_counted() -> None:
    """DBRX: 132B parameters, 36B active (databricks.com/blog, "Introducing DBRX"); 8 KV heads of 128 in 40 layers."""
    table = trace(profile(**DBRX), "decode")
    assert round(table.total_params() / 1e9) == 132
    assert round(table.active_params() / 1e9) == 36
    assert kv_bytes_per_token(table) == 40 * 2 * 8 * 128 * 2


def test_stacked_flat_experts_give_what_their_class_gives() -> None:
    torch.manual_seed(0)
    config = hf_config(profile(**DBRX | {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 512, "attn_config": {**DBRX["attn_config"],
        "kv_n_heads": 2}, "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2}}))  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.1)
    tokens = torch.randint(0, 512, (2, 9))
    with torch.no_grad():
        right = model(tokens).logits
        assert adapt_experts(model)
        torch.testing.assert_close(model(tokens).logits, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "deepseek_ocr2", "text_config": {"num_hidden_layers": 2, "hidden_size": 128}},
        {"model_type": "diffusion_gemma"},
        {"model_type": "jetmoe", **SIZES},
    ],
    ids=lambda config: config["model_type"],
)  # fmt: skip
def test_a_class_that_cannot_run_is_one_line(config: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        trace(profile(**config), "decode")
    assert "\n" not in str(caught.value)


def test_replies_by_diffusion_are_not_said_to_cost_decode_steps() -> None:
    """DiffusionGemma (transformers, modeling_diffusion_gemma.py): its decoder sees a canvas of tokens at every step."""
    text = {**SIZES, "num_experts": 16, "top_k_experts": 4, "moe_intermediate_size": 48}
    config = {"model_type": "diffusion_gemma", "canvas_length": 256, "text_config": text}
    for phase in ("prefill", "decode"):
        table = trace(profile(**config), phase)
        assert any("256 tokens at a time (canvas_length)" in line for line in table.facts.remarks)
    assert not any("canvas" in line for line in trace(profile(model_type="gemma2", **SIZES), "decode").facts.remarks)


def test_layers_that_share_a_block_hold_it_once() -> None:
    """Zamba: one transformer block at several depths (2405.16712)."""
    kinds = ["linear_attention", "hybrid"] * 2
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    more = {"layers_block_type": kinds, "n_mamba_heads": 2, "mamba_d_state": 16, "mamba_dt_rank": 8}
    once = trace(profile(model_type="zamba", **sizes, **more), "decode")
    shared = [param for param in once.params if "shared_transf" in param.name]
    assert shared
    assert all(param.kind == -1 and once.count(param) == 1 for param in shared)


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_embeddings_of_all_layers_are_cut_by_vocabulary(model_type: str) -> None:
    """vLLM 0.24.0, models/gemma3n.py and gemma4.py: embed_tokens_per_layer is a VocabParallelEmbedding."""
    sizes = {**SIZES, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 512, "num_kv_shared_layers": 0}
    more = {"layer_types": ["full_attention"] * 4, "activation_sparsity_pattern": [0.0] * 4}
    config = sizes | (more if model_type == "gemma3n_text" else {"layer_types": more["layer_types"]})
    shard = trace(profile(model_type=model_type, **config), "decode", 2)
    (embedding,) = [param for param in shard.params if "embed_tokens_per_layer" in param.name]
    assert embedding.numel * 2 == embedding.full_numel == 512 * 4 * 16


def test_compressed_caches_are_counted() -> None:
    """Entries of 584 bytes in FP8 for 4 or 128 tokens, indexer keys of 132 bytes with those of 4 (DeepSeek-V4)."""
    config = {
        "model_type": "deepseek_v4", "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 512, "vocab_size": 512, "qk_rope_head_dim": 64, "q_lora_rank": 64,
        "o_lora_rank": 32, "o_groups": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "moe_intermediate_size": 64, "index_head_dim": 128, "index_n_heads": 4, "index_topk": 16, "hc_mult": 2,
        "sliding_window": 128, "compress_ratios": [0, 4, 128], "num_hash_layers": 1, "max_position_embeddings": 2048,
    }  # fmt: skip
    table = trace(profile(**config), "decode")
    growing = [entry.per_token for entry in cache_entries(table, "fp8") if not entry.limit and entry.per_token]
    assert growing == pytest.approx([(584 + 132) / 4, 584 / 128])
    windows = [entry for entry in cache_entries(table, "fp8") if entry.limit]
    assert [(entry.per_token, entry.limit) for entry in windows] == [(584, 128)] * 3
