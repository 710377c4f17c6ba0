"""Replayed percentiles beside those that public runs report: ``python benchmarks/percentiles.py [FILE]``.

The runs are those of ``benchmarks/cookbook_pages.csv``, SGLang's cookbook, sent as its client does and replayed;
nothing was fitted to a percentile. What is printed is predicted over measured, in the median of the runs of a group: of
dense networks and those with experts, whose kernels Triton compiles as steps of a new size come, and by users.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from tensorcast.predict.predict import read_runs
from tensorcast.predict.replay_runs import outcome_of
from tensorcast.predict.run_columns import canonical_columns
from tensorcast.profiles.store import load_model

RUNS = Path(__file__).parent / "cookbook_pages.csv"

NAMES = ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "itl_p50", "itl_p99")
"""Of summaries; measured columns have the same with ``measured_`` and ``_s``."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", default=RUNS, help="a table as predict reads, with measured ones")
    table = pd.read_csv(parser.parse_args().file)
    runs, problems = read_runs(table, canonical_columns(table))
    found = []
    for row, run, problem in zip(table.to_dict("records"), runs, problems, strict=True):
        if run is None or run.arrivals is None:
            raise SystemExit(f"{row}: {problem or 'is no row that is replayed'}")
        said = outcome_of(run)[1].summary()
        kind = "experts" if load_model(run.model).num_experts else "dense"
        found.append({"kind": kind, "users": int(run.concurrency)} | {
            name: said[f"{name}_s"] / row.get(f"measured_{name}_s", np.nan) for name in NAMES
        })
    ratios = pd.DataFrame(found)
    out = Table("networks", "users", "runs", *NAMES, box=None)
    groups = [*ratios.groupby(["kind", "users"]), *((("all", ""), ratios),)]
    for (kind, users), group in groups:
        cells = [f"{group[name].median():.2f}" for name in NAMES]
        out.add_row(str(kind), str(users), str(len(group)), *cells)
    Console(width=120).print(out)


if __name__ == "__main__":
    main()
