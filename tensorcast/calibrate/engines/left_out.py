"""How far engines' constants serve models and devices that nothing was fitted to: each left out of the fit in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import pandas as pd

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


def leave_out(told: Tells, column: str, serve: Serve) -> pd.DataFrame:
    """Aggregated runs, each predicted by constants fitted without any run of its network, or on its device.

    Columns: ``what`` was left out, ``engine, tpot_s, ttft_s`` (off, relative), ``tpot_in, ttft_in`` (whether what was
    measured lies in the 80 % interval).
    """
    found = []
    for value in told.known[column].unique():
        some = told.known[(told.known[column] == value) & (told.known["mode"] == "aggregated")]
        fits = told.without(column, value).fits("others")
        some = some[some["engine"].isin(fits)]
        if some.empty:
            continue
        times = serve(some, told.fitted(fits).__getitem__)
        factors = served_interval(times["ttft_error"].to_numpy(), times["tpot_error"].to_numpy(), 0.5)
        what = some["model"].iloc[0] if column == "network" else value
        row = {"what": what, "engine": some["engine"].to_numpy()}
        for name in METRICS:
            ratio = (times[name] / some[f"measured_{name}"]).to_numpy()
            inside = np.abs(np.log(ratio)) <= np.log(factors[name])
            row |= {name: np.abs(ratio - 1), f"{name[:-2]}_in": np.where(np.isfinite(ratio), inside, np.nan)}
        found.append(pd.DataFrame(row))
    return pd.concat(found, ignore_index=True)


def page(told: Tells, source: str, serve: Serve) -> str:
    """Markdown: a table for models and one for devices."""
    lines = [
        "# Models and devices that nothing was fitted to", "",
        "Every model in turn is taken out of the runs that engines' constants are fitted to, under all engines and on "
        "all devices, and its aggregated runs are predicted by what the others leave; then every device. Kernels keep "
        f"their calibration. Written by `make engines` from {source}.",
    ]  # fmt: skip
    for column, name in LEFT_OUT.items():
        runs = leave_out(told, column, serve)
        lines += ["", f"## {name.capitalize()} left out", "", *_table(runs)]
    return "\n".join(lines) + "\n"


def _table(runs: pd.DataFrame) -> list[str]:
    head = ["left out", "engine", "runs"]
    head += [f"{metric}, {part}" for metric in METRICS.values() for part in ("median", "mean", "in interval")]
    rows = [("all", "all", runs), *(("all", str(name), some) for name, some in runs.groupby("engine"))]
    rows += [(str(what), str(name), some) for (what, name), some in runs.groupby(["what", "engine"])]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for what, engine, some in rows:
        cells = [what, engine, str(len(some))]
        for name in METRICS:
            for share in (some[name].median(), some[name].mean(), some[f"{name[:-2]}_in"].mean()):
                cells.append("-" if np.isnan(share) else f"{share:.1%}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines
