"""A study of expert placements on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorcast.report.experts import words

if TYPE_CHECKING:
    from rich.console import Console

    from tensorcast.deploy.expert_study import ExpertStudy


def print_experts(study: ExpertStudy, console: Console) -> None:
    """The finding, its conditions, a table of placements, and what is beyond them."""
    from rich.table import Table

    console.print(words.headline(study), style="bold")
    for line in words.conditions(study):
        console.print(line, style="dim")
    made = words.choices(study)
    table = Table(box=None, pad_edge=False)
    for name, side in zip(made.head, made.align, strict=True):
        table.add_column(name, justify="right" if side == "r" else "left", no_wrap=True)
    for row in made.rows:
        table.add_row(*row)
    console.print()
    console.print(table)
    console.print(words.LEGEND, style="dim")
    console.print()
    for line in words.beyond(study):
        console.print(line)
