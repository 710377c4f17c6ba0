"""Collectives."""

from __future__ import annotations

import numpy as np
import pandas as pd

from tensorcast.calibrate.constants import tables as measured
from tensorcast.calibrate.constants.errors import errors
from tensorcast.calibrate.constants.minimise import FEWEST, fit_constants
from tensorcast.profiles.device import CollectiveConstants, DeviceProfile

COLLECTIVE_BOUNDS = {
    "latency_s": (8e-6, 5e-7, 2e-4), "step_latency_s": (1e-6, 1e-9, 2e-5), "pipeline_s": (3e-7, 1e-10, 2e-5),
    "bandwidth_efficiency": (0.8, 0.1, 1.2),
}


def _alpha_beta(values: dict[str, float], ranks: np.ndarray, wire: np.ndarray, speed: float) -> np.ndarray:
    moving = wire / (speed * values["bandwidth_efficiency"])
    fixed = values["latency_s"] + values.get("step_latency_s", 0.0) * (ranks - 2)
    return fixed + moving + 2.0 * np.sqrt(values.get("pipeline_s", 0.0) * moving)


def fit_collective(op: str, algorithm: str, frame: pd.DataFrame, device: DeviceProfile) -> CollectiveConstants:
    """Alpha-beta constants of one algorithm on the innermost tier, from ``ranks``, ``payload_bytes``, ``seconds``."""
    tier = device.interconnect[0]
    out = measured.held_out(frame, measured.SHAPE[op])
    ranks, wire = frame.ranks.to_numpy(float), measured.wire_bytes(op, algorithm, frame)
    bounds = dict(COLLECTIVE_BOUNDS)
    if frame.ranks.nunique() == 1:
        del bounds["step_latency_s"]
    seconds, speed = frame.seconds.to_numpy(float), float(tier.bandwidth_bytes_per_s)
    found, _ = fit_constants(bounds, lambda values: _alpha_beta(values, ranks[~out], wire[~out], speed), seconds[~out])
    score = errors(_alpha_beta(found, ranks[out], wire[out], speed), seconds[out])
    return CollectiveConstants(
        op=op, tier=tier.name, algorithm=algorithm, engine="any", points=int((~out).sum()),  # type: ignore[arg-type]
        held_out=int(out.sum()), **found, **score,
    )


def fit_custom_all_reduce(
    engine: str, frame: pd.DataFrame, ring: CollectiveConstants, device: DeviceProfile
) -> list[CollectiveConstants]:
    """The engines' own all-reduce: one-shot or two-shot or NCCL's, whichever is fastest, so all are fitted at once."""
    tier = device.interconnect[0]
    speed = float(tier.bandwidth_bytes_per_s)
    out = measured.held_out(frame, measured.SHAPE["all_reduce"])
    ranks, payload, seconds = (frame[c].to_numpy(float) for c in ("ranks", "payload_bytes", "seconds"))
    start = {
        "latency_s": (4e-6, 5e-7, 5e-5), "step_latency_s": (1e-7, 1e-9, 5e-6), "bandwidth_efficiency": (0.6, 0.1, 1.0),
    }
    bounds = {f"{name}:{shot}": value for shot in ("one_shot", "two_shot") for name, value in start.items()}

    def part(values: dict[str, float], shot: str) -> dict[str, float]:
        return {name: values[f"{name}:{shot}"] for name in start}

    def predict(values: dict[str, float], rows: np.ndarray) -> np.ndarray:
        n, size = ranks[rows], payload[rows]
        around = 2.0 * (n - 1) / n * size
        return np.minimum.reduce([
            _alpha_beta(part(values, "one_shot"), n, (n - 1) * size, speed),
            _alpha_beta(part(values, "two_shot"), n, around, speed),
            _alpha_beta(ring.model_dump(include=set(COLLECTIVE_BOUNDS)), n, around, speed),
        ])

    found, _ = fit_constants(bounds, lambda values: predict(values, ~out), seconds[~out])
    score = errors(predict(found, out), seconds[out])
    return [
        CollectiveConstants(
            op="all_reduce", tier=tier.name, algorithm=shot, engine=engine, points=int((~out).sum()),
            held_out=int(out.sum()), **part(found, shot), **score,
        )
        for shot in ("one_shot", "two_shot")
    ]


def fit_collectives(device: DeviceProfile, tables: measured.Tables, system: str) -> tuple[CollectiveConstants, ...]:
    """Every collective and exchange kernel that the tables hold for ``system``."""
    fitted: list[CollectiveConstants] = []
    for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        frame = tables.family(op)
        for algorithm, rows in frame[frame.system == system].groupby("algorithm"):
            if algorithm != "custom" and len(rows) >= FEWEST:
                fitted.append(fit_collective(op, str(algorithm), rows, device))
    ring = next((c for c in fitted if c.op == "all_reduce"), None)
    frame = tables.family("all_reduce")
    custom = frame[(frame.system == system) & (frame.algorithm == "custom")]
    if ring is not None and len(custom) >= FEWEST:
        for engine, rows in custom.groupby("engine"):
            fitted += fit_custom_all_reduce(str(engine), rows, ring, device)
        fitted += fit_custom_all_reduce("any", custom, ring, device)
    return tuple(fitted)
