"""Networks whose layers differ in what they hold: attention or none, KV heads and MLPs of their own widths.

A search over architectures (NVIDIA's Puzzle, ``model_type`` nemotron-nas) leaves such layers, and its file lists them
as ``block_configs``. Each layer is the stock one with its parts cut to size or left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tensorcast.errors import InputError

ROUNDED = 256
"""Multiple that widths stated as a factor are raised to."""


class LayerForm(NamedTuple):
    """KV heads of a layer's attention and width of its MLP; 0 where it has none."""

    kv_heads: int
    width: int


def layer_forms(values: dict[str, Any]) -> tuple[LayerForm, ...]:
    """Forms of the layers of a config, from its ``block_configs``. Raises :class:`InputError` for others than these.

    Source: vLLM 0.33.0, model_executor/models/nemotron_nas.py (DeciLMDecoderLayer, _ffn_mult_to_intermediate_size).
    """
    blocks, depth = values["block_configs"], values.get("num_hidden_layers")
    if not isinstance(blocks, list) or len(blocks) != depth:
        raise InputError(f"block_configs: must list a block for each of num_hidden_layers = {depth}")
    try:
        return tuple(
            _form(block["attention"], block["ffn"], values["hidden_size"], values["num_attention_heads"])
            for block in blocks
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as reason:
        raise InputError(f"block_configs: each needs attention.n_heads_in_group and ffn.ffn_mult ({reason})") from None


def _form(attention: dict[str, Any], ffn: dict[str, Any], stream: int, heads: int) -> LayerForm:
    for part in (attention, ffn):
        if odd := next((name for name in UNKNOWN if part.get(name)), ""):
            raise InputError(f"block_configs: {odd} = {part[odd]} is not known; attention is whole or left out")
    kv = 0 if attention.get("no_op") else heads // attention["n_heads_in_group"]
    width = 0 if ffn.get("no_op") else ffn.get("intermediate_size") or int(2 * ffn["ffn_mult"] * stream / 3)
    return LayerForm(kv, width if ffn.get("intermediate_size") else -(-width // ROUNDED) * ROUNDED)


UNKNOWN = ("replace_with_linear", "sparsify", "window_length", "num_sink_tokens", "unshifted_sink")
"""What a block may say beside its sizes, and no release does."""


class _Nothing(nn.Module):
    """In the place of a part that a layer lacks: adds nothing to the stream. ``tuple_`` as attention returns it."""

    def __init__(self, tuple_: bool) -> None:
        super().__init__()
        self.tuple_ = tuple_

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        nothing = hidden_states.new_zeros(())
        return (nothing, None) if self.tuple_ else nothing


def shape_layers(layers: Sequence[Any], forms: Sequence[LayerForm]) -> None:
    """Give Llama's ``layers`` the forms that their file lists; weights are not kept."""
    for layer, form in zip(layers, forms, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        like = attention.q_proj.weight
        if form.kv_heads:
            attention.num_key_value_groups = attention.q_proj.out_features // attention.head_dim // form.kv_heads
            for name in ("k_proj", "v_proj"):
                own = _resized(getattr(attention, name), like, outs=form.kv_heads * attention.head_dim)
                setattr(attention, name, own)
        else:
            layer.self_attn, layer.input_layernorm = _Nothing(tuple_=True), nn.Identity()
        if form.width:
            mlp.gate_proj, mlp.up_proj = (_resized(one, like, outs=form.width) for one in (mlp.gate_proj, mlp.up_proj))
            mlp.down_proj = _resized(mlp.down_proj, like, ins=form.width)
        else:
            layer.mlp, layer.post_attention_layernorm = _Nothing(tuple_=False), nn.Identity()


def _resized(one: nn.Linear, like: Tensor, ins: int = 0, outs: int = 0) -> nn.Linear:
    with torch.device(like.device):
        return nn.Linear(ins or one.in_features, outs or one.out_features, one.bias is not None, dtype=like.dtype)
