"""What engines do beside their kernels, fitted to measured serving runs and written into the engine profiles.

``python -m tensorcast.validate.engines --table FILE [--profiles DIR]``, or ``make engines TABLE=FILE``.

**Overhead per step**: from aggregated runs at small batch, where a step is decode nearly alone: what, added to every
step, brings predicted times per token closest to the measured ones. A record may lack what decides the time (drafted
tokens, say) and kernels err per model, so absolute errors are summed, in which no single run weighs much, and every
network on every device counts alike. Networks agree badly on their engine's overhead. So the engine's value is drawn
towards the published one, and a device's towards the engine's, each by as many networks' weight
(:data:`WEIGHTS`) as brings networks closest that are fitted to without their own runs; where nothing does, the
published value stays. What a sequence adds stays as
published: fitted beside the step's, to runs of larger batches, it made runs left out no better and devices left out
worse.

**First token, hand-over**: what runs of any batch take from request to first token beyond what the model explains,
fitted in the same way, every run alike, with the overhead per step in place; the hand-over from runs that state their
workers.

Only rows of :func:`tensorcast.deploy.score.fitted_half` are fitted to; the others score.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tensorcast.deploy import predict
from tensorcast.deploy.csv_table import read_table
from tensorcast.deploy.runs import canonical_columns
from tensorcast.deploy.score import fitted_half, named, same_run
from tensorcast.deploy.together import serve
from tensorcast.errors import InputError
from tensorcast.profiles import load_device, load_engine, load_model
from tensorcast.profiles.engine import DeviceFit, EngineFit, EngineProfile
from tensorcast.validate import command
from tensorcast.validate.engine_files import read_engine, write_fit

SMALL_BATCH = 16.0
"""Most requests per data-parallel rank of a run that the overhead per step is fitted to."""

PROMPTS_SHARE = 0.3
"""Most of such a run's time per token that prompts take, as predicted."""

class Weights(NamedTuple):
    """As how many networks the published overhead counts beside an engine's, and the engine's beside a device's."""

    published: float
    general: float


WEIGHTS = tuple(Weights(p, g) for p in (math.inf, 32.0, 16.0, 8.0, 4.0) for g in (math.inf, 8.0, 4.0, 2.0, 1.0))
"""What is tried, the heaviest first."""

FEWEST = 8
"""Runs below which nothing is fitted."""

STEP_S, FIRST_S = 1e-3, 0.05
"""Overheads that are tried to see what a second of them adds to a time per token and to a first token."""

Change = Callable[[str], EngineProfile]


def read_runs(table: pd.DataFrame) -> pd.DataFrame:
    """Measured runs, one row each, without those that cannot be read.

    Columns: ``run``; engine, device (profiles' names), ``network`` (equal for models of equal configs), ``model`` as
    written, ``mode, measured_tpot_s, measured_ttft_s``, ``users`` (requests per data-parallel rank), ``even`` (may be
    fitted to), ``stated`` (no workers assumed), ``same`` (a number per measured run).
    """
    ours = canonical_columns(table)
    runs, _ = predict.read_runs(table, ours)
    read = pd.Series([run is not None for run in runs], index=table.index)
    measured, _ = predict.measured_columns(table, ours)
    frame = named(table.drop(columns=[name for name, column in ours.items() if column in measured]))
    frame = frame.assign(**measured, layout=[run.layout if run else "" for run in runs])
    out = frame.reindex(columns=["model", "mode", "measured_tpot_s", "measured_ttft_s"])[read]
    kept = [run for run in runs if run is not None]
    devices = {name: load_device(name.replace("_", "-")).name for name in {run.device for run in kept}}
    engines = {name: load_engine(name).name for name in {run.engine for run in kept}}
    networks = {name: json.dumps(load_model(name).config, sort_keys=True) for name in {run.model for run in kept}}
    out = out.assign(
        run=pd.Series(kept, dtype=object, index=out.index),
        even=fitted_half(frame)[read], mode=[run.mode for run in kept],
        engine=[engines[run.engine] for run in kept], device=[devices[run.device] for run in kept],
        network=pd.factorize(pd.Series([networks[run.model] for run in kept]))[0],
        users=[run.concurrency / run.replicas / run.decode.dp for run in kept],
        stated=[not any("workers" in text for text in run.assumed) for run in kept],
    )  # fmt: skip
    return out.assign(same=same_run(out)).reset_index(drop=True)


