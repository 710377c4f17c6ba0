"""What balancing experts would bring a deployment, by recorded routing: placements, copies, drift, cost of moving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from tensorcast.cost.placing import place_layers, rank_loads
from tensorcast.cost.recordings.named import recording
from tensorcast.cost.recordings.recording import LayerCounts, drift
from tensorcast.cost.routing import Routing
from tensorcast.cost.work import Array
from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.step.make import GLOBAL_EPLB, moe_layers
from tensorcast.errors import InputError
from tensorcast.modeling.moe.balancing.published_eplb import Ints, choose_nodes
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.model import ModelProfile

INTERVAL = {"sglang": 1000, "vllm": 3000}
"""Steps between two rebalancings unless set: SGLang 0.5.14 ``eplb_rebalance_num_iterations`` (``srt/server_args.py``),
vLLM 0.24.0 ``step_interval`` (``config/parallel.py``). TensorRT-LLM's static placement is never changed."""

MOVING = 0.5
"""Part of a link's speed at which experts' weights move between ranks (assumption: engines send them tensor by tensor
with point-to-point calls)."""

WORTH = 0.01
"""Gain below which more copies are not worth having."""


@dataclass(frozen=True)
class PlacedChoice:
    """One placement: how uneven it leaves ranks, what a step takes, what its copies weigh.

    ``busiest [layers]``: the busiest rank's load over the mean. ``most_per_gpu``: tokens per second and GPU at the
    largest batch that fits (``largest`` sequences per data-parallel rank).
    """

    placement: str
    copies: int
    busiest: Array
    step_s: float
    fits: bool
    weights_bytes: float
    largest: int
    most_per_gpu: float

    @property
    def balancedness(self) -> float:
        """Mean load over the busiest rank's, summed over layers, as vLLM logs it: 1 is even."""
        return float(len(self.busiest) / self.busiest.sum())


@dataclass(frozen=True)
class Drifted:
    """The best placement, had it been made by other counts. ``moved``: part of choices that fall elsewhere."""

    source: str
    moved: float
    busiest: float
    step_s: float


@dataclass(frozen=True)
class Move:
    """Changing from one placement to the best: experts that the rank with most receives (over all layers), their bytes
    and seconds, and after how many steps that is won back. ``interval``: the engine's own (0: never)."""

    source: str
    experts: int
    nbytes: float
    seconds: float
    worth_steps: float
    interval: int


@dataclass(frozen=True)
class ExpertStudy:
    """See :func:`expert_study`. ``before`` and ``after``: loads over the mean, ``[layers, ranks]``."""

    deployment: Deployment
    law: str
    source: str
    batch: int
    new: int
    past: int
    layers: tuple[int, ...]
    choices: tuple[PlacedChoice, ...]
    best: PlacedChoice
    own: PlacedChoice
    perfect_s: float
    before: Array
    after: Array
    placed: Ints
    drifted: tuple[Drifted, ...]
    moves: tuple[Move, ...]
    error: float
    notes: tuple[str, ...] = ()
    logged: tuple[float, ...] = ()
    """Balancedness that an engine's log says, line by line."""

    @property
    def gain(self) -> float:
        """How many times as fast the best placement is as the engine's own without balancing."""
        return self.own.step_s / self.best.step_s


