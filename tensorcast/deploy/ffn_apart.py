"""Attention and FFN on GPUs of their own (AFD): a decode step of both sides, with micro-batches that go to and fro.

Attention ranks keep the cache and everything outside the FFN blocks; FFN ranks keep the router, shared and routed
experts and dense MLPs, the experts dealt out whole. As vLLM's plugin runs it (github.com/vllm-project/afd-plugin
1de1a99: gate on the FFN side, attention ranks sent to FFN ranks in blocks, two micro-batches), every layer hands the
hidden states of a micro-batch over and gets them back, while the others compute (the ping-pong of MegaScale-Infer,
arXiv:2504.02263). Both sides are deployments of the same model, of which each runs and holds its part alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import numpy as np

from tensorcast.cost.evidence import interval
from tensorcast.cost.memory import Memory
from tensorcast.cost.work import Size
from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.plan.plan import Row
from tensorcast.deploy.step.overlap import Overlap
from tensorcast.deploy.step.price import StepPrice
from tensorcast.errors import InputError
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.model import ModelProfile
from tensorcast.trace.cache import whole_model
from tensorcast.trace.moe import EXPERT_STAGES, blocks_of
from tensorcast.trace.table import Op, OpTable, per_table

MICRO_BATCHES = 2
"""As many as vLLM's plugin has (its dual-batch overlap, exactly two); MegaScale-Infer runs three and more."""

NOTES = (
    "no engine release runs attention and FFN apart: vLLM's plugin does, as an experiment",
    "how well the sides overlap is modelled, not measured: the interval is of kernels alone",
)

HIDDEN_BYTES = 2.0
"""A number of a hidden state on its way, in bf16."""


@dataclass(frozen=True, kw_only=True)
class FfnApart:
    """Two sides of one server: ``attention``, one of ``dp`` groups that know nothing of each other, holds no FFN block,
    ``ffn`` nothing else."""

    attention: Deployment
    dp: int
    ffn: Deployment
    micro_batches: int

    @property
    def attention_gpus(self) -> int:
        return self.attention.layout.tp * self.dp

    @property
    def ffn_gpus(self) -> int:
        return self.ffn.layout.world_size

    @property
    def gpus(self) -> int:
        """Of both sides."""
        return self.attention_gpus + self.ffn_gpus

    def __str__(self) -> str:
        return f"tp{self.attention.layout.tp}-dp{self.dp} + ffn{self.ffn_gpus}"

    def sent_bytes(self, batch: Size) -> Size:
        """Bytes that the busier end of a hand-over moves for a micro-batch of ``batch`` sequences per data-parallel
        rank: an attention rank its share of the tokens of its tensor-parallel group, an FFN rank all that come to
        it."""
        width = HIDDEN_BYTES * self.attention.raw.facts.hidden_size
        return np.maximum(batch / self.attention.layout.tp, self._ffn_tokens(batch)) * width

    def hand_over_s(self, batch: Size) -> Size:
        """Seconds of one way: inside a domain where both sides fit into one of a device, else over the slower of both
        outermost tiers."""
        a, f = self.attention.device, self.ffn.device
        near = a.name == f.name and self.gpus <= a.interconnect[0].size
        tiers = [a.interconnect[0]] if near else [a.interconnect[-1], f.interconnect[-1]]
        sent = self.sent_bytes(batch)
        ways = [float(tier.latency_s) + sent / float(tier.bandwidth_bytes_per_s) for tier in tiers]
        return reduce(np.maximum, ways)

    def memory(self, batch: Size, context: int) -> tuple[Memory, Memory]:
        """Of the fullest attention and FFN rank, at ``batch`` sequences per data-parallel rank."""
        return self.attention.memory(batch, 1, context), self.ffn.memory(self._ffn_tokens(batch), 1, context)

    def largest_batch(self, context: int) -> int:
        """Most sequences per data-parallel rank that attention ranks can keep; 0 if the weights of a side are too
        much."""
        return self.attention.largest_batch(1, context) if self.ffn.largest_batch(1, 0) else 0

    def check_room(self, batch: int, context: int) -> None:
        """Raise :class:`InputError` where a side does not fit."""
        attention, ffn = self.memory(batch, context)
        if attention.fits and ffn.fits:
            return
        name, one, side = ("FFN", ffn, self.ffn) if attention.fits else ("attention", attention, self.attention)
        need, most, weights = (float(value) / 1e9 for value in (one.total, one.budget, one.weights))
        largest = self.largest_batch(context)
        way_out = f"the largest --batch that fits is {largest}" if largest else f"use more {name} GPUs, or quantise"
        raise InputError(
            f"{self}: {need:.1f} GB on each {name} rank ({weights:.1f} GB of weights), over the budget of "
            f"{most:.1f} GB of {side.device.name}; {way_out}"
        )

    def _ffn_tokens(self, batch: Size) -> Size:
        return batch * self.dp / self.ffn_gpus

    def price(self, batch: Size, context: float) -> ApartPrice:
        """A decode step of ``batch`` sequences per data-parallel rank, ``context`` cached tokens each; of an array of
        batches, each of them at least as many as there are micro-batches."""
        count = max(1, min(self.micro_batches, int(np.min(batch))))
        micro = batch / count
        a = self.attention.step.price(micro, 1.0, 1.0 * context)
        f = self.ffn.step.price(self._ffn_tokens(micro), 1.0, 1.0 * context)
        attention, outside = _by_layer(a, self.attention.step.table)
        ffn, _ = _by_layer(f, self.ffn.step.table)
        own = a.overhead_s + (count - 1) * a.request_overhead_s  # what comes with sequences: with all of them
        way_s = self.hand_over_s(micro)
        kernels = ping_pong(attention, ffn, way_s, count) + count * outside
        return ApartPrice(
            apart=self, batch=batch, context=context, count=count, attention=a, ffn=f, seconds=kernels + own,
            overhead_s=own, attention_s=count * (sum(attention, 0.0) + outside), ffn_s=count * sum(ffn, 0.0),
            hand_over_s=way_s,
        )


