"""Why one layout beats another: the same load on both, op group by op group, and what would help each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from tensorcast.cost.routing import SAID
from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options, idle_note
from tensorcast.deploy.plan.remarks import whose_attention
from tensorcast.deploy.step.breakdown import GROUPS, Spent, breakdown, group_of
from tensorcast.deploy.step.price import StepPrice
from tensorcast.deploy.step.sizes import GRID
from tensorcast.deploy.workload import Workload
from tensorcast.errors import InputError
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.sourced import Figure
from tensorcast.trace.moe import blocks_of

if TYPE_CHECKING:
    import pandas as pd


MORE = 1.1
"""How much better a resource is made for its elasticity: +10 %."""


@dataclass(frozen=True)
class Side:
    """One of the two layouts: the deployment, its batch per data-parallel rank, and the price of that step."""

    deployment: Deployment
    batch: float
    price: StepPrice
    largest_batch: int
    """Sequences per data-parallel rank that fit."""

    @property
    def name(self) -> str:
        return str(self.deployment.layout)

    @property
    def step_s(self) -> float:
        return float(self.price.seconds)

    @property
    def sequences(self) -> float:
        """In all."""
        return self.batch * self.deployment.layout.dp

    @property
    def most_sequences(self) -> int:
        return self.largest_batch * self.deployment.layout.dp


@dataclass(frozen=True)
class Explanation:
    """The result of :func:`explain`.

    ``groups``: per group of ops seconds, bytes, FLOPs and bytes on the wire of both sides (``_a`` and ``_b``) on one
    GPU, the difference ``saved_s`` (what A spends less), and why. ``elasticities``: by how much A and B would gain in
    tokens/s from 10 % more of each resource; of memory, each time at the best batch that fits.
    """

    a: Side
    b: Side
    phase: str
    new: int
    past: int
    groups: pd.DataFrame
    elasticities: pd.DataFrame
    notes: tuple[str, ...] = ()

    @property
    def faster(self) -> float:
        """How many times as long B's step takes."""
        return self.b.step_s / self.a.step_s


