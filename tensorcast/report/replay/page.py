"""A replay as one HTML page: percentiles, rates, what requests waited for, what servers did."""

from __future__ import annotations

from tensorcast.report import units
from tensorcast.report.replay import words
from tensorcast.report.sections import Section, Table
from tensorcast.scheduling.outcome import Outcome


def sections(found: Outcome) -> list[Section]:
    """The page's parts; its figure is ``replay.png``."""
    numbers = found.summary()
    page = [Section(words.headline(found, numbers), tuple(found.notes), figure="replay.png" if found.served else "")]
    if not found.served:
        return page
    head, rows = words.times_table(found, numbers)
    page.append(Section("What users wait for", table=_table(head, rows)))
    page.append(Section("Rates", table=_table(["", ""], [list(pair) for pair in words.rates(found, numbers)], "ll")))
    said = (
        "Means, of all requests and of those beyond each limit. Queue: until a step with the prompt begins; own "
        "prompt: until the first token; others' prompts: what these took from the reply; started over: a full cache.",
    )
    page.append(Section("What their time goes into", said, _table(*words.causes_table(found))))
    if len(found.broken()):
        why = "Each by the part of its time that is furthest above the middle request's."
        page.append(Section("Why requests broke a limit", (why,), _table(*words.broken_table(found))))
        page.append(Section("The worst of them", table=_table(*words.worst_table(found, 10), "lrrrlrrlr")))
    page.append(Section("Servers", table=_servers(found)))
    return page


def _servers(found: Outcome) -> Table:
    rows, stayed = [], not any(server["from_s"] or server["lost_s"] for server in found.servers)
    for number, server in enumerate(found.servers):
        moments = server["moments"]
        full = float(max(moments["cache_used"], default=0.0))
        most = int(max(moments["decoding"], default=0))
        rows.append([
            str(number), server["role"], units.count(server["steps"]), units.percent(server["busy_share"]),
            units.percent(server["prompts_share"]), units.count(most), units.percent(full),
            *([] if stayed else [_there(server["from_s"], server["lost_s"])]),
        ])
    head = ["server", "phases", "steps", "busy", "of it prompts", "most replies at once", "cache at its fullest"]
    return _table(head, rows, "llrrrrr") if stayed else _table([*head, "there"], rows, "llrrrrrl")


def _there(from_s: float, lost_s: float | None) -> str:
    """When a server was there."""
    said = [f"from {from_s:g} s"] if from_s else []
    return " ".join(said + ([] if lost_s is None else [f"until {lost_s:g} s"])) or "always"


def _table(head: list[str], rows: list[list[str]], align: str = "") -> Table:
    return Table(tuple(head), rows, align or "l" + "r" * (len(head) - 1))
