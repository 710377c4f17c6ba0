"""The best candidate of each device, engine, form of serving and number of GPUs, in one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorcast.report import units
from tensorcast.report.compare.choices import LIMITS, View

MOST_SIZES = 8
"""Numbers of GPUs in the table: the best of them where there are more."""

GROUPS = (("device", "GPU"), ("engine", "engine"), ("mode", "serving"), ("gpus", "GPUs in use"))
MODES = {"aggregated": "one pool", "disaggregated": "two pools"}


@dataclass(frozen=True)
class BestOf:
    """A group's best within the limits; ``row`` is None where none of it keeps them."""

    what: str
    value: str
    row: dict[str, Any] | None

    def record(self, view: View) -> dict[str, Any]:
        """For scripts."""
        if self.row is None:
            return {"of": self.what, "value": self.value, "layout": None}
        names = ("device", "engine", "gpus", "output_tokens_per_s", "tokens_per_s_per_gpu", "concurrency", "ttft_s",
                 "tpot_s", "ttft_chance", "tpot_chance", "usd_per_hour", "cost_per_million_tokens")  # fmt: skip
        told = {name: self.row[name] for name in names}
        return {"of": self.what, "value": self.value, "layout": view.name(self.row), **told}


def best_of_each(view: View) -> list[BestOf]:
    """Groups of which there are several, each with its best."""
    ranked = view.ranked
    found = []
    for column, what in GROUPS:
        values = list(dict.fromkeys(ranked[column].tolist()))  # those that do best first
        values = sorted(values[:MOST_SIZES]) if column == "gpus" else values
        for value in values if len(values) > 1 else ():
            first = np.flatnonzero((ranked[column] == value) & ranked["meets"])[:1]
            best = next(iter(ranked.where(first).records()), None)
            found.append(BestOf(what, MODES.get(value, units.count(value) if column == "gpus" else value), best))
    return found


def rows(view: View, found: list[BestOf]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells for people; cost where a price is known, chances where there are limits."""
    priced = any(one.row is not None and one.row["usd_per_hour"] == one.row["usd_per_hour"] for one in found)
    limits = [column for column, limit in view.limits.items() if limit is not None]
    heads = ["best of", "", "layout", "tokens/s", "per GPU", "users", "TTFT", "TPOT",
             *(f"{LIMITS[column]} kept" for column in limits),
             *(["USD/h", "USD/M tokens"] if priced else [])]  # fmt: skip
    cells = []
    for one in found:
        row = one.row
        if row is None:
            cells.append([one.what, one.value, "none keeps the limits", *[""] * (len(heads) - 3)])
            continue
        cost = [units.money(row["usd_per_hour"]), units.digits(row["cost_per_million_tokens"])] if priced else []
        cells.append([
            one.what, one.value, view.name(row), units.rate(row["output_tokens_per_s"]),
            units.rate(row["tokens_per_s_per_gpu"]), units.count(row["concurrency"]), units.seconds(row["ttft_s"]),
            units.seconds(row["tpot_s"]), *(units.chance(row[f"{column[:-2]}_chance"]) for column in limits), *cost,
        ])  # fmt: skip
    return heads, cells
