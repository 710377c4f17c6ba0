"""Values of a Hugging Face config that no model can have, found before anything is built."""

from __future__ import annotations

import math
from typing import Any

LARGEST = 2**24
"""Above every width, vocabulary and number of heads of a model; more is a slip of the keyboard."""

LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
HEADS = ("num_attention_heads", "n_heads", "n_head")
KV_HEADS = ("num_key_value_heads", "kv_n_heads", "num_kv_heads", "n_kv_heads")
EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = (
    "num_experts_per_tok", "experts_per_token", "top_k_experts", "moe_k", "moe_topk", "num_experts_per_token",
    "moe_top_k",
)  # fmt: skip
EXPERT_WIDTHS = ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size")
"""Names that released configs give a size; where a file has several, the first counts."""

BOUNDS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(LAYERS, (1, 1024)),
    **dict.fromkeys((*HEADS, *KV_HEADS), (1, 2**16)),
    **dict.fromkeys(EXPERTS, (0, 2**14)),
    **dict.fromkeys((*EXPERTS_PER_TOKEN, *EXPERT_WIDTHS), (0, LARGEST)),
    **dict.fromkeys(
        "hidden_size d_model n_embd vocab_size intermediate_size ffn_dim ffn_hidden_size attention_head_dim "
        "linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim "
        "decoder_sparse_step interleave_moe_layer_step "
        "mamba_num_heads mamba_n_heads mamba_head_dim mamba_d_state mamba_d_conv mamba_expand ssm_state_size "
        "conv_kernel".split(), (1, LARGEST),
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), (1, 2**40)),
    **dict.fromkeys(
        "n_shared_experts num_shared_experts first_k_dense_replace num_dense_layers num_nextn_predict_layers "
        "shared_expert_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size share_expert_dim "
        "q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim head_dim index_topk "
        "index_n_heads index_head_dim n_group topk_group".split(), (0, LARGEST),
    ),
}  # fmt: skip
"""Least and most of what shapes a model, by field; a list has a value per layer, None says nothing."""

LANGUAGE_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where a config of several models keeps that of its language model."""
_PARTS = (*LANGUAGE_PARTS, "attn_config", "ffn_config")
DEEPEST = 64
"""Levels of nesting; the deepest config.json known has six."""


def is_one_of(classes: tuple[str, ...], config: dict[str, Any]) -> bool:
    """Whether the model with this ``config`` is of one of these classes; where none is named, any model is."""
    return not classes or bool(set(classes) & set(config.get("architectures") or ()))


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a Hugging Face config: all of it, unless the model is multimodal."""
    for name in LANGUAGE_PARTS:
        if isinstance(inner := config.get(name), dict):
            return text_of(inner)
    return config


WORDS = {"model_type": "qwen3_moe", "torch_dtype": "bfloat16", "dtype": "bfloat16"}
"""Fields that say a word, with one."""

ORIGINAL = "original_max_position_embeddings"


def check_values(config: dict[str, Any], where: str = "") -> None:
    """Raise ValueError, one line with the field, its value and what would be right, for what cannot be."""
    if not where and _deeper(config, DEEPEST):
        raise ValueError(f"more than {DEEPEST} levels of nesting: no model's config")
    for name, value in config.items():
        label, listed = where + name, value if isinstance(value, list) else [value]
        if name in BOUNDS:
            least, most = BOUNDS[name]
            for one in listed:
                _check_size(label, one, 0 if isinstance(value, list) else least, most)
        elif name == "architectures" and any(not isinstance(one, str) for one in listed if value is not None):
            raise ValueError(f"{label} = {_short(value)}: must be a list of class names")
        elif name in WORDS and not isinstance(value, str | None):
            raise ValueError(f"{label} = {_short(value)}: must be a word, such as {WORDS[name]}")
        elif name == "quantization_config" and not isinstance(value, dict | None):
            raise ValueError(f"{label} {_short(value)}: must be an object with quant_method")
        elif name in _PARTS or name in ("rope_scaling", "rope_parameters"):
            if not isinstance(value, dict | None):
                raise ValueError(f"{label} = {_short(value)}: must be an object of fields")
            if name in _PARTS and value:
                check_values(value, f"{label}.")
            elif value:
                _check_factor(f"{label}.factor", value.get("factor"))
                _check_factor(f"{label}.{ORIGINAL}", value.get(ORIGINAL))
    _check_together(config, where)


