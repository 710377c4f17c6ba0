"""Figures over all candidates: the Pareto front, throughput against load, and the heat map of TP by EP."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorcast.report import units
from tensorcast.report.compare.choices import View
from tensorcast.report.compare.figures import (
    COLOURS,
    INK,
    MARKERS,
    MUTED,
    PLATE,
    Chart,
    canvas,
    finish,
    lines_of,
    places,
    short,
    spread,
    wrapped,
)
from tensorcast.report.compare.words import limit_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from tensorcast.search.candidate_table import Candidates

POINTS = 250
"""Candidates drawn per family: more only darken the picture."""


def families(view: View) -> dict[str, Candidates]:
    """Candidates by family, those first that are most on the front; beyond the colours there are, all as one."""
    kept = view.kept
    names, which = np.unique(kept["family"], return_inverse=True)
    order = np.argsort(-np.bincount(which, weights=kept["pareto"]), kind="stable")
    named = order if len(order) <= len(COLOURS) else order[: len(COLOURS) - 1]
    found = {str(names[i]): kept.where(which == i) for i in named}
    rest = ~np.isin(which, named)
    return {**found, "others": kept.where(rest)} if rest.any() else found


def pareto(view: View) -> Chart:
    """Tokens/s per user against tokens/s per GPU, a front for each family of layouts."""
    kept = view.kept
    front = kept.where(kept["pareto"])
    title = _pareto_title(front.where(np.argsort(front["tokens_per_s_per_user"], kind="stable")).records())
    figure, axes = canvas(4.6, title)
    for (name, part), colour, marker in zip(families(view).items(), COLOURS, MARKERS, strict=False):
        drawn = part.where(np.unique(np.linspace(0, len(part) - 1, POINTS).astype(int)))
        axes.scatter(
            drawn["tokens_per_s_per_user"], drawn["tokens_per_s_per_gpu"], s=13, color=colour, marker=marker,
            alpha=0.28, linewidths=0, zorder=2,
        )
        best = envelope(part)
        axes.plot(
            best["tokens_per_s_per_user"], best["tokens_per_s_per_gpu"], color=colour, marker=marker, markersize=4.5,
            linewidth=1.5, label=f"{name}{'' if best['pareto'].any() else ' (not on the front)'}", zorder=3,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_xticks(*places(kept["tokens_per_s_per_user"].tolist()))
    axes.set_yticks(*places(kept["tokens_per_s_per_gpu"].tolist()))
    if view.comparison.targets[1] is not None:
        least = 1.0 / view.comparison.targets[1]
        axes.axvline(least, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"TPOT {units.seconds(view.comparison.targets[1])}", (least, 0.0), xycoords=("data", "axes fraction"),
            xytext=(4, 5), textcoords="offset points", color=MUTED, fontsize=9,
        )
    for row, words, up in ((view.best, "best", 7), (view.runner_up, "runner-up", -7)):
        if row is not None:
            _point_out(axes, row, wrapped(f"{words}: {view.name(row)}"), up)
    axes.set_xlabel("tokens/s per user  (1 / time per output token)")
    axes.set_ylabel("output tokens/s per GPU")
    figure.legend(loc="outside lower center", ncols=3)
    caption = (
        "Each faint point is a candidate; a line joins the candidates of one family that no other of the family beats "
        "on both axes. Up and right is better."
    )
    return finish(figure, "pareto", title, caption)


def envelope(some: Candidates) -> Candidates:
    """Those that no other of ``some`` beats in tokens/s per user and per GPU, the most per user first."""
    ordered = some.where(np.lexsort((-some["tokens_per_s_per_gpu"], -some["tokens_per_s_per_user"])))
    speed = ordered["tokens_per_s_per_gpu"]
    return ordered.where(speed > np.maximum.accumulate([-1.0, *speed[:-1]]))


def _pareto_title(front: list[dict[str, Any]]) -> str:
    """Who is on the front from slow to fast: ``DP+EP gives the most tokens per GPU, TP+EP the fastest answers``."""
    most, fastest = front[0], front[-1]
    cheap = f"{units.rate(most['tokens_per_s_per_gpu'])} tokens/s per GPU"
    quick = f"{units.rate(fastest['tokens_per_s_per_user'])} tokens/s per user"
    cheap += "" if most["meets"] else " (over the targets)"
    if most["family"] == fastest["family"]:
        return f"{most['family']} leads at both ends: {cheap} in large batches, {quick} in small ones"
    return f"{most['family']} gives the most throughput, {cheap}; {fastest['family']} the fastest answers, {quick}"


def _point_out(axes: Axes, row: dict[str, Any], text: str, up: float) -> None:
    """Ring a candidate and name it, ``up`` points above it, on the side that has room."""
    x, y = row["tokens_per_s_per_user"], row["tokens_per_s_per_gpu"]
    axes.plot([x], [y], marker="o", markersize=11, markerfacecolor="none", color=INK, markeredgewidth=1.4, zorder=4)
    right = x < float(axes.transData.inverted().transform(axes.transAxes.transform((0.55, 0.5)))[0])
    axes.annotate(
        text, (x, y), xytext=(9 if right else -9, up), textcoords="offset points", ha="left" if right else "right",
        va="bottom" if up > 0 else "top", fontsize=9.5, fontweight="bold" if text.startswith("best") else "normal",
        bbox=PLATE, zorder=5,
    )


def throughput(view: View) -> Chart:
    """Throughput against requests in flight, a line per layout that is shown."""
    lines = {choice.label: _by_load(view.kept.where(view.of_layout(choice.row))) for choice in view.shown}
    title = _throughput_title(lines)
    labels = [wrapped(name) for name in lines]
    height = max(4.3, 0.9 + 0.19 * lines_of(labels) * len(labels))
    figure, axes = canvas(height, title)
    ends = []
    for i, part in enumerate(lines.values()):
        load, speed = _load(part), part["tokens_per_s_per_gpu"]
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(load, speed, color=colour, linewidth=1.5, zorder=2)
        for meets in (True, False):
            some = part["meets"] == meets
            axes.plot(
                load[some], speed[some], linestyle="none", marker=MARKERS[i % len(MARKERS)], color=colour,
                markersize=5.5, markerfacecolor=colour if meets else "none", zorder=3,
            )
        ends.append((float(load[-1]), float(speed[-1]), labels[i], colour))
    axes.set_xscale("log")
    axes.minorticks_off()
    every = [x for part in lines.values() for x in _load(part)]
    axes.set_xticks(*places(every))
    axes.set_xlim(min(every) / 1.15, max(every) * 1.15)
    top = axes.get_ylim()[1]
    axes.set_ylim(0, top)
    gap = 0.19 * top * lines_of(labels) / (height - 0.7)
    for (x, y, label, colour), at in zip(ends, spread([y for _, y, _, _ in ends], gap, 0.0, top), strict=True):
        axes.annotate(
            label, (1.0, at / top), xycoords="axes fraction", xytext=(6, 0), textcoords="offset points",
            va="center", color=INK, fontsize=9.5,
        )
        axes.annotate(
            "", (x, y), xytext=(1.005, at / top), textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.9, "linestyle": (0, (1, 2))},
        )
    axes.set_xlabel("requests in flight per GPU  (filled: meets the targets)")
    axes.set_ylabel("output tokens/s per GPU")
    caption = (
        "Each line ends where the KV cache fills the memory. Of several options near one load the best is drawn: the "
        "most tokens, within the targets where that can be."
    )
    return finish(figure, "throughput", title, caption)


def _load(some: Candidates) -> NDArray[np.float64]:
    """Requests in flight per GPU."""
    load: NDArray[np.float64] = some["concurrency"] / some["gpus"]
    return load


def _by_load(some: Candidates) -> Candidates:
    """A layout's candidates by load: of those within a factor of 1.4 the one with most tokens, targets first."""
    ordered = some.where(np.lexsort((-some["tokens_per_s_per_gpu"], ~some["meets"])))
    near = replace(ordered, columns=ordered.columns | {"near": np.round(2 * np.log2(_load(ordered)))})
    kept = near.where(near.first_of(["near"]))
    return kept.where(np.argsort(_load(kept)))


