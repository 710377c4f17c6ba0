"""From a model profile to the Hugging Face config of one tensor-parallel rank.

A tensor-parallel rank of a transformer is a narrower transformer: fewer heads, narrower MLPs, a slice of the
vocabulary. So sharding is arithmetic on config fields whose names say *heads* or *width*, with no rule per model;
``trace/sharding.py`` then finds out which weights became column- or row-parallel.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto

from tensorcast.errors import InputError
from tensorcast.modeling.custom import CustomConfig, custom_config
from tensorcast.profiles.model import EXPERTS, EXPERTS_PER_TOKEN, ModelProfile

QUERY_HEADS = (
    "num_attention_heads",
    "n_heads",
    "n_head",
    "num_global_attention_heads",
    "swa_num_attention_heads",
    "num_sliding_attention_heads",
    "num_attention_heads_per_layer",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_num_heads",
    "mamba_num_heads",
    "mamba_n_heads",
    "o_groups",
)
KEY_VALUE_HEADS = (
    "num_key_value_heads",
    "num_global_key_value_heads",
    "swa_num_key_value_heads",
    "kv_n_heads",
    "n_groups",
    "mamba_n_groups",
)
GROUPS = ("n_groups", "mamba_n_groups")
"""Of state-space layers: one group is copied to all ranks, several are not (vLLM 0.24.0, layers/mamba/mamba_mixer2.py;
SGLang 0.5.14, srt/layers/attention/mamba/mamba.py)."""
WIDTHS = (
    "intermediate_size",
    "intermediate_size_mlp",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
    "shared_experts_intermediate_size",
    "share_expert_dim",
    "ffn_hidden_size",
    "ffn_dim",
    "expert_ffn_hidden_size",
    "dense_intermediate_size",
    "prefix_dense_intermediate_size",
    "mlp_intermediate_size",
    "mamba_d_ssm",
    "vocab_size",
)
PADDED = ("vocab_size",)
"""Widths that engines pad to a multiple of tp; every other one must divide."""


def hf_config(profile: ModelProfile) -> PreTrainedConfig:
    """The text config of a profile, as transformers reads it. Raises :class:`InputError` if it cannot."""
    if profile.model:
        return custom_config(profile)
    values = copy.deepcopy(profile.config)  # transformers writes into nested dicts; the profile keys the cache
    named = values.pop("architectures", None) or []
    model_type = _known_type(values.pop("model_type"), named)
    for noise in ("auto_map", "transformers_version"):
        values.pop(noise, None)
    if isinstance(text := values.get("text_config"), dict) and "tie_word_embeddings" in values:
        text.setdefault("tie_word_embeddings", values["tie_word_embeddings"])  # said of the whole (Qwen3-VL)
    try:
        config = AutoConfig.for_model(model_type, **values)
    except Exception as reason:
        line = " ".join(str(reason).split())[:200]
        raise InputError(
            f"model {profile.name}: transformers rejects config (model_type={model_type!r}): {line}"
        ) from None
    text_config = config.get_text_config(decoder=True)
    if problem := _no_decoder(config, text_config, named):
        raise InputError(f"model {profile.name}: {problem}; only causal language models can be priced")
    for size in ("num_hidden_layers", "hidden_size", "vocab_size"):
        value = field(text_config, size)
        if isinstance(value, int) and value < 1:
            raise InputError(f"model {profile.name}: {size} = {value}: must be at least 1")
    chosen = field(text_config, *EXPERTS_PER_TOKEN)
    experts = field(text_config, *EXPERTS)
    if isinstance(chosen, int) and isinstance(experts, int) and chosen > experts > 0:
        raise InputError(f"model {profile.name}: num_experts_per_tok = {chosen}: must be at most the {experts} experts")
    # An index into a vocabulary that sharding makes smaller; it shapes no op. Some configs insist on an integer.
    object.__setattr__(text_config, "pad_token_id", None)
    return text_config


def _no_decoder(config: PreTrainedConfig, text: PreTrainedConfig, architectures: list[str]) -> str:
    """Why a config is no causal language model's, by transformers' own lists of classes; empty if it is one.

    An architecture that transformers does not know (remote code), or a bare trunk, is taken at its config's word.
    """
    for part in (config, text):
        if getattr(part, "is_encoder_decoder", False):
            return f"{part.model_type} is an encoder and a decoder (is_encoder_decoder)"
        masked = part.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        if masked and getattr(part, "is_decoder", True) is False:
            return f"{part.model_type} is an encoder (is_decoder is false)"
    others = {
        name
        for lists, mapping in vars(modeling_auto).items()
        if lists.startswith("MODEL_FOR_") and lists.endswith("_MAPPING_NAMES") and lists not in _GENERATING
        for name in _class_names(mapping)
    }
    generating = {name for lists in _GENERATING for name in _class_names(getattr(modeling_auto, lists))}
    wrong = [name for name in architectures if name in others - generating]
    return f"architectures: {wrong[0]} does not generate text" if wrong else ""


_GENERATING = tuple(f"MODEL_FOR_{task}_MAPPING_NAMES" for task in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"))
"""transformers' lists of classes that make one token after another."""


