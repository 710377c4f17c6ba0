"""A comparison on a terminal of 80 columns or more: the answer in words, the best of each layout, what fell away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tensorcast.report import units
from tensorcast.report.compare.best_of import best_of_each
from tensorcast.report.compare.choices import View, cost_apart
from tensorcast.report.compare.sentences import sentences
from tensorcast.report.compare.words import asked_for, conclusion, limit_name, options
from tensorcast.report.question import command, flags
from tensorcast.report.units import plural
from tensorcast.search.notes import COUNTED

if TYPE_CHECKING:
    from tensorcast.search.compare import Comparison
    from tensorcast.search.replayed import ReplayedComparison

WIDEST = 100
"""Columns that the text uses at most; a table wider than a page is not read."""

LEAST_NAME = 18
"""Columns that a layout's name has at least; numbers give way to it."""


def print_comparison(found: Comparison, console: Console, top: int = 12) -> None:
    """Print the answer, the ``top`` layouts, what was pruned, and the notes."""
    view = View(found)
    said = conclusion(view)
    width = min(console.width, WIDEST)
    console.print(Text(asked_for(view), style="dim"), width=width)
    console.print(Text(said.headline, style="bold green"), width=width)
    for text in (*said.paragraphs, *(sentences(view) if found.best else ())):
        console.print(Text(text, style="yellow" if text == said.warning else ""), width=width)
    console.print()
    widest = max((len(number.name) for number in said.numbers), default=0)
    for number in said.numbers:
        console.print(Text(f"  {number.name:<{max(22, widest)}}  {number.value:>10}   {number.note}"), width=width)
    console.print()
    console.print(_table(view, top, width), width=width)
    fell = "; ".join(
        f"{COUNTED[what]}: " + ", ".join(f"{rule} {units.count(number)}" for rule, number in by_rule.items())
        for what, by_rule in found.pruned.items()
        if by_rule
    )
    counted = (
        f"{plural(found.examined, 'candidate')} (a layout with its options at a batch) examined, "
        f"{units.count(len(found.kept))} kept: the best options of each layout and batch, and all of the Pareto "
        "front. "
        f"batch: sequences per data-parallel rank; tok/s: per user; a > b: prefill > decode workers"
        + (f"\npruned by rule: {fell}" if fell else "")
    )
    console.print(Text(counted, style="dim"), width=width)
    for note in found.notes:
        console.print(Text(f"note: {note}"), width=width)


def _table(view: View, top: int, width: int) -> Table:
    """The best candidate of each layout."""
    every = view.per_layout
    rows = every.where(slice(top)).records()
    title = f"Best of each layout, {units.count(len(rows))} of {units.count(len(every))}"
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0, header_style="bold",
        title=Text(title, style="bold"), title_justify="left", title_style="",
    )
    asked = view.comparison.objective == "cost" or any(task.price_per_hour for task in view.comparison.tasks)
    cost = asked and not np.isnan(view.kept["cost_per_million_tokens"]).all()
    heads = ["GPUs", "batch", "TTFT", "TPOT", "tok/s", "per GPU", *(["USD/Mtok"] if cost else []), ""]
    tied = set(view.comparison.ties)
    best = view.best["candidate"] if view.best is not None else None
    cells = []
    for row in rows:
        verdict = "best" if row["candidate"] == best else "tie" if row["candidate"] in tied else ""
        cells.append([
            units.count(row["gpus"]), units.count(row["batch"]), units.seconds(row["ttft_s"]),
            units.seconds(row["tpot_s"]), units.rate(row["tokens_per_s_per_user"]),
            units.rate(row["tokens_per_s_per_gpu"]), *([units.digits(row["cost_per_million_tokens"])] if cost else []),
            verdict if row["meets"] else f"over {limit_name(row['limit'])}",
        ])
    sizes = [max([len(head), *(len(c[i]) for c in cells)]) + 1 for i, head in enumerate(heads)]
    for head in ("tok/s", "batch", "GPUs"):  # on less than 80 columns: whole numbers rather than all of them
        if sum(sizes) + LEAST_NAME > width:
            i = heads.index(head)
            heads, sizes = heads[:i] + heads[i + 1 :], sizes[:i] + sizes[i + 1 :]
            cells = [line[:i] + line[i + 1 :] for line in cells]
    taken = sum(sizes)
    names = [view.name(row) for row in rows]
    left = max(LEAST_NAME, min(width - taken - 1, max(map(len, names), default=LEAST_NAME)))
    table.add_column("layout", width=left)  # a name too long for it wraps: cut, it would no longer tell layouts apart
    for head in heads:
        table.add_column(head, justify="left" if not head else "right", no_wrap=True)
    for row, name, values in zip(rows, names, cells, strict=True):
        style = "" if row["meets"] else "dim"
        table.add_row(*(Text(text, style=style) for text in (name, *values)))
    return table


BILL = ("prompts_share", "usd_per_million_input_tokens", "usd_per_million_output_tokens")
"""Parts of the best layout's bill, as :func:`tensorcast.report.compare.choices.cost_apart` has them."""


def comparison_record(found: Comparison, replayed: ReplayedComparison | None = None) -> dict[str, Any]:
    """The comparison for ``--json``: answer, best of each layout, pruned counts, notes; replays, if there are some."""
    view = View(found)
    said = conclusion(view)
    record = {
        "model": found.model.name,
        "devices": [device.name for device in found.devices],
        "engine": found.engine.name,
        "objective": found.objective,
        "input_len": found.input_len,
        "output_len": found.output_len,
        "ttft_limit_s": found.targets[0],
        "tpot_limit_s": found.targets[1],
        "warning": said.warning,
        "answer": [said.headline, *said.paragraphs],
        "best": found.best,
        "best_options": options(found.best) if found.best else "",
        "best_bill": dict(zip(BILL, cost_apart(view, found.best), strict=True)) if found.best else None,
        "decides": sentences(view) if found.best else [],
        "best_of_each": [one.record(view) for one in best_of_each(view)],
        "command": command(flags(found)),
        "runner_up": found.runner_up,
        "ties": found.ties,
        "layouts": view.per_layout.records(),
        "pruned": found.pruned,
        "examined": found.examined,
        "notes": list(found.notes),
    }
    if replayed is not None:
        record["replayed"] = [
            {str(key): value for key, value in row.items()} for row in replayed.frame().to_dict("records")
        ]
    return record