def served_times(rows: pd.DataFrame, engine: Change) -> pd.DataFrame:
    """``tpot_s, ttft_s, decode_step_s`` of every run of ``rows`` under the profile that ``engine`` gives for its name.

    NaN where a run cannot be served.
    """
    out = np.full((len(rows), 3), np.nan)
    for stretch in predict.stretches(list(rows["run"]), jobs=1):
        found = serve([run for _, run in stretch], lambda name: engine(load_engine(name).name))
        for (place, _), served in zip(stretch, found, strict=True):
            if not served.problem:
                out[place] = served.tpot_s, served.ttft_s, served.decode_step_s
    return pd.DataFrame(out, columns=["tpot_s", "ttft_s", "decode_step_s"], index=rows.index)


def least_off(base: Any, slope: Any, measured: Any, weight: Any) -> float:
    """Seconds, 0 or more, of which ``slope`` times added to ``base`` come closest to ``measured``.

    Least weighted sum of |predicted / measured - 1| over ``[N]`` runs, which is a weighted median.
    """
    base, slope, measured, weight = (np.asarray(a, dtype=float) for a in (base, slope, measured, weight))
    moves = slope > 1e-3  # of a full house, the first token waits for others' replies
    if not moves.any():
        return 0.0
    meets, pull = (measured - base)[moves] / slope[moves], (weight * slope / measured)[moves]
    order = np.argsort(meets)
    below = np.cumsum(pull[order])
    return max(float(meets[order][np.searchsorted(below, below[-1] / 2)]), 0.0)


def once(rows: pd.DataFrame) -> pd.Series[float]:
    """Weights by which a run counts once, however often it is recorded."""
    return 1.0 / rows.groupby("same")["even"].transform("size")


def alike(rows: pd.DataFrame) -> pd.Series[float]:
    """:func:`once`, and every network on every device of an engine the same."""
    one = once(rows)
    return one / one.groupby([rows["engine"], rows["device"], rows["network"]]).transform("sum")


@dataclass(frozen=True)
class StepFit:
    """Seconds per step in general and by device; ``own``: by (device, network), each from its runs alone."""

    step_s: float
    devices: dict[str, float]
    own: dict[tuple[str, int], float]

    def on(self, devices: pd.Series[str]) -> pd.Series[float]:
        return devices.map(lambda name: self.devices.get(name, self.step_s)).astype(float)


def fit_step(rows: pd.DataFrame, published_s: float, weights: Weights) -> StepFit:
    """From runs at small batch of one engine: ``base_s`` without overhead, ``slope`` per second of it."""

    def fit(some: pd.DataFrame) -> float:
        return least_off(some["base_s"], some["slope"], some["measured_tpot_s"], alike(some))

    def drawn(some: pd.DataFrame, towards: float, count: float) -> float:
        networks = some["network"].nunique()
        return towards if math.isinf(count) else (networks * fit(some) + count * towards) / (networks + count)

    step_s = drawn(rows, published_s, weights.published) if len(rows) else published_s
    devices = {str(name): drawn(some, step_s, weights.general) for name, some in rows.groupby("device")}
    own = {
        (str(name), network): fit(some)
        for name, here in rows.groupby("device")
        for network, some in ((n, here[here["network"] == n]) for n in here["network"].unique())
    }
    return StepFit(step_s, devices, own)


def choose(rows: pd.DataFrame, published_s: float) -> Weights:
    """The weights with which every network of ``rows``, fitted to without its own runs, is closest in the mean."""
    networks = list(rows["network"].unique())
    if len(networks) < 2:
        return WEIGHTS[0]

    def off(weights: Weights) -> float:
        found = []
        for network in networks:
            fit = fit_step(rows[rows["network"] != network], published_s, weights)
            some = rows[rows["network"] == network]
            error = ((some["base_s"] + fit.on(some["device"]) * some["slope"]) / some["measured_tpot_s"] - 1).abs()
            found += list(error.groupby(some["device"]).median())
        return float(np.mean(found))

    return min(WEIGHTS, key=off)


def small_batch(rows: pd.DataFrame) -> tuple[pd.Series[bool], dict[str, int]]:
    """Runs that an overhead per step may be seen in, and how many others there are by the first reason that holds."""
    reasons = {
        "not predicted or not measured": ~((rows["tpot_s"] > 0) & (rows["measured_tpot_s"] > 0)),
        "disaggregated": rows["mode"] != "agg",
        "left out to score": ~rows["even"],
        f"more than {SMALL_BATCH:g} requests per data-parallel rank": rows["users"] > SMALL_BATCH,
        f"prompts take more than {PROMPTS_SHARE:.0%} of the time": 1 - rows["decode_step_s"] / rows["tpot_s"]
        > PROMPTS_SHARE,
    }
    kept, dropped = pd.Series(True, index=rows.index), {}
    for reason, holds in reasons.items():
        if count := int((kept & holds).sum()):
            dropped[reason] = count
        kept &= ~holds
    return kept, dropped


