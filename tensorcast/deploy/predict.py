"""Predicting a table of deployments: rows in, the same rows with predictions, intervals and problems out.

Rows that differ in load alone are priced together. A row that cannot be read, laid out or served keeps its place and
says why in ``problem``; nothing is dropped.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorcast.deploy.curves import EVIDENCE
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.price import WITHIN_80
from tensorcast.deploy.runs import MEASURED, Run, canonical_columns, read_run
from tensorcast.deploy.serving import Load, Served, aggregated, disaggregated
from tensorcast.deploy.simulate import Deployment, deploy
from tensorcast.errors import InputError
from tensorcast.profiles.engine import EngineProfile

if TYPE_CHECKING:
    import pandas as pd

PREDICTED = ("ttft_s", "tpot_s", "output_tokens_per_s")
"""Predicted columns; each has the ends of its interval beside it (``ttft_low_s``, as units end a name)."""

SERVING_ERROR = {"ttft_s": 0.38, "tpot_s": 0.13}
"""Relative median error that the serving model adds to the steps' (scheduling, launch options that nobody recorded).
Set so that about four in five of the runs behind ``reports/serving.md`` lie in their intervals, on all of them, none
left out: the report says how many do."""


def predict_file(path: Path, jobs: int = 1) -> pd.DataFrame:
    """:func:`predict` of a CSV file; ``#`` begins a comment. Raises :class:`InputError` on bad files."""
    return predict(read_file(path), jobs)


def read_file(path: Path) -> pd.DataFrame:
    """A CSV file as the table that :func:`predict` takes, every cell as it is written."""
    import pandas as pd

    if not path.is_file():
        raise InputError(f"{path}: {'is a directory' if path.is_dir() else 'no such file'}")
    try:
        return pd.read_csv(path, comment="#", dtype=str, keep_default_na=False, skipinitialspace=True)
    except (ValueError, UnicodeDecodeError) as error:  # pandas' parser errors are ValueErrors
        raise InputError(f"{path}: not a CSV table: {' '.join(str(error).split())}") from None