def explain(
    model: ModelProfile, device: DeviceProfile, engine: EngineProfile, layout: Layout, *, versus: Layout, phase: str,
    batch: int | None, new: int, past: int, options: Options = Options(),
) -> Explanation:
    """Price both layouts at one load: ``batch`` sequences per dp rank of ``layout``, as many in all of ``versus``.

    ``batch=None``: the most that fit in both. ``options`` are those of ``layout``; ``versus`` has what applies to it
    (:func:`applicable`). Raises :class:`InputError` where a layout is illegal or the batch does not fit.
    """
    if layout == versus:
        raise InputError(f"--versus {versus}: is the layout itself; name another one")
    workload = Workload(phase, 1 if batch is None else batch, new, past)
    chosen = ((layout, options), (versus, applicable(options, versus)))
    made = [deploy(model, device, engine, one, phase, options=own) for one, own in chosen]
    workload.check_length(model)
    most = [one.largest_batch(new, past) for one in made]
    for one, largest in zip(made, most, strict=True):
        if not largest:
            raise InputError(f"layout {one.layout} does not hold one sequence of {new + past} tokens of {model.name}")
    if batch is None:
        total = min(largest * one.layout.dp for one, largest in zip(made, most, strict=True))
        batch = max(1, total // layout.dp)
    sides = []
    for one, largest in zip(made, most, strict=True):
        share = batch * layout.dp / one.layout.dp
        if share > largest:
            raise InputError(
                f"--batch {batch}: {batch * layout.dp} sequences in all are {share:.10g} per data-parallel rank of "
                f"{one.layout}, which holds {largest}"
            )
        sides.append(Side(one, share, one.step.price(share, float(new), float(past)), largest))
    a, b = sides
    idle = made[0].idle(options)
    idle = {flag: why for flag, why in idle.items() if flag in made[1].idle(options)}
    notes = (idle_note(idle),) if idle else ()
    if a.deployment.raw.facts.num_experts:
        notes = (*notes, SAID[options.routing])
    notes = (*notes, *whose_attention(made[0].engine, device, model))
    return Explanation(
        a=a, b=b, phase=phase, new=new, past=past, groups=compared_groups(a, b),
        elasticities=elasticities(a, b, new, past), notes=notes,
    )


def applicable(options: Options, layout: Layout) -> Options:
    """``options`` without those that ``layout`` has no use for: an exchange, its overlap, copies of experts."""
    if layout.dp == 1 or layout.ep == 1 or layout.etp > 1:
        options = replace(options, all2all="auto", external_shared_experts=0, dual_batch_overlap=False)
        if options.combine == "logfmt10":  # low-latency kernels alone send it
            options = replace(options, combine=None)
    return options if layout.ep > 1 else replace(options, redundant_experts=0, placement="linear")


def by_group(side: Side) -> dict[str, Spent]:
    """What each of :data:`GROUPS` takes of one GPU over the step."""
    blocks = blocks_of(side.deployment.step.table.ops)
    made = breakdown(side.price, side.deployment.layout.pp, partial(group_of, blocks=blocks))
    found = {name: made.groups.get(name, Spent()) for name in GROUPS}
    found["hidden by overlap"].seconds = -made.hidden_s
    found["outside kernels"].seconds = made.overhead_s
    found["pipeline: waiting"].seconds = side.step_s - sum(group.seconds for group in found.values())
    return found


def compared_groups(a: Side, b: Side) -> pd.DataFrame:
    """What both sides spend by group, what A saves, and why: a row per group that takes any time."""
    import pandas as pd

    first, second = by_group(a), by_group(b)
    rows = []
    for name in GROUPS:
        one, other = first[name], second[name]
        if max(abs(one.seconds), abs(other.seconds)) < 1e-9 * a.step_s:
            continue
        numbers = {
            f"{key}_{side}": getattr(group, key)
            for key in ("seconds", "bytes", "flops", "wire_bytes", "calls")
            for side, group in (("a", one), ("b", other))
        }
        saved = other.seconds - one.seconds
        rows.append({"group": name, **numbers, "saved_s": saved, "why": _why(one, other)})
    return pd.DataFrame(rows)


_SAID: dict[str, str] = {"bytes": "memory traffic", "flops": "FLOPs", "wire_bytes": "on the wire", "calls": "calls"}


def _why(one: Spent, other: Spent) -> str:
    """What changed most in the direction in which the time moved: ``3.1 x the memory traffic``."""
    longer, shorter, side = (one, other, "A") if one.seconds > other.seconds else (other, one, "B")
    if longer.seconds - shorter.seconds < 0.01 * max(abs(longer.seconds), 1e-12):
        return "the same"
    if shorter.calls == 0:
        return f"only {side} has it" if longer.calls else ""
    ratios = {
        key: getattr(longer, key) / getattr(shorter, key) for key in _SAID if getattr(shorter, key) > 0
    }
    if not ratios:
        return ""
    key = max(ratios, key=lambda name: ratios[name])
    if ratios[key] < 1.05:
        return f"{side}: slower links" if longer.wire_bytes else f"{side}: as much, less efficiently"
    times = f"{ratios[key]:.1f}" if ratios[key] < 10 else f"{ratios[key]:.0f}"
    return f"{side}: {times} x {_SAID[key]}"


def _scaled(figure: Figure, factor: float) -> Figure:
    return figure.model_copy(update={"value": figure.value * factor})


def _compute(device: DeviceProfile) -> DeviceProfile:
    return device.model_copy(
        update={"peak_flops": {name: _scaled(peak, MORE) for name, peak in device.peak_flops.items()}}
    )


def _memory_bandwidth(device: DeviceProfile) -> DeviceProfile:
    return device.model_copy(
        update={"memory_bandwidth_bytes_per_s": _scaled(device.memory_bandwidth_bytes_per_s, MORE)}
    )


def _tiers(inner: bool) -> Callable[[DeviceProfile], DeviceProfile]:
    """Faster links of the innermost tier, or of all others."""

    def better(device: DeviceProfile) -> DeviceProfile:
        tiers = tuple(
            tier.model_copy(update={"bandwidth_bytes_per_s": _scaled(tier.bandwidth_bytes_per_s, MORE)})
            if (i == 0) is inner
            else tier
            for i, tier in enumerate(device.interconnect)
        )
        return device.model_copy(update={"interconnect": tiers})

    return better


def _latency(device: DeviceProfile) -> DeviceProfile:
    """Everything that a call costs however small it is: launches, and the first byte of a message."""
    tiers = tuple(
        tier.model_copy(update={"latency_s": _scaled(tier.latency_s, 1 / MORE)}) for tier in device.interconnect
    )
    found = device.calibration
    if found is not None:
        kernels = tuple(one.model_copy(update={"launch_s": one.launch_s / MORE}) for one in found.kernels)
        collectives = tuple(
            one.model_copy(update={"latency_s": one.latency_s / MORE, "step_latency_s": one.step_latency_s / MORE})
            for one in found.collectives
        )
        found = found.model_copy(update={"kernels": kernels, "collectives": collectives})
    return device.model_copy(update={"interconnect": tiers, "calibration": found})


def _memory_size(device: DeviceProfile) -> DeviceProfile:
    return device.model_copy(update={"memory_bytes": _scaled(device.memory_bytes, MORE)})


RESOURCES: dict[str, Callable[[DeviceProfile], DeviceProfile]] = {
    "compute": _compute,
    "memory bandwidth": _memory_bandwidth,
    "scale-up bandwidth": _tiers(True),
    "scale-out bandwidth": _tiers(False),
    "latency": _latency,
    "memory size": _memory_size,
}
"""A device with 10 % more of each resource (of latency: 10 % shorter)."""


def elasticities(a: Side, b: Side, new: int, past: int) -> pd.DataFrame:
    """By how much both sides would gain in tokens/s from 10 % more of each resource."""
    import pandas as pd

    rows = []
    for name, better in RESOURCES.items():
        gains = [gain(side, better, new, past, at_best=name == "memory size") for side in (a, b)]
        rows.append({"resource": name, "gain_a": gains[0], "gain_b": gains[1]})
    return pd.DataFrame(rows)


def gain(
    side: Side, better: Callable[[DeviceProfile], DeviceProfile], new: int, past: int, at_best: bool = False
) -> float:
    """Relative gain in tokens/s on a ``better`` device; ``at_best``: each device at the best batch that it holds."""
    one = side.deployment
    other = deploy(one.model, better(one.device), one.engine, one.layout, one.phase, options=one.options)
    step = replace(other.step, pricer=replace(other.step.pricer, corrections=one.step.pricer.corrections))
    other = replace(other, step=step)  # what its formulas miss stays what was measured
    if not at_best:
        return float(side.step_s / float(other.step.price(side.batch, float(new), float(past)).seconds) - 1)
    most = [float(side.largest_batch), float(other.largest_batch(new, past))]
    tried = np.union1d(GRID[GRID >= 1], most)  # the largest is not the best where a tile more has just begun
    rates = []
    for deployment, largest in zip((one, other), most, strict=True):
        batch = tried[tried <= largest]
        rates.append(float((batch / deployment.step.price(batch, float(new), float(past)).seconds).max()))
    return rates[1] / rates[0] - 1
