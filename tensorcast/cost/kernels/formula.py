"""What a kernel's time is made of, from first principles and a device's fitted constants; and what it depends on.

``seconds`` is the roofline with launch, tiles, waves and splits of :mod:`tensorcast.cost.roofline` (for collectives
latency and link terms of :mod:`tensorcast.cost.collectives`); ``floor`` what peak arithmetic and bandwidth allow at
best; ``features`` the sizes and ratios from which a fitted residual may tell what the formula misses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from tensorcast.cost import roofline, work
from tensorcast.cost.collectives import Exchange, collective_time
from tensorcast.cost.evidence import Evidence
from tensorcast.cost.kernels.expert_load import TableRankLoad, rank_load
from tensorcast.cost.kernels.triton_tiles import triton_tiles
from tensorcast.cost.kernels.vocabulary import LATENT, NOPE, PRECISION, SIZES, V_DIM, Columns
from tensorcast.cost.registry import Registry
from tensorcast.cost.work import Array, Precision, Work
from tensorcast.profiles.device import CollectiveConstants, DeviceProfile, KernelConstants

ROPE = 64
HIDDEN, Q_RANK = 7168, 1536
"""DeepSeek-V3's width and query rank: the attention modules in the tables are its."""

WAVE_TILES = ((128, 256), (128, 128), (64, 128), (256, 128), (64, 64))
"""Output tiles whose wave counts the residual may ask for."""


Tell = Callable[[], Columns]
"""Works out features when they are asked for."""


@dataclass(frozen=True)
class KernelFormula:
    """One entry per call: its sizes, seconds, the floor under any estimate; how sure the constants are. ``tell`` works
    out features beside the sizes."""

    family: str
    sizes: Columns
    seconds: Array
    floor: Array
    tell: Tell
    error: float
    evidence: Evidence

    @cached_property
    def features(self) -> Columns:
        """By name, one entry per call: log2 of every size (of one more where it may be zero), and what else counts."""
        shifted = ("past", "window", "gated")
        names = [name for name in SIZES[self.family] if name != "skew" and name in self.sizes]
        logs = {n: np.log2(self.sizes[n] + 1.0) if n in shifted else _log(self.sizes[n]) for n in names}
        return logs | self.tell()


def _log(values: Array) -> Array:
    return np.log2(np.maximum(values, 1e-12))


def _waves(tiles: Array, device: DeviceProfile) -> tuple[Array, Array]:
    """log2 of the tiles, and how full the last wave makes them on average (1: no processor idles)."""
    waves = tiles / device.processors
    return _log(tiles), waves / np.ceil(waves)


def _gemm(c: Columns, precision: Precision, device: DeviceProfile) -> tuple[list[Work], Tell]:
    m, n, k, batch = c["m"], c["n"], c["k"], c["batch"]

    def features() -> Columns:
        found = {
            "log_mn": _log(m * n), "log_nk": _log(n * k), "log_mk": _log(m * k),
            "pad_128": m / (np.ceil(m / 128) * 128), "pad_64": m / (np.ceil(m / 64) * 64), "even": 1.0 - np.mod(m, 2.0),
        }
        for rows, columns in WAVE_TILES:
            name = f"{rows}x{columns}"
            tiles = batch * np.ceil(m / rows) * np.ceil(n / columns)
            found["tiles_" + name], found["fill_" + name] = _waves(tiles, device)
        return found

    return [work.gemm(m, n, k, precision, batch)], features


def _experts(c: Columns, precision: Precision, device: DeviceProfile) -> tuple[list[Work], Tell]:
    """Up (and gate) GEMM, activation, down GEMM of the busiest rank, whose load is given as ``rows`` and ``hit``, or
    told from tokens and their routing."""
    if "rows" in c:
        load = TableRankLoad.even(c["rows"], c["hit"])
    else:
        load = rank_load(c["tokens"], c["experts"], c["topk"], c["moe_ep"], skew=c["skew"], slots=c["slots"])
    hidden, inter, gates = c["hidden"], c["inter"] / c["moe_tp"], 1.0 + c["gated"]
    up = work.grouped_gemm(load.rows, load.hit, inter * gates, hidden, precision)
    down = work.grouped_gemm(load.rows, load.hit, hidden, inter, precision)
    activation = work.memory(
        load.rows * inter * gates * 2.0, load.rows * inter * precision.activation_bytes
    )
    return [up, activation, down], lambda: _experts_features(c, load, device)


