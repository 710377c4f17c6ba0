"""How the error of the time per token on rows left out divides among kernels, engine and workload: by definition.

``r = log(measured / predicted)``. Of the sum of ``|r|``, *record* is what runs whose deployment the record leaves open
(:data:`OPEN`) have beyond the mean of the others. Of the others, ``r`` is regressed on what a cause could do to it,
with the least sum of absolute residuals; a cause is a set of columns:

- kernels: a factor on kernel time per network, precision, device and layout, which kernels' shapes follow from;
- step: seconds more per step, per engine, release and device;
- batch: seconds more per sequence, per the same (scheduling, sampling, input preparation);
- prompts: a factor on the part of the time that prompts take, per the same (chunked prefill, waves of prompts);
- lengths: a factor per prompt and reply length.

``alone`` is the share of the sum that goes with a cause's columns only; ``share`` what goes when it joins others, mean
over all orders in which they can join (Shapley's value), so that shares add up. Residuals are counted over degrees of
freedom left: columns of noise get nothing. What no cause takes is ``rest``. None of this proves a cause: a kernel too
fast at every size and an engine too slow look alike.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorcast.deploy.model_names import understand
from tensorcast.errors import InputError
from tensorcast.predict.score import left_out
from tensorcast.profiles.store import load_engine

if TYPE_CHECKING:
    import pandas as pd

FEWEST = 100
"""Rows below which nothing is attributed."""

OPEN = ("workers", "concurrency")
"""Assumptions that leave open what ran: how the column ``assumed`` begins to say them."""

ROUNDS = 25
"""Rounds of reweighted least squares that find the least sum of absolute residuals."""

NORMAL_MEAN = 0.7979 / 0.6745
"""Mean of a normal error's absolute value over its median."""


def attribute(frame: pd.DataFrame) -> dict[str, Any]:
    """Of a named, predicted and measured table: ``rows, mean`` (of ``|r|``), ``parts``, ``rest``; see the module.

    ``kernels_held_out``: mean of ``|r|`` if kernels erred as they do on held-out measurements and all else were right.
    ``repeats``: mean distance from their median of rows alike in all that is recorded; ``releases``: of rows alike but
    for release and model name. Empty where too few rows were measured.
    """
    needed = {"tpot_s", "measured_tpot_s", "decode_step_s", "step_error", "mean_batch"}
    if not needed <= set(frame):
        return {}
    steady = frame["decode_step_s"].notna()  # of what was replayed, request by request, no part is told
    rows = frame[left_out(frame) & steady & (frame["tpot_s"] > 0) & (frame["measured_tpot_s"] > 0)]
    if len(rows) < FEWEST:
        return {}
    rows = _described(rows)
    every = np.log((rows["measured_tpot_s"] / rows["tpot_s"]).to_numpy(dtype=float))
    known = ~rows["open"].to_numpy()
    error, stated = every[known], rows[known]
    record = float((np.abs(every[~known]) - np.abs(error).mean()).sum() / np.abs(every).sum())
    parts = _columns(stated)
    names = list(parts)
    taken = {
        chosen: 1 - _residual(np.concatenate([parts[name] for name in chosen], axis=1), error) / np.abs(error).mean()
        for count in range(1, len(names) + 1)
        for chosen in itertools.combinations(names, count)
    } | {(): 0.0}
    left = 1 - record
    shares = {name: {"share": left * _shapley(name, names, taken), "alone": left * taken[(name,)]} for name in names}
    fitted = (rows["overhead_error_s"] / rows["tpot_s"]) ** 2 + (rows["load_error"] * rows["prompts"]) ** 2
    kernel_error = np.sqrt(np.maximum(rows["step_error"] ** 2 - fitted, 0))
    return {
        "rows": len(rows),
        "open_rows": int((~known).sum()),
        "mean": float(np.abs(every).mean()),
        "parts": {**shares, "record": {"share": record, "alone": record}},
        "rest": left * (1 - taken[tuple(names)]),
        "kernels_held_out": float(kernel_error.mean() * NORMAL_MEAN),
        "repeats": _spread(stated, error, ["model", "release"]),
        "releases": _spread(stated, error, []),
    }


