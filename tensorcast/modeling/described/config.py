"""The config of a network that its profile describes: what the tracer asks one for, and the sizes of all parts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from tensorcast.errors import InputError
from tensorcast.profiles.config_values import text_of
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.network.description import Network, Part
from tensorcast.profiles.network.sizes import layers_of, listed_rows, named_layers, part_of_layers, sizes

REMARK = "described by its profile, not traced from a class of transformers"


class Described(NamedTuple):
    """A part of a layer: its kind and what that takes."""

    kind: str
    takes: dict[str, Any]


class DescribedConfig(PreTrainedConfig):
    """Sizes of a described network. ``attention``, ``ffn``: of each layer; ``block_size``: of attention residuals, 0
    for others; ``streams``: of hyper-connections, 0 for none; ``tables``: of n-grams, by layer; ``ends_tokens``: of a
    prompt that layers from ``ends_from`` on are needed for, 0 for all."""

    model_type = "described"

    attention: tuple[Described, ...]
    ffn: tuple[Described, ...]
    tables: dict[int, dict[str, int]]

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
        shared_out = {"rows": "vocab_size"}  # ranks have parts of tables as they have of the vocabulary
        tables = {
            layer: {key: divide(shared_out.get(key, ""), value) for key, value in takes.items()}
            for layer, takes in self.tables.items()
        }
        object.__setattr__(narrowed, "tables", tables)
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
            name: tuple(
                _with_flags(parts[name][i], listed[i], layer, (count, text, f"{name}[{i}]."))
                for layer, i in enumerate(part_of_layers(listed, count, text, name))
            )
            for name, listed in (("attention", network.attention), ("ffn", network.ffn))
        }
        residual = sizes(network.residual, text, "residual.") if network.residual else {}
        block, streams = residual.get("block_size", 0), residual.get("streams", 0)
        _check_streams(network, bool(streams))
        tables, ends = _tables(network, count, text), set[int]()
        if network.ends is not None:
            ends = named_layers(network.ends.layers, count, text, "ends.layers")
            if ends and ends != set(range(min(ends, default=0), count)):
                raise InputError("network.ends.layers: must be the last ones, all behind the first of them")
        tokens = sizes(network.ends, text, "ends.")["tokens"] if network.ends and ends else 0
    except InputError as problem:
        raise InputError(f"model {profile.name}: {problem}") from None
    return DescribedConfig(
        **whole, **of_layer, **_as_configs_say(of_layer), block_size=block, num_hidden_layers=count,
        streams=streams, rounds=residual.get("rounds", 0), tables=tables, ends_from=min(ends, default=0),
        ends_tokens=tokens, handed_on=float(streams) or _handed_on(count, block), remarks=(REMARK,), pad_token_id=None,
    )  # fmt: skip


def _with_flags(part: Described, said: Part, layer: int, where: tuple[int, dict[str, Any], str]) -> Described:
    """A layer's part, with what the part's own lists of layers say of it; ``candidates``: the layer is their
    ``source``, or chooses ``within`` them."""
    named = layers_of(said, *where)
    flags: dict[str, Any] = {name: layer in layers for name, layers in named.items()}
    if (few := named.get("candidates")) is not None:
        flags["candidates"] = "" if layer not in few else "source" if layer == min(few) else "within"
    return Described(part.kind, {**part.takes, **flags}) if flags else part


def _check_streams(network: Network, streams: bool) -> None:
    """Raise :class:`InputError` for kinds of attention that streams were not built with, and the other way round."""
    for i, part in enumerate(network.attention):
        if (part.kind == "csa2") != streams:
            needs = "residual: {kind: hyper_connections}" if part.kind == "csa2" else "attention of kind csa2"
            raise InputError(f"network.attention[{i}].kind = {part.kind!r}: described with {needs} alone")
    if network.tables is not None and not streams:
        raise InputError("network.tables: described with residual: {kind: hyper_connections} alone")


def _tables(network: Network, count: int, text: dict[str, Any]) -> dict[int, dict[str, int]]:
    if network.tables is None:
        return {}
    layers = named_layers(network.tables.layers, count, text, "tables.layers")
    takes = sizes(network.tables, text, "tables.")
    return {layer: {"rows": n, **takes} for layer, n in listed_rows(network.tables, layers, text).items()}


def _as_configs_say(of_layer: dict[str, tuple[Described, ...]]) -> dict[str, Any]:
    """What is asked of transformers' configs, under their names: types of the layers, heads, groups of experts."""
    attention, experts = of_layer["attention"], [takes for kind, takes in of_layer["ffn"] if kind == "moe"]
    heads = [takes["num_heads"] for _, takes in attention]
    kv = [takes["num_kv_heads"] for _, takes in attention if "num_kv_heads" in takes]
    kv += [1 for kind, _ in attention if kind == "csa2"]
    latent = [takes["kv_lora_rank"] for _, takes in attention if "kv_lora_rank" in takes]
    windows = [takes["window"] for _, takes in attention if takes.get("window")]
    return {
        "layer_types": [_type(kind, takes) for kind, takes in attention],
        "num_attention_heads": min(heads),
        "num_key_value_heads": min(kv, default=min(heads)),
        "kv_lora_rank": max(latent, default=0),
        "index_head_dim": max((takes.get("index_head_dim", 0) for _, takes in attention), default=0),
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
