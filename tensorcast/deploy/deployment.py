"""Deployment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from tensorcast.cost.activations import activation_bytes
from tensorcast.cost.memory import (
    Memory,
    PackedCache,
    cache_budget,
    cache_entries,
    low_latency_buffer_bytes,
    packed_cache,
    room_taken,
    sequence_caches,
    summed,
    weights_of_stages,
)
from tensorcast.cost.stages import stages_alike
from tensorcast.cost.work import Array, Size
from tensorcast.deploy.engine_limits import engine_can_run, unasked_exchange
from tensorcast.deploy.exchange_kernels import EXCHANGE_KERNELS, broken_exchange
from tensorcast.deploy.layout import Layout, attention_dp, broken_parts, check
from tensorcast.deploy.options import Options, Place, check_options, idle_options
from tensorcast.deploy.plan.context import context_cut, prompt_cut
from tensorcast.deploy.plan.kernels import expert_sources, kernels_of
from tensorcast.deploy.plan.memory_share import memory_share
from tensorcast.deploy.plan.plan import block_form, choose_all2all, make_plan
from tensorcast.deploy.plan.switches import as_asked, served_with
from tensorcast.deploy.step.make import make_step
from tensorcast.deploy.step.sizes import KV_BYTES
from tensorcast.deploy.step.step import Step
from tensorcast.errors import InputError
from tensorcast.modeling.quantization import Quantization, mxfp4_padding
from tensorcast.profiles.config_values import is_one_of, text_of
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.kept import same
from tensorcast.profiles.memory import MIB, Kept, unasked_cache
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.store import load_model
from tensorcast.trace.cache import RankForm, rank_tables, whole_model
from tensorcast.trace.dims import Sizes
from tensorcast.trace.table import OpTable, has_states


class Stages(NamedTuple):
    """Bytes of weights on the fullest rank ``[stages, ...]`` of pipeline stages, -inf of deployments whose pipeline has
    no such stage; each one's layers, of how many stages its pipeline is, and its layers of each kind."""

    weights: Array
    layers: tuple[slice, ...]
    pipelines: tuple[int, ...]
    counts: Mapping[int, Array]


