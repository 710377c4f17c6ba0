"""Pricing a plan: seconds of every row and of the whole step, for one candidate or for arrays of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from tensorcast.cost.collectives import collective_time
from tensorcast.cost.formulas import Context, has_formula, work_of
from tensorcast.cost.predict import LEVELS
from tensorcast.cost.predict.rows import Correction, corrections_for
from tensorcast.cost.roofline import Evidence, constants_for, kernel_time
from tensorcast.cost.routing import ExpertLoad, Routing, expected_distinct, expert_load
from tensorcast.cost.work import Work
from tensorcast.deploy.blocks import EXPERT_STAGES, copies_per_token
from tensorcast.deploy.layout import Layout, stage_layers
from tensorcast.deploy.options import Options
from tensorcast.deploy.overlap import Overlap
from tensorcast.deploy.plan import Collective, Plan, Row, gated
from tensorcast.deploy.price import Call, RowPrice, Spending, Stage, StepPrice, one_level, pick, spending_of
from tensorcast.profiles.device import DeviceProfile, KernelConstants
from tensorcast.profiles.engine import EngineProfile
from tensorcast.trace.dims import Dim, Sizes
from tensorcast.trace.table import Op, OpTable, Tensor

EXCHANGE_SMS = 20.0
"""Processors that DeepEP's two-stage kernels take by default (github.com/deepseek-ai/DeepEP at 189df34,
deep_ep/buffers/legacy.py, ``Buffer.num_sms``)."""


FIRST, LAST, HAND_OVER = -1, -2, -3
"""Places of rows outside the layers: on the first pipeline stage, on the last, on all but the last."""


class _Sizes(NamedTuple):
    """What rows are priced at: the step's context, and how many chunks of which context pass the experts."""

    whole: Context
    chunks: tuple[Any, Context]