def predict(table: pd.DataFrame, jobs: int = 1) -> pd.DataFrame:
    """``table`` with predictions. ``jobs``: processes. Raises :class:`InputError` if no row could be read at all.

    Columns added: ``layout, gpus, ttft_s, tpot_s, output_tokens_per_s`` with 80 % intervals, ``mean_batch`` (decoding
    sequences per dp rank), ``decode_step_s`` (of the time per token, a step without prompts), ``step_error`` (relative
    median error of steps by their kernels and the engine's overhead), ``share_measured, share_calibrated,
    share_datasheet`` (of kernel time), ``assumed``, ``problem``, and measured columns in seconds under our names.
    Columns of that name in the table are replaced.
    """
    import pandas as pd

    ours = canonical_columns([str(name) for name in table.columns])
    runs, problems = read_table(table)
    groups = group_runs(runs)
    if jobs > 1 and len(groups) > 1:
        from concurrent.futures import ProcessPoolExecutor

        # neighbours share a deployment: whole stretches keep it in one process
        with ProcessPoolExecutor(jobs) as pool:
            results = list(pool.map(_serve, groups, chunksize=max(1, -(-len(groups) // (jobs * 8)))))
    else:
        results = [_serve(group) for group in groups]
    records: list[dict[str, Any]] = [{"problem": problem} for problem in problems]
    for group, served in zip(groups, results, strict=True):
        for (index, run), record in zip(group, served, strict=True):
            records[index] = {"layout": run.layout, "gpus": run.gpus, **record, "assumed": "; ".join(run.assumed)}
    out = pd.DataFrame(records, columns=_columns(), index=table.index)
    measured = measured_columns(table)
    kept = table.drop(columns=[c for c in table.columns if c in out.columns or ours.get(str(c)) in measured.columns])
    return pd.concat([kept, measured, out], axis=1)


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


def read_table(table: pd.DataFrame) -> tuple[list[Run | None], list[str]]:
    """The run of every row and what keeps it from being read: either is there. Raises where no row can be read."""
    ours = canonical_columns([str(name) for name in table.columns])
    if "model" not in ours.values() or "device" not in ours.values():
        raise InputError(f"the table needs columns model and device, has {', '.join(map(str, table.columns))}")
    stated = frozenset(name.strip().lower() for name in ours)
    rows = [{ours[name]: value for name, value in row.items() if name in ours} for row in table.to_dict("records")]
    runs: list[Run | None] = []
    problems = []
    for row in rows:
        try:
            runs.append(read_run(row, stated))
            problems.append("")
        except InputError as error:
            runs.append(None)
            problems.append(str(error))
    return runs, problems


Group = list[tuple[int, Run]]


def group_runs(runs: list[Run | None]) -> list[Group]:
    """Rows that differ in concurrency alone, in the order of deployments."""
    groups: dict[Run, Group] = defaultdict(list)
    for index, run in enumerate(runs):
        if run is not None:
            groups[replace(run, concurrency=0.0)].append((index, run))

    def deployment(run: Run) -> tuple[str, ...]:
        return run.model, run.device, run.engine, str(run.options), run.layout

    return [groups[key] for key in sorted(groups, key=deployment)]


def _serve(group: Group) -> list[dict[str, Any]]:
    """Predictions of rows that differ in concurrency alone."""
    run = group[0][1]
    concurrency = np.array([run.concurrency for _, run in group])
    try:
        served = serve(run, concurrency / run.replicas)
    except InputError as error:
        return [{"problem": str(error)} for _ in group]
    return [_record(served, run, i) for i in range(len(group))]


def serve(run: Run, concurrency: Any, engine: EngineProfile | None = None) -> Served:
    """What ``run`` serves at the given requests in flight per replica.

    ``engine``: in place of the run's own; it must not differ from that in more than overheads.
    """
    mean = (1 + run.length_ratio) / 2
    load = Load(
        max(1, round(run.isl * mean)), max(1, round(run.osl * mean)), concurrency, run.prefix_cached,
        run.mtp_acceptance, (1 - run.length_ratio) / (1 + run.length_ratio), run.rounds, run.wait_steps,
    )  # fmt: skip
    prefill, decode = deployments(run)
    if engine is not None:
        prefill, decode = _under(prefill, engine), _under(decode, engine)
    if run.mode == "agg":
        return aggregated(prefill, decode, load, run.chunk_tokens)
    return disaggregated(prefill, decode, *run.workers, load, run.chunk_tokens)


def deployments(run: Run) -> tuple[Deployment, Deployment]:
    """Prefill and decode side of a run."""
    drafted = replace(run.options, mtp_depth=0)  # drafting is the decode step's
    return (
        _deployed(run.model, run.device, run.engine, run.prefill, "prefill", drafted),
        _deployed(run.model, run.device, run.engine, run.decode, "decode", run.options),
    )


def _under(deployment: Deployment, engine: EngineProfile) -> Deployment:
    step = copy.copy(deployment.step)
    step.engine = engine
    return replace(deployment, engine=engine, step=step)


@functools.lru_cache(maxsize=64)
def _deployed(model: str, device: str, engine: str, layout: Layout, phase: str, options: Options) -> Deployment:
    return deploy(_model(model), _device(device), _engine(engine), layout, phase, options)


def _profile(kind: str) -> Callable[[str], Any]:
    @functools.lru_cache(maxsize=64)
    def load(name: str) -> Any:
        from tensorcast import profiles

        return getattr(profiles, f"load_{kind}")(name.replace("_", "-") if kind == "device" else name)

    return load


_model, _device, _engine = _profile("model"), _profile("device"), _profile("engine")


def _record(served: Served, run: Run, i: int) -> dict[str, Any]:
    if problem := served.problem[i]:
        return {"problem": problem}
    values = {
        "ttft_s": served.ttft_s[i],
        "tpot_s": served.tpot_s[i],
        "output_tokens_per_s": served.output_tokens_per_s[i] * run.replicas,
    }
    kernels = {"ttft_s": served.ttft_error[i], "tpot_s": served.tpot_error[i]}
    errors = {name: math.hypot(error, SERVING_ERROR[name]) for name, error in kernels.items()}
    # a request's time is its first token's and the others'
    share = values["ttft_s"] / served.request_s[i]
    errors["output_tokens_per_s"] = math.hypot(share * errors["ttft_s"], (1 - share) * errors["tpot_s"])
    record: dict[str, Any] = {"mean_batch": served.batch[i], "problem": ""}
    record |= {"decode_step_s": served.decode_step_s[i], "step_error": served.tpot_error[i]}
    for name, value in values.items():
        factor = 1 + WITHIN_80 * errors[name]
        record |= {name: value, bound(name, "low"): value / factor, bound(name, "high"): value * factor}
    return record | {f"share_{kind}": share[i] for kind, share in served.evidence.items()}


def measured_columns(table: pd.DataFrame) -> pd.DataFrame:
    """The measured columns of a table under our names, in seconds; cells that are no numbers become NaN."""
    import pandas as pd

    found = {}
    for name, column in canonical_columns([str(name) for name in table.columns]).items():
        if column in MEASURED:
            values = pd.to_numeric(table[name], errors="coerce")
            found[column] = values / 1e3 if name.strip().lower().endswith("_ms") else values
    return pd.DataFrame(found, index=table.index)