def expert_study(
    model: ModelProfile, device: DeviceProfile, engine: EngineProfile, layout: Layout, *, phase: str, new: int,
    past: int, batch: int | None = None, options: Options = Options(), copies: Sequence[int] | None = None,
    others: Sequence[str] = (),
) -> ExpertStudy:
    """Price a step under placements of experts, with ``copies`` of them (those that divide, unless given).

    ``options.routing`` is the recording. ``batch``: sequences per data-parallel rank, the most that fit in all choices
    unless given. ``others``: recordings by which the best placement might have been made instead.
    """
    law = Routing.parse(options.routing, phase)
    if law.counts is None:
        raise InputError(f"--routing {options.routing}: must be a recording: recorded:FILE or recorded:NAME")
    if layout.ep == 1:
        dense = not model.num_experts and not model.model  # a class of one's own says so when it is traced
        why = f"{model.name} has no experts to place" if dense else "experts are in one group; give it ep > 1"
        raise InputError(f"layout {layout}: {why}")
    ranks = layout.ep - options.external_shared_experts

    def deployed(placement: str, count: int) -> Deployment:
        chosen = replace(options, placement=placement, redundant_experts=count)
        return deploy(model, device, engine, layout, phase, options=chosen)

    facts = deployed("linear", 0).raw.facts
    tried = tuple(copies) if copies else _copies(facts.num_experts, ranks)
    nodes = 1 if engine.name in GLOBAL_EPLB else max(1, -(-layout.stage_ranks // device.interconnect[0].size))
    groups = facts.expert_groups
    names = _names(engine.name, facts.num_experts, ranks, tried)
    if choose_nodes(groups, nodes, ranks) > 1:
        names += [("eplb_global", count) for count in tried]
    made = {name: deployed(*name) for name in names}
    one = made[names[0]]
    layers = moe_layers(one.step.table)
    counts = law.counts.for_model(facts.num_experts, layers)
    largest = {name: each.largest_batch(new, past) for name, each in made.items()}
    asked = batch or max(1, min((most for most in largest.values() if most), default=1))

    def loads(of: LayerCounts, placement: str, count: int) -> tuple[Ints, Array]:
        placed, per_rank = place_layers(placement, of.counts, ranks, count, nodes=nodes, groups=groups)
        return placed, rank_loads(counts.counts, placed, per_rank)

    found = []
    for name, each in made.items():
        most = largest[name]
        tokens = most * layout.dp * (new if phase == "prefill" else 1)
        found.append(PlacedChoice(
            placement=name[0], copies=name[1], busiest=loads(counts, *name)[1].max(axis=1),
            step_s=_step_s(each, asked, new, past), fits=asked <= most,
            weights_bytes=float(np.max(each.memory(asked, new, past).weights)), largest=most,
            most_per_gpu=tokens / _step_s(each, most, new, past) / layout.world_size if most else 0.0,
        ))
    best = _best(found)
    own = found[0]
    perfect = replace(options, routing="balanced", placement="linear", redundant_experts=own.copies)
    even = deploy(model, device, engine, layout, phase, options=perfect)
    placed, after = loads(counts, best.placement, best.copies)
    kept = recording(options.routing.removeprefix("recorded:"))
    stale = _others(kept, options.routing, phase, others)
    drifted, moves = [], []
    moved = partial(
        _move, after=placed, ranks=ranks, expert_bytes=_expert_bytes(made, names), device=device, engine=engine.name
    )
    for text, other in stale:
        other = other.for_model(facts.num_experts, layers)
        older, by_rank = loads(other, best.placement, best.copies)
        step_s = _step_s(deployed(f"{best.placement}:{text}", best.copies), asked, new, past)
        drifted.append(Drifted(text, float(drift(other, counts).mean()), float(by_rank.max(axis=1).mean()), step_s))
        moves.append(moved(text, older, won_s=step_s - best.step_s))
    first = loads(counts, own.placement, own.copies)
    if own.copies == best.copies:
        whole = np.broadcast_to(np.maximum(first[0], 0), placed.shape)
        moves.insert(0, moved(own.placement, whole, won_s=own.step_s - best.step_s))
    load: Any = made[best.placement, best.copies].step.sizes.load
    notes = [] if not kept.stands_in(phase) else [f"{phase} was not recorded: counts of the other phase stand in"]
    if not all(one.fits for one in found):
        notes.append(f"* {asked} sequences do not fit")
    if len(counts.counts) == 1:
        notes.append("the counts name no layers: every layer is taken to be like their sum, which hides uneven layers")
    return ExpertStudy(
        deployment=made[best.placement, best.copies], law=options.routing, source=kept.source, batch=asked, new=new,
        past=past, layers=layers, choices=tuple(found), best=best, own=own,
        perfect_s=_step_s(even, asked, new, past), before=first[1], after=after, placed=placed,
        drifted=tuple(drifted), moves=tuple(moves), error=float(load.error), notes=tuple(notes),
    )


def _step_s(deployment: Deployment, batch: int, new: int, past: int) -> float:
    return float(deployment.step.price(float(batch), float(new), float(past)).seconds)


def _copies(experts: int, ranks: int) -> tuple[int, ...]:
    """None where experts divide, and numbers of copies that leave every rank one, two, four more."""
    least = -experts % ranks
    return tuple(least + more * ranks for more in (0, 1, 2, 4) if least + more * ranks <= experts)


def _names(engine: str, experts: int, ranks: int, copies: Sequence[int]) -> list[tuple[str, int]]:
    """Placements to price, the engine's own without balancing first."""
    first = copies[0]
    own = ("trivial" if engine == "sglang" else "linear", first) if experts % ranks else ("linear", 0)
    found = [own, *(("round_robin", 0) for _ in range(not experts % ranks))]
    return [*found, *(("eplb", count) for count in copies)]


def _best(found: Sequence[PlacedChoice]) -> PlacedChoice:
    """The shortest step that fits; fewer copies where more gain less than :data:`WORTH`."""
    able = [one for one in found if one.fits] or list(found)
    limit = min(one.step_s for one in able) * (1 + WORTH)
    return min((one for one in able if one.step_s <= limit), key=lambda one: (one.copies, one.step_s))


def _others(kept: Any, law: str, phase: str, others: Sequence[str]) -> list[tuple[str, LayerCounts]]:
    """Counts by which the placement might have been made: those given, else the recording's other phase."""
    text = law.removeprefix("recorded:")
    found = [(one.removeprefix("recorded:"), recording(one.removeprefix("recorded:")).of(phase)) for one in others]
    if not found and "," not in text and "=" not in text:
        found = [(f"{other}={text}", counts) for other, counts in kept.phases.items() if other not in ("", phase)]
    return found


def _expert_bytes(made: dict[tuple[str, int], Deployment], names: Sequence[tuple[str, int]]) -> float:
    """Bytes of one expert, all layers of it, from what copies add to a rank."""
    few, many = min(names, key=lambda name: name[1]), max(names, key=lambda name: name[1])
    if few[1] == many[1]:
        return 0.0
    more = float(made[many].held(1.0, 1)[0] - made[few].held(1.0, 1)[0])
    slots = [float(np.max(load.local_experts)) for name in (many, few) if (load := made[name].step.sizes.load)]
    return more / max(slots[0] - slots[1], 1.0)


def _move(
    source: str, before: Ints, *, after: Ints, ranks: int, expert_bytes: float, device: DeviceProfile, won_s: float,
    engine: str,
) -> Move:
    """From one placement to another: each rank fetches the experts that it does not hold, over its slowest link."""
    layers = len(after)
    held, wanted = (placed.reshape(layers, ranks, -1) for placed in (before, after))
    new = ~(wanted[..., None] == held[:, :, None, :]).any(axis=-1)
    experts = int(new.sum(axis=(0, 2)).max())
    nbytes = experts * expert_bytes / layers
    domain = next((tier for tier in device.interconnect if tier.size >= ranks), device.interconnect[-1])
    seconds = nbytes / (domain.among(ranks) * MOVING)
    worth = seconds / won_s if won_s > 0 else float("inf")
    return Move(source, experts, nbytes, seconds, worth, INTERVAL.get(engine, 0))


def engine_files(study: ExpertStudy) -> dict[str, str]:
    """The best placement as engines take it, by file name. vLLM 0.24.0 takes none: its balancer starts in order.

    ``sglang.json`` for ``--init-expert-location`` (all layers; dense ones in order), ``trtllm.yaml`` for
    ``moe_load_balancer`` of TensorRT-LLM's ``moe_config``.
    """
    import json

    slots = study.placed.shape[1]
    experts = study.deployment.raw.facts.num_experts
    rows = [[slot % experts for slot in range(slots)] for _ in range(len(study.deployment.raw.layer_kinds))]
    lines = [f"num_slots: {slots}", "initial_global_assignments:"]
    for layer, row in zip(study.layers, np.broadcast_to(study.placed, (len(study.layers), slots)), strict=True):
        rows[layer] = row.tolist()
        lines.append(f"  {layer}: {row.tolist()}")
    return {
        "sglang.json": json.dumps({"physical_to_logical_map": rows}) + "\n",
        "trtllm.yaml": "\n".join([*lines, "layer_updates_per_iter: 0"]) + "\n",
    }
