"""Predicting a table of deployments: rows in, the same rows with predictions, intervals and problems out.

Rows are served together, those of one deployment priced in one call. A row that cannot be read, laid out
or served keeps its place and says why in ``problem``; nothing is dropped.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorcast.cost.evidence import EVIDENCE
from tensorcast.errors import InputError
from tensorcast.parallel import spread, uncollected
from tensorcast.predict.arrivals import Arrivals, tell_earlier_runs
from tensorcast.predict.bench_results import with_results
from tensorcast.predict.cells import MOST_NAMED, is_empty, layout_cells, plain_number
from tensorcast.predict.csv_table import read_table
from tensorcast.predict.run_columns import COLUMNS, MEASURED, Run, canonical_columns, read_run
from tensorcast.predict.serve_runs import load_engine_once, load_profiles, serve
from tensorcast.serving.interval import served_interval, unserved
from tensorcast.serving.traffic import ServingMetrics

if TYPE_CHECKING:
    import pandas as pd

    from tensorcast.predict.replay_runs import Replayed

PREDICTED = ("ttft_s", "tpot_s", "output_tokens_per_s")
"""Predicted columns; each has the ends of its interval beside it (``ttft_low_s``, as units end a name)."""

OTHER_UNIT = 200.0
"""Times that measurements are more, or less, than predictions, from which on their unit seems to be another one."""

UNREAD = "is no number more than 0 and is not scored"
"""What is said of a measured cell that is not read."""

_FLAG = re.compile(r"( \()?--([a-z][a-z0-9-]+)(?(1)\))")

MOST_SENT, FEWEST_ROUNDS = 4000, 3.0
"""Requests that are replayed unasked, of users whose replies fill the cache: some tenths of a second. Three rounds of
all users are within 3 % of ten in time per token, and of first tokens within a third."""

FEW = 256
"""Rows below which one process answers sooner than several start."""


def predict_file(path: Path, jobs: int | None = 1, results: Sequence[Path] = ()) -> pd.DataFrame:
    """:func:`predict` of a CSV file; with ``results`` of load generators, of its deployment at each of their loads.

    Raises :class:`InputError` on bad files.
    """
    table = read_table(path)
    if results:
        table = with_results(table, results)
    try:
        return predict(table, jobs)
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None


@uncollected()
def predict(table: pd.DataFrame, jobs: int | None = 1) -> pd.DataFrame:
    """``table`` with predictions. ``jobs``: processes; None: one, and two where rows are replayed, which share little
    of what they take. Raises :class:`InputError` if no column names the model, or the device.

    Columns added: ``layout, gpus, ttft_s, tpot_s, output_tokens_per_s`` with 80 % intervals, ``mean_batch`` (decoding
    sequences per dp rank), ``decode_step_s`` (of the time per token, a step without prompts), ``step_error`` (relative
    median error of steps by their kernels and the engine's overhead), ``share_measured, share_calibrated,
    share_datasheet`` (of kernel time), ``assumed``, ``problem``, and measured columns in seconds under our names.
    Columns of that name in the table are replaced. A row that says a rate, a number of requests or the most sequences
    of a step is replayed request by request (means over all of them, no ``decode_step_s`` and shares), as are users
    whose replies fill the cache, so that sequences start over (vLLM); the others are served steadily, in closed form,
    as many at once as the engine lets run unasked.
    """
    import pandas as pd

    ours = canonical_columns(table)
    runs, problems = read_runs(table, ours)
    jobs = jobs or 1 + any(run is not None and run.arrivals is not None for run in runs)
    parts = stretches(runs, jobs)
    results = spread(_serve, parts, jobs if len(table) >= FEW else 1)
    records: list[dict[str, Any]] = [{"problem": problem} for problem in problems]
    for stretch, served in zip(parts, results, strict=True):
        for (index, run), record in zip(stretch, served, strict=True):
            assumed = "; ".join((*run.assumed, *record.pop("assumed", ())))
            records[index] = {"layout": run.layout, "gpus": run.gpus, **record, "assumed": assumed}
    for record in records:
        record["problem"] = _FLAG.sub(_in_columns, record["problem"])
    measured, unread = measured_columns(table, ours)
    for record, said in zip(records, unread, strict=True):
        record["assumed"] = (record.get("assumed", "") + said).removeprefix("; ")
    out = pd.DataFrame(records, columns=_columns(), index=table.index)
    kept = table.drop(columns=[c for c in table.columns if c in out.columns or ours.get(str(c)) in measured.columns])
    whole = pd.concat([kept, measured, out], axis=1)
    whole.attrs["notes"] = [*table.attrs.get("notes", ()), *_notes(table, ours, out), *_other_units(measured, out)]
    return whole


def _in_columns(flag: re.Match[str]) -> str:
    """A flag of the command line as the column of its name; none in brackets behind that."""
    name = flag[2].replace("-", "_")
    return flag[0] if name not in COLUMNS else "" if flag[1] else name


def _notes(table: pd.DataFrame, ours: Mapping[Any, str], out: pd.DataFrame) -> list[str]:
    """What happened to columns of a table that are no columns of a run."""
    notes, names = [], [str(name) for name in table.columns]
    replaced = [name for name in PREDICTED if name in names and bound(name, "low") not in names]
    if replaced:  # where ends of intervals are beside them, they are an earlier prediction
        meant = ", ".join(f"measured_{name}" for name in replaced)
        notes.append(f"columns replaced: {', '.join(replaced)} (measured ones are called {meant})")
    own = {*ours, *map(str, out.columns)}
    if unread := [name for name in names if name not in own and not name.startswith("Unnamed: ")]:
        more = f" and {len(unread) - MOST_NAMED} more" if len(unread) > MOST_NAMED else ""
        notes.append(f"columns kept and not read: {', '.join(unread[:MOST_NAMED])}{more}")
    if "dtype" in map(str.lower, unread) and "precision" not in ours.values():
        notes.append("dtype is an engine's word for activations: a column precision says what weights are stored in")
    return notes


def _other_units(measured: pd.DataFrame, out: pd.DataFrame) -> list[str]:
    """Measured times whose unit seems to be another one: a thousand times, or a thousandth of, what is predicted."""
    notes = []
    for name in ("ttft_s", "tpot_s"):
        if (said := f"measured_{name}") in measured:
            times = (measured[said] / out[name].astype(float)).median()
            if max(times, 1 / times) > OTHER_UNIT:
                column, unit = (f"measured_{name[:-2]}_ms", "milliseconds") if times > 1 else (said, "seconds")
                notes.append(
                    f"{said}: {times:.3g} times the prediction in the median; a column in {unit} is called {column}"
                )
    return notes


def _columns() -> list[str]:
    names = ["layout", "gpus"]
    for name in PREDICTED:
        names += [name, bound(name, "low"), bound(name, "high")]
    names += ["mean_batch", "decode_step_s", "step_error"]
    return [*names, *(f"share_{kind}" for kind in EVIDENCE), "assumed", "problem"]


def bound(name: str, side: str) -> str:
    """Name of an interval's end: ``ttft_s`` and ``low`` make ``ttft_low_s``."""
    stem, unit = (name[:-2], "_s") if name in ("ttft_s", "tpot_s") else (name, "")
    return f"{stem}_{side}{unit}"


def read_runs(table: pd.DataFrame, ours: Mapping[Any, str]) -> tuple[list[Run | None], list[str]]:
    """The run of every row and what keeps it from being read: either is there. Raises where no row can be read.

    ``ours``: the table's :func:`canonical_columns`.
    """
    if "model" not in ours.values() or "device" not in ours.values():
        raise InputError(f"the table needs columns model and device, has {', '.join(map(str, table.columns))}")
    stated = frozenset(name.strip().lower() for name in ours)
    rows = [{ours[name]: value for name, value in row.items() if name in ours} for row in table.to_dict("records")]
    tell_earlier_runs(rows, MEASURED)
    # a layout's one name stands for columns of sizes, where there are none
    named = table["layout"] if "layout" in table and not {"tp", "dp", "ep", "decode_tp"} & {*ours.values()} else ()
    runs: list[Run | None] = []
    problems = []
    for row, name in itertools.zip_longest(rows, named):
        try:
            runs.append(read_run({**row, **({} if is_empty(name) else layout_cells(str(name)))}, stated))
            problems.append("")
        except InputError as error:
            runs.append(None)
            problems.append(str(error))
    return runs, problems


def stretches(runs: list[Run | None], jobs: int) -> list[list[tuple[int, Run]]]:
    """Rows in the order of deployments, cut where a stretch would be a process's whole share.

    Rows of a model share tables, those of a device and an engine the answers of kernel models: the more are served
    together, the fewer questions they are.
    """
    rows = [(index, run) for index, run in enumerate(runs) if run is not None]

    def deployment(row: tuple[int, Run]) -> tuple[str, ...]:
        run = row[1]
        return run.model, str(run.options.quant), run.served_by, run.device, str(run.options), run.layout

    rows.sort(key=deployment)
    # runs that are replayed take longer, some much longer than others
    parts = jobs * (2 if jobs > 1 and any(run.arrivals is not None for _, run in rows) else 1)
    share = max(1, -(-len(rows) // parts))
    return [rows[start : start + share] for start in range(0, len(rows), share)]


def _serve(stretch: list[tuple[int, Run]]) -> list[dict[str, Any]]:
    runs = [run for _, run in stretch]
    drafted = [
        (i, replace(run, options=replace(run.options, mtp_depth=depth)))
        for i, run in enumerate(runs)
        for depth in run.other_depths
    ]
    every = [*runs, *(run for _, run in drafted)]
    steady, overflowing = [i for i, run in enumerate(every) if run.arrivals is None], set[int]()
    found = dict(zip(steady, serve([every[i] for i in steady], overflowing=overflowing), strict=True))
    loops = [steady[k] for k in overflowing]
    for i in loops:
        every[i] = _as_loop(every[i])
        del found[i]
    records = [_record(found[i], run) if i in found else {} for i, run in enumerate(every)]
    if len(found) < len(every):
        from tensorcast.predict.replay_runs import replay_runs  # its schedulers load where they are needed

        rest = [i for i in range(len(every)) if i not in found]
        for i, replayed in zip(rest, replay_runs([every[i] for i in rest]), strict=True):
            records[i] = _replayed_record(replayed)
    for i in loops:
        records[i]["assumed"] = ("replies fill the cache: replayed",)
    for (i, _), other in zip(drafted, records[len(runs) :], strict=True):
        _widen(records[i], other)
    return records[: len(runs)]


def _as_loop(run: Run) -> Run:
    """A run of users in a closed loop as one that is replayed, for fewer rounds where these are many."""
    users, rounds = max(1, round(run.concurrency)), min(run.rounds, max(FEWEST_ROUNDS, MOST_SENT / run.concurrency))
    most = run.max_sequences or (users if run.unlimited else None)
    return replace(run, arrivals=Arrivals(users=users), max_sequences=most, rounds=rounds)


def _replayed_record(found: Replayed) -> dict[str, Any]:
    if found.factors is None:
        return {"problem": found.problem}
    values = {name: getattr(found, name) for name in PREDICTED}
    record: dict[str, Any] = {"mean_batch": found.batch, "problem": "", "step_error": found.error}
    return record | _with_intervals(values, found.factors)


def _widen(record: dict[str, Any], other: dict[str, Any]) -> None:
    """Let the intervals of ``record`` hold those of ``other``, where both are served."""
    if record["problem"] or other["problem"]:
        return
    for name in PREDICTED:
        for side, end in (("low", min), ("high", max)):
            record[bound(name, side)] = end(record[bound(name, side)], other[bound(name, side)])


def _record(served: ServingMetrics, run: Run) -> dict[str, Any]:
    if served.problem:
        return {"problem": served.problem}
    values = {
        "ttft_s": served.ttft_s,
        "tpot_s": served.tpot_s,
        "output_tokens_per_s": served.output_tokens_per_s * run.replicas,
    }
    pools = run.mode == "disaggregated"
    share, engine = served.ttft_s / served.request_s, load_engine_once(run.served_by)
    new = unserved(engine, *(profile.name for profile in load_profiles(run)))
    factors = served_interval(served.ttft_error, served.tpot_error, share, engine=engine, pools=pools, new=new)
    record: dict[str, Any] = {"mean_batch": served.batch, "problem": ""}
    record |= {"decode_step_s": served.decode_step_s, "step_error": served.tpot_error}
    record |= _with_intervals(values, factors)
    return record | {f"share_{kind}": share for kind, share in served.evidence.items()}


def _with_intervals(values: Mapping[str, Any], factors: Mapping[str, Any]) -> dict[str, Any]:
    """The ``values``, each with the ends of the interval that its factor spans."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        low, high = float(value / factors[name]), float(value * factors[name])
        found |= {name: value, bound(name, "low"): low, bound(name, "high"): high}
    return found


def measured_columns(table: pd.DataFrame, ours: Mapping[Any, str]) -> tuple[pd.DataFrame, list[str]]:
    """Measured columns as numbers, in seconds, under our names; and for each row the cells that are no number."""
    import pandas as pd

    found, unread = {}, [""] * len(table)
    for name, column in ours.items():
        if column in MEASURED:
            values = [_number(cell) for cell in table[name]]
            for i, (value, cell) in enumerate(zip(values, table[name], strict=True)):
                if value is None:
                    unread[i] += f"; {name} {cell!r} {UNREAD}"
            unit = 1e3 if name.strip().lower().endswith("_ms") else 1.0
            found[column] = [math.nan if value is None else value / unit for value in values]
    return pd.DataFrame(found, index=table.index, dtype=float), unread


def _number(cell: Any) -> float | None:
    """NaN where nothing is said, None where what is said is no number more than 0."""
    try:
        number = math.nan if is_empty(cell) else plain_number(cell)
    except ValueError:
        return None
    return None if number <= 0 else number
