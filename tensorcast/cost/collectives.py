"""Seconds of a collective: per tier ``latency + wire/bandwidth + 2*sqrt(chunk*wire/bandwidth)``, cheapest algorithm.

``wire`` is what one rank sends over its link of that tier; the square root is what filling a pipeline of optimally
sized chunks costs. Step counts: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in
MPICH" (2005). MoE exchanges: DeepEP (github.com/deepseek-ai/DeepEP).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypedDict

import numpy as np

from tensorcast.cost.evidence import Evidence
from tensorcast.cost.work import Mask, Size
from tensorcast.errors import InputError
from tensorcast.profiles.device import CollectiveConstants, DeviceProfile, Tier

Kind = Literal["direct", "high_throughput", "low_latency"]
Phase = Literal["dispatch", "combine"]


class Exchange(TypedDict, total=False):
    """Options of :func:`collective_time` that say how a group exchanges."""

    kind: Kind
    phase: Phase
    copies: Size
    distinct_nodes: Size | None
    distinct_ranks: Size | None
    custom: bool



EFFICIENCY = {"ring": 0.80, "one_shot": 0.60, "two_shot": 0.60, "direct": 0.75}
"""Fractions of link speed assumed where nothing was measured (assumption; fitted NVLink values lie in 0.5-1.0). There
a pairwise exchange starts in four hops of latency, as NCCL's does over NVLink."""

PAIRWISE = {"ring": 0.70, "one_shot": 0.75, "two_shot": 0.60, "direct": 0.75}
"""The same where each two GPUs have links of their own. MI300X: 48 of 64 GB/s of a link (rocm.blogs.amd.com, RCCL and
xGMI, 2025-03-02), as between 2 GPUs in ROCm/aiter#801 (512 MiB in 11.1 ms); vllm#19744 (4 GPUs, 16 MiB in 230 us)."""

BETWEEN_HOSTS = 0.94
"""The same of rings over a NIC of 400 Gb/s: 46 to 48 GB/s, as one of NCCL's authors has it (NVIDIA/nccl-tests#290)."""

EXCHANGE = {
    # kind, spans nodes: (fixed seconds, fraction of link speed)
    ("low_latency", False): (14e-6, 0.60),
    ("low_latency", True): (24e-6, 0.95),
    ("high_throughput", False): (35e-6, 0.65),
    ("high_throughput", True): (60e-6, 0.88),
}
"""MoE exchange kernels where nothing was fitted. Across nodes from DeepEP's published tables (README, one 400 Gb/s NIC
per GPU): low latency 47-48 GB/s physical at 2, 4 and 8 nodes, two-stage 43-45 GB/s at 4 and 8. Inside a node: fits of
H100 and H200 tables."""

DATASHEET_ERROR = 0.4
"""Median relative error stated where no constants were fitted: on NVLink, where it can be checked, these assumptions
are 10-35 % off; links between nodes could not be checked but for DeepEP's published rates."""


@dataclass(frozen=True)
class CollectiveTime:
    """Seconds of one collective; arrays where the payload was one.

    ``algorithm`` is the cheapest one (an array of names where the payload is an array), ``tier`` the outermost tier
    that the group spans, ``wire_bytes`` what one rank sends to others over all tiers, ``error`` the median relative
    error of the worst constants involved, on rows held out of the fit (an assumption where evidence is ``datasheet``).
    ``calibrated``: of which payloads the constants were fitted; ``evidence`` is that of all.
    """

    seconds: Size
    algorithm: str | np.ndarray
    tier: str
    wire_bytes: Size
    evidence: Evidence
    error: Size
    calibrated: bool | Mask


@dataclass(frozen=True)
class _Leg:
    """One algorithm's time, before the cheapest is chosen."""

    algorithm: str
    seconds: Size
    wire: Size
    calibrated: bool | Mask
    error: Size

    def then(self, other: _Leg, algorithm: str) -> _Leg:
        return _Leg(
            algorithm, self.seconds + other.seconds, self.wire + other.wire,
            self.calibrated & other.calibrated, np.maximum(self.error, other.error),
        )


