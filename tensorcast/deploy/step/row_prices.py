"""One row: kernel or collective, with its fitted correction.

Rows are asked first and priced then: in between, the kernels' fitted models answer for all of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorcast.cost.collectives import collective_time
from tensorcast.cost.evidence import LEVELS
from tensorcast.cost.formulas import REDUCES, Context, work_of
from tensorcast.cost.kernels.corrections import (
    BatchedCorrections,
    Correction,
    Corrections,
    PendingCorrection,
    SeveralCorrections,
    SeveralPending,
)
from tensorcast.cost.roofline import BORROWED_ERROR, Devices
from tensorcast.cost.row_seconds import RowSeconds, row_seconds
from tensorcast.cost.work import Size, Work, memory, plain, some
from tensorcast.deploy.plan.plan import Collective
from tensorcast.deploy.step.price import RowPrice, Spending, one_level, untold
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.trace.moe import EXPERT_STAGES
from tensorcast.trace.table import Op, OpTable

EXCHANGE_SMS = 20.0
"""Processors that DeepEP's two-stage kernels take by default (github.com/deepseek-ai/DeepEP at 189df34,
deep_ep/buffers/legacy.py, ``Buffer.num_sms``)."""

EXPERTS_CALL = frozenset(("products", "permute", "quantise", "activation", "unpermute"))
"""What an engine's call of experts does: the products, with what their constants count by row, and what stands around
them in a step."""


def part_of_call(op: Op) -> str:
    """Which of :data:`EXPERTS_CALL` a row of experts is."""
    if op.stage != "experts":
        return "quantise" if op.name == "quantize_activation" else op.stage
    return {"grouped_matmul": "products", "quantize_activation": "quantise"}.get(op.name, "activation")


Asked = Corrections | BatchedCorrections | SeveralCorrections
"""Who answers what fitted models make of a kernel: at once, or when all have been asked."""

Starts = NDArray[np.int_] | None

Pending = Callable[[], RowPrice]
"""The price of a row that has asked for its corrections; call it when they are there."""

@dataclass(frozen=True)
class Measured:
    """What a fitted model makes of a kernel, times a factor ``by`` that was measured, with an ``error`` of its own."""

    known: Correction | PendingCorrection | SeveralPending | Measured | None
    own: str
    by: float
    error: float
    level: int = LEVELS.index("calibrated")

    @property
    def silent(self) -> Any:
        """For which of several calls no model speaks."""
        return None if self.known is None else self.known.silent

    @property
    def engine(self) -> Any:
        """Whose constants hold."""
        return self.own if self.known is None else self.known.engine

    @property
    def factor(self) -> Size:
        """Told once the fitted model has answered."""
        return self.by * (1.0 if self.known is None else self.known.factor)


Known = Correction | PendingCorrection | SeveralPending | Measured | None

Works = list[tuple[Work, Known]]
"""Kernels of a row, one after another, each with what corrects it."""


class FeedForward(NamedTuple):
    """Sizes of a model's experts as kernel models know them, numbers or columns. ``gated``: 1 where experts' first
    matmul makes gate and up, 0 where there is no gate; ``fused``: shared experts among the routed ones."""

    hidden: Size
    inter: Size
    topk: Size
    experts: Size
    fused: Size
    gated: Size


@dataclass(frozen=True, kw_only=True)
class RowPricer:
    """Prices of rows on a device under an engine.

    ``distinct``: nodes and ranks that a token's copies go to, on average; with ``sources`` and sizes of the layout, a
    column ``[members, 1]`` where several deployments are priced as one. ``graph_tokens``: tokens of the largest step
    that is replayed from a graph. ``held``: of :data:`EXPERTS_CALL`, what experts' products were timed with: they
    take all of it, the rows of these nothing. ``joins``: norms run in the kernels of the all-reduces before them.
    """

    table: OpTable
    device: DeviceProfile
    engine: EngineProfile
    corrections: Corrections
    graph_tokens: float
    held: frozenset[str]
    tp: int
    ep: Size
    etp: Size
    feed_forward: FeedForward
    balanced: bool
    joins: bool
    sources: Mapping[str, Size]
    """Whose experts' kernels run, by dtype; hangs on the spread of experts."""
    distinct: Mapping[str, Size]
    tells: bool = True
    """Whether prices tell what rows compute and move, beside how long they take."""

    def seconds(self, op: Op, at: Context, works: Works) -> RowSeconds:
        """Seconds of an op whose kernels are ``works`` (:meth:`works`)."""
        alone: Size = 1.0  # or part of the all-reduce's kernel before it
        if "joined_tokens" in op.attrs:
            alone = np.where(np.asarray(at.sizes.tokens) > op.attrs["joined_tokens"], 1.0, 0.0)[()]
        launched = partial(self._launched, at, alone)
        return row_seconds(works, self.device, self.engine.name, launched, passes="products" in self.held)

    def _launched(self, at: Context, alone: Size, kernel_s: Size, launch_s: Size) -> Size:
        """Seconds of launching, of which ``launch_s`` are in kernel times measured in graph replay already.

        Inside a captured graph: what the gap exceeds it by is added, and the whole of a device's own gap, whose kernels
        were timed alone. Launched one by one: the wait for the host.
        """
        between, waits = self.engine.graph_launch_gap_s, self.engine.eager_launch_gap_s
        own = 0.0 if self.device.graph_gap_s is None else plain(self.device.graph_gap_s)
        replayed = np.maximum(plain(between) - launch_s, 0.0) + own
        if np.ndim(self.graph_tokens) == 0 and self.graph_tokens == math.inf:
            return (launch_s + replayed) * alone
        gap = np.maximum(plain(waits) - kernel_s, 0.0)
        if some(self.graph_tokens):
            gap = np.where(np.asarray(at.sizes.tokens) <= self.graph_tokens, replayed, gap)[()]
        return (launch_s + gap) * alone

    def works(self, op: Op, at: Context, asked: Asked) -> Works:
        """The row's kernels, each with what the device's fitted model makes of its formula: asked for here."""
        if op.name != "grouped_matmul" or at.backend in ("eager", "batched_mm"):
            if op.stage in EXPERT_STAGES and part_of_call(op) in self.held:
                if op.stage != "unpermute" or REDUCES.isdisjoint(op.parts):
                    return []
                # the norm that their rows' sum is fused into is left: it reads the sum
                at = replace(at, sizes=replace(at.sizes, R=at.sizes.tokens))
            kernels = op.attrs.get("kernels", "")
            variant = "absorb" if op.name == "mla_absorb" else kernels
            found: Works = []
            for work in work_of(op, at):
                known = asked.at(work.family, work.dtype, variant, work.sizes)
                # the engine's usual ones stand in for a library that no table timed, one head of keys for latents
                other = known is not None and (known.variant != kernels or bool(op.attrs.get("latent")))
                lent = bool(kernels) and other
                found.append((work, Measured(known, self.engine.name, 1.0, BORROWED_ERROR) if lent else known))
            if "measured" in op.attrs:  # attention of a vision tower
                found = [(work, Measured(known, self.engine.name, *op.attrs["measured"])) for work, known in found]
            return found
        (work,) = work_of(op, at)
        if at.backend == "masked" and not at.masked_skips:
            return [(work, None)]
        # the experts' whole feed-forward network as models know it: up, activation and down in one
        own = self.feed_forward
        sizes = {
            "tokens": at.capacity, "hidden": own.hidden, "inter": own.inter, "topk": own.topk, "experts": own.experts,
            # a shared expert among them is more of their rows, not another model
            "slots": (at.sizes.E - own.fused) * self.ep, "moe_tp": self.etp, "moe_ep": self.ep, "gated": own.gated,
            "source": self.sources.get(work.dtype, 0.0),  # whose kernels run
            "skew": 0.0 if self.balanced else -1.0, **work.sizes,
        }
        known = asked.at(work.family, work.dtype, at.backend, sizes)
        if known is not None and known.variant == at.backend:  # a kernel of that layout was fitted over plain tiles
            (work,) = work_of(op, replace(at, backend="grouped_mm"))
        if "activation" in self.held and op.attrs["projection"] == "down":  # what the formula has between up and down
            read, written = work.elements * (1.0 + own.gated) * 2.0, at.precision(op, op.outputs[0]).activation_bytes
            return [(memory(read, work.elements * written), known), (work, known)]
        return [(work, known)]

    def own_all_reduce(self, ranks: int) -> bool:
        """Whether the engine's own kernels may all-reduce among so many. They stop at a host's GPUs (vLLM 0.24.0 and
        SGLang 0.5.14, distributed/device_communicators/custom_all_reduce.py), also where NVLink joins several, but for
        those that a norm is joined to."""
        engine, near = self.engine, self.device.interconnect[0]
        inside = ranks <= (near.host_gpus or near.size) or (engine.all_reduce_over_hosts and ranks <= near.size)
        return engine.custom_all_reduce and (inside or (self.joins and ranks <= near.size))

    def collective(
        self, row: Collective, at: Context, asked: Corrections | BatchedCorrections, *, steps: Starts = None
    ) -> Pending:
        """Ask for what the device's fitted model makes of a collective on its innermost links, or of an exchange.
        ``steps``: where those of each step begin, if they are of several: what stands behind them is told by step."""
        units = at.sizes.tokens if row.per == "token" else at.sizes.B
        known: Correction | PendingCorrection | None = None
        if row.exchange.get("kind") in ("low_latency", "high_throughput"):
            facts, copies = self.table.facts, row.exchange["copies"]
            hidden = float(facts.moe_hidden_size)
            sizes = {
                "tokens": units / self.tp, "hidden": hidden, "topk": copies, "experts": facts.num_experts,
                "ranks": row.ranks, "nodes": -(-row.ranks // self.device.interconnect[0].size),
                "copy_bytes": row.scale * self.tp / copies / hidden, "sms": EXCHANGE_SMS,
            }
            known = asked.at("moe_exchange", "any", f"{row.exchange['kind']}:{row.exchange['phase']}", sizes)
        elif not row.exchange and len(row.extent) == 1:
            sizes = {"ranks": row.ranks, "payload_bytes": row.scale * units}
            own = row.op == "all_reduce" and self.own_all_reduce(row.ranks)
            known = asked.at(row.op, "any", "custom" if own else "nccl", sizes)
        return partial(self._collective, row, at, row.scale * units, known, steps)

    def _collective(
        self, row: Collective, at: Context, payload: Size, known: Correction | PendingCorrection | None, steps: Starts
    ) -> RowPrice:
        options = {**row.exchange} if self.own_all_reduce(row.ranks) else {**row.exchange, "custom": False}
        points = at.points if row.exchange else None
        if options.get("kind") == "high_throughput":
            options |= {"distinct_nodes": self.distinct["nodes"], "distinct_ranks": self.distinct["ranks"]}
            if points is not None:  # the busiest node and rank receive more than the mean, and send as much back
                options["distinct_nodes"] = self.distinct["nodes"] * points.nodes
                options["distinct_ranks"] = self.distinct["ranks"] * points.ranks
        elif points is not None:
            payload = payload * points.copies
        engine = known.engine if known is not None else self.engine.name
        time = collective_time(row.op, payload, row.extent, self.device, engine=engine, **options)
        kernel_s = time.seconds if known is None else time.seconds * known.factor
        tier = next(t for t in self.device.interconnect if t.name == time.tier)
        on_wire = time.wire_bytes / tier.among(row.extent[0])
        seconds = self._launched(at, 1.0, kernel_s, kernel_s)
        parts = {"compute": 0.0, "memory": 0.0, "network": on_wire, "latency": np.maximum(seconds - on_wire, 0.0)}
        spending = Spending(wire_bytes=time.wire_bytes, parts=parts)
        algorithm = time.algorithm if isinstance(time.algorithm, str) else str(np.ravel(time.algorithm)[0])
        level, error = (LEVELS.index(time.evidence), time.error) if known is None else (known.level, known.error)
        if known is None and steps is not None and np.ndim(time.calibrated):
            own = np.logical_and.reduceat(time.calibrated, steps)
            levels = np.where(own, LEVELS.index("calibrated"), LEVELS.index("datasheet"))
            level = np.repeat(levels, np.diff([*steps, np.size(payload)]))
        return RowPrice(
            row=row, seconds=seconds, waits_s=on_wire + parts["latency"], family=row.op, level=one_level(level),
            error=error, spend=(lambda: spending) if self.tells else untold,
            detail=f"{row.group}{row.ranks} {time.tier} {algorithm}",
        )


@dataclass(frozen=True)
class _Engines:
    """Engines of calls that are priced as one: the name of each device's, and numbers for each call."""

    name: tuple[str, ...]
    graph_launch_gap_s: Size
    eager_launch_gap_s: Size


def side_by_side(pricers: Sequence[RowPricer], calls: Sequence[int]) -> RowPricer:
    """A pricer of ``calls`` of each of ``pricers``, one's after another's, that are on devices and under engines of
    their own; all else is as the first has it."""
    devices = Devices(tuple([one.device for one in pricers]), tuple(calls))
    gaps = ([float(getattr(one.engine, f"{kind}_launch_gap_s")) for one in pricers] for kind in ("graph", "eager"))
    # a joined pricer holds columns where a pricer holds numbers
    own: dict[str, Any] = {
        "device": devices, "engine": _Engines(tuple([one.engine.name for one in pricers]), *map(devices.column, gaps)),
        "graph_tokens": devices.column([one.graph_tokens for one in pricers]),
    }
    return replace(pricers[0], **own)
