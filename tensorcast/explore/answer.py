"""A comparison as the page shows it: the answer in words, cards, and rows for its chart and table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tensorcast.explore.known import search_again
from tensorcast.explore.question import Question, arguments
from tensorcast.report import units
from tensorcast.report.compare import words
from tensorcast.report.compare.choices import View, cost_apart
from tensorcast.report.compare.figures import short
from tensorcast.report.compare.sentences import sentences
from tensorcast.report.compare.table import Column
from tensorcast.report.layout_words import deployment_words
from tensorcast.search.compare import Comparison, NoLayoutMeets, compare
from tensorcast.search.search import SearchResult, search
from tensorcast.search.search_task import SearchTask
from tensorcast.search.space import Variant

MOST_ROWS = 400
"""Rows of a page: the front, the best of each layout, and more batches of the best layouts."""

WITH_BATCHES = 8
"""Layouts that the page has at every batch."""

KNOWN_LAYOUTS = 4
"""Layouts beside the front whose variants are priced again while a slider moves."""


@dataclass(frozen=True)
class Found:
    """A row of the page: all of its columns, and the variants that prefill and decode."""

    row: dict[str, Any]
    prefill: Variant
    decode: Variant


@dataclass(frozen=True)
class Answer:
    """``page``: what the browser gets. ``behind``: its rows by key and batch. ``known``: variants worth pricing again
    under another load."""

    page: dict[str, Any]
    behind: dict[tuple[str, float], Found]
    known: tuple[Variant, ...]


def compared(asked: Question) -> tuple[Comparison, str]:
    """The whole comparison, and the line that says so where nothing keeps the limits. Raises :class:`InputError`."""
    tasks = asked.tasks()
    return _decided(asked, [search(task) for task in tasks], tasks)


def full(asked: Question) -> Answer:
    """The answer of every layout with every option, as ``compare`` gives it."""
    comparison, missed = compared(asked)
    return _answer(asked, comparison, missed, quick=False)


def quick(asked: Question, known: Sequence[Variant]) -> Answer:
    """The answer of the ``known`` variants alone, of a few of each layout where none is known."""
    tasks = asked.tasks()
    # pools of two devices have two sets of variants, and no slider's road of their own
    found = [search(task) if task.pools else search_again(task, known) for task in tasks]
    comparison, missed = _decided(asked, found, tasks, ties=False)
    return _answer(asked, comparison, missed, quick=True)


def _decided(
    asked: Question, results: Iterable[SearchResult], tasks: Sequence[SearchTask], ties: bool = True
) -> tuple[Comparison, str]:
    found = list(results)
    try:
        return replace(compare(tasks, found, ties=ties), question=arguments(asked)), ""
    except NoLayoutMeets as error:
        return replace(error.comparison, question=arguments(asked)), str(error)


def _answer(asked: Question, comparison: Comparison, missed: str, quick: bool) -> Answer:
    view = View(comparison)
    chosen = _worth_sending(view)
    sent = view.kept.where(np.isin(view.kept["candidate"].astype(str), list(chosen)))
    told = [_told(view, row) for row in sent.where(view.objective.order(sent.columns)).records()]
    columns = _columns(asked)
    behind = {
        (row["key"], float(row["batch"])): Found(row, *comparison.behind[row["candidate"]][1:]) for row in told
    }
    page = {
        "quick": quick, "asked": words.asked_for(view), "missed": missed, "warning": comparison.warning,
        "objective": {"column": view.objective.column, "less": view.objective.less, "words": view.objective.words},
        "columns": [column.described() for column in columns],
        "rows": [_cells(columns, row) for row in told],
        "cards": _cards(view, told), "limits": view.limits,
        "said": [] if quick or view.best is None else _said(view),
        "notes": [] if quick else list(comparison.notes),
        "pruned": {} if quick else comparison.pruned, "examined": comparison.examined,
        "kept": len(view.kept),
    }  # fmt: skip
    return Answer(page, behind, () if quick else _known(view))


def _said(view: View) -> list[str]:
    found = words.conclusion(view)
    second = f"{found.runner_up} {'; or '.join(found.ways)}." if found.ways else found.runner_up
    return [*sentences(view), *(text for text in (second, found.ties) if text)]


def _worth_sending(view: View) -> set[str]:
    """Candidates: the front, the best of each layout, and all batches of the best layouts as far as there is room."""
    ranked = view.kept.where(view.objective.order(view.kept.columns))
    layouts = list(zip(*(ranked[column].tolist() for column in view.layout_columns), strict=True))
    names, batches, front = (ranked[column].tolist() for column in ("candidate", "batch", "pareto"))
    chosen = dict.fromkeys(name for name, there in zip(names, front, strict=True) if there)
    best = {row["candidate"] for row in (view.best, view.runner_up) if row is not None}
    if view.best is None:
        best.add(view.comparison.closest[0]["candidate"])
    seen: dict[tuple[Any, ...], set[float]] = {}
    beside = []
    for name, layout, batch in zip(names, layouts, batches, strict=True):
        at = seen.setdefault(layout, set())
        if not at or name in best:
            chosen[name] = None
        elif len(seen) <= WITH_BATCHES and batch not in at:
            beside.append(name)
        at.add(batch)
    return {*best, *[*chosen, *beside][:MOST_ROWS]}


def _known(view: View) -> tuple[Variant, ...]:
    front = view.kept["candidate"][view.kept["pareto"].astype(bool)]
    names = [*front.tolist(), *view.per_layout["candidate"][:KNOWN_LAYOUTS].tolist()]
    behind = view.comparison.behind
    return tuple(dict.fromkeys(variant for name in names for variant in behind[name][1:]))


def _told(view: View, row: dict[str, Any]) -> dict[str, Any]:
    """A candidate's columns and what the page adds: its key, names, and what the asked GPUs deliver."""
    scenario, prefill, decode = view.comparison.behind[row["candidate"]]
    experts = row["family"] != "1 GPU" and bool(scenario.model.stated_facts.num_experts)
    return {
        **row, "name": view.name(row), "key": row_key(row),
        "plain": deployment_words(row, prefill.layout, decode.layout, experts),
        "requests_per_s": row["output_tokens_per_s"] / view.comparison.output_len,
        "usd_per_month": row["usd_per_hour"] * words.HOURS_OF_A_MONTH,
        **dict(zip(("usd_per_million_in", "usd_per_million_out"), cost_apart(view, row)[1:], strict=True)),
        "memory_share": row["memory_bytes"] / row["capacity_bytes"], "options": words.options(row),
        "verdict": words.verdict(row), "front": bool(row["pareto"]),
        "is_best": view.best is not None and row["candidate"] == view.best["candidate"],
        "tie": row["candidate"] in view.comparison.ties,
    }  # fmt: skip


