"""Attention of towers as it was measured, beside what kernel models of causal prompts make of it.

Kernels of head widths that are no power of two differ by engine and generation far more than their arithmetic does: at
72 and 4,096 patches SGLang 0.5.14 takes 1.19 ms on a B300 (Triton) and 0.12 ms on a B200 (FlashAttention-4), and
TensorRT-LLM 1.3.0rc20 0.48 ms on a B200.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from tensorcast.profiles import store

FILE = "vision/encoder_attention.yaml"
FARTHEST = 16
"""Numbers that a head may be wider or narrower than the nearest that was measured."""


class MeasuredAttention(NamedTuple):
    """``factor``: measured seconds over those of the kernel models, a median; ``error``: relative, a median of rows
    that it was not taken from."""

    factor: float
    error: float


@functools.cache
def _table() -> dict[str, dict[str, dict[int, list[float]]]]:
    found: dict[str, dict[str, dict[int, list[float]]]] = store._load_yaml(store.profile_roots()[-1] / FILE)["devices"]
    return found


def measured_attention(device: str, engine: str, width: float) -> MeasuredAttention | None:
    """Of heads ``width`` wide, by the nearest width that was measured; None where none near was."""
    widths = _table().get(device, {}).get(engine, {})
    near = min(widths, key=lambda one: abs(one - width), default=None)
    return None if near is None or abs(near - width) > FARTHEST else MeasuredAttention(*widths[near])
