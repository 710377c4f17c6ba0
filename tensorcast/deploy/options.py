"""What a deployment can choose beside its layout."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Precision, kernels, exchange and expert placement; ``None`` and ``auto`` are what model and engine default to."""

    fusion: str = "engine"
    quant: str | None = None
    kv_dtype: str | None = None
    routing: str = "balanced"
    all2all: str = "auto"
    dispatch: str | None = None
    redundant_experts: int = 0
    placement: str = "linear"
