"""Why a kernel's times are hard to predict: what its measured table itself shows, and where the errors lie.

Everything is computed from the rows: how few there are, how rough the table is (each row against the line between its
two neighbours in size, all else equal), how many rows are quicker than a smaller call, how many configurations run at a
level of their own, how many libraries and models share a name, whether errors are one common factor or few sizes'.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from tensorcast.calibrate.kernel_models.unseen_models import Experts
from tensorcast.calibrate.measured_tables import Key, MeasuredKernel
from tensorcast.cost.kernels.device_model import LINES

LEADING = {
    "gemm": "m", "grouped_gemm": "tokens", "attention_prefill": "new", "attention_decode": "past",
    "mla_prefill": "new", "mla_decode": "past", "mla_prefill_module": "new", "mla_decode_module": "past",
    "linear_prefill": "new", "linear_decode": "batch", "conv_prefill": "new", "conv_decode": "batch",
    "quantize": "m", "moe_exchange": "tokens",
}
"""The size that runs while the others stand; ``payload_bytes`` of collectives."""

QUICKER = 0.05
"""A larger call that takes less time by more than this share: repeats differ by 3-5 %."""

FEW_ROWS, FEW_MODELS, SOME_ROWS, COMMON = 150, 6, 0.03, 0.6
"""Bounds from which on a cause is worth a word: rows in the fit, models, a share of rows, and of the median error that
one common factor makes up."""

EDGES = (16.0, 256.0, 4096.0)
"""Of the regimes of the leading size."""


@dataclass(frozen=True)
class Table:
    """What one kernel's measured rows show; shares of rows, errors relative. NaN where nothing can be said."""

    rows: int
    rough_median: float
    rough_p90: float
    quicker: float
    models: int
    libraries: int
    apart: float


def leading(family: str) -> str:
    """The size that the rows of a family run over."""
    return LEADING.get(family, "payload_bytes")


def rough(rows: MeasuredKernel) -> tuple[np.ndarray, float]:
    """|interpolated / measured - 1| of every row with a smaller and a larger neighbour, logs against logs, and the
    share of rows quicker than the next smaller call."""
    lead = leading(rows.key[0])
    others = [name for name in rows.columns if name != lead]
    frame = pd.DataFrame({name: rows.columns[name] for name in others})
    line = frame.groupby(others, dropna=False).ngroup().to_numpy() if others else np.zeros(len(rows), dtype=int)
    order = np.lexsort((rows.columns[lead], line))
    size, seconds, line = np.log(rows.columns[lead][order] + 1.0), np.log(rows.seconds[order]), line[order]
    inner = (line[:-2] == line[2:]) if len(line) > 2 else np.zeros(0, dtype=bool)
    share = (size[1:-1] - size[:-2]) / np.maximum(size[2:] - size[:-2], 1e-12)
    between = seconds[:-2] * (1.0 - share) + seconds[2:] * share
    pairs = line[:-1] == line[1:]
    falls = (seconds[1:] < seconds[:-1] + np.log(1.0 - QUICKER))[pairs]
    return np.abs(np.exp((between - seconds[1:-1])[inner]) - 1.0), float(falls.mean()) if len(falls) else float("nan")


def table_of(rows: MeasuredKernel, in_fit: int, experts: Experts | None = None) -> Table:
    """What one kernel's rows show. ``in_fit``: how many of them the fit had."""
    errors, quicker = rough(rows)
    middle, high = np.quantile(errors, (0.5, 0.9)) if len(errors) else (float("nan"), float("nan"))
    lines = [rows.columns[name] for name in LINES.get(rows.key[0], ()) if name in rows.columns]
    models = np.unique(np.stack(lines), axis=1).shape[1] if rows.key[0] == "grouped_gemm" else 0
    source = rows.columns.get("source", np.zeros(1))
    apart = float(experts.part(rows.key).apart.mean()) if experts else float("nan")
    return Table(in_fit, float(middle), float(high), quicker, models, len(np.unique(source)), apart)


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def causes(key: Key, split: str, errors: pd.DataFrame, table: Table | None, p90: float) -> str:
    """One line on why a kernel misses. ``errors``: its held-out rows (``predictor``, ``ratio`` = predicted / measured,
    ``size``); ``p90``: what nine rows in ten should stay under."""
    found = []
    log = np.log(errors["ratio"].to_numpy(float))
    common = float(np.median(log))
    if abs(common) > COMMON * float(np.median(np.abs(log))) and abs(common) > 0.05:
        around = float(np.median(np.abs(log - common)))
        found.append(f"as a whole {np.exp(abs(common)):.2f} times too {'slow' if common > 0 else 'fast'}, "
                     f"{percent(around)} around that")
    if table is not None and split == "model":
        if table.models < FEW_MODELS:
            found.append(f"{table.models} models measured")
        if table.libraries > 1:
            found.append(f"{table.libraries} libraries' kernels under one name")
        if table.apart > SOME_ROWS:
            found.append(f"{percent(table.apart)} of the rows in configurations over 35 % off their like")
    if table is not None and split == "shape":
        if table.rows < FEW_ROWS:
            found.append(f"{table.rows} rows in the fit")
        if table.rough_p90 > 0.7 * p90:
            found.append(f"the table is rough: a row lies {percent(table.rough_median)} (p90 "
                         f"{percent(table.rough_p90)}) off the line between its neighbours")
        if table.quicker > 2 * SOME_ROWS:
            found.append(f"{percent(table.quicker)} of the rows quicker than a smaller call")
        if table.apart > SOME_ROWS:
            found.append(f"{percent(table.apart)} in configurations over 35 % off their like")
    found += _regime(key[0], errors, p90)
    return "; ".join(found) or "errors lie evenly over the sizes; nothing in the rows tells which"


def _regime(family: str, errors: pd.DataFrame, p90: float) -> list[str]:
    """Where the errors over ``p90`` lie, if one regime of sizes holds far more of them than of the rows."""
    part = np.searchsorted(EDGES, errors["size"].to_numpy(float))
    bad = errors["predictor"].to_numpy(float) > p90
    if family not in LEADING or bad.sum() < 5:
        return []
    rows, hits = (np.bincount(part[at], minlength=len(EDGES) + 1) / at.sum() for at in (np.ones_like(bad), bad))
    worst = int(np.argmax(hits / np.maximum(rows, 0.02)))
    if hits[worst] < 0.4 or hits[worst] < 1.6 * rows[worst]:
        return []
    low, high = (EDGES[worst - 1] if worst else None), (EDGES[worst] if worst < len(EDGES) else None)
    words = f"over {low:g}" if high is None else f"up to {high:g}" if low is None else f"{low:g} to {high:g}"
    return [f"{percent(hits[worst])} of the errors over {percent(p90)} at {leading(family)} {words}"]
