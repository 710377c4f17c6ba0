"""Pricing a plan: seconds of every row and of the whole step, for one candidate or for arrays of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from tensorcast.cost.collectives import collective_time
from tensorcast.cost.formulas import Context, has_formula, work_of
from tensorcast.cost.predict import LEVELS
from tensorcast.cost.predict.rows import Correction, corrections_for
from tensorcast.cost.roofline import Evidence, constants_for, kernel_time, peak_flops
from tensorcast.cost.routing import ExpertLoad, Routing, expected_distinct, expert_load
from tensorcast.cost.work import Work
from tensorcast.deploy.blocks import EXPERT_STAGES, copies_per_token
from tensorcast.deploy.layout import Layout, stage_layers
from tensorcast.deploy.options import Options
from tensorcast.deploy.overlap import Overlap
from tensorcast.deploy.plan import Collective, Plan, Row
from tensorcast.deploy.price import PARTS, RowPrice
from tensorcast.profiles.device import DeviceProfile, KernelConstants
from tensorcast.profiles.engine import EngineProfile
from tensorcast.trace.dims import Dim, Sizes
from tensorcast.trace.table import Op, OpTable, Tensor

EXCHANGE_SMS = 20.0
"""Processors that DeepEP's two-stage kernels take by default (github.com/deepseek-ai/DeepEP, ``Buffer.num_sms``)."""


class _Sizes(NamedTuple):
    """What rows are priced at: the step's context, and how many chunks of which context pass the experts."""

    whole: Context
    chunks: tuple[Any, Context]


@dataclass(frozen=True)
class StepPrice:
    """A step: its rows' prices and the time of the slowest pipeline stage, of the whole step, and of its overheads.

    ``hidden_s``: kernel seconds that pass while others run; ``hidden_comm_s`` of them are communication,
    ``exposed_comm_s`` is the communication that the step waits for.
    """

    rows: tuple[RowPrice, ...]
    counts: tuple[int, ...]
    seconds: Any
    overhead_s: Any
    error: Any
    micro_batches: Any
    hidden_s: Any = 0.0
    hidden_comm_s: Any = 0.0
    exposed_comm_s: Any = 0.0


