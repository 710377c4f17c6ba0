"""Pricing a plan: seconds of every row and of the whole step, for one candidate or for arrays of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorcast.cost.collectives import collective_time
from tensorcast.cost.formulas import Context, has_formula, work_of
from tensorcast.cost.roofline import constants_for, kernel_time, peak_flops
from tensorcast.cost.routing import ExpertLoad, Routing, expected_distinct, expert_load
from tensorcast.deploy.layout import Layout, stage_layers
from tensorcast.deploy.plan import Collective, Plan, Row
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.trace.dims import Sizes
from tensorcast.trace.table import Op, OpTable

PARTS = ("compute", "memory", "network", "latency")


@dataclass(frozen=True)
class RowPrice:
    """One call of one row; numbers are floats or arrays. ``parts`` splits the seconds by what bounds them."""

    row: Row
    seconds: Any
    flops: Any
    bytes: Any
    wire_bytes: Any
    ideal_compute_s: Any
    parts: dict[str, Any]
    family: str
    evidence: str
    error: float
    has_formula: bool = True
    detail: str = ""


@dataclass(frozen=True)
class StepPrice:
    """A step: its rows' prices and the time of the slowest pipeline stage, of the whole step, and of its overheads."""

    rows: tuple[RowPrice, ...]
    counts: tuple[int, ...]
    seconds: Any
    overhead_s: Any
    error: Any
    micro_batches: int


