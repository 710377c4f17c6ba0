"""The page's table of candidates: which rows it carries, its columns, and how their values are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tensorcast.report import units
from tensorcast.report.compare.choices import View
from tensorcast.report.compare.figures import short
from tensorcast.report.compare.words import options, verdict

MOST_ROWS = 2000
"""More candidates than this, and the page carries only the Pareto front and the best of each layout."""


@dataclass(frozen=True)
class Column:
    """A column: its key in the rows, its header, whether it holds numbers, and how one is written for people."""

    key: str
    name: str
    number: bool = False
    hint: str = ""
    write: Callable[[float], str] | None = field(default=None, repr=False)

    def described(self) -> dict[str, Any]:
        """What the page's script needs to know of it."""
        return {key: value for key, value in asdict(self).items() if key != "write"}


COLUMNS = (
    Column("name", "layout"),
    Column("tokens_per_s_per_gpu", "tokens/s/GPU", True, "output tokens per second and GPU", units.rate),
    Column("tokens_per_s_per_user", "tokens/s/user", True, "1 / time per output token", units.rate),
    Column("ttft_s", "TTFT", True, "mean time to the first token", units.seconds),
    Column("tpot_s", "TPOT", True, "mean time per output token", units.seconds),
    Column("cost_per_million_tokens", "USD/M tokens", True, "per million output tokens", units.digits),
    Column("verdict", "limits", False, "kept, or which is missed; may miss: kept with a chance of less than 90 %"),
    Column("ttft_chance", "TTFT kept", True, "chance to keep the limit on TTFT", units.chance),
    Column("tpot_chance", "TPOT kept", True, "chance to keep the limit on TPOT", units.chance),
    Column("concurrency", "in flight", True, "requests in flight, over all GPUs", units.count),
    Column("batch", "batch", True, "decoding sequences per data-parallel rank", short),
    Column("memory_share", "memory", True, "share of a GPU's memory in use", units.percent),
    Column("output_tokens_per_s", "tokens/s", True, "output tokens per second of all GPUs", units.rate),
    Column("usd_per_hour", "USD/h", True, "US dollars per hour of the GPUs in use", units.money),
    Column("gpus", "GPUs", True, "GPUs in use", units.count),
    Column("idle_gpus", "idle", True, "GPUs of those asked for that it leaves; they cost as much", units.count),
    Column("device", "device"),
    Column("engine", "engine"),
    Column("mode", "serving"),
    Column("family", "family"),
    Column("options", "options"),
)

CHOICES = ("family", "mode", "device", "engine", "verdict")
"""Columns that the page filters by value."""


@dataclass(frozen=True)
class Table:
    """What the page embeds: columns, rows as lists, which columns have a filter, and a sentence on what is left out."""

    columns: tuple[Column, ...]
    rows: list[list[Any]]
    filters: dict[str, list[str]]
    left_out: str

    def document(self) -> dict[str, Any]:
        """For the page's script. A number is a pair: to sort by, to show. After its cells each row has whether it is on
        the Pareto front and the slow ends of the intervals of TTFT and TPOT."""
        return {"columns": [column.described() for column in self.columns], "rows": self.rows}


def table(view: View) -> Table:
    """The candidates, best first."""
    ranked = view.ranked
    kept, left_out = ranked, ""
    if len(ranked) > MOST_ROWS:
        best = np.isin(ranked["candidate"].astype(str), view.per_layout["candidate"].astype(str))
        kept = ranked.where(np.flatnonzero(ranked["pareto"] | best)[:MOST_ROWS])
        left_out = (
            f"Of {units.count(len(ranked))} candidates the page carries {units.count(len(kept))}: the Pareto front and "
            "the best of each layout. All are in candidates.csv and candidates.parquet."
        )
    records = [_record(view, row) for row in kept.records()]
    columns = tuple(column for column in COLUMNS if _says_something(column, records))
    rows = [[_cell(column, record[column.key]) for column in columns] + _beside(record) for record in records]
    filters = {
        column.key: values
        for column in columns
        if column.key in CHOICES and len(values := sorted({record[column.key] for record in records})) > 1
    }
    return Table(columns, rows, filters, left_out)


def _record(view: View, row: dict[str, Any]) -> dict[str, Any]:
    return {
        **row, "name": view.name(row), "memory_share": row["memory_bytes"] / row["capacity_bytes"],
        "verdict": verdict(row), "options": options(row),
    }


def _beside(record: dict[str, Any]) -> list[Any]:
    return [record["pareto"], *(float(f"{record[name]:.6g}") for name in ("ttft_high_s", "tpot_high_s"))]


def _says_something(column: Column, records: list[dict[str, Any]]) -> bool:
    """A column of one word, or of no number at all, is left out."""
    values = [record[column.key] for record in records]
    if column.number and column.key != "gpus":
        return any(value is not None and value == value for value in values)
    return column.key in ("name", "verdict", "options") or len(set(values)) > 1


def _cell(column: Column, value: Any) -> Any:
    if not column.number:
        return str(value)
    if value is None or value != value:
        return [None, "-"]
    assert column.write is not None
    return [float(f"{float(value):.6g}"), column.write(float(value))]
