"""One deployment: model, device, engine, layout, workload -> a priced step, its memory, and what limits it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tensorcast.cost.memory import Memory
from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.engine_limits import halving_note
from tensorcast.deploy.engine_log import room_note
from tensorcast.deploy.exchange_kernels import exchange_note
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options, flag, idle_note
from tensorcast.deploy.plan.plan import Collective
from tensorcast.deploy.plan.remarks import not_counted, on_hosts, stored_otherwise, uncut
from tensorcast.deploy.result import Simulation
from tensorcast.deploy.step.price import StepPrice
from tensorcast.deploy.workload import Workload
from tensorcast.errors import InputError
from tensorcast.modeling.quantization import weight_only_here
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.drafting import published, said_of
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.model import ModelProfile
from tensorcast.trace.cache import whole_model


def simulate(
    model: ModelProfile,
    device: DeviceProfile,
    engine: EngineProfile,
    layout: Layout,
    workload: Workload,
    *,
    options: Options = Options(),
    allow_oversize: bool = False,
    enough: Callable[[Deployment, Workload], str] | None = None,
) -> Simulation:
    """Price one step. An illegal layout or, unless allowed, a batch that does not fit raises :class:`InputError`.

    ``enough`` says what would hold a model that does not fit.
    """
    deployment = deploy(model, device, engine, layout, workload.phase, options=options)
    workload.check_length(model)
    if options.split_tokens_over_tp:
        tokens = deployment.step.sizes.context(float(workload.batch), float(workload.input_len), 0.0).sizes.tokens
        if tokens < layout.tp:
            raise InputError(
                f"--split-tokens-over-tp: {tokens:g} tokens do not reach all tp = {layout.tp} ranks, "
                "which do not cut them"
            )
    memory = deployment.memory(workload.batch, workload.input_len, workload.context)
    largest = deployment.largest_batch(workload.input_len, workload.context)
    if not memory.fits and not allow_oversize:
        raise InputError(_does_not_fit(deployment, workload, memory, largest, enough))
    sizes = float(workload.batch), float(workload.input_len), float(workload.context)
    price, in_vain = deployment.step.price(*sizes), kernels_in_vain(deployment, *sizes)
    return Simulation(
        deployment=deployment, workload=workload, price=price, memory=memory, largest_batch=largest,
        notes=(*_notes(deployment, price), *(in_vain_note(deployment.options, name) for name in in_vain)),
    )


def kernels_in_vain(deployment: Deployment, batch: float, new: float, past: float) -> list[str]:
    """Options that ask for kernels and change no time of a step of these sizes: the engine runs them anyway, or nobody
    timed them."""
    options, engine, found = deployment.options, deployment.engine, []
    whose: dict[str, Any] = {"experts_kernels": engine.experts, "attention_kernels": engine.attention}
    for name, chosen in whose.items():
        if getattr(options, name) == "engine":
            continue
        of_engine = chosen and chosen.model_copy(update={"asked": ""})
        unasked_for: dict[str, Any] = {name: "engine"}
        unasked = deploy(
            deployment.model, deployment.device, engine.model_copy(update={name.removesuffix("_kernels"): of_engine}),
            deployment.layout, deployment.phase, options=replace(options, **unasked_for),
        )
        if unasked.step.seconds(batch, new, past) == deployment.step.seconds(batch, new, past):
            found.append(name)
    return found


def in_vain_note(options: Options, name: str, where: str = "") -> str:
    """What is said of one of :func:`kernels_in_vain`."""
    why = "the engine's own choice here, or kernels that no table has of this model's kind"
    return f"no effect {where or 'here'}: {flag(name)} {getattr(options, name)} ({why})"


def _does_not_fit(
    deployment: Deployment, workload: Workload, memory: Memory, largest: int,
    enough: Callable[[Deployment, Workload], str] | None,
) -> str:
    over = (memory.total - memory.budget) / 1e9
    if largest == 0:
        need = (memory.total - memory.kv_cache) / 1e9
        return (
            f"{deployment.model.name} does not fit on {deployment.layout.world_size} {deployment.device.name} as "
            f"{deployment.layout}: {memory.weights / 1e9:.1f} GB of weights per GPU ({need:.1f} GB with buffers) on a "
            f"budget of {memory.budget / 1e9:.1f} GB: not even one sequence of {workload.length} tokens fits; "
            f"{enough(deployment, workload) + ', or ' if enough else ''}quantise"
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
    notes += [*not_counted(deployment.quantization), *deployment.raw.facts.remarks]
    notes += on_hosts(deployment.raw, deployment.engine)
    notes += stored_otherwise(deployment.model, deployment.options.quant, deployment.device.vendor)
    if lacking := weight_only_here(deployment.quantization, deployment.device.peak_flops):
        notes.append(f"{deployment.device.name} has no arithmetic for {lacking}: weights are unpacked to bf16")
    if deployment.raw.facts.mtp_modules and not deployment.options.mtp_depth:
        notes.append("multi-token prediction is not simulated: one token per sequence and step (see --mtp-depth)")
    elif depth := deployment.options.mtp_depth:
        notes.append(f"tokens are counted without drafts: accepted ones make up to {1 + depth} per sequence and step")
        notes += _of_drafts(deployment)
    if deployment.engine.remark:
        notes.append(deployment.engine.remark)
    if left := uncut(deployment.raw):
        notes.append(left)
    whole = whole_model(deployment.model, deployment.phase, deployment.options.quant)
    if halves := halving_note(deployment.engine.name, deployment.layout, whole.cuts):
        notes.append(halves)
    if tight := room_note(deployment):
        notes.append(tight)
    if deployment.step.plan.all2all != "none" and (said := exchange_note(deployment.options.all2all)):
        notes.append(said)
    if price.host_s > price.seconds / 5:
        notes.append(
            f"for {1e3 * float(price.host_s):.3g} ms its kernels wait for the host, which launches them one by one"
        )
    if idle := deployment.idle(deployment.options):
        notes.append(idle_note(idle))
    return tuple(notes)


def _of_drafts(deployment: Deployment) -> list[str]:
    """What is taken for granted of a drafter, and what is published of its accepted tokens."""
    drafter, name = deployment.step.drafter, deployment.options.speculative_method
    found = list[str]()
    if drafter is not None and drafter.sizes is not None and drafter.sizes.assumed:
        s = drafter.sizes
        found.append(
            f"{name}: assumed {s.layers} layer{'s' * (s.layers > 1)} of {s.heads} heads and an MLP {s.width} wide, "
            f"{s.vocab} tokens to choose from; --draft-model reads a config"
        )
    said = said_of(published(deployment.model.name, name))
    return [*found, said] if said else found
