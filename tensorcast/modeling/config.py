"""From a model profile to the Hugging Face config of one tensor-parallel rank.

A tensor-parallel rank of a transformer is a narrower transformer: fewer heads, narrower MLPs, a slice of the
vocabulary. So sharding is arithmetic on config fields whose names say *heads* or *width*, with no rule per model;
``trace/sharding.py`` then finds out which weights became column- or row-parallel.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto

from tensorcast.errors import InputError
from tensorcast.modeling.custom import CustomConfig, custom_config
from tensorcast.modeling.described.config import DescribedConfig, described_config
from tensorcast.modeling.foreign_types import as_stock, foreign_type
from tensorcast.modeling.layer_forms import LayerForm, layer_forms
from tensorcast.modeling.stated_sizes import (
    CORE,
    EXPERTS,
    FOREIGN,
    defaults_taken,
    dropped,
    foreign_architecture,
    missing,
    shared_of_no_class,
    stated_sparse,
)
from tensorcast.profiles.config_values import LANGUAGE_PARTS, text_of
from tensorcast.profiles.model import ModelProfile

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
    "n_mamba_heads",
    "num_heads",
    "attention_heads",
    "decoder_attention_heads",
    "o_groups",
)
KEY_VALUE_HEADS = (
    "num_key_value_heads",
    "num_global_key_value_heads",
    "swa_num_key_value_heads",
    "kv_n_heads",
    "num_kv_heads",
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
    "decoder_ffn_dim",
    "dff",
    "n_inner",
    "expert_ffn_hidden_size",
    "dense_intermediate_size",
    "prefix_dense_intermediate_size",
    "mlp_intermediate_size",
    "mamba_d_ssm",
    "vocab_size",
    "vocab_size_per_layer_input",
)
SHARDED = frozenset((*QUERY_HEADS, *KEY_VALUE_HEADS, *WIDTHS))
PADDED = ("vocab_size", "vocab_size_per_layer_input")
"""Widths that engines pad to a multiple of tp; every other one must divide."""


def hf_config(profile: ModelProfile) -> PreTrainedConfig:
    """The text config of a profile, as transformers reads it. Raises :class:`InputError` if it cannot.

    What a reader may not expect of it is in its ``remarks``: sizes that the file leaves to transformers' defaults, and
    parts that are not the language model's.
    """
    if profile.model:
        return custom_config(profile)
    if profile.network:
        return described_config(profile)
    values = copy.deepcopy(profile.config)  # transformers writes into nested dicts; the profile keys the cache
    remarks = _other_parts(values)
    model_type, values, named = _language_part(values)
    renamed = model_type != profile.config["model_type"]
    if wrong := "" if renamed or model_type not in CONFIG_MAPPING else foreign_architecture(model_type, named):
        problem = f"architectures: {wrong} is none of transformers' classes of model_type {model_type!r}"
        raise InputError(f"model {profile.name}: {problem} (transformers {transformers.__version__})")
    said = text_of(values)
    config = _from_values(profile.name, model_type, values)
    text_config = config.get_text_config(decoder=True)
    problem = dropped(said, text_config)
    if problem and said is values and "text_config" in type(config).sub_configs:  # sizes of the text, laid flat
        config = _from_values(profile.name, model_type, {"text_config": values})
        text_config = config.get_text_config(decoder=True)
        problem = dropped(said, text_config)
    unsaid = missing(said, text_config)
    unsaid_others = defaults_taken(said, text_config)
    experts = [name for name in unsaid if any(name in CORE[size] for size in EXPERTS)]
    if sizes := [name for name in unsaid if name not in experts] if said is values else []:
        problem = f"config.json does not say {', '.join(sizes)} (model_type {model_type!r})"
    if problem := _no_decoder(config, text_config, named) or problem:
        raise InputError(f"model {profile.name}: {problem}")
    if others := ({} if said is values else unsaid) | unsaid_others:
        taken = ", ".join(f"{name} = {value}" for name, value in others.items())
        remarks.append(f"not in config.json, so transformers' defaults of {text_config.model_type}: {taken}")
    if not hasattr(text_config, "tie_word_embeddings") and isinstance(values.get("tie_word_embeddings"), bool):
        # a flat file under a wrapper's type, whose text part has no word of its own for it (Qwen2-VL)
        object.__setattr__(text_config, "tie_word_embeddings", values["tie_word_embeddings"])
    object.__setattr__(text_config, "unsaid_experts", "" if said is not values else ", ".join(experts))
    object.__setattr__(text_config, "shared_of_no_class", shared_of_no_class(said, text_config))
    object.__setattr__(text_config, "stated_sparse", stated_sparse(said, text_config))
    if said.get("block_configs"):
        object.__setattr__(text_config, "layer_forms", layer_forms(said))
    if twice := [name for name in CORE if said.get(name) not in (None, values.get(name)) and values.get(name)]:
        both = ", ".join(f"{name} = {values[name]}, not {said[name]}" for name in twice)
        remarks.append(f"around its language model config.json says {both}: the language model's own is priced")
    # An index into a vocabulary that sharding makes smaller; it shapes no op. Some configs insist on an integer.
    object.__setattr__(text_config, "pad_token_id", None)
    object.__setattr__(text_config, "remarks", tuple(remarks))
    return text_config


def _plain(values: dict[str, Any]) -> None:
    """Take angles that depend on the longest position, which is data, for usual ones: they shape no op and no cache.

    And an activation that a file names in a word (DBRX) as the object that its class takes.
    """
    for name, inner in values.items():
        if isinstance(inner, dict):
            _plain(inner)
        elif name == "ffn_act_fn" and isinstance(inner, str):
            values[name] = {"name": inner}
        elif name in ("rope_type", "type") and inner in ("longrope", "su", "dynamic"):
            values[name] = "default"


def _tie_of_the_whole(values: dict[str, Any]) -> None:
    """Where a file has a text part, the head, and so its tie to the embedding, is that of the part around it."""
    for inner in (values[name] for name in LANGUAGE_PARTS if isinstance(values.get(name), dict)):
        if isinstance(tied := values.get("tie_word_embeddings"), bool):
            inner["tie_word_embeddings"] = inner.get("tie_word_embeddings", tied) if _holds_text(inner) else tied
        _tie_of_the_whole(inner)


def _holds_text(values: dict[str, Any]) -> bool:
    return any(isinstance(values.get(name), dict) for name in LANGUAGE_PARTS)


def _from_values(name: str, model_type: str, values: dict[str, Any]) -> PreTrainedConfig:
    _tie_of_the_whole(values)
    _plain(values)
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, CONFIG_MAPPING, n=3)
        line = f"{transformers.__version__} has no such type{': did you mean ' if near else ''}{' or '.join(near)}"
        raise InputError(f"model {name}: transformers rejects config (model_type={model_type!r}): {line}")
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as reason:
        line = " ".join(str(reason).split())[:200]
        raise InputError(f"model {name}: transformers rejects config (model_type={model_type!r}): {line}") from None


def _language_part(config: dict[str, Any]) -> tuple[str, dict[str, Any], list[str]]:
    """Type, fields and architectures that transformers builds the language model from.

    Of a wrapper that it does not know (Kimi-VL, InternVL), or has a text model's type for (Ministral-3), they are those
    of the text model inside, if it knows that.
    """
    named, model_type = config.pop("architectures", None) or [], config.pop("model_type")
    for noise in ("auto_map", "transformers_version"):
        config.pop(noise, None)
    known, config = as_stock(model_type, config)
    known = _known_type(known, named)
    text = text_of(config)
    if not _reads_parts(known) and text is not config and isinstance(text.get("model_type"), str):
        if "tie_word_embeddings" in config:
            text.setdefault("tie_word_embeddings", config["tie_word_embeddings"])
        inner = text["model_type"], text.get("architectures") or []
        if foreign_type(inner[0], text) or _known_type(*inner) in CONFIG_MAPPING:
            return _language_part(text)
    fields = CONFIG_MAPPING[known].__dataclass_fields__ if known in CONFIG_MAPPING else {}
    if config.get("block_configs"):  # whose widest layer stands for all, until each has its own
        config["num_key_value_heads"], config["intermediate_size"] = map(max, zip(*layer_forms(config), strict=True))
    if isinstance(kinds := config.get("attn_type_list"), list) and "layer_types" in fields:  # MiniMax-Text-01, -M1
        config.setdefault("layer_types", ["full_attention" if kind else "linear_attention" for kind in kinds])
    for name, own in FOREIGN.items():
        if own in fields and name not in fields and config.get(name) and config.get(own) is None:
            config[own] = config[name]
    return known, config, named


def _reads_parts(model_type: str) -> bool:
    """Whether transformers' class of a type holds a text model's config inside its own."""
    return model_type in CONFIG_MAPPING and bool(set(LANGUAGE_PARTS) & set(CONFIG_MAPPING[model_type].sub_configs))


def _other_parts(config: dict[str, Any]) -> list[str]:
    """Lines on parts of a config that are no language model's: encoders of pictures and sound, and a decoder that fills
    blocks of tokens step by step (DiffusionGemma), whose prompts alone are read as a language model's."""
    parts = [name for name, value in config.items() if isinstance(value, dict) and re.search(OTHER_PARTS, name)]
    found = [f"priced as its language model; not counted: {', '.join(parts)}"] if parts else []
    if block := config.get("canvas_length"):
        how = f"by diffusion, {block} tokens at a time (canvas_length)"
        found.append(f"replies are written {how}: decode steps here are not what they cost")
    return found


