"""What leaves the page as a file: the report, all candidates, the answer for scripts, and the question."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensorcast.errors import InputError, unknown_name
from tensorcast.explore.answer import compared
from tensorcast.explore.question import Question, arguments
from tensorcast.report.compare.choices import View
from tensorcast.report.compare.files import charts
from tensorcast.report.compare.page import html
from tensorcast.report.compare.terminal import comparison_record
from tensorcast.report.plain import to_json
from tensorcast.report.question import config as written


def report(asked: Question) -> str:
    """``report.html`` of ``compare --out``."""
    comparison, _ = compared(asked)
    view = View(comparison)
    return html(view, charts(view))


def csv(asked: Question) -> str:
    """All candidates, units in the names."""
    comparison, _ = compared(asked)
    text: str = comparison.candidates.to_csv(index=False)
    return text


def answer_json(asked: Question) -> str:
    """What ``compare --json`` prints; raises :class:`InputError` where nothing keeps the limits, as that does."""
    comparison, missed = compared(asked)
    if missed:
        raise InputError(missed)
    return to_json(comparison_record(comparison), indent=2) + "\n"


def config(asked: Question) -> str:
    """The question as ``compare --config`` reads it."""
    return written({key: _plain(value) for key, value in arguments(asked).items()})


def _plain(value: str) -> Any:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


EXPORTS: dict[str, tuple[Callable[[Question], str], str, str]] = {
    "report": (report, "report.html", "text/html"), "csv": (csv, "candidates.csv", "text/csv"),
    "json": (answer_json, "comparison.json", "application/json"), "config": (config, "compare.yaml", "text/yaml"),
}
"""How each is made, its file name and its type."""


def exported(asked: Question, kind: str) -> str:
    """The text of one of :data:`EXPORTS`."""
    if kind not in EXPORTS:
        raise unknown_name("export", kind, EXPORTS)
    return EXPORTS[kind][0](asked)
