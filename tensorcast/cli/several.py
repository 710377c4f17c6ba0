"""``compare`` of several models or prompt lengths: each a question of its own, answered in one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tensorcast.cli.app import console
from tensorcast.errors import InputError

if TYPE_CHECKING:
    from tensorcast.search.compare import Comparison

Ask = Callable[[str, int], "Comparison"]
NUMBERS = ("output_tokens_per_s", "tokens_per_s_per_gpu", "concurrency", "ttft_s", "tpot_s", "cost_per_million_tokens")


def compare_several(ask: Ask, questions: Sequence[tuple[str, int]], out: Path | None, as_json: bool) -> None:
    """Ask every (model, prompt length); print the best of each, or why there is none. ``out``: a report of each below.

    Raises :class:`InputError` where none has an answer.
    """
    from tensorcast.deploy.model_names import named_model
    from tensorcast.report.compare.choices import View
    from tensorcast.report.compare.files import write_comparison
    from tensorcast.report.compare.terminal import comparison_record
    from tensorcast.report.plain import to_json

    folders = dict[str, str]()
    for model in dict.fromkeys(model for model, _ in questions):
        named_model(model)  # a name that is none is a mistake, not an answer
        name = Path(model).name
        same = sum(Path(other).name == name for other in folders)
        folders[model] = f"{name}-{same + 1}" if same else name
    records, answers = list[dict[str, Any]](), list[dict[str, Any]]()
    for model, length in questions:
        asked = {"model": model, "input_len": length}
        try:
            found = ask(model, length)
        except InputError as error:
            answers.append({**asked, "problem": error.typed or str(error)})
            records.append(answers[-1])
            continue
        assert found.best is not None  # else it had raised
        answers.append({**asked, "layout": View(found).name(found.best), "problem": "", **{
            name: found.best[name] for name in ("device", "engine", "gpus", *NUMBERS)}})  # fmt: skip
        records.append({**asked, **comparison_record(found)})
        if out is not None:
            write_comparison(found, out / f"{folders[model]}-{length}")
    if all(one["problem"] for one in answers):
        raise InputError(answers[0]["problem"])
    if out is not None:
        import pandas as pd

        from tensorcast.files import write_atomically

        write_atomically(out / "answers.csv", pd.DataFrame(answers).to_csv(index=False))
    if as_json:
        typer.echo(to_json(records, indent=2))
        return
    _print(answers)
    if out is not None:
        typer.echo(f"wrote a report of each and answers.csv to {out}")


def _print(answers: Sequence[dict[str, Any]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from tensorcast.report import units

    models = list(dict.fromkeys(one["model"] for one in answers))
    written = (units.rate, units.rate, units.count, units.seconds, units.seconds, units.digits)
    heads = ["prompt", "best", "tokens/s", "per GPU", "users", "TTFT", "TPOT", "USD/M"]
    rows = []
    for one in answers:
        cells = [] if one["problem"] else [write(one[name]) for name, write in zip(NUMBERS, written, strict=True)]
        cells = ["-" if cell == "?" else cell for cell in cells] or ["-"] * len(NUMBERS)
        rows.append([units.count(one["input_len"]), one.get("layout", "none"), *cells])
    if len(models) > 1:
        heads, rows = ["model", *heads], [[one["model"], *row] for one, row in zip(answers, rows, strict=True)]
    if _width(heads, rows) > (width := console().width):
        best = heads.index("best")
        for row in rows:  # pools one below the other: a name cut anywhere else is hard to read
            row[best] = row[best].replace(" > ", " >\n")
    for spare in ("tokens/s", "users", "USD/M"):
        if _width(heads, rows) > width:
            i = heads.index(spare)
            heads, rows = heads[:i] + heads[i + 1 :], [row[:i] + row[i + 1 :] for row in rows]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for head in heads:
        words = head in ("model", "best")
        table.add_column(head, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    for row in rows:
        table.add_row(*map(Text, row))
    if len(models) == 1:
        console().print(Text(models[0], style="bold"))
    console().print(table)
    for one in answers:
        if one["problem"]:
            console().print(Text(f"note: {one['model']} at {one['input_len']} tokens: {one['problem']}"))


def _width(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Columns of a terminal that the table takes."""
    cells = zip(heads, *rows, strict=True)
    return sum(max(len(line) for cell in column for line in cell.split("\n")) + 2 for column in cells) - 1
