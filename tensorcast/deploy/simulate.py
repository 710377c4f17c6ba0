"""One deployment: model, device, engine, layout, workload -> a priced step, its memory, and what limits it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tensorcast.cost.memory import activation_bytes, cache_bytes, low_latency_buffer_bytes, weight_bytes
from tensorcast.cost.routing import Routing
from tensorcast.deploy.layout import Layout, check
from tensorcast.deploy.plan import Collective, Row, make_plan
from tensorcast.deploy.step import RowPrice, Step, StepPrice
from tensorcast.deploy.workload import Workload
from tensorcast.errors import InputError, unknown_name
from tensorcast.modeling.quantization import KV_DTYPES, Quantization, from_config, override
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.model import ModelProfile
from tensorcast.trace.cache import traced
from tensorcast.trace.dims import Sizes
from tensorcast.trace.fuse import fuse
from tensorcast.trace.quantize import apply_quantization
from tensorcast.trace.table import Op, OpTable

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Options:
    """What a deployment can choose beside its layout."""

    fusion: str = "engine"
    quant: str | None = None
    kv_dtype: str | None = None
    routing: str = "balanced"
    all2all: str = "auto"
    dispatch: str | None = None
    redundant_experts: int = 0
    placement: str = "linear"


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank."""

    weights: float
    kv_cache: float
    activations: float
    communication: float
    engine: float
    capacity: float
    budget: float

    @property
    def total(self) -> float:
        return self.weights + self.kv_cache + self.activations + self.communication + self.engine

    @property
    def fits(self) -> bool:
        return self.total <= self.budget


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

    def memory(self, batch: int, new: int, past: int) -> Memory:
        """Memory of a step of ``batch`` sequences per data-parallel rank that end at ``past + new`` tokens."""
        layout, table, stages = self.layout, self.step.table, self.step.stages
        local_experts = self.step.load.local_experts if self.step.load is not None else None
        per_stage = [
            (
                weight_bytes(
                    self.raw,
                    self.quantization,
                    layout.ep,
                    layout.etp,
                    layers,
                    first=i == 0,
                    last=i == len(stages) - 1,
                    local_experts=local_experts,
                ),
                float(cache_bytes(self.raw, self.quantization.kv, batch, past + new, layers)),
            )
            for i, layers in enumerate(stages)
        ]
        weights, cache = max(per_stage, key=sum)
        context = self.step._context(float(batch) / max(1, min(layout.pp, batch)), float(new), float(past))
        activations = float(activation_bytes(table, context.sizes))
        capacity = float(self.device.memory_bytes)
        return Memory(
            weights,
            cache,
            activations,
            self._communication_bytes(batch * new, context.sizes),
            float(self.engine.reserved_bytes),
            capacity,
            capacity * float(self.engine.memory_fraction),
        )

    def _communication_bytes(self, tokens: int, sizes: Sizes) -> float:
        """Receive buffers of the MoE exchange; collectives' own buffers are in the engine's reserve."""
        facts, kind = self.raw.facts, self.step.plan.all2all
        hidden = facts["moe_hidden_size"]
        if kind == "low_latency":
            return float(low_latency_buffer_bytes(tokens / self.layout.tp, hidden, facts["num_experts"]))
        if kind == "allgather_reducescatter":
            return 2.0 * 2.0 * tokens * self.layout.dp * hidden  # gathered tokens and the sums to scatter, bf16
        if kind in ("high_throughput", "direct"):
            return float(sizes.R) * hidden * (self.step.plan.dispatch.activation_bytes + 2.0)
        return 0.0

    def largest_batch(self, new: int, past: int) -> int:
        """Most sequences per data-parallel rank that fit; 0 if not even one does."""
        if not self.memory(1, new, past).fits:
            return 0
        low, high = 1, 2
        while self.memory(high, new, past).fits and high < 1 << 24:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.memory(middle, new, past).fits else (low, middle)
        return low


def deploy(
    model: ModelProfile,
    device: DeviceProfile,
    engine: EngineProfile,
    layout: Layout,
    phase: str,
    options: Options = Options(),
) -> Deployment:
    """Trace (or load) the model at this tp, quantise, fuse, and lay it out. Raises :class:`InputError` if illegal."""
    quantization = override(
        from_config(model.config, model.kv_dtype)
        if not model.quantization
        else override(Quantization(kv=model.kv_dtype), model.quantization),
        options.quant,
    )
    if options.kv_dtype:
        if options.kv_dtype not in KV_DTYPES:
            raise unknown_name("--kv-dtype", options.kv_dtype, KV_DTYPES)
        quantization = override(quantization, f"kv={options.kv_dtype}")
    if options.fusion not in ("engine", "none"):
        raise InputError(f"--fusion {options.fusion!r}: must be engine or none")
    routing = Routing.parse(options.routing)
    facts = traced(model, phase, 1).facts if layout.tp > 1 else None
    if facts is not None:
        check(layout, facts, device)
    raw = traced(model, phase, layout.tp)
    check(layout, raw.facts, device)
    table = apply_quantization(raw, quantization)
    table = fuse(table, engine.fusions if options.fusion == "engine" else ())
    plan = make_plan(table, layout, device, engine, options.all2all, options.dispatch)
    captured = options.fusion == "engine"  # the eager view launches its kernels one by one
    if not raw.facts["num_experts"] and (options.redundant_experts or options.placement != "linear"):
        raise InputError(f"model {model.name} has no experts: --redundant-experts and --placement do not apply")
    step = Step(
        table,
        plan,
        layout,
        device,
        engine,
        routing,
        quantization.kv,
        captured,
        options.redundant_experts,
        options.placement,
    )
    return Deployment(model, device, engine, layout, phase, options, quantization, raw, step)


