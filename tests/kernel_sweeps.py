"""Random shapes of every kernel family, swept along one of their sizes."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from tensorcast.cost.kernels.lattice import SIDES
from tensorcast.cost.kernels.predictor import Estimate, Predictor
from tensorcast.cost.kernels.vocabulary import SIZES

ENGINES = ("vllm", "sglang", "trtllm", "any")

RANGES: dict[str, tuple[float, float]] = {
    "m": (1, 65536), "n": (64, 65536), "k": (64, 65536), "batch": (1, 512), "tokens": (1, 65536),
    "hidden": (512, 16384), "inter": (128, 32768), "new": (1, 16384), "past": (1, 262144), "q_heads": (1, 16),
    "payload_bytes": (64, 1 << 30),
}
"""Sizes that a shape is drawn from."""

CHOICES: dict[str, tuple[float, ...]] = {
    "topk": (1, 2, 4, 8), "experts": (8, 64, 256), "moe_tp": (1, 2), "moe_ep": (1, 8), "gated": (0, 1), "skew": (0, -1),
    "kv_heads": (1, 2, 8), "head_dim": (64, 80, 128, 256), "window": (0, 128, 4096), "kv_bytes": (1, 2),
    "ranks": (2, 4, 8), "nodes": (1,), "sms": (20,), "copy_bytes": (1.03125, 2.0),
}

DTYPES = {
    "gemm": ("bf16", "fp8", "fp8_block", "nvfp4", "int8", "w4a16"), "grouped_gemm": ("bf16", "fp8", "mxfp4", "w4a8"),
}


@st.composite
def sweeps(draw: st.DrawFn, family: str) -> tuple[str, dict[str, np.ndarray]]:
    """One size of a random shape, from a sixteenth to 64 times as large in steps of 2 %."""
    shape: dict[str, float] = {}
    for name in SIZES[family]:
        if name in CHOICES:
            shape[name] = float(draw(st.sampled_from(CHOICES[name])))
        elif name != "slots":
            low, high = RANGES[name]
            shape[name] = float(round(np.exp(draw(st.floats(np.log(low), np.log(high))))))
    grown = draw(st.sampled_from([n for n in SIDES[family] if n != "window" or shape["window"]]))
    if "kv_heads" in shape:
        shape["q_heads"] *= shape["kv_heads"]
    if "experts" in shape:
        shape["slots"] = shape["experts"]
    steps = np.unique(np.maximum(np.round(shape[grown] * 1.02 ** np.arange(-140.0, 210.0)), 1.0))
    if grown == "topk":
        steps = steps[steps <= shape["experts"]]
    if grown == "q_heads" and "kv_heads" in shape:
        steps = np.unique(np.ceil(steps / shape["kv_heads"])) * shape["kv_heads"]
    return grown, {name: np.full(len(steps), value) for name, value in shape.items()} | {grown: steps}


def price(
    predictor: Predictor, family: str, dtype: str, columns: dict[str, np.ndarray], variant: str = ""
) -> Estimate:
    """Prices, and what holds of every estimate."""
    default = "low_latency:dispatch" if family == "moe_exchange" else ""
    found = predictor.price(family, dtype, variant or default, columns)
    assert np.isfinite(found.high).all() and (found.low > 0).all()
    assert (found.low <= found.seconds * (1 + 1e-9)).all() and (found.seconds <= found.high * (1 + 1e-9)).all()
    return found
