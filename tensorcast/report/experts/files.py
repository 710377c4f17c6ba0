"""What ``tensorcast experts --out DIR`` writes: the page, its figure, all numbers, and the placement for engines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tensorcast.deploy.expert_study import engine_files
from tensorcast.files import check_directory, write_atomically, writing
from tensorcast.report.experts.words import MEANING, document, headline, page
from tensorcast.report.figures import COLOURS, save
from tensorcast.report.plain import to_json
from tensorcast.report.sections import page_html

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

    from tensorcast.cost.work import Array
    from tensorcast.deploy.expert_study import ExpertStudy


def write_experts(study: ExpertStudy, directory: Path) -> list[Path]:
    """Write all files into ``directory``, made if need be; each replaces one of its name when it is whole."""
    check_directory(directory)
    with writing("--out", directory):
        figure = draw(study, directory / "experts.png")
        texts = {
            "report.html": page_html(page(study), figure.read_bytes()),
            "experts.json": to_json(document(study), indent=2) + "\n", **engine_files(study),
        }
        for name, text in texts.items():
            write_atomically(directory / name, text)
    return [*(directory / name for name in texts), figure]


def draw(study: ExpertStudy, path: Path) -> Path:
    """Layers by ranks before and after, and the gain over redundant experts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.2), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(1.6, 1))
    top = float(max(study.before.max(), study.after.max(), 2.0))
    heats = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    for axes, loads, choice in zip(heats, (study.before, study.after), (study.own, study.best), strict=True):
        drawn = _heat(axes, loads, study.layers, top)
        copies = f", {choice.copies} copies" if choice.copies else ""
        axes.set_title(
            f"{MEANING.get(choice.placement, choice.placement)}{copies}: busiest {choice.busiest.mean():.2f} times the "
            f"mean, worst layer {choice.busiest.max():.2f}", fontsize=9, loc="left",
        )  # fmt: skip
    ticks = [tick for tick in (0.125, 0.25, 0.5, 1, 2, 4, 8) if 1 / top <= tick <= top]
    bar = figure.colorbar(drawn, ax=heats, label="load of a rank over the mean", shrink=0.9, ticks=ticks)
    bar.ax.set_yticklabels([f"{tick:g}" for tick in ticks])
    bar.ax.minorticks_off()
    _gains(figure.add_subplot(grid[1, 0]), study)
    _busiest(figure.add_subplot(grid[1, 1]), study)
    figure.suptitle(headline(study), x=0.01, ha="left", fontsize=11, fontweight="bold")
    return save(figure, path)


def _heat(axes: Axes, loads: Array, layers: tuple[int, ...], top: float) -> AxesImage:
    from matplotlib.colors import LogNorm

    low, high = (layers[0], layers[-1]) if len(layers) == len(loads) else (0, len(loads) - 1)
    drawn = axes.imshow(
        np.maximum(loads, 1 / top), aspect="auto", norm=LogNorm(1 / top, top), cmap="RdBu_r", interpolation="nearest",
        extent=(-0.5, loads.shape[1] - 0.5, high + 0.5, low - 0.5),
    )
    axes.set(xlabel="expert-parallel rank", ylabel="layer")
    return drawn


def _gains(axes: Axes, study: ExpertStudy) -> None:
    for name, colour in zip(("eplb", "eplb_global"), COLOURS, strict=False):
        points = sorted((one.copies, study.own.step_s / one.step_s) for one in study.choices if one.placement == name)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=MEANING[name])
    axes.axhline(study.own.step_s / study.perfect_s, color="black", linewidth=1, linestyle=":", label="perfect balance")
    axes.set(xlabel="redundant experts", ylabel="gain of a step (times)")
    axes.set_ylim(bottom=min(1.0, axes.get_ylim()[0]))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _busiest(axes: Axes, study: ExpertStudy) -> None:
    for loads, label, colour in ((study.before, "before", COLOURS[3]), (study.after, "after", COLOURS[0])):
        axes.plot(np.sort(loads.max(axis=1))[::-1], color=colour, label=label)
    axes.set(xlabel="layers, from the most uneven", ylabel="busiest rank over the mean")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
