"""How every figure of a comparison looks, and how it is kept: an SVG file, and an SVG inside the page.

A figure has a band on top for its title, which says the finding. The page writes titles itself, so that they wrap on a
phone, and shows the SVG from below the band, its ink in the page's colours. Its browser makes PNGs of them, with the
band, where somebody wants one: pixels of all figures take as long as half a search.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensorcast.report import units

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE, PAPER = "#1f2329", "#5b636e", "#d5dae1", "#ffffff"
"""Text and axes, secondary text, grid lines, background: in the page each becomes a colour of its theme."""

THEMED = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", PAPER: "var(--paper)"}

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8c8c8c", "#a6761d")
"""Okabe and Ito's palette (https://jfly.uni-koeln.de/color/) but for yellow, which is lost on white."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
"""A shape for each colour: colour says nothing alone."""

WIDTH_IN = 7.6
LINE_IN = 0.215
TITLE_CHARACTERS, LABEL_CHARACTERS = 82, 24

PLATE = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.85, "pad": 1.0}
"""Behind a label that lies on lines."""

FONT, FONTS = "'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif"
"""The font that texts are measured in, and those that stand in where a reader has none: as wide, or at least alike."""

STYLE = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.labelsize": 10, "xtick.labelsize": 9.5, "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5, "svg.fonttype": "none", "svg.hashsalt": "tensorcast", "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": RULE, "grid.linewidth": 0.7, "axes.grid": True,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "figure.facecolor": PAPER, "axes.facecolor": "none", "hatch.linewidth": 0.6,
}


@dataclass(frozen=True)
class Chart:
    """A finished figure: file name without suffix, its finding, how to read it, and its drawings."""

    name: str
    title: str
    caption: str
    svg: str
    inline: str


def canvas(height_in: float, title: str) -> tuple[Figure, Axes]:
    """An empty figure with ``title`` in the band above one set of axes, ``height_in`` tall."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    lines = textwrap.wrap(title, TITLE_CHARACTERS)
    band = _band(title)
    total = height_in + band
    figure = Figure(figsize=(WIDTH_IN, total), layout="constrained", dpi=72)
    FigureCanvasSVG(figure)
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(rect=(0.0, 0.0, 1.0, height_in / total), w_pad=0.08, h_pad=0.06)  # type: ignore[call-arg]
    figure.text(
        0.11 / WIDTH_IN, 1 - 0.12 / total, "\n".join(lines), ha="left", va="top", fontsize=11, fontweight="bold",
        linespacing=1.25, gid="title", in_layout=False,
    )
    return figure, figure.add_subplot()


def style() -> AbstractContextManager[None]:
    """The context in which figures are made and saved: ``with style(): ...``."""
    import matplotlib

    return matplotlib.rc_context(STYLE)  # type: ignore[arg-type]


def finish(figure: Figure, name: str, title: str, caption: str) -> Chart:
    """Lay ``figure`` out once, render it once, and cut the SVG for the page."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine(None)  # else saving lays it out anew, and draws it once more to see how
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", dpi=160, metadata={"Date": None, "Title": title})
    svg = drawn.getvalue().replace(FONT, FONTS)
    return Chart(name=name, title=title, caption=caption, svg=svg, inline=inline(svg, name, title))


def inline(svg: str, name: str, title: str) -> str:
    """``svg`` for the inside of a page: no prologue, seen from below its title, ids of its own, the theme's colours."""
    from xml.sax.saxutils import quoteattr

    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r"<title>.*?</title>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r"<style\b.*?</style>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", body)
    for colour, variable in THEMED.items():
        body = body.replace(colour, variable)
    body = re.sub(r"[ \t]*\n[ \t]*", "\n", body)

    def opening(found: re.Match[str]) -> str:
        width, height = (float(number) for number in found["box"].split()[2:])
        top = 72 * _band(title) - 4
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
            f'aria-label={quoteattr(title)} viewBox="0 {top:g} {width:g} {height - top:g}">'
        )

    return re.sub(r'<svg [^>]*viewBox="(?P<box>[^"]*)"[^>]*>', opening, body, count=1)


def _band(title: str) -> float:
    """Height of the title's band in inches."""
    return LINE_IN * len(textwrap.wrap(title, TITLE_CHARACTERS)) + 0.16


def wrapped(label: str) -> str:
    """A layout's name on as many lines as it needs beside a figure, broken before ``>`` and ``on``."""
    lines: list[str] = []
    for piece in re.split(r" (?=> |on )", label):
        if lines and len(lines[-1]) + len(piece) < LABEL_CHARACTERS:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece)
    return "\n".join(lines)


def lines_of(labels: Iterable[str]) -> int:
    """Lines of the tallest of some wrapped labels."""
    return max(label.count("\n") + 1 for label in labels)


def row_in(labels: Iterable[str]) -> float:
    """Height in inches of a bar that each of ``labels`` has room beside."""
    return max(0.4, 0.08 + 0.165 * lines_of(labels))


def spread(positions: Sequence[float], gap: float, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """``positions`` moved apart as little as need be for labels ``gap`` tall between ``low`` and ``high``, in order."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = [positions[i] for i in order]
    for _ in range(200):
        moved = False
        for i in range(len(placed) - 1):
            if (short := gap - (placed[i + 1] - placed[i])) > 1e-9:
                placed[i], placed[i + 1] = placed[i] - short / 2, placed[i + 1] + short / 2
                moved = True
        if not moved:
            break
    last = len(placed) - 1
    placed = [min(position, high - (last - i) * gap) for i, position in enumerate(placed)]
    placed = [max(position, low + i * gap) for i, position in enumerate(placed)]
    result = [0.0] * len(placed)
    for i, position in zip(order, placed, strict=True):
        result[i] = position
    return result


def places(values: Sequence[float]) -> tuple[list[float], list[str]]:
    """Ticks of a logarithmic axis over ``values``, about four or more, and their labels: 1, 2, 5, 10, 20 ..."""
    low, high = min(values), max(values)
    ticks = [
        step * 10.0**power
        for power in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        for step in (1, 2, 5)
    ]
    ticks = [tick for tick in ticks if low / 1.05 <= tick <= high * 1.05]
    return ticks, [short(tick) for tick in ticks]


def short(value: float) -> str:
    """Three digits at most and a prefix, no zeros that say nothing: ``0.5``, ``15``, ``200T``."""
    number, prefix = units.scaled(value) if value >= 999.5 else (units.digits(value), "")
    return f"{float(number):g}{prefix}"
