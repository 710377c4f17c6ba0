"""Which limits are broken and why, of one deployment or of two side by side: words, a terminal, a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from tensorcast.predict.steady_limits import SteadyLimits
from tensorcast.report import units
from tensorcast.report.replay import words
from tensorcast.report.replay.terminal import plain_table
from tensorcast.scheduling.outcome import LIMIT_NAMES, Outcome

WORST = 3
"""Requests that are named per limit."""

Found = Outcome | SteadyLimits


def print_limits(found: Sequence[Found], console: Console) -> None:
    """One after the other; of two replays also which requests only one of them serves within the limits."""
    for letter, one in zip("AB", found, strict=False):
        name = f"{letter}  " if len(found) > 1 else ""
        if isinstance(one, SteadyLimits):
            for line in steady_lines(one):
                console.print(Text(f"{name}{line}", style="bold" if name or len(found) == 1 else ""))
                name = ""
            continue
        numbers = one.summary()
        console.print(Text(name + words.headline(one, numbers), style="bold"))
        if len(one.broken()):
            console.print(plain_table(*words.broken_table(one)))
            for line in words.worst(one, WORST):
                console.print(Text(line))
        elif one.served:
            console.print(Text("No request breaks a limit."))
    if line := both_line(found):
        console.print(Text(line))
    for note in dict.fromkeys(note for one in found if isinstance(one, Outcome) for note in one.notes):
        console.print(Text(f"note: {note}", style="dim"))


def steady_lines(found: SteadyLimits) -> list[str]:
    """What a deployment is asked for, and a line per limit: kept or not, and what the time goes into."""
    lines = [
        f"{found.layout}, {found.gpus} GPUs: {units.count(found.concurrency)} requests in flight, "
        f"{units.count(found.decoding)} of them decode"
    ]
    for name, limit in vars(found.limits).items():
        if limit is None:
            continue
        parts = sorted(found.parts[name].items(), key=lambda part: -part[1])
        goes = ", ".join(f"{cause} {units.seconds(seconds)}" for cause, seconds in parts if seconds > 0)
        breaks = name in found.broken
        said = f"{LIMIT_NAMES[name]} {units.seconds(found.times[name])} {'breaks' if breaks else 'keeps'} "
        why = f", by {found.because(name)}" if breaks else ""
        lines.append(f"{said}{units.seconds(limit)}{why}: {goes}")
    return lines


def both_line(found: Sequence[Found]) -> str:
    """Of two replays of the same requests: how many are within the limits in both, in one alone, in none."""
    if len(found) != 2 or not all(isinstance(one, Outcome) for one in found):
        return ""
    a, b = (one.limits.kept(one.times).astype(bool) for one in found if isinstance(one, Outcome))
    counts = [int(mask.sum()) for mask in (a & b, a & ~b, b & ~a, ~a & ~b)]
    return "Within the limits: in both {}, in A alone {}, in B alone {}, in none {}.".format(*map(units.count, counts))


def limits_record(found: Sequence[Found]) -> dict[str, Any]:
    """For ``--json``: every request that breaks a limit, or the means and what they go into."""
    records = {}
    for letter, one in zip("ab", found, strict=False):
        if isinstance(one, SteadyLimits):
            records[letter] = {
                "layout": one.layout, "gpus": one.gpus, "concurrency": one.concurrency, "decoding": one.decoding,
                **one.times, "limits": vars(one.limits), "parts": one.parts,
                "broken": [{"limit": name[:-2], "because": one.because(name)} for name in one.broken],
            }
        else:
            records[letter] = {**words.document(one), "broken": one.broken().to_dict("records")}
    return records