@dataclass(frozen=True)
class Unseen:
    """Networks, each fitted to without its own runs: median error of their times per token by the published overhead
    and by the fitted one, and the median distance of a network's own overhead from the one that it is given."""

    before: float | None
    after: float | None
    error_s: float


def unseen(rows: pd.DataFrame, small: pd.Series[bool], published_s: float) -> Unseen:
    """One engine's ``rows``, of which ``small`` are fitted to and all aggregated ones scored."""
    scored = rows[(rows["mode"] == "agg") & (rows["tpot_s"] > 0) & (rows["measured_tpot_s"] > 0)]
    own, off, after = fit_step(rows[small], published_s, WEIGHTS[0]).own, [], pd.Series(0.0, index=scored.index)
    for network, some in scored.groupby("network"):
        others = rows[small & (rows["network"] != network)]
        fit = fit_step(others, published_s, choose(others, published_s))
        after[some.index] = some["base_s"] + fit.on(some["device"]) * some["slope"]
        off += [abs(s - fit.devices.get(name, fit.step_s)) for (name, one), s in own.items() if one == network]
    if scored["network"].nunique() < 2:
        return Unseen(None, None, float(np.median(off)))
    before, since = _median_error(scored["tpot_s"], scored), _median_error(after, scored)
    return Unseen(round(before, 3), round(since, 3), float(np.median(off)))


def _median_error(predicted: pd.Series[float], rows: pd.DataFrame, name: str = "tpot_s") -> float:
    return float((predicted / rows[f"measured_{name}"] - 1).abs().median())


def fit_engines(rows: pd.DataFrame, engines: dict[str, EngineProfile], source: str) -> dict[str, EngineFit]:
    """Every engine's fit to measured ``rows`` (:func:`read_runs`), by name; those with too few runs are left out."""
    published = {
        name: one.model_copy(update={"fitted": None, "first_token_overhead_s": None, "hand_over_overhead_s": None})
        for name, one in engines.items()
    }
    known = rows[rows["engine"].isin(published)].reset_index(drop=True)
    step_s = known["engine"].map(lambda name: float(published[name].step_overhead_s))
    known = known.join(served_times(known, published.__getitem__))
    more = {name: with_fit(one, step_s=float(one.step_overhead_s) + STEP_S) for name, one in published.items()}
    slope = (served_times(known, more.__getitem__)["tpot_s"] - known["tpot_s"]) / STEP_S
    known = known.assign(slope=slope, base_s=known["tpot_s"] - slope * step_s)
    found: dict[str, EngineFit] = {}
    for name, own in known.groupby("engine"):
        small, dropped = small_batch(own)
        if int(small.sum()) >= FEWEST:
            found[str(name)] = _step_part(own, small, dropped, float(published[str(name)].step_overhead_s), source)
    known = known[known["engine"].isin(found)].reset_index(drop=True)
    stepped = {name: one.model_copy(update={"fitted": found[name]}) for name, one in published.items() if name in found}
    known = known.assign(first_s=served_times(known, stepped.__getitem__)["ttft_s"])
    later = {
        name: one.model_copy(update={"fitted": found[name].model_copy(update={"first_token_s": FIRST_S})})
        for name, one in stepped.items()
    }
    known = known.assign(first_slope=(served_times(known, later.__getitem__)["ttft_s"] - known["first_s"]) / FIRST_S)
    found = {name: _first_part(known[known["engine"] == name], fit) for name, fit in found.items()}
    last = {name: stepped[name].model_copy(update={"fitted": fit}) for name, fit in found.items()}
    known = known.assign(after_s=served_times(known, last.__getitem__)["tpot_s"])
    return {name: _scored(known[known["engine"] == name], fit) for name, fit in found.items()}


def with_fit(engine: EngineProfile, **fields: Any) -> EngineProfile:
    """``engine`` with overheads as if fitted, on all devices alike."""
    fields = {"step_s": float(engine.step_overhead_s), "step_error_s": 0.0, **fields}
    return engine.model_copy(update={"fitted": EngineFit(source="given", rows=1, models=1, **fields)})


