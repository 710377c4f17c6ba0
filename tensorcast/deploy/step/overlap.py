"""What a layer hides: communication behind another half batch, shared experts behind routed ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from tensorcast.cost.contention import CONTENTION, Contention, beside, two_streams
from tensorcast.deploy.options import Options
from tensorcast.deploy.plan.moe_blocks import EXPERT_STAGES, blocks_of, is_shared
from tensorcast.deploy.plan.plan import Collective, Plan, Row
from tensorcast.deploy.step.price import RowPrice, pick, total
from tensorcast.profiles.engine import EngineProfile
from tensorcast.trace.table import Op, OpTable

Rows = Sequence[RowPrice]
Parts = dict[str, list[RowPrice]]
"""Rows of a layer by where they stand (see :func:`_place`)."""


class Overlap:
    """Which rows of each kind of MoE layer may run at the same time, and how many seconds that hides.

    * External shared experts run on ranks of their own: the layer waits for the longer of them and the routed ones.
    * Dual-batch overlap: attention and experts of one half batch beside dispatch and combine of the other, the order
      of DeepSeek's published schedule: attention beside combine and dispatch, experts beside dispatch and combine.
    * Else, in small captured steps, a shared expert runs on a stream beside the exchange and the routed experts.
    """

    def __init__(
        self, plan: Plan, table: OpTable, engine: EngineProfile, options: Options, captured: bool
    ) -> None:
        self.dual = options.dual_batch_overlap
        self.external = options.external_shared_experts > 0
        self.contention = CONTENTION.get(plan.all2all)
        limit = engine.shared_expert_stream_tokens
        self.stream_tokens = float(limit) if limit is not None and captured else 0.0
        self._plan, self._table = plan, table

    @cached_property
    def places(self) -> dict[int, dict[str, list[int]]]:
        """Positions of the rows of each kind of MoE layer by where they stand (see :func:`_place`)."""
        blocks = blocks_of(self._table.ops)
        found: dict[int, dict[str, list[int]]] = {}
        for i, row in enumerate(self._plan.rows):
            if row.kind in blocks:
                found.setdefault(row.kind, {}).setdefault(_place(row, blocks), []).append(i)
        return found

    def hidden(self, rows: Rows, tokens: Any, at: Any = None) -> tuple[dict[int, Any], dict[int, Any]]:
        """Seconds hidden per layer of each kind, over both half batches, and how much of them is communication.

        ``rows`` are priced at ``tokens``; ``at``: which of these cases every batch is, None: they are the batches.
        """
        hidden: dict[int, Any] = {}
        communication: dict[int, Any] = {}
        for kind, places in self.places.items():
            part = {name: [rows[i] for i in found] for name, found in places.items()}
            hidden[kind], communication[kind] = self._layer(part, tokens, at)
        return hidden, communication

    def _layer(self, part: Parts, tokens: Any, at: Any) -> tuple[Any, Any]:
        if self.contention is None or not np.any(self.dual):
            saved, communication = self._one_batch(part, tokens)
            return pick(saved, at), pick(communication, at)
        halves = [pick(value, at) for value in self._two_halves(part, self.contention)]
        if not np.all(self.dual):
            one = [pick(value, at) for value in self._one_batch(part, tokens)]
            halves = [np.where(self.dual, *pair) for pair in zip(halves, one, strict=True)]
        return halves[0], halves[1]

    def _two_halves(self, part: Parts, contention: Contention) -> tuple[Any, Any]:
        """One half batch computes while the other communicates."""
        shared, routed = _seconds(part.get("shared", [])), _seconds(part.get("experts", []))
        dispatch, combine = _seconds(part.get("dispatch", [])), _seconds(part.get("combine", []))
        attention, saved = _seconds(part.get("rest", [])), 0.0
        if self.external:
            saved = np.minimum(shared, routed)
            routed = routed - saved + shared
        else:
            attention = attention + shared
        serial = 2.0 * (attention + routed + dispatch + combine)
        pairs = (attention, combine), (attention, dispatch), (routed, dispatch), (routed, combine)
        overlapped = serial - sum(beside(compute, moved, contention) for compute, moved in pairs)
        return 2.0 * saved + overlapped, np.clip(overlapped, 0.0, 2.0 * (dispatch + combine))

    def _one_batch(self, part: Parts, tokens: Any) -> tuple[Any, Any]:
        """Shared experts beside routed ones, on ranks or on a stream of their own."""
        shared, experts = part.get("shared", []), part.get("experts", [])
        if self.external:
            return np.minimum(_seconds(shared), _seconds(experts)), 0.0
        if not shared or not self.stream_tokens:
            return 0.0, 0.0
        moves = [*part.get("dispatch", []), *part.get("combine", [])]
        main = [*experts, *moves]
        both = two_streams(_seconds(main), _busy(main), _seconds(shared), _busy(shared))
        saved = np.where(np.asarray(tokens) <= self.stream_tokens, _seconds(main) + _seconds(shared) - both, 0.0)[()]
        return saved, np.minimum(saved, _seconds(moves))


def _place(row: Row, blocks: dict[int, str]) -> str:
    """Where a row of a MoE layer stands: dispatch, experts, combine, shared (experts), or the rest."""
    if isinstance(row, Collective):
        if row.label in ("dispatch", "combine"):
            return row.label
        return "shared" if not row.label and is_shared(row.module, row.kind, blocks) else "rest"
    if isinstance(row, Op) and row.stage in EXPERT_STAGES:
        return "experts"
    return "shared" if is_shared(row.module, row.kind, blocks) else "rest"


def _seconds(rows: Rows) -> Any:
    return total(row.seconds for row in rows)


def _busy(rows: Rows) -> Any:
    return total(row.busy_s for row in rows)
