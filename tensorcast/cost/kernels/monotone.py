"""Times that never fall as a size grows, on devices that were not measured.

``log seconds = (1 - share) * log formula + trees``. The formula never falls as a size grows, nor do the features
here, nor the trees as one of these grows (they are fitted so): their sum cannot. ``share`` is how much of the formula's
growth the trees may take back, to say where a kernel becomes more efficient; it is settled with the fit. Outside the
formula's span in the fit the time grows as the formula does.

A formula differs between devices by a factor above all: beside another device's, its seconds count from the median over
the kernel's probes, a few of its measured shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tensorcast.cost.kernels.formula import KernelFormula, formula_of
from tensorcast.cost.kernels.vocabulary import Columns
from tensorcast.profiles.device import DeviceProfile

_HEADS = ("batch", "new", "past", "q_heads", "log_batch_heads", "log_batch_tokens", "log_depth", "log_scores", "tiles")

MONOTONE = {
    "gemm": (
        "m", "n", "k", "batch", "log_mn", "log_nk", "log_mk", "tiles_128x256", "tiles_128x128", "tiles_64x128",
        "tiles_256x128", "tiles_64x64",
    ),
    "grouped_gemm": (
        "tokens", "hidden", "inter", "topk", "log_rows", "log_hit", "log_choices", "log_inter_rank", "log_tiles_64",
        "log_tiles_128", "tiles_up_128", "tiles_up_64", "tiles_down_128",
    ),
    "attention_prefill": (*_HEADS, "kv_heads", "head_dim", "log_batch_kv"),
    "attention_decode": (*_HEADS, "kv_heads", "head_dim", "log_batch_kv"),
    "mla_prefill": _HEADS, "mla_decode": _HEADS,
}
"""Features that never fall as one of the :data:`~tensorcast.cost.kernels.lattice.SIDES` grows, all else equal. Not as
the number of experts does: the same rows, spread over more of them, may fill fewer tiles."""

FREE = ("kv_bytes", "skew", "gated", "moe_tp", "moe_ep", "experts", "slots")
"""What else the trees may ask for, in either direction."""


def middle_of(
    family: str, dtype: str, probes: Mapping[str, Sequence[float]], device: DeviceProfile, engine: str
) -> float:
    """log2 of the formula's median seconds over the probes; 0 without any."""
    if not probes:
        return 0.0
    columns = {name: np.array(values) for name, values in probes.items()}
    return float(np.median(formula_of(family, dtype, "", columns, device, engine=engine).features["log_seconds"]))


def coordinates(
    family: str, columns: Columns, physics: KernelFormula, device: DeviceProfile, middle: float = 0.0
) -> Columns:
    """What monotone trees are told: :data:`MONOTONE`, the waves that tiles make on this device, log2 of the formula's
    seconds, of the datasheet's for arithmetic and traffic counted from ``middle`` (:func:`middle_of`), :data:`FREE`."""
    features = physics.features
    found = {name: features[name] for name in MONOTONE[family]}
    for name in MONOTONE[family]:
        if name.startswith("tiles"):
            tiles = np.exp2(features[name]) / device.processors
            found["waves" + name.removeprefix("tiles")] = np.log2(np.maximum(np.ceil(tiles - 1e-6), 1.0))
    found["log_seconds"] = features["log_seconds"]
    if "log_intensity" in features:
        floor, intensity = np.log2(np.maximum(physics.floor, 1e-30)) - middle, features["log_intensity"]
        found["log_compute"] = floor + np.minimum(intensity, 0.0)
        found["log_traffic"] = floor - np.maximum(intensity, 0.0)
    if "window" in columns:
        found["windowed"] = (columns["window"] > 0).astype(float)
    return found | {name: columns[name] + 0.0 for name in FREE if name in columns}
