"""A sweep of replays: a table for the terminal, files."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tensorcast.files import write_atomically
from tensorcast.report import units

if TYPE_CHECKING:
    import pandas as pd


def print_sweep(frame: pd.DataFrame, console: Console) -> None:
    """A line per replay, in the order in which they were asked for."""
    rows = frame.to_dict("records")
    seeds = len({row.get("seed") for row in rows}) > 1
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    heads = ["layout", "rate", *(["seed"] if seeds else [])]
    heads += ["TTFT P50", "TTFT P99", "TPOT P99", "within", "tokens/s/GPU"]
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", overflow="fold")
    for row in rows:
        asked = [row["layout"], _rate(row.get("rate")), *([str(row["seed"])] if seeds else [])]
        if row["problem"]:
            table.add_row(*asked, *"-----")
            continue
        table.add_row(
            *asked, *(units.seconds(row[name]) for name in ("ttft_p50_s", "ttft_p99_s", "tpot_p99_s")),
            units.percent(row["within_limits"]), f"{row['output_tokens_per_s_per_gpu']:,.1f}",
        )
    console.print(table)
    if laws := {str(row["routing"]) for row in rows if "routing" in row}:
        console.print(Text(f"tokens fall on experts by routing {', '.join(sorted(laws))}", style="dim"))
    for layout, problem in dict.fromkeys((row["layout"], row["problem"]) for row in rows if row["problem"]):
        console.print(Text(f"note: {layout} was not replayed: {problem}"))


def write_sweep(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """``sweep.csv`` and ``sweep.parquet`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    plain = frame.copy()
    plain.attrs = {}
    plain.to_parquet(content)
    files: dict[str, str | bytes] = {"sweep.csv": plain.to_csv(index=False), "sweep.parquet": content.getvalue()}
    for name, written in files.items():
        write_atomically(folder / name, written)
    return [folder / name for name in files]


def _rate(rate: object) -> str:
    return f"{rate:.3g}" if isinstance(rate, float) and math.isfinite(rate) else "all at once"
