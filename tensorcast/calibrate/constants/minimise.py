"""Robust compass search in log space."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

FEWEST = 40
"""Fewer rows than this are not fitted."""
OPTIONAL = ("tile_s", "step_s", "split_s", "row_s", "element_s", "step_latency_s", "pipeline_s")
"""Terms dropped where they do not pay: a constant that changes nothing should not be in the file."""

Predict = Callable[[dict[str, float]], np.ndarray]


def minimise(
    loss: Callable[[np.ndarray], float], start: np.ndarray, low: np.ndarray, high: np.ndarray, rounds: int = 60,
) -> tuple[np.ndarray, float]:
    """Compass search with random rotations inside a box: no gradients, so kinks (ceil, min) do no harm. Repeatable."""
    rng = np.random.default_rng(0)
    x, step = np.clip(start, low, high), 0.7
    best = loss(x)
    for _ in range(rounds):
        rotated, _unused = np.linalg.qr(rng.normal(size=(len(x), len(x))))
        better = False
        for direction in np.vstack([np.eye(len(x)), rotated]):
            for sign in (step, -step):
                candidate = np.clip(x + sign * direction, low, high)
                value = loss(candidate)
                if value < best - 1e-7:
                    x, best, better = candidate, value, True
                    break
        step = min(step * 1.3, 1.5) if better else step * 0.5
        if step < 0.005:
            break
    return x, best


def robust_loss(predicted: np.ndarray, seconds: np.ndarray) -> float:
    """Mean |log ratio|, each row at most a factor of two: what cannot be explained must not bend the rest."""
    return float(np.minimum(np.abs(np.log(predicted / seconds)), 0.7).mean())


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def fit_constants(
    bounds: dict[str, tuple[float, float, float]], predict: Predict, seconds: np.ndarray
) -> tuple[dict[str, float], float]:
    """Constants (searched in log space) that make ``predict`` match ``seconds``, without terms that do not pay."""
    names = list(bounds)
    start, low, high = (np.log([bounds[name][i] for name in names]) for i in range(3))

    def loss(x: np.ndarray) -> float:
        return robust_loss(predict(dict(zip(names, np.exp(x).tolist(), strict=True))), seconds)

    x, best = minimise(loss, start, low, high)
    found = {name: _rounded(min(value, bounds[name][2])) for name, value in zip(names, np.exp(x), strict=True)}
    for name in OPTIONAL:
        if name in found and (value := robust_loss(predict({**found, name: 0.0}), seconds)) < best + 5e-4:
            found[name], best = 0.0, max(best, value)
    return found, best