OTHER_PARTS = "vision|visual|vit_|audio|speech|talker|code2wav|token2wav|sound"
"""What names the config of an encoder beside the language model, or of a speaker behind it."""


def _no_decoder(config: PreTrainedConfig, text: PreTrainedConfig, architectures: list[str]) -> str:
    """Why a config is no causal language model's, by transformers' own lists of classes; empty if it is one.

    An architecture that transformers does not know (remote code), or a bare trunk, is taken at its config's word.
    """
    for part in (config, text):
        if getattr(part, "is_encoder_decoder", False):
            return f"{part.model_type} is an encoder and a decoder (is_encoder_decoder); {ONLY}"
        masked = part.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        if masked and getattr(part, "is_decoder", True) is False:
            return f"{part.model_type} is an encoder (is_decoder is false); {ONLY}"
    others = {
        name
        for lists, mapping in vars(modeling_auto).items()
        if lists.startswith("MODEL_FOR_") and lists.endswith("_MAPPING_NAMES") and lists not in _GENERATING
        for name in _class_names(mapping)
    }
    generating = {name for lists in _GENERATING for name in _class_names(getattr(modeling_auto, lists))}
    wrong = [name for name in architectures if name in others - generating]
    return f"architectures: {wrong[0]} does not generate text; {ONLY}" if wrong else ""


ONLY = "only causal language models can be priced"
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


def nested(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and those inside it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from nested(value)


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
    if isinstance(narrowed, DescribedConfig):
        return narrowed.divided(lambda name, value: _divide(name, value, tp) if name in SHARDED else value)
    for part in nested(narrowed):
        per_layer: Any = _per_layer(part, tp)
        fields = vars(part)
        works_out = fields.get("head_dim") is None and not isinstance(getattr(type(part), "head_dim", None), property)
        if works_out and fields.get("num_attention_heads") and fields.get("hidden_size"):
            object.__setattr__(part, "head_dim", fields["hidden_size"] // fields["num_attention_heads"])
        for name in (*QUERY_HEADS, *KEY_VALUE_HEADS, *WIDTHS):
            value = fields.get(name)
            if isinstance(value, (int, list, tuple)) and not isinstance(value, bool) and value:
                object.__setattr__(part, name, _divide(name, value, tp))
        if forms := fields.get("layer_forms"):
            cut = [
                LayerForm(
                    kv and _divide("num_key_value_heads", kv, tp), width and _divide("intermediate_size", width, tp)
                )
                for kv, width in forms
            ]
            object.__setattr__(part, "layer_forms", tuple(cut))
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
