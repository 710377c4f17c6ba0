"""A replay as a Chrome trace: servers over time, and what each request waited for; opens in ui.perfetto.dev."""

from __future__ import annotations

from typing import Any

import numpy as np

from tensorcast.scheduling.outcome import Outcome

MOST_SPANS = 5000
"""Requests that are drawn one by one: of more, the first. Servers are drawn over the whole replay."""

ROLES = {"both": "prefill and decode", "prefill": "prefill", "decode": "decode"}


def chrome_trace(found: Outcome) -> dict[str, Any]:
    """Counters of every server (requests that read, write and wait; cache in percent), and of each request a span of
    queue, prompt and reply under the server where its reply was written."""
    events: list[dict[str, Any]] = []
    for number, server in enumerate(found.servers):
        name = f"server {number}: {ROLES.get(server['role'], server['role'])}"
        events.append({"ph": "M", "pid": number, "tid": 0, "name": "process_name", "args": {"name": name}})
        moments = server["moments"]
        for i, at in enumerate(moments["time_s"]):
            held = {key: int(moments[key][i]) for key in ("decoding", "reading", "waiting")}
            events.append({"ph": "C", "pid": number, "name": "requests", "ts": _us(at), "args": held})
            used = round(100 * float(moments["cache_used"][i]), 2)
            events.append({"ph": "C", "pid": number, "name": "cache, %", "ts": _us(at), "args": {"used": used}})
    events += _spans(found)
    about = {"layout": found.layout, "requests": len(found.record.requests), "drawn": min(found.served, MOST_SPANS)}
    return {"displayTimeUnit": "ms", "otherData": about, "traceEvents": events}


def _spans(found: Outcome) -> list[dict[str, Any]]:
    record, requests = found.record, found.record.requests
    events: list[dict[str, Any]] = []
    for i in np.flatnonzero(np.isfinite(record.last_s))[:MOST_SPANS].tolist():
        args = {
            "input_len": int(requests.input_len[i]), "output_len": int(requests.output_len[i]),
            "cached_tokens": int(record.cached_tokens[i]), "started_over": int(record.preemptions[i]),
        }
        times = {
            "request": (record.sent_s, record.last_s), "queue": (record.sent_s, record.admitted_s),
            "prompt": (record.admitted_s, record.first_s), "reply": (record.first_s, record.last_s),
        }
        for name, (begin, end) in times.items():
            said = args if name == "request" else {}
            common = {"cat": "request", "id": i, "pid": int(record.server[i]), "tid": 0, "name": name}
            events.append({**common, "ph": "b", "ts": _us(begin[i]), "args": said})
            events.append({**common, "ph": "e", "ts": _us(end[i])})
    return events


def _us(seconds: float) -> float:
    return round(1e6 * float(seconds), 3)
