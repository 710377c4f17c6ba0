"""How far engines' constants serve models and devices that nothing was fitted to: each left out of the fit in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import pandas as pd

from tensorcast.calibrate.engines.statistics import DRAWN, median
from tensorcast.cost.evidence import NORMAL_80
from tensorcast.profiles.engine import EngineFit, EngineProfile
from tensorcast.serving.interval import served_interval

LEFT_OUT = {"network": "models", "device": "devices"}
"""Columns of measured runs that are left out in turn, and what to call them."""

METRICS = {"tpot_s": "time per token", "ttft_s": "first token"}


class Tells(Protocol):
    """What measured runs tell of engines: :class:`tensorcast.calibrate.engines.overheads.Told`."""

    @property
    def known(self) -> pd.DataFrame: ...

    def fits(self, source: str) -> dict[str, EngineFit]: ...

    def fitted(self, fits: dict[str, EngineFit]) -> dict[str, EngineProfile]: ...

    def without(self, column: str, value: object) -> Tells: ...


Serve = Callable[[pd.DataFrame, Callable[[str], EngineProfile]], pd.DataFrame]

GIVE_OR_TAKE = ("layer_error_s", "prefill_error")
"""How far apart networks' constants are: what few of them say of it is as unsure as it is for all."""

ENOUGH = 100
"""Runs left out, by model and by device together, from which on an engine's own width is told by them."""


def leave_out(told: Tells, column: str, serve: Serve) -> pd.DataFrame:
    """Aggregated runs, each predicted by constants fitted without any run of its network, or on its device, as sure as
    all runs together make them.

    Columns: ``what`` was left out, ``engine``, ``network``, and by name of a time of :data:`METRICS` the predicted over
    the measured and, as ``NAME_error``, the relative median error that its steps have.
    """
    found, sure = [], {name: getattr(one, name) for one in told.fits("all").values() for name in GIVE_OR_TAKE}
    for value in told.known[column].unique():
        some = told.known[(told.known[column] == value) & (told.known["mode"] == "aggregated")]
        fits = told.without(column, value).fits("others")
        fits = {name: fit.model_copy(update=sure) for name, fit in fits.items()}
        some = some[some["engine"].isin(fits)]
        if some.empty:
            continue
        times = serve(some, told.fitted(fits).__getitem__)
        row = {name: some[name].to_numpy() for name in ("engine", "network")}
        row["what"] = some["model"].iloc[0] if column == "network" else value
        for name in METRICS:
            error = times[f"{name[:-2]}_error"]
            row |= {name: (times[name] / some[f"measured_{name}"]).to_numpy(), f"{name}_error": error.to_numpy()}
        found.append(pd.DataFrame(row))
    return pd.concat(found, ignore_index=True)


def serving_errors(runs: pd.DataFrame) -> dict[str, dict[str, float]]:
    """By engine and time what serving errs by beside steps, relative median: with it four in five of the ``runs`` left
    out lie in their intervals, every network under an engine counting alike, however many runs it has: the next model
    is one network more. An engine's is drawn towards that of all engines as its constants are
    (:data:`~tensorcast.calibrate.engines.statistics.DRAWN`). Of engines with :data:`ENOUGH` runs."""
    told = runs.groupby("engine").filter(lambda some: len(some) >= ENOUGH)
    every = {name: _beside(told, name) for name in METRICS} if len(told) else {}
    return {
        str(engine): {name: round(_drawn(some, name, every[name]), 3) for name in METRICS}
        for engine, some in told.groupby("engine")
    }


def _drawn(runs: pd.DataFrame, name: str, every: float) -> float:
    networks = runs["network"].nunique()
    return (networks * _beside(runs, name) + DRAWN * every) / (networks + DRAWN)


def _beside(runs: pd.DataFrame, name: str) -> float:
    off = np.expm1(np.abs(np.log(runs[name]))) / NORMAL_80  # the least median error whose interval holds the run
    alone = np.sqrt(np.maximum(off**2 - runs[f"{name}_error"] ** 2, 0.0))
    known = np.isfinite(alone)
    weights = 1.0 / runs.groupby(["engine", "network"])["engine"].transform("size")
    return median(alone[known], weights[known], 0.8)


def page(left: dict[str, pd.DataFrame], engines: dict[str, EngineProfile], source: str) -> str:
    """Markdown, a table for each of :data:`LEFT_OUT`: ``left``, by column, how runs were predicted without their like;
    ``engines`` with what serving errs by."""
    lines = [
        "# Models and devices that nothing was fitted to", "",
        "Every model in turn is taken out of the runs that engines' constants are fitted to, under all engines and on "
        "all devices, and its aggregated runs are predicted by what the others leave; then every device. Kernels keep "
        "their calibration. What serving errs by beside steps is set so that four in five runs in both tables together "
        "lie in their intervals, each network under an engine counting alike, whatever its number of runs; an engine's "
        "is drawn towards that of all engines. "
        f"Written by `make engines` from {source}.",
    ]  # fmt: skip
    for column, name in LEFT_OUT.items():
        lines += ["", f"## {name.capitalize()} left out", "", *_table(left[column], engines)]
    return "\n".join(lines) + "\n"


def _inside(runs: pd.DataFrame, engines: dict[str, EngineProfile]) -> pd.DataFrame:
    """Whether each measured time lies in its interval; NaN where none was predicted."""
    found = pd.DataFrame(np.nan, index=runs.index, columns=list(METRICS))
    for name, some in runs.groupby("engine"):
        ttft, tpot = (some[f"{metric}_error"].to_numpy() for metric in ("ttft_s", "tpot_s"))
        factors = served_interval(ttft, tpot, 0.5, engine=engines[str(name)])
        for metric in METRICS:
            off = np.abs(np.log(some[metric]))
            found.loc[some.index, metric] = np.where(np.isfinite(off), off <= np.log(factors[metric]), np.nan)
    return found


def _table(runs: pd.DataFrame, engines: dict[str, EngineProfile]) -> list[str]:
    head = ["left out", "engine", "runs"]
    head += [f"{metric}, {part}" for metric in METRICS.values() for part in ("median", "mean", "in interval")]
    inside = _inside(runs, engines)
    rows = [("all", "all", runs), *(("all", str(name), some) for name, some in runs.groupby("engine"))]
    rows += [(str(what), str(name), some) for (what, name), some in runs.groupby(["what", "engine"])]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for what, engine, some in rows:
        cells = [what, engine, str(len(some))]
        for name in METRICS:
            off = (some[name] - 1).abs()
            for share in (off.median(), off.mean(), inside.loc[some.index, name].mean()):
                cells.append("-" if np.isnan(share) else f"{share:.1%}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines
