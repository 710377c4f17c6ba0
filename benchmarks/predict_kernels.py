"""How long predicting kernels takes on one core: a million rows, and the small calls that pricing a step makes.

``OMP_NUM_THREADS=1 python benchmarks/predict_kernels.py [ROWS]``
"""

from __future__ import annotations

import sys
import time

import numpy as np
import pandas as pd

from tensorcast.cost.kernels.frames import predict_kernels
from tensorcast.cost.kernels.predictor import Predictor, predictor_for
from tensorcast.profiles.store import load_device


def shapes(rows: int) -> dict[str, pd.DataFrame]:
    """Random shapes of three families, as many of each."""
    rng = np.random.default_rng(0)

    def sizes(low: float, high: float) -> np.ndarray:
        return np.round(np.exp2(rng.uniform(low, high, rows)))

    gemm = pd.DataFrame({
        "family": "gemm", "dtype": "fp8_block", "m": sizes(0, 14), "n": sizes(7, 14), "k": sizes(7, 14),
    })
    experts = pd.DataFrame({
        "family": "moe", "dtype": "fp8_block", "num_tokens": sizes(0, 14), "hidden_size": 7168, "inter_size": 2048,
        "topk": 8, "num_experts": 256, "moe_tp_size": 1, "moe_ep_size": np.exp2(rng.integers(0, 6, rows)),
        "distribution": rng.choice(["balanced", "power_law_1.01", "power_law_1.2"], rows),
    })
    attention = pd.DataFrame({
        "family": "generation_attention", "dtype": "bf16", "batch_size": sizes(0, 10), "isl": 1, "step": sizes(5, 14),
        "num_heads": 8 * rng.integers(1, 9, rows), "num_key_value_heads": 8, "head_dim": 128,
    })
    return {"gemm": gemm, "grouped_gemm": experts, "attention_decode": attention}


def small_call(predictor: Predictor, points: int) -> float:
    """Seconds per call of one GEMM at ``points`` values of m, the best of five rounds."""
    m = np.linspace(1, 4096, points)
    best = np.inf
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(20):
            predictor.estimate("gemm", "bf16", m=m, n=4096, k=7168)
        best = min(best, (time.perf_counter() - start) / 20)
    return best


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    frames = shapes(rows // 3)
    mixed = pd.concat(frames.values(), ignore_index=True)
    predict_kernels(mixed.head(10), device="h200", engine="sglang")  # the model file is read once
    for name, frame in {**frames, "mixed": mixed}.items():
        start = time.perf_counter()
        predict_kernels(frame, device="h200", engine="sglang")
        seconds = time.perf_counter() - start
        print(f"{name:18s} {len(frame):9,d} rows {seconds:6.2f} s  {1e6 * seconds / len(frame):5.2f} us per row")
    predictor = predictor_for(load_device("h200"), "vllm")
    for points in (1, 100, 10_000):
        print(f"estimate of one GEMM at {points:6,d} points: {1e6 * small_call(predictor, points):8.0f} us")


if __name__ == "__main__":
    main()
