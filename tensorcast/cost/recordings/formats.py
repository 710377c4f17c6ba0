"""Files in which engines and users leave routing counts, each read as its writer's source says.

======================  =============================================================================================
SGLang 0.5.14           ``/dump_expert_distribution_record``: ``expert_distribution_recorder_TIME.pt`` with
                        ``logical_count [steps, layers, experts]``, or ``TIME_RANK.pt`` of mode ``per_pass`` with
                        ``records`` of ``global_physical_count [layers, slots]`` and ``last_physical_to_logical_map``
                        (``srt/eplb/expert_distribution.py``, ``eplb_simulator/reader.py``); the same as JSON, as
                        ``--init-expert-location`` takes it (``srt/eplb/expert_location.py``)
TensorRT-LLM            a folder of ``EXPERT_STATISTIC_PATH``: ``meta_info.json``, ``rank*.safetensors`` of counts by
                        ``ITERATION_LAYER`` (``_torch/modules/fused_moe``, read in
                        ``examples/wide_ep/ep_load_balancer/utils.py``)
CSV                     columns ``count`` and ``expert``, and where it has them ``layer`` and ``phase``; or ``layer``
                        and ``popularity``, all of a layer's experts in one cell, with spaces between
======================  =============================================================================================

vLLM 0.24.0 keeps its counts in memory and writes none: ``distributed/eplb/eplb_state.py`` logs how balanced they were
(:func:`balancedness_log`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tensorcast.cost.recordings.recording import EITHER, PHASES, LayerCounts, checked_counts
from tensorcast.cost.work import Array
from tensorcast.errors import InputError

READABLE = "an SGLang dump (.json or .pt), a TensorRT-LLM expert_statistic folder, or a CSV file of per-expert counts"


def read_counts(path: Path) -> dict[str, LayerCounts]:
    """Counts by phase, by :data:`EITHER` where the file names none. Raises :class:`InputError`, one line."""
    if path.is_dir():
        return {EITHER: _trtllm(path)}
    if not path.is_file():
        raise InputError(f"--routing {path}: no such file; give {READABLE}")
    suffix = path.suffix.lower()
    if suffix == ".json":
        return {EITHER: _sglang(path, _json(path))}
    if suffix in (".pt", ".pth"):
        return {EITHER: _sglang(path, _tensors(path))}
    return _csv(path)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as reason:
        raise InputError(f"--routing {path}: not JSON ({str(reason).splitlines()[0]})") from None


def _tensors(path: Path) -> Any:
    """A torch file without code: pickled objects other than tensors and plain values are refused."""
    import pickle

    import torch

    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as reason:
        raise InputError(f"--routing {path}: torch cannot read it without running code in it "
                         f"({str(reason).splitlines()[0][:80]})") from None


def _sglang(path: Path, held: Any) -> LayerCounts:
    if not isinstance(held, dict):
        raise InputError(f"--routing {path}: must hold logical_count, found {type(held).__name__}")
    if "logical_count" in held:
        counts = _numbers(path, held["logical_count"])
        if counts.ndim == 3:  # of each step that the recorder's buffer holds; steps it has not seen are zeros
            counts = counts.sum(axis=0)
        return checked_counts(f"--routing {path}", counts, dense=True)
    if "records" in held and "last_physical_to_logical_map" in held:
        placed = _numbers(path, held["last_physical_to_logical_map"]).astype(np.int64)
        passes = [_numbers(path, one["global_physical_count"]) for one in held["records"]]
        if not passes:
            raise InputError(f"--routing {path}: no forward pass was recorded")
        slots = np.sum(passes, axis=0)
        counts = np.zeros((len(slots), int(placed.max()) + 1))
        np.add.at(counts, (np.arange(len(slots))[:, None], placed), slots)
        return checked_counts(f"--routing {path}", counts, dense=True)
    raise InputError(f"--routing {path}: needs logical_count, found {', '.join(map(str, held)) or 'nothing'}")


def _numbers(path: Path, values: Any) -> Array:
    try:
        return np.asarray(values.tolist() if hasattr(values, "tolist") else values, dtype=float)
    except (TypeError, ValueError):
        raise InputError(f"--routing {path}: counts must be numbers, as many in every layer") from None


def _trtllm(folder: Path) -> LayerCounts:
    meta, ranks = folder / "meta_info.json", sorted(folder.glob("rank*.safetensors"))
    ranks = [one for one in ranks if not one.stem.endswith("_raw")]
    if not meta.is_file() or not ranks:
        raise InputError(f"--routing {folder}: is a directory without meta_info.json and rank*.safetensors; "
                         f"give {READABLE}")
    from safetensors.numpy import load_file

    experts = int(_json(meta).get("num_experts", 0))
    layers: dict[int, Array] = {}
    for file in ranks:
        for key, counts in load_file(file).items():
            found = re.fullmatch(r"-?\d+_(\d+)", key)
            if found is None or counts.shape != (experts,):
                raise InputError(f"--routing {file}: {key} {list(counts.shape)} must be ITERATION_LAYER [{experts}]")
            layer = int(found[1])
            layers[layer] = layers.get(layer, 0.0) + counts.astype(float)
    numbers = sorted(layers)
    return checked_counts(f"--routing {folder}", [layers[n] for n in numbers], numbers)


def _csv(path: Path) -> dict[str, LayerCounts]:
    import pandas as pd

    name = f"--routing {path}"
    try:
        frame = pd.read_csv(path, comment="#")
    except Exception as reason:
        raise InputError(f"{name}: not a CSV file ({str(reason).splitlines()[0]})") from None
    if {"layer", "popularity"} <= set(frame.columns):  # compact: a line per layer
        frame["count"] = [str(text).split() for text in frame["popularity"]]
        frame = frame.explode("count", ignore_index=True)
    if "count" not in frame.columns:
        raise InputError(f"{name}: needs a column 'count', found {', '.join(map(str, frame.columns))}")
    frame["count"] = pd.to_numeric(frame["count"], errors="coerce")
    if not (np.isfinite(frame["count"]).all() and (frame["count"] >= 0).all()):
        raise InputError(f"{name}: counts must be numbers of at least 0, not all 0")
    for column in ("layer", "expert"):
        if column in frame.columns:
            said = pd.to_numeric(frame[column], errors="coerce")
            if not (np.isfinite(said) & (said >= 0) & (said % 1 == 0)).all():
                raise InputError(f"{name}: column '{column}' must hold whole numbers from 0")
            frame[column] = said.astype(int)
    if "phase" not in frame.columns:
        return {EITHER: _of_phase(name, frame)}
    if strange := sorted(set(map(str, frame["phase"])) - set(PHASES)):
        raise InputError(f"{name}: phase {strange[0]!r}: must be prefill or decode")
    return {str(phase): _of_phase(name, part) for phase, part in frame.groupby("phase")}


def _of_phase(name: str, frame: Any) -> LayerCounts:
    """Rows of one phase; without a column ``layer`` they stand for every layer, and equal experts are added up."""
    if "expert" not in frame.columns:
        if "layer" not in frame.columns:
            return LayerCounts(name, checked_counts(name, [list(frame["count"])]).counts)
        frame = frame.assign(expert=frame.groupby("layer").cumcount())
    if "layer" not in frame.columns:
        counts = frame.groupby("expert")["count"].sum()
        return LayerCounts(name, checked_counts(name, [_filled(name, counts)]).counts)
    table = frame.pivot_table(index="layer", columns="expert", values="count", aggfunc="sum", fill_value=0.0)
    experts = int(table.columns.max()) + 1
    if len(table.columns) != experts:
        raise InputError(f"{name}: expert {min(set(range(experts)) - set(table.columns))} is in no row")
    numbers = [int(layer) for layer in table.index]
    return checked_counts(name, table.to_numpy(), numbers, dense=True)


def _filled(name: str, counts: Any) -> list[float]:
    if len(counts) != int(counts.index.max()) + 1:
        raise InputError(f"{name}: expert {min(set(range(len(counts))) - set(counts.index))} is in no row")
    return [float(value) for value in counts]


class Balancedness(NamedTuple):
    """One line of an engine's log: mean load of the ranks over the largest, and the step or pass where it says."""

    balancedness: float
    step: int | None


