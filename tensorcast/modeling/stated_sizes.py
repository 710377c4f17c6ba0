"""What a file says against what transformers made of it: no size is dropped or made up in silence."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from tensorcast.profiles import config_values
from tensorcast.profiles.config_values import EXPERT_WIDTHS, EXPERTS_PER_TOKEN, HEADS, KV_HEADS, LAYERS

CORE: dict[str, tuple[str, ...]] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": ("hidden_size", "d_model", "n_embd"),
    "num_attention_heads": HEADS,
    "vocab_size": ("vocab_size",),
    "num_experts": config_values.EXPERTS,
    "num_experts_per_tok": EXPERTS_PER_TOKEN,
    "intermediate_size": ("intermediate_size", "ffn_dim", "ffn_hidden_size", *EXPERT_WIDTHS, "n_inner"),
}  # fmt: skip
"""Sizes that a file must state where its class has them, each with the names that classes give it."""

OTHERS: dict[str, tuple[str, ...]] = {
    "num_key_value_heads": (*KV_HEADS, "num_attention_groups"),
    "moe_intermediate_size": EXPERT_WIDTHS,
    "n_shared_experts": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert"),
    "shared_expert_intermediate_size": (
        "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size",
        "share_expert_dim",
    ),
    "head_dim": ("head_dim", "attention_head_dim", "kv_channels"),
    "q_lora_rank": ("q_lora_rank",),
    "kv_lora_rank": ("kv_lora_rank",),
    "qk_nope_head_dim": ("qk_nope_head_dim",),
    "qk_rope_head_dim": ("qk_rope_head_dim",),
    "v_head_dim": ("v_head_dim",),
}  # fmt: skip
"""Sizes that a class may work out from others, and some models lack."""

LATENT = {name: OTHERS[name] for name in OTHERS if name.endswith("lora_rank") or name.startswith(("qk_", "v_"))}
"""Widths of latent attention: of core size where a class has them, since one more or less is another network."""

OF_EXPERTS = frozenset(("moe_intermediate_size", "n_shared_experts", "shared_expert_intermediate_size"))

FOREIGN = {"attention_head_dim": "head_dim"}
"""Names of a size in released files whose class calls it otherwise (Hunyuan-A13B)."""


SHARES_KEYS = ("use_cla",)
"""Switches to layers that attend to the keys and values of an earlier one (Hunyuan-Large: vLLM 0.24.0,
models/hunyuan_v1.py, HunYuanCrossAttention); no class of transformers has them."""

WEIGHT_WIDTHS = re.compile("^(?!mm_|vision|visual|image|audio).*(hidden_size|intermediate_size|lora_rank|latent_size)$")
"""Names of widths of matrices: one that the class does not have, under any name, is a part that it does not build."""


def _knows(config: PreTrainedConfig, name: str) -> bool:
    kind = type(config)
    fields = {one.name for one in dataclasses.fields(kind)}
    return name in fields or name in kind.attribute_map or isinstance(getattr(kind, name, None), property)


def _made(config: PreTrainedConfig, name: str) -> bool:
    """Whether the class itself sets a size, which it works out of others (Zamba2's width of attention)."""
    try:
        return name in vars(type(config)())
    except (TypeError, ValueError):  # a class without defaults
        return False


def _value(config: PreTrainedConfig, name: str) -> Any:
    name = type(config).attribute_map.get(name, name)
    value = vars(config).get(name)  # one that varies by layer refuses getattr on the whole config
    return getattr(config, name, None) if value is None else value


def _of_layers(config: PreTrainedConfig) -> set[int]:
    """Sizes that some layers have of their own, whatever the file calls them (dots3-note's ``swa_kv_lora_rank``)."""
    names = (config.per_layer_attributes or ()) if getattr(config, "is_heterogeneous", False) else ()
    return {getattr(layer, name) for layer in config.per_layer_config for name in names} if names else set()


def _same(stated: Any, built: Any) -> bool:
    """Whether a size is as the file says; one number may stand for all layers, or for the widest of them."""
    if isinstance(built, list | tuple) and not isinstance(stated, list | tuple):
        return stated in built
    if isinstance(stated, list | tuple) and not isinstance(built, list | tuple):
        return built in stated
    return stated == built or (isinstance(stated, list | tuple) and list(stated) == list(built))


def dropped(values: dict[str, Any], config: PreTrainedConfig) -> str:
    """The first size of a file that its class does not hold, as ``num_experts = 16 in the file, 288 in ...``."""
    written = config.to_dict()  # a class that reads pairs of blocks as layers writes blocks again (Dory)
    for size, names in {**CORE, **OTHERS}.items():
        if size == "head_dim" and values.get("kv_lora_rank"):
            continue  # of latent attention it is the width of one part or another
        stated = [name for name in names if values.get(name) is not None]
        known = [name for name in stated if _knows(config, name)]
        for name in known:
            if not _same(values[name], _value(config, name)) and not _same(values[name], written.get(name)):
                return _unlike(name, values[name], _value(config, name), config)
        if known or not stated:
            continue
        own = next((_value(config, name) for name in names if _knows(config, name) and _value(config, name)), None)
        if own is None and not (size in EXPERTS and _largest(values[stated[0]]) > 1):
            continue  # the class has no such size, or makes it from others
        if not _same(values[stated[0]], own):
            return _unlike(stated[0], values[stated[0]], own, config)
    for name in SHARES_KEYS:
        if values.get(name) and name not in {one.name for one in dataclasses.fields(type(config))}:
            kind = type(config).model_type
            return f"{name} = {values[name]}: layers that share keys and values are none of transformers' {kind}"
    built = {value for name, value in vars(config).items() if isinstance(value, int) and _knows(config, name)}
    built |= _of_layers(config)
    for name, value in values.items():
        named = any(name in names for names in {**CORE, **OTHERS}.values())  # seen above
        width = not named and WEIGHT_WIDTHS.search(name) and isinstance(value, int) and value > 1
        if width and not _knows(config, name) and value not in built and not _made(config, name):
            return _unlike(name, value, None, config)
    return ""


def _largest(value: Any) -> int:
    return max(value, default=0) if isinstance(value, list | tuple) else value


def _unlike(name: str, stated: Any, built: Any, config: PreTrainedConfig) -> str:
    there = "no such size" if built is None else f"{built}"
    kind = type(config).model_type
    return f"{name} = {stated} in config.json, {there} in the model that transformers builds of it ({kind})"


EXPERTS = ("num_experts", "num_experts_per_tok")
"""Of the core, what a dense model of a class for both does not state."""


def missing(values: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Core sizes of the class that a file does not state, by the class's name, with transformers' default."""
    found = {}
    for names in {**CORE, **LATENT}.values():
        own = [one for one in dataclasses.fields(type(config)) if one.name in names]
        made = bool(own) and own[0].default is None  # of sizes that the file has, where it leaves it out (Falcon's MLP)
        value = _value(config, own[0].name) if own and not made else None
        given = (name for name in names if values.get(name) is not None)
        if value and not any(_knows(config, name) or _same(values[name], value) for name in given):
            found[own[0].name] = value
    heads, kv = (_value(config, name) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(kv, int) and kv and heads % kv and "num_key_value_heads" not in values:
        found["num_key_value_heads"] = kv  # a default that does not go with the file's heads
    return found


def stated_sparse(values: dict[str, Any], config: PreTrainedConfig) -> tuple[str, tuple[int, ...]]:
    """Layers with experts by a file's words that its class has no field for, and these words; none if there are none.

    As DeepSeek's code reads them: from ``first_k_dense_replace`` on, and every ``moe_layer_freq``-th, or by a list.
    """
    first, every, layers = (values.get(name) for name in ("first_k_dense_replace", "moe_layer_freq", LAYERS[0]))
    said = {"first_k_dense_replace": first, "moe_layer_freq": every}
    unknown = [f"{name} = {value}" for name, value in said.items() if isinstance(value, int) and value > 0
               and not _knows(config, name)]  # fmt: skip
    if isinstance(every, list) or not unknown or not isinstance(layers, int):
        return "", ()
    return ", ".join(unknown), tuple(i for i in range(layers) if i >= (first or 0) and i % (every or 1) == 0)


def shared_of_no_class(values: dict[str, Any], config: PreTrainedConfig) -> str:
    """What a file says of shared experts whose class has no field for them, as ``n_shared_experts = 1``; or empty."""
    names = [*OTHERS["n_shared_experts"], *OTHERS["shared_expert_intermediate_size"]]
    if any(_knows(config, name) for name in names):
        return ""
    return next((f"{name} = {values[name]}" for name in names if values.get(name)), "")


def defaults_taken(values: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Sizes beside the core that a file leaves to numbers of its class, by the class's name."""
    found: dict[str, Any] = {}
    sparse = any(values.get(name) for name in config_values.EXPERTS)
    for size, names in OTHERS.items():
        own = [one for one in dataclasses.fields(type(config)) if one.name in names and isinstance(one.default, int)]
        moot = (size == "head_dim" and _value(config, "kv_lora_rank")) or (size in OF_EXPERTS and not sparse)
        if own and size not in LATENT and not moot and not any(name in values for name in names):
            found |= {own[0].name: value} if (value := _value(config, own[0].name)) else {}
    return found


OTHER_CLASSES = {"BailingMoeV3ForCausalLM": "bailing_hybrid", "KimiK25ForConditionalGeneration": "deepseek_v3"}
"""Engines' classes of a type by another name: Ling 3.0 (SGLang 0.5.23, models/bailing_moe_v3.py, whose config is
BailingHybridConfig), and Kimi K2.5's language model laid flat."""


def foreign_architecture(model_type: str, architectures: list[str]) -> str:
    """The architecture that a file names, where it is none of its ``model_type``'s; empty where it may be.

    A class of remote code has its type's name in its own (``Step3p7FlashForCausalLM``).
    """

    def plain(text: str) -> str:
        return re.sub("[^a-z0-9]", "", text.lower())

    stems = {plain(model_type)}
    for lists, mapping in vars(modeling_auto).items():
        if lists.startswith("MODEL_") and lists.endswith("_MAPPING_NAMES") and model_type in mapping:
            names = mapping[model_type]
            stems |= {
                plain(re.sub("(For[A-Z].*|LMHeadModel|Model)$", "", name))
                for name in ((names,) if isinstance(names, str) else names)
            }
    fits = any(
        plain(name).startswith(stem) or OTHER_CLASSES.get(name) == model_type
        for name in architectures for stem in stems if stem
    )  # fmt: skip
    return "" if fits or not architectures else architectures[0]
