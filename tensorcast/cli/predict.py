"""``tensorcast predict``: a table of deployments in, the table with predictions out, with errors where measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tensorcast.cli.app import OUTPUT, AsJson, command, console, patience
from tensorcast.errors import InputError

_NEITHER = (".xlsx", ".xls", ".ods", ".parquet", ".html", ".htm", ".pdf", ".json", ".gz", ".zip", ".png", ".docx")
OTHER_FORMATS = {"--out": (*_NEITHER, ".md"), "--report": (*_NEITHER, ".csv", ".tsv")}
"""Endings of names that say another format than what is written."""

EXAMPLES = """[bold]Examples[/bold]

[dim]A table with columns model, device, tp, ep, isl, osl, concurrency: printed, or written beside its own columns[/dim]

tensorcast predict runs.csv

tensorcast predict runs.csv --out predictions.csv

[dim]With measured columns: the errors, as a page[/dim]

tensorcast predict runs.csv --report errors.md

[dim]A launch folder's benchmark beside its prediction[/dim]

tensorcast predict run/runs.csv --result run/result.json

[dim]All columns, their other names and defaults[/dim]

tensorcast predict --columns"""


@command(epilog=EXAMPLES)
def predict(
    runs: Annotated[Path | None, typer.Argument(help="CSV with one deployment per row.", show_default=False)] = None,
    *,
    out: Annotated[Path | None, typer.Option(
        "--out", metavar="FILE", help="CSV to write: the rows with predictions.", rich_help_panel=OUTPUT,
    )] = None,
    report: Annotated[Path | None, typer.Option(
        "--report", metavar="FILE", help="Markdown of the errors, a figure beside it.", rich_help_panel=OUTPUT,
    )] = None,
    result: Annotated[list[Path], typer.Option(
        "--result", metavar="FILE", show_default=False,
        help="Result of vllm bench serve, sglang.bench_serving, TensorRT-LLM's client, guidellm or aiperf: the table's "
        "one deployment is scored at its load; again for more.",
    )] = [],  # noqa: B006 - typer's way of an option that may be given again
    jobs: Annotated[int | None, typer.Option(
        "--jobs", "-j", min=1, show_default=False, help="Processes; unasked one, and two where rows are replayed.",
    )] = None,
    columns: Annotated[bool, typer.Option("--columns", help="List the columns that are read, and leave.")] = False,
    as_json: AsJson = False,
) -> None:
    """Predict TTFT, TPOT and throughput of every deployment in a table; score them where they were measured.

    Measured columns are measured_ttft_s, measured_tpot_s and measured_output_tokens_per_s. Rows that cannot be
    predicted stay and say why in the column problem.
    """
    if columns:
        _list_columns(as_json)
        return
    if runs is None:
        raise InputError("predict needs a table: tensorcast predict runs.csv --out predictions.csv")
    from tensorcast.files import write_atomically, writing
    from tensorcast.predict.predict import predict_file
    from tensorcast.predict.score import summarise
    from tensorcast.report.plain import to_json
    from tensorcast.report.predict.page import print_summary, write_serving_report

    _check_targets(runs, out, report)
    with patience(str(runs), "predicting"):
        table = predict_file(runs, jobs, result)
        if not len(table):
            raise InputError(f"{runs}: no rows under its columns, nothing to predict")
        summary = summarise(table)
        if out is not None:
            with writing("--out", out):
                write_atomically(out, table.to_csv(index=False, lineterminator="\n").encode())
                if summary["errors"]:
                    write_atomically(out.with_suffix(".errors.json"), (to_json(summary, indent=2) + "\n").encode())
        if report is not None:
            with writing("--report", report):
                write_serving_report(table, summary, report)
    if as_json:
        document: dict[str, Any] = {"summary": summary}
        if out is None:
            document["rows"] = table.to_dict("records")
        typer.echo(to_json(document, indent=2))
    else:
        print_summary(table, summary, console(), rows=out is None)
    if (problems := table["problem"]).ne("").all():  # whoever reads the exit code alone is to know it
        raise InputError(f"{runs}: no row can be predicted: {problems.iloc[0]}")


def _check_targets(runs: Path, out: Path | None, report: Path | None) -> None:
    """Raise :class:`InputError` where a file to write cannot be, or is one that is read or written already."""
    from tensorcast.files import check_file

    for flag, path in (("--out", out), ("--report", report)):
        if path is not None:
            check_file(flag, path)
            if path.suffix.lower() in OTHER_FORMATS[flag]:
                right = "CSV: name it .csv" if flag == "--out" else "Markdown: name it .md"
                raise InputError(f"{flag} {path}: is written as {right}")
            if path.exists() and runs.exists() and path.samefile(runs):
                raise InputError(f"{flag} {path}: is the table itself; give another name")
    if out is not None and report is not None and out.resolve() == report.resolve():
        raise InputError(f"--report {report}: is --out, too; give another name")


def _list_columns(as_json: bool) -> None:
    from tensorcast.predict.run_columns import MEASURED, describe_columns
    from tensorcast.report.plain import to_json
    from tensorcast.report.predict.page import print_columns

    records = describe_columns()
    if as_json:
        typer.echo(to_json({"columns": records, "measured": {k: list(v) for k, v in MEASURED.items()}}, indent=2))
    else:
        print_columns(records, console())
