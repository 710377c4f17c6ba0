"""One engine's rows held against the same kernels under the others: what was not timed as a server runs it.

Engines try a kernel's tactics before they serve (vLLM 0.24.0 model_executor/warmup/kernel_warmup.py, SGLang 0.5.14
model_executor/runner/base_runner.py, both for FlashInfer; TensorRT-LLM's autotuner); the tables' collector mostly does
not. Such rows are far slower than a memory allows while another engine's, of the same library or not, are not. They
are left out; kernel models then price by the sibling's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tensorcast.calibrate.measured_rows import Key, MeasuredKernel, MeasuredSystem, joined
from tensorcast.cost.kernels.vocabulary import PRECISION, source_of

ENGINES = ("vllm", "sglang", "trtllm")

SLOWER, THAN_BOTH = 1.4, 1.25
"""Times as long as the best sibling's, and a GEMM as each sibling's, from which on a kernel was not tuned: engines' own
versions differ by less (FP8 GEMMs of three engines by 3 % in the median, once nothing else is in them)."""

FEW_ROWS = 256
"""Most rows of a GEMM that is compared: larger ones keep the arithmetic busy whatever the tactic."""

SHARE = 0.35
"""Of the speed at which the system's best experts read their weights: slower ones, with every expert hit, do not run as
served. Sound kernels reach 0.5 to 1, 4-bit ones in bf16 arithmetic on Blackwell 0.4, untuned ones 0.15 to 0.3."""

ROWS_PER_EXPERT = (1.0, 4.0)
"""Rows per expert at which weights are all that counts, and every expert has some."""

LEAST_BYTES = 0.3e9
"""Of weights: launches count for fewer."""

FEWEST = 8
"""Rows that tell a ratio."""

UNTUNED = "not tuned as a server does: {engine}'s {dtype} is over 1.4 times another engine's at few rows"

MODEL = ("hidden", "inter", "topk", "experts")


def _shapes(rows: MeasuredKernel) -> pd.DataFrame:
    return pd.DataFrame({name: values for name, values in rows.columns.items() if name != "source"})


def _ratios(rows: MeasuredKernel, others: MeasuredKernel) -> np.ndarray:
    """Times as long as the quickest of ``others`` of the same sizes; NaN where there is none."""
    theirs = _shapes(others)
    names = list(theirs)
    quickest = theirs.assign(best=others.seconds).groupby(names)["best"].min().reset_index()
    return rows.seconds / _shapes(rows).merge(quickest, how="left", on=names)["best"].to_numpy(float)


def _siblings(system: MeasuredSystem, key: Key) -> list[MeasuredKernel]:
    """The same kernel under the other engines."""
    named = ((*key[:2], engine, key[3]) for engine in ENGINES if engine != key[2])
    return [system.kernels[name] for name in named if name in system.kernels]


def _median(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) >= FEWEST else np.nan


TUNED = ("nvfp4",)
"""Dtypes whose GEMMs engines tune before they serve. Others' run as they are: SGLang's FP8 on an RTX PRO 6000 takes 1.4
times vLLM's at few rows, with a table of tiles that its library holds."""


def untuned_gemm(system: MeasuredSystem, key: Key) -> bool:
    """Whether a GEMM is slower at few rows than both other engines'."""
    if key[1] not in TUNED:
        return False
    rows, siblings = system.kernels[key], _siblings(system, key)
    few = rows.take(rows.columns["m"] <= FEW_ROWS)
    medians = [_median(_ratios(few, other)) for other in siblings]
    return len(medians) == len(ENGINES) - 1 and min(medians) > THAN_BOTH and max(medians) > SLOWER


def weights_read(rows: MeasuredKernel) -> tuple[np.ndarray, np.ndarray]:
    """Bytes per second at which experts' weights are read, and whether all are hit and weights all that counts."""
    c, dtype = rows.columns, rows.key[1]
    matrices = (2.0 + c["gated"]) * c["hidden"] * c["inter"] / c["moe_tp"]
    size = c["experts"] / c["moe_ep"] * matrices * PRECISION[dtype].weight_bytes
    each = c["tokens"] * c["topk"] / c["experts"]
    least, most = ROWS_PER_EXPERT
    return size / rows.seconds, (each >= least) & (each <= most) & (c["skew"] == 0) & (size > LEAST_BYTES)


def untuned_experts(system: MeasuredSystem, key: Key, best: float) -> np.ndarray:
    """Which rows are of a library that reads weights at less than :data:`SHARE` of ``best`` and is slower than another
    engine's."""
    rows, siblings = system.kernels[key], _siblings(system, key)
    result = np.zeros(len(rows), dtype=bool)
    if not siblings:
        return result
    speed, tells = weights_read(rows)
    source = rows.columns.get("source", np.zeros(len(rows)))
    ratios = _ratios(rows, joined(siblings))
    for one in np.unique(source):
        at = source == one
        if _median(speed[at & tells]) < SHARE * best and _median(ratios[at & tells]) > SLOWER:
            result |= at
    return result


