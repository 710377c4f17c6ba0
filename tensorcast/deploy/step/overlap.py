"""What a layer hides: communication behind another half batch, shared experts behind routed ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tensorcast.cost.contention import CONTENTION, Contention, beside
from tensorcast.cost.work import Array, Size
from tensorcast.deploy.exchange_kernels import inside_experts
from tensorcast.deploy.options import Options
from tensorcast.deploy.plan.plan import Collective, Plan, Row, moe_blocks
from tensorcast.profiles.engine import EngineProfile
from tensorcast.trace.moe import EXPERT_STAGES, is_shared
from tensorcast.trace.table import Op, OpTable

KIND_SUMS = ("rest", "shared", "experts", "dispatch", "combine", "before")
"""Where rows of a MoE layer stand (:func:`_place`); ``before``: of the rest what comes before the attention itself,
where that is a stage."""

PER_SEQUENCE = ("attention", "indexer_scores", "linear_attention", "ssm_scan", "causal_conv1d")
"""Ops that run per sequence: in a step with prompts they run once for the prompts and once for the decoding rows."""


@dataclass(frozen=True)
class Overlap:
    """Which rows of each kind of MoE layer may run at the same time, and how many seconds that hides.

    * External shared experts run on ranks of their own: the layer waits for the longer of them and the routed ones.
    * Dual-batch overlap: attention and experts of one half batch beside dispatch and combine of the other, the order
      of DeepSeek's published schedule: attention beside combine and dispatch, experts beside dispatch and combine.
      ``staged``, the order of its decode steps: one half is two stages behind the other, so that dispatch is beside
      shared experts and what comes before the attention itself, combine beside the rest of it, experts beside nothing.
      Shared experts run with attention; ``shared_last``: between their half's routed ones and the other half's next
      stage, so that combine alone has them beside it.
    * ``inside``: tokens travel inside the experts' kernel, which takes the longer of both.
    * Else, in small captured steps, a shared expert runs on a stream beside the exchange and the routed experts.

    ``positions``: of the plan's rows, by layer kind and place (:func:`_place`).
    """

    positions: Positions
    external: bool
    contention: Contention | None
    stream_tokens: Size
    staged: bool = False
    shared_last: bool = False
    inside: bool = False

    @classmethod
    def of(
        cls, plan: Plan, table: OpTable, engine: EngineProfile, options: Options, captured: bool, *,
        decode: bool = False,
    ) -> Overlap:
        halved = engine.halved_steps
        # an engine that halves no steps is asked what it would take in DeepSeek's order
        staged = decode if halved is None else ("decode" if decode else "prefill") in halved.two_stages
        late = halved is not None and halved.shared_last
        limit = engine.shared_expert_stream_tokens
        tokens = float(limit) if limit is not None and captured else 0.0
        inside = plan.all2all != "none" and inside_experts(options.all2all)
        contention = None if inside else CONTENTION.get(plan.all2all)
        positions = _positions(plan.frame, table, staged)
        return cls(positions, options.external_shared_experts > 0, contention, tokens, staged, late, inside)

    def hidden(self, layers: Array, busy: Array, tokens: Size, dual: bool | np.ndarray) -> Array:
        """Seconds that a layer of each kind hides over both half batches, where batches run as ``dual`` ones, and how
        much of them is communication, ``[kinds, 2, ...]``.

        ``layers [kinds, 6, ...]``: seconds of its rows by place (:data:`KIND_SUMS`), ``busy [kinds, 2, ...]`` those in
        which arithmetic or memory are busy: of experts and exchange, and of shared experts; all at ``tokens``.
        """
        found = np.zeros((len(layers), 2, *layers.shape[2:]))
        halved = np.logical_and(dual, self.contention is not None)
        for whole, seconds, own, kind in zip(found, layers, busy, sorted(self.positions), strict=True):
            attention, shared, routed, dispatch, combine, before = seconds
            moves = dispatch + combine
            within = np.minimum(moves, routed) if self.inside else 0.0
            whole[:] = within
            if not np.all(halved) and "shared" in self.positions[kind] and self.external:
                whole[0] = np.minimum(shared, routed + moves - within if self.inside else routed) + within
            elif not np.all(halved) and "shared" in self.positions[kind] and np.any(self.stream_tokens):
                # latency and network waits of one stream hide behind the other; arithmetic and memory traffic add up
                stream = moves + routed - within
                both = np.maximum(np.maximum(stream, shared), own[0] + own[1])
                beside_it = np.where(np.asarray(tokens) <= self.stream_tokens, stream + shared - both, 0.0)
                whole[0] = within + np.maximum(beside_it, 0.0 if self.inside else beside_it)
                whole[1] = np.minimum(whole[0], moves)
            if self.contention is None or not np.any(halved):
                continue
            saved: Size = 0.0
            if self.external:
                saved = np.minimum(shared, routed)
                routed, shared = routed - saved + shared, 0.0
            # one half batch computes while the other communicates
            if self.staged:
                pairs = [(before + shared, dispatch), (attention, combine), (routed, 0.0)] * 2
            else:
                out = 0.0 if self.shared_last else shared
                pairs = [
                    (attention + shared, combine), (attention + out, dispatch),
                    (routed, dispatch), (routed + shared - out, combine),
                ]
            together = sum(beside(compute, moved, self.contention) for compute, moved in pairs)
            alone = before + shared + attention + routed
            overlapped = 2.0 * (alone + dispatch + combine) - together
            both_halves = np.stack([2.0 * saved + overlapped, np.clip(overlapped, 0.0, 2.0 * moves)])
            whole[:] = np.where(halved, both_halves, whole)
        return found


Positions = dict[int, dict[str, list[int]]]


def _positions(plan: Plan, table: OpTable, staged: bool) -> Positions:
    """As :class:`Overlap` has them, found once for all plans of a frame."""
    known: dict[tuple[bool, bool], Positions] = vars(plan).setdefault("positions", {})
    fused = table.facts.fused_experts > 0  # of which only a gate is left, ahead of the experts
    if (staged, fused) not in known:
        blocks = moe_blocks(table)
        cores = {
            row.kind: i for i, row in reversed([*enumerate(plan.rows)])
            if isinstance(row, Op) and row.name in PER_SEQUENCE
        } if staged else {}
        found = known[staged, fused] = {}
        for i, row in enumerate(plan.rows):
            if row.kind in blocks:
                place = _place(row, {} if fused else blocks)
                place = "before" if staged and place == "rest" and i < cores.get(row.kind, 0) else place
                found.setdefault(row.kind, {}).setdefault(place, []).append(i)
    return known[staged, fused]


def _place(row: Row, blocks: dict[int, str]) -> str:
    """Where a row of a MoE layer stands: dispatch, experts, combine, shared (experts), or the rest."""
    if isinstance(row, Collective):
        if row.label in ("dispatch", "combine"):
            return row.label
        return "shared" if not row.label and is_shared(row.module, row.kind, blocks) else "rest"
    if row.stage in EXPERT_STAGES:
        return "experts"
    return "shared" if is_shared(row.module, row.kind, blocks) else "rest"
