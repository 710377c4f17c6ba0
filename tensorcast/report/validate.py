"""What `tensorcast validate --out DIR` writes: a page in Markdown and HTML, one figure, and the tables as CSV.

The result is taken as plain tables; columns are named with their units.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tensorcast.files import write_atomically
from tensorcast.report import units
from tensorcast.report.figures import COLOURS, save
from tensorcast.report.sections import Head, Section, Table, markdown, page_html

if TYPE_CHECKING:
    import pandas as pd

BAND = 0.2

FAMILIES = ("gemm", "grouped_gemm", "attention_prefill", "attention_decode", "mla_prefill", "mla_decode", "memory")
"""Kernel families in the order of the legend; each keeps its colour."""

WORDS = {"memory": "norms and other small", "gemm": "dense GEMM", "grouped_gemm": "experts"}


class Result(Protocol):
    """What the page is made of: measured beside predicted, one frame per level."""

    @property
    def title(self) -> str: ...
    @property
    def environment(self) -> dict[str, str]: ...
    @property
    def ops(self) -> pd.DataFrame: ...
    @property
    def layers(self) -> pd.DataFrame: ...
    @property
    def collectives(self) -> pd.DataFrame: ...
    @property
    def checks(self) -> pd.DataFrame: ...
    @property
    def fits(self) -> pd.DataFrame: ...
    @property
    def left_out(self) -> pd.DataFrame: ...
    @property
    def notes(self) -> tuple[str, ...]: ...


def signed(share: Any) -> str:
    """``+12.3%``; a dash where there is none."""
    return f"{100 * float(share):+.1f}%" if _known(share) else "-"


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def _size(row: dict[str, Any]) -> str:
    """``decode 8 x 1 + 512``: sequences, new tokens and cached tokens of each."""
    return f"{row['phase']} {row['batch']} x {row['new']} + {row['past']}"


def _known(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _time(value: Any) -> str:
    return units.seconds(float(value)) if _known(value) else "-"


def _spread(row: dict[str, Any]) -> str:
    return units.span(row["low_s"], row["high_s"]) if _known(row.get("low_s")) else "-"


def _word(family: str) -> str:
    head, _, kernel = family.partition("/")
    return kernel if kernel else WORDS.get(head, head.replace("_", " "))


def _measured(ops: pd.DataFrame) -> pd.DataFrame:
    """What ran, every kernel and shape once: several workloads share some."""
    return ops[ops.seconds > 0].drop_duplicates("key") if len(ops) else ops


def finding(result: Result) -> str:
    """One sentence: the median error of the ops, and what calibration makes of it on shapes left out."""
    ops = _measured(result.ops)
    if not len(ops):
        return "No op was measured"
    text = f"Half of {len(ops)} ops are predicted within {units.percent(float(ops.error.abs().median()))}"
    if len(result.left_out):
        before, after = (float(result.left_out[c].abs().median()) for c in ("error_before", "error"))
        text += (
            f"; on {len(result.left_out)} shapes left out of the fit, calibration takes the median error from "
            f"{units.percent(before)} to {units.percent(after)}"
        )
    return text


def headline(result: Result) -> tuple[str, ...]:
    """The finding; beside it the error by time and by family, which many small ops cannot flatter; and whether the
    device profile itself was measured on a busy machine."""
    found = [finding(result) + "."]
    ops = result.ops[result.ops.seconds > 0] if len(result.ops) else result.ops
    if len(ops):
        taken = ops.seconds * ops["count"]
        by_time = float((ops.error.abs() * taken).sum() / taken.sum())
        parts = []
        for family, part in _measured(ops).groupby("family"):
            share = float(taken[ops.family == family].sum() / taken.sum())
            parts.append((share, f"{_word(str(family))} {units.percent(float(part.error.abs().median()))} "
                                 f"({len(part)} ops, {units.percent(share)} of the time)"))
        found.append(f"Weighted by the time that ops take in these steps, the error is {units.percent(by_time)}.")
        found.append(f"Median per family, by its time: {'; '.join(text for _, text in sorted(parts, reverse=True))}.")
    _, busy, crowd = result.environment.get("device profile", "").partition(", while ")
    if busy:
        found.append(f"The device profile compared with was itself measured while {crowd}.")
    return tuple(found)


def sections(result: Result, figure: str = "") -> list[Section]:
    """The page, top to bottom."""
    found = [Section(f"Validation: {result.title}", headline(result), figure=figure)]
    if result.notes:
        found.append(Section("Notes", tuple(result.notes)))
    found.append(Section("Environment", table=Table(
        ("what", "as found"), [[name, value] for name, value in result.environment.items()], "ll"
    )))
    found += [*_op_sections(result), *_calibration(result), *_layers(result), *_checks(result), *_collectives(result)]
    return found


def _op_sections(result: Result) -> list[Section]:
    ops = result.ops
    if not len(ops):
        return []
    measured = _measured(ops)
    text = (
        "Every distinct op and local shape, run alone on random operands that rotate through memory. Error is "
        "predicted / measured - 1, with the device profile as it stands.",
        "Compared is the first decile of repeated calls where a clock was used (other processes only ever add), the "
        "median where device events were; the spread is the first to the ninth decile.",
    )
    by_family = [
        [_word(str(family)), str(len(part)), units.percent(float(part.error.abs().median())),
         units.percent(float(part.error.abs().quantile(0.9))),
         units.percent(float((part.error.abs() <= BAND).mean())), ", ".join(sorted(set(part.evidence)))]
        for family, part in measured.groupby("family")
    ]
    head: Head = ("family", "ops", "median error", "90th percentile", "within 20 %", "evidence")
    found = [Section("Ops by family", text, Table(head, by_family, "lrrrrl"))]
    worst = measured.assign(off=measured.error.map(lambda e: abs(math.log1p(e)))).nlargest(10, "off")
    rows = [
        [str(r["op"]), str(r["shape"]), _time(r["seconds"]), _spread(r), _time(r["predicted_s"]),
         units.span(r["predicted_low_s"], r["predicted_high_s"]), signed(r["error"]), str(r["evidence"]),
         str(r["cause"])]
        for r in _records(worst)
    ]
    head = ("op", "shape", "measured", "spread", "predicted", "interval", "error", "evidence", "likely cause")
    found.append(Section("The ten worst", (), Table(head, rows, "llrrrrrll")))
    slow = measured.assign(total=measured.seconds * measured["count"]).nlargest(15, "total")
    rows = [
        [str(r["op"]), str(r["module"]), _size(r), str(r["shape"]),
         str(r["count"]), _time(r["seconds"]), _spread(r), _time(r["predicted_s"]), signed(r["error"])]
        for r in _records(slow)
    ]
    head = (
        "op", "module", "batch x new + cached", "shape", "calls per step", "measured", "spread", "predicted", "error",
    )
    found.append(Section("The ops that cost most", (), Table(head, rows, "llllrrrrr")))
    failed = ops[ops.problem.astype(str) != ""]
    if len(failed):
        groups = failed.groupby(["op", "problem"]).size().reset_index(name="shapes")
        rows = [[str(r["op"]), str(r["shapes"]), str(r["problem"])] for r in _records(groups)]
        found.append(Section("Not run", (), Table(("op", "shapes", "reason"), rows, "lrl")))
    if "shrunk" in ops and ops.shrunk.any():
        found[0] = Section(found[0].title, (*text, f"{int(ops.shrunk.sum())} ops ran shrunk to fit into memory; they "
                                                   "are compared at the sizes they ran at."), found[0].table)
    return found


def _calibration(result: Result) -> list[Section]:
    if not len(result.fits):
        return []
    rows = [
        [_word(str(r["family"])), str(r["dtype"]), str(r["points"]), str(r["held_out"]), units.percent(r["before"]),
         units.percent(r["after"]), str(r["verdict"]) or "taken"]
        for r in _records(result.fits)
    ]
    text = ["Constants fitted by robust regression to two shapes in three; the errors are medians on the third that no "
            "fit saw. A fit that is worse there than what stands is refused."]
    if len(result.left_out):
        parts = [
            f"{_word(str(family))} {units.percent(float(part.error_before.abs().median()))} to "
            f"{units.percent(float(part.error.abs().median()))} ({len(part)})"
            for family, part in result.left_out.groupby("family")
        ]
        text.append("All shapes left out, before and after (how many): " + "; ".join(parts) + ".")
    head: Head = ("family or op", "dtype", "fitted to", "left out", "error before", "error after", "verdict")
    return [Section("Calibration", tuple(text), Table(head, rows, "llrrrrl"))]


def _layers(result: Result) -> list[Section]:
    if not len(result.layers):
        return []
    rows = [
        [str(r["what"]), _size(r), _time(r["seconds"]), _spread(r), _time(r["ops_s"]),
         signed(r["gap_s"] / r["seconds"]) if _known(r["gap_s"]) else "-", _time(r["predicted_s"]), signed(r["error"]),
         _layer_note(r)]
        for r in _records(result.layers)
    ]
    text = (
        "The rewritten layers on random weights, end to end, beside the sum of their ops measured alone. A positive "
        "gap, of the measured time, is what running them one after another adds: Python and launches. A negative one "
        "is saved by operands that are still in a cache, or by overlap.",
    )
    head = ("what", "batch x new + cached", "measured", "spread", "sum of ops", "gap", "predicted", "error", "note")
    return [Section("Layers and step, end to end", text, Table(head, rows, "llrrrrrrl"))]


def _layer_note(row: dict[str, Any]) -> str:
    if row["problem"]:
        return str(row["problem"])
    if row["ops_missing"]:
        return f"{row['ops_missing']} ops could not be run alone"
    if _known(row["gap_s"]) and row["gap_s"] > 0.75 * row["seconds"]:
        return "an op in it takes a slower path than alone (strides, a fallback kernel)"
    return ""


def _checks(result: Result) -> list[Section]:
    if not len(result.checks):
        return []
    rows = [
        [f"{r['layers']} (layer {r['layer']})", str(r["dtype"]), f"{r['relative_error']:.1e}"]
        for r in _records(result.checks)
    ]
    text = ("The rewritten layer against transformers' eager one on the same device, weights and input: largest "
            "difference relative to the largest value that the layer adds to its input.",)
    return [Section("Correctness", text, Table(("layers of this kind", "dtype", "relative error"), rows, "llr"))]


def _collectives(result: Result) -> list[Section]:
    if not len(result.collectives):
        return []
    found = []
    frame = result.collectives
    moved = frame[frame.level == "collective"]
    rows = [
        [str(r["op"]), str(int(r["ranks"])), units.nbytes(r["payload_bytes"]), _time(r["seconds"]), _spread(r),
         _time(r.get("predicted_s")), signed(r.get("error")), str(r.get("evidence") or ""), str(r["problem"])]
        for r in _records(moved)
    ]
    head: Head = ("collective", "ranks", "payload", "measured", "spread", "predicted", "error", "evidence", "problem")
    text = ("The slowest rank's time, all starting together.",)
    found.append(Section("Collectives", text, Table(head, rows, "lrrrrrrll")))
    layers = frame[frame.level == "expert_parallel"]
    if len(layers):
        rows = [
            [str(r["shape"]), str(r["dtype"]), _time(r["seconds"]), _spread(r), f"{r['relative_error']:.1e}"]
            for r in _records(layers)
        ]
        head = ("layout", "dtype", "measured", "spread", "relative error")
        said = ("The MoE layer with its experts on all ranks, for real, against the whole block on one.",)
        found.append(Section("Expert parallelism", said, Table(head, rows, "llrrr")))
    return found


def scatter(result: Result, path: Path) -> Path:
    """Predicted against measured, log-log, with the +-20 % band: as the profile stands, and calibrated on shapes left
    out where there are any."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ops = _measured(result.ops)
    panels: list[tuple[str, pd.DataFrame]] = [("as the device profile stands", ops.assign(shown=ops.predicted_s))]
    if len(result.left_out):
        out = result.left_out
        panels.append(("calibrated, shapes left out of the fit", out.assign(shown=out.seconds * (1.0 + out.error))))
    figure = Figure(figsize=(5.4 * len(panels) + 0.4, 5.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    every = [v for _, frame in panels for c in ("seconds", "shown") for v in frame[c] if v > 0]
    low, high = 10 ** math.floor(math.log10(min(every))), 10 ** math.ceil(math.log10(max(every)))
    handles: dict[str, Any] = {}
    for i, (name, frame) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        line = [low, high]
        axes.fill_between(line, [v * (1 - BAND) for v in line], [v * (1 + BAND) for v in line], color="#dddddd", lw=0)
        axes.plot(line, line, color="black", linewidth=0.8)
        for family, part in frame.groupby("family"):
            at = FAMILIES.index(str(family)) if family in FAMILIES else len(FAMILIES) - 1
            handles[_word(str(family))] = axes.scatter(
                part.seconds, part.shown, s=14, alpha=0.75, color=COLOURS[at % len(COLOURS)], linewidths=0
            )
        inside = float((frame.error.abs() <= BAND).mean())
        axes.set_title(f"{name}: {units.percent(inside)} of {len(frame)} within 20 %", fontsize=10)
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        axes.set_xlabel("measured, seconds")
        axes.set_ylabel("predicted, seconds")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_wrapped(finding(result), 62 * len(panels)), x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return save(figure, path)


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


def write_validation(result: Result, directory: Path) -> list[Path]:
    """report.md, report.html, accuracy.png and a CSV per level into ``directory``; what is there is replaced."""
    directory.mkdir(parents=True, exist_ok=True)
    figure = "accuracy.png" if len(_measured(result.ops)) else ""
    image = None
    if figure:
        image = scatter(result, directory / figure).read_bytes()
    page = sections(result, figure)
    texts = {"report.md": markdown(page), "report.html": page_html(page, image)}
    tables = {"layers.csv": result.layers, "collectives.csv": result.collectives, "fits.csv": result.fits}
    for name, frame in tables.items():
        if len(frame):
            texts[name] = frame.to_csv(index=False, lineterminator="\n")
    for name, text in texts.items():
        write_atomically(directory / name, text)
    return [*(directory / name for name in texts), *([directory / figure] if figure else [])]
