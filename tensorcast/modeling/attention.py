"""Attention as one op, and a cache that turns reads and writes into ops."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, get_args, get_origin

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from tensorcast import ops  # noqa: F401  (registers the ops)
from tensorcast.modeling.experts import NAME

TC = torch.ops.tensor_cast
_past: ContextVar[int] = ContextVar("past", default=0)
_every_token: ContextVar[bool] = ContextVar("every_token", default=False)


def layer_type(config: Any, layer: int | None) -> str:
    """What ``config.layer_types`` calls a layer, or ``full_attention``."""
    types = getattr(config, "layer_types", None)
    return types[layer] if types and layer is not None and layer < len(types) else "full_attention"


def _window_and_chunk(module: nn.Module, kwargs: dict[str, Any]) -> tuple[int, int]:
    config = getattr(module, "config", None)
    kind = layer_type(config, getattr(module, "layer_idx", None))
    if kind == "chunked_attention":
        return 0, int(getattr(config, "attention_chunk_size", 0) or 0)
    # A layer that passes None means it: some keep the config's window on their full layers too.
    window = kwargs["sliding_window"] if "sliding_window" in kwargs else getattr(module, "sliding_window", None)
    if window is None and kind == "sliding_attention":
        window = getattr(config, "sliding_window", None)
    return (window if isinstance(window, int) and not isinstance(window, bool) else 0), 0


def _selected(module: nn.Module, kwargs: dict[str, Any]) -> int:
    """Tokens that a sparse-attention query reads: the width of the index tensor times the block it points at."""
    if kwargs.get("indices") is not None:
        return int(kwargs["indices"].shape[-1])
    if kwargs.get("block_indices") is not None:  # as many as there are, of the traced tokens; the config says of any
        config: Any = getattr(module, "config", None)
        return int(config.index_topk_blocks) * int(config.index_block_size)
    if hasattr(module, "indexer"):  # one that hands a mask on; it may be another layer's
        config = getattr(module, "config", None)
        return int(config.index_topk if getattr(config, "index_kpool", 0) else getattr(config, "indexer_budget", 0))
    return 0


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention interface's function: everything the call knows becomes arguments of one op."""
    past = _past.get() if getattr(module, "layer_idx", None) is not None else 0
    window, chunk = _window_and_chunk(module, kwargs)
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    scale = float(scaling) if isinstance(scaling, (int, float)) else query.shape[-1] ** -0.5
    latent = int(getattr(module, "kv_lora_rank", 0) or 0)
    rope = int(getattr(module, "qk_rope_head_dim", 0) or 0) if latent else 0
    selected = _selected(module, kwargs)
    sinks = kwargs.get("s_aux")
    out = TC.attention(query, key, value, past, scale, causal, window, chunk, selected, latent, rope, sinks)
    return out, None


AttentionInterface.register(NAME, attention_forward)


class TraceCache(DynamicCache):
    """A cache that holds no tokens: ``update`` emits a write op and returns only the new keys and values.

    The number of cached tokens is a number, not a shape. So multi-head latent attention expands the new tokens only,
    which in decode costs exactly what its absorbed form costs.
    """

    past_len = 0
    has_state = False
    written: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """What writes keys and values in the place of ``update``, and gives back those to go on with."""

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.has_state

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        if self.written is not None:
            return self.written(key_states, value_states)
        TC.kv_cache_write(key_states, value_states, "kv")
        layer: Any = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if hasattr(layer, "indexer_keys"):  # whose length an indexer asks
            length = self.past_len + key_states.shape[-2]
            layer.keys, layer.is_initialized = key_states[..., :1, :].expand(-1, -1, length, -1), True
        return key_states, value_states

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        empty = indexer_key_states.new_empty((*indexer_key_states.shape[:-1], 0))
        TC.kv_cache_write(indexer_key_states, empty, "indexer")
        return TC.kv_cache_read(indexer_key_states, self.past_len)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past_len

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.past_len

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.past_len + query_length, 0


def cache_argument(forward: Callable[..., Any]) -> str:
    """What a model's ``forward`` calls the cache that it reads and writes; empty where it takes none.

    transformers' classes say ``past_key_values`` up to release 5.23 and ``cache`` from 5.24 on
    (llama/modeling_llama.py of both; a tuple of keys and values still in some annotations), which in others means
    states of another kind.
    """
    takes = inspect.signature(forward).parameters
    if "past_key_values" in takes:
        return "past_key_values"
    said = takes["cache"].annotation if "cache" in takes else None
    kinds = [get_origin(kind) or kind for kind in get_args(said) or (said,)]
    known = any(isinstance(kind, type) and issubclass(kind, Cache | tuple) for kind in kinds)
    return "cache" if known or said is inspect.Parameter.empty else ""


def trace_cache(model: nn.Module, config: PreTrainedConfig, past: int) -> DynamicCache:
    """A :class:`TraceCache`, mixed into the model's own cache class where its family has one."""
    files = {type(m).__module__ for m in model.modules() if type(m).__module__.startswith("transformers.models")}
    own = [
        value
        for file in sorted(files)
        for value in vars(sys.modules[file]).values()
        if inspect.isclass(value) and issubclass(value, DynamicCache) and value.__module__ == file
    ]
    kind = type(f"Trace{own[0].__name__}", (TraceCache, own[0]), {}) if own else TraceCache
    try:
        cache = kind(config=config)
    except TypeError:
        cache = kind()
    cache.past_len = past
    return cache


@contextlib.contextmanager
def past_length(past: int) -> Iterator[None]:
    """Cached tokens per sequence, as the attention op will see them."""
    token = _past.set(past)
    try:
        yield
    finally:
        _past.reset(token)


def of_every_token() -> bool:
    """Whether what runs now runs on all tokens, in a layer that else runs on the ends of prompts."""
    return _every_token.get()


@contextlib.contextmanager
def every_token() -> Iterator[None]:
    """Inside, what a layer does is done with all tokens."""
    token = _every_token.set(True)
    try:
        yield
    finally:
        _every_token.reset(token)


def _empty_mask(
    batch_size: int, q_length: int, kv_length: int, dtype: torch.dtype = torch.bool, device: Any = None, **_: Any
) -> Tensor:
    return torch.empty((batch_size, 1, q_length, kv_length), dtype=torch.bool, device=device)


@contextlib.contextmanager
def masks(wanted: bool) -> Iterator[None]:
    """Build a (dataless) mask for families whose code reads it; without this, none is built at all."""
    if not wanted:
        yield
        return
    AttentionMaskInterface.register(NAME, _empty_mask)
    try:
        yield
    finally:
        AttentionMaskInterface._global_mapping.pop(NAME, None)  # the interface has no public way to unregister
