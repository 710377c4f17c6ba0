"""A page as headed sections of sentences and tables, written as Markdown or as one HTML file."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass

Head = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Head and rows of text; ``align`` has one letter per column, l or r."""

    head: Head
    rows: list[list[str]]
    align: str


@dataclass(frozen=True)
class Section:
    """A heading, its sentences, and perhaps a table or the figure's file name."""

    title: str
    text: tuple[str, ...] = ()
    table: Table | None = None
    figure: str = ""


def markdown(page: list[Section]) -> str:
    """Tables as GitHub reads them; figures by their file names."""
    lines: list[str] = []
    for level, section in enumerate(page):
        lines += [f"{'#' if level == 0 else '##'} {section.title}", ""]
        for text in section.text:
            lines += [text, ""]
        if section.figure:
            lines += [f"![{section.title}]({section.figure})", ""]
        if section.table is not None:
            table = section.table
            lines.append("| " + " | ".join(table.head) + " |")
            lines.append("|" + "|".join("---:" if side == "r" else "---" for side in table.align) + "|")
            lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:76em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}
td,th{padding:.25em .7em;border-bottom:1px solid #ddd}
th{text-align:left;background:#f5f5f5}td.r,th.r{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}"""


def page_html(page: list[Section], figure: bytes | None = None) -> str:
    """One file that needs nothing beside it."""
    out = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(page[0].title)}</title>"
           f"<style>{STYLE}</style>"]
    for level, section in enumerate(page):
        out.append(f"<h{1 if level == 0 else 2}>{html.escape(section.title)}</h{1 if level == 0 else 2}>")
        out += [f"<p>{html.escape(text)}</p>" for text in section.text]
        if section.figure and figure is not None:
            image, says = base64.b64encode(figure).decode(), html.escape((*section.text, section.title)[0])
            out.append(f'<img alt="{says}" src="data:image/png;base64,{image}">')
        if section.table is not None:
            table = section.table
            out.append("<table>" + _row(list(table.head), table.align, "th"))
            out += [_row(row, table.align, "td") for row in table.rows]
            out.append("</table>")
    return "\n".join(out) + "\n"


def _row(cells: list[str], align: str, tag: str) -> str:
    inside = (f"<{tag} class={side}>{html.escape(cell)}</{tag}>" for cell, side in zip(cells, align, strict=True))
    return f"<tr>{''.join(inside)}</tr>"
