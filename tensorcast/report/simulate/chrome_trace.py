"""A step as a Chrome trace (Trace Event Format, JSON object form): open it in Perfetto or chrome://tracing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from tensorcast.report.simulate.rows import calls
from tensorcast.report.simulate.words import COLLECTIVES, headline, workload

if TYPE_CHECKING:
    from tensorcast.deploy.result import Simulation

TRACKS = {"compute": 1, "communication": 2, "host": 3}
"""Thread id of each track. ``host`` holds what the engine adds to a step beside its kernels."""

_PROCESS = 1


def chrome_trace(run: Simulation) -> dict[str, Any]:
    """One GPU's step, layers in order, one track per stream; timestamps and durations in microseconds.

    With pipeline stages: one micro-batch on its way through all of them.
    """
    totals = run.totals()
    events = _metadata(f"GPU: {headline(totals)}")
    clock = 0.0
    if totals["overhead_s"]:
        clock = round(totals["overhead_s"] * 1e6, 3)
        events.append(_event("engine overhead", "host", "overhead", start=0.0, end=clock, args={}))
    total = clock
    for record, layer in calls(run):
        start = clock
        total += record["seconds_per_call"] * 1e6
        # Rounded ends, not rounded durations: neighbours touch and errors do not add up.
        clock = round(total, 3)
        track = "communication" if record["op"] in COLLECTIVES else "compute"
        args = {"module": _module(record["module"], layer), "shape": record["shape"]}
        for key in ("flops", "bytes", "wire_bytes"):
            if record[key]:
                args[key] = record[key] / record["count"]
        args |= {key: record[key] for key in ("detail", "bound", "evidence") if record[key]}
        if layer is not None:
            args["layer"] = layer
        events.append(_event(record["op"], track, record["family"], start=start, end=clock, args=args))
    about = {"step": headline(totals), "workload": workload(totals), "step_us": totals["step_s"] * 1e6}
    if totals["hidden_s"]:  # kernels are drawn one after another
        about["overlap"] = f"{totals['hidden_s'] * 1e6:.1f} us of these kernels pass while others run"
    return {"displayTimeUnit": "ms", "otherData": about, "traceEvents": events}


def _metadata(process: str) -> list[dict[str, Any]]:
    def named(kind: str, track: int, **args: Any) -> dict[str, Any]:
        return {"name": kind, "ph": "M", "pid": _PROCESS, "tid": track, "args": args}

    return [named("process_name", 0, name=process)] + [
        event
        for name, track in TRACKS.items()
        for event in (named("thread_name", track, name=name), named("thread_sort_index", track, sort_index=track))
    ]


def _event(
    name: str, track: str, category: str, *, start: float, end: float, args: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": name, "cat": category, "ph": "X", "pid": _PROCESS, "tid": TRACKS[track], "ts": start,
        "dur": round(end - start, 3), "args": args,
    }


def _module(module: str, layer: int | None) -> str:
    """``layers[3-60].mlp`` of one layer: ``layers[17].mlp``."""
    return module if layer is None else re.sub(r"\[[^\]]*\]", f"[{layer}]", module, count=1)