def _experts_features(c: Columns, load: TableRankLoad, device: DeviceProfile) -> Columns:
    hidden, inter, gates = c["hidden"], c["inter"] / c["moe_tp"], 1.0 + c["gated"]
    held = np.maximum(c["slots"] / c["moe_ep"], 1.0)
    features = {
        "log_rows": _log(load.rows), "log_hit": _log(load.hit), "log_rows_per_expert": _log(load.rows / load.hit),
        "log_choices": _log(c["tokens"] * c["topk"]), "log_inter_rank": _log(inter), "log_held": _log(held),
        "log_largest": _log(load.largest), "hit_share": load.hit / held, "log_tiles_64": _log(load.tiles_64),
        "log_tiles_128": _log(load.tiles_128), "pad_64": load.rows / (64 * load.tiles_64),
        "pad_128": load.rows / (128 * load.tiles_128),
        "skew": c["skew"] + 0.0,
    }
    for name, rows, columns in (
        ("up_128", load.tiles_128, inter * gates), ("up_64", load.tiles_64, inter * gates),
        ("down_128", load.tiles_128, hidden),
    ):
        features["tiles_" + name], features["fill_" + name] = _waves(rows * np.ceil(columns / 128), device)
    return features


def _attention(c: Columns, precision: Precision, device: DeviceProfile, *, decode: bool) -> tuple[list[Work], Tell]:
    found = work.attention(
        c["batch"], c["new"], c["past"], c["q_heads"], c["kv_heads"], qk_dim=c["head_dim"], v_dim=c["head_dim"],
        kv_bytes=c["kv_bytes"], window=c["window"], decode=decode, dtype=precision.name,
    )
    return [found], lambda: {
        "log_group": _log(c["q_heads"] / c["kv_heads"]), "log_batch_kv": _log(c["batch"] * c["kv_heads"]),
        **_sequence_features(c, found, device),
    }


def _mla(c: Columns, precision: Precision, device: DeviceProfile, *, decode: bool) -> tuple[list[Work], Tell]:
    found = work.mla(
        c["batch"], c["new"], c["past"], c["q_heads"], latent=LATENT, rope=ROPE, nope=NOPE, v_dim=V_DIM,
        kv_bytes=c["kv_bytes"], decode=decode, dtype=precision.name,
    )
    return [found], lambda: _sequence_features(c, found, device)


def _sequence_features(c: Columns, found: Work, device: DeviceProfile) -> Columns:
    size = np.ones(len(c["batch"]))
    tiles, fill = _waves(found.tilings[0].tiles * size, device)
    return {
        "tiles": tiles, "fill": fill, "log_depth": _log(found.tilings[0].depth * size),
        "log_batch_heads": _log(c["batch"] * c["q_heads"]),
        "log_batch_tokens": _log(c["batch"] * (c["new"] + c["past"])),
        "log_scores": _log(found.elements * size),
    }


def _mla_module(c: Columns, precision: Precision, device: DeviceProfile, *, decode: bool) -> tuple[list[Work], Tell]:
    """DeepSeek-V3's attention with its projections: queries and latents down, queries up, output."""
    cache = PRECISION["fp8" if np.all(c["kv_bytes"] < 1.5) else "bf16"]
    core, features = _mla(c, cache, device, decode=decode)
    tokens, heads = c["batch"] * c["new"], c["q_heads"]
    wide = np.full(len(tokens), float(HIDDEN))
    works = [
        work.gemm(tokens, wide * 0 + (Q_RANK + LATENT + ROPE), wide, precision),
        work.gemm(tokens, heads * (NOPE + ROPE), wide * 0 + Q_RANK, precision),
        work.gemm(tokens, wide, heads * V_DIM, precision),
    ]
    if decode:
        works += [work.gemm(tokens, LATENT, NOPE, batch=heads), work.gemm(tokens, V_DIM, LATENT, batch=heads)]
    else:
        works.append(work.gemm(tokens + c["batch"] * c["past"], heads * (NOPE + V_DIM), wide * 0 + LATENT, precision))
    return core + works, lambda: features() | {"log_tokens": _log(tokens)}


