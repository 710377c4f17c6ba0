"""A step as a Chrome trace (Trace Event Format, JSON object form): open it in Perfetto or chrome://tracing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from tensorcast.report.simulate.rows import Call, calls
from tensorcast.report.simulate.words import COLLECTIVES, headline, workload

if TYPE_CHECKING:
    from tensorcast.deploy.result import Simulation

TRACKS = {"compute": 1, "communication": 2, "host": 3, "second stream": 4}
"""Thread id of each track. ``host`` holds what the engine adds to a step beside its kernels, ``second stream`` shared
experts that run beside others."""

_PROCESS = 1


def chrome_trace(run: Simulation) -> dict[str, Any]:
    """One GPU's step, layers in order, one track per stream; timestamps and durations in microseconds.

    With pipeline stages: one micro-batch on its way through all of them.
    """
    totals = run.totals()
    events = _metadata(f"GPU: {headline(totals)}")
    begun = totals["overhead_s"] * 1e6
    if begun:
        events.append(_event("engine overhead", "host", "overhead", start=0.0, end=round(begun, 3), args={}))
    drawn = list(calls(run))
    # of two half batches one computes while the other exchanges; else shared experts have a stream of their own
    hidden = {"communication": totals["hidden_s"], "second stream": 0.0}
    if not run.deployment.options.dual_batch_overlap:
        hidden["communication"] = totals["hidden_comm_s"]
        hidden["second stream"] = totals["hidden_s"] - totals["hidden_comm_s"]
    streams = _Streams(begun, _hidden_shares(drawn, hidden))
    for record, layer in drawn:
        track = _track(record, hidden)
        # Rounded ends, not rounded durations: neighbours touch and errors do not add up.
        start, end = (round(at, 3) for at in streams.run(track, record["seconds_per_call"] * 1e6))
        args = {"module": _module(record["module"], layer), "shape": record["shape"]}
        for key in ("flops", "bytes", "wire_bytes"):
            if record[key]:
                args[key] = record[key] / record["count"]
        args |= {key: record[key] for key in ("detail", "bound", "evidence") if record[key]}
        if layer is not None:
            args["layer"] = layer
        events.append(_event(record["op"], track, record["family"], start=start, end=end, args=args))
    about = {"step": headline(totals), "workload": workload(totals), "step_us": totals["step_s"] * 1e6}
    if totals["hidden_s"]:
        about["overlap"] = (
            f"{totals['hidden_s'] * 1e6:.1f} us of these kernels pass while others run: each is drawn as much earlier "
            "as its part of that, as if it had no other to wait for"
        )
    return {"displayTimeUnit": "ms", "otherData": about, "traceEvents": events}


class _Streams:
    """When kernels run: one after another, but for what is hidden behind kernels of other tracks."""

    def __init__(self, begun: float, shares: dict[str, float]) -> None:
        self._now, self._shares = begun, shares
        self._free = dict.fromkeys(TRACKS, begun)
        self._owed = 0.0

    def run(self, track: str, takes: float) -> tuple[float, float]:
        """Begin and end of the next kernel, in microseconds: earlier by what is to be hidden, not before its track is
        free. What finds no place there is hidden behind the next ones."""
        self._owed += takes * self._shares.get(track, 0.0)
        start = max(self._now - min(self._owed, takes), self._free[track])
        self._owed -= self._now - start
        self._free[track] = start + takes
        self._now = max(self._now, self._free[track])
        return start, self._free[track]


def _track(record: dict[str, Any], hidden: dict[str, float]) -> str:
    if record["op"] in COLLECTIVES:
        return "communication"
    return "second stream" if hidden["second stream"] > 0 and "shared_expert" in record["module"] else "compute"


def _hidden_shares(drawn: list[Call], hidden: dict[str, float]) -> dict[str, float]:
    """By track the part of its kernels' time that passes behind others', of the ``hidden`` seconds."""
    spent = dict.fromkeys(hidden, 0.0)
    for record, _ in drawn:
        if (track := _track(record, hidden)) in spent:
            spent[track] += record["seconds_per_call"]
    return {track: min(1.0, hidden[track] / seconds) for track, seconds in spent.items() if seconds}


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
