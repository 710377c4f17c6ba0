"""A replay as files: a page, a row per request, a document, a trace, a figure."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np

from tensorcast.files import write_atomically
from tensorcast.report.figures import COLOURS, save
from tensorcast.report.plain import to_json
from tensorcast.report.replay import words
from tensorcast.report.replay.chrome_trace import chrome_trace
from tensorcast.report.replay.page import sections
from tensorcast.report.sections import page_html
from tensorcast.scheduling.outcome import Outcome


def write_replay(found: Outcome, folder: Path) -> list[Path]:
    """``report.html``, ``requests.parquet`` and ``.csv``, ``broken.csv``, ``summary.json``, ``trace.json``
    (Chrome's format) and ``replay.png`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    frame, content = found.per_request(), io.BytesIO()
    frame.to_parquet(content)
    picture = draw(found, folder / "replay.png").read_bytes() if found.served else None
    files: dict[str, str | bytes] = {
        "report.html": page_html(sections(found), picture), "requests.parquet": content.getvalue(),
        "requests.csv": frame.to_csv(index_label="request"),
        "broken.csv": found.broken().to_csv(index=False),
        "summary.json": to_json(words.document(found), indent=2) + "\n",
        "trace.json": json.dumps(chrome_trace(found), separators=(",", ":")),
    }
    for name, written in files.items():
        write_atomically(folder / name, written)
    return [folder / name for name in files] + ([folder / "replay.png"] if found.served else [])


def draw(found: Outcome, path: Path) -> Path:
    """How long requests wait (share of them within a time), what servers did and how full they were over time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9.5, 7.6), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    within, over_time, cache = figure.subplots(3, 1, height_ratios=(3, 3, 1.6))
    names = {"ttft_s": "time to first token", "tpot_s": "time per output token", "request_s": "whole request"}
    for (key, label), colour in zip(names.items(), COLOURS, strict=False):
        values = np.sort(found.times[key][np.isfinite(found.times[key])])
        within.plot(values, 100 * (np.arange(len(values)) + 1) / len(values), color=colour, label=label)
        limit = getattr(found.limits, key)
        if limit is not None:
            within.axvline(limit, color=colour, linestyle=":", linewidth=1.2)
    within.set_xscale("log")
    within.set(xlabel="seconds (dotted: limit)", ylabel="% of requests within", ylim=(0, 101))
    within.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    numbers = found.summary()
    within.set_title(words.headline(found, numbers), fontsize=10, loc="left")
    moments = [server["moments"] for server in found.servers]
    end = max((float(m["time_s"][-1]) for m in moments if len(m["time_s"])), default=1.0)
    grid = np.linspace(0, end, 400)
    states = {"decoding": "writing replies", "reading": "reading prompts", "waiting": "waiting"}
    for (key, label), colour in zip(states.items(), COLOURS, strict=False):
        total = sum(_held(m["time_s"], m[key], grid) for m in moments)
        over_time.plot(grid, total, color=colour, label=label, linewidth=1.2)
    for role, colour in zip(dict.fromkeys(server["role"] for server in found.servers), COLOURS, strict=False):
        used = [_held(s["moments"]["time_s"], s["moments"]["cache_used"], grid) for s in found.servers
                if s["role"] == role]  # fmt: skip
        label = "the fullest cache" if role == "both" else f"the fullest cache of {role}"
        cache.plot(grid, 100 * np.max(used, axis=0), color=colour, label=label, linewidth=1.2)
    spare = len(dict.fromkeys(server["role"] for server in found.servers))
    middles, busy = _busy(found, end)
    cache.plot(middles, 100 * busy, color=COLOURS[spare], label="servers that run a step", linewidth=1.2)
    cache.set(xlabel="seconds since the first request", ylabel="%", xlim=(0, end), ylim=(0, 101))
    cache.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    over_time.set(ylabel="requests", xlim=(0, end))
    over_time.set_ylim(bottom=0)
    over_time.yaxis.set_major_locator(MaxNLocator(integer=True))
    over_time.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return save(figure, path)


def _busy(found: Outcome, end: float, parts: int = 100, each: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Middles of ``parts`` of the time, and the share of the servers that are there which run a step, in the mean."""
    grid = (np.arange(parts * each) + 0.5) * end / (parts * each)
    runs, there = np.zeros(len(grid)), np.zeros(len(grid))
    for server in found.servers:
        moments, lost = server["moments"], server["lost_s"]
        here = (grid >= server["from_s"]) & (grid < (np.inf if lost is None else lost))
        working = np.minimum(moments["reading"] + moments["decoding"], 1.0)
        runs, there = runs + here * _held(moments["time_s"], working, grid), there + here
    share = np.divide(runs, there, out=np.zeros(len(grid)), where=there > 0)
    return grid.reshape(parts, each).mean(axis=1), share.reshape(parts, each).mean(axis=1)


def _held(times: np.ndarray, values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The value that holds at each moment of ``grid``: that of the last moment before."""
    if not len(times):
        return np.zeros(len(grid))
    at = np.searchsorted(times, grid, side="right") - 1
    return np.where(at < 0, 0.0, values[np.maximum(at, 0)])