def _class_names(mapping: dict[str, str | tuple[str, ...]]) -> Iterator[str]:
    for names in mapping.values():
        yield from (names,) if isinstance(names, str) else names


def _known_type(model_type: str, architectures: list[str]) -> str:
    """``model_type``, or for one with remote code only, the type whose stock class the config names (Kimi-K2)."""
    if model_type in CONFIG_MAPPING or not architectures:
        return model_type
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    stock = {name: kind for kind, name in causal.items() if isinstance(name, str)}
    return stock.get(architectures[0], model_type)


def _nested(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _nested(value)


def _divide(name: str, value: Any, tp: int) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_divide(name, item, tp) for item in value)
    if name in KEY_VALUE_HEADS:
        if value % tp and (tp % value or (name in GROUPS and value > 1)):
            copied = "" if name in GROUPS else " or a multiple of it"
            raise InputError(f"tp={tp}: {name}={value}: choose a tp that divides {value}{copied}")
        return max(1, value // tp)  # fewer KV heads than ranks: engines replicate them
    if name in PADDED:
        return -(-value // tp)
    if value % tp:
        raise InputError(f"tp={tp}: {name}={value} does not divide by it; choose a tp that divides {value}")
    return value // tp


def narrow(config: PreTrainedConfig, tp: int) -> PreTrainedConfig:
    """A copy of ``config`` for one of ``tp`` ranks. Raises :class:`InputError` where a size does not divide."""
    if tp == 1:
        return config
    narrowed = copy.deepcopy(config)
    if isinstance(narrowed, CustomConfig):
        object.__setattr__(narrowed, "arguments", config.of_rank(tp))
        return narrowed
    for part in _nested(narrowed):
        per_layer: Any = _per_layer(part, tp)
        fields = vars(part)
        if fields.get("head_dim") is None and fields.get("num_attention_heads") and fields.get("hidden_size"):
            object.__setattr__(part, "head_dim", fields["hidden_size"] // fields["num_attention_heads"])
        for name in (*QUERY_HEADS, *KEY_VALUE_HEADS, *WIDTHS):
            value = fields.get(name)
            if isinstance(value, (int, list, tuple)) and not isinstance(value, bool) and value:
                object.__setattr__(part, name, _divide(name, value, tp))
        if per_layer:
            part.per_layer_config = per_layer
    return narrowed


def _per_layer(config: PreTrainedConfig, tp: int) -> dict[int, dict[str, Any]]:
    """Fields that transformers lets vary by layer (Gemma-4's global KV heads), narrowed layer by layer."""
    if not getattr(config, "is_heterogeneous", False):
        return {}
    sharded = {*QUERY_HEADS, *KEY_VALUE_HEADS, *WIDTHS}
    return {
        i: {
            name: _divide(name, getattr(layer, name), tp) if name in sharded else getattr(layer, name)
            for name in config.per_layer_attributes or ()
        }
        for i, layer in enumerate(config.per_layer_config)
    }


def field(config: PreTrainedConfig, *names: str, default: Any = None) -> Any:
    """The first of ``names`` that the config sets."""
    for name in names:
        # A field that varies by layer refuses getattr on the whole config; its stored value is the general one.
        value = vars(config).get(name)
        value = getattr(config, name, None) if value is None else value
        if value is not None:
            return value
    return default
