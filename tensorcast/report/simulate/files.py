"""What ``--out DIR`` writes: ``ops.csv``, ``summary.json``, ``trace.json`` and ``report.md``."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorcast.errors import InputError
from tensorcast.files import check_directory
from tensorcast.report import units
from tensorcast.report.plain import to_json
from tensorcast.report.simulate import words
from tensorcast.report.simulate.rows import records
from tensorcast.report.units import plural

if TYPE_CHECKING:
    from tensorcast.deploy.result import Simulation


NAMES = ("report.md", "ops.csv", "summary.json", "trace.json")


def write_report(run: Simulation, directory: Path, top: int = 20) -> list[Path]:
    """Write all files of ``run`` into ``directory``, made if need be; files of ours that lie there are replaced.

    Every file is complete in a hidden folder beside before the first one is moved to its name.
    """
    from tensorcast.report.simulate.chrome_trace import chrome_trace

    check_directory(directory)
    texts = {
        "report.md": markdown(run, top),
        "ops.csv": run.ops.to_csv(index=False, lineterminator="\n"),
        "summary.json": to_json(run.totals(), indent=2) + "\n",
        "trace.json": to_json(chrome_trace(run)) + "\n",
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".tensorcast-") as hidden:
            for name, text in texts.items():
                (Path(hidden) / name).write_text(text, encoding="utf-8")
            for name in NAMES:
                os.replace(Path(hidden) / name, directory / name)
    except OSError as error:
        raise InputError(f"--out {directory}: cannot be written: {error.strerror or error}") from None
    return [directory / name for name in NAMES]


def markdown(run: Simulation, top: int = 20) -> str:
    """The summary as Markdown: what was simulated, totals, memory, and the ``top`` costliest ops."""
    t, rows = run.totals(), records(run)
    lines = [f"# {words.headline(t)}", "", f"{words.workload(t)}.  ", f"{words.numerics(t)}.", "", "## Step", ""]
    lines += _table(("total", "value"), [list(pair) for pair in words.step_lines(t)], "ll")
    lines += ["", "## Memory per GPU", ""]
    memory = [[row.name, units.nbytes(row.bytes), units.percent(row.share)] for row in words.memory_rows(t)]
    lines += _table(("part", "size", "of budget"), memory, "lrr")
    lines += ["", f"{words.verdict(t)}.  ", f"{words.largest(t)}.", "", *words.logged(t), ""]
    shown = rows[:top]
    lines += [f"## Costliest ops ({len(shown)} of {len(rows)})", ""]
    head = ("op", "module", "shape", "count", "FLOPs", "bytes", "time", "share", "bound", "evidence")
    lines += _table(head, [_cells(row, t) for row in shown], "lllrrrrrll")
    if rest := rows[top:]:
        spent = sum(row["seconds"] for row in rest)
        share = units.percent(sum(row["share"] for row in rest))
        lines += ["", f"+ {plural(len(rest), 'more op')}: {units.seconds(spent)} ({share})."]
    legend = words.legend(words.shape(row, t) for row in shown)
    lines += ["", f"Sizes: {legend}. Bytes of collectives are bytes on the wire." if legend else ""]
    if t["notes"]:
        lines += ["", "## Notes", "", *(f"- {note}" for note in t["notes"])]
    return "\n".join(lines).rstrip() + "\n"


def _cells(row: dict[str, Any], t: dict[str, Any]) -> list[str]:
    shape = f"{words.shape(row, t)} {row['detail']}".strip()
    return [
        row["op"], row["module"], shape, units.count(row["count"]),
        units.flops(row["flops"]) if row["flops"] else "-", units.nbytes(row["bytes"] or row["wire_bytes"]),
        units.seconds(row["seconds"]), units.percent(row["share"]), row["bound"], row["evidence"],
    ]


def _table(head: tuple[str, ...], rows: list[list[str]], align: str) -> list[str]:
    def line(cells: tuple[str, ...] | list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), "|" + "|".join("---:" if side == "r" else "---" for side in align) + "|", *map(line, rows)]