def group_extent(size: int, stride: int, device: DeviceProfile) -> tuple[int, ...]:
    """How many ranks of a group lie inside one domain of each tier, innermost first, up to the tier that holds all.

    The group's ranks are ``0, stride, 2*stride, ...``; groups are taken as aligned with the domains. ``(8, 32)``:
    8 per node, 32 in all.
    """
    if size < 1 or stride < 1:
        raise InputError(f"group of {size} ranks spaced {stride}: both must be at least 1")
    span = (size - 1) * stride + 1
    if span > device.world_limit:
        raise InputError(
            f"a group of {size} ranks spaced {stride} spans {span} GPUs: {device.name} has at most {device.world_limit}"
        )
    extent: list[int] = []
    for tier in device.interconnect:
        extent.append(min(size, math.ceil(tier.size / stride)))
        if extent[-1] == size:
            break
    return tuple(extent)


MOST_DEVICES = 256
"""Whose constants are kept by what they are of."""

_constants: dict[int, tuple[object, dict[tuple[str, ...], CollectiveConstants]]] = {}
"""By identity of a device's calibration, which stays alive here."""


def find_constants(
    device: DeviceProfile, op: str, tier: str, algorithm: str, engine: str
) -> CollectiveConstants | None:
    """The fitted constants for this engine, else for any engine, else none."""
    calibration = device.calibration
    if calibration is None:
        return None
    if id(calibration) not in _constants:
        while len(_constants) >= MOST_DEVICES:
            del _constants[next(iter(_constants))]
        every: dict[tuple[str, ...], CollectiveConstants] = {
            (c.op, c.tier, c.algorithm, c.engine): c for c in calibration.collectives
        }
        _constants[id(calibration)] = calibration, every
    _, known = _constants[id(calibration)]
    return known.get((op, tier, algorithm, engine)) or known.get((op, tier, algorithm, "any"))


def pipelined(wire: Size, bytes_per_s: float, chunk_s: float) -> Size:
    """Seconds to move ``wire`` bytes through a pipeline of chunks that cost ``chunk_s`` each, optimally sized."""
    moving = wire / bytes_per_s
    return moving + 2.0 * np.sqrt(chunk_s * moving) if chunk_s else moving


def _usual(tier: Tier) -> dict[str, float]:
    """Fractions of link speed, by algorithm, where nothing was measured."""
    return PAIRWISE if tier.pairwise else EFFICIENCY


def _leg(
    device: DeviceProfile, tier: int, op: str, algorithm: str, engine: str, *, ranks: int, wire: Size, hops: float,
    tree: bool = False,
) -> _Leg:
    """One algorithm among ``ranks`` ranks of one tier; ``hops`` messages one after another where nothing is fitted."""
    level = device.interconnect[tier]
    fit = find_constants(device, op, level.name, algorithm, engine)
    name, speed = "tree" if tree else algorithm, level.among(ranks)
    if fit is None:
        moving = wire / (speed * (BETWEEN_HOSTS if tier and algorithm == "ring" else _usual(level)[algorithm]))
        return _Leg(name, hops * float(level.latency_s) + moving, wire, False, DATASHEET_ERROR)
    steps = 2.0 * math.log2(ranks) if tree else ranks - 2
    fixed = fit.latency_s + fit.step_latency_s * steps
    moving = pipelined(wire, speed * fit.bandwidth_efficiency, fit.pipeline_s)
    return _Leg(name, fixed + moving, wire, True, DATASHEET_ERROR if fit.median_error is None else fit.median_error)


def _cheapest(legs: list[_Leg]) -> _Leg:
    """Elementwise cheapest; the name becomes an array where the seconds are one."""
    if len(legs) == 1:
        return legs[0]
    seconds = np.stack(np.broadcast_arrays(*[np.asarray(leg.seconds, dtype=float) for leg in legs]))
    best = seconds.argmin(axis=0)
    used = [leg.calibrated for i, leg in enumerate(legs) if (best == i).any()]
    wire = np.choose(best, [np.asarray(leg.wire, dtype=float) for leg in legs])
    names = np.array([leg.algorithm for leg in legs])[best]
    scalar = best.ndim == 0
    return _Leg(
        str(names) if scalar else names, seconds.min(axis=0)[()], wire[()],
        used[0] if len({*map(id, used)}) == 1 else np.choose(best, [leg.calibrated for leg in legs])[()],
        np.choose(best, [np.asarray(leg.error) for leg in legs])[()],
    )