class _Batches(NamedTuple):
    """Micro-batches, the tokens of one of them (or of half of it), and what rows are priced at.

    ``drafts``: what drafting is priced at, if the step drafts. Or, where there are several batches, ``rows`` holds what
    they draft behind the ``own`` batches, and ``draft_at`` says which of those cases every batch is.
    """

    micro: Any
    tokens: Any
    rows: _Sizes
    drafts: _Sizes | None = None
    own: int | None = None
    draft_at: Any = None


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
        self.options, self.sources = options, sources or {}
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
        at = self._at(batch, new, past)
        rows, draft = self._rows(at)
        hidden, hidden_comm = self.overlap.hidden(rows, at.tokens)
        stages, micro, pp = self._stages, at.micro, self.layout.pp
        halves: Any = 1 + self.options.dual_batch_overlap
        each: dict[int, Any] = {}
        for place, row in zip(self._places, rows, strict=True):
            each[place] = each[place] + row.seconds if place in each else row.seconds
        # stages of the same layers take the same time
        alike = {stage: stage.of(each) * halves - stage.of(hidden) for stage in dict.fromkeys(stages)}
        counts = tuple(self._calls[place] * halves for place in self._places)
        last_s = alike.pop(stages[-1]) if stages.count(stages[-1]) == 1 else alike[stages[-1]]
        if draft:
            drafting = pick(sum((price.seconds for price in draft), 0.0), at.draft_at)
            last_s = last_s + drafting * self.options.mtp_depth
            rows, counts = (*rows, *draft), counts + (self.options.mtp_depth,) * len(draft)
        slowest = last_s
        for seconds in alike.values():
            slowest = np.maximum(slowest, seconds)
        turns = pp if self.table.phase == "decode" else micro + pp - 1
        beside = self.engine.overhead(self.device.name)
        overhead: Any = beside.seconds(batch)
        saved, saved_comm = (sum(stage.of(kinds) for stage in stages) for kinds in (hidden, hidden_comm))
        micro = micro if np.ndim(micro) else int(micro)
        return StepPrice(
            rows, counts, slowest * turns + overhead, overhead, beside.error_s, micro, saved, saved_comm,
            len(draft), at.draft_at,
        )  # fmt: skip

    def _at(self, batch: Any, new: Any, past: Any) -> _Batches:
        # of each candidate by itself: its price must not depend on what is priced beside it
        micro: Any = 1
        if self.layout.pp > 1:
            micro = np.clip(np.floor(np.asarray(batch, dtype=float)), 1.0, self.layout.pp)
        whole = np.asarray(batch, dtype=float) / micro
        part = whole / (1 + self.options.dual_batch_overlap)
        tokens = part * self._verify * new
        if self.table.phase != "decode" or not np.any(self.options.mtp_depth):
            return _Batches(micro, tokens, self._sizes(part, new, past))
        if np.ndim(whole) != 1 or np.ndim(past) > 1:
            drafts = self._sizes(whole, 1.0, past, verify=1.0)
            return _Batches(micro, tokens, self._sizes(part, new, past), drafts)
        # what batches draft, where they draft alike once, is priced as further batches of the same rows
        every = np.array([np.broadcast_to(value, whole.shape) for value in (whole, past, self.kv_bytes)])
        cases, draft_at = np.unique(every, axis=1, return_inverse=True)

        def both(value: Any, case: Any) -> Any:
            return np.concatenate([np.broadcast_to(value, whole.shape), np.broadcast_to(case, cases.shape[1:])])

        joined = self._sizes(
            both(part, cases[0]), new if np.ndim(new) == 0 else both(new, 1.0),
            past if np.ndim(past) == 0 else both(past, cases[1]), both(self._verify, 1.0),
            self.kv_bytes if np.ndim(self.kv_bytes) == 0 else both(self.kv_bytes, cases[2]),
        )  # fmt: skip
        return _Batches(micro, tokens, joined, None, len(whole), draft_at)

    def _rows(self, at: _Batches) -> tuple[tuple[RowPrice, ...], tuple[RowPrice, ...]]:
        """Prices of the plan's rows, and of the rows of drafting one token per sequence."""
        if at.own is None:
            draft = () if at.drafts is None else tuple(self._row(row, at.drafts) for _, row in self._drafts)
            return tuple(self._row(row, at.rows) for row in self.plan.rows), draft
        priced = [self._row(row, at.rows) for row in (*self.plan.rows, self._project)]
        own, further = slice(at.own), slice(at.own, None)
        return tuple(p.at(own) for p in priced[:-1]), tuple(priced[i].at(further, row) for i, row in self._drafts)

    @cached_property
    def _stages(self) -> list[Stage]:
        """What each pipeline stage runs, and how often."""
        found = []
        for i, layers in enumerate(self.stages):
            first, last = i == 0, i == len(self.stages) - 1
            outside = {FIRST: int(first), LAST: int(last), HAND_OVER: int(not last)}
            found.append(Stage((*Counter(self.table.layer_kinds[layers]).items(), *outside.items())))
        return found

    @cached_property
    def _calls(self) -> Counter[int]:
        """How often all stages together run the rows of each place."""
        calls: Counter[int] = Counter()
        for stage in self._stages:
            calls.update(dict(stage.calls))
        return calls

    @cached_property
    def _places(self) -> list[int]:
        """Where each row runs: in layers of its kind, or outside the layers."""

        def place(row: Row) -> int:
            if row.kind >= 0:
                return row.kind
            if isinstance(row, Collective) and row.op == "send_recv":
                return HAND_OVER
            at_start = row.module.startswith(("embed", "rotary")) or getattr(row, "name", "") == "embedding"
            return FIRST if at_start else LAST

        return [place(row) for row in self.plan.rows]

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
    def _drafts(self) -> list[tuple[int, Row]]:
        """What drafts a token: a layer of the last kind and the head (DeepSeek-V3, section 2.2), by their positions in
        the plan, after hidden state and embedding are projected together."""
        last = self.table.layer_kinds[-1]
        rows = [(len(self.plan.rows), self._project)]
        for i, row in enumerate(self.plan.rows):
            if row.kind == last or (row.kind < 0 and row.module.startswith("lm_head")):
                rows.append((i, row))
        return [(i, replace(row, module=f"mtp.{row.module}")) for i, row in rows]

    @cached_property
    def _project(self) -> Row:
        """``[T,2H] x [2H,H]``"""
        hidden = float(self.table.facts["hidden_size"])
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
            "tokens": at.capacity, "hidden": facts["moe_hidden_size"], "inter": facts["moe_intermediate_size"],
            "topk": facts["top_k"], "experts": facts["num_experts"], "slots": at.sizes.E * layout.ep,
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
