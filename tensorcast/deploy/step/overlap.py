"""What a layer hides: communication behind another half batch, shared experts behind routed ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tensorcast.cost.contention import CONTENTION, Contention, beside
from tensorcast.cost.work import Size
from tensorcast.deploy.options import Options
from tensorcast.deploy.plan.plan import Collective, Plan, Row
from tensorcast.deploy.step.price import RowPrice, Where, pick, seconds_of, total
from tensorcast.profiles.engine import EngineProfile
from tensorcast.trace.moe import EXPERT_STAGES, blocks_of, is_shared
from tensorcast.trace.table import OpTable

Hidden = tuple[Size, Size]
"""Seconds that a layer hides, and how much of them is communication."""


@dataclass(frozen=True)
class Overlap:
    """Which rows of each kind of MoE layer may run at the same time, and how many seconds that hides.

    * External shared experts run on ranks of their own: the layer waits for the longer of them and the routed ones.
    * Dual-batch overlap: attention and experts of one half batch beside dispatch and combine of the other, the order
      of DeepSeek's published schedule: attention beside combine and dispatch, experts beside dispatch and combine.
    * Else, in small captured steps, a shared expert runs on a stream beside the exchange and the routed experts.

    ``positions``: of the plan's rows, by layer kind and place (:func:`_place`).
    """

    positions: dict[int, dict[str, list[int]]]
    external: bool
    contention: Contention | None
    stream_tokens: float

    @classmethod
    def of(cls, plan: Plan, table: OpTable, engine: EngineProfile, options: Options, captured: bool) -> Overlap:
        blocks = blocks_of(table.ops)
        apart = {} if table.facts.fused_experts else blocks  # of fused ones only a gate is left, ahead of the experts
        positions: dict[int, dict[str, list[int]]] = {}
        for i, row in enumerate(plan.rows):
            if row.kind in blocks:
                positions.setdefault(row.kind, {}).setdefault(_place(row, apart), []).append(i)
        limit = engine.shared_expert_stream_tokens
        tokens = float(limit) if limit is not None and captured else 0.0
        return cls(positions, options.external_shared_experts > 0, CONTENTION.get(plan.all2all), tokens)

    def hidden(
        self, rows: Sequence[RowPrice], tokens: Size, dual: bool | np.ndarray, at: Where
    ) -> dict[int, Hidden]:
        """What a layer of each kind hides over both half batches, where batches run as ``dual`` ones.

        ``rows`` are priced at ``tokens``; ``at``: which of these cases every batch is, None: they are the batches.
        """
        hidden: dict[int, Hidden] = {}
        for kind, places in self.positions.items():
            part = {name: [rows[i] for i in found] for name, found in places.items()}
            halves = one = None
            if self.contention is not None and np.any(dual):
                halves = [pick(value, at) for value in self._two_halves(part, self.contention)]
            if halves is None or not np.all(dual):
                one = [pick(value, at) for value in self._one_batch(part, tokens)]
            if halves is not None and one is not None:
                halves = [np.where(dual, *pair) for pair in zip(halves, one, strict=True)]
            saved, communication = halves or one or (0.0, 0.0)
            hidden[kind] = saved, communication
        return hidden

    def _two_halves(self, part: dict[str, list[RowPrice]], contention: Contention) -> Hidden:
        """One half batch computes while the other communicates."""
        attention, shared, routed, dispatch, combine = (
            total(map(seconds_of, part.get(name, ()))) for name in ("rest", "shared", "experts", "dispatch", "combine")
        )
        saved: Size = 0.0
        if self.external:
            saved = np.minimum(shared, routed)
            routed = routed - saved + shared
        else:
            attention = attention + shared
        serial = 2.0 * (attention + routed + dispatch + combine)
        pairs = (attention, combine), (attention, dispatch), (routed, dispatch), (routed, combine)
        overlapped = serial - sum(beside(compute, moved, contention) for compute, moved in pairs)
        return 2.0 * saved + overlapped, np.clip(overlapped, 0.0, 2.0 * (dispatch + combine))

    def _one_batch(self, part: dict[str, list[RowPrice]], tokens: Size) -> Hidden:
        """Shared experts beside routed ones, on ranks or on a stream of their own."""
        shared, experts = part.get("shared", []), part.get("experts", [])
        if not shared or not (self.external or self.stream_tokens):
            return 0.0, 0.0
        beside_s, experts_s = total(map(seconds_of, shared)), total(map(seconds_of, experts))
        if self.external:
            return np.minimum(beside_s, experts_s), 0.0
        moves = [*part.get("dispatch", []), *part.get("combine", [])]
        moves_s = total(map(seconds_of, moves))
        main_s, main_busy, busy = moves_s + experts_s, *(
            total(row.seconds - row.waits_s for row in rows) for rows in ([*experts, *moves], shared)
        )
        # latency and network waits of one stream hide behind the other; arithmetic and memory traffic add up
        both = np.maximum(np.maximum(main_s, beside_s), main_busy + busy)
        saved = np.where(np.asarray(tokens) <= self.stream_tokens, main_s + beside_s - both, 0.0)[()]
        return saved, np.minimum(saved, moves_s)


def _place(row: Row, blocks: dict[int, str]) -> str:
    """Where a row of a MoE layer stands: dispatch, experts, combine, shared (experts), or the rest."""
    if isinstance(row, Collective):
        if row.label in ("dispatch", "combine"):
            return row.label
        return "shared" if not row.label and is_shared(row.module, row.kind, blocks) else "rest"
    if row.stage in EXPERT_STAGES:
        return "experts"
    return "shared" if is_shared(row.module, row.kind, blocks) else "rest"
