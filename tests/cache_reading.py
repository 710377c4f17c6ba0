"""What a token adds to a cache, read in a config by hand: nothing here is taken from traces."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig

STATES = frozenset("linear_attention mamba mamba2 conv moe mlp recurrent".split())
"""Layer types that keep no keys and values."""

NO_ATTENTION = frozenset("mamba mamba2 falcon_mamba".split())

QUERY_HEADS = (
    "num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "attention_heads", "num_heads",
)  # fmt: skip

WINDOWED = frozenset("sliding_attention hybrid_sliding".split())


def _first(values: dict[str, Any], *names: str, default: Any = None) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), default)


def _layers(values: dict[str, Any]) -> list[str]:
    """The type of every layer that attends."""
    depth = _first(values, "num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "num_layers", default=0)
    types = _first(values, "layer_types", "layers_block_type")
    if types is None and (period := values.get("attn_layer_period")):
        types = ["full" if i % period == values["attn_layer_offset"] else "mamba" for i in range(depth)]
    if types is None and "attn_layer_indices" in values:
        types = ["full" if i in (values["attn_layer_indices"] or ()) else "mamba" for i in range(depth)]
    types = list(types) if types is not None else ["full"] * depth
    if passes := values.get("loop_num_passes"):  # each pass over them keeps keys of its own (Inkling-2-Mini)
        types += types[values["loop_layer_index_start"] : values["loop_layer_index_end"]] * (passes - 1)
    if values.get("recurrent_kv_cache_mode") == "per_loop":  # the same (Dory)
        first, count = values["n_input_layers"], values["n_recurrent_layers"]
        types += types[first : first + count] * (values["n_recurrent_loops"] - 1)
    own = len(types) - (values.get("num_kv_shared_layers") or 0)  # the last ones read what earlier ones keep
    crossed = values.get("cross_attention_layers") or ()  # over pictures
    return [kind for i, kind in enumerate(types[:own]) if kind not in STATES and i not in crossed]


def _heads(values: dict[str, Any], kind: str) -> tuple[int, int, int]:
    """KV heads and the widths of their keys and values."""
    queries = _first(values, *QUERY_HEADS, default=0)
    heads = _first(values, "num_key_value_heads", "num_kv_heads", default=queries)
    if values.get("multi_query") and not values.get("new_decoder_architecture"):  # Falcon, BigCode
        heads = 1
    stream = _first(values, "hidden_size", "n_embd", "d_model", default=0)
    width = _first(values, "attention_head_dim", "head_dim", default=stream // max(queries, 1))
    value = values.get("v_head_dim") or width  # 0 of a file without latent attention (DeepSeek-VL2-tiny)
    if kind in WINDOWED:
        heads = _first(values, "swa_num_key_value_heads", default=heads)
        width, value = _first(values, "swa_head_dim", default=width), _first(values, "swa_v_head_dim", default=value)
    elif values.get("global_head_dim"):
        heads = _first(values, "num_global_key_value_heads", default=heads)
        width = value = values["global_head_dim"]
    return heads, width, value


def _of_layer(layer: Any) -> tuple[int, int, int]:
    """The same of a layer whose config is its own (Gemma-4, MiMo-V2)."""
    return layer.num_key_value_heads, layer.head_dim, getattr(layer, "v_head_dim", None) or layer.head_dim


def indexer_bytes(width: int) -> float:
    """One key per token in fp8 with a scale per 128."""
    return width + 4.0 * math.ceil(width / 128)


def _latent(values: dict[str, Any], kinds: list[str], own: list[Any]) -> float:
    """Latent vector and rotary part of every layer, and keys of the indexers that layers have of their own,
    one for ``index_kpool`` tokens (GLM-5.3-Flash); layers of linear attention keep states alone."""
    rope = values["qk_rope_head_dim"]
    turned = values.get("no_rope_layers") or [1] * len(kinds)  # 1: with rotary embedding
    indexers = values.get("indexer_types") or ["full"] * len(kinds)
    total = 0.0
    for i, kind in enumerate(kinds):
        latent = values["kv_lora_rank"] if own[i] is None else own[i].kv_lora_rank
        total += 2.0 * (latent + (rope if turned[i] else 0))
        if values.get("index_head_dim") and kind not in WINDOWED and indexers[i] == "full":
            total += indexer_bytes(values["index_head_dim"]) / values.get("index_kpool", 1)
    return total


def _compressed(values: dict[str, Any], kinds: list[str]) -> float:
    """DeepSeek-V4: one vector is key and value; of 4 or 128 tokens one more is kept, with those of 4 an indexer key."""
    vector, key = 2.0 * values["head_dim"], indexer_bytes(values["index_head_dim"])
    more = {"compressed_sparse_attention": (vector + key) / 4, "heavily_compressed_attention": vector / 128}
    return sum(vector + more.get(kind, 0.0) for kind in kinds)


def cache_bytes_per_token(config: PreTrainedConfig, tp: int = 1) -> float:
    """Bytes in bf16 that a token adds on one of ``tp`` ranks, before any window is full."""
    values = config.to_dict()
    kinds = [] if config.model_type in NO_ATTENTION else _layers(values)
    varies = getattr(config, "is_heterogeneous", False)
    if config.model_type == "longcat_flash":  # two attentions in each layer
        kinds = ["full"] * 2 * values["num_layers"]
    own = list(config.per_layer_config) if varies else [None] * len(kinds)
    if config.model_type == "deepseek_v4":
        return _compressed(values, kinds)
    if values.get("kv_lora_rank"):
        return _latent(values, kinds, own)
    total = 0.0
    for kind, layer in zip(kinds, own, strict=False):
        heads, key, value = _heads(values, kind) if layer is None else _of_layer(layer)
        if config.model_type == "mimo_v2_flash" and kind in WINDOWED:  # its class doubles them there
            heads = 2 * values["num_key_value_heads"]
        total += 2.0 * max(heads / tp, 1) * (key + value)
        if values.get("index_topk_blocks") and "sparse" in str(kind):  # a key in bf16 for the indexer of blocks
            total += 2.0 * values["index_head_dim"]
        if values.get("indexer_budget") and kind == "indexed_attention":  # Qwen4: a key in bf16 for several tokens
            total += 2.0 * values["indexer_head_dim"] / values["indexer_compress_ratio"]
    return total
