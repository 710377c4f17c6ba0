"""Types of released files whose code is their own, as the types of transformers that are the same network.

Shapes and counts are the same, biases included; what differs (scales of residuals, a cap on logits, the order in which
a fused projection is stored) shapes no operation.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Foreign(NamedTuple):
    """``stock``: transformers' type. ``sizes``: its fields, as fields of the file, some times or by a number or another
    field (``"n_embd * 4"``). ``fixed``: fields that the code of the file's type fixes, or takes where it is silent."""

    stock: str
    sizes: dict[str, str] = {}  # noqa: RUF012  (never written to)
    fixed: dict[str, Any] = {}  # noqa: RUF012


GPT_NAMES = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}

FOREIGN_TYPES: dict[str, Foreign] = {
    **dict.fromkeys(("minimax_text_01", "minimax_m1"), Foreign("minimax")),
    "minimax_m3": Foreign("minimax_m3_vl_text"),
    **dict.fromkeys(("baichuan", "xverse"), Foreign("llama")),
    **dict.fromkeys(("internlm", "internlm2"), Foreign("llama", {"attention_bias": "bias"})),
    "exaone": Foreign("llama", {"num_hidden_layers": "num_layers", "hidden_act": "activation_function"}),
    "minicpm": Foreign("llama", fixed={"tie_word_embeddings": True}),
    "mimo": Foreign("qwen2"),
    "nemotron-nas": Foreign("llama"),
    "qwen": Foreign("qwen2", {"intermediate_size": "intermediate_size / 2",
                              "num_key_value_heads": "num_attention_heads"}),
    "chatglm": Foreign("glm", {"num_hidden_layers": "num_layers", "head_dim": "kv_channels",
                               "intermediate_size": "ffn_hidden_size", "vocab_size": "padded_vocab_size",
                               "num_key_value_heads": "multi_query_group_num", "attention_bias": "add_qkv_bias"}),
    "deepseek": Foreign("glm4_moe", {"head_dim": "hidden_size / num_attention_heads"}),
    "orion": Foreign("stablelm"),
    "phi3_v": Foreign("phi3"),
    "phi-msft": Foreign("phi", {**GPT_NAMES, "intermediate_size": "n_embd * 4"}),
}  # fmt: skip
"""Read in the files' own modeling code: modeling_TYPE.py beside each release."""

WHERE_SAID: dict[str, tuple[str, bool, Foreign]] = {
    "minicpm": ("num_experts", True, Foreign("mixtral", {"num_local_experts": "num_experts"},
                                             {"tie_word_embeddings": True})),
    "deepseek_v2": ("use_mla", False, FOREIGN_TYPES["deepseek"]),
}  # fmt: skip
"""Types that are another network where their file says a field, or says that it is off: experts of MiniCPM-MoE, heads
of their own in the place of latent attention (DeepSeek-VL2-tiny, DeepSeek-OCR)."""


def foreign_type(model_type: str, values: dict[str, Any]) -> Foreign | None:
    """What a file of ``model_type`` is under transformers' names; None where its type is transformers' own."""
    field, on, other = WHERE_SAID.get(model_type, ("", True, Foreign("")))
    return other if field and bool(values.get(field, not on)) is on else FOREIGN_TYPES.get(model_type)


def as_stock(model_type: str, values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Type and fields of transformers for a file of ``model_type``; both as they are where it is none of these.

    A size of the file that cannot be worked out, since it says none, stays unsaid.
    """
    foreign = foreign_type(model_type, values)
    if foreign is None:
        return model_type, values
    sizes = {name: _size(formula, values) for name, formula in foreign.sizes.items()}
    return foreign.stock, foreign.fixed | values | {name: size for name, size in sizes.items() if size is not None}


def _size(formula: str, values: dict[str, Any]) -> Any:
    """A field of the file, or what two fields or numbers give; None where one is not said."""
    first, *rest = (values.get(word, word) if word not in "*/" else word for word in formula.split())
    first = None if first == formula.split()[0] else first
    if not rest or not isinstance(first, int):
        return first
    by = int(rest[1]) if str(rest[1]).isdigit() else 0
    return None if not by else first * by if rest[0] == "*" else first // by