@dataclass(frozen=True)
class Simulation:
    """The result of :func:`simulate`: typed totals, and the op table as a pandas frame."""

    deployment: Deployment
    workload: Workload
    price: StepPrice
    memory: Memory
    largest_batch: int
    notes: tuple[str, ...] = field(default=())

    @property
    def step_s(self) -> float:
        """Seconds of one step."""
        return float(self.price.seconds)

    @property
    def interval_s(self) -> tuple[float, float]:
        """Step time less and plus the median error of its kernels (about half of all such steps lie inside)."""
        spread = float(self.price.error) * (self.step_s - float(self.price.overhead_s))
        return self.step_s - spread, self.step_s + spread

    @property
    def tokens(self) -> int:
        """New tokens that one step makes or reads, over all GPUs."""
        return self.workload.batch * self.workload.input_len * self.deployment.layout.dp

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens / self.step_s / self.deployment.layout.world_size

    @property
    def mfu(self) -> float:
        """Share of the step in which one GPU's useful arithmetic would be done at the peak rate of its dtype."""
        return self._sum("ideal_compute_s") / self._passes / self.step_s

    @property
    def bandwidth_use(self) -> float:
        """Share of the device's memory bandwidth that one GPU uses over the step."""
        bandwidth = float(self.deployment.device.memory_bandwidth_bytes_per_s)
        return self._sum("bytes") / self._passes / bandwidth / self.step_s

    @property
    def _passes(self) -> float:
        """Rows are counted over all pipeline stages for one micro-batch; a GPU runs one stage for all of them."""
        return self.deployment.layout.pp / self.price.micro_batches

    def _sum(self, name: str) -> float:
        return sum(float(getattr(p, name)) * n for p, n in zip(self.price.rows, self.price.counts, strict=True))

    def time_by(self, key: str) -> dict[str, float]:
        """Kernel seconds over the step by ``evidence``, ``family`` or ``bound``."""
        found: dict[str, float] = {}
        for price, n in zip(self.price.rows, self.price.counts, strict=True):
            name = bound(price) if key == "bound" else str(getattr(price, key))
            found[name] = found.get(name, 0.0) + float(price.seconds) * n
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def records(self) -> list[dict[str, Any]]:
        """One plain dict per row that runs, in step order: sizes, FLOPs, bytes and seconds over the step, evidence."""
        total = self._sum("seconds")
        return [_describe(p, n, total) for p, n in zip(self.price.rows, self.price.counts, strict=True) if n]

    @property
    def ops(self) -> pd.DataFrame:
        """:meth:`records` as a frame, costliest first."""
        import pandas as pd

        frame = pd.DataFrame(self.records()).drop(columns="kind")
        return frame.sort_values("seconds", ascending=False, kind="stable").reset_index(drop=True)

    def totals(self) -> dict[str, Any]:
        """The numbers of the step, units in the names; JSON-ready."""
        d, m = self.deployment, self.memory
        low, high = self.interval_s
        return {
            "model": d.model.name,
            "device": d.device.name,
            "engine": d.engine.name,
            "layout": str(d.layout),
            "world_size": d.layout.world_size,
            "tp": d.layout.tp,
            "dp": d.layout.dp,
            "ep": d.layout.ep,
            "etp": d.layout.etp if self.deployment.raw.facts["num_experts"] else 1,
            "pp": d.layout.pp,
            "phase": self.workload.phase,
            "batch_per_dp_rank": self.workload.batch,
            "batch_total": self.workload.batch * d.layout.dp,
            "input_len": self.workload.input_len,
            "context": self.workload.context,
            "quantization": d.quantization.describe(),
            "routing": d.options.routing,
            "redundant_experts": d.options.redundant_experts,
            "placement": d.options.placement,
            "fusion": d.options.fusion,
            "all2all": d.step.plan.all2all,
            "dispatch_dtype": d.step.plan.dispatch.name,
            "step_s": self.step_s,
            "step_low_s": low,
            "step_high_s": high,
            "overhead_s": float(self.price.overhead_s),
            "tokens_per_step": self.tokens,
            "tokens_per_s_per_gpu": self.tokens_per_s_per_gpu,
            "micro_batches": self.price.micro_batches,
            "mfu": self.mfu,
            "memory_bandwidth_use": self.bandwidth_use,
            "memory_bytes": {
                "weights": m.weights,
                "kv_cache": m.kv_cache,
                "activations": m.activations,
                "communication": m.communication,
                "engine": m.engine,
                "total": m.total,
                "budget": m.budget,
                "capacity": m.capacity,
            },
            "fits": m.fits,
            "largest_batch_per_dp_rank": self.largest_batch,
            "seconds_by_evidence": self.time_by("evidence"),
            "seconds_by_family": self.time_by("family"),
            "seconds_by_bound": self.time_by("bound"),
            "notes": list(self.notes),
        }