def _described(rows: pd.DataFrame) -> pd.DataFrame:
    """``rows`` with network, release, what is left open, and how the time per token is made up."""
    release = next((name for name in ("backend_version", "engine_version") if name in rows), "engine")
    engines = {name: load_engine(name).overhead for name in rows["engine"].unique()}
    beside = rows["engine"].map(engines)
    known = {name: _network(name) for name in rows["model"].unique()}
    layers = rows["model"].map({name: count for name, (_, count) in known.items()}).to_numpy(dtype=float)
    batch = rows["mean_batch"].to_numpy(dtype=float)
    step_s, layer_s, request_s, layer_error_s, prefill_error = (
        np.array([getattr(one, name) for one in beside])
        for name in ("step_s", "layer_s", "request_s", "layer_error_s", "prefill_error")
    )
    return rows.assign(
        release=rows[release].astype(str),
        network=rows["model"].map({name: network for name, (network, _) in known.items()}),
        open=rows["assumed"].map(lambda text: any(one.startswith(OPEN) for one in str(text).split("; "))),
        kernels=1 - (step_s + layer_s * layers + request_s * batch) / rows["tpot_s"],
        prompts=(1 - rows["decode_step_s"] / rows["tpot_s"]).clip(lower=0),
        overhead_error_s=layer_error_s * layers,
        load_error=prefill_error,
    )  # fmt: skip


def _network(model: str) -> tuple[str, int]:
    """What is equal for models that differ in weights alone, and the number of layers (0: not known)."""
    try:
        profile = understand(model).profile
    except InputError:
        return model, 0
    return json.dumps(profile.config, sort_keys=True), profile.stated_facts.layers


def _columns(rows: pd.DataFrame) -> dict[str, np.ndarray]:
    """Columns of every cause, ``[rows, its groups]``."""
    tpot = rows["tpot_s"].to_numpy(dtype=float)
    precision = ["precision"] if "precision" in rows else []
    engine = ["engine", "release", "device"]

    def per(groups: list[str], value: Any) -> np.ndarray:
        number = rows.groupby(groups, dropna=False).ngroup().to_numpy()
        found = np.zeros((len(rows), number.max() + 1))
        found[np.arange(len(rows)), number] = value
        return found

    return {
        "kernels": per(["network", "device", "layout", *precision], rows["kernels"]),
        "step": per(engine, tpot.mean() / tpot),
        "batch": per(engine, rows["mean_batch"] / rows["mean_batch"].mean() * tpot.mean() / tpot),
        "prompts": per(engine, rows["prompts"]),
        "lengths": per([name for name in ("isl", "osl") if name in rows], 1.0),
    }


def _residual(columns: np.ndarray, error: np.ndarray) -> float:
    """Mean absolute residual of ``error`` over the degrees of freedom that ``columns`` leave."""
    weight = np.ones_like(error)
    small = 1e-3 * np.abs(error).mean()
    rank = int(np.linalg.matrix_rank(columns))
    best = np.abs(error).sum()
    for _ in range(ROUNDS):
        weighted = columns * weight[:, None]
        left = error - columns @ (np.linalg.pinv(weighted.T @ columns, rcond=1e-10) @ (weighted.T @ error))
        best = min(best, float(np.abs(left).sum()))
        weight = 1 / np.maximum(np.abs(left), small)
    return best / max(len(error) - rank, 1)


def _shapley(name: str, names: list[str], taken: dict[tuple[str, ...], float]) -> float:
    others, total = [one for one in names if one != name], 0.0
    for count in range(len(others) + 1):
        orders = math.factorial(count) * math.factorial(len(others) - count) / math.factorial(len(names))
        for before in itertools.combinations(others, count):
            joined = tuple(one for one in names if one in before or one == name)
            total += orders * (taken[joined] - taken[before])
    return total


def _spread(rows: pd.DataFrame, error: np.ndarray, more: list[str]) -> dict[str, Any]:
    """Mean |r - median| over groups of measured runs that agree in load, layout, network, engine, device and ``more``.

    Records of one run count once.
    """
    keys = ["engine", "device", "network", "mode", "layout", "isl", "osl", "concurrency", "precision", *more]
    keys = [name for name in keys if name in rows]
    runs = rows.assign(r=error).drop_duplicates([*keys, "measured_tpot_s"])
    groups = runs.groupby(keys, dropna=False)["r"]
    several = groups.transform("size") > 1
    off: pd.Series[float] = (runs["r"] - groups.transform("median")).abs()[several]
    return {"rows": int(several.sum()), "mean": float(off.mean()) if len(off) else None}
