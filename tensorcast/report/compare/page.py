"""``report.html``: one file that opens from disk, asks the network for nothing, and says the answer first."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from typing import Any

from tensorcast.report import units
from tensorcast.report.compare import words
from tensorcast.report.compare.best_of import best_of_each
from tensorcast.report.compare.best_of import rows as rows_of_best
from tensorcast.report.compare.choices import View
from tensorcast.report.compare.figures import Chart
from tensorcast.report.compare.replayed import ReplayedTable
from tensorcast.report.compare.sentences import sentences
from tensorcast.report.compare.table import table
from tensorcast.report.compare.takeaway import takeaways
from tensorcast.report.glossary import glossary
from tensorcast.report.layout_words import deployment_words
from tensorcast.report.plain import to_json
from tensorcast.report.question import command, flags
from tensorcast.search.notes import COUNTED


def html(view: View, charts: Sequence[Chart], replayed: ReplayedTable | None = None) -> str:
    """The page. ``charts`` come in the order in which they are shown; ``replayed``: layouts under a trace."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("tensorcast.report.compare")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = lambda name: Markup(loader.get_source(environment, name)[0])  # noqa: E731
    rows, best = table(view), best_of_each(view)
    template = environment.get_template("report.html.j2")
    return template.render(
        question=words.asked_for(view),
        answer=words.conclusion(view), plain=_plain(view), replayed=replayed,
        charts=[{"name": c.name, "title": c.title, "caption": c.caption, "svg": Markup(c.inline)} for c in charts],
        takeaways=takeaways(view),
        table=rows,
        data=Markup(_for_script(to_json(rows.document()))),
        candidates=len(view.kept),
        examined=view.comparison.examined,
        pruned=[
            (rule, number, COUNTED[what]) for what, by_rule in view.comparison.pruned.items()
            for rule, number in by_rule.items()
        ],
        evidence=[(name, share, units.percent(share)) for name, share in words.evidence(view)],
        assumptions=words.assumptions(view, view.shown),
        notes=view.comparison.notes,
        environment=environment_of(view),
        sentences=[] if view.best is None else sentences(view), best_of=rows_of_best(view, best) if best else None,
        limits={
            **{name: "" if limit is None else f"{1e3 * limit:g}" for name, limit in zip(
                ("ttft", "tpot"), view.limits.values(), strict=True)},
            "users": (view.comparison.tasks[0].users or "") if view.comparison.tasks else "",
        },
        command=command(flags(view.comparison)), words=_words(),
        style=source("style.css"),
        script=Markup("\n").join(map(source, SCRIPTS)), copy=source("copy.js"), save=source("save.js"),
        count=units.count,
    )


SCRIPTS = ("table.js", "live.js")
"""Of the page's candidates."""

WORDS = (
    "layout", "tp", "dp", "ep", "etp", "pp", "prefill", "decode", "TTFT", "TPOT", "mode", "concurrency", "batch",
    "candidate", "Pareto front", "evidence", "interval",
)
"""Of the glossary, those that this page uses."""


def _words() -> list[tuple[str, str]]:
    known = glossary()
    return [(word, known[word]) for word in WORDS if word in known]


def _plain(view: View) -> str:
    """The best candidate in plain words, for the heading; empty where nothing keeps the limits."""
    if view.best is None:
        return ""
    prefill, decode = view.comparison.deployments(view.best["candidate"])
    experts = decode.raw.facts.num_experts > 0
    said = deployment_words(view.best, prefill.layout, decode.layout, experts)
    return f"{said[:1].upper()}{said[1:]}"


def _for_script(text: str) -> str:
    """JSON that no browser mistakes for the end of its script element."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def today() -> str:
    """The date of the report, UTC; ``SOURCE_DATE_EPOCH`` sets it for builds that must repeat."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    now = datetime.datetime.now(datetime.timezone.utc)
    when = datetime.datetime.fromtimestamp(int(epoch), datetime.timezone.utc) if epoch else now
    return when.date().isoformat()


def environment_of(view: View) -> list[tuple[str, str]]:
    """What made the report: versions, date, and where the devices' and the engine's numbers come from."""
    from tensorcast.version import __version__

    lines = [("tensorcast", f"{__version__}, Python {platform.python_version()}"), ("date", today())]
    seen: dict[str, Any] = {}
    for choice in view.shown:
        for deployment in (choice.decode, choice.prefill):
            seen.setdefault(deployment.device.name, deployment)
    for name, deployment in seen.items():
        fitted = deployment.device.calibration
        made = "datasheet only, nothing measured"
        if fitted is not None:
            made = f"{'estimated' if fitted.other_chip else f'calibrated {fitted.date}'}: {fitted.provenance}"
        lines.append((name, f"{deployment.device.description}; {made}"))
    if view.shown:
        engine, model = view.shown[0].decode.engine, view.shown[0].decode.model
        measured = f"; kernels measured with {engine.calibrated.kernels}" if engine.calibrated else ""
        lines.append((engine.name, f"version {engine.version}{measured}"))
        lines.append((model.name, f"{model.hf_id}: {model.description or model.model}"))
    return lines
