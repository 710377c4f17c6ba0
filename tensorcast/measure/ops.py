"""Op level: every distinct op and local shape of a step, run and timed alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tensorcast.cost.formulas import Context, work_of
from tensorcast.deploy.deployment import Deployment
from tensorcast.deploy.plan.plan import Collective
from tensorcast.deploy.workload import Workload
from tensorcast.errors import InputError
from tensorcast.measure.store import CRASHED, Store, key_of, works_text
from tensorcast.trace.table import Op

if TYPE_CHECKING:
    import torch

    from tensorcast.measure.operands import Buffers
    from tensorcast.measure.replay import Template, Templates

Watch = Callable[[Workload], "Templates"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """A distinct op of one workload: how often a step runs it, and where first."""

    workload: Workload
    op: Op
    at: Context
    count: int
    template: Template | None
    identity: tuple[Any, ...]
    by_kind: dict[int, int]


def rows_of(deployment: Deployment, workload: Workload, watch: Watch | None) -> list[Row]:
    """The step's kernels, equal ones once. ``watch`` finds how small ops were called; without it they cannot run."""
    from tensorcast.measure.kernels import identity
    from tensorcast.measure.replay import matched

    step = deployment.step
    at = step.sizes.context(float(workload.batch), float(workload.input_len), float(workload.context))
    ops = [row for row in step.plan.rows if not isinstance(row, Collective)]
    templates = matched(ops, watch(workload)) if watch is not None else [None] * len(ops)
    found: dict[tuple[Any, ...], Row] = {}
    for op, template in zip(ops, templates, strict=True):
        key = identity(op, at)
        calls = step.table.count(op)
        known = found.get(key)
        if known is None:
            known = Row(
                workload=workload, op=op, at=at, count=0, template=template, identity=key, by_kind={}
            )
        by_kind = {**known.by_kind, op.kind: known.by_kind.get(op.kind, 0) + 1}
        found[key] = replace(known, count=known.count + calls, by_kind=by_kind, template=known.template or template)
    return list(found.values())


def shrunk(op: Op, at: Context, limit: float) -> Context:
    """The row at the largest sizes under ``limit`` bytes: fewer sequences first, then fewer experts."""
    from tensorcast.measure.kernels import operand_bytes

    while operand_bytes(op, at) > limit:
        sizes = at.sizes
        if sizes.B > 1:
            share = math.floor(sizes.B / 2) / sizes.B
            at = replace(at, sizes=replace(sizes, B=sizes.B * share, R=max(sizes.R * share, 1.0)))
            at = replace(at, hit=min(at.hit, at.sizes.R))
        elif sizes.E > 1:
            share = math.floor(sizes.E / 2) / sizes.E
            sizes = replace(sizes, E=sizes.E * share, R=max(sizes.R * share, 1.0))
            at = replace(at, sizes=sizes, hit=max(at.hit * share, 1.0))
        else:
            return at
    return at


def check_memory(rows: list[Row], free: float) -> None:
    """Raise :class:`InputError` for the largest row that the memory which is free now cannot hold."""
    from tensorcast.measure.kernels import ROOM, operand_bytes, shape_text

    largest = max(rows, key=lambda row: operand_bytes(row.op, row.at), default=None)
    if largest is None or operand_bytes(largest.op, largest.at) <= ROOM * free:
        return
    need = operand_bytes(largest.op, largest.at)
    raise InputError(
        f"{largest.op.name} {shape_text(largest.op, largest.at)} in {largest.op.module} at batch "
        f"{largest.workload.batch} needs {need / 1e9:.1f} GB, and {ROOM * free / 1e9:.1f} GB may be filled; "
        f"use a smaller --batch or --context, or --shrink to run such ops at the largest size that fits"
    )


class OpRunner:
    """Measures rows on one device and keeps what it measured in ``store``; equal kernels run once."""

    def __init__(self, device: torch.device, buffers: Buffers, store: Store, belongs: str, effort: float) -> None:
        self.device, self.buffers, self.store = device, buffers, store
        self.belongs, self.effort = belongs, effort

    def run(self, rows: list[Row], shrink: bool, say: Say) -> Iterator[tuple[Row, Context, dict[str, Any]]]:
        """Each row with the sizes it ran at and what was measured: seconds and spread, or ``problem``."""
        from tensorcast.measure.kernels import ROOM, identity, operand_bytes, shape_text
        from tensorcast.measure.operands import free_bytes

        free = free_bytes(self.device)
        if not shrink:
            check_memory(rows, free)
        for number, row in enumerate(rows, 1):
            at = row.at
            if operand_bytes(row.op, at) > ROOM * free:
                at = shrunk(row.op, at, ROOM * free)
            say(f"op {number} of {len(rows)}: {row.op.name} {shape_text(row.op, at)}")
            key = key_of("op", identity(row.op, at), self.belongs)
            yield row, at, self.store.rows.get(key) or self._measure(key, row, at, free)

    def _measure(self, key: str, row: Row, at: Context, free: float) -> dict[str, Any]:
        from tensorcast.measure.kernels import Case, calls_of
        from tensorcast.measure.timing import time_calls

        if self.store.crashed(key):
            return self.store.add(key, problem=CRASHED)
        self.store.begin(key)
        try:
            calls = calls_of(Case(row.op, at, self.buffers, row.template), free, self.effort)
            timing = time_calls(calls, self.device, self.effort)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, AttributeError) as reason:
            line = (str(reason).strip() or type(reason).__name__).splitlines()[0][:160]
            if "CUDA error" in line:  # the context is lost: nothing after it would run
                raise InputError(
                    f"{row.op.name} in {row.op.module}: {line}; run the same command again to go on with the others"
                ) from None
            return self.store.add(key, problem=line)
        return self.store.add(
            key, seconds=timing.seconds, low_s=timing.low_s, median_s=timing.median_s, high_s=timing.high_s,
            calls=timing.calls, method=timing.method,
        )


def record(row: Row, at: Context, measured: dict[str, Any]) -> dict[str, Any]:
    """One row of the table of measurements; units are in the names."""
    from tensorcast.measure.kernels import shape_text

    works, w = work_of(row.op, at), row.workload
    return {
        "level": "op", "op": row.op.attrs.get("label", row.op.name) if row.op.name == "pointwise" else row.op.name,
        "module": row.op.module, "phase": w.phase, "batch": w.batch, "new": w.input_len, "past": w.context,
        "count": row.count, "shape": shape_text(row.op, at), "family": works[0].family, "dtype": works[0].dtype,
        "flops": sum(float(x.flops) for x in works), "bytes": sum(float(x.bytes) for x in works),
        **{name: measured.get(name) for name in ("seconds", "low_s", "median_s", "high_s", "calls", "method")},
        "problem": measured.get("problem", ""), "shrunk": at is not row.at, "works": works_text(works),
        "by_kind": ";".join(f"{kind}:{n}" for kind, n in sorted(row.by_kind.items())), "key": measured["key"],
    }
