"""Layouts of a comparison under a trace: a table for the terminal, a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tensorcast.files import write_atomically
from tensorcast.report import units
from tensorcast.report.compare.choices import View

if TYPE_CHECKING:
    from tensorcast.search.compare import Comparison
    from tensorcast.search.replayed import ReplayedComparison

FILE = "replayed.csv"


def print_replayed(found: Comparison, replayed: ReplayedComparison, console: Console, fastest: bool) -> None:
    """A line per layout, the best first. ``fastest``: each had the requests as fast as it takes them."""
    view, requests = View(found), replayed.requests
    sent = f"{units.count(len(requests))} requests"
    if not fastest:
        sent += " all at once" if requests.rate == float("inf") else f" at {requests.rate:.3g} per second"
    order = "the largest rate within the limits first" if fastest else "the most within the limits first"
    order += ", per US dollar" if replayed.per == "USD" else ""
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title_justify="left", title_style="bold",
        title=f"Replayed, {sent}: {order}",
    )
    heads = ("layout", "GPUs", "TTFT P99", "TPOT P99", "within", "requests/s", "good per GPU")
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i == 0 else "right", overflow="fold")
    for one in replayed.candidates:
        name = view.name(one.row)
        if one.problem:
            table.add_row(name, units.count(one.row["gpus"]), "-", "-", "-", "-", "-")
            continue
        said = one.numbers
        table.add_row(
            name, units.count(one.row["gpus"]), units.seconds(said["ttft_p99_s"]), units.seconds(said["tpot_p99_s"]),
            units.percent(said["within_limits"]), f"{said['requests_per_s']:.3g}",
            f"{said['goodput_requests_per_s_per_gpu']:.3g}",
        )
    console.print()
    console.print(table)
    for one in replayed.candidates:
        if one.problem:
            console.print(Text(f"note: {view.name(one.row)} was not replayed: {one.problem}"))


def write_replayed(replayed: ReplayedComparison, directory: Path) -> Path:
    """``replayed.csv`` in ``directory``, a row per layout."""
    target = directory / FILE
    write_atomically(target, replayed.frame().to_csv(index=False))
    return target