def row_key(row: dict[str, Any]) -> str:
    """What tells a candidate from all others but those at other batches, the same under every load."""
    pools = row["mode"] == "disaggregated"
    servers = (
        f"{row['prefill_workers']:g}x{row['prefill_layout']}>{row['decode_workers']:g}x" if pools else ""
    )
    return f"{row['device']}:{row['engine']}:{row['replicas']:g}x({servers}{row['layout']})"


def _columns(asked: Question) -> tuple[Column, ...]:
    """The page's columns, those of the table first: it shows what has a name."""
    return (
        Column("name", "layout", hint="its code name: servers of prefill > of decode"),
        Column("verdict", "limits", hint="may miss: kept with a chance of less than 90 %"),
        Column("output_tokens_per_s", "tokens/s", True, "output tokens per second of all GPUs", units.rate),
        Column("tokens_per_s_per_gpu", "per GPU", True, "output tokens per second and GPU", units.rate),
        Column("tokens_per_s_per_user", "per user", True, "output tokens per second that a user reads", units.rate),
        Column("ttft_s", "TTFT", True, "mean time to first token", units.seconds),
        Column("tpot_s", "TPOT", True, "mean time per output token", units.seconds),
        Column("cost_per_million_tokens", "USD/M", True, "US dollars per million output tokens", units.digits),
        Column("concurrency", "users", True, "requests in flight over all GPUs", units.count),
        Column("requests_per_s", "req/s", True, "requests served per second", units.digits),
        Column("batch", "batch", True, "decoding sequences per data-parallel rank", short),
        Column("memory_share", "memory", True, "share of the fullest GPU's memory in use", units.percent),
        Column("gpus", "GPUs", True, "GPUs that it takes", units.count),
        Column("device", "GPU"), Column("engine", "engine"), Column("mode", "serving"),
        Column("family", "family"), Column("options", "options"),
        *(Column(key, "", True, write=units.seconds) for key in INTERVALS),
        Column("ttft_chance", "", True, write=units.chance), Column("tpot_chance", "", True, write=units.chance),
        Column("usd_per_hour", "", True, write=units.money), Column("usd_per_month", "", True, write=units.money),
        Column("usd_per_million_in", "", True, write=units.digits),
        Column("usd_per_million_out", "", True, write=units.digits),
        Column("idle_gpus", "", True, write=units.count), Column("plain", ""), Column("key", ""),
        *(Column(key, "") for key in ("meets", "front", "is_best", "tie")),
    )  # fmt: skip


