"""A simulation on a terminal, from 80 columns up: what was simulated, totals, memory, and the costliest ops."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tensorcast.report import units
from tensorcast.report.simulate import words
from tensorcast.report.simulate.rows import records
from tensorcast.report.units import plural

if TYPE_CHECKING:
    from tensorcast.deploy.result import Simulation

WITH_SIZES = 72
"""Columns from which the op table shows FLOPs and bytes: below, whole numbers rather than all of them."""

WITH_SHAPE = 100
"""Columns from which the op table shows shapes."""

SIDE_BY_SIDE = 110
"""Columns from which the two panels stand side by side."""

WITH_UNITS = 140
"""Columns from which sizes carry their unit, module paths their full start, and evidence is a word, not a letter."""

_BOUND_STYLE = {"compute": "green", "memory": "yellow", "network": "magenta", "latency": "cyan"}


def print_simulation(run: Simulation, console: Console, top: int = 20) -> None:
    """Print ``run`` with its ``top`` costliest ops, laid out for the console's width."""
    t = run.totals()
    console.print(Text(words.headline(t), style="bold"))
    console.print(Text(words.workload(t)))
    console.print(Text(words.numerics(t), style="dim"))
    _print_panels(t, console)
    rows = records(run)
    console.print(_ops(rows, t, top, console.width))
    console.print(_foot(rows[:top], t, console.width))


def _print_panels(t: dict[str, Any], console: Console) -> None:
    if console.width < SIDE_BY_SIDE:
        for title, inside in (("Step", _step(t)), ("Memory per GPU", _memory(t, console.width, console))):
            console.print(Panel(inside, title=title, title_align="left"))
        return
    widths = (console.width - 1) * 11 // 20, (console.width - 1) - (console.width - 1) * 11 // 20
    contents = _step(t), _memory(t, widths[1], console)
    lines = [
        len(console.render_lines(inside, console.options.update(width=width - 4)))
        for inside, width in zip(contents, widths, strict=True)
    ]
    both = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
    both.add_row(*(
        Panel(inside, title=title, title_align="left", width=width, height=max(lines) + 2)
        for title, inside, width in zip(("Step", "Memory per GPU"), contents, widths, strict=True)
    ))
    console.print(both)


def _step(t: dict[str, Any]) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for name, value in words.step_lines(t):
        grid.add_row(name, Text(value, style="bold" if name in ("step time", "output speed", "prompt speed") else ""))
    return grid


def _memory(t: dict[str, Any], width: int, console: Console) -> RenderableType:
    bar = max(8, min(30, width - 40))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(width=bar, no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    for row in words.memory_rows(t):
        style = "" if row.name != "total" else "bold" if t["fits"] else "bold red"
        drawn = _bar(row.share, bar, console.options.ascii_only)
        grid.add_row(
            row.name, Text(units.nbytes(row.bytes), style=style), Text(drawn, style=style or "blue"),
            Text(units.percent(row.share), style=style),
        )
    said = Text(words.verdict(t), style="green" if t["fits"] else "bold red")
    return Group(grid, said, Text(words.largest(t)), *map(Text, words.logged(t)))


def _bar(share: float, width: int, ascii_only: bool) -> str:
    """A bar of ``share`` of ``width`` columns, in eighths; what overflows the budget ends in ``>``."""
    if share > 1:
        return ("#" if ascii_only else "█") * (width - 1) + ">"
    if ascii_only:
        return "#" * round(share * width)
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _ops(rows: list[dict[str, Any]], t: dict[str, Any], top: int, width: int) -> RenderableType:
    """The costliest ops. Numbers keep their width; op, module and shape share what is left."""
    shown, rest = rows[:top], rows[top:]
    gap = 2 if width >= WITH_UNITS else 1
    numbers = [_numbers(row, width) for row in shown]
    if rest:
        added = ("count", "flops", "bytes", "wire_bytes", "seconds", "share")
        total = {key: sum(row[key] for row in rest) for key in added}
        numbers.append(_numbers({**total, "bound": "", "evidence": ""}, width))
    heads = ["n", "FLOPs", "bytes", "time", "share", "bound", "evidence" if width >= WITH_UNITS else "e"]
    sizes = [max([len(head), *(len(cells[i]) for cells in numbers)]) + gap for i, head in enumerate(heads)]
    left_out = {"FLOPs", "bytes"} if width < WITH_SIZES else set()
    taken = sum(size for head, size in zip(heads, sizes, strict=True) if head not in left_out)
    names = [_op_name(row) for row in shown] + ([f"+ {plural(len(rest), 'more op')}"] if rest else [])
    modules, shapes = [_module(row, width) for row in shown], [_shape(row, words.shape(row, t), width) for row in shown]
    left = max(24, width - taken)
    widths = _split(left, gap, [names, modules, shapes] if width >= WITH_SHAPE else [names, modules])
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0), header_style="bold",
        title=Text(f"Costliest ops, {len(shown)} of {len(rows)}", style="bold"), title_justify="left", title_style="",
    )
    for head, size in zip(("op", "module", "shape"), widths, strict=False):
        table.add_column(head, width=size, no_wrap=True)
    for head in heads:
        if head not in left_out:
            table.add_column(head, no_wrap=True, justify="left" if head in ("bound", "evidence", "e") else "right")
    for i, cells in enumerate(numbers):
        texts = [names[i], modules[i] if i < len(shown) else "", shapes[i] if i < len(shown) else ""]
        fitted = [fit(texts[0], widths[0]), fit_path(texts[1], widths[1]), *(fit(texts[2], w) for w in widths[2:])]
        style = "" if i < len(shown) else "dim"
        bound, kept = cells[-2], [cell for head, cell in zip(heads[:-2], cells, strict=False) if head not in left_out]
        table.add_row(
            *(Text(text, style=style) for text in (*fitted, *kept)),
            Text(bound, style=_BOUND_STYLE.get(bound, style)), Text(cells[-1], style=style),
        )
    return table