def _quantise(c: Columns, precision: Precision, device: DeviceProfile) -> tuple[list[Work], Tell]:
    elements = c["m"] * c["k"]
    works = [replace(work.memory(2.0 * elements, elements), family="quantize")]
    return works, lambda: {"log_mk": _log(elements)}


def _linear(c: Columns, precision: Precision, device: DeviceProfile, *, decode: bool) -> tuple[list[Work], Tell]:
    found = work.linear_attention(
        c["batch"], c["new"], c["heads"], key_heads=c["key_heads"], k_dim=c["head_dim"], v_dim=c["head_dim"],
        state_bytes=c["state_bytes"], decode=decode,
    )
    return [found], lambda: {"log_batch_heads": _log(c["batch"] * c["heads"])}


def _convolution(c: Columns, precision: Precision, device: DeviceProfile, *, decode: bool) -> tuple[list[Work], Tell]:
    found = work.short_convolution(c["batch"], c["new"], c["channels"], c["width"], decode=decode)
    return [found], lambda: {"log_elements": _log(c["batch"] * c["new"] * c["channels"])}


WORKS: Registry[Callable[[Columns, Precision, DeviceProfile], tuple[list[Work], Tell]]] = Registry()
"""Kernels of a family's calls, and what tells their features; collectives beside them have formulas of their own."""

WORKS["gemm"] = _gemm
WORKS["grouped_gemm"] = _experts
WORKS["quantize"] = _quantise
for _phase in ("prefill", "decode"):
    WORKS[f"attention_{_phase}"] = partial(_attention, decode=_phase == "decode")
    WORKS[f"mla_{_phase}"] = partial(_mla, decode=_phase == "decode")
    WORKS[f"linear_{_phase}"] = partial(_linear, decode=_phase == "decode")
    WORKS[f"conv_{_phase}"] = partial(_convolution, decode=_phase == "decode")
    WORKS[f"mla_{_phase}_module"] = partial(_mla_module, decode=_phase == "decode")


def _collectives(
    family: str, variant: str, c: Columns, device: DeviceProfile, engine: str
) -> KernelFormula:
    """Collectives, and a MoE exchange as the all-to-all that it is; one group size at a time."""
    backend, _, phase = variant.partition(":")
    size = len(c["ranks"])
    seconds, wire, floor, error = np.zeros(size), np.zeros(size), np.zeros(size), 0.0
    evidence: Evidence = "calibrated"
    exchange: Exchange = {"custom": variant != "nccl"}
    payload = c.get("payload_bytes", np.zeros(size))
    if family == "moe_exchange":
        payload = c["tokens"] * c["topk"] * c["hidden"] * c["copy_bytes"]
        low_latency = backend.endswith(("_ll", "low_latency", "generation"))
        exchange = {
            "kind": "low_latency" if low_latency else "high_throughput",
            "phase": "combine" if phase.startswith("combine") else "dispatch",
        }
    inner = device.interconnect[0].size
    for ranks in sorted(set(c["ranks"].tolist())):
        at = c["ranks"] == ranks
        outer = () if ranks <= inner else (int(ranks),)
        extent = (int(min(ranks, inner)), *outer)
        if family == "moe_exchange":
            exchange["copies"] = c["topk"][at]
        name = "all_to_all" if family == "moe_exchange" else family
        found = collective_time(name, payload[at], extent, device, engine=engine, **exchange)
        seconds[at], wire[at], error = found.seconds, found.wire_bytes, max(error, float(np.max(found.error)))
        if family != "moe_exchange":  # whatever the algorithm, a rank needs what the others hold, over all its links
            links = sum(tier.among(size) for tier, size in zip(device.interconnect, extent, strict=False))
            floor[at] = payload[at] * (1.0 - 1.0 / ranks) / links
        evidence = found.evidence if found.evidence == "datasheet" else evidence

    features = {"log_seconds": _log(seconds), "log_payload": _log(payload), "log_wire": _log(wire)}
    if family == "moe_exchange":
        features["log_token_bytes"] = _log(c["hidden"] * c["copy_bytes"])
    return KernelFormula(
        family, c, seconds=seconds, floor=floor, tell=lambda: features, error=error, evidence=evidence
    )