@dataclass(frozen=True, kw_only=True)
class ApartPrice:
    """One step. ``attention_s`` and ``ffn_s``: seconds in which a rank of either side computes, for all ``count``
    micro-batches; ``hand_over_s``: one way of one micro-batch; ``overhead_s``: of the attention side's engine."""

    apart: FfnApart
    batch: Size
    context: float
    count: int
    attention: StepPrice
    ffn: StepPrice
    seconds: Size
    overhead_s: Size
    attention_s: Size
    ffn_s: Size
    hand_over_s: Size

    @property
    def tokens_per_s_per_gpu(self) -> Size:
        """New tokens of a step over its time and all GPUs of both sides."""
        return self.batch * self.apart.dp / self.seconds / self.apart.gpus

    @property
    def busy(self) -> tuple[Size, Size]:
        """Share of the step in which a rank of each side computes."""
        return self.attention_s / self.seconds, self.ffn_s / self.seconds

    def totals(self) -> dict[str, Any]:
        """The numbers of one step, units in the names; JSON-ready."""
        apart, (low, high), context = self.apart, self.interval_s, int(self.context)
        attention, ffn = apart.memory(self.batch, context)
        return {
            "model": apart.attention.model.name, "engine": apart.attention.engine.name, "layout": str(apart),
            "device": apart.attention.device.name, "ffn_device": apart.ffn.device.name,
            "tp": apart.attention.layout.tp, "dp": apart.dp, "attention_gpus": apart.attention_gpus,
            "ffn_gpus": apart.ffn_gpus, "world_size": apart.gpus, "phase": "decode",
            "batch_per_dp_rank": float(self.batch), "context": context,
            "micro_batches": self.count, "all2all": apart.ffn.step.plan.all2all,
            "quantization": apart.attention.quantization.describe(), "routing": apart.attention.options.routing,
            "step_s": float(self.seconds), "step_low_s": low, "step_high_s": high,
            "overhead_s": float(self.overhead_s), "attention_s": float(self.attention_s), "ffn_s": float(self.ffn_s),
            "hand_over_s": float(self.hand_over_s), "attention_busy": float(self.busy[0]),
            "ffn_busy": float(self.busy[1]), "tokens_per_s_per_gpu": float(self.tokens_per_s_per_gpu),
            "memory_bytes": {
                name: {"weights": float(one.weights), "kv_cache": float(one.kv_cache), "total": float(one.total),
                       "budget": float(one.budget)} for name, one in (("attention", attention), ("ffn", ffn))
            },
            "largest_batch_per_dp_rank": apart.largest_batch(context), "notes": list(NOTES),
        }  # fmt: skip

    @cached_property
    def error(self) -> Size:
        """Median relative error of the kernels of the side that takes longer; nothing measured stands behind how well
        the sides overlap."""
        return np.where(np.greater(self.attention_s, self.ffn_s), self.attention.error, self.ffn.error)[()]

    @property
    def interval_s(self) -> tuple[float, float]:
        """Ends of an 80 % interval from :attr:`error` alone."""
        return interval(float(self.seconds), float(self.error))


