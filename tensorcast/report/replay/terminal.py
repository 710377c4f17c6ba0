"""A replay on a terminal, from 80 columns up."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tensorcast.report.replay import words
from tensorcast.report.units import plural
from tensorcast.scheduling.outcome import Outcome


def print_replay(found: Outcome, console: Console, skipped: int = 0) -> None:
    """Times and their percentiles, rates, and what requests waited for."""
    numbers = found.summary()
    console.print(Text(words.headline(found, numbers), style="bold"))
    if found.served:
        console.print(plain_table(*words.times_table(found, numbers)))
        lines = Table.grid(padding=(0, 2, 0, 0))
        lines.add_column(style="dim", no_wrap=True)
        lines.add_column()
        for name, said in words.rates(found, numbers):
            lines.add_row(name, said)
        console.print(lines)
        console.print(plain_table(*words.causes_table(found)))
        if len(found.broken()):
            console.print(plain_table(*words.broken_table(found)))
            for line in words.worst(found):
                console.print(Text(line, style="dim"))
    if skipped:
        console.print(Text(f"{plural(skipped, 'row')} of the trace could not be read and are left out", style="yellow"))
    for note in found.notes:
        console.print(Text(f"note: {note}", style="dim"))


def plain_table(head: list[str], rows: list[list[str]]) -> Table:
    """A table whose first column is of words."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(cell.replace(" ", "\u00a0") for cell in row))  # of what is wide, heads break, cells do not
    return table
