"""Figures of priced steps: where the time goes, what fills the memory, and what uneven expert load costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tensorcast.report import units
from tensorcast.report.compare.choices import PARTS, Choice, StepParts, View, step_parts
from tensorcast.report.compare.figures import (
    COLOURS,
    INK,
    MARKERS,
    MUTED,
    Chart,
    canvas,
    finish,
    lines_of,
    row_in,
    short,
    spread,
    wrapped,
)
from tensorcast.report.figures import COLOURS as GROUP_COLOURS
from tensorcast.report.units import plural

PART_COLOURS = dict(zip(PARTS, (*GROUP_COLOURS, "#3b3b3b"), strict=True))

MEMORY = {
    "weights_bytes": ("weights", "#0072B2"), "kv_cache_bytes": ("KV cache", "#56B4E9"),
    "activations_bytes": ("activations", "#009E73"), "other": ("buffers and engine", "#999999"),
}

ROUTINGS = {"balanced": "balanced", "uniform": "uniform", "typical": "typical", "zipf:1": "Zipf 1"}
"""Laws of expert popularity that steps are priced under, from even to steep."""

SENSITIVE = 4
"""Layouts whose sensitivity to uneven load is shown."""

NOTABLE = 0.03
"""A difference between steps that a title mentions."""


def step_bars(view: View) -> Chart:
    """Where a decode step's time goes, a stacked bar per layout, all at the same load."""
    split = {
        choice.label: step_parts(choice.decode, view.decode_price(choice, view.batch_at_load(choice)[0]))
        for choice in view.shown
    }
    title = _step_title(view, split)
    names = [wrapped(name) for name in split]
    figure, axes = canvas(1.45 + row_in(names) * len(names), title)
    left = [0.0] * len(names)
    longest = 1e3 * max(parts.seconds for parts in split.values())
    for part, colour in PART_COLOURS.items():
        widths = [1e3 * parts.parts[part] for parts in split.values()]
        if max(widths) < 0.002 * longest:
            continue
        axes.barh(names, widths, left=left, color=colour, label=part, height=0.66)
        for i, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width > 0.09 * longest:
                axes.text(
                    start + width / 2, i, units.digits(width), ha="center", va="center", fontsize=8.5,
                    color=_on(colour), in_layout=False,
                )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, choice in enumerate(view.shown):
        batch, fits = view.batch_at_load(choice)
        parts = split[choice.label]
        note = f"{units.seconds(parts.seconds)}, batch {units.count(batch)}{'' if fits else ', memory full'}"
        if parts.hidden_s > 0:
            note += f", hides {units.seconds(parts.hidden_s)}"
        axes.annotate(note, (left[i], i), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(0, 1.34 * longest)
    axes.invert_yaxis()
    axes.set_xlabel("time of one decode step, ms")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=4)
    caption = (
        f"All layouts at {short(view.load)} decoding sequences per GPU, or as many as fit, halfway through the "
        "answers; batch is sequences per data-parallel rank. Of communication, bars hold what the step waits for; what "
        "other kernels hide is named beside them."
    )
    return finish(figure, "step", title, caption)


