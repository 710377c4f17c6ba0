"""Small configs of several structurally different families: the big models' mechanisms, traced in no time."""

from __future__ import annotations

from typing import Any

_BASE: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
_GQA = {**_BASE, "num_key_value_heads": 2, "head_dim": 16}
_MLA = {
    **_BASE,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 4,
    "n_routed_experts": 16,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "n_shared_experts": 1,
}

SMALL: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"model_type": "deepseek_v3", **_MLA},
    "glm_moe_dsa": {
        "model_type": "glm_moe_dsa",
        **_MLA,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": 8,
        "qk_head_dim": 32,
        "head_dim": 16,
    },
    "mixtral": {
        "model_type": "mixtral",
        **_GQA,
        "num_hidden_layers": 3,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_GQA,
        "num_hidden_layers": 4,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        **_GQA,
        "num_hidden_layers": 4,
        "num_local_experts": 8,
        "num_experts_per_tok": 4,
        "sliding_window": 8,
    },
    "llama4_text": {
        "model_type": "llama4_text",
        **_GQA,
        "intermediate_size_mlp": 112,
        "num_hidden_layers": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 32,
    },
    "qwen3_next": {
        "model_type": "qwen3_next",
        **_GQA,
        "num_hidden_layers": 8,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 48,
        "linear_num_value_heads": 8,
        "linear_num_key_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "ernie4_5_moe": {
        "model_type": "ernie4_5_moe",
        **_GQA,
        "num_hidden_layers": 3,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": 48,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
    },
    "minimax_m2": {
        "model_type": "minimax_m2",
        **_GQA,
        "num_hidden_layers": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "llama": {"model_type": "llama", **_GQA, "num_hidden_layers": 3},
}
