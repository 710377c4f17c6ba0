"""Figures that can be read alone: the title says the finding, axes have units, colours suit the colour-blind."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tensorcast.deploy.step.breakdown import KERNEL_GROUPS, Spent, breakdown, kernel_group
from tensorcast.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tensorcast.deploy.result import Simulation

COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#999999", "#CC79A7")
"""Okabe and Ito's palette (https://jfly.uni-koeln.de/color/)."""


def seconds_by_group(run: Simulation) -> dict[str, float]:
    """Seconds of one GPU's step per group of :data:`KERNEL_GROUPS`; with pipeline stages it waits besides."""
    made = breakdown(run.price, run.deployment.layout.pp, kernel_group)
    found = {name: made.groups.get(name, Spent()).seconds for name in KERNEL_GROUPS}
    found["engine"] = made.overhead_s
    # what passes while other kernels run: communication, and shared experts (dense GEMMs) on a stream of their own
    found["token exchange"] -= made.hidden_comm_s
    found["dense GEMM"] -= made.hidden_s - made.hidden_comm_s
    return found


def step_bars(runs: Mapping[str, Simulation], title: str, path: Path) -> Path:
    """Where a step's time goes, one stacked bar per run; the whisker is the step's interval. PNG or SVG by suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 1.7 + 0.62 * len(runs)), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(runs)
    parts = [seconds_by_group(run) for run in runs.values()]
    left = [0.0] * len(names)
    for group, colour in zip(KERNEL_GROUPS, COLOURS, strict=True):
        widths = [1e3 * part[group] for part in parts]
        if max(widths) > 0:
            axes.barh(names, widths, left=left, color=colour, label=group, height=0.62)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, run in enumerate(runs.values()):
        low, high = (1e3 * s for s in run.interval_s)
        axes.plot([low, high], [i, i], color="black", linewidth=1.2, marker="|", markersize=7)
        axes.annotate(
            f"{1e3 * run.step_s:.1f} ms   {run.tokens_per_s_per_gpu:,.0f} tokens/s per GPU",
            (high, i),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_xlim(0, 1.5 * max(1e3 * run.interval_s[1] for run in runs.values()))
    axes.set_xlabel("time of one step, ms (black: 80 % interval from the kernels' held-out errors)")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return save(figure, path)


def save(figure: Figure, path: Path) -> Path:
    """Render by ``path``'s suffix, then write at once."""
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix.removeprefix("."))
    write_atomically(path, image.getvalue())
    return path