class Step:
    """A plan on a device under an engine, ready to be priced for any batch, new tokens and cached tokens."""

    def __init__(
        self,
        table: OpTable,
        plan: Plan,
        layout: Layout,
        device: DeviceProfile,
        engine: EngineProfile,
        routing: Routing,
        kv: str = "bf16",
        captured: bool = True,
        redundant_experts: int = 0,
        placement: str = "linear",
    ) -> None:
        self.table, self.plan, self.layout, self.device, self.engine = table, plan, layout, device, engine
        self.kv_bytes = {"bf16": 2.0, "fp8": 1.0}[kv]
        self.captured = captured and table.phase in engine.graph_captured_phases
        self.stages = stage_layers(len(table.layer_kinds), layout.pp)
        facts = table.facts
        self.load: ExpertLoad | None = None
        self.distinct: dict[str, float] = {}
        if facts["num_experts"]:
            self.load = expert_load(
                routing, facts["num_experts"], facts["top_k"], layout.ep, redundant=redundant_experts, policy=placement
            )
            limits = (facts["expert_groups"], facts["expert_groups_chosen"])
            self.distinct = {
                tier: expected_distinct(facts["num_experts"], facts["top_k"], parts, *limits)
                for tier, parts in (("ranks", layout.ep), ("nodes", self._nodes()))
            }

    def _nodes(self) -> int:
        """Domains of the innermost tier that the experts' ranks span."""
        return max(1, -(-self.layout.stage_ranks // self.device.interconnect[0].size))

    def price(self, batch: Any, new: Any, past: Any) -> StepPrice:
        """Price ``batch`` sequences per data-parallel rank, ``new`` tokens each after ``past`` cached ones.

        With pipeline stages the batch runs as ``min(pp, batch)`` micro-batches: a decode step ends when every
        micro-batch has passed every stage; prefill adds the bubble, ``(m + pp - 1)`` turns of the slowest stage.
        """
        pp = self.layout.pp
        micro = 1 if pp == 1 else int(min(pp, np.min(batch)))
        context = self._context(np.asarray(batch, dtype=float) / micro if micro > 1 else batch, new, past)
        rows = tuple(self._row(row, context) for row in self.plan.rows)
        per_stage = [self._counts(i) for i in range(pp)]
        stage_s = [
            sum((price.seconds * n for price, n in zip(rows, calls, strict=True) if n), 0.0) for calls in per_stage
        ]
        slowest = stage_s[0]
        for seconds in stage_s[1:]:
            slowest = np.maximum(slowest, seconds)
        turns = pp if self.table.phase == "decode" else micro + pp - 1
        overhead: Any = float(self.engine.step_overhead_s)
        if self.engine.request_overhead_s is not None:
            overhead = overhead + float(self.engine.request_overhead_s) * batch
        counts = tuple(sum(column) for column in zip(*per_stage, strict=True))
        total = slowest * turns + overhead
        return StepPrice(rows, counts, total, overhead, _step_error(rows, counts), micro)

    def seconds(self, batch: Any, new: Any, past: Any) -> Any:
        """Step time alone."""
        return self.price(batch, new, past).seconds

    def _counts(self, stage: int) -> list[int]:
        """Calls of each row on one pipeline stage: layers of its kind there; rows outside the layers on their stage."""
        kinds = self.table.layer_kinds[self.stages[stage]]
        first, last = stage == 0, stage == len(self.stages) - 1

        def calls(row: Row) -> int:
            if row.kind >= 0:
                return kinds.count(row.kind)
            if isinstance(row, Collective) and row.op == "send_recv":
                return int(not last)
            at_start = row.module.startswith(("embed", "rotary")) or getattr(row, "name", "") == "embedding"
            return int(first if at_start else last)

        return [calls(row) for row in self.plan.rows]

    def _context(self, batch: Any, new: Any, past: Any) -> Context:
        tokens = batch * new
        rows: Any = 0.0
        hit: Any = 0.0
        local = 0
        if self.load is not None:
            load = self.load.at(tokens * self.layout.dp)
            rows, hit, local = load.rows, load.hit, self.load.local_experts
        sizes = Sizes(B=batch, S=new, P=past, R=rows, E=float(local), X=1.0 / self.layout.etp)
        return Context(sizes, hit, self.table.phase == "decode", self.kv_bytes, "fp4" in self.device.peak_flops)

    def _row(self, row: Row, at: Context) -> RowPrice:
        return self._collective(row, at) if isinstance(row, Collective) else self._kernel(row, at)

    def _gap(self, kernel_s: Any, launch_s: Any) -> Any:
        """What launching adds beyond ``launch_s``, which kernel times measured in graph replay already hold.

        Inside a captured graph: what the gap exceeds it by. Launched one by one: the wait for the host.
        """
        if self.captured:
            return np.maximum(float(self.engine.graph_launch_gap_s) - launch_s, 0.0)
        return np.maximum(float(self.engine.eager_launch_gap_s) - kernel_s, 0.0)

    def _kernel(self, op: Op, at: Context) -> RowPrice:
        seconds: Any = 0.0
        flops: Any = 0.0
        moved: Any = 0.0
        ideal: Any = 0.0
        parts: dict[str, Any] = dict.fromkeys(PARTS, 0.0)
        family, evidence, error = "memory", "calibrated", 0.0
        for work in work_of(op, at):
            constants, found = constants_for(self.device, work.family, work.dtype, self.engine.name)
            # quantising and permuting are rows of their own here, not part of the matmul's time
            timing = kernel_time(work, constants, self.device, passes=False)
            gap = self._gap(timing.seconds, timing.launch_s)
            seconds = seconds + timing.seconds + gap
            flops, moved = flops + work.flops, moved + work.bytes
            ideal = ideal + work.flops / peak_flops(self.device, work.dtype)
            parts["compute"] = parts["compute"] + timing.compute_s
            parts["memory"] = parts["memory"] + timing.memory_s
            parts["latency"] = parts["latency"] + timing.launch_s + gap
            family = work.family
            evidence = found if found == "datasheet" else evidence
            error = max(error, constants.median_error or 0.0)
        return RowPrice(op, seconds, flops, moved, 0.0, ideal, parts, family, evidence, error, has_formula(op))

    def _collective(self, row: Collective, at: Context) -> RowPrice:
        units = at.sizes.tokens if row.per == "token" else at.sizes.B
        options = dict(row.exchange)
        if options.get("kind") == "high_throughput":
            options |= {"distinct_nodes": self.distinct["nodes"], "distinct_ranks": self.distinct["ranks"]}
        time = collective_time(row.op, row.scale * units, row.extent, self.device, engine=self.engine.name, **options)
        tier = next(t for t in self.device.interconnect if t.name == time.tier)
        on_wire = time.wire_bytes / float(tier.bandwidth_bytes_per_s)
        gap = self._gap(time.seconds, time.seconds)
        seconds = time.seconds + gap
        parts = {"compute": 0.0, "memory": 0.0, "network": on_wire, "latency": np.maximum(seconds - on_wire, 0.0)}
        algorithm = time.algorithm if isinstance(time.algorithm, str) else str(np.ravel(time.algorithm)[0])
        detail = f"{row.group}{row.ranks} {time.tier} {algorithm}"
        return RowPrice(
            row, seconds, 0.0, 0.0, time.wire_bytes, 0.0, parts, row.op, time.evidence, time.error, True, detail
        )


def _step_error(rows: tuple[RowPrice, ...], counts: tuple[int, ...]) -> Any:
    """Median relative error of the sum: errors of one family move together, families independently."""
    by_family: dict[str, Any] = {}
    total: Any = 0.0
    for price, n in zip(rows, counts, strict=True):
        by_family[price.family] = by_family.get(price.family, 0.0) + n * price.seconds * price.error
        total = total + n * price.seconds
    squares = sum((np.square(e) for e in by_family.values()), 0.0)
    return np.sqrt(squares) / np.maximum(total, 1e-30)