def _deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(levels == 0 or _deeper(one, levels - 1) for one in inner if isinstance(one, dict | list))


def _check_size(name: str, value: Any, least: int, most: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} = {_short(value)}: must be a whole number")
    if not least <= value <= most:
        bound = f"least {least}" if value < least else f"most {most}"
        raise ValueError(f"{name} = {_short(value)}: must be at {bound}")


def _check_factor(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value < math.inf):
        raise ValueError(f"{name} = {_short(value)}: must be a number above 0")


def _check_together(config: dict[str, Any], where: str) -> None:
    """Sizes that must fit each other: experts and choices, their groups, query and KV heads."""
    experts_name, experts = _first(config, EXPERTS)
    if experts:
        chosen_name, chosen = _first(config, EXPERTS_PER_TOKEN)
        if chosen is not None and not 1 <= chosen <= experts:
            bound = f"most the {experts} experts" if chosen > experts else "least 1"
            raise ValueError(f"{where}{chosen_name} = {chosen}: must be at {bound}")
        width_name, width = _first(config, EXPERT_WIDTHS)
        if width == 0:
            raise ValueError(f"{where}{width_name} = 0: must be at least 1, for {experts_name} = {experts}")
        _check_groups(config, where, experts, chosen_name, chosen or 0)
    rank, roped = config.get("kv_lora_rank"), config.get("qk_rope_head_dim")
    if rank == 0 and roped and config.get("use_mla") is not False:
        raise ValueError(f"{where}kv_lora_rank = 0: must be at least 1, for qk_rope_head_dim = {roped}")
    if rank:  # latent attention has neither KV heads nor one width of a head
        if config.get("q_lora_rank") == 0:
            raise ValueError(f"{where}q_lora_rank = 0: must be at least 1, or null for queries made in one step")
        for name in ("v_head_dim", "qk_nope_head_dim"):
            if config.get(name) == 0:
                raise ValueError(f"{where}{name} = 0: must be at least 1, for kv_lora_rank = {rank}")
        return
    if config.get("head_dim") == 0:
        raise ValueError(f"{where}head_dim = 0: must be at least 1")
    _, heads = _first(config, HEADS)
    kv_name, kv = _first(config, KV_HEADS)
    if heads and kv and (kv > heads or heads % kv):
        raise ValueError(f"{where}{kv_name} = {kv}: must divide the {heads} attention heads")


def _check_groups(config: dict[str, Any], where: str, experts: int, chosen_name: str, chosen: int) -> None:
    """Groups of experts, of which some are picked for a token before any expert is."""
    groups, picked = (1 if config.get(name) is None else config[name] for name in ("n_group", "topk_group"))
    said = f"{where}n_group = {groups}, topk_group = {picked}"
    if groups <= 1:
        return
    if experts % groups or not 1 <= picked <= groups:
        raise ValueError(f"{said}: {experts} experts must divide into the groups, and no more be picked than are")
    if chosen > (most := picked * experts // groups):
        bound = f"must be at most {most}, the experts of the groups picked ({said})"
        raise ValueError(f"{where}{chosen_name} = {chosen}: {bound}")


def _first(config: dict[str, Any], names: tuple[str, ...]) -> tuple[str, int | None]:
    """The first field that is a number, and its name."""
    return next(((name, config[name]) for name in names if isinstance(config.get(name), int)), (names[0], None))


def _short(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**30:  # Python writes no number of thousands of digits
        return "a number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
