"""How far engines' constants serve models and devices that nothing was fitted to: each left out of the fit in turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd

from tensorcast.calibrate.engines.statistics import DRAWN, FEWEST, few_groups, median
from tensorcast.cost.evidence import NORMAL_80
from tensorcast.profiles.engine import EngineFit, EngineProfile
from tensorcast.serving.interval import served_interval

LEFT_OUT = {"network": "models", "device": "devices", "release": "releases"}
"""Columns of measured runs that are left out in turn, and what to call them."""

TOGETHER = tuple(some for count in range(len(LEFT_OUT) + 1) for some in itertools.combinations(LEFT_OUT, count))
"""All that is left out at once to tell what serving errs by: nothing, one thing, two, all."""

ALL = "together"
"""Key of the page's last table."""

METRICS = {"tpot_s": "time per token", "ttft_s": "first token"}


class Tells(Protocol):
    """What measured runs tell of engines: :class:`tensorcast.calibrate.engines.overheads.Told`."""

    @property
    def known(self) -> pd.DataFrame: ...

    def fits(self, source: str) -> dict[str, EngineFit]: ...

    def fitted(self, fits: dict[str, EngineFit]) -> dict[str, EngineProfile]: ...

    def without(self, **values: object) -> Tells: ...


Serve = Callable[[pd.DataFrame, Callable[[str], EngineProfile]], pd.DataFrame]

GIVE_OR_TAKE = ("layer_error_s", "prefill_error")
"""How far apart networks' constants are: what few of them say of it is as unsure as it is for all."""

ENOUGH = 100
"""Runs left out, by model and by device together, from which on an engine's own width is told by them."""


def leave_out(told: Tells, columns: Sequence[str], serve: Serve) -> pd.DataFrame:
    """Aggregated runs, each predicted by constants fitted without any run of its network, on its device, of its release
    or several of these, as sure as all runs together make them; of no ``columns``, by those fitted to all runs.

    Columns: ``what`` was left out, ``new`` (how many of these), ``engine, network, device, release``, ``even``, and by
    name of a time of :data:`METRICS` the predicted over the measured and, as ``NAME_error``, the relative median error
    that its steps have.
    """
    found, sure = [], {name: getattr(one, name) for one in told.fits("all").values() for name in GIVE_OR_TAKE}
    runs = told.known[told.known["mode"] == "aggregated"]
    groups = runs.groupby(list(columns), sort=False) if columns else [((), runs)]
    for values, some in groups:
        left = told.without(**dict(zip(columns, values, strict=True))) if columns else told
        fits = {name: fit.model_copy(update=sure) for name, fit in left.fits("others").items()}
        some = some[some["engine"].isin(fits)]
        if some.empty:
            continue
        times = serve(some, told.fitted(fits).__getitem__)
        row: dict[str, Any] = {name: some[name].to_numpy() for name in KEPT}
        row["what"] = some["model"].iloc[0] if columns == ("network",) else " ".join(map(str, values))
        row["new"] = len(columns)
        for name in METRICS:
            error = times[f"{name[:-2]}_error"]
            row |= {name: (times[name] / some[f"measured_{name}"]).to_numpy(), f"{name}_error": error.to_numpy()}
        found.append(pd.DataFrame(row))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=[*KEPT, "what", "new", *METRICS])


KEPT = ("engine", "network", "device", "release", "even")
"""Columns of runs that stand beside how far off they are."""


def serving_errors(runs: pd.DataFrame) -> dict[str, dict[str, tuple[float, ...]]]:
    """By engine and time what serving errs by beside steps, relative median, by how much is ``new``: with it four in
    five of the ``runs`` left out (:func:`leave_out`) lie in their intervals. What is more new is never surer.

    Every deployment (network, device, release under an engine) counts alike, however many runs it has, as the next is
    one more, but as far as it has runs that tell it. An engine's is drawn towards that of all engines as its constants
    are (:data:`~tensorcast.calibrate.engines.statistics.DRAWN`), and of what is new is wider as few networks tell it.
    Of engines with :data:`ENOUGH` runs."""
    runs = runs[(runs["new"] > 0) | ~runs["even"].astype(bool)]
    told = runs.groupby("engine").filter(lambda some: len(some) >= ENOUGH)
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    for engine, own in told.groupby("engine"):
        found[str(engine)] = {}
        for name in METRICS:
            each = [_drawn(some, told[told["new"] == new], name, bool(new)) for new, some in own.groupby("new")]
            found[str(engine)][name] = tuple(round(float(one), 3) for one in np.maximum.accumulate(each))
    return found


def _drawn(runs: pd.DataFrame, every: pd.DataFrame, name: str, new: bool) -> float:
    networks = runs["network"].nunique()
    mean = (networks * _beside(runs, name) + DRAWN * _beside(every, name)) / (networks + DRAWN)
    return mean * few_groups(networks + DRAWN) if new else mean


def _beside(runs: pd.DataFrame, name: str) -> float:
    off = np.expm1(np.abs(np.log(runs[name]))) / NORMAL_80  # the least median error whose interval holds the run
    alone = np.sqrt(np.maximum(off**2 - runs[f"{name}_error"] ** 2, 0.0))
    known = np.isfinite(alone)
    left = [column for column in ("what", "engine", "network", "device", "release") if column in runs]
    weights = 1.0 / (runs.groupby(left)["engine"].transform("size") + FEWEST)
    return median(alone[known], weights[known], 0.8)


def page(left: dict[str, pd.DataFrame], engines: dict[str, EngineProfile], source: str) -> str:
    """Markdown, a table for each of :data:`LEFT_OUT` and :data:`ALL`: ``left``, by these, how runs were predicted
    without their like; ``engines`` with what serving errs by."""
    lines = [
        "# Models and devices that nothing was fitted to", "",
        "Every model in turn is taken out of the runs that engines' constants are fitted to, under all engines and on "
        "all devices, and its aggregated runs are predicted by what the others leave; then every device, every "
        "release, and several of these at once. Kernels keep their calibration. What serving errs by beside steps is "
        "set, by how many of the three are new, so that four in five runs lie in their intervals, each deployment "
        "counting alike as far as its runs tell it; an engine's is drawn towards that of all engines, and wider as few "
        "networks tell it. "
        f"Written by `make engines` from {source}.",
    ]  # fmt: skip
    for column, name in LEFT_OUT.items():
        lines += ["", f"## {name.capitalize()} left out", "", *_table(left[column], engines)]
    if ALL in left:
        lines += ["", "## All three left out", "", *_table(left[ALL], engines)]
    return "\n".join(lines) + "\n"


def _inside(runs: pd.DataFrame, engines: dict[str, EngineProfile]) -> pd.DataFrame:
    """Whether each measured time lies in its interval; NaN where none was predicted."""
    found = pd.DataFrame(np.nan, index=runs.index, columns=list(METRICS))
    for name, some in runs.groupby("engine"):
        ttft, tpot = (some[f"{metric}_error"].to_numpy() for metric in ("ttft_s", "tpot_s"))
        new = int(some["new"].iloc[0]) if "new" in some else 1
        factors = served_interval(ttft, tpot, 0.5, engine=engines[str(name)], new=new)
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