def ping_pong(attention: Sequence[Size], ffn: Sequence[Size], way_s: Size, count: int) -> Size:
    """Seconds until ``count`` micro-batches have passed all layers, attention and FFN of each ``attention[i]`` and
    ``ffn[i]`` seconds long, ``way_s`` there and as much back.

    Each side and each way takes one micro-batch after the other, in order. With layers all alike and the longer side
    never waiting that is MegaScale-Infer's ``(Ta + Tf + 2 Tc) + Tmax (count L - 1)``.
    """
    free = there = beyond = back = np.zeros(())
    ready: list[Size] = [free] * count
    for attention_s, ffn_s in zip(attention, ffn, strict=True):
        for i in range(count):
            free = np.maximum(free, ready[i]) + attention_s
            if not np.any(ffn_s):  # a layer without FFN hands nothing over
                ready[i] = free
                continue
            there = np.maximum(there, free) + way_s
            beyond = np.maximum(beyond, there) + ffn_s
            back = np.maximum(back, beyond) + way_s
            ready[i] = back
    return reduce(np.maximum, ready)


def _by_layer(price: StepPrice, table: OpTable) -> tuple[list[Size], Size]:
    """Seconds of every layer of one micro-batch, and of what is outside of layers."""
    layers, found = Counter(table.layer_kinds), dict[int, Size]()
    for row, calls in price.calls:
        found[row.row.kind] = found.get(row.row.kind, 0.0) + row.seconds * calls
    blocks = blocks_of(table.ops)
    # what runs beside the experts is hidden in their layers
    shown = 1.0 - price.hidden_s / np.maximum(sum((found.get(kind, 0.0) for kind in blocks), 0.0), 1e-30)
    each = {kind: found.get(kind, 0.0) * (shown if kind in blocks else 1.0) / n for kind, n in layers.items()}
    return [each[kind] for kind in table.layer_kinds], sum((s for kind, s in found.items() if kind < 0), 0.0)


@per_table
def ffn_paths(table: OpTable) -> dict[int, str]:
    """Layer kind -> path of its FFN: the block of experts, or the module of the last matmul where it attends to
    nothing and mixes no tokens."""
    found = blocks_of(table.ops)
    for kind in {op.kind for op in table.ops if op.kind >= 0} - {*found}:
        ops = [op for op in table.ops if op.kind == kind]
        last = next((op for op in reversed(ops) if op.name in ("mm", "addmm")), None)
        if last is None:
            continue
        path = last.module.rpartition(".")[0]
        mixing = any(op.module.startswith(path) for op in ops if op.name in MIXING)
        if path and not path.endswith("]") and not mixing:
            found[kind] = path
    return found


MIXING = ("attention", "kv_cache_write", "linear_attention", "ssm_scan", "causal_conv1d")
"""Ops that read other tokens: what they are in is no FFN."""


def _is_ffn(row: Row, paths: dict[int, str]) -> bool:
    path = paths.get(row.kind)
    inside = path is not None and (row.module == path or row.module.startswith(path + "."))
    return inside or (isinstance(row, Op) and row.stage in EXPERT_STAGES)


