"""Linear-attention, scan and convolution kernels of the kernels hub, as ops while tracing.

transformers marks these functions with ``use_kernel_func_from_hub_with_fallback(name, package)``: the name says which
kernel an engine would load. While tracing, each marked function of the traced model's own file is swapped for its op.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

TC = torch.ops.tensor_cast


def _delta_rule(q: Tensor, k: Tensor, v: Tensor, *_: Any, **kw: Any) -> tuple[Tensor, Tensor | None]:
    out, state = TC.linear_attention(q, k, v, kw.get("initial_state"), int(kw.get("chunk_size", 64)))
    return out, (state if kw.get("output_final_state") else None)


def _chunk_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *_: Any, **kw: Any) -> Any:
    out, state = TC.ssm_scan(x, b, c, kw.get("initial_states"), int(kw.get("chunk_size", 256)))
    return (out, state) if kw.get("return_final_states") else out


def _selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *_: Any, **kw: Any) -> Any:
    """Mamba-1: x [B,C,S], b and c [B,N,S]. One head as wide as the channels, token by token: no chunked form exists."""

    def by_token(t: Tensor) -> Tensor:
        return t.transpose(1, 2).unsqueeze(2)

    out, state = TC.ssm_scan(by_token(x), by_token(b), by_token(c), None, 0)
    out = out.squeeze(2).transpose(1, 2)
    return (out, state.squeeze(1)) if kw.get("return_last_state") else out


def _state_update(state: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *_: Any, **__: Any) -> Tensor:
    """One token: x [B,H,D], b and c [B,groups,N], as mamba_ssm's ``selective_state_update`` takes them."""

    def with_token(t: Tensor) -> Tensor:
        return t.reshape(t.shape[0], 1, -1, t.shape[-1])

    out, _ = TC.ssm_scan(with_token(x), with_token(b), with_token(c), state, 1)
    return out.reshape(x.shape)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    return TC.causal_conv1d(x, weight, bias)


def _conv_update(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    return TC.causal_conv1d(x, weight, bias)


def _lightning(
    self: Any, hidden_states: Tensor, *_: Any, cache: Any = None, past_key_values: Any = None, **__: Any
) -> Any:
    """Lightning attention (2401.04658): its class loops over blocks, or tokens, where engines run one kernel."""
    batch, new, _width = hidden_states.shape
    qkv = self.act_fn(self.qkv_proj(hidden_states)).reshape(batch, new, self.num_attention_heads, -1)
    cache = past_key_values if cache is None else cache  # as transformers calls it up to 5.23
    state = None if cache is None else cache.get_linear_cache(self.layer_idx)
    out, state = TC.linear_attention(*qkv.chunk(3, dim=-1), state, int(self.block_size))
    out = self.norm(out.reshape(batch, new, -1))
    out = self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * out)
    if cache is not None:
        cache.set_linear_cache(self.layer_idx, state)
    return out, state


def _block_indexer(
    self: Any, hidden_states: Tensor, position_embeddings: Any, attention_mask: Tensor, past_key_values: Any
) -> Tensor:
    """Scores of one key for several tokens (Qwen4): its class loops over sequences and queries."""
    batch, new, _width = hidden_states.shape
    queries, keys = self.index_qk_proj(hidden_states).split(
        [count * self.index_head_dim for count in (self.index_n_heads, self.index_kv_heads)], dim=-1
    )
    queries = self.q_layernorm(queries.reshape(batch, new, -1, self.index_head_dim))
    kept = past_key_values.update_indexer(keys, self.layer_idx)
    blocks = kept.new_empty((batch, kept.shape[1] // self.compress_ratio, self.index_head_dim))
    scores = torch.matmul(queries.float(), blocks.float().transpose(-1, -2).unsqueeze(1)).relu().sum(2)
    scores.topk(min(self.block_topk, blocks.shape[1]), dim=-1)
    return attention_mask


LOOPS = {"LightningAttention": _lightning, "QSAIndexer": _block_indexer}
"""Modules, by the end of their class's name, whose code is a loop over tokens in the place of a kernel."""

def _complete_pools(self: Any, packed_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of an indexer's pools of tokens, the tokens of each, and whether all are there (GLM-5.3-Flash).

    Its class drops pools that no sequence has whole by a mask, whose size is data; without padding that is the last.
    """
    batch, length, _ = packed_states.shape
    pools = packed_states.new_empty((batch, length // self.index_kpool, self.head_dim))
    tokens = pools.new_empty((*pools.shape[:2], self.index_kpool), dtype=torch.long)
    return pools, tokens, pools.new_empty(pools.shape[:2], dtype=torch.bool)


ASKS_DATA = {"get_pooled_states": _complete_pools}
"""Methods whose result has a size that only data tells, by name."""

KERNELS: dict[str, Callable[..., Any]] = {
    "chunk_gated_delta_rule": _delta_rule,
    "fused_recurrent_gated_delta_rule": _delta_rule,
    "chunk_kda": _delta_rule,
    "fused_recurrent_kda": _delta_rule,
    "mamba_chunk_scan_combined": _chunk_scan,
    "selective_scan_fn": _selective_scan,
    "selective_state_update": _state_update,
    "causal_conv1d_fn": _conv,
    "causal_conv1d_update": _conv_update,
}


def _hub_name(function: Callable[..., Any]) -> str | None:
    try:
        return inspect.getclosurevars(function).nonlocals.get("func_name")
    except (TypeError, ValueError):
        return None


@contextlib.contextmanager
def hub_kernels_as_ops(model: nn.Module) -> Iterator[list[str]]:
    """Swap marked functions for ops inside the ``with`` block; yields the names swapped, restores them after."""
    modules = list(model.modules())
    files = {type(m).__module__ for m in modules if type(m).__module__.startswith("transformers.models")}
    saved: list[tuple[Any, str, Any]] = []
    for file in sorted(files):
        module = sys.modules[file]
        for name, value in list(vars(module).items()):
            if inspect.isfunction(value) and hasattr(value, "__wrapped__") and _hub_name(value) in KERNELS:
                saved.append((module, name, value))
                setattr(module, name, KERNELS[str(_hub_name(value))])
    looping = [m for m in modules if type(m).__name__.endswith(tuple(LOOPS))]
    for m in looping:
        m.forward = next(kernel for end, kernel in LOOPS.items() if type(m).__name__.endswith(end)).__get__(m)
    asking = {kind: [name for name in ASKS_DATA if hasattr(kind, name)] for kind in {type(m) for m in modules}}
    asked = [(m, name) for m in modules for name in asking[type(m)]]
    for m, name in asked:
        setattr(m, name, ASKS_DATA[name].__get__(m))
    try:
        yield [name for _, name, _ in saved]
    finally:
        for m, name in [*((m, "forward") for m in looping), *asked]:
            delattr(m, name)
        for module, name, value in saved:
            setattr(module, name, value)