def _numbers(row: dict[str, Any], width: int) -> list[str]:
    """Count, FLOPs, bytes (of collectives: on the wire), time, share, bound and evidence of one row."""
    wide = width >= WITH_UNITS
    moved = row["bytes"] + row["wire_bytes"]
    return [
        units.count(row["count"]), _large(row["flops"], wide, units.flops), _large(moved, wide, units.nbytes),
        units.seconds(row["seconds"]), units.percent(row["share"]), row["bound"],
        row["evidence"] if wide else row["evidence"][:1],
    ]


def _large(value: float, wide: bool, full: Callable[[float], str]) -> str:
    return full(value) if wide and value else units.short(value)


def _op_name(row: dict[str, Any]) -> str:
    return str(row["op"]).removeprefix("pointwise:")


def _module(row: dict[str, Any], width: int) -> str:
    """Module path; of a collective on a narrow terminal its group and tier, which say more."""
    if row["op"] in words.COLLECTIVES and width < WITH_SHAPE:
        return " ".join(str(row["detail"]).split()[:2])
    module = str(row["module"])
    return module if width >= WITH_UNITS else re.sub(r"^\w+(?=\[)", "", module)  # layers[3-60].mlp: [3-60].mlp


def _shape(row: dict[str, Any], shape: str, width: int) -> str:
    """Shape and weight scheme; of a collective what it carries, its group, tier and algorithm."""
    if width < WITH_UNITS:
        shape = shape.replace("] x [", "]x[").replace(", ", ",")
    return f"{shape} {row['detail']}".strip()


def _split(width: int, gap: int, columns: list[list[str]]) -> list[int]:
    """Widths of text columns that share ``width``: what each needs, the widest cut first where it does not suffice."""
    needs = [max([6, *map(len, texts)]) for texts in columns]
    room = width - gap * (len(columns) - 1)
    while sum(needs) > room and max(needs) > 6:
        needs[needs.index(max(needs))] -= 1
    return needs


def fit(text: str, width: int) -> str:
    """``text`` cut at the right to ``width`` characters."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def fit_path(path: str, width: int) -> str:
    """A module path shortened from the left, at a dot where one is near: its end says what it is."""
    if len(path) <= width:
        return path
    tail = path[len(path) - width + 1 :]
    head, dot, rest = tail.partition(".")
    return "…" + (rest if dot and len(head) < width // 3 else tail)


def _foot(shown: list[dict[str, Any]], t: dict[str, Any], width: int) -> RenderableType:
    """What the letters mean, and the notes."""
    lines = []
    if shown and width < WITH_UNITS:
        said = {"m": "measured", "c": "calibrated", "d": "datasheet"}
        used = {row["evidence"][:1] for row in shown}
        lines.append("n calls per step; e evidence: " + ", ".join(f"{k} {v}" for k, v in said.items() if k in used))
    if width >= WITH_SIZES and any(row["op"] in words.COLLECTIVES for row in shown):
        lines.append("bytes of collectives: on the wire, per GPU")
    if t["pp"] > 1:
        lines.append(f"pipeline: rows are one micro-batch on its way through all {t['pp']} stages")
    if width >= WITH_SHAPE and (legend := words.legend(words.shape(row, t) for row in shown)):
        lines.append(legend)
    texts = [Text(line, style="dim") for line in lines]
    return Text("\n").join([*texts, *(Text(f"note: {note}") for note in t["notes"])])
