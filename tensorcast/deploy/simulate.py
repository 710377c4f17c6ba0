"""One deployment: model, device, engine, layout, workload -> a priced step, its memory, and what limits it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tensorcast.cost.memory import activation_bytes, cache_bytes, low_latency_buffer_bytes, weight_bytes
from tensorcast.cost.routing import Routing
from tensorcast.deploy.layout import Layout, check
from tensorcast.deploy.options import Options
from tensorcast.deploy.plan import Collective, make_plan
from tensorcast.deploy.result import Simulation
from tensorcast.deploy.step import Step, StepPrice
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
from tensorcast.trace.table import OpTable


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
    base = Quantization(kv=model.kv_dtype) if model.quantization else from_config(model.config, model.kv_dtype)
    quantization = override(override(base, model.quantization), options.quant)
    if options.kv_dtype:
        if options.kv_dtype not in KV_DTYPES:
            raise unknown_name("--kv-dtype", options.kv_dtype, KV_DTYPES)
        quantization = replace(quantization, kv=options.kv_dtype)
    if options.fusion not in ("engine", "none"):
        raise InputError(f"--fusion {options.fusion!r}: must be engine or none")
    routing = Routing.parse(options.routing)
    whole = traced(model, phase)
    check(layout, whole.facts, device)  # before a rank is traced: an illegal layout has none
    raw = whole if layout.tp == 1 else traced(model, phase, layout.tp)
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
