"""Served runs priced by the rules of their own release, and by the newest's: how far each is off, by engine.

Constants are the same in both (kernels and overheads as they were measured), so the difference is the rules'.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tensorcast.calibrate import command
from tensorcast.files import write_atomically
from tensorcast.predict.csv_table import read_table
from tensorcast.predict.predict import measured_columns, read_runs, stretches
from tensorcast.predict.run_columns import Run, canonical_columns
from tensorcast.predict.serve_runs import serve
from tensorcast.profiles.store import load_engine
from tensorcast.report.predict.causes import markdown

if TYPE_CHECKING:
    import pandas as pd

TIMES = {"tpot_s": "time per token", "ttft_s": "first token"}
"""What is compared."""


def compared(table: pd.DataFrame) -> pd.DataFrame:
    """One row per measured run that both rules can serve: engine, the ``release`` said, the ``rules`` that priced it,
    and relative errors of :data:`TIMES`, ``own_`` and ``newest_``."""
    import pandas as pd

    ours = canonical_columns(table)
    runs = [run if run and run.arrivals is None else None for run in read_runs(table, ours)[0]]
    measured, _ = measured_columns(table, ours)
    said = next((table[name].astype(str) for name, column in ours.items() if column == "release"), None)
    newest = {engine: load_engine(engine).version for engine in {run.engine for run in runs if run is not None}}
    moved = [None if run is None else replace(run, release=newest[run.engine]) for run in runs]
    columns: dict[str, object] = {
        "engine": [run.engine if run else "" for run in runs],
        "release": ["" if said is None else said.iloc[i] for i in range(len(runs))],
        "rules": [(run.release or newest[run.engine]) if run else "" for run in runs],
    }
    for name, some in (("own", runs), ("newest", moved)):
        times = _times(some)
        for i, time in enumerate(TIMES):
            if f"measured_{time}" in measured:
                columns[f"{name}_{time}"] = np.abs(times[:, i] / measured[f"measured_{time}"].to_numpy(dtype=float) - 1)
    return pd.DataFrame(columns).dropna(how="any")


def _times(runs: list[Run | None]) -> np.ndarray:
    """:data:`TIMES` of every run; NaN where it cannot be served."""
    found = np.full((len(runs), len(TIMES)), np.nan)
    for stretch in stretches(runs, jobs=1):
        for (place, _), served in zip(stretch, serve([run for _, run in stretch]), strict=True):
            if not served.problem:
                found[place] = [getattr(served, name) for name in TIMES]
    return found


def page(frame: pd.DataFrame, source: str) -> str:
    """The table in Markdown: medians by engine and release, then by engine."""
    times = [time for time in TIMES if f"own_{time}" in frame]
    rows = []
    for by in (["engine", "release", "rules"], ["engine"]):
        for key, some in frame.groupby(by, sort=True):
            names = [*map(str, key), *[""] * (3 - len(key))] if by != ["engine"] else [str(key[0]), "all", ""]
            medians = [some[f"{whose}_{time}"].median() for time in times for whose in ("own", "newest")]
            rows.append([*names, str(len(some)), *(f"{100 * median:.1f} %" for median in medians)])
    heads = ["engine", "release said", "rules", "runs"]
    heads += [f"{TIMES[time]}, {whose}" for time in times for whose in ("own rules", "newest rules")]
    lines = [
        "# Served runs by their own release's rules", "",
        f"Median distance of predicted from measured times, of {source}: priced by the rules of the release that a run "
        "names (or the nearest that was read, `rules`), and by those of the newest release. Kernels and overheads are "
        "the same in both. Made by `make releases TABLE=FILE`.", "", *markdown(heads, rows), "",
        *(f"{TIMES[time].capitalize()}: {_nearer(frame, time)}." for time in times), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _nearer(frame: pd.DataFrame, time: str) -> str:
    """How often own rules are nearer to what was measured: of runs that both price otherwise, and of their groups."""
    own, newest = frame[f"own_{time}"], frame[f"newest_{time}"]
    other = frame[(own - newest).abs() > 1e-9]
    nearer = int((other[f"own_{time}"] < other[f"newest_{time}"]).sum())
    medians = other.groupby(["engine", "release"])[[f"own_{time}", f"newest_{time}"]].median()
    groups = int((medians[f"own_{time}"] < medians[f"newest_{time}"]).sum())
    return (
        f"of {len(other)} runs that the rules price otherwise own ones are nearer in {nearer}, and in the median in "
        f"{groups} of their {len(medians)} releases"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    program = "python -m tensorcast.validate.engines.served"
    parser = argparse.ArgumentParser(prog=program, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", type=Path, required=True, help="CSV of measured runs, as tensorcast predict reads")
    parser.add_argument("--out", type=Path, required=True, help="page to write")
    options = parser.parse_args(arguments)
    table = read_table(options.table)
    write_atomically(options.out, page(compared(table), f"{len(table)} runs of {options.table.name}"))
    print(options.out)
    return 0


if __name__ == "__main__":
    command.run(main)
