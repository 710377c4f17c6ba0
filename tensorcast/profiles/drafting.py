"""What published tables say of accepted drafts, by model, method and task: ``profiles/drafting/acceptance.csv``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from tensorcast.errors import InputError
from tensorcast.profiles.store import profile_roots


class Acceptance(NamedTuple):
    """``length``: mean tokens of a step where ``drafted`` were checked, the model's own among them."""

    model: str
    method: str
    drafted: int
    task: str
    length: float
    source: str

    @property
    def chance(self) -> float:
        """Chance of each drafted token, given those before it, that gives this length: ``sum(chance**i)``."""
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            longer = sum(middle**i for i in range(self.drafted + 1)) > self.length
            low, high = (low, middle) if longer else (middle, high)
        return low


@cache
def acceptances() -> tuple[Acceptance, ...]:
    """All rows of the user's table and the shipped one."""
    files = (root / "drafting" / "acceptance.csv" for root in profile_roots())
    found = []
    for path in (path for path in files if path.is_file()):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                drafted, length = int(row["drafted"]), float(row["acceptance_length"])
                found.append(
                    Acceptance(row["model"], row["method"], drafted, row["task"], length, row["source"])
                )
    return tuple(found)


def published(model: str, method: str) -> tuple[Acceptance, ...]:
    """Rows of a model, by its profile's name, and a method of drafting."""
    return tuple(row for row in acceptances() if (row.model, row.method) == (model, method))


def acceptance(said: str, model: str, method: str) -> float:
    """The chance published for the task that is ``said``, as ``mt-bench``.

    Raises :class:`InputError` for any other, with the tasks that are known for the model and method.
    """
    rows = {row.task: row for row in published(model, method)}
    if said not in rows:
        known = f"published: {', '.join(rows)}" if rows else f"nothing is known for {method} of {model}"
        rule = "must be a chance from 0 to 1, or a task of published tables"
        raise InputError(f"--mtp-acceptance {said!r}: {rule}; {known}")
    return rows[said].chance


def said_of(rows: Sequence[Acceptance]) -> str:
    """Published lengths in a line, empty without any: ``2.41 tokens of 3 drafted (mt-bench, a chance of 0.66 each)``"""
    found = [f"{r.length:g} of {1 + r.drafted} tokens ({r.task}, a chance of {r.chance:.2f} each)" for r in rows]
    sources = " and ".join(dict.fromkeys(row.source for row in rows))
    return f"published: {'; '.join(found)}: {sources}" if rows else ""
