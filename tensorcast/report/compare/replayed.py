"""Layouts of a comparison under a trace: a table for the terminal, a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tensorcast.report import units
from tensorcast.report.compare.choices import View
from tensorcast.report.replay.words import why_broken

if TYPE_CHECKING:
    from tensorcast.search.compare import Comparison
    from tensorcast.search.replayed import ReplayedComparison

REPLAYED = "replayed.csv"
"""A row per layout."""

TOLD = 3
"""Layouts of which is told why requests break limits."""


class ReplayedTable(NamedTuple):
    """A line per layout, the best first; why limits are broken, and who could not be replayed."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]


def replayed_table(view: View, replayed: ReplayedComparison) -> ReplayedTable:
    """What the terminal and the page show."""
    requests, fastest = replayed.requests, replayed.fastest
    sent = f"{units.count(len(requests))} requests"
    if not fastest:
        sent += " all at once" if requests.rate == float("inf") else f" at {requests.rate:.3g} per second"
    order = "the largest rate within the limits first" if fastest else "the most within the limits first"
    order += ", per US dollar" if replayed.per == "USD" else ""
    heads = ("layout", "GPUs", "TTFT P99", "TPOT P99", "within", "requests/s", "good per GPU")
    rows, notes = list[tuple[str, ...]](), list[str]()
    for one in replayed.candidates:
        name, said = view.name(one.row), one.numbers
        if one.problem:
            rows.append((name, units.count(one.row["gpus"]), *"-----"))
            notes.append(f"{name} was not replayed: {one.problem}")
            continue
        rows.append((
            name, units.count(one.row["gpus"]), units.seconds(said["ttft_p99_s"]), units.seconds(said["tpot_p99_s"]),
            units.percent(said["within_limits"]), f"{said['requests_per_s']:.3g}",
            f"{said['goodput_requests_per_s_per_gpu']:.3g}",
        ))  # fmt: skip
        if one.outcome is not None and len(rows) <= TOLD:
            notes += [f"{name}: {why}" for why in why_broken(one.outcome)]
    return ReplayedTable(f"Replayed, {sent}: {order}", heads, rows, notes)


def print_replayed(found: Comparison, replayed: ReplayedComparison, console: Console) -> None:
    """A line per layout, the best first."""
    said = replayed_table(View(found), replayed)
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title_justify="left", title_style="bold",
        title=said.title,
    )
    for i, head in enumerate(said.heads):
        table.add_column(head, justify="left" if i == 0 else "right", overflow="fold")
    for row in said.rows:
        table.add_row(*row)
    console.print()
    console.print(table)
    for note in said.notes:
        console.print(Text(f"note: {note}"))
