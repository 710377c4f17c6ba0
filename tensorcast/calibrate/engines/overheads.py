"""What engines do beside their kernels, fitted to measured serving runs and written into the engine profiles.

``python -m tensorcast.calibrate.engines.overheads --table FILE [--profiles DIR]``, or ``make engines TABLE=FILE``.

**Steps**: to aggregated runs of any batch, two constants are fitted to each network's runs under an engine on a
device together, as neither can be told alone: seconds per layer (gaps between kernels, small kernels that no row
stands for), and how many times as long as their kernels steps with prompts take: kernels are timed alone, in short
bursts, on a cool chip; in a server they run on for minutes at the power limit, prompts do not fill their steps evenly,
and they are launched one by one. A record may lack what decides the time (drafted tokens, say) and kernels err per
model, so absolute errors are summed, in which no single run weighs much. Networks agree only so far, by device no more
than by engine: an engine has the median of its networks, drawn towards that of all engines' networks
(:data:`~tensorcast.calibrate.engines.statistics.DRAWN`). What a step and a sequence take stays as published.

**First token, hand-over**: what runs of any batch take from request to first token beyond what the model explains, a
constant and a part that grows with the prompt, by least absolute error, every run alike, with the constants of steps in
place; the hand-over from runs behind Dynamo that state their workers, or are of a known launch. From runs of pools how
many times as long as elsewhere a decode step takes there, where caches arrive all the while, engines look for them and
hand replies on through another process. Of runs that may have drafted, those alone tell that are slower than others
alike.

Only rows of :func:`tensorcast.predict.score.fitted_half` are fitted to; the others score.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tensorcast.calibrate import command
from tensorcast.calibrate.engines.left_out import ALL, LEFT_OUT, TOGETHER, leave_out, page, serving_errors
from tensorcast.calibrate.engines.statistics import (
    FEWEST,
    Group,
    Own,
    distances,
    drawn,
    evenly,
    least_off,
    least_off_by_size,
    median_error,
    once,
    own_fits,
    unseen,
)
from tensorcast.calibrate.generated_blocks import read_engine, write_fit
from tensorcast.deploy.model_names import understand
from tensorcast.errors import InputError
from tensorcast.files import write_atomically
from tensorcast.predict import predict
from tensorcast.predict.csv_table import read_table
from tensorcast.predict.run_columns import canonical_columns
from tensorcast.predict.score import fitted_half, named, same_run
from tensorcast.predict.serve_runs import serve
from tensorcast.profiles.engine import EngineFit, EngineProfile
from tensorcast.profiles.store import load_device, load_engine

LAYER_S, SLOWER, FIRST_S = 1e-5, 0.25, 0.05
"""What is tried to see what seconds per layer and slower prompts add to a time per token, and seconds to a first
token."""

TIMES = ("tpot_s", "ttft_s", "tpot_error", "ttft_error")
"""What is read of a served run: seconds, and relative median errors that kernels and overheads leave."""

SLOWER_THAN_ALIKE = 1.05
"""From how many times the quickest run alike a run is taken not to have drafted."""

Change = Callable[[str], EngineProfile]


def read_runs(table: pd.DataFrame) -> pd.DataFrame:
    """Measured runs, one row each, without those that cannot be read or are replayed, request by request.

    Columns: ``run``; engine, device (profiles' names), ``network`` (equal for models of equal configs), ``model`` as
    written, ``release`` (with its engine), ``mode, measured_tpot_s, measured_ttft_s``, ``prompt`` (tokens, mean),
    ``even`` (may be fitted to), ``stated`` (no workers assumed), ``frontend``, ``drafting`` (whether it drafted is not
    known), ``alike`` (a number per deployment and load), ``same`` (a number per measured run).
    """
    ours = canonical_columns(table)
    runs = [run if run and run.arrivals is None else None for run in predict.read_runs(table, ours)[0]]
    read = pd.Series([run is not None for run in runs], index=table.index)
    measured, _ = predict.measured_columns(table, ours)
    frame = named(table.drop(columns=[name for name, column in ours.items() if column in measured]))
    frame = frame.assign(**measured, layout=[run.layout if run else "" for run in runs])
    out = frame.reindex(columns=["model", "mode", "measured_tpot_s", "measured_ttft_s"])[read]
    kept = [run for run in runs if run is not None]
    devices = {name: load_device(name.replace("_", "-")).name for name in {run.device for run in kept}}
    engines = {name: load_engine(name).name for name in {run.engine for run in kept}}
    shipped = {name: understand(name).profile for name in {run.model for run in kept}}
    networks = {name: json.dumps(one.config, sort_keys=True) for name, one in shipped.items()}
    out = out.assign(
        run=pd.Series(kept, dtype=object, index=out.index),
        even=fitted_half(frame)[read], mode=[run.mode for run in kept],
        engine=[engines[run.engine] for run in kept], device=[devices[run.device] for run in kept],
        network=pd.factorize(pd.Series([networks[run.model] for run in kept]))[0],
        prompt=[max(1.0, run.isl * (1 + run.length_ratio) / 2) for run in kept],
        stated=[not any("workers" in text for text in run.assumed) for run in kept],
        frontend=[run.frontend for run in kept],
        drafting=[bool(run.other_depths) for run in kept],
        release=[f"{engines[run.engine]}=={run.release or load_engine(run.engine).version}" for run in kept],
        alike=pd.factorize(pd.Series([
            f"{run.served_by} {run.device} {run.model} {run.layout} {run.isl}/{run.osl} {run.concurrency}"
            for run in kept
        ]))[0],
    )  # fmt: skip
    return out.assign(same=same_run(out)).reset_index(drop=True)


def served_times(rows: pd.DataFrame, engine: Change) -> pd.DataFrame:
    """:data:`TIMES` of every run of ``rows`` under the profile that ``engine`` gives for its name.

    NaN where a run cannot be served.
    """
    out = np.full((len(rows), len(TIMES)), np.nan)
    for stretch in predict.stretches(list(rows["run"]), jobs=1):
        found = serve([run for _, run in stretch], lambda name: _of_release(name, engine))
        for (place, _), served in zip(stretch, found, strict=True):
            if not served.problem:
                out[place] = [getattr(served, name) for name in TIMES]
    return pd.DataFrame(out, columns=list(TIMES), index=rows.index)


def _of_release(name: str, engine: Change) -> EngineProfile:
    """The rules of a release, with the constants of what ``engine`` gives for its name."""
    own = load_engine(name)
    changed = engine(own.name)
    constants = ("fitted", "first_token_overhead_s", "hand_over_overhead_s")
    return own.model_copy(update={constant: getattr(changed, constant) for constant in constants})


def with_uses(rows: pd.DataFrame) -> pd.DataFrame:
    """``rows`` with what they are used for: ``scored``, ``used`` to fit what steps take; and ``why``, the first reason
    that they are not ``used``."""
    why = pd.Series("", index=rows.index)
    reasons = {
        "not predicted or not measured": ~((rows["tpot_s"] > 0) & (rows["measured_tpot_s"] > 0)),
        "disaggregated": rows["mode"] != "aggregated",
        "left out to score": ~rows["even"],
    }
    for reason, holds in reasons.items():
        why[holds & (why == "")] = reason
    return rows.assign(scored=why.isin(["", "left out to score"]), used=why == "", why=why)


def _dropped(own: pd.DataFrame) -> dict[str, int]:
    """Runs that what steps take was not fitted to, by reason."""
    counts = own.loc[~own["used"], "why"].value_counts(sort=False)
    return {str(why): int(count) for why, count in counts.items()}


def with_slopes(rows: pd.DataFrame, published: dict[str, EngineProfile]) -> pd.DataFrame:
    """Measured ``rows`` (:func:`read_runs`) with their times as published and what each constant would add to them."""
    known = rows[rows["engine"].isin(published)].reset_index(drop=True)
    known = known.join(served_times(known, published.__getitem__))
    slopes = {}
    for name, field, size in (("layer_slope", "layer_s", LAYER_S), ("prompt_slope", "prefill_factor", SLOWER)):
        start = 1.0 if field == "prefill_factor" else 0.0
        more = {name: with_fit(one, **{field: start + size}) for name, one in published.items()}
        slopes[name] = (served_times(known, more.__getitem__)["tpot_s"] - known["tpot_s"]) / size
    return with_uses(known.assign(base_s=known["tpot_s"], **slopes))


@dataclass(frozen=True)
class Told:
    """What measured runs tell: ``known``, one row each, with times as published and what constants add to them, and
    ``own``, each network's constants; ``published``: the engines without what was fitted."""

    known: pd.DataFrame
    own: dict[Group, Own]
    published: dict[str, EngineProfile]

    def fits(self, source: str) -> dict[str, EngineFit]:
        """Every engine's fit, by name. One whose pools hardly anybody measured has the other engines' median factor."""
        here = {str(name): runs for name, runs in self.known.groupby("engine")}
        found = {name: _first_part(runs, _steps_part(runs, self.own, source)) for name, runs in here.items()}
        factors = [one.pool_factor for one in found.values() if "pool_factor" in one.model_fields_set]
        if not factors:
            return found
        lent = round(float(np.median(factors)), 3)
        return {
            name: one if "pool_factor" in one.model_fields_set else one.model_copy(update={"pool_factor": lent})
            for name, one in found.items()
        }

    def fitted(self, fits: dict[str, EngineFit]) -> dict[str, EngineProfile]:
        return {name: self.published[name].model_copy(update={"fitted": fit}) for name, fit in fits.items()}

    def without(self, **values: Any) -> Told:
        """As if no run of this ``network``, on this ``device`` and of this ``release`` had been measured."""
        keep = np.all([self.known[column] != value for column, value in values.items()], axis=0)
        left = self.known[keep]
        return replace(self, known=left, own=own_fits(left[left["used"]]))


def told(rows: pd.DataFrame, engines: dict[str, EngineProfile]) -> Told:
    """Of measured ``rows`` (:func:`read_runs`); engines with too few runs are left out."""
    published = {
        name: one.model_copy(update={"fitted": None, "first_token_overhead_s": None, "hand_over_overhead_s": None})
        for name, one in engines.items()
    }
    known = with_slopes(rows, published)
    counts = known.groupby("engine")["used"].sum()
    known = known[known["engine"].isin(counts[counts >= FEWEST].index)].reset_index(drop=True)
    own = own_fits(known[known["used"]])
    if known.empty:
        return Told(known, own, published)
    steps = {str(name): _steps_part(runs, own, "steps") for name, runs in known.groupby("engine")}
    later = {name: fit.model_copy(update={"first_token_s": FIRST_S}) for name, fit in steps.items()}
    first, longer = (
        served_times(known, Told(known, own, published).fitted(fits).__getitem__) for fits in (steps, later)
    )
    slope = (longer["ttft_s"] - first["ttft_s"]) / FIRST_S
    return Told(known.assign(first_s=first["ttft_s"], first_slope=slope, steps_s=first["tpot_s"]), own, published)


def fit_engines(found: Told, source: str) -> dict[str, EngineFit]:
    """Every engine's fit, by name, with its errors on runs left out."""
    if found.known.empty:
        return {}
    fits = found.fits(source)
    known = found.known.assign(after_s=served_times(found.known, found.fitted(fits).__getitem__)["tpot_s"])
    return {name: _scored(known[known["engine"] == name], fit) for name, fit in fits.items()}


def with_fit(engine: EngineProfile, **fields: Any) -> EngineProfile:
    """``engine`` with constants as if fitted."""
    fields = {"layer_s": 0.0, "layer_error_s": 0.0, **fields}
    return engine.model_copy(update={"fitted": EngineFit(source="given", rows=1, models=1, **fields)})


def _steps_part(runs: pd.DataFrame, own: dict[Group, Own], source: str) -> EngineFit:
    """What the steps of the engine of these ``runs`` take beside their kernels; ``own``: of all engines' networks."""
    found, off = drawn(own, str(runs["engine"].iloc[0])), distances(own)
    used, scored = runs[runs["used"]], runs[runs["scored"]]
    scores: dict[str, Any] = {}
    if scored["network"].nunique() > 1:
        before, after = median_error(scored["tpot_s"], scored), median_error(unseen(scored, own), scored)
        scores = {"unseen_before": round(before, 3), "unseen_error": round(after, 3)}
    return EngineFit(
        source=source, rows=len(used), models=used["network"].nunique(), dropped=_dropped(runs),
        layer_s=round(found.layer_s, 8), layer_error_s=round(off.layer_s, 8),
        prefill_factor=round(1 + found.slower, 3), prefill_error=round(off.slower, 3), **scores,
    )  # fmt: skip


def _first_part(own: pd.DataFrame, fit: EngineFit) -> EngineFit:
    """``fit`` with the time of a first token, of a hand-over and of pools' steps, and the models of all runs it was
    fitted to."""
    usable = own["even"] & (own["first_s"] > 0) & (own["measured_ttft_s"] > 0)
    pooled = own["mode"] != "aggregated"
    whole, pools = own[usable & ~pooled], own[usable & pooled & own["stated"]]
    fields: dict[str, Any] = {}
    if len(whole) >= FEWEST:
        first_s, token_s = least_off_by_size(
            whole["first_s"], whole["first_slope"], whole["prompt"], whole["measured_ttft_s"], evenly(whole)
        )
        fields |= {"first_token_s": round(first_s, 3), "prompt_token_s": round(token_s, 7)}
        fields |= {"first_token_rows": len(whole)}
    behind = pools[pools["frontend"] == "dynamo"]
    if len(behind) >= FEWEST:
        begun = behind["first_s"] + behind["first_slope"] * (
            fields.get("first_token_s", 0.0) + fields.get("prompt_token_s", 0.0) * behind["prompt"]
        )
        hand_over_s = least_off(begun, behind["first_slope"], behind["measured_ttft_s"], once(behind))
        fields |= {"hand_over_s": round(hand_over_s, 2), "hand_over_rows": len(behind)}
    if len(pools) >= FEWEST:
        fields |= {"pool_factor": round(1 + _slower_in_pools(pools), 3)}
    else:
        pools = pools[:0]
    models = pd.concat([own[own["used"]], whole, pools]).groupby("device")["model"].unique()
    served = {str(name): tuple(sorted(some)) for name, some in models.items()}
    return fit.model_copy(update={**fields, "served": served, "served_with": _served_with(own[own["used"]])})


def _served_with(runs: pd.DataFrame) -> dict[str, dict[str, tuple[str, ...]]]:
    """Profiles of models by device and release."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for (device, release), some in runs.groupby(["device", "release"]):
        names = {understand(name).profile.name for name in some["model"].unique()}
        found.setdefault(str(device), {})[str(release).partition("==")[2]] = tuple(sorted(names))
    return found


def _slower_in_pools(pools: pd.DataFrame) -> float:
    slowest = pools["measured_tpot_s"] > SLOWER_THAN_ALIKE * pools.groupby("alike")["measured_tpot_s"].transform("min")
    told = pools[(pools["steps_s"] > 0) & (~pools["drafting"] | slowest)]
    if len(told) < FEWEST:
        return 0.0
    return least_off(told["steps_s"], told["steps_s"], told["measured_tpot_s"], once(told))


def _scored(own: pd.DataFrame, fit: EngineFit) -> EngineFit:
    """``fit`` with its errors on runs left out, copies of runs fitted to not among them."""
    fresh = ~own["even"].groupby(own["same"]).transform("any") & (own["mode"] == "aggregated")
    rows = own[fresh & (own["after_s"] > 0) & (own["measured_tpot_s"] > 0)]
    if rows.empty:
        return fit
    before, after = median_error(rows["tpot_s"], rows), median_error(rows["after_s"], rows)
    scores = {"left_out_rows": len(rows), "left_out_before": round(before, 3), "left_out_error": round(after, 3)}
    return fit.model_copy(update=scores)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    program = "python -m tensorcast.calibrate.engines.overheads"
    parser = argparse.ArgumentParser(prog=program, description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, required=True, help="CSV of measured runs, as tensorcast predict reads")
    parser.add_argument("--profiles", type=Path, default=Path("profiles"), help="folder of profiles to write into")
    parser.add_argument("--source", default="", help="where the runs are from (default: the table's name and rows)")
    parser.add_argument("--left-out", type=Path, help="page to write: errors on models and devices left out")
    options = parser.parse_args(arguments)
    rows = read_runs(read_table(options.table))
    paths = {path.stem: path for path in sorted((options.profiles / "engines").glob("*.yaml"))}
    engines = {one.name: one for one in map(read_engine, paths.values())}
    source = options.source or f"{len(rows)} measured runs of {options.table.name}"
    found = told(rows, engines)
    fits = fit_engines(found, source)
    if not fits:
        raise InputError(f"{options.table}: no engine has {FEWEST} measured runs to fit to")
    every = {columns: leave_out(found, columns, served_times) for columns in TOGETHER}
    left = {column: every[column,] for column in LEFT_OUT} | {ALL: every[tuple(LEFT_OUT)]}
    beside = serving_errors(pd.concat(list(every.values()), ignore_index=True))
    fits = {name: fit.model_copy(update={"serving_error": beside.get(name, {})}) for name, fit in fits.items()}
    for name, fit in fits.items():
        path = next(path for path in paths.values() if read_engine(path).name == name)
        write_fit(path, fit)
        print(f"{path}: {report(fit)}")
    if options.left_out is not None:
        write_atomically(options.left_out, page(left, found.fitted(fits), source))
        print(options.left_out)
    return 0


def report(fit: EngineFit) -> str:
    """A fit in one line."""
    each = f" and {1e6 * fit.prompt_token_s:.1f} us per token of its prompt"
    first = "" if fit.first_token_s is None else f", {1e3 * fit.first_token_s:.0f} ms{each} per first token"
    pools = "" if fit.hand_over_s is None else f", {1e3 * fit.hand_over_s:.0f} ms per hand-over"
    pools += f", decode steps of pools x {fit.pool_factor:.2f}" if fit.pool_factor > 1 else ""
    seen = f"time per token of {fit.left_out_rows} runs left out {_change(fit.left_out_before, fit.left_out_error)}"
    new = f"models not fitted to {_change(fit.unseen_before, fit.unseen_error)}"
    load = f", steps with prompts x {fit.prefill_factor:.2f}"
    return f"{1e6 * fit.layer_s:.1f} us per layer{load}{first}{pools}; {seen}, {new}"


def _change(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{before:.1%} -> {after:.1%} off"


if __name__ == "__main__":
    command.run(main)