def _side(whole: Deployment, keep: Callable[[bool], bool]) -> Deployment:
    """The part of a deployment whose rows and weights ``keep`` says, of whether they are FFN."""
    step, paths = whole.step, ffn_paths(whole.step.table)
    held, runs = (
        replace(table, ops=tuple(op for op in table.ops if keep(_is_ffn(op, paths))))
        for table in (whole.raw, step.table)
    )
    inside = tuple(f"{path}." for path in paths.values())
    params = tuple(
        p for p in held.params if keep(p.role == "experts" or p.module.startswith(inside) or p.module in paths.values())
    )
    plan = replace(step.plan, rows=tuple(row for row in step.plan.rows if keep(_is_ffn(row, paths))))
    overlap = Overlap.of(plan, runs, whole.engine, whole.options, step.captured)
    return replace(
        whole, raw=replace(held, params=params), step=replace(step, table=runs, plan=plan, overlap=overlap, memo=None),
    )


def deploy_apart(
    model: ModelProfile, device: DeviceProfile, engine: EngineProfile, *, tp: int, dp: int, ffn_gpus: int,
    options: Options = Options(), micro_batches: int = MICRO_BATCHES, ffn_device: DeviceProfile | None = None,
) -> FfnApart:
    """Attention on ``tp * dp`` GPUs of ``device``, experts on ``ffn_gpus`` of ``ffn_device`` (unasked the same).

    Raises :class:`InputError`, one line, on what cannot be.
    """
    facts = whole_model(model, "decode", options.quant).facts
    if not facts.num_experts:
        raise InputError(f"--ffn-gpus {ffn_gpus}: {model.name} has no experts; FFN ranks are for experts")
    if ffn_gpus < 1 or facts.num_experts % ffn_gpus:
        raise InputError(f"--ffn-gpus {ffn_gpus}: {facts.num_experts} experts do not divide over {ffn_gpus} FFN ranks")
    if tp < 1 or dp < 1:
        raise InputError(f"layout: tp = {tp} and dp = {dp} must be at least 1")
    if tp * dp < ffn_gpus:
        raise InputError(
            f"--ffn-gpus {ffn_gpus}: more than the {tp * dp} attention ranks, each of which has one FFN rank to send to"
        )
    if micro_batches < 1:
        raise InputError(f"--micro-batches {micro_batches}: must be at least 1")
    if options.mtp_depth:
        raise InputError(f"--mtp-depth {options.mtp_depth}: drafts are not simulated with attention and FFN apart")
    if options.dual_batch_overlap:
        raise InputError("--dual-batch-overlap: with attention and FFN apart that is what --micro-batches do")
    attention = attention_side(model, device, engine, tp, options)
    ffn = ffn_side(model, ffn_device or device, engine, ffn_gpus, options)
    return FfnApart(attention=attention, dp=dp, ffn=ffn, micro_batches=micro_batches)


def attention_side(
    model: ModelProfile, device: DeviceProfile, engine: EngineProfile, tp: int, options: Options
) -> Deployment:
    """All but the FFN blocks, on ``tp`` GPUs. Raises :class:`InputError` where ``tp`` breaks a rule."""
    experts = whole_model(model, "decode", options.quant).facts.num_experts
    # experts are of the other side: whole ones, which no rule forbids, stand here for none
    layout = Layout(tp, tp=tp, ep=tp if experts % tp == 0 else 1)
    own = replace(options, all2all="auto", dispatch=None, combine=None)  # nothing is exchanged here
    return _side(deploy(model, device, engine, layout, "decode", options=own), lambda ffn: not ffn)


def ffn_side(
    model: ModelProfile, device: DeviceProfile, engine: EngineProfile, gpus: int, options: Options
) -> Deployment:
    """The FFN blocks, their experts dealt out over ``gpus``. Raises :class:`InputError` where that cannot be."""
    layout = Layout(gpus, tp=1, dp=gpus, ep=gpus)
    own = replace(options, dcp=1)  # no cache is kept here
    return _side(deploy(model, device, engine, layout, "decode", options=own), lambda ffn: ffn)