def _all_reduce(
    device: DeviceProfile, levels: list[tuple[int, int]], payload: Size, engine: str, *, custom: bool
) -> _Leg:
    """Inside one tier the cheapest of rings, trees and, on the innermost one, kernels that read peers' memory (one- and
    two-shot). Over several: rings through all of them; or whole tensors tier by tier when small."""
    (tier, ranks), outer = levels[0], levels[1:]
    leg = partial(_leg, device, tier, "all_reduce", engine=engine, ranks=ranks)
    around = 2.0 * (ranks - 1) / ranks * payload
    legs = [
        leg("ring", wire=around, hops=2.0 * (ranks - 1)),
        leg("ring", wire=2.0 * payload, hops=2.0 * math.log2(ranks), tree=True),
    ]
    if tier == 0 and custom:
        legs.append(leg("one_shot", wire=(ranks - 1.0) * payload, hops=2.0))
        legs.append(leg("two_shot", wire=around, hops=3.0 if device.interconnect[0].pairwise else 4.0))
    inside = _cheapest(legs)
    if not outer:
        return inside
    ranks = math.prod(ranks for _, ranks in levels)
    rings = _rings(device, "all_reduce", levels, 2.0 * (ranks - 1) / ranks * payload, engine, turns=2.0)
    across = _all_reduce(device, outer, payload, engine, custom=custom)
    return _cheapest([rings, inside.then(across, "nested")])


def _rings(
    device: DeviceProfile, op: str, levels: list[tuple[int, int]], sent: Size, engine: str, *, turns: float
) -> _Leg:
    """Rings through all tiers at once, one for each rank of a host: each rank sends ``sent`` bytes inside, its share of
    them leaves the host. Chunk follows chunk: the slowest tier tells how long they take, each how long the first does
    (``turns`` times around)."""
    fixed: Size = 0.0
    worst: Size = 0.0
    total: Size = 0.0
    calibrated: bool | Mask = True
    error: Size = 0.0
    for tier, ranks in levels:
        leg, bare = (
            _leg(device, tier, op, "ring", engine, ranks=ranks, wire=wire, hops=turns * (ranks - 1))
            for wire in (sent, 0.0 * sent)
        )
        fixed, worst = fixed + bare.seconds, np.maximum(worst, leg.seconds - bare.seconds)
        total, calibrated, error = total + sent, calibrated & leg.calibrated, np.maximum(error, leg.error)
        sent = sent / ranks
    return _Leg("ring" if len(levels) == 1 else "rings", fixed + worst, total, calibrated, error)


def _exchange(
    device: DeviceProfile, extent: tuple[int, ...], levels: list[tuple[int, int]], payload: Size, engine: str, *,
    kind: Kind, phase: Phase, copies: Size, distinct_nodes: Size | None, distinct_ranks: Size | None,
) -> _Leg:
    """All-to-all: every tier carries the share that goes to peers first met there; tiers work at the same time."""
    ranks, spans = extent[-1], len(levels) > 1
    worst: Size = 0.0
    wire_total: Size = 0.0
    fixed, calibrated, error = 0.0, True, 0.0
    for tier, peers in levels:
        level, inner = device.interconnect[tier], extent[tier - 1] if tier else 1
        wire = payload * (extent[tier] - inner) / ranks
        if kind == "high_throughput":  # one copy per distinct node over the NIC, then one per distinct rank inside
            groups = math.ceil(ranks / inner)
            distinct = distinct_ranks if tier == 0 else distinct_nodes
            if distinct is None:
                distinct = groups * (1.0 - np.power(1.0 - 1.0 / groups, copies))
            wire = payload / copies * distinct * (groups - 1.0) / groups
        algorithm = "direct" if kind == "direct" else f"{kind}_{phase}"
        fit = find_constants(device, "all_to_all", level.name, algorithm, engine)
        if fit is not None:
            efficiency, chunk = fit.bandwidth_efficiency, fit.pipeline_s
            start = fit.latency_s + fit.step_latency_s * (ranks - 2)
            error = max(error, DATASHEET_ERROR if fit.median_error is None else fit.median_error)
        else:
            calibrated, error, chunk = False, max(error, DATASHEET_ERROR), 0.0
            start, efficiency = EXCHANGE[kind, tier > 0] if kind != "direct" else (
                4.0 * float(level.latency_s), _usual(level)["direct"]
            )  # fmt: skip
        fixed = max(fixed, start)
        worst = np.maximum(worst, pipelined(wire, level.among(peers) * efficiency, chunk))
        wire_total = wire_total + wire
    name = kind if kind != "direct" else ("hierarchical" if spans else "direct")
    return _Leg(name, fixed + worst, wire_total, calibrated, error)


