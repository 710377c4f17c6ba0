"""The config of a network that its profile describes: what the tracer asks one for, and the sizes of all parts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from tensorcast.errors import InputError
from tensorcast.profiles.config_values import text_of
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.network.sizes import part_of_layers, sizes

REMARK = "described by its profile, not traced from a class of transformers"


class Described(NamedTuple):
    """A part of a layer: its kind and what that takes."""

    kind: str
    takes: dict[str, Any]


class DescribedConfig(PreTrainedConfig):
    """Sizes of a described network. ``attention``, ``ffn``: of each layer; ``block_size``: 0 for plain residuals."""

    model_type = "described"

    attention: tuple[Described, ...]
    ffn: tuple[Described, ...]

    def __init__(self, **values: Any) -> None:
        super().__init__()
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def divided(self, divide: Callable[[str, Any], Any]) -> DescribedConfig:
        """The same on one of several ranks, each size as ``divide`` makes it of its name and value."""
        narrowed = copy.copy(self)
        for name in ("attention", "ffn"):
            parts = tuple(
                Described(kind, {key: divide(key, value) if value else value for key, value in takes.items()})
                for kind, takes in getattr(self, name)
            )
            object.__setattr__(narrowed, name, parts)
        for name in ("vocab_size", "num_attention_heads", "num_key_value_heads"):
            object.__setattr__(narrowed, name, divide(name, getattr(self, name)))
        return narrowed


def described_config(profile: ModelProfile) -> DescribedConfig:
    """The config of a profile that describes its network. Raises :class:`InputError`, one line."""
    network, text = profile.network, text_of(profile.config)
    assert network is not None
    try:
        whole = sizes(network, text, "")
        count = int(whole.pop("num_layers"))
        parts = {
            name: [Described(one.kind, sizes(one, text, f"{name}[{i}].")) for i, one in enumerate(listed)]
            for name, listed in (("attention", network.attention), ("ffn", network.ffn))
        }
        of_layer = {
            name: tuple(parts[name][i] for i in part_of_layers(listed, count, text, name))
            for name, listed in (("attention", network.attention), ("ffn", network.ffn))
        }
        block = sizes(network.residual, text, "residual.")["block_size"] if network.residual else 0
    except InputError as problem:
        raise InputError(f"model {profile.name}: {problem}") from None
    return DescribedConfig(
        **whole, **of_layer, **_as_configs_say(of_layer), block_size=block, num_hidden_layers=count,
        handed_on=_handed_on(count, block), remarks=(REMARK,), pad_token_id=None,
    )  # fmt: skip


def _as_configs_say(of_layer: dict[str, tuple[Described, ...]]) -> dict[str, Any]:
    """What is asked of transformers' configs, under their names: types of the layers, heads, groups of experts."""
    attention, experts = of_layer["attention"], [takes for kind, takes in of_layer["ffn"] if kind == "moe"]
    heads = [takes["num_heads"] for _, takes in attention]
    kv = [takes["num_kv_heads"] for _, takes in attention if "num_kv_heads" in takes]
    latent = [takes["kv_lora_rank"] for _, takes in attention if "kv_lora_rank" in takes]
    windows = [takes["window"] for _, takes in attention if takes.get("window")]
    return {
        "layer_types": [_type(kind, takes) for kind, takes in attention],
        "num_attention_heads": min(heads),
        "num_key_value_heads": min(kv, default=min(heads)),
        "kv_lora_rank": max(latent, default=0),
        "sliding_window": max(windows, default=None),
        "n_group": max((takes["n_group"] for takes in experts), default=0),
        "topk_group": max((takes["topk_group"] for takes in experts), default=0),
    }


def _handed_on(layers: int, block: int) -> float:
    """As in :class:`tensorcast.profiles.facts.ModelFacts`: a stage's state, and the sums of all blocks begun before."""
    if not block or layers < 2:
        return 2.0
    return 1 + sum(-(-layer // block) for layer in range(1, layers)) / (layers - 1)


def _type(kind: str, takes: dict[str, Any]) -> str:
    if kind == "kda":
        return "linear_attention"
    return "sliding_attention" if takes.get("window") else "full_attention"