class Step:
    """A plan on a device under an engine, ready to be priced for any batch, new tokens and cached tokens."""

    def __init__(
        self,
        table: OpTable,
        plan: Plan,
        layout: Layout,
        device: DeviceProfile,
        engine: EngineProfile,
        kv: str = "bf16",
        options: Options = Options(),
    ) -> None:
        self.table, self.plan, self.layout, self.device, self.engine = table, plan, layout, device, engine
        self.options = options
        self.kv_bytes: Any = {"bf16": 2.0, "fp8": 1.0}[kv]
        # the eager view launches its kernels one by one
        self.captured = (
            options.fusion == "engine"
            and table.phase in engine.graph_captured_phases
            and plan.all2all not in engine.eager_exchanges
        )
        self.stages = stage_layers(len(table.layer_kinds), layout.pp)
        self.overlap = Overlap(plan, table, engine, options, self.captured)
        self._constants: dict[tuple[str, str, str, str], tuple[KernelConstants, Evidence]] = {}
        self.corrections = corrections_for(device, engine.name)
        facts = table.facts
        self.gated = _gated(plan)
        self.load: ExpertLoad | None = None
        self.distinct: dict[str, Any] = {}
        if facts["num_experts"]:
            self.load = expert_load(
                Routing.parse(options.routing),
                facts["num_experts"],
                copies_per_token(facts),
                layout.ep - options.external_shared_experts,
                redundant=options.redundant_experts,
                policy=options.placement,
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
        Under dual-batch overlap every stage runs two halves, each priced as the half it is. With drafted tokens a
        decode step checks ``1 + mtp_depth`` tokens per sequence and then drafts anew.
        """
        pp, halves = self.layout.pp, 1 + self.options.dual_batch_overlap
        micro, at = self._at(batch, new, past)
        rows = tuple(self._row(row, at) for row in self.plan.rows)
        hidden, hidden_comm = self.overlap.hidden(rows, at.whole.sizes.tokens)
        per_stage = [[n * halves for n in self._counts(i)] for i in range(pp)]
        stage_s = [
            sum((price.seconds * n for price, n in zip(rows, calls, strict=True) if n), 0.0) - self._over(hidden, i)
            for i, calls in enumerate(per_stage)
        ]
        if draft := self._draft(np.asarray(batch, dtype=float) / micro, past):
            rows, calls = (*rows, *draft), [self.options.mtp_depth] * len(draft)
            per_stage = [counts + ([0] * len(draft) if i < pp - 1 else calls) for i, counts in enumerate(per_stage)]
            stage_s[-1] = stage_s[-1] + sum((p.seconds * n for p, n in zip(draft, calls, strict=True)), 0.0)
        slowest = stage_s[0]
        for seconds in stage_s[1:]:
            slowest = np.maximum(slowest, seconds)
        turns = pp if self.table.phase == "decode" else micro + pp - 1
        overhead: Any = float(self.engine.step_overhead_s)
        if self.engine.request_overhead_s is not None:
            overhead = overhead + float(self.engine.request_overhead_s) * batch
        counts = tuple(sum(column) for column in zip(*per_stage, strict=True))
        total = slowest * turns + overhead
        # of one pass over all stages, as rows and counts are
        moved: Any = sum(
            (p.seconds * n for p, n in zip(rows, counts, strict=True) if isinstance(p.row, Collective)), 0.0
        )
        saved, saved_comm = (sum((self._over(kinds, i) for i in range(pp)), 0.0) for kinds in (hidden, hidden_comm))
        error = _step_error(rows, counts)
        micro = micro if np.ndim(micro) else int(micro)
        return StepPrice(rows, counts, total, overhead, error, micro, saved, saved_comm, moved - saved_comm)

    def _at(self, batch: Any, new: Any, past: Any) -> tuple[Any, _Sizes]:
        """Micro-batches, and what the rows of one of them (or of half of it) are priced at."""
        # of each candidate by itself: its price must not depend on what is priced beside it
        micro: Any = 1
        if self.layout.pp > 1:
            micro = np.clip(np.floor(np.asarray(batch, dtype=float)), 1.0, self.layout.pp)
        halves = 1 + self.options.dual_batch_overlap
        context = self.context(np.asarray(batch, dtype=float) / (micro * halves), new, past)
        return micro, _Sizes(context, self._chunk(context))

    def _over(self, per_kind: dict[int, Any], stage: int) -> Any:
        """Seconds per layer of each kind, summed over a stage's layers."""
        kinds = self.table.layer_kinds[self.stages[stage]]
        return sum((kinds.count(kind) * seconds for kind, seconds in per_kind.items()), 0.0)

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

    def context(self, batch: Any, new: Any, past: Any, verify: float | None = None) -> Context:
        if verify is None:
            verify = 1.0 + self.options.mtp_depth if self.table.phase == "decode" else 1.0
        sizes = Sizes(B=batch * verify, S=new, P=past, E=0.0, X=1.0 / self.layout.etp)
        known = Context(
            sizes,
            decode=self.table.phase == "decode",
            kv_bytes=self.kv_bytes,
            has_fp4="fp4" in self.device.peak_flops,
            backend=self.plan.backend,
            masked_skips=self.engine.masked_gemm == "skips",
            verify=verify,
        )
        return self._loaded(known, sizes.tokens)

    def _loaded(self, context: Context, tokens: Any) -> Context:
        """``context`` with the expert load of ``tokens`` tokens per data-parallel rank."""
        if self.load is None:
            return context
        every = tokens * self.layout.dp
        load = self.load.at(every)
        sizes = replace(context.sizes, R=load.rows, E=1.0 * self.load.local_experts)
        return replace(context, sizes=sizes, hit=load.hit, capacity=every)

    def _chunk(self, context: Context) -> tuple[Any, Context]:
        """How many chunks of tokens pass the experts, and one chunk's context."""
        tokens, most = context.sizes.tokens, self.options.chunk_tokens
        if not most:
            return 1.0, context
        chunks = np.maximum(np.ceil(np.asarray(tokens) / most), 1.0)
        part = replace(context, sizes=replace(context.sizes, B=context.sizes.B / chunks))
        return chunks, self._loaded(part, tokens / chunks)

    def _draft(self, batch: Any, past: Any) -> tuple[RowPrice, ...]:
        """Rows of drafting one token per sequence: a layer of the last kind and the head (DeepSeek-V3, section 2.2).

        The module also projects hidden state and embedding, ``[T,2H] x [2H,H]``.
        """
        if self.table.phase != "decode" or not np.any(self.options.mtp_depth):
            return ()
        last, hidden = self.table.layer_kinds[-1], float(self.table.facts["hidden_size"])
        context = self.context(batch, 1.0, past, verify=1.0)
        joined = Tensor((Dim(1, B=1), Dim(2 * hidden)), "bfloat16")
        weight = Tensor((Dim(2 * hidden), Dim(hidden)), "bfloat16", weight="eh_proj.weight")
        project = Op("mm", "eh_proj", -1, (joined, weight), (Tensor((Dim(1, B=1), Dim(hidden)), "bfloat16"),))
        rows = [r for r in self.plan.rows if r.kind == last or (r.kind < 0 and r.module.startswith("lm_head"))]
        at = _Sizes(context, self._chunk(context))
        return tuple(self._row(replace(row, module=f"mtp.{row.module}"), at) for row in (project, *rows))

    def _row(self, row: Row, at: _Sizes) -> RowPrice:
        inside = (isinstance(row, Op) and row.stage in EXPERT_STAGES) or (isinstance(row, Collective) and row.exchange)
        if not inside or at.chunks[1] is at.whole:
            return self._one(row, at.whole)
        count, context = at.chunks
        return _times(self._one(row, context), count)

    def _one(self, row: Row, at: Context) -> RowPrice:
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
        family, level, error = "memory", LEVELS.index("measured"), 0.0
        alone: Any = 1.0  # or part of the all-reduce's kernel before it
        if "joined_tokens" in op.attrs:
            alone = np.where(np.asarray(at.sizes.tokens) > op.attrs["joined_tokens"], 1.0, 0.0)[()]
        for work, known in self._works(op, at):
            engine = known.engine if known is not None else self.engine.name
            constants, found = self._constants_for(work.family, work.dtype, work.kernel, engine)
            # quantising and permuting are rows of their own here, not part of the matmul's time
            timing = kernel_time(work, constants, self.device, passes=False)
            factor = known.factor if known is not None else 1.0
            kernel_s, launch_s = timing.seconds * factor, timing.launch_s * factor
            launch = (launch_s + self._gap(kernel_s, launch_s)) * alone
            seconds = seconds + (kernel_s - launch_s + launch) * work.calls
            flops, moved = flops + work.flops * work.calls, moved + work.bytes * work.calls
            ideal = ideal + work.flops * work.calls / peak_flops(self.device, work.dtype)
            parts["compute"] = parts["compute"] + timing.compute_s * factor * work.calls
            parts["memory"] = parts["memory"] + timing.memory_s * factor * work.calls
            parts["latency"] = parts["latency"] + launch * work.calls
            family = work.family
            level = np.minimum(level, LEVELS.index(found) if known is None else known.level)
            error = np.maximum(error, (constants.median_error or 0.0) if known is None else known.error)
        return RowPrice(op, seconds, flops, moved, 0.0, ideal, parts, family, _word(level), error, has_formula(op))

    def _works(self, op: Op, at: Context) -> Iterator[tuple[Work, Correction | None]]:
        """The row's kernels, each with what the device's fitted model makes of its formula."""
        if op.name != "grouped_matmul" or at.backend in ("eager", "batched_mm"):
            variant = "absorb" if op.name == "mla_absorb" else ""
            yield from ((work, self.corrections.of(work, variant)) for work in work_of(op, at))
            return
        (work,) = work_of(op, at)
        if at.backend == "masked" and not at.masked_skips:
            yield work, None
            return
        known = self.corrections.at(work.family, work.dtype, at.backend, self._expert_sizes(work, at))
        if known is not None and known.variant == at.backend:  # a kernel of that layout was fitted over plain tiles
            (work,) = work_of(op, replace(at, backend="grouped_mm"))
        yield work, known

    def _expert_sizes(self, work: Work, at: Context) -> dict[str, Any]:
        """The experts' whole feed-forward network as models know it: up, activation and down in one."""
        facts, layout = self.table.facts, self.layout
        return {
            "tokens": at.capacity, "hidden": facts["moe_hidden_size"], "inter": facts["moe_intermediate_size"],
            "topk": facts["top_k"], "experts": facts["num_experts"], "slots": at.sizes.E * layout.ep,
            "moe_tp": layout.etp, "moe_ep": layout.ep, "gated": self.gated,
            "skew": 0.0 if self.options.routing == "balanced" else -1.0, **work.sizes,
        }

    def _constants_for(
        self, family: str, dtype: str, kernel: str, engine: str
    ) -> tuple[KernelConstants, Evidence]:
        key = family, dtype, kernel, engine
        if key not in self._constants:
            self._constants[key] = constants_for(self.device, family, dtype, engine, kernel)
        return self._constants[key]

    def _collective(self, row: Collective, at: Context) -> RowPrice:
        units = at.sizes.tokens if row.per == "token" else at.sizes.B
        options = dict(row.exchange)
        if options.get("kind") == "high_throughput":
            options |= {"distinct_nodes": self.distinct["nodes"], "distinct_ranks": self.distinct["ranks"]}
        known = self._known_collective(row, units)
        engine = known.engine if known is not None else self.engine.name
        time = collective_time(row.op, row.scale * units, row.extent, self.device, engine=engine, **options)
        kernel_s = time.seconds if known is None else time.seconds * known.factor
        tier = next(t for t in self.device.interconnect if t.name == time.tier)
        on_wire = time.wire_bytes / float(tier.bandwidth_bytes_per_s)
        seconds = kernel_s + self._gap(kernel_s, kernel_s)
        parts = {"compute": 0.0, "memory": 0.0, "network": on_wire, "latency": np.maximum(seconds - on_wire, 0.0)}
        algorithm = time.algorithm if isinstance(time.algorithm, str) else str(np.ravel(time.algorithm)[0])
        detail = f"{row.group}{row.ranks} {time.tier} {algorithm}"
        evidence, error = (time.evidence, time.error) if known is None else (_word(known.level), known.error)
        return RowPrice(row, seconds, 0.0, 0.0, time.wire_bytes, 0.0, parts, row.op, evidence, error, True, detail)

    def _known_collective(self, row: Collective, units: Any) -> Correction | None:
        """What the device's fitted model makes of a collective on its innermost links, or of an expert exchange."""
        if row.exchange.get("kind") in ("low_latency", "high_throughput"):
            facts, copies, tp = self.table.facts, row.exchange["copies"], self.layout.tp
            hidden = float(facts["moe_hidden_size"])
            sizes = {
                "tokens": units / tp, "hidden": hidden, "topk": copies, "experts": facts["num_experts"],
                "ranks": row.ranks, "nodes": -(-row.ranks // self.device.interconnect[0].size),
                "copy_bytes": row.scale * tp / copies / hidden, "sms": EXCHANGE_SMS,
            }
            return self.corrections.at("moe_exchange", "any", f"{row.exchange['kind']}:{row.exchange['phase']}", sizes)
        if row.exchange or len(row.extent) > 1:
            return None
        sizes = {"ranks": row.ranks, "payload_bytes": row.scale * units}
        return self.corrections.at(row.op, "any", "custom" if row.op == "all_reduce" else "nccl", sizes)


def _gated(plan: Plan) -> float:
    """1 where experts' first matmul makes gate and up, 0 where there is no gate."""
    ops = {r.attrs["projection"]: r for r in plan.rows if isinstance(r, Op) and r.name == "grouped_matmul"}
    if len(ops) < 2:
        return 1.0
    return float(ops["up"].outputs[0].dims[-1].coef > 1.5 * ops["down"].inputs[0].dims[-1].coef)


def _word(level: Any) -> Any:
    """The level of evidence by name: one for all calls, or an array of them."""
    if np.min(level) == np.max(level):
        return LEVELS[int(np.min(level))]
    return np.array(LEVELS)[level]


def _times(price: RowPrice, count: Any) -> RowPrice:
    """The price of ``count`` such calls."""
    return replace(
        price,
        seconds=price.seconds * count,
        flops=price.flops * count,
        bytes=price.bytes * count,
        wire_bytes=price.wire_bytes * count,
        ideal_compute_s=price.ideal_compute_s * count,
        parts={part: seconds * count for part, seconds in price.parts.items()},
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