def formula_of(
    family: str, dtype: str, variant: str, columns: Columns, device: DeviceProfile, *, engine: str
) -> KernelFormula:
    """The formula of one kernel; ``columns`` as :data:`~tensorcast.cost.kernels.vocabulary.SIZES` names them."""
    if family not in WORKS:
        return _collectives(family, variant, columns, device, engine)
    c, precision = columns, PRECISION.get(dtype, PRECISION["bf16"])
    works, features = WORKS[family](c, precision, device)
    size = len(next(iter(c.values())))
    seconds, compute, traffic, error = np.zeros(size), np.zeros(size), np.zeros(size), 0.0
    evidence: Evidence = "calibrated"
    bandwidth = float(device.memory_bandwidth_bytes_per_s)
    for one in works:
        constants, found = roofline.constants_for(device, one.family, one.dtype, engine)
        seconds = seconds + roofline.kernel_time(one, constants, device).seconds
        compute = compute + one.flops / roofline.peak_flops(device, one.dtype)
        traffic = traffic + one.bytes / bandwidth
        error = max(error, constants.median_error or 0.0)
        evidence = found if found == "datasheet" else evidence

    def tell() -> Columns:
        own = features()
        balance = {"log_seconds": _log(seconds), "log_intensity": _log(compute / traffic)}
        if family == "grouped_gemm":
            # what beside the GEMMs an expert layer may pass over: every choice's input and activation (engines differ
            # in whether they skip other ranks' choices), and a row per expert
            choices = c["tokens"] * c["topk"] * 2.0 / bandwidth
            balance |= {
                "share_routed": _log(choices * c["hidden"] / seconds), "share_experts": _log(c["experts"] / seconds),
                "share_activation": _log(choices * c["inter"] / c["moe_tp"] / seconds),
                **triton_tiles(c, own, dtype, device, engine),
            }
        return balance | own

    return KernelFormula(
        family, c, seconds=seconds, floor=np.maximum(compute, traffic), tell=tell, error=error, evidence=evidence
    )


OF_THE_FIT = {"points", "held_out", "median_error", "mean_error", "p90_error", "reduce_s"}
"""What fitted constants say of their fit, and of kernels without a model: no formula here reads it."""


def constants_digest(family: str, dtype: str, device: DeviceProfile, engine: str) -> str:
    """A short hash of every number of the device that the formula of a kernel rests on, whatever its shape."""
    if family in WORKS:
        shape = {name: np.ones(1) for name in SIZES[family]}
        works, _ = WORKS[family](shape, PRECISION.get(dtype, PRECISION["bf16"]), device)
        facts: list[Any] = [device.memory_bandwidth_bytes_per_s, device.processors, device.whole_tiles]
        for name, kind in sorted({(one.family, one.dtype) for one in works}):
            constants, _ = roofline.constants_for(device, name, kind, engine)
            facts += [_without_fit(constants), roofline.peak_flops(device, kind)]
    else:
        op, tier = "all_to_all" if family == "moe_exchange" else family, device.interconnect[0]
        facts = [tier.size, float(tier.bandwidth_bytes_per_s), float(tier.latency_s), *["pairwise"] * tier.pairwise]
        known = device.calibration.collectives if device.calibration else ()
        facts += [_without_fit(one) for one in known if one.op == op]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]


def _without_fit(constants: KernelConstants | CollectiveConstants) -> dict[str, Any]:
    """The numbers that formulas read: the fields are plain, so none is written by pydantic, whose serializers would be
    built for it."""
    return {name: value for name, value in constants if name not in OF_THE_FIT}