def _on(colour: str) -> str:
    """Black or white, whichever is read more easily on ``colour``."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#fefefe" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else "#010101"


def _step_title(view: View, split: dict[str, StepParts]) -> str:
    (name, first), *others = split.items()
    largest = max(first.parts, key=lambda part: first.parts[part])
    mostly = f"{name} spends {units.percent(first.parts[largest] / first.seconds)} of its decode step on {largest}"
    same = [
        (label, parts) for (label, parts), choice in zip(others, view.shown[1:], strict=True)
        if view.batch_at_load(choice)[1]
    ]
    if not same:
        return mostly
    label, other = same[0]
    more = max(PARTS, key=lambda part: other.parts[part] - first.parts[part])
    gap, whole = other.parts[more] - first.parts[more], other.seconds - first.seconds
    if whole > 0 and gap > 0:
        return f"{mostly}; {label} takes {units.seconds(whole)} longer at the same load, most of all in {more}"
    return f"{mostly}; {label} is {units.seconds(-whole)} shorter at the same load"


def memory(view: View) -> Chart:
    """What fills a GPU's memory at each layout's own best load, against its capacity."""
    rows = [choice.row for choice in view.shown]
    names = [wrapped(choice.label) for choice in view.shown]
    title = _memory_title(view)
    figure, axes = canvas(1.45 + row_in(names) * len(names), title)
    left = [0.0] * len(rows)
    for column, (name, colour) in MEMORY.items():
        widths = [_gigabytes(row, column) for row in rows]
        axes.barh(names, widths, left=left, color=colour, label=name, height=0.66)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    widest = max(row["capacity_bytes"] for row in rows) / 1e9
    for i, row in enumerate(rows):
        capacity = row["capacity_bytes"] / 1e9
        axes.plot([capacity, capacity], [i - 0.42, i + 0.42], color=INK, linewidth=1.8)
        axes.annotate(
            f"batch {units.count(row['batch'])} of {units.count(row['largest_batch'])}", (max(left[i], capacity), i),
            xytext=(6, 0), textcoords="offset points", va="center", fontsize=9,
        )
    axes.plot([], [], color=INK, linewidth=1.8, label="capacity")
    axes.set_xlim(0, 1.25 * widest)
    axes.invert_yaxis()
    axes.set_xlabel("memory of the fullest GPU, GB")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=5)
    caption = (
        "At the load where each layout is best within the targets. Right of a bar: its batch, of the largest that the "
        "engine's memory budget holds (sequences per data-parallel rank)."
    )
    return finish(figure, "memory", title, caption)


def _gigabytes(row: dict[str, Any], column: str) -> float:
    if column != "other":
        return float(row[column]) / 1e9
    named = sum(row[name] for name in MEMORY if name != "other")
    return max(0.0, float(row["memory_bytes"] - named)) / 1e9


def _memory_title(view: View) -> str:
    choice = view.shown[0]
    row = choice.row
    weights = units.percent(row["weights_bytes"] / row["capacity_bytes"])
    full = [c.label for c in view.shown if view.full(c.row)]
    start = f"Weights take {weights} of a GPU under {choice.label}"
    if len(full) == len(view.shown) > 1:
        return f"{start}; memory ends the batch of every layout shown"
    if choice.label in full:
        return f"{start}; memory ends its batch at {units.count(row['batch'])}"
    if full:
        return f"{start}; memory is no limit there, but ends the batch of {full[0]}{' and others' if full[1:] else ''}"
    return f"{start}; memory is no limit for any layout shown"


def sensitivity(view: View) -> Chart | None:
    """Decode step time under uneven expert load for the best layouts; None for a model without experts."""
    if not view.shown[0].decode.raw.facts.num_experts:
        return None
    lines = {choice.label: _under_routings(view, choice) for choice in view.shown[:SENSITIVE]}
    title = _sensitivity_title(lines)
    labels = [
        f"{wrapped(name)}\n{1e3 * seconds[0]:.1f} to {units.seconds(seconds[-1])}" for name, seconds in lines.items()
    ]
    height = max(3.3, 0.8 + 0.19 * lines_of(labels) * len(labels))
    figure, axes = canvas(height, title)
    change = {name: [100 * (s / seconds[0] - 1) for s in seconds] for name, seconds in lines.items()}
    for i, values in enumerate(change.values()):
        axes.plot(range(len(values)), values, color=COLOURS[i], marker=MARKERS[i], linewidth=1.6, clip_on=False)
    low, high = min(-1.0, *map(min, change.values())), max(1.0, *map(max, change.values()))
    margin = 0.08 * (high - low)
    axes.set_ylim(low - margin, high + margin)
    axes.axhline(0, color=MUTED, linewidth=1)
    end = len(ROUTINGS) - 1
    ends = [values[-1] for values in change.values()]
    gap = 0.18 * lines_of(labels) * (high - low + 2 * margin) / (height - 0.7)
    for i, (label, at) in enumerate(zip(labels, spread(ends, gap, low, high), strict=True)):
        axes.annotate(
            label, (end, ends[i]),
            xytext=(end + 0.14, at), textcoords="data", va="center", fontsize=9.5, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": COLOURS[i], "linewidth": 0.9, "shrinkA": 1, "shrinkB": 4},
        )
    axes.set_xlim(-0.08, end + 0.06)
    axes.set_xticks(range(len(ROUTINGS)), list(ROUTINGS.values()))
    axes.set_xlabel("law of expert popularity, from even to steep")
    axes.set_ylabel("change of decode step time, %")
    caption = (
        "The busiest expert-parallel rank sets the pace. Balanced: every expert gets the same; uniform: tokens pick at "
        "random; typical: as recorded; Zipf s: popularity falls as rank to the -s. Few tokens on steep experts read "
        "fewer weights, which can also shorten a step. Right: step time from balanced to the last."
    )
    return finish(figure, "expert_load", title, caption)


def _under_routings(view: View, choice: Choice) -> list[float]:
    """Seconds of a decode step under each of :data:`ROUTINGS`, at the load of the figures."""
    from tensorcast.deploy.deployment import deploy

    batch, _ = view.batch_at_load(choice)
    d, found = choice.decode, []
    for routing in ROUTINGS:
        other = deploy(d.model, d.device, d.engine, d.layout, d.phase, options=replace(d.options, routing=routing))
        found.append(float(other.step.seconds(float(batch), 1.0, float(view.cached_tokens))))
    return found


def _sensitivity_title(lines: dict[str, list[float]]) -> str:
    slower = {name: seconds[-1] / seconds[0] - 1 for name, seconds in lines.items()}
    even = min(lines, key=lambda name: lines[name][0])
    steep = min(lines, key=lambda name: lines[name][-1])
    worst = max(slower, key=lambda name: slower[name])
    last = list(ROUTINGS.values())[-1]
    if slower[worst] < 0.005:
        least = 100 * min(slower.values())
        return f"No layout slows down under {last} routing: steps change by {least:.0f} to {100 * slower[worst]:.0f} %"
    grown = f"{worst} slows by {100 * slower[worst]:.0f} % under {last} routing"
    if len(lines) == 1:
        return grown
    if even != steep and lines[even][-1] > (1 + NOTABLE) * lines[steep][-1]:
        return f"Uneven experts change the order: {even} has the shortest step when balanced, {steep} under {last}"
    return f"{grown}, the most of {plural(len(lines), 'layout')}"