def collective_time(
    op: str, payload_bytes: Size, extent: tuple[int, ...], device: DeviceProfile, *, engine: str = "any",
    kind: Kind = "direct", phase: Phase = "dispatch", copies: Size = 1.0,
    distinct_nodes: Size | None = None, distinct_ranks: Size | None = None, custom: bool = True,
) -> CollectiveTime:
    """Seconds of one collective of a group that lies as ``extent`` says (:func:`group_extent`).

    ``payload_bytes``, per op:

    * all_reduce: the tensor on each rank;
    * all_gather: the gathered total; reduce_scatter: the total that each rank puts in;
    * all_to_all: what one rank sends in all, to itself included: tokens x copies x bytes of one copy;
    * send_recv: the message; it crosses the outermost tier of ``extent``.

    ``kind`` (all_to_all only): ``direct`` pairwise messages (NCCL); ``low_latency`` every copy goes straight to its
    expert's rank; ``high_throughput`` one copy per distinct node over the outer tier, forwarded inside. The last needs
    ``copies`` (experts per token) and, where routing is not uniform, the expected ``distinct_nodes`` and
    ``distinct_ranks`` that a token's copies go to. ``custom``: the engine's own one- and two-shot all-reduce may run
    (else NCCL alone); constants are those of ``engine`` where it was measured.
    """
    # (tier, ranks that take part in it) of every tier that the group uses, innermost first
    inside = zip((1, *extent), extent, strict=False)
    levels = [(tier, math.ceil(ranks / inner)) for tier, (inner, ranks) in enumerate(inside) if ranks > inner]
    if not levels:
        zero = np.zeros_like(np.asarray(payload_bytes, dtype=float))[()]
        return CollectiveTime(
            seconds=zero, algorithm="none", tier=device.interconnect[0].name, wire_bytes=zero, evidence="datasheet",
            error=0.0, calibrated=False,
        )
    if len(extent) > len(device.interconnect):
        raise InputError(f"extent {extent} has more tiers than {device.name} ({len(device.interconnect)})")
    if op == "all_reduce":
        leg = _all_reduce(device, levels, payload_bytes, engine, custom=custom)
    elif op in ("all_gather", "reduce_scatter"):
        ranks = math.prod(ranks for _, ranks in levels)
        leg = _rings(device, op, levels, (ranks - 1.0) / ranks * payload_bytes, engine, turns=1.0)
    elif op == "all_to_all":
        leg = _exchange(
            device, extent, levels, payload_bytes, engine, kind=kind, phase=phase, copies=copies,
            distinct_nodes=distinct_nodes, distinct_ranks=distinct_ranks,
        )
    elif op == "send_recv":
        leg = _leg(device, levels[-1][0], "send_recv", "direct", engine, ranks=2, wire=payload_bytes, hops=1.0)
    else:
        raise InputError(f"unknown collective {op!r}: all_reduce, all_gather, reduce_scatter, all_to_all, send_recv")
    evidence: Evidence = "calibrated" if leg.calibrated is True or np.all(leg.calibrated) else "datasheet"
    outermost = device.interconnect[levels[-1][0]].name
    return CollectiveTime(
        seconds=leg.seconds, algorithm=leg.algorithm, tier=outermost, wire_bytes=leg.wire, evidence=evidence,
        error=leg.error, calibrated=leg.calibrated,
    )
