"""From what a user asks to tasks of a search: one per device and cluster size, every value checked first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

from tensorcast.cost.routing import Routing
from tensorcast.cost.stages import broken_stages, stated_stages
from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.engine_limits import ENGINE_RULES
from tensorcast.deploy.layout import Layout, one_server, parse_layout
from tensorcast.deploy.options import SERVED_ROUTING, Options, check_options, of_layout
from tensorcast.deploy.plan.switches import as_asked
from tensorcast.errors import InputError, unknown_name
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.drafting import acceptance
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.kept import same
from tensorcast.profiles.model import ModelProfile
from tensorcast.search.axes import FULL, Axes
from tensorcast.search.workspace import CURRENT
from tensorcast.serving.interval import unserved
from tensorcast.serving.objective import OBJECTIVES
from tensorcast.serving.traffic import Traffic
from tensorcast.trace.cache import whole_model

if TYPE_CHECKING:
    from tensorcast.serving.encoder import PromptImages


@dataclass(frozen=True)
class Scenario:
    """What stays the same while layouts and options vary."""

    model: ModelProfile
    device: DeviceProfile
    engine: EngineProfile
    load: Traffic
    prompts_on: DeviceProfile | None = None
    """What reads prompts, where it is another device."""
    images: PromptImages | None = None
    """What comes with every prompt beside text."""

    @property
    def own_chunk(self) -> int:
        """Prompt tokens per step and rank where they are not searched; launch commands say so."""
        return self.engine.tokens_per_step(self.device)

    def deployment(self, layout: Layout, phase: str, options: Options) -> Deployment:
        device = self.prompts_on if self.prompts_on is not None and phase == "prefill" else self.device
        key = id(self.model), id(device), id(self.engine), layout, phase, options, self.images
        deployments = CURRENT.get().deployments
        if key not in deployments:
            made = deploy(self.model, device, self.engine, layout, phase, options=options)
            deployments[key] = self, made if self.images is None else self.images.held(made)
        return deployments[key][1]


MODES = ("aggregated", "disaggregated")

Room = Sequence[tuple[float, float, float]]
"""The most of something that pools may take, GPUs first, and how much a GPU of prefill and of decode workers does."""

SEARCHED = {
    "kv_dtype": "kv_dtype", "mtp_depth": "mtp_depth", "dcp": "dcp", "pcp": "pcp", "exchange": "all2all",
    "dispatch": "dispatch", "combine": "combine", "chunk_tokens": "chunk_tokens",
}
"""Axes by what their option is called."""


@dataclass(frozen=True, kw_only=True)
class SearchTask:
    """What is asked of one device, engine and cluster size; a task of its own for a worker process."""

    model: ModelProfile
    device: DeviceProfile
    engine: EngineProfile
    gpus: int
    load: Traffic
    ttft_s: float | None = None
    tpot_s: float | None = None
    objective: str = "tokens_per_gpu"
    axes: Axes = field(default_factory=Axes)
    base: Options = field(default_factory=Options)
    layouts: tuple[Layout, ...] = ()
    """Only these, where they divide the GPUs; empty: all."""
    modes: tuple[str, ...] = MODES
    request_rate: float | None = None
    """Requests per second to be served at least."""
    users: int | None = None
    """Requests in flight to be served at least."""
    budget: float | None = None
    """US dollars per hour to be spent at most."""
    confidence: float | None = None
    """Chance with which limits are to be kept, and by whose lower bounds candidates are ranked; None: as expected."""
    price_per_hour: float | None = None
    runnable_only: bool = True
    images: PromptImages | None = None
    """What comes with every prompt beside text; ``load`` counts its tokens."""
    pools: tuple[SearchTask, ...] = ()
    """Of prompts on one device and replies on another: the same asked of each alone, either of all ``gpus``, which then
    are of both together, or of those that there are of it. Else empty."""

    @property
    def unserved(self) -> int:
        """How much of model, device and release the engine was not fitted to."""
        return unserved(self.engine, self.model.name, self.device.name)

    @property
    def paid_gpus(self) -> int:
        """GPUs of the size asked for that the budget pays; of two devices the cheaper."""
        prices = [one.price for one in self.pools or (self,) if one.price is not None]
        if self.budget is None or not prices:
            return self.gpus
        return min(self.gpus, int(self.budget / min(prices) * (1 + 1e-12)))

    def pools_room(self) -> Room:
        """What both pools take together, and each of its own where GPUs of each device are counted; of a task with
        ``pools``."""
        first, second = self.pools
        room = [(float(self.gpus), 1.0, 1.0)]
        if first.gpus + second.gpus == self.gpus:
            room += [(float(first.gpus), 1.0, 0.0), (float(second.gpus), 0.0, 1.0)]
        if self.budget is not None:
            room.append((self.budget * (1 + 1e-12), first.price or 0.0, second.price or 0.0))
        return room

    @property
    def price(self) -> float | None:
        """US dollars per GPU hour: what was given, else the list price of the device, if any is known."""
        listed = self.device.price_per_hour_usd
        return float(listed) if self.price_per_hour is None and listed is not None else self.price_per_hour

    @property
    def scenario(self) -> Scenario:
        return Scenario(self.model, self.device, self.engine, self.load, images=self.images)

    @property
    def pools_scenario(self) -> Scenario:
        """Of pools that answer prompts and write replies apart: of the device that writes."""
        found = replace(self.scenario, engine=same(self.engine.in_pools()))
        return replace(found, device=self.pools[-1].device, prompts_on=self.device) if self.pools else found


def search_tasks(
    model: ModelProfile, devices: Sequence[DeviceProfile], engines: Sequence[EngineProfile],
    world_sizes: Sequence[int], *,
    input_len: int, output_len: int, prefix_cached: int = 0, mtp_acceptance: float | str = 0.8,
    ttft_s: float | None = None, tpot_s: float | None = None, objective: str = "tokens_per_gpu",
    layouts: Sequence[str] | None = None, modes: Sequence[str] = MODES, request_rate: float | None = None,
    users: int | None = None, budget: float | None = None, confidence: float | None = None,
    prices: Mapping[str, float] | None = None,
    quant: str | None = None, state_dtype: str | None = None, routing: str = SERVED_ROUTING,
    placement: str = "linear", speculative_method: str = "mtp", draft_model: str | None = None,
    pp_partition: str | None = None, experts_kernels: str = "engine", attention_kernels: str = "engine",
    full: bool = False, runnable_only: bool = True,
    searched: Mapping[str, Sequence[Any] | None] | None = None,
    decode_device: DeviceProfile | None = None, decode_gpus: int | None = None, images: PromptImages | None = None,
) -> list[SearchTask]:
    """Tasks of every device, engine and size. ``searched``: values of axes; those left out are the default space's.
    ``decode_device``: of the replies' pools; those of prompts are on each of ``devices``. ``world_sizes`` are of both,
    or, where there are so many ``decode_gpus``, of the prompts' alone. ``input_len`` is of text, beside ``images``.

    Raises :class:`InputError`, one line, on anything that cannot be.
    """
    _check_names(objective, modes, [device.name for device in devices], world_sizes, prices=prices or {},
                 decode="" if decode_device is None else decode_device.name)
    if decode_gpus is not None and (decode_device is None or decode_gpus < 1):
        why = "must be at least 1" if decode_device is not None else "is of --decode-device, and none is given"
        raise InputError(f"--decode-world-size {decode_gpus}: {why}")
    names = [engine.name for engine in engines]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise InputError(f"--engine {','.join(names)}: one release of {twice} at a time")
    if not 0 <= prefix_cached < max(1, input_len):
        raise InputError(f"--prefix-cached {prefix_cached}: must be at least 0 and less than --input-len {input_len}")
    routing = model.traffic if routing == SERVED_ROUTING else routing
    Routing.parse(routing)
    # one request in flight stands for the load until a candidate's batch says how many there are
    if isinstance(mtp_acceptance, str):
        mtp_acceptance = acceptance(mtp_acceptance, model.name, speculative_method)
    input_len += 0 if images is None else images.tokens(model)
    load = Traffic(input_len, output_len, 1, prefix_cached, mtp_acceptance)
    given = {name: tuple(values) for name, values in (searched or {}).items() if values}
    axes = replace(FULL if full else Axes(), **given)
    one_exchange = {  # for both phases
        engine.name: axes.for_one_exchange() for engine in engines
        if runnable_only and "one exchange" in ENGINE_RULES.get(engine.name, ())
    }
    wanted = tuple(dict.fromkeys(parse_layout(text) for text in layouts or ()))
    own = _of_servers(wanted, model, quant) if axes.pcp == (1,) else wanted
    base = Options(
        quant=quant, state_dtype=state_dtype, routing=routing, placement=placement,
        speculative_method=speculative_method, draft_model=draft_model, pp_partition=pp_partition,
        experts_kernels=experts_kernels, attention_kernels=attention_kernels,
    )
    # profiles are read anew for every question; equal ones are the same, so that what is kept of them serves all
    model, devices = same(model), [same(device) for device in devices]
    engines = [as_asked(same(one), base) for one in engines]  # all candidates are priced as one engine's
    replies = None if decode_device is None else same(decode_device)
    tasks = [
        SearchTask(
            model=model, device=device, engine=engine, gpus=size, load=load, ttft_s=ttft_s, tpot_s=tpot_s,
            objective=objective, axes=one_exchange.get(engine.name, axes), base=base,
            modes=tuple(modes) if replies is None else ("disaggregated",),
            request_rate=request_rate, users=users, budget=budget, confidence=confidence,
            layouts=own, price_per_hour=(prices or {}).get(device.name), runnable_only=runnable_only,
            images=images,
        )
        for device in devices
        for engine in engines
        for size in world_sizes
    ]  # fmt: skip
    for i, task in enumerate(tasks):
        _check(task)
        if replies is not None and (replies is not task.device or decode_gpus is not None):
            there = task.gpus if decode_gpus is None else decode_gpus
            second = replace(task, device=replies, gpus=there, price_per_hour=(prices or {}).get(replies.name))
            _check(second)
            tasks[i] = replace(task, pools=(task, second), gpus=task.gpus + (decode_gpus or 0))
    for layout in wanted:
        if not any([size % layout.world_size == 0 for size in (*world_sizes, *filter(None, [decode_gpus]))]):
            sizes = ", ".join(map(str, world_sizes))
            sizes += "" if decode_gpus is None else f" or --decode-world-size {decode_gpus}"
            raise InputError(
                f"layout {layout} takes {layout.world_size} GPUs, which does not divide --world-size {sizes}"
            )
    _applies(model, base, given)
    _staged(tasks, base)
    if problem := model.too_long(input_len + output_len):
        raise InputError(f"--input-len {input_len} and --output-len {output_len}: {problem}")
    return tasks


def _of_servers(wanted: tuple[Layout, ...], model: ModelProfile, quant: str | None) -> tuple[Layout, ...]:
    """Layouts of one server: data-parallel ranks of a dense model are counted as replicas."""
    if not any(layout.dp > 1 for layout in wanted):
        return wanted
    experts = whole_model(model, "decode", quant).facts.num_experts
    return tuple(dict.fromkeys(one_server(layout, experts)[0] for layout in wanted))


def _check_names(
    objective: str, modes: Sequence[str], devices: Sequence[str], world_sizes: Sequence[int], *,
    prices: Mapping[str, float], decode: str = "",
) -> None:
    """Raise :class:`InputError`, one line, on the first name that stands for nothing, or where nothing is named."""
    if objective not in OBJECTIVES:
        raise unknown_name("--objective", objective, OBJECTIVES)
    for mode in modes:
        if mode not in MODES:
            raise unknown_name("--mode", mode, MODES)
    if not devices or not world_sizes:
        raise InputError("compare: needs at least one device and one world size")
    if decode and "disaggregated" not in modes:
        raise InputError(f"--decode-device {decode}: is of pools, and --mode {','.join(modes)} has none")
    for name, value in prices.items():
        if name not in (*devices, decode):
            beside = f" or --decode-device {decode}" if decode else ""
            raise InputError(f"--price {name}={value:g}: {name} is not one of --device {','.join(devices)}{beside}")


def _check(task: SearchTask) -> None:
    """Raise :class:`InputError`, one line, on the first of what must hold of a task's numbers that does not."""
    device, rate, price = task.device, task.request_rate, task.price_per_hour
    positive = {
        "--ttft": task.ttft_s, "--tpot": task.tpot_s, "--request-rate": rate, "--users": task.users,
        "--budget": task.budget,
    }
    for flag, value in positive.items():
        if value is not None and not (isinstance(value, Real) and 0 < value < math.inf):
            raise InputError(f"{flag} {value!r}: must be a number more than 0")
    rules = (
        (
            "--objective gpus", task.objective != "gpus" or rate is not None or task.users is not None,
            "say for how many requests per second, with --request-rate, or at once, with --users",
        ),
        (
            f"--confidence {task.confidence or 0:g}", task.confidence is None or 0.5 <= task.confidence < 1,
            "must be a chance of at least 0.5 and less than 1, such as 0.8",
        ),
        (
            f"--price {device.name}={price or 0:g}", price is None or 0 < price < math.inf,
            "must be more than 0 US dollars per GPU hour",
        ),
        (
            "--objective cost", task.objective != "cost" or task.price is not None,
            f"no price per GPU hour is known for {device.name}; use --price, as in H200=2.5",
        ),
        (
            f"--budget {task.budget or 0:g}", task.budget is None or task.price is not None,
            f"no price per GPU hour is known for {device.name}; use --price, as in H200=2.5",
        ),
        (
            f"--budget {task.budget or 0:g}", task.paid_gpus >= 1 or task.gpus < 1,
            f"pays for no {device.name} at {task.price or 0:g} USD per GPU hour",
        ),
        (f"--world-size {task.gpus}", task.gpus >= 1, "must be at least 1"),
        (
            f"--world-size {task.gpus}", task.gpus <= device.world_limit,
            f"{device.name}'s interconnect reaches {device.world_limit} GPUs",
        ),
    )
    for asked, holds, says in rules:
        if not holds:
            raise InputError(f"{asked}: {says}")


