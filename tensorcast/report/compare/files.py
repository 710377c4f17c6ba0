"""What a comparison's ``--out DIR`` writes: the page, all candidates, the answer as JSON, and the figures."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tensorcast.errors import InputError
from tensorcast.files import check_directory
from tensorcast.launch.launch import WRITERS
from tensorcast.report.compare import fronts, steps, words
from tensorcast.report.compare.best_of import best_of_each
from tensorcast.report.compare.choices import View
from tensorcast.report.compare.figures import Chart, style
from tensorcast.report.compare.page import html, today
from tensorcast.report.compare.replayed import REPLAYED, replayed_table
from tensorcast.report.compare.roofline import roofline
from tensorcast.report.compare.sentences import sentences
from tensorcast.report.compare.takeaway import takeaways
from tensorcast.report.plain import to_json
from tensorcast.report.question import command, config, flags

if TYPE_CHECKING:
    import pyarrow as pa

    from tensorcast.search.candidate_table import Candidates
    from tensorcast.search.compare import Comparison
    from tensorcast.search.replayed import ReplayedComparison

FIGURES: tuple[Callable[[View], Chart | None], ...] = (
    fronts.pareto, steps.step_bars, fronts.throughput, fronts.heatmap, steps.memory, roofline, steps.sensitivity,
)
"""In the order of the page. A figure that would say nothing is None."""

QUESTION = "question.yaml"
FIGURE_NAMES = ("pareto", "step", "throughput", "heatmap", "memory", "roofline", "expert_load")
"""Files that an earlier report may have left: those that this one does not draw are removed."""


def charts(view: View) -> list[Chart]:
    """All figures of a comparison that has candidates."""
    if not len(view.kept):
        return []
    with style():
        drawn = [figure(view) for figure in FIGURES]
    return [chart for chart in drawn if chart is not None]


def write_comparison(
    comparison: Comparison, directory: Path, price: float | None = None, replayed: ReplayedComparison | None = None
) -> list[Path]:
    """Write ``report.html``, ``candidates.parquet`` and ``.csv``, ``summary.json``, figures and launch commands.

    ``price``: USD per GPU hour, where the device profiles' own is not wanted. ``replayed``: its best layouts under a
    trace, for the page and ``replayed.csv``. Every file is complete in a hidden folder
    beside before the first one is moved to its name. Raises :class:`InputError` where ``directory`` cannot be written.
    """
    check_directory(directory)
    view = View(comparison, price)
    figures = charts(view)
    page = html(view, figures, None if replayed is None else replayed_table(view, replayed))
    summary = to_json(summary_of(view, figures), indent=2) + "\n"
    starts = [one for one in takeaways(view) if not one.problem]
    written = ["report.html", "candidates.parquet", "candidates.csv", "summary.json"]
    asked = flags(comparison)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".tensorcast-") as name:
            hidden = Path(name)
            (hidden / "report.html").write_text(page, encoding="utf-8")
            write_candidates(view.kept, hidden)
            (hidden / "summary.json").write_text(summary, encoding="utf-8")
            for chart in figures:
                (hidden / f"{chart.name}.svg").write_text(chart.svg, encoding="utf-8")
                written.append(f"{chart.name}.svg")
            if asked:
                (hidden / QUESTION).write_text(config(asked), encoding="utf-8")
                written.append(QUESTION)
            if replayed is not None:
                replayed.frame().to_csv(hidden / REPLAYED, index=False)
                written.append(REPLAYED)
            for one in starts:
                (hidden / one.file).write_text(one.script, encoding="utf-8")
            written += [one.file for one in starts]
            for file in written:
                os.replace(hidden / file, directory / file)
        ours = {f"{name}.{kind}" for name in FIGURE_NAMES for kind in ("png", "svg")}
        for stale in (ours | {QUESTION, REPLAYED} | {f"launch-{engine}.sh" for engine in WRITERS}) - set(written):
            (directory / stale).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"--out {directory}: cannot be written: {error.strerror or error}") from None
    return [directory / file for file in written]


def write_candidates(kept: Candidates, directory: Path) -> None:
    """``candidates.parquet`` as they are, ``candidates.csv`` with six significant digits."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    exact = {name: arrow(values) for name, values in kept.every.items()}
    parquet.write_table(pa.Table.from_arrays([*exact.values()], [*exact]), directory / "candidates.parquet")
    rounded = exact | {
        name: arrow(six_digits(values)) for name, values in kept.every.items() if values.dtype.kind == "f"
    }
    options = csv.WriteOptions(quoting_style="needed")
    csv.write_csv(pa.Table.from_arrays([*rounded.values()], [*rounded]), directory / "candidates.csv", options)


def arrow(values: NDArray[Any]) -> pa.Array:
    """``values``, texts if they are objects; None and what is no number are null.

    Handed over as buffers (https://arrow.apache.org/docs/format/Columnar.html): ``pyarrow.array`` loads pandas, which
    takes longer than both files.
    """
    import pyarrow as pa

    if values.dtype == object:
        missing = np.array([value is None for value in values], dtype=bool)
        texts = [b"" if value is None else str(value).encode() for value in values]
        kind, held = pa.string(), [np.cumsum([0, *map(len, texts)], dtype=np.int32), b"".join(texts)]
    else:
        missing = np.isnan(values) if values.dtype.kind == "f" else np.zeros(len(values), dtype=bool)
        kind = pa.from_numpy_dtype(values.dtype)
        held = [np.packbits(values, bitorder="little") if values.dtype == bool else np.ascontiguousarray(values)]
    known = np.packbits(~missing, bitorder="little") if missing.any() else None
    return pa.Array.from_buffers(
        kind, len(values), [None if one is None else pa.py_buffer(one) for one in (known, *held)]
    )


def six_digits(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """``values`` rounded to six significant digits, as the doubles nearest to those decimals."""
    with np.errstate(divide="ignore", invalid="ignore"):
        places = np.where(values == 0, 0.0, 5 - np.floor(np.log10(np.abs(values))))
        up, down = 10.0 ** np.maximum(places, 0), 10.0 ** np.maximum(-places, 0)
        rounded = np.rint(values * up / down) / up * down
    return np.where(np.isfinite(rounded), rounded, values)


def summary_of(view: View, figures: list[Chart]) -> dict[str, Any]:
    """The answer for scripts: what was asked, the best and its runner-up with all their columns, counts, findings."""
    from tensorcast.version import __version__

    c, answer = view.comparison, words.conclusion(view)
    return {
        "model": c.model.name, "devices": [device.name for device in c.devices], "engine": c.engine.name,
        "objective": c.objective,
        "targets": view.limits, "input_len": c.input_len,
        "output_len": c.output_len,
        "price_per_gpu_hour_usd": view.price or {
            one.device.name: one.price for t in c.tasks for one in t.pools or (t,) if one.price is not None
        },
        "command": command(flags(c)), "question": flags(c), "decides": [] if view.best is None else sentences(view),
        "best_of_each": [one.record(view) for one in best_of_each(view)], "answer": answer.headline,
        "warning": answer.warning, "explanation": list(answer.paragraphs), "best": view.best,
        "runner_up": view.runner_up, "ties": list(c.ties), "candidates": len(view.kept), "examined": c.examined,
        "pruned": dict(c.pruned),
        "evidence": dict(words.evidence(view)),
        "findings": {figure.name: figure.title for figure in figures}, "notes": list(c.notes),
        "version": __version__, "date": today(),
    }
