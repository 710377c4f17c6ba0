"""One candidate from close by: where its step's time goes, its roofline, a layer's time line, memory, launch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tensorcast.deploy.deployment import Deployment
from tensorcast.deploy.explain import Side, compared_groups, elasticities
from tensorcast.deploy.options import OPTIONS, flag
from tensorcast.deploy.plan.plan import Collective
from tensorcast.deploy.step.breakdown import kernel_group
from tensorcast.deploy.step.price import StepPrice
from tensorcast.explore.answer import Found
from tensorcast.explore.question import Question
from tensorcast.report import units
from tensorcast.report.compare import words
from tensorcast.report.compare.choices import Choice, View, step_parts
from tensorcast.report.compare.roofline import costliest
from tensorcast.report.compare.steps import MEMORY, PART_COLOURS
from tensorcast.report.compare.takeaway import takeaways
from tensorcast.report.layout_words import layout_words
from tensorcast.search.candidate_table import COLUMNS, WORDS, Candidates
from tensorcast.search.compare import Comparison

Row = dict[str, Any]


def details(asked: Question, found: Found) -> dict[str, Any]:
    """All of it, for a candidate at its own batch and its users' lengths."""
    view, choice = _alone(asked, found)
    row, load = found.row, view.comparison.tasks[0].load
    decode = choice.decode.step.price(float(row["batch"]), 1.0, float(load.context))
    # where prompts are another pool's, steps take longer than their kernels, as served runs show
    slower = choice.decode.engine.overhead.pool_factor if row["mode"] == "disaggregated" else 1.0
    prompt = float(load.input_len - load.prefix_cached)
    prefill = choice.prefill.step.price(1.0, prompt, float(load.prefix_cached))
    return {
        "key": row["key"], "batch": row["batch"], "name": row["name"], "plain": row["plain"],
        "options": words.options(row),
        "steps": [
            _step("decode", "one token for every sequence", choice.decode, decode, slower),
            _step("prefill", "one prompt, by itself", choice.prefill, prefill),
        ],
        "roofline": _roofline(choice.decode, decode), "line": _time_line(choice.decode, decode),
        "memory": _memory(row),
        "launch": [
            {"engine": one.engine, "version": one.version, "file": one.file, "script": one.script,
             "problem": one.problem} for one in takeaways(view)
        ],
        "simulate": _simulate(asked, row, choice.decode),
    }  # fmt: skip


def versus(asked: Question, a: Found, b: Found) -> dict[str, Any]:
    """Two candidates side by side, each at its own batch: decode steps by group of ops, and what would help each."""
    sides = []
    for found in (a, b):
        view, choice = _alone(asked, found)
        one, batch, past = choice.decode, float(found.row["batch"]), float(view.comparison.tasks[0].load.context)
        sides.append(Side(one, batch, one.step.price(batch, 1.0, past), int(found.row["largest_batch"])))
    first, second = sides
    groups = compared_groups(first, second)
    return {
        "groups": [
            {key: row[key] for key in ("group", "seconds_a", "seconds_b", "saved_s", "why")}
            | {f"{side}_text": units.seconds(row[f"seconds_{side}"]) for side in "ab"}
            for row in groups.to_dict("records")
        ],
        "steps": [
            {"layout": side.name, "words": layout_words(side.deployment.layout, _experts(side.deployment)),
             "seconds": side.step_s, "text": units.seconds(side.step_s), "batch": side.batch,
             "exposed": units.seconds(float(side.price.exposed_comm_s)),
             "hidden": units.seconds(float(side.price.hidden_comm_s))} for side in sides
        ],
        "elasticities": elasticities(first, second, 1, int(past)).to_dict("records"),
    }  # fmt: skip


def _experts(deployment: Deployment) -> bool:
    return bool(deployment.raw.facts.num_experts)


def _alone(asked: Question, found: Found) -> tuple[View, Choice]:
    """The comparison of one candidate with itself, which the report's parts read."""
    row = found.row
    own = {name: row[name] for name in COLUMNS}
    kept = Candidates({name: np.array([value], dtype=object if name in WORDS else None) for name, value in own.items()})
    tasks = [
        task for task in asked.tasks()
        if [one.device.name for one in task.pools or (task,)] == row["device"].split(" > ")
        and task.engine.name == row["engine"]
    ]
    first = tasks[0]
    scenario = first.pools_scenario if row["mode"] == "disaggregated" else first.scenario
    comparison = Comparison(
        model=first.model, devices=tuple([one.device for one in first.pools or (first,)]), engine=first.engine,
        objective=first.objective,
        targets=(first.ttft_s, first.tpot_s), input_len=int(first.load.input_len),
        output_len=int(first.load.output_len), kept=kept, pruned={}, best=own, runner_up=None,
        judged=False, notes=(), tasks=tuple(tasks), behind={row["candidate"]: (scenario, found.prefill, found.decode)},
    )  # fmt: skip
    view = View(comparison)
    return view, replace(view.shown[0], label=row["name"])


