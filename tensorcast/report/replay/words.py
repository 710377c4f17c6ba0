"""A replay in words and as a document."""

from __future__ import annotations

from typing import Any

from tensorcast.report import units
from tensorcast.scheduling.outcome import CAUSES, LIMIT_NAMES, PERCENTILES, Outcome

ROWS = {
    "ttft": "time to first token", "tpot": "time per output token", "itl": "gap between tokens",
    "request": "whole request",
}  # fmt: skip
"""Times of :meth:`Outcome.summary`, by the start of their names."""


def headline(found: Outcome, numbers: dict[str, float]) -> str:
    """What was replayed, and how much of it kept the limits."""
    said = f"{found.layout}: {units.count(numbers['served'])} of {units.count(numbers['requests'])} requests served"
    said += f" in {units.seconds(numbers['duration_s'])}" if found.served else ""
    said += ", stopped before the end" if found.stopped else ""
    if not found.served and not found.stopped:
        said += f"; {why_unserved(found)}"
    if limits := limits_said(found):
        said += f"; {units.percent(numbers.get('within_limits', 0.0))} keep {limits}"
    return said


def limits_said(found: Outcome) -> str:
    """``TTFT 2 s, TPOT 50 ms``; empty if there are none."""
    return ", ".join(
        f"{LIMIT_NAMES[name]} {units.seconds(limit)}" for name, limit in vars(found.limits).items() if limit is not None
    )


