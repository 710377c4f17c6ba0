"""Running one step of a model under the recorder."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from tensorcast.modeling.attention import cache_argument, masks, past_length, trace_cache
from tensorcast.modeling.config import field
from tensorcast.modeling.own_attention import OwnAttention, attends_by_itself
from tensorcast.modeling.recurrent import hub_kernels_as_ops
from tensorcast.trace.layers import Kinds, decoder_layers, one_per_kind
from tensorcast.trace.record import Call, Recorder

WARM_UP_TOKENS = 8


def record_step(
    model: nn.Module,
    config: PreTrainedConfig,
    *,
    batch: int,
    new: int,
    past: int,
    recurrent_state: bool,
    kinds: Kinds | None = None,
    with_masks: bool | None = None,
) -> list[Call]:
    """Ops of one forward pass of ``batch`` sequences with ``new`` tokens each after ``past`` cached ones.

    ``kinds`` given: one layer per kind runs, and it is filled. ``recurrent_state``: linear-attention layers find a
    state from earlier tokens (decode). ``with_masks=None`` tries without masks first, since most families then build
    none, as serving engines do not.
    """
    if with_masks is None:
        try:
            return record_step(
                model,
                config,
                batch=batch,
                new=new,
                past=past,
                recurrent_state=recurrent_state,
                kinds=kinds,
                with_masks=False,
            )
        except (TypeError, AttributeError) as reason:
            if "NoneType" not in str(reason):
                raise
            if kinds is not None:
                kinds.clear()  # what the failed attempt found is void
            with_masks = True
    device = next(model.parameters()).device
    cache: Any = trace_cache(model, config, past)
    recorder = Recorder(model, kinds)
    with torch.no_grad(), masks(with_masks), past_length(past), hub_kernels_as_ops(model):
        if recurrent_state and _is_recurrent(cache):
            cache.past_len = 0
            warm_up = None if kinds is None else Kinds(signatures=kinds.signatures)
            _run(model, config, cache, batch, WARM_UP_TOKENS, kinds=warm_up)
            cache.past_len, cache.has_state = past, True
        _run(model, config, cache, batch, new, kinds=kinds, recorder=recorder, device=device)
    return recorder.calls


def _is_recurrent(cache: Any) -> bool:
    """Whether a layer keeps a state besides keys and values, or instead of them."""
    has_state = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in getattr(cache, "layers", ()))
    return has_state or any(getattr(cache, "is_linear", ()) or ()) or hasattr(cache, "linear_cache")


def _run(
    model: nn.Module,
    config: PreTrainedConfig,
    cache: Any,
    batch: int,
    new: int,
    *,
    kinds: Kinds | None,
    recorder: Recorder | None = None,
    device: torch.device | str = "meta",
) -> None:
    """One call of the model; logits of the last position only, as a serving engine asks for."""
    inputs: dict[str, Any] = {
        "input_ids": torch.empty((batch, new), dtype=torch.long, device=device),
        "position_ids": torch.empty((1, new), dtype=torch.long, device=device),
        cache_argument(type(model).forward) or "past_key_values": cache,
        "use_cache": True,
    }
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        inputs["logits_to_keep"] = 1
    kv_heads = field(config, "num_kv_heads", "num_key_value_heads", default=0)
    path, layers = decoder_layers(model)
    by_itself = attends_by_itself(layers)
    with (
        OwnAttention(cache, kv_heads) if by_itself else contextlib.nullcontext(),
        one_per_kind(path, layers, config, kinds) if kinds is not None else contextlib.nullcontext(),
        recorder if recorder is not None else contextlib.nullcontext(),
    ):
        model(**inputs)