def _step_part(
    own: pd.DataFrame, small: pd.Series[bool], dropped: dict[str, int], published_s: float, source: str
) -> EngineFit:
    used = own[small]
    fit = fit_step(used, published_s, choose(used, published_s))
    devices = {
        name: DeviceFit(
            step_s=round(fit.devices.get(name, fit.step_s), 6), rows=int((used["device"] == name).sum()), models=()
        )
        for name in sorted(set(own.loc[own["even"], "device"]))
    }
    new = unseen(own, small, published_s)
    return EngineFit(
        source=source, rows=len(used), models=used["network"].nunique(), dropped=dropped, step_s=round(fit.step_s, 6),
        step_error_s=round(new.error_s, 5), devices=devices, unseen_before=new.before, unseen_error=new.after,
    )  # fmt: skip


def _first_part(own: pd.DataFrame, fit: EngineFit) -> EngineFit:
    """``fit`` with the time of a first token and of a hand-over, and the models of all runs it was fitted to."""
    usable = own["even"] & (own["first_s"] > 0) & (own["measured_ttft_s"] > 0)
    whole, pools = own[usable & (own["mode"] == "agg")], own[usable & (own["mode"] != "agg") & own["stated"]]
    fields: dict[str, Any] = {}
    if len(whole) >= FEWEST:
        first_s = least_off(whole["first_s"], whole["first_slope"], whole["measured_ttft_s"], once(whole))
        fields |= {"first_token_s": round(first_s, 3), "first_token_rows": len(whole)}
    if len(pools) >= FEWEST:
        begun = pools["first_s"] + pools["first_slope"] * fields.get("first_token_s", 0.0)
        hand_over_s = least_off(begun, pools["first_slope"], pools["measured_ttft_s"], once(pools))
        fields |= {"hand_over_s": round(hand_over_s, 2), "hand_over_rows": len(pools)}
    else:
        pools = pools[:0]
    models = pd.concat([whole, pools]).groupby("device")["model"].unique()
    devices = {
        name: one.model_copy(update={"models": tuple(sorted(models.get(name, ())))})
        for name, one in fit.devices.items()
        if name in models
    }
    return fit.model_copy(update={**fields, "devices": devices})


def _scored(own: pd.DataFrame, fit: EngineFit) -> EngineFit:
    """``fit`` with its errors on runs left out, copies of runs fitted to not among them."""
    fresh = ~own["even"].groupby(own["same"]).transform("any") & (own["mode"] == "agg")
    rows = own[fresh & (own["after_s"] > 0) & (own["measured_tpot_s"] > 0)]
    if rows.empty:
        return fit
    before, after = _median_error(rows["tpot_s"], rows), _median_error(rows["after_s"], rows)
    scores = {"left_out_rows": len(rows), "left_out_before": round(before, 3), "left_out_error": round(after, 3)}
    return fit.model_copy(update=scores)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tensorcast.validate.engines", description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, required=True, help="CSV of measured runs, as tensorcast predict reads")
    parser.add_argument("--profiles", type=Path, default=Path("profiles"), help="folder of profiles to write into")
    parser.add_argument("--source", default="", help="where the runs are from (default: the table's name and rows)")
    options = parser.parse_args(arguments)
    rows = read_runs(read_table(options.table))
    paths = {path.stem: path for path in sorted((options.profiles / "engines").glob("*.yaml"))}
    engines = {one.name: one for one in map(read_engine, paths.values())}
    source = options.source or f"{len(rows)} measured runs of {options.table.name}"
    fits = fit_engines(rows, engines, source)
    if not fits:
        raise InputError(f"{options.table}: no engine has {FEWEST} measured runs at small batch to fit to")
    for name, fit in fits.items():
        path = next(path for path in paths.values() if read_engine(path).name == name)
        write_fit(path, fit)
        print(f"{path}: {report(fit)}")
    return 0


def report(fit: EngineFit) -> str:
    """A fit in one line."""
    devices = ", ".join(f"{name} {1e3 * one.step_s:.2f}" for name, one in fit.devices.items())
    first = "" if fit.first_token_s is None else f", {1e3 * fit.first_token_s:.0f} ms per first token"
    pools = "" if fit.hand_over_s is None else f", {1e3 * fit.hand_over_s:.0f} ms per hand-over"
    seen = f"time per token of {fit.left_out_rows} runs left out {_change(fit.left_out_before, fit.left_out_error)}"
    new = f"models not fitted to {_change(fit.unseen_before, fit.unseen_error)}"
    return f"{1e3 * fit.step_s:.2f} ms per step ({devices}){first}{pools}; {seen}, {new}"


def _change(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{before:.1%} -> {after:.1%} off"


if __name__ == "__main__":
    command.run(main)
