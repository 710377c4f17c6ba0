"""Pricing a plan: seconds of every row and of the whole step, for one candidate or for arrays of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from tensorcast.cost.collectives import collective_time
from tensorcast.cost.evidence import LEVELS, Evidence
from tensorcast.cost.formulas import Context, has_formula, work_of
from tensorcast.cost.kernels.corrections import Correction, corrections_for
from tensorcast.cost.roofline import constants_for, kernel_time
from tensorcast.cost.routing import ExpertLoad, Routing, expected_distinct, expert_load
from tensorcast.cost.work import Work
from tensorcast.deploy.layout import Layout, stage_layers
from tensorcast.deploy.options import Options
from tensorcast.deploy.plan.moe_blocks import EXPERT_STAGES
from tensorcast.deploy.plan.plan import Collective, Plan, Row, gated
from tensorcast.deploy.step.overlap import Overlap
from tensorcast.deploy.step.pipeline_stages import HAND_OVER, Stage, place_of, stages_of
from tensorcast.deploy.step.price import (
    Call,
    Part,
    RowPrice,
    Spending,
    StepPrice,
    one_level,
    pick,
    seconds_of,
    spending_of,
    total,
)
from tensorcast.deploy.step.row_prices import EXCHANGE_SMS
from tensorcast.deploy.step.sizes import Batches, _Sizes
from tensorcast.profiles.device import DeviceProfile, KernelConstants
from tensorcast.profiles.engine import EngineProfile
from tensorcast.trace.dims import Dim, Sizes
from tensorcast.trace.table import Op, OpTable, Tensor


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
        prefill_graph_tokens: int = 0,
        sources: Mapping[str, float] | None = None,
    ) -> None:
        self.table, self.plan, self.layout, self.device, self.engine = table, plan, layout, device, engine
        self.options = options
        self.sources: dict[str, Any] = dict(sources or {})
        self.kv_bytes: Any = {"bf16": 2.0, "fp8": 1.0}[kv]
        # the eager view launches its kernels one by one
        eager = options.fusion != "engine" or plan.all2all in engine.eager_exchanges
        self.captured = not eager and table.phase in engine.graph_captured_phases
        # tokens of the largest step that is replayed from a graph
        most = math.inf if self.captured else prefill_graph_tokens if table.phase == "prefill" else 0
        self.graph_tokens = 0.0 if eager else float(most)
        self.stages = stage_layers(len(table.layer_kinds), layout.pp)
        self.overlap = Overlap(plan, table, engine, options, self.captured)
        self._constants: dict[tuple[str, str, str, str], tuple[KernelConstants, Evidence]] = {}
        self.corrections = corrections_for(device, engine.name)
        facts = table.facts
        self.gated = gated(plan)
        self.load: ExpertLoad | None = None
        self.distinct: dict[str, Any] = {}
        if facts.num_experts:
            self.load = expert_load(
                Routing.parse(options.routing),
                facts.num_experts,
                facts.copies_per_token,
                layout.ep - options.external_shared_experts,
                redundant=options.redundant_experts,
                policy=options.placement,
            )
            limits = (facts.expert_groups, facts.expert_groups_chosen)
            self.distinct = {
                tier: expected_distinct(facts.num_experts, facts.top_k, parts, *limits)
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
        at = self._at(batch, new, past)
        rows, draft = self._rows(at)
        parts = *_, drafting = self._parts(rows, draft, at)
        hidden, hidden_comm = self.overlap.hidden(rows, at.rows.whole.sizes.tokens, at.own_at)
        places = self._places
        each = {
            place: pick(total(p.seconds for p, where in zip(rows, places, strict=True) if where == place), at.own_at)
            for place in dict.fromkeys(places)
        }
        taken = {place: seconds * self._halves - hidden.get(place, 0.0) for place, seconds in each.items()}
        *others, last = self._stages
        slowest = last.of(taken) + drafting.sum(seconds_of)
        for stage in others:
            slowest = np.maximum(slowest, stage.of(taken))
        pp = self.layout.pp
        turns = pp if self.table.phase == "decode" else at.micro + pp - 1
        beside = self.engine.overhead(self.device.name)
        overhead: Any = beside.seconds(batch)
        calls = Counter(self.table.layer_kinds)
        saved, saved_comm = (total(calls[kind] * kinds[kind] for kind in kinds) for kinds in (hidden, hidden_comm))
        micro = at.micro if np.ndim(at.micro) else int(at.micro)
        return StepPrice(parts, slowest * turns + overhead, overhead, beside.error_s, micro, saved, saved_comm)

    def _parts(self, rows: tuple[RowPrice, ...], draft: tuple[RowPrice, ...], at: Batches) -> tuple[Part, Part, Part]:
        """Rows of all stages, what hands on between them (always the last row), and what drafts."""
        places, layers = self._places, Counter(self.table.layer_kinds)
        end = places.index(HAND_OVER) if HAND_OVER in places else len(places)
        calls = tuple(layers[place] if place >= 0 else 1 for place in places[:end])
        between = (self.layout.pp - 1) * self._halves
        return (
            Part(rows[:end], calls, self._halves, at.own_at),
            Part(rows[end:], (1,) * (len(places) - end), between, at.own_at),
            Part(draft, (1,) * len(draft), self.options.mtp_depth, at.draft_at),
        )

    @property
    def _halves(self) -> Any:
        """Parts that a batch runs in: two under dual-batch overlap."""
        return 1 + self.options.dual_batch_overlap

    def _at(self, batch: Any, new: Any, past: Any) -> Batches:
        micro, whole = self._micro(batch)
        drafts = self._sizes(whole, 1.0, past, verify=1.0) if self._speculates else None
        return Batches(micro, self._sizes(whole / self._halves, new, past), drafts)

    @property
    def _speculates(self) -> bool:
        """Whether some batch drafts tokens."""
        return self.table.phase == "decode" and bool(np.any(self.options.mtp_depth))

    def _micro(self, batch: Any) -> tuple[Any, Any]:
        """Micro-batches, and the sequences in one of them."""
        # of each candidate by itself: its price must not depend on what is priced beside it
        micro: Any = 1
        if np.any(np.greater(self.layout.pp, 1)):
            micro = np.clip(np.floor(np.asarray(batch, dtype=float)), 1.0, self.layout.pp)
        return micro, np.asarray(batch, dtype=float) / micro

    def _rows(self, at: Batches) -> tuple[tuple[RowPrice, ...], tuple[RowPrice, ...]]:
        """Prices of the plan's rows, and of the rows of drafting one token per sequence."""
        draft = () if at.drafts is None else tuple(self._row(row, at.drafts) for row in self._drafts)
        return tuple(self._row(row, at.rows) for row in self.plan.rows), draft

    @cached_property
    def _stages(self) -> list[Stage]:
        return stages_of(self.table.layer_kinds, self.layout.pp)

    @cached_property
    def _places(self) -> list[int]:
        return [place_of(row) for row in self.plan.rows]

    def seconds(self, batch: Any, new: Any, past: Any) -> Any:
        """Step time alone."""
        return self.price(batch, new, past).seconds

    @property
    def _verify(self) -> Any:
        """Tokens of each sequence that a step checks: the last one and drafted ones."""
        return 1.0 + self.options.mtp_depth if self.table.phase == "decode" else 1.0

    def context(self, batch: Any, new: Any, past: Any, verify: Any = None, kv_bytes: Any = None) -> Context:
        verify = self._verify if verify is None else verify
        sizes = Sizes(B=batch * verify, S=new, P=past, E=0.0, X=1.0 / self.layout.etp)
        known = Context(
            sizes,
            decode=self.table.phase == "decode",
            kv_bytes=self.kv_bytes if kv_bytes is None else kv_bytes,
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

    def _sizes(self, batch: Any, new: Any, past: Any, verify: Any = None, kv_bytes: Any = None) -> _Sizes:
        context = self.context(batch, new, past, verify, kv_bytes)
        return _Sizes(context, self._chunk(context))

    @cached_property
    def _drafted(self) -> list[int]:
        """Positions of the rows that draft a token, a layer of the last kind and the head (DeepSeek-V3, section 2.2),
        after hidden state and embedding are projected together."""
        last = self.table.layer_kinds[-1]
        head = {i for i, row in enumerate(self.plan.rows) if row.kind < 0 and row.module.startswith("lm_head")}
        return [i for i, row in enumerate(self.plan.rows) if row.kind == last or i in head]

    @cached_property
    def _drafts(self) -> list[Row]:
        """What drafts a token."""
        rows = (self._project, *(self.plan.rows[i] for i in self._drafted))
        return [replace(row, module=f"mtp.{row.module}") for row in rows]

    @cached_property
    def _project(self) -> Row:
        """``[T,2H] x [2H,H]``"""
        hidden = float(self.table.facts.hidden_size)
        joined = Tensor((Dim(1, B=1), Dim(2 * hidden)), "bfloat16")
        weight = Tensor((Dim(2 * hidden), Dim(hidden)), "bfloat16", weight="eh_proj.weight")
        return Op("mm", "eh_proj", -1, (joined, weight), (Tensor((Dim(1, B=1), Dim(hidden)), "bfloat16"),))

    def _row(self, row: Row, at: _Sizes) -> RowPrice:
        inside = (isinstance(row, Op) and row.stage in EXPERT_STAGES) or (isinstance(row, Collective) and row.exchange)
        if not inside or at.chunks[1] is at.whole:
            return self._one(row, at.whole)
        count, context = at.chunks
        return self._one(row, context).times(count)

    def _one(self, row: Row, at: Context) -> RowPrice:
        return self._collective(row, at) if isinstance(row, Collective) else self._kernel(row, at)

    def _gap(self, kernel_s: Any, launch_s: Any, at: Context) -> Any:
        """What launching adds beyond ``launch_s``, which kernel times measured in graph replay already hold.

        Inside a captured graph: what the gap exceeds it by. Launched one by one: the wait for the host.
        """
        replayed = np.maximum(float(self.engine.graph_launch_gap_s) - launch_s, 0.0)
        if self.graph_tokens == math.inf:
            return replayed
        waited = np.maximum(float(self.engine.eager_launch_gap_s) - kernel_s, 0.0)
        if not self.graph_tokens:
            return waited
        return np.where(np.asarray(at.sizes.tokens) <= self.graph_tokens, replayed, waited)[()]

    def _kernel(self, op: Op, at: Context) -> RowPrice:
        seconds: Any = 0.0
        waits: Any = 0.0
        calls: list[Call] = []
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
            launch = (launch_s + self._gap(kernel_s, launch_s, at)) * alone
            seconds = seconds + (kernel_s - launch_s + launch) * work.calls
            waits = waits + launch * work.calls
            calls.append(Call(work, timing, factor, launch))
            family = work.family
            mine = LEVELS.index(found) if known is None else known.level
            level = min(level, mine) if isinstance(mine, int) else np.minimum(level, mine)
            error = np.maximum(error, (constants.median_error or 0.0) if known is None else known.error)
        spend = partial(spending_of, calls, self.device)
        return RowPrice(op, seconds, waits, family, one_level(level), error, spend, has_formula(op))

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
            "tokens": at.capacity, "hidden": facts.moe_hidden_size, "inter": facts.moe_intermediate_size,
            "topk": facts.top_k, "experts": facts.num_experts, "slots": at.sizes.E * layout.ep,
            "moe_tp": layout.etp, "moe_ep": layout.ep, "gated": self.gated,
            "source": self.sources.get(work.dtype, 0.0),  # whose kernels run
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
        seconds = kernel_s + self._gap(kernel_s, kernel_s, at)
        parts = {"compute": 0.0, "memory": 0.0, "network": on_wire, "latency": np.maximum(seconds - on_wire, 0.0)}
        spending = Spending(wire_bytes=time.wire_bytes, parts=parts)
        algorithm = time.algorithm if isinstance(time.algorithm, str) else str(np.ravel(time.algorithm)[0])
        detail = f"{row.group}{row.ranks} {time.tier} {algorithm}"
        level, error = (LEVELS.index(time.evidence), time.error) if known is None else (known.level, known.error)
        waits = on_wire + parts["latency"]
        return RowPrice(row, seconds, waits, row.op, one_level(level), error, lambda: spending, True, detail)

    def _known_collective(self, row: Collective, units: Any) -> Correction | None:
        """What the device's fitted model makes of a collective on its innermost links, or of an expert exchange."""
        if row.exchange.get("kind") in ("low_latency", "high_throughput"):
            facts, copies, tp = self.table.facts, row.exchange["copies"], self.layout.tp
            hidden = float(facts.moe_hidden_size)
            sizes = {
                "tokens": units / tp, "hidden": hidden, "topk": copies, "experts": facts.num_experts,
                "ranks": row.ranks, "nodes": -(-row.ranks // self.device.interconnect[0].size),
                "copy_bytes": row.scale * tp / copies / hidden, "sms": EXCHANGE_SMS,
            }
            return self.corrections.at("moe_exchange", "any", f"{row.exchange['kind']}:{row.exchange['phase']}", sizes)
        if row.exchange or len(row.extent) > 1:
            return None
        sizes = {"ranks": row.ranks, "payload_bytes": row.scale * units}
        return self.corrections.at(row.op, "any", "custom" if row.op == "all_reduce" else "nccl", sizes)