def best_speed(system: MeasuredSystem) -> float:
    """Bytes per second of the experts that read their weights fastest, by the median of a kernel; 0 without any."""
    found = [0.0]
    for rows in system.family("grouped_gemm"):
        if not rows.key[3]:
            speed, tells = weights_read(rows)
            found.append(np.nan_to_num(_median(speed[tells])))
    return max(found)


def _models(rows: MeasuredKernel) -> pd.DataFrame:
    return pd.DataFrame({name: rows.columns[name] for name in MODEL})


def in_place(rows: MeasuredKernel, gone: np.ndarray, siblings: Sequence[MeasuredKernel]) -> MeasuredKernel | None:
    """The rows that stay and, in the place of those ``gone``, the siblings' of the same models, of each shape the
    quickest, as if run by the library whose rows they stand for. None where nothing stays: the siblings' kernels stand
    in as a whole then."""
    if gone.all():
        return None
    stays, left = rows.take(~gone), rows.take(gone)
    parts = [stays]
    for source in np.unique(left.columns["source"]):
        models = _models(left.take(left.columns["source"] == source)).drop_duplicates().assign(known=True)
        for other in siblings:
            known = _models(other).merge(models, how="left", on=list(MODEL))["known"].notna().to_numpy()
            if known.any():
                parts.append(_as_run_by(other.take(known), source))
    return MeasuredKernel(rows.key, *_quickest(joined(parts)), rows.versions)


def _as_run_by(rows: MeasuredKernel, source: float) -> MeasuredKernel:
    columns = {**rows.columns, "source": np.full(len(rows), source)}
    return MeasuredKernel(rows.key, columns, rows.seconds, rows.versions)


def _quickest(rows: MeasuredKernel) -> tuple[dict[str, np.ndarray], np.ndarray]:
    found = rows.fastest(without=())
    return found.columns, found.seconds


GENERATED = source_of("min_latency")
"""TensorRT-LLM's generated experts for Blackwell (trtllm-gen), as its own table names them."""

ITS_LIBRARY = ("_trtllm_", "modular", "trtllm_moe")
"""The same kernels in FlashInfer, as the others' tables name them."""


def with_generated(system: MeasuredSystem) -> None:
    """TensorRT-LLM runs its generated experts in FP8 blocks, too, and its table has them in NVFP4 alone: vLLM's and
    SGLang's tables timed them."""
    key = ("grouped_gemm", "fp8_block", "trtllm", "")
    own = system.kernels.get(key)
    if own is None or (own.columns.get("source", np.zeros(1)) == GENERATED).any():
        return
    codes = [source_of(name) for name in ITS_LIBRARY]
    parts = [own]
    for other in _siblings(system, key):
        if (theirs := np.isin(other.columns.get("source", np.zeros(len(other))), codes)).any():
            parts.append(_as_run_by(other.take(theirs), GENERATED))
            break  # vLLM's first: both are readings of one kernel
    if len(parts) > 1:
        system.kernels[key] = MeasuredKernel(key, joined(parts).columns, joined(parts).seconds, own.versions)


def as_served(system: MeasuredSystem) -> None:
    """Leave out what was not tuned, counted, and add what another engine's table timed for one."""
    gone: dict[Key, np.ndarray] = {}
    best = best_speed(system)
    for key, rows in system.kernels.items():
        if key[0] == "gemm" and not key[3] and untuned_gemm(system, key):
            gone[key] = np.ones(len(rows), dtype=bool)
        elif key[0] == "grouped_gemm" and not key[3]:
            gone[key] = untuned_experts(system, key, best)
    slow = {key: bad for key, bad in gone.items() if bad.any()}
    replaced = {key: in_place(system.kernels[key], bad, _sound(system, key, gone)) for key, bad in slow.items()}
    for key, found in replaced.items():
        system.drop(key[0], UNTUNED.format(engine=key[2], dtype=key[1]), int(gone[key].sum()))
        if found is None:
            del system.kernels[key]
        else:
            system.kernels[key] = found
    with_generated(system)


def _sound(system: MeasuredSystem, key: Key, gone: dict[Key, np.ndarray]) -> list[MeasuredKernel]:
    """The siblings' rows without those that are left out themselves."""
    found = (one.take(~gone.get(one.key, np.zeros(len(one), dtype=bool))) for one in _siblings(system, key))
    return [one for one in found if len(one)]
