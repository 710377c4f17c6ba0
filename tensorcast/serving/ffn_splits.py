"""Attention and FFN apart, over all splits of the GPUs of a decode server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from tensorcast.deploy.deployment import Deployment
from tensorcast.deploy.ffn_apart import MICRO_BATCHES, FfnApart, attention_side, ffn_side
from tensorcast.deploy.options import Options
from tensorcast.errors import InputError
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.model import ModelProfile
from tensorcast.serving.traffic import Traffic
from tensorcast.trace.cache import whole_model

MOST_TP = 8
EXCHANGES = ("auto", "low_latency")
"""Between FFN ranks: what the engine takes unasked, and DeepEP's for few tokens."""

BATCHES = 48
"""Batches that are tried of every split, in even ratios."""


@dataclass(frozen=True, kw_only=True)
class DecodeServer:
    """A decode server at its best batch within the limit on time per token, by steps alone.

    ``gpus``: of one server; ``batch``: sequences per data-parallel rank of attention; ``busy``: the share of the step
    in which attention and FFN ranks compute, None of a whole server.
    """

    layout: str
    gpus: int
    batch: float
    step_s: float
    tokens_per_s_per_gpu: float
    exchange: str
    busy: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Split:
    """Of one device, engine and number of GPUs: the best batch of each split, best first, and the best whole server."""

    device: str
    engine: str
    gpus: int
    apart: tuple[DecodeServer, ...]
    whole: DecodeServer | None

    def record(self) -> dict[str, Any]:
        """Plain values, units in the names."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """What is to be split: a model on ``gpus`` of a device, for a load and a limit on time per token, if any."""

    model: ModelProfile
    device: DeviceProfile
    engine: EngineProfile
    gpus: int
    load: Traffic
    tpot_s: float | None
    options: Options


def splits(asked: Splitting) -> tuple[DecodeServer, ...]:
    """The best batch of every split of servers of powers of two up to the GPUs, the best first: at least as many
    attention ranks as FFN ranks, two micro-batches. Raises :class:`InputError` for a model without experts."""
    experts = whole_model(asked.model, "decode", asked.options.quant).facts.num_experts
    if not experts:
        raise InputError(f"--ffn-apart: {asked.model.name} has no experts; FFN ranks are for experts")
    sizes = [2**i for i in range(1, 12) if 2**i <= asked.gpus]
    attention = [*_sides(asked, [2**i for i in range(MOST_TP.bit_length())], [asked.options], attention_side)]
    exchanges = [replace(asked.options, all2all=name) for name in EXCHANGES]
    ffn = [*_sides(asked, [n // 2 for n in sizes if experts % (n // 2) == 0], exchanges, ffn_side)]
    found = []
    for gpus in sizes:
        for first in attention:
            for second in ffn:
                ranks, tp = gpus - second.layout.world_size, first.layout.tp
                if ranks % tp == 0 and ranks >= second.layout.world_size:
                    apart = FfnApart(attention=first, dp=ranks // tp, ffn=second, micro_batches=MICRO_BATCHES)
                    found += _best_batch(apart, asked)
    return tuple(sorted(found, key=lambda one: -one.tokens_per_s_per_gpu))


def _sides(
    asked: Splitting, sizes: Sequence[int], options: Sequence[Options], make: Callable[..., Deployment]
) -> Iterator[Deployment]:
    """Sides of these sizes, those alone that break no rule."""
    seen = set()
    for size in sizes:
        for chosen in options:
            try:
                side = make(asked.model, asked.device, asked.engine, size, chosen)
            except InputError:
                continue
            if (size, side.step.plan.all2all) not in seen:
                seen.add((size, side.step.plan.all2all))
                yield side


def _best_batch(apart: FfnApart, asked: Splitting) -> list[DecodeServer]:
    """The split at the batch that brings most tokens within memory and the limit; nothing where none does."""
    most = apart.largest_batch(int(asked.load.input_len + asked.load.output_len) - 1)
    grid = np.unique(np.geomspace(MICRO_BATCHES, max(most, MICRO_BATCHES), BATCHES).round())
    grid = grid[grid <= most]
    if not len(grid):
        return []
    price = apart.price(grid, float(asked.load.context))
    fits = np.broadcast_to(apart.ffn.memory(grid * apart.dp / apart.ffn_gpus, 1, 0).fits, grid.shape)
    rate = np.where(fits & (price.seconds <= (asked.tpot_s or np.inf)), price.tokens_per_s_per_gpu, 0.0)
    i = int(rate.argmax())
    if not rate[i]:
        return []
    step_s, attention, ffn = (float(np.asarray(values)[i]) for values in (price.seconds, *price.busy))
    return [DecodeServer(
        layout=str(apart), gpus=apart.gpus, batch=float(grid[i]), step_s=step_s, tokens_per_s_per_gpu=float(rate[i]),
        exchange=apart.ffn.step.plan.all2all, busy=(attention, ffn),
    )]  # fmt: skip