def times_table(found: Outcome, numbers: dict[str, float]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: mean and percentiles of every time, and where four in five lie of those that were drawn."""
    bands = found.bands()
    head = ["", "mean", *(f"P{p:g}" for p in PERCENTILES)]
    rows = []
    for key, said in ROWS.items():
        mean = numbers.get(f"{key}_mean_s")
        cells = [numbers.get(f"{key}_p{p:g}_s", float("nan")) for p in PERCENTILES]
        rows.append([said, "-" if mean is None else units.seconds(mean), *map(units.seconds, cells)])
        for end, word in enumerate(("80 % from", "80 % to") if bands else ()):
            own = [bands.get(f"{key}_{one}_s") for one in ("mean", *(f"p{p:g}" for p in PERCENTILES))]
            rows.append([f"  {word}", *("-" if band is None else units.seconds(band[end]) for band in own)])
    return head, rows


def rates(found: Outcome, numbers: dict[str, float]) -> list[tuple[str, str]]:
    """What was served per second, and what servers did."""
    bands = found.bands()

    def banded(name: str, said: str) -> str:
        if name not in bands:
            return said
        low, high = bands[name]
        return f"{said}  (80 %: {low:,.4g}-{high:,.4g})"

    sent = f"; sent at {numbers['sent_per_s']:,.3g}" if "sent_per_s" in numbers else ""
    rows = [
        ("throughput", banded("output_tokens_per_s", f"{numbers['output_tokens_per_s']:,.0f} output tokens/s; "
            f"{numbers['output_tokens_per_s_per_gpu']:,.1f} per GPU on {found.gpus:.4g}")),
        ("requests", banded("requests_per_s", f"{numbers['requests_per_s']:,.3g} served per second{sent}")),
    ]
    if limits_said(found):
        rows.append(("goodput", f"{numbers['goodput_requests_per_s']:,.3g} requests per second within the limits"))
    if found.usd_per_gpu_hour:
        each = f"{numbers['usd_per_million_output_tokens']:,.3g} US dollars per million output tokens"
        rows.append(("cost", f"{each} at {found.usd_per_gpu_hour:g} per GPU hour"))
    rows.append(("servers", f"busy {units.percent(numbers['busy_share'])} of the time"))
    if found.record.blocks is not None:
        rows.append(("prefix cache", f"{units.percent(numbers['cache_hit_share'])} of the prompts' tokens were cached"))
    if numbers["preemptions"]:
        rows.append(("started over", f"{units.plural(numbers['preemptions'], 'time')}: the cache was full"))
    if numbers["refused"]:
        many = units.plural(numbers["refused"], "request")
        rows.append(("refused", f"{many} too long for the model's positions or a rank's cache"))
    if numbers["moved"]:
        rows.append(("moved", f"{units.plural(numbers['moved'], 'time')}: the server was lost"))
    if numbers["unserved"]:
        rows.append(("unserved", f"{units.plural(numbers['unserved'], 'request')}: {why_unserved(found)}"))
    return rows


def why_unserved(found: Outcome) -> str:
    """Why some requests got no reply that were not refused."""
    return "the replay was stopped" if found.stopped else "no server was left"


def broken_table(found: Outcome) -> tuple[list[str], list[list[str]]]:
    """How many requests broke each limit, by what took longer than in the middle request."""
    frame = found.broken()
    head = ["requests beyond", "in all", *CAUSES]
    rows = []
    for limit, own in frame.groupby("limit", sort=False):
        because = own["because"].value_counts()
        rows.append([
            LIMIT_NAMES[f"{limit}_s"], units.count(len(own)),
            *(units.count(because[cause]) if cause in because else "-" for cause in CAUSES),
        ])
    return head, rows


def why_broken(found: Outcome) -> list[str]:
    """A sentence per limit that is broken: by how many requests, and what took longer than where it is kept."""
    said = []
    for limit, own in found.broken().groupby("limit", sort=False):
        most = units.seconds(own["limit_s"].iloc[0])
        because = own["because"].value_counts()
        why = ", ".join(f"{units.count(many)} by {cause}" for cause, many in because.items())
        said.append(f"{units.plural(len(own), 'request')} beyond {LIMIT_NAMES[f'{limit}_s']} {most}: {why}")
    return said


def worst_table(found: Outcome, count: int) -> tuple[list[str], list[list[str]]]:
    """The requests that are furthest beyond each limit, and what took longer there."""
    head = ["request", "sent at", "prompt", "reply", "limit", "took", "at most", "because", "of it"]
    rows = [
        [
            str(row["request"]), units.seconds(row["sent_s"]), units.count(row["input_len"]),
            units.count(row["output_len"]), LIMIT_NAMES[f"{row['limit']}_s"], units.seconds(row["seconds"]),
            units.seconds(row["limit_s"]), row["because"], units.seconds(row["of_it_s"]),
        ]
        for row in found.broken().groupby("limit", sort=False).head(count).to_dict("records")
    ]  # fmt: skip
    return head, rows


def worst(found: Outcome, count: int = 3) -> list[str]:
    """A sentence for each of the requests that are furthest beyond each limit."""
    return [
        f"request {request}, sent at {sent}, {prompt} + {reply} tokens: {limit} {took}, limit {most}; {because} {of_it}"
        for request, sent, prompt, reply, limit, took, most, because, of_it in worst_table(found, count)[1]
    ]


def causes_table(found: Outcome) -> tuple[list[str], list[list[str]]]:
    """What requests' time went into: of all, and of those beyond a limit."""
    frame = found.causes()
    head = ["mean seconds of", "requests", *CAUSES]
    rows = [
        [str(name), units.count(row["requests"]), *(units.seconds(row[cause]) for cause in CAUSES)]
        for name, row in frame.iterrows()
    ]
    return head, rows


def document(found: Outcome) -> dict[str, Any]:
    """Everything but the single requests, for ``--json``."""
    numbers = found.summary()
    return {
        "layout": found.layout, "gpus": found.gpus, **numbers,
        "limits": vars(found.limits),
        "bands_80": {name: list(ends) for name, ends in found.bands().items()},
        "causes": {str(name): dict(row) for name, row in found.causes().iterrows()} if found.served else {},
        "servers": [
            {key: value for key, value in server.items() if key != "moments"} for server in found.servers
        ],
        "notes": list(found.notes),
    }  # fmt: skip