def _step(
    name: str, what: str, deployment: Deployment, price: StepPrice, slower: float = 1.0
) -> dict[str, Any]:
    """``slower``: by which it takes longer than its kernels and their launches, as waiting."""
    split = step_parts(deployment, price)
    own = split.parts | {"waiting": split.parts["waiting"] + (slower - 1.0) * split.seconds}
    split = replace(split, parts=own, seconds=split.seconds * slower)
    parts = [
        {"part": part, "seconds": seconds, "text": units.seconds(seconds), "colour": PART_COLOURS[part]}
        for part, seconds in split.parts.items() if seconds > 0.0005 * split.seconds
    ]
    return {
        "name": name, "what": what, "layout": str(deployment.layout),
        "words": layout_words(deployment.layout, _experts(deployment)), "seconds": split.seconds,
        "text": units.seconds(split.seconds), "parts": parts, "hidden": units.seconds(split.hidden_s),
        "hidden_s": split.hidden_s,
    }


def _roofline(deployment: Deployment, price: StepPrice) -> dict[str, Any]:
    device = deployment.device
    bandwidth = float(device.memory_bandwidth_bytes_per_s)
    peaks = {float(f"{float(value):.4g}"): name for name, value in reversed(device.peak_flops.items())}
    ops = [
        {
            "name": op["name"], "group": op["group"], "colour": PART_COLOURS[op["group"]], "share": op["share"],
            "share_text": units.percent(op["share"]), "intensity": op["flops"] / op["bytes"],
            "rate": op["flops"] / op["seconds"], "rate_text": units.flop_rate(op["flops"] / op["seconds"]),
            "roof_share": units.percent(
                op["flops"] / op["seconds"] / min(op["peak"], bandwidth * op["flops"] / op["bytes"])
            ),
            "peak": op["peak"],
        }
        for op in costliest(price)
    ]
    roofs = [
        {"peak": peak, "name": peaks.get(peak, "compute"), "text": units.flop_rate(peak)}
        for peak in sorted({op["peak"] for op in ops})
    ]
    return {"ops": ops, "roofs": roofs, "bandwidth": bandwidth, "bandwidth_text": units.byte_rate(bandwidth)}


def _time_line(deployment: Deployment, price: StepPrice) -> dict[str, Any]:
    """One layer of the kind that takes longest, kernel by kernel: arithmetic on one track, what is sent on another.

    Of communication the hidden share runs beside arithmetic, so it is drawn to begin as much earlier.
    """
    by_kind: dict[int, list[tuple[Any, float]]] = {}
    for row, count in price.calls:
        if row.row.kind >= 0 and float(np.max(count)) > 0:
            by_kind.setdefault(row.row.kind, []).append((row, float(np.max(count))))
    if not by_kind:
        return {"spans": [], "seconds": 0.0, "hidden": ""}
    calls = max(by_kind.values(), key=lambda rows: sum(float(row.seconds) * count for row, count in rows))
    every = [(row, count) for rows in by_kind.values() for row, count in rows if isinstance(row.row, Collective)]
    sent = sum(float(row.seconds) * count for row, count in every)
    hidden = min(1.0, float(price.hidden_comm_s) / sent) if sent else 0.0
    layers = min(count for _, count in calls)
    spans: list[dict[str, Any]] = []
    clock = 0.0
    for row, count in calls:
        took = float(row.seconds) * max(1.0, round(count / layers))
        sends = isinstance(row.row, Collective)
        start = max(0.0, clock - hidden * took) if sends else clock
        spans.append({
            "track": "network" if sends else "compute", "start": start, "end": start + took,
            "name": row.row.label if sends else _of_layer(row.row.module or row.row.name),
            "group": kernel_group(row), "colour": PART_COLOURS[kernel_group(row)], "text": units.seconds(took),
        })
        clock = start + took
    return {
        "spans": spans, "seconds": clock, "text": units.seconds(clock), "layers": round(layers),
        "hidden": units.percent(hidden) if hidden else "",
    }


def _of_layer(module: str) -> str:
    return module.split("].", 1)[-1].removeprefix("model.")


def _memory(row: Row) -> dict[str, Any]:
    named = {column: float(row[column]) for column in MEMORY if column != "other"}
    named["other"] = max(0.0, float(row["memory_bytes"]) - sum(named.values()))
    parts = [
        {"part": MEMORY[column][0], "colour": MEMORY[column][1], "bytes": value, "text": units.nbytes(value)}
        for column, value in named.items()
    ]
    return {
        "parts": parts, "capacity": float(row["capacity_bytes"]), "capacity_text": units.nbytes(row["capacity_bytes"]),
        "batch": units.count(row["batch"]), "largest": units.count(row["largest_batch"]),
    }


def _simulate(asked: Question, row: Row, decode: Deployment) -> str:
    """The command that prices the candidate's decode step alone."""
    layout, chosen = decode.layout, list[Any]()
    for name, field in OPTIONS.items():
        value = getattr(decode.options, name)
        if value != field.default:
            chosen += [flag(name)] if isinstance(value, bool) else [flag(name), value]
    said: Sequence[Any] = (
        "tensorcast", "simulate", asked.model, "--device", decode.device.name, "--world-size",
        layout.world_size, "--tp", layout.tp, "--dp", layout.dp, "--ep", layout.ep, "--pp", layout.pp, "--engine",
        next(name for name in asked.engines if name.partition("==")[0] in (row["engine"], asked.engines[-1])),
        "--batch",
        max(1, round(row["batch"])), "--context", round(asked.asked["input_len"] + asked.asked["output_len"] / 2),
        *chosen,
    )
    return shlex.join(map(str, said))
