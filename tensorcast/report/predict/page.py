"""Predicted against measured serving: the summary on a terminal, ``serving.md`` and its figure."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorcast.files import write_atomically
from tensorcast.predict.predict import UNREAD
from tensorcast.predict.score import named
from tensorcast.report.figures import COLOURS, save
from tensorcast.report.predict.causes import Lines, fits, headline, markdown, percent, remaining
from tensorcast.report.units import digits

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

KEPT = "<!-- by hand: what follows is kept when the report is made again -->"
WORDS = {"tpot_s": "time per token", "ttft_s": "time to first token", "output_tokens_per_s": "tokens/s"}
PICKED = {
    "tpot_s": "fewest seconds per token",
    "tpot_s_same_gpus": "the same, of as many GPUs",
    "tokens_per_s_per_gpu": "most tokens/s per GPU",
}
SHOWN = 12
"""Rows of any table that a terminal shows."""

OF_LAYOUT = re.compile(r"^layout \S+: ")
"""How problems begin that name the layout of their row."""


def print_columns(records: list[dict[str, Any]], console: Console) -> None:
    """The columns that a table may have."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for head in ("column", "says", "default", "also called"):
        table.add_column(head, overflow="fold")
    for record in records:
        default = "" if record["default"] is None else str(record["default"])
        table.add_row(record["column"], record["says"], default, ", ".join(record["also"]))
    console.print(table)


def print_summary(table: pd.DataFrame, summary: dict[str, Any], console: Console, rows: bool = True) -> None:
    """What was predicted, first rows if asked for, and the errors where there are measured columns."""
    from rich.table import Table

    console.print(f"{summary['predicted']} of {summary['rows']} rows predicted")
    console.print(f"  models with experts: routing {', '.join(summary['routing'])} (column routing)", style="dim")
    for problem in _problems(summary["problems"]):
        console.print(f"  {problem}", style="yellow", markup=False)
    if unread := int(table["assumed"].astype(str).str.contains(UNREAD, regex=False).sum()):
        console.print(f"  {unread} x a measured cell {UNREAD} (which: column assumed)", style="yellow")
    for note in table.attrs.get("notes", ()):
        console.print(f"  {note}", style="dim", markup=False)
    if rows:
        shown = Table(box=None, pad_edge=False)
        for head in ("model", "device", "engine", "layout", "users", "TTFT ms", "TPOT ms", "tokens/s"):
            shown.add_column(head, justify="left" if head in ("model", "device", "engine", "layout") else "right")
        for row in named(table).head(SHOWN).to_dict("records"):
            values = [row.get(name, "") for name in ("model", "device", "engine", "layout", "concurrency")]
            cells = ["" if value != value else str(value) for value in values]  # not a number: not predicted
            numbers = (1e3 * row["ttft_s"], 1e3 * row["tpot_s"], row["output_tokens_per_s"])
            shown.add_row(*cells, *(digits(number) for number in numbers))
        console.print(shown)
        if len(table) > SHOWN:
            console.print(f"+ {len(table) - SHOWN} more rows: --out FILE writes them all", style="dim")
    for title, names, lines in _tables(summary):
        shown = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for i, name in enumerate(names):
            shown.add_column(name, justify="right" if i else "left")
        for line in lines[:SHOWN]:
            shown.add_row(*line)
        console.print(shown)
        if len(lines) > SHOWN:
            console.print(f"+ {len(lines) - SHOWN} more: --json or --report", style="dim")


def _problems(found: Mapping[str, int]) -> Iterable[str]:
    """The most frequent problems, the same of every layout once, and how many rows have others."""
    kinds = Counter[str]()
    for problem, count in found.items():
        kinds[OF_LAYOUT.sub("", problem)] += count
    shown = kinds.most_common(SHOWN)
    yield from (f"{count} x {problem}" for problem, count in shown)
    if more := kinds.total() - sum(count for _, count in shown):
        yield f"+ {more} rows with {len(kinds) - SHOWN} other problems: column problem"


def _tables(summary: dict[str, Any]) -> Iterable[tuple[str, list[str], Lines]]:
    """Title, head and lines of every table of errors."""
    if not summary["errors"]:
        return
    head = ["median error", "mean", "within 10 %", "within 20 %", "predicted / measured", "in interval", "rows"]
    for title, found in (("Errors on rows left out of all fits", summary["left_out"]), ("Errors", summary["errors"])):
        if any(e["rows"] for e in found.values()):
            yield title, ["", *head], [[WORDS[name], *_cells(e)] for name, e in found.items() if e["rows"]]
    layouts = [
        [
            PICKED[name], percent(c["best"]), percent(c["regret"]), percent(c["regret_where_wrong"]),
            _ratio(c["rank_correlation"]), percent(c["pairs"]), str(c["groups"]),
        ]
        for name, c in summary["layouts"].items()
        if c["groups"]
    ]  # fmt: skip
    if layouts:
        head = ["picked for", "best picked", "regret", "where wrong", "rank correlation", "pairs in order", "groups"]
        yield "Picking a layout, all else equal", head, layouts
    # throughput follows from the two times; it is told where it is all that was measured
    names = [name for name in ("tpot_s", "ttft_s") if name in summary["errors"]] or list(summary["errors"])
    for column, groups in summary["by"].items():
        lines = []
        many = sorted(groups.items(), key=lambda item: -max(item[1][name]["rows"] for name in names))
        for key, found in many:
            cells = [key, *(percent(found[name].get("median")) for name in names)]
            cells += [*(_ratio(found[name].get("ratio")) for name in names)]
            if any(found[name]["rows"] for name in names):
                lines.append([*cells, str(max(found[name]["rows"] for name in names))])
        head = [column, *(f"{WORDS[name]}, {what}" for what in ("median", "ratio") for name in names), "rows"]
        if lines:
            yield f"By {column}", head, lines


