"""What engines do beside their kernels, fitted to measured serving runs and written into the engine profiles.

``python -m tensorcast.calibrate.engines.overheads --table FILE [--profiles DIR]``, or ``make engines TABLE=FILE``.

**Overhead per step**: from aggregated runs at small batch, where a step is decode nearly alone: what, added to every
step, brings predicted times per token closest to the measured ones. A record may lack what decides the time (drafted
tokens, say) and kernels err per model, so absolute errors are summed, in which no single run weighs much, and every
network on every device counts alike. Networks agree badly on their engine's overhead. So the engine's value is drawn
towards the published one, and a device's towards the engine's, each by as many networks' weight
(:data:`WEIGHTS`) as brings networks closest that are fitted to without their own runs; where nothing does, the
published value stays. What a sequence adds stays as
published: fitted beside the step's, to runs of larger batches, it made runs left out no better and devices left out
worse.

**Prompts under load**: kernels are timed alone, in short bursts, on a cool chip; in a server they share steps with
decoding rows, run on for minutes at the power limit, and prompts do not fill their steps evenly. How many times as
long as their kernels steps with prompts take, 1 at least, is fitted per device to aggregated runs of all engines and
of any batch: drawn towards 1 as far as serves networks best that are not fitted to.

**First token, hand-over**: what runs of any batch take from request to first token beyond what the model explains, a
constant and a part that grows with the prompt, fitted in the same way, every run alike, with the overhead per step in
place; the hand-over from runs that state their workers.

Only rows of :func:`tensorcast.predict.score.fitted_half` are fitted to; the others score.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tensorcast.calibrate import command
from tensorcast.calibrate.engines.statistics import (
    Constant,
    Slower,
    fit_drawn,
    fit_slower,
    least_off,
    least_off_by_size,
    median_error,
    once,
    unseen,
)
from tensorcast.calibrate.generated_blocks import read_engine, write_fit
from tensorcast.errors import InputError
from tensorcast.predict import predict
from tensorcast.predict.csv_table import read_table
from tensorcast.predict.run_columns import canonical_columns
from tensorcast.predict.score import fitted_half, named, same_run
from tensorcast.predict.serve_runs import serve
from tensorcast.profiles.engine import DeviceFit, EngineFit, EngineProfile
from tensorcast.profiles.store import load_device, load_engine, load_model

SMALL_BATCH = 16.0
"""Most requests per data-parallel rank of a run that the overhead per step is fitted to."""

PROMPTS_SHARE = 0.3
"""Most of such a run's time per token that prompts take, as predicted."""

FEWEST = 8
"""Runs below which nothing is fitted."""

STEP_S, SLOWER, FIRST_S = 1e-3, 0.25, 0.05
"""What is tried to see what overheads and slower prompts add to a time per token and to a first token."""

Change = Callable[[str], EngineProfile]