def _applies(model: ModelProfile, base: Options, given: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise :class:`InputError` where the model has nothing that an option asked for is about."""
    facts = whole_model(model, "decode", base.quant).facts
    depths = given.get("mtp_depth", (0,))
    if max(depths) > 0 and not facts.mtp_modules and base.speculative_method == "mtp":
        said = ",".join(map(str, depths))
        raise InputError(
            f"--mtp {said}: the config of {model.name} has no multi-token prediction module to draft with; "
            "--speculative-method eagle3, dflash or ngram brings its own"
        )
    exchange = next((kind for kind in given.get("exchange", ()) if kind != "auto"), "auto")
    dispatch, combine = (
        next((scheme for scheme in given.get(axis, ()) if scheme), None) for axis in ("dispatch", "combine")
    )
    base = of_layout(base, Layout(1))
    check_options(replace(base, all2all=exchange, dispatch=dispatch, combine=combine), Layout(1), facts, "none")


def _staged(tasks: Sequence[SearchTask], base: Options) -> None:
    """Raise :class:`InputError` where stages are stated that are not the model's, or that no layout has as many of."""
    if not (text := base.pp_partition):
        return
    count = len(stated_stages(text))
    if problem := broken_stages(text, count, whole_model(tasks[0].model, "decode", base.quant).facts.layers):
        raise InputError(problem)
    pools = [pool for task in tasks for pool in task.pools or (task,)]
    if not any(layout.pp == count for task in pools for layout in task.layouts) and (
        any(task.layouts for task in pools) or all(task.gpus % count for task in pools)
    ):
        raise InputError(f"--pp-partition {text}: {count} stages, and no layout has as many")