@dataclass(frozen=True)
class Deployment:
    """Everything that is fixed before a batch is chosen; prices and memory for any batch follow."""

    model: ModelProfile
    device: DeviceProfile
    engine: EngineProfile
    layout: Layout
    phase: str
    options: Options
    quantization: Quantization
    raw: OpTable
    step: Step
    tower_bytes: float = field(default=0.0, kw_only=True)
    """On each rank, of the vision tower beside the language model, where it is there."""

    def memory(self, batch: Size, new: Size, past: Size) -> Memory:
        """Memory of a step of ``batch`` sequences per data-parallel rank that end at ``past + new`` tokens.

        Each may be an array; then so are the parts that grow with it.
        """
        weights, cache = self.held(np.asarray(batch, dtype=float), past + new)
        beside = activations, communication, graphs = self._beside(batch, new, past)
        found = {
            "weights": weights, "kv_cache": cache, "activations": activations, "communication": communication,
            "engine": self.context_bytes + graphs, "cache_budget": self._left(weights, *beside),
        }
        plain = {name: float(value) if np.ndim(value) == 0 else value for name, value in found.items()}
        return Memory(**plain, capacity=float(self.device.memory_bytes))

    def cache_budget(self, batch: Size, new: Size, past: Size, *, chunk: Size | None = None) -> Size:
        """That of :meth:`memory` alone: of one stage, what its weights leave needs no cache to be known. ``chunk``:
        prompt tokens of a step per rank; an engine that counts them leaves more for more than it takes unasked."""
        stages = self.stages.weights
        one = stages[0] + self.tower_bytes if len(stages) == 1 else self.held(np.asarray(batch), past + new)[0]
        own = self.engine.tokens_per_step(self.device)
        tokens = None if chunk is None or np.all(np.less_equal(chunk, own)) else np.maximum(chunk, own)
        return self._left(one, *self._beside(batch, new, past), tokens)

    def _left(
        self, weights: Size, activations: Size, communication: Size, graphs: Size, tokens: Size | None = None
    ) -> Size:
        """What the engine's memory settings leave for the cache beside all these, with steps of ``tokens``."""
        capacity, context = float(self.device.memory_bytes), self.context_bytes
        share = memory_share(
            self.engine, self.device, self.layout, self.raw.facts.num_experts > 0, self.model.config,
            phase=self.phase, served=served_with(self.options, self.step.plan.all2all), tokens=tokens,
        )
        if self.engine.reserve is not None or self.engine.memory_covers != "weights_and_cache":
            share = share - graphs / capacity  # else they take what is left beside
        return cache_budget(
            self.engine.memory_covers, share, capacity=capacity, context=context, weights=weights,
            beside=activations + communication + context + graphs,
        )

    def _beside(self, batch: Size, new: Size, past: Size) -> tuple[Size, Size, Size]:
        """Bytes of activations, of the exchange between experts and of captured steps."""
        sequences = np.asarray(batch, dtype=float)
        micro = np.maximum(1.0, np.minimum(self.layout.pp, sequences))
        sizes = self.step.sizes.context(sequences / micro, 1.0 * new, 1.0 * past).sizes
        most_live, most_sent = self.profiled
        sent = sequences * new / (self.options.pcp if self.phase == "prefill" else 1)
        return (
            np.maximum(activation_bytes(self.step.table, sizes), most_live),
            np.maximum(self._communication_bytes(sent, sizes), most_sent),
            self.graph_bytes(sequences) if self.phase == "decode" else 0.0,
        )

    @cached_property
    def context_bytes(self) -> Size:
        """Bytes in use beside weights, cache and activations, before decode steps are captured."""
        layout, collective = self.layout, self.engine.collective_bytes
        several = np.greater(layout.tp * layout.dp * layout.pp, 1)
        return float(self.engine.reserved_bytes) + several * (0.0 if collective is None else float(collective))

    @cached_property
    def profiled(self) -> tuple[Size, Size]:
        """Bytes of activations and of the exchange between experts in the step that the engine profiles before it
        counts what is left for the cache; 0 if none is."""
        rule = self.engine.profiled_step
        if rule is None or self.phase == "encode":
            return 0.0, 0.0
        tokens = float(self.engine.tokens_per_step(self.device, 1, self.step.plan.all2all))
        sizes = self.step.sizes.context(tokens / self.step.sizes.verify, 1.0, 0.0).sizes
        memory = float(self.device.memory_bytes) / MIB
        sampled = max((count for size, count in rule.sequences.items() if memory >= size), default=0)
        logits = rule.logit_bytes * sampled * self.raw.facts.vocab_size
        live = activation_bytes(self.step.table, sizes, head=False)
        text = text_of(self.model.config)
        if rule.latent_tokens and text.get("kv_lora_rank"):  # a context's keys and values, worked out of its latents
            heads = text["num_attention_heads"] / self.layout.tp
            width = text["qk_nope_head_dim"] + text["v_head_dim"]
            live = np.maximum(live, 2.0 * rule.latent_tokens * heads * width)
        return np.maximum(live, logits), self._communication_bytes(tokens, sizes)

    @property
    def unasked_sequences(self) -> float:
        """Sequences of a step per data-parallel rank that the engine lets run where nobody says how many."""
        scheduler = self.engine.scheduler
        if scheduler is None:
            return np.inf
        ranks = int(attention_dp(self.layout, self.raw.facts.num_experts > 0))
        return float(scheduler.sequences(
            float(self.device.memory_bytes), ranks, drafts=self.options.mtp_depth > 0,
            classes=self.model.config.get("architectures") or (),
        ))

    @property
    def most_sequences(self) -> float:
        """Sequences of a decode step per data-parallel rank that the exchange between experts can send."""
        rule = self.engine.step_tokens
        sent = rule.exchanges.get(self.step.plan.all2all) if rule is not None and self.phase == "decode" else None
        return np.inf if sent is None else float(sent // (1 + self.options.mtp_depth))

    def graph_bytes(self, sequences: Size) -> Size:
        """What the engine leaves free for captured decode steps of up to ``sequences`` per data-parallel rank."""
        reserve, dp = self.engine.reserve, attention_dp(self.layout, self.raw.facts.num_experts)
        if reserve is None or (reserve.pooled and self.phase == "prefill"):
            return 0.0
        gpus = self.layout.tp * dp * self.layout.pp
        spare: Size = reserve.spare_bytes(float(self.device.memory_bytes), gpus) if reserve.pooled else 0.0
        return reserve.graph_bytes(sequences, dp, 1 + self.options.mtp_depth, spare=spare)

    def held(self, sequences: Size, length: Size) -> tuple[Size, Size]:
        """Bytes of weights on the fullest rank, and of room in its cache for ``sequences`` of ``length`` tokens."""
        shape = np.broadcast_shapes(np.shape(sequences), np.shape(length), np.shape(self.layout.dp))
        kv, stages, table = self.quantization.kv, self.stages, self.drafting
        depth, count = self.options.mtp_depth, len(stages.layers)
        if self.options.pcp > 1 and self.phase == "decode":  # each rank of a group holds what all of it decode
            sequences = sequences * self.options.pcp
        each = self._kept
        caches = partial(sequence_caches, table, kv, length, ranks=self.options.dcp)
        tokens, states = summed(caches(kept=each[0]), stages.counts)
        for rule in {*each} - {each[0]}:
            found, mine = summed(caches(kept=rule), stages.counts), [one == rule for one in each]
            tokens[mine], states[mine] = (part[mine] for part in found)
        for i, packed in enumerate(self.packed):
            if packed is not None:
                tokens[i], states[i] = packed.block_bytes * sum(packed.blocks(length)), 0.0
        if depth and self.step.drafter is not None:
            ends = [layers.stop == len(self.raw.layer_kinds) for layers in stages.layers]
            tokens[ends] += self.step.drafter.cache_numbers * KV_BYTES[kv] * length
        whole, room = stages.weights, np.asarray(room_taken(tokens, states, each[0].states_apart))
        if count == 1 and not shape:
            return whole[0] + self.tower_bytes, sequences * room[0]
        weights, room = (
            np.reshape(values, (count, *(1,) * (1 + len(shape) - np.ndim(values)), *np.shape(values)[1:]))
            for values in (whole, room)
        )
        held = np.broadcast_to(sequences * room, (count, *shape))
        if count == 1:
            return np.broadcast_to(weights[0], shape) + self.tower_bytes, held[0]
        fullest = (weights + held).argmax(axis=0)
        where = fullest if not shape else (fullest, *np.ogrid[tuple(map(slice, shape))])
        return np.broadcast_to(weights, held.shape)[where] + self.tower_bytes, held[where]

    @cached_property
    def _kept(self) -> list[Kept]:
        """What a sequence takes of the cache of each of :attr:`stages`."""
        rules, entries = self.engine.cache_rules, cache_entries(self.drafting, self.quantization.kv)
        if rules is None or not any(one.limit or one.per_sequence for one in entries):
            return [Kept()] * len(self.stages.layers)
        return [rules.kept(self.model.config, self.options.mtp_depth, own) for own in self.stages.pipelines]

    @cached_property
    def packed(self) -> list[PackedCache | None]:
        """The cache of each of :attr:`stages` in blocks that all layers share, where the engine keeps it so."""
        pages, layers = self.engine.packed_pages, self.stages.layers
        if pages is None or not self.raw.facts.compress_ratios:
            return [None] * len(layers)
        return [packed_cache(self.drafting, self.quantization.kv, one, pages) for one in layers]

    @cached_property
    def drafting(self) -> OpTable:
        """The table with the layer of the model that drafts tokens after the last one, if any."""
        drafts = self.options.mtp_depth > 0 and self.step.drafter is None
        kinds = self.raw.layer_kinds
        return replace(self.raw, layer_kinds=(*kinds, kinds[-1])) if drafts else self.raw

    @cached_property
    def stages(self) -> Stages:
        """Pipeline stages; those that are alike once."""
        layout, load, table = self.layout, self.step.sizes.load, self.drafting
        local: Size | None = load.local_experts if load is not None else None
        exchange = EXCHANGE_KERNELS.get(self.options.all2all)
        if exchange is not None and exchange.copies is not None and np.all(np.greater(layout.dp, 1)):
            local = float(self.raw.facts.num_experts + exchange.copies)
        padding = mxfp4_padding(self.device.architecture) if self.engine.pads_hidden else (1, 1)
        several = isinstance(layout.pp, np.ndarray)
        pps = tuple(sorted({*np.ravel(layout.pp).astype(int).tolist()}))
        every, pipelines, ends, counts = stages_alike(
            table.layer_kinds, len(self.raw.layer_kinds), pps, self.engine.pipeline_split
        )
        weights = weights_of_stages(
            table, self.quantization, layout.ep, layout.etp, layers=counts, ends=ends, local_experts=local,
            padding=padding, tables=0.0 if self.engine.host_tables else 1.0 / layout.dp,
        )
        if self.options.mtp_depth:  # hidden state and embedding joined: [2H, H]
            joined = 2.0 * 2.0 * self.raw.facts.hidden_size ** 2
            drafter = self.step.drafter
            weights[ends[1] > 0] += joined if drafter is None else drafter.weight_bytes
        if several:
            weights = np.where(np.not_equal.outer(pipelines, layout.pp), -np.inf, weights)
        return Stages(weights, every, pipelines, counts)

    def _communication_bytes(self, tokens: Size, sizes: Sizes) -> Size:
        """Receive buffers of the MoE exchange; collectives' own buffers are in the engine's reserve."""
        facts, plan = self.raw.facts, self.step.plan
        kind, hidden = plan.all2all, facts.moe_hidden_size
        if kind == "low_latency":
            rule = self.engine.step_tokens
            if rule is None or kind not in rule.buffered:
                return low_latency_buffer_bytes(tokens / self.layout.tp, hidden, facts.num_experts)
            # made as the engine starts, for the most tokens that a rank may ever send
            held = np.clip(tokens, rule.buffered[kind], rule.exchanges[kind])
            return low_latency_buffer_bytes(held, hidden, facts.num_experts)
        if kind == "allgather_reducescatter":
            gathered = tokens * self.layout.dp * hidden  # tokens, in bf16, and the sums to scatter
            return gathered * (2.0 + plan.combine.activation_bytes)
        if kind in ("high_throughput", "direct"):
            return sizes.R * hidden * (plan.dispatch.activation_bytes + plan.combine.activation_bytes)
        return 0.0

    def idle(self, options: Options) -> dict[str, str]:
        """Those of ``options`` that would change no time here, with the reason."""
        facts, all2all = self.raw.facts, self.step.plan.all2all
        unasked = block_form(
            Options(), self.layout, all2all, self.engine, device=self.device, config=self.model.config,
            whole=whole_model(self.model, self.phase, self.options.quant),
        )
        at = Place(
            self.layout, facts, all2all, self.phase, unasked.fused, unasked.shared is not None,
            has_states=has_states(self.raw), drafts=options.mtp_depth > 0,
        )
        return idle_options(options, at)

    def largest_batch(self, new: int, past: int) -> int:
        """Most sequences per data-parallel rank that fit; 0 if not even one does."""
        low, high = 0, int(min(1 << 24, self.most_sequences + 1))
        while high - low > 1:  # 63 batches at a time: memory only grows with the batch
            tried = np.floor(np.linspace(low, high, 65))[1:-1]
            fits = np.broadcast_to(self.memory(tried, new, past).fits, tried.shape)
            inside = int(fits.sum())
            low, high = (
                int(tried[inside - 1]) if inside else low,
                int(tried[inside]) if inside < len(tried) else high,
            )
        return low


def deploy(
    model: ModelProfile,
    device: DeviceProfile,
    engine: EngineProfile,
    layout: Layout,
    phase: str,
    *,
    options: Options = Options(),
) -> Deployment:
    """Trace (or load) the model at this tp, quantise, fuse, and lay it out. Raises :class:`InputError` if illegal."""
    whole = whole_model(model, phase, options.quant)
    check(layout, whole.facts, device)  # before a rank is traced: an illegal layout has none
    if options.all2all == "auto" and whole.facts.num_experts and layout.dp > 1:
        options = unasked_exchange(options, engine, device.architecture)
    all2all = choose_all2all(options.all2all, layout, engine, phase, split=options.split_tokens_over_tp)
    check_options(options, layout, whole.facts, all2all)
    if options.all2all in EXCHANGE_KERNELS and (problem := broken_exchange(options.all2all, layout, device)):
        raise InputError(problem)
    dcp, pcp = options.dcp, options.pcp
    if (dcp > 1 or pcp > 1) and (problem := broken_parts(dcp, pcp, layout, whole.facts, model.config)):
        raise InputError(problem)
    if whole.cuts or engine.lacking:
        problem = engine_can_run(
            engine.name, layout, whole.facts, options, cuts=whole.cuts, any_engine=True,
            kernels=kernels_of(engine, device.architecture, model.config, whole),
        )
        if problem:
            raise InputError(f"layout {layout}: {engine.name} {engine.version} cannot run it: {problem}")
    engine = as_asked(engine, options)
    other = engine.uncompiled
    here = other is not None and device.vendor in (other.vendors or (device.vendor,))
    if other is not None and here and is_one_of(other.architectures, model.config):
        engine = same(engine.model_copy(update={"fusions": other.fusions, "eager_exchanges": other.eager_exchanges}))
    engine = engine if engine.serial_drafts is None else same(engine.drafts_of(model.config))
    engine = same(engine.halves_of(model.config))
    form = block_form(options, layout, all2all, engine, device=device, config=model.config, whole=whole)
    tables = rank_tables(model, phase, RankForm(
        tp=layout.tp, quant=options.quant, arithmetic=tuple(device.peak_flops), architecture=device.architecture,
        fusions=tuple(engine.fusions) if options.fusion == "engine" else (),
        apart=engine.own_gemms.groups if engine.own_gemms else (),
        states=options.state_dtype or (engine.states.dtype(model.config) if engine.states else ""),
        block=form,
    ))  # fmt: skip
    kv = options.kv_dtype or unasked_cache(engine.cache_dtypes, model.config, device.architecture, whole.stored.kv)
    quantization = whole.stored if kv == whole.stored.kv else replace(whole.stored, kv=kv)
    plan = make_plan(tables.runs, layout, device, engine, options=options, config=model.config, form=form)
    if options.dcp > 1 and phase == "decode":
        plan = context_cut(plan, options.dcp, device)
    if options.pcp > 1 and phase == "prefill":
        plan = prompt_cut(plan, options.pcp, layout.tp, device)
    dp = attention_dp(layout, whole.facts.num_experts)
    served = served_with(options, all2all)
    graphs = 0 if phase == "encode" else engine.prefill_graph_tokens(device, dp, layout.pp, model.config, served)
    drafter = None
    if phase == "decode" and options.speculative_method != "mtp":
        from tensorcast.deploy.step.drafter import make_drafter

        network = load_model(options.draft_model) if options.draft_model else None
        drafter = make_drafter(options.speculative_method, model, network, layout, device)
    step = make_step(
        tables.runs, plan, layout, device, engine, kv_bytes=KV_BYTES[quantization.kv], options=options,
        prefill_graph_tokens=graphs, sources=expert_sources(engine, device, model.config, layout), drafter=drafter,
        serial_s=engine.cache_rules.serial_s(model.config) if engine.cache_rules and has_states(tables.runs) else 0.0,
    )
    return Deployment(
        model=model, device=device, engine=engine, layout=layout, phase=phase, options=options,
        quantization=quantization, raw=tables.held, step=step,
    )