def bound(price: RowPrice) -> str:
    """What a row mostly waits for: ``compute``, ``memory``, ``network`` or ``latency``."""
    return max(price.parts, key=lambda part: float(price.parts[part]))


def _describe(price: RowPrice, count: int, total: float) -> dict[str, Any]:
    row = price.row
    name, shape, detail = _words(row, price.detail)
    seconds = float(price.seconds)
    return {
        "op": name,
        "kind": row.kind,
        "module": row.module,
        "shape": shape,
        "detail": detail,
        "count": count,
        "flops": float(price.flops) * count,
        "bytes": float(price.bytes) * count,
        "wire_bytes": float(price.wire_bytes) * count,
        "seconds_per_call": seconds,
        "seconds": seconds * count,
        "share": seconds * count / total if total else 0.0,
        "bound": bound(price),
        "family": price.family,
        "evidence": price.evidence,
        "error": price.error,
    }


def _words(row: Row, detail: str) -> tuple[str, str, str]:
    """Name, shape and detail of a row."""
    if isinstance(row, Collective):
        return row.op, row.label, detail
    labelled = row.name == "pointwise" and "label" in row.attrs
    name = f"pointwise:{row.attrs['label']}" if labelled else row.name
    return name, _shape(row), str(row.attrs.get("scheme", ""))


def _shape(op: Op) -> str:
    """Activation and weight shapes as formulas: ``[B, 7168] x [7168, 2112]``."""
    activations = [t for t in op.inputs if not t.weight][: 3 if op.name == "attention" else 1]
    weights = [t for t in op.inputs if t.weight and len(t.dims) > 1]
    if op.name in ("mm", "addmm") and weights:
        width = sum(t.dims[-1].coef for t in op.outputs)
        return f"{activations[0].shape()} x [{weights[0].dims[0]}, {width:g}]"
    return " x ".join(t.shape() for t in (*activations, *weights[:1]))


def simulate(
    model: ModelProfile,
    device: DeviceProfile,
    engine: EngineProfile,
    layout: Layout,
    workload: Workload,
    options: Options = Options(),
    allow_oversize: bool = False,
) -> Simulation:
    """Price one step. An illegal layout or, unless allowed, a batch that does not fit raises :class:`InputError`."""
    deployment = deploy(model, device, engine, layout, workload.phase, options)
    memory = deployment.memory(workload.batch, workload.input_len, workload.context)
    largest = deployment.largest_batch(workload.input_len, workload.context)
    if not memory.fits and not allow_oversize:
        raise InputError(_does_not_fit(deployment, workload, memory, largest))
    price = deployment.step.price(float(workload.batch), float(workload.input_len), float(workload.context))
    return Simulation(deployment, workload, price, memory, largest, _notes(deployment, price))


def _does_not_fit(deployment: Deployment, workload: Workload, memory: Memory, largest: int) -> str:
    over = (memory.total - memory.budget) / 1e9
    if largest == 0:
        need = (memory.total - memory.kv_cache) / 1e9
        return (
            f"{deployment.model.name} does not fit on {deployment.layout.world_size} {deployment.device.name} as "
            f"{deployment.layout}: {memory.weights / 1e9:.1f} GB of weights per GPU ({need:.1f} GB with buffers) on a "
            f"budget of {memory.budget / 1e9:.1f} GB: not even one sequence of {workload.length} tokens fits; "
            f"spread over more GPUs, or quantise"
        )
    return (
        f"--batch {workload.batch} does not fit: needs {memory.total / 1e9:.1f} GB per GPU, "
        f"{over:.1f} GB over the budget of {memory.budget / 1e9:.1f} GB; the largest that fits is {largest} "
        f"(per data-parallel rank, {workload.length} tokens each)"
    )


def _notes(deployment: Deployment, price: StepPrice) -> tuple[str, ...]:
    notes = []
    unknown = sorted({p.row.name for p in price.rows if not p.has_formula and not isinstance(p.row, Collective)})
    if unknown:
        notes.append(f"no formula, priced as memory traffic: {', '.join(unknown)}")
    config = deployment.model.config
    text = config.get("text_config") or {}
    if any(config.get("compress_ratios") or text.get("compress_ratios") or ()):
        notes.append("compressed keys and values (compress_ratios) are not counted: attention and cache are too small")
    if config.get("num_nextn_predict_layers") or text.get("mtp_num_hidden_layers"):
        notes.append("multi-token prediction is not simulated: one token per sequence and step")
    return tuple(notes)