def read_runs(table: pd.DataFrame) -> pd.DataFrame:
    """Measured runs, one row each, without those that cannot be read.

    Columns: ``run``; engine, device (profiles' names), ``network`` (equal for models of equal configs), ``model`` as
    written, ``mode, measured_tpot_s, measured_ttft_s``, ``users`` (requests per data-parallel rank), ``prompt``
    (tokens, mean), ``even`` (may be fitted to), ``stated`` (no workers assumed), ``same`` (a number per measured run).
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
        prompt=[max(1.0, run.isl * (1 + run.length_ratio) / 2) for run in kept],
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


def with_uses(rows: pd.DataFrame) -> pd.DataFrame:
    """``rows`` with what they are used for: ``scored``; ``prompts``, fitted to for prompts under load; ``small``, for
    the overhead per step; and ``why``, the first reason that they are not ``small``."""
    why = pd.Series("", index=rows.index)
    reasons = {
        "not predicted or not measured": ~((rows["tpot_s"] > 0) & (rows["measured_tpot_s"] > 0)),
        "disaggregated": rows["mode"] != "aggregated",
        "left out to score": ~rows["even"],
        f"more than {SMALL_BATCH:g} requests per data-parallel rank": rows["users"] > SMALL_BATCH,
        f"prompts take more than {PROMPTS_SHARE:.0%} of the time": 1 - rows["decode_step_s"] / rows["tpot_s"]
        > PROMPTS_SHARE,
    }
    for reason, holds in reasons.items():
        why[holds & (why == "")] = reason
    used = {"not predicted or not measured", "disaggregated"}
    scored = ~why.isin(used)
    return rows.assign(scored=scored, prompts=scored & rows["even"], small=why == "", why=why)


def _dropped(own: pd.DataFrame) -> dict[str, int]:
    """Runs that no overhead per step was fitted to, by reason."""
    counts = own.loc[~own["small"], "why"].value_counts(sort=False)
    return {str(why): int(count) for why, count in counts.items()}


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
    loaded = {name: with_fit(one, devices=_loaded(one, set(known["device"]))) for name, one in published.items()}
    prompt_slope = (served_times(known, loaded.__getitem__)["tpot_s"] - known["tpot_s"]) / SLOWER
    known = known.assign(slope=slope, prompt_slope=prompt_slope, base_s=known["tpot_s"] - slope * step_s)
    known = with_uses(known)
    counts = known.groupby("engine")["small"].sum()
    known = known[known["engine"].isin(counts[counts >= FEWEST].index)].reset_index(drop=True)
    if known.empty:
        return {}
    steps = {
        str(name): fit_drawn(own[own["small"]], float(published[str(name)].step_overhead_s))
        for name, own in known.groupby("engine")
    }
    base_s = pd.concat([steps[str(name)].added(own) for name, own in known.groupby("engine")])
    full = known.assign(base_s=base_s, slope=known["prompt_slope"])[known["prompts"]]
    slower = {str(name): fit_slower(here) for name, here in full.groupby("device")}
    found = {
        name: _steps_part(known[known["engine"] == name], float(published[name].step_overhead_s), fit, slower, source)
        for name, fit in steps.items()
    }
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
    """``engine`` with constants as if fitted, on all devices alike."""
    fields = {"step_s": float(engine.step_overhead_s), "step_error_s": 0.0, **fields}
    return engine.model_copy(update={"fitted": EngineFit(source="given", rows=1, models=1, **fields)})


def _loaded(engine: EngineProfile, devices: set[str]) -> dict[str, DeviceFit]:
    """Steps with prompts of ``engine`` as if slower under load on every device."""
    one = DeviceFit(step_s=float(engine.step_overhead_s), rows=0, models=(), prefill_factor=1 + SLOWER)
    return dict.fromkeys(devices, one)


def _steps_part(
    own: pd.DataFrame, published_s: float, steps: Constant, slower: dict[str, Slower], source: str
) -> EngineFit:
    """What an engine's steps take beside their kernels, and how much slower those with prompts are under load."""
    used, prompts = own[own["small"]], own[own["prompts"]]
    # of few networks on a device their distances say little: all devices' together
    off = float(np.median([distance for one in slower.values() for distance in one.off]))
    new = unseen(own, published_s, slower)
    devices = {
        name: DeviceFit(
            step_s=round(steps.at(name), 6), rows=int((used["device"] == name).sum()), models=(),
            prefill_factor=round(1 + slower[name].more, 3), prefill_error=round(off, 3),
            prefill_rows=int((prompts["device"] == name).sum()),
        )
        for name in sorted(set(own.loc[own["even"], "device"]) & set(slower))
    }  # fmt: skip
    return EngineFit(
        source=source, rows=len(used), models=used["network"].nunique(), dropped=_dropped(own),
        step_s=round(steps.general, 6), step_error_s=round(new.off, 5), devices=devices,
        unseen_before=new.before, unseen_error=new.after,
    )  # fmt: skip


def _first_part(own: pd.DataFrame, fit: EngineFit) -> EngineFit:
    """``fit`` with the time of a first token and of a hand-over, and the models of all runs it was fitted to."""
    usable = own["even"] & (own["first_s"] > 0) & (own["measured_ttft_s"] > 0)
    pooled = own["mode"] != "aggregated"
    whole, pools = own[usable & ~pooled], own[usable & pooled & own["stated"]]
    fields: dict[str, Any] = {}
    if len(whole) >= FEWEST:
        first_s, token_s = least_off_by_size(
            whole["first_s"], whole["first_slope"], whole["prompt"], whole["measured_ttft_s"], once(whole)
        )
        fields |= {"first_token_s": round(first_s, 3), "prompt_token_s": round(token_s, 7)}
        fields |= {"first_token_rows": len(whole)}
    if len(pools) >= FEWEST:
        begun = pools["first_s"] + pools["first_slope"] * (
            fields.get("first_token_s", 0.0) + fields.get("prompt_token_s", 0.0) * pools["prompt"]
        )
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
    each = f" and {1e6 * fit.prompt_token_s:.1f} us per token of its prompt"
    first = "" if fit.first_token_s is None else f", {1e3 * fit.first_token_s:.0f} ms{each} per first token"
    pools = "" if fit.hand_over_s is None else f", {1e3 * fit.hand_over_s:.0f} ms per hand-over"
    seen = f"time per token of {fit.left_out_rows} runs left out {_change(fit.left_out_before, fit.left_out_error)}"
    new = f"models not fitted to {_change(fit.unseen_before, fit.unseen_error)}"
    slower = ", ".join(f"{name} {one.prefill_factor:.2f}" for name, one in fit.devices.items())
    load = f", prompts under load x ({slower})"
    return f"{1e3 * fit.step_s:.2f} ms per step ({devices}){load}{first}{pools}; {seen}, {new}"


def _change(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{before:.1%} -> {after:.1%} off"


if __name__ == "__main__":
    command.run(main)