_VLLM = re.compile(r"EPLB step: (\d+) .*?balancedness=([0-9.]+)")
_SGLANG = re.compile(r"current_pass_balancedness=([0-9.]+)")


def read_balancedness(path: Path) -> list[Balancedness]:
    """:func:`balancedness_log` of a file. Raises :class:`InputError` where it cannot be read or says nothing."""
    try:
        found = balancedness_log(path.read_text(encoding="utf-8", errors="replace").splitlines())
    except OSError as reason:
        raise InputError(f"--log {path}: cannot be read: {reason.strerror or reason}") from None
    if not found:
        raise InputError(f"--log {path}: says no balancedness; vLLM does with log_balancedness in --eplb-config, "
                         "SGLang with its metrics of the expert distribution")
    return found


def balancedness_log(lines: Iterable[str]) -> list[Balancedness]:
    """What an engine's log says of how even its ranks were.

    vLLM 0.24.0 with ``log_balancedness``: sums over layers of the ranks' mean over the busiest; SGLang 0.5.14 with
    ``--enable-expert-distribution-metrics``: the mean over layers of the same ratio.
    """
    found = []
    for line in lines:
        if said := _VLLM.search(line):
            found.append(Balancedness(float(said[2]), int(said[1])))
        elif said := _SGLANG.search(line):
            found.append(Balancedness(float(said[1]), None))
    return found