INTERVALS = ("ttft_low_s", "ttft_high_s", "tpot_low_s", "tpot_high_s")


def _cells(columns: Sequence[Column], row: dict[str, Any]) -> list[Any]:
    """A number is a pair: to sort and draw by, to show."""
    found: list[Any] = []
    for column in columns:
        value = row[column.key]
        if not column.number:
            found.append(bool(value) if isinstance(value, bool | np.bool_) else str(value))
        elif value is None or value != value:
            found.append([None, "-"])
        else:
            assert column.write is not None
            found.append([float(f"{float(value):.6g}"), column.write(float(value))])
    return found


def _cards(view: View, told: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that answer a question of their own, each once: titles by (key, batch)."""
    good = [row for row in told if row["meets"]]
    if not good:
        name = view.comparison.closest[0]["candidate"]
        near = next(row for row in told if row["candidate"] == name)
        return [{"title": "Closest", "key": near["key"], "batch": near["batch"]}]
    good.sort(key=lambda row: not row["is_best"])
    found: dict[tuple[str, float], list[str]] = {}

    def card(title: str, row: dict[str, Any] | None) -> None:
        if row is not None:
            found.setdefault((row["key"], float(row["batch"])), []).append(title)

    runner = view.runner_up["candidate"] if view.runner_up is not None else None
    card("Best", good[0])
    card("Runner-up", next((row for row in good if row["candidate"] == runner), None))
    superlatives: tuple[tuple[str, str, Callable[..., Any]], ...] = (
        ("Most tokens in all", "output_tokens_per_s", max), ("Fastest for a user", "tokens_per_s_per_user", max),
        ("First token soonest", "ttft_s", min), ("Cheapest tokens", "cost_per_million_tokens", min),
        ("Fewest GPUs", "gpus", min),
    )  # fmt: skip
    for title, column, choose in superlatives:
        some = [row for row in good if row[column] is not None and row[column] == row[column]]
        card(title, choose(some, key=lambda row: row[column]) if some else None)
    for mode, title in (("aggregated", "Best with one pool"), ("disaggregated", "Best with two pools")):
        card(title, next((row for row in good if row["mode"] == mode), None))
    for column, where, several in (
        ("device", "on", view.several_devices), ("engine", "under", view.several_engines),
    ):  # fmt: skip
        for value in dict.fromkeys(row[column] for row in told) if several else ():
            card(f"Best {where} {value}", next((row for row in good if row[column] == value), None))
    return [{"title": " · ".join(titles), "key": key, "batch": batch} for (key, batch), titles in found.items()]


