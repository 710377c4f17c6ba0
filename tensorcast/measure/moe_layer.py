"""One MoE layer of a model at full size, per experts backend and number of tokens: time, and agreement between them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tensorcast.errors import InputError
from tensorcast.measure.operands import free_bytes
from tensorcast.measure.store import Store, key_of
from tensorcast.measure.timing import time_calls
from tensorcast.modeling.build import build
from tensorcast.modeling.config import field, hf_config
from tensorcast.modeling.moe.apply import moe_blocks
from tensorcast.modeling.moe.backends import BACKENDS
from tensorcast.modeling.moe.layer import MoELayer
from tensorcast.profiles.model import ModelProfile

TOKENS = tuple(1 << power for power in range(0, 15, 2))
"""1 to 16384."""

ROOM = 0.8
"""Share of the free memory that a call's own tensors may fill."""

Say = Callable[[str], None]


def random_block(model: ModelProfile, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, int]:
    """The last MoE block of ``model`` with random weights, alone on ``device``, and the hidden size.

    Raises :class:`InputError` where the model has none.
    """
    config = hf_config(model)
    found = list(moe_blocks(build(config, dtype=dtype), model.moe))
    if not found:
        raise InputError(f"model {model.name} has no MoE layer")
    block = found[-1][1].to_empty(device=device)
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0.0, 0.02)
            else:
                tensor.zero_()
    return block.eval().requires_grad_(False), int(field(config, "hidden_size"))


def extra_bytes(layer: MoELayer, backend: str, tokens: int) -> float:
    """What a call takes beside its weights: rows in and out, copies of weights, or room for every token everywhere."""
    weights: list[Tensor] = [p for p in layer.stacked.parameters() if p.dim() == 3]
    per_expert = sum(float(p[0].numel()) for p in weights)
    width = max(p.shape[-1] + p.shape[-2] for p in weights)
    size = weights[0].element_size()
    rows = float(tokens * layer.top_k)
    if backend == "batched_mm":
        return rows * (per_expert / 2 + width) * size  # one projection's copies at a time
    if backend == "masked":
        rows = float(layer.num_experts * tokens)
    return 2.0 * rows * width * size


def measure_moe_layer(
    model: ModelProfile, device: torch.device, store: Store, belongs: str, *, tokens: Sequence[int] = TOKENS,
    backends: Sequence[str] = BACKENDS, dtype: torch.dtype = torch.bfloat16, effort: float = 1.0,
    say: Say = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """One row per backend and number of tokens: seconds and spread, and the difference from ``eager``; or the error."""
    keys = {
        (count, backend): key_of("moe_layer", model.name, model.config, str(dtype), count, backend, belongs)
        for count in tokens for backend in backends
    }
    if any(key not in store.rows for key in keys.values()):
        block, hidden = random_block(model, dtype, device)
        for count in tokens:
            x = torch.randn(count, hidden, device=device).to(dtype)
            with torch.inference_mode():
                expected = MoELayer(block, model.moe, model=model.name, backend="eager")(x).float()
            for backend in backends:
                key = keys[count, backend]
                if key in store.rows:
                    continue
                say(f"{model.name}: MoE layer, {backend}, {count} tokens")
                store.begin(key)
                layer = MoELayer(block, model.moe, model=model.name, backend=backend)
                store.add(key, **_timed(layer, backend, x, expected, device, effort=effort))
        del block
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for (count, backend), key in keys.items():
        yield {"model": model.name, "backend": backend, "tokens": count, **store.rows[key]}


def _timed(
    layer: MoELayer, backend: str, x: Tensor, expected: Tensor, device: torch.device, *, effort: float
) -> dict[str, Any]:
    need, free = extra_bytes(layer, backend, x.shape[0]), free_bytes(device)
    if need > ROOM * free:
        return {"problem": f"needs {need / 1e9:.0f} GB beside the weights, {free / 1e9:.0f} GB are free"}
    try:
        with torch.inference_mode():
            off = (layer(x).float() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        timing = time_calls([partial(layer, x)], device, effort)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as reason:
        return {"problem": (str(reason).strip() or type(reason).__name__).splitlines()[0][:160]}
    return {
        "seconds": timing.seconds, "low_s": timing.low_s, "median_s": timing.median_s, "high_s": timing.high_s,
        "calls": timing.calls, "method": timing.method, "relative_error": float(off), "problem": "",
    }
