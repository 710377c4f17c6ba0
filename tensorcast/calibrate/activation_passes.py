"""Quantising of activations is inside the measured calls of quantised GEMMs; in a step it is a kernel of its own.

The tables' collector times a linear layer that is handed bf16: TensorRT-LLM's FP8 call first looks for the largest
number (9 us at any size) and then casts; vLLM's and SGLang's cast with a scale per token, block or 16 numbers. How
long that takes alone is in tables of its own: ``scale_matrix`` casts with a known scale, ``computescale`` is what
finding the scale adds. GEMMs here are what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from tensorcast.calibrate.measured_rows import MeasuredSystem

SCALE, CAST = "computescale", "scale_matrix"
ENGINES = ("trtllm", "vllm", "sglang")

INSIDE = {
    ("fp8", "trtllm"): (("trtllm", SCALE), ("trtllm", CAST)),
    ("fp8", "vllm"): (("vllm", SCALE), ("vllm", CAST)),
    ("fp8", "sglang"): (("vllm", SCALE), ("vllm", CAST)),
    **{(dtype, engine): (("vllm", CAST),) for dtype in ("fp8_block", "nvfp4") for engine in ENGINES},
}
"""Passes over the activation inside a GEMM's measured call, by dtype and engine. SGLang casts as vLLM does, with a
scale per token, and its own tables cannot be: ``computescale`` is zero and ``scale_matrix`` longer than GEMMs that
cast. Blocks and groups of 16 find their scale in the one pass that casts."""

MOST = 0.75
"""Rows of which the passes are a larger part tell nothing of the GEMM: a difference of two readings."""

BLURRED = "quantising takes most of the call: no row of the GEMM's own"


@dataclass(frozen=True)
class Pass:
    """Seconds of a pass over so many elements: logs of both, ascending."""

    log_elements: np.ndarray
    log_seconds: np.ndarray

    def seconds(self, elements: np.ndarray) -> np.ndarray:
        """Between the measured sizes, and as at their ends outside."""
        return np.exp(np.interp(np.log(elements), self.log_elements, self.log_seconds))


Passes = Mapping[tuple[str, str], Pass]
"""By engine and table."""

TOKEN = 8192.0
"""Elements of a token, or of a few, at which launches are all that counts."""


def reduce_seconds(passes: Passes) -> float:
    """What vLLM's cast takes longer if it has to find each token's scale first, as a norm its mean square."""
    found = passes.get(("vllm", SCALE))
    return 0.0 if found is None else round(float(found.seconds(np.array(TOKEN))), 10)


def read_passes(files: Mapping[tuple[str, str], Path], read: Callable[[Path], pd.DataFrame]) -> Passes:
    """The passes of a system's tables, ``files`` by engine and table's name: the median at every half octave of
    elements, made to never fall."""
    found = {}
    for (engine, table), path in files.items():
        if table not in (SCALE, CAST):
            continue
        raw = read(path)
        raw = raw[raw["latency"] > 0]
        elements = raw["m"].to_numpy(float) * raw["k"].to_numpy(float)
        seconds = pd.Series(raw["latency"].to_numpy(float) * 1e-3)
        octaves = seconds.groupby(np.round(2.0 * np.log2(elements)) / 2.0).median()
        if len(octaves):
            found[engine, table] = Pass(
                octaves.index.to_numpy(float) * np.log(2.0), np.maximum.accumulate(np.log(octaves.to_numpy(float)))
            )
    return found


def without_passes(system: MeasuredSystem, passes: Passes) -> None:
    """Take the passes out of the system's quantised GEMMs. Where their tables are missing, rows stay as they are."""
    for key, rows in list(system.kernels.items()):
        family, dtype, engine, variant = key
        inside = INSIDE.get((dtype, engine), ())
        if family != "gemm" or variant or not inside or not all(one in passes for one in inside):
            continue
        elements = rows.columns["m"] * rows.columns["k"]
        took = sum((passes[one].seconds(elements) for one in inside), np.zeros(len(rows)))
        clear = took <= MOST * rows.seconds
        system.drop(family, BLURRED, int((~clear).sum()))
        rows.seconds = np.maximum(rows.seconds - took, 1e-9)
        if clear.any():
            system.kernels[key] = rows.take(clear)
        else:
            del system.kernels[key]