def _throughput_title(lines: dict[str, Candidates]) -> str:
    """Where the best layout stops, and why."""
    (name, part), *_ = lines.items()
    rows = part.records()
    meeting = [row for row in rows if row["meets"]]
    if not meeting:
        return f"No load of {name} meets the targets: {limit_name(rows[0]['limit'])} is over at the least load"
    top = max(meeting, key=lambda row: float(row["tokens_per_s_per_gpu"]))
    most = top["concurrency"] / top["gpus"]
    load = short(most)
    speed = f"{units.rate(top['tokens_per_s_per_gpu'])} tokens/s per GPU at {load} requests in flight per GPU"
    over = [row for row in rows if row["concurrency"] / row["gpus"] > most and not row["meets"]]
    if over:
        return f"{name} reaches {speed}; beyond, {limit_name(over[0]['limit'])} is over its target"
    if top["candidate"] == rows[-1]["candidate"]:
        return f"{name} reaches {speed}, its largest load here"
    return f"{name} is best at {speed}; more load brings no more"


def heatmap(view: View) -> Chart | None:
    """The objective over TP and EP, the best of all other choices in each cell; None for a single cell."""
    import matplotlib

    objective = view.objective
    best = view.ranked.where(view.ranked.first_of(["tp", "ep"])).records()
    tps, eps = (sorted({row[size] for row in best}) for size in ("tp", "ep"))
    if len(tps) * len(eps) < 2:
        return None
    grid = np.full((len(eps), len(tps)), np.nan)
    cells = {(row["ep"], row["tp"]): row for row in best}
    for (ep, tp), row in cells.items():
        grid[eps.index(ep), tps.index(tp)] = row[objective.column]
    first = best[0]
    title = _heatmap_title(view, best)
    figure, axes = canvas(0.95 + 0.62 * len(eps), title)
    scale = matplotlib.colormaps["cividis_r" if objective.less else "cividis"]
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    shades = axes.imshow(grid, cmap=scale, aspect="auto", origin="lower", vmin=low, vmax=high)
    for (ep, tp), row in cells.items():
        i, j = eps.index(ep), tps.index(tp)
        value = float(grid[i, j])
        red, green, blue, _ = scale((value - low) / (high - low or 1.0))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        colour = "#fefefe" if dark else "#010101"
        chosen = (ep, tp) == (first["ep"], first["tp"])
        axes.text(
            j, i + 0.02, view.write(value), ha="center", va="bottom", color=colour,
            fontweight="bold" if chosen else "normal", in_layout=False,
        )
        below = _beside(row, view) if row["meets"] else f"misses {limit_name(row['limit'])}"
        axes.text(
            j, i - 0.05, below, ha="center", va="top", color=colour, linespacing=1.1,
            fontsize=8 if view.several_devices else 8.5, in_layout=False,
        )
    axes.set_xticks(range(len(tps)), [f"TP {tp}" for tp in tps])
    axes.set_yticks(range(len(eps)), [f"EP {ep}" for ep in eps])
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(shades, ax=axes, fraction=0.035, pad=0.015)
    bar.outline.set_visible(False)
    bar.set_label(objective.words)
    caption = (
        f"Each cell is the best candidate with this TP and EP whatever else it chose ({objective.words}; below it what "
        "it chose). Empty: no legal candidate that fits."
    )
    return finish(figure, "heatmap", title, caption)


def _beside(row: Any, view: View) -> str:
    """What a cell's candidate chose beside TP and EP."""
    parts = [f"DP {row['dp']}"] if row["dp"] > 1 else []
    parts += [f"PP {row['pp']}"] if row["pp"] > 1 else []
    parts += [f"{row['replicas']:g} replicas"] if row["replicas"] > 1 else []
    text = ", ".join(parts) or "one group"
    return f"{text}\n{row['device']}" if view.several_devices else text


def _heatmap_title(view: View, best: list[dict[str, Any]]) -> str:
    """``best``: of each cell, best first."""
    objective, first = view.objective, best[0]
    at = f"TP {first['tp']} with EP {first['ep']}"
    others = [row for row in best[1:] if row["meets"]]
    if not first["meets"]:
        return f"No cell meets the targets; {at} comes nearest with {view.write(first[objective.column])}"
    if not others:
        return f"Only {at} meets the targets"
    second = others[0]
    return (
        f"{at} is best: {view.write(first[objective.column])} {objective.words}, before TP {second['tp']} with "
        f"EP {second['ep']} at {view.write(second[objective.column])}"
    )
