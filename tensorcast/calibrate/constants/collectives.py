"""Alpha-beta constants of collectives and of exchanges between experts, inside one node."""

from __future__ import annotations

import numpy as np

from tensorcast.calibrate.constants.errors import errors
from tensorcast.calibrate.constants.minimise import FEWEST, fit_constants
from tensorcast.calibrate.measured_tables import MeasuredKernel, MeasuredSystem, held_out, joined
from tensorcast.cost.collectives import Kind, collective_time
from tensorcast.profiles.device import CollectiveConstants, DeviceProfile

ALGORITHMS = {"all_reduce": "ring", "all_gather": "ring", "reduce_scatter": "ring", "all_to_all": "direct"}
"""What NCCL's measured collectives are taken to run."""

LEAST_SMS = 20
"""Processors of a high-throughput exchange from which on it is not throttled: what engines give it at least."""

COLLECTIVE_BOUNDS = {
    "latency_s": (8e-6, 5e-7, 2e-4), "step_latency_s": (1e-6, 1e-9, 2e-5), "pipeline_s": (3e-7, 1e-10, 2e-5),
    "bandwidth_efficiency": (0.8, 0.1, 1.2),
}


def _alpha_beta(values: dict[str, float], ranks: np.ndarray, wire: np.ndarray, speed: np.ndarray) -> np.ndarray:
    moving = wire / (speed * values["bandwidth_efficiency"])
    fixed = values["latency_s"] + values.get("step_latency_s", 0.0) * (ranks - 2)
    return fixed + moving + 2.0 * np.sqrt(values.get("pipeline_s", 0.0) * moving)


def _wire_bytes(rows: MeasuredKernel, device: DeviceProfile) -> np.ndarray:
    """What one rank sends to others, as a step is priced; in an all-reduce what a ring sends, scatter and gather."""
    c, (family, _, _, variant) = rows.columns, rows.key
    wire = np.zeros(len(rows))
    bare = device.model_copy(update={"calibration": None})
    op = {"all_reduce": "reduce_scatter", "moe_exchange": "all_to_all"}.get(family, family)
    kind: Kind = "high_throughput" if variant.startswith("high_throughput") else "direct"
    for ranks in np.unique(c["ranks"]):
        at = c["ranks"] == ranks
        copies = c["topk"][at] if family == "moe_exchange" else 1.0
        found = collective_time(op, _payload(rows)[at], (int(ranks),), bare, kind=kind, copies=copies)
        wire[at] = found.wire_bytes
    return wire * (2.0 if family == "all_reduce" else 1.0)


def _payload(rows: MeasuredKernel) -> np.ndarray:
    c = rows.columns
    return c["payload_bytes"] if "payload_bytes" in c else c["tokens"] * c["topk"] * c["hidden"] * c["copy_bytes"]


def fit_collective(op: str, algorithm: str, rows: MeasuredKernel, device: DeviceProfile) -> CollectiveConstants:
    """Alpha-beta constants of one algorithm on the innermost tier, errors on the shapes held out."""
    tier = device.interconnect[0]
    out = held_out(rows.key[0], rows.columns)
    ranks, wire, seconds = rows.columns["ranks"], _wire_bytes(rows, device), rows.seconds
    bounds = dict(COLLECTIVE_BOUNDS)
    if len(np.unique(ranks)) == 1:
        del bounds["step_latency_s"]
    speed = np.array([tier.among(int(n)) for n in ranks])
    near = ranks[~out], wire[~out], speed[~out]
    found, _ = fit_constants(bounds, lambda values: _alpha_beta(values, *near), seconds[~out])
    score = errors(_alpha_beta(found, ranks[out], wire[out], speed[out]), seconds[out])
    return CollectiveConstants(
        op=op, tier=tier.name, algorithm=algorithm, engine="any", points=int((~out).sum()),  # type: ignore[arg-type]
        held_out=int(out.sum()), **found, **score,
    )


def fit_custom_all_reduce(
    engine: str, rows: MeasuredKernel, ring: CollectiveConstants, device: DeviceProfile
) -> list[CollectiveConstants]:
    """The engines' own all-reduce: one-shot or two-shot or NCCL's, whichever is fastest, so all are fitted at once."""
    tier = device.interconnect[0]
    out = held_out("all_reduce", rows.columns)
    ranks, payload, seconds = rows.columns["ranks"], rows.columns["payload_bytes"], rows.seconds
    speed = np.array([tier.among(int(n)) for n in ranks])
    start = {
        "latency_s": (4e-6, 5e-7, 5e-5), "step_latency_s": (1e-7, 1e-9, 5e-6), "bandwidth_efficiency": (0.6, 0.1, 1.0),
    }
    bounds = {f"{name}:{shot}": value for shot in ("one_shot", "two_shot") for name, value in start.items()}

    def part(values: dict[str, float], shot: str) -> dict[str, float]:
        return {name: values[f"{name}:{shot}"] for name in start}

    def predict(values: dict[str, float], at: np.ndarray) -> np.ndarray:
        n, size = ranks[at], payload[at]
        around = 2.0 * (n - 1) / n * size
        return np.minimum.reduce([
            _alpha_beta(part(values, "one_shot"), n, (n - 1) * size, speed[at]),
            _alpha_beta(part(values, "two_shot"), n, around, speed[at]),
            _alpha_beta(ring.model_dump(include=set(COLLECTIVE_BOUNDS)), n, around, speed[at]),
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


def exchange_rows(system: MeasuredSystem, inner: int) -> list[tuple[str, MeasuredKernel]]:
    """(algorithm, rows) of DeepEP's exchanges that stay inside ``inner`` ranks and are not throttled, the quickest of
    each shape: how many processors an exchange is given is no size of a collective."""
    found = []
    for rows in system.family("moe_exchange"):
        backend, _, phase = rows.key[3].partition(":")
        if rows.key[2] != "any" or phase not in ("dispatch", "combine"):
            continue
        whole = rows.columns["ranks"] <= inner
        if backend == "high_throughput":
            whole &= rows.columns["sms"] >= LEAST_SMS
        found.append((f"{backend}_{phase}", rows.take(whole).fastest(without=("sms",))))
    return found


def fit_collectives(device: DeviceProfile, system: MeasuredSystem) -> tuple[CollectiveConstants, ...]:
    """Every collective and exchange kernel that was measured on ``system``."""
    found = [(op, algorithm, system.kernels.get((op, "any", "any", "nccl"))) for op, algorithm in ALGORITHMS.items()]
    found += [("all_to_all", *one) for one in exchange_rows(system, device.interconnect[0].size)]
    fitted = [
        fit_collective(op, algorithm, rows, device)
        for op, algorithm, rows in found if rows is not None and len(rows) >= FEWEST
    ]
    ring = next((one for one in fitted if one.op == "all_reduce"), None)
    custom = [rows for rows in system.family("all_reduce") if rows.key[3] == "custom"]
    if ring is not None and sum(map(len, custom)) >= FEWEST:
        for rows in custom:
            fitted += fit_custom_all_reduce(rows.key[2], rows, ring, device)
        fitted += fit_custom_all_reduce("any", joined(custom), ring, device)
    return tuple(fitted)