def _cells(e: dict[str, Any]) -> list[str]:
    percents = [percent(e[key]) for key in ("median", "mean", "within_10", "within_20")]
    return [*percents, _ratio(e["ratio"]), percent(e.get("inside")), str(e["rows"])]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def write_serving_report(table: pd.DataFrame, summary: dict[str, Any], path: Path) -> None:
    """Markdown at ``path`` with a figure of the same name beside it; a hand-written end (:data:`KEPT`) stays."""
    kept = ""
    if path.is_file():
        _, marker, end = path.read_text(encoding="utf-8").partition(KEPT)
        kept = f"\n{marker}{end}" if marker else ""
    picture = path.with_suffix(".png")
    frame = named(table)
    lines = [
        "# Serving: predicted against measured", "",
        "Made by `tensorcast predict TABLE --report`. Every row is read as a closed loop of a fixed number of users. "
        "Errors are |predicted / measured - 1|. Nothing is adjusted per model; what was fitted to served runs, and to "
        "which, is said under Fitted and left out.", "",
        *headline(summary),
        f"{summary['predicted']} of {summary['rows']} rows predicted"
        + "".join(f"; {count} not: {problem}" for problem, count in summary["problems"].items()) + ".", "",
    ]  # fmt: skip
    if all(summary["errors"].get(name, {}).get("rows") for name in ("tpot_s", "ttft_s")):
        lines += [f"![predicted against measured]({picture.name})", ""]
        _figure(frame, summary, picture)
    for title, head, rows in _tables(summary):
        lines += [f"## {title}", "", *markdown(head, rows), ""]
    lines += fits(frame, WORDS)
    lines += _largest(frame)
    lines += remaining(frame)
    write_atomically(path, ("\n".join(lines).rstrip() + "\n" + kept).encode())


def _largest(frame: pd.DataFrame, most: int = 10) -> list[str]:
    """Where most of the error is: groups of rows by what they add to the sum of log errors of the time per token."""
    if "measured_tpot_s" not in frame:
        return []
    both = frame[(frame["tpot_s"] > 0) & (frame["measured_tpot_s"] > 0)]
    if both.empty:
        return []
    logs = (both["tpot_s"] / both["measured_tpot_s"]).map(math.log)
    keys = [name for name in ("engine", "model", "device", "mode") if name in both]
    groups = logs.groupby([both[name] for name in keys])
    shares = (groups.apply(lambda g: g.abs().sum()) / logs.abs().sum()).sort_values(ascending=False)
    rows = []
    for key, share in shares.head(most).items():
        group = groups.get_group(key)
        cells = percent(share), percent(len(group) / len(logs)), _ratio(math.exp(group.median()))
        rows.append([" ".join(map(str, key)) if isinstance(key, tuple) else str(key), *cells])
    head = ["runs", "of all error", "of all rows", "predicted / measured"]
    text = "Time per token, sum of |log(predicted / measured)|."
    return ["## Where the error is", "", text, "", *markdown(head, rows), ""]


def _figure(frame: pd.DataFrame, summary: dict[str, Any], path: Path) -> None:
    """Predicted against measured, both axes logarithmic: time per token and to the first token, a colour per engine."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, 2), ("tpot_s", "ttft_s"), strict=True):
        both = frame[(frame[name] > 0) & (frame[f"measured_{name}"] > 0)]
        for i, (key, rows) in enumerate(both.groupby([both["engine"], both["mode"]])):
            marker, colour = ("o", "s", "^", "D")[i % 4], COLOURS[i % len(COLOURS)]
            axes.plot(
                1e3 * rows[f"measured_{name}"], 1e3 * rows[name], marker, color=colour, markersize=3.2, alpha=0.55,
                markeredgewidth=0, label=" ".join(map(str, key)),
            )  # fmt: skip
        ends = 1e3 * np.array([both[f"measured_{name}"].min() * 0.8, both[f"measured_{name}"].max() * 1.25])
        axes.plot(ends, ends, color="black", linewidth=1)
        axes.fill_between(ends, ends * 0.8, ends * 1.2, color="black", alpha=0.08, linewidth=0)
        axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        axes.set_xlabel(f"measured {WORDS[name]}, ms")
        axes.set_ylabel(f"predicted {WORDS[name]}, ms")
        e = summary["errors"][name]
        axes.set_title(f"{WORDS[name]}: median error {100 * e['median']:.0f} %", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    share = 100 * summary["errors"]["tpot_s"]["within_20"]
    title = f"{share:.0f} % of {summary['predicted']:,} measured times per token are met within 20 % (grey band)"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9, markerscale=2)
    save(figure, path)
