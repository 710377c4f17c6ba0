"""A deployment and requests in, what every request met out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.layout import Layout, parse_layout
from tensorcast.deploy.options import Options
from tensorcast.errors import InputError
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.model import ModelProfile
from tensorcast.scheduling.fleet import Fleet, Pool
from tensorcast.scheduling.outcome import Limits, Outcome, drawn_factors
from tensorcast.scheduling.requests import Requests
from tensorcast.scheduling.rules import Role, rules_of
from tensorcast.scheduling.step_times import step_times
from tensorcast.serving.hand_over import hand_over_s
from tensorcast.serving.interval import SERVING_ERROR


@dataclass(frozen=True)
class Servers:
    """``count`` servers of one layout; two of these, with prompts read by the first, are a disaggregated deployment."""

    layout: Layout
    count: int = 1

    def __str__(self) -> str:
        return f"{self.count} x {self.layout}" if self.count > 1 else str(self.layout)


def parse_servers(text: str) -> tuple[Servers, ...]:
    """``tp8-ep8``, ``4 x tp8-ep8`` or, prompts read by other servers, ``2 x tp8-ep8 > 1 x dp8-ep8`` (also ``+``)."""
    parts = re.split(r"\s*[>+]\s*", text.strip())
    if len(parts) > 2:
        raise InputError(f"layout {text!r}: at most two pools, prefill > decode")
    found = []
    for part in parts:
        count, layout = re.fullmatch(r"(?:(\d+)\s*x\s*)?(.*)", part.strip(), re.DOTALL).groups()  # type: ignore[union-attr]
        if count is not None and int(count) < 1:
            raise InputError(f"layout {text!r}: {count} servers: at least 1")
        found.append(Servers(parse_layout(layout), int(count or 1)))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class PricedServers:
    """Everything of a replay but its requests, priced once: pools with their rules and step times."""

    pools: tuple[Pool, ...]
    layout: str
    gpus: int
    hand_over: Callable[[int], float] | None
    notes: tuple[str, ...]

    def run(
        self, requests: Requests, *, limits: Limits = Limits(), router: str = "least_work", seed: int = 0,
        draws: int = 0,
    ) -> Outcome:
        """Replay ``requests``; with ``draws`` also under step times as far off as theirs may be."""
        if draws < 0:
            raise InputError(f"--draws {draws}: must be at least 0")
        found = self._once(self.pools, requests, limits, router=router, seed=seed)
        if not found.served:
            shortest = int((requests.input_len + requests.output_len).min())
            most = min(min(pool.rules.longest, pool.rules.cache_tokens) for pool in self.pools)
            raise InputError(
                f"requests: none can be served: the shortest has {shortest} tokens with its reply, {self.layout} takes "
                f"{most:.0f} at most (the model's positions, or a rank's cache)"
            )
        if not draws:
            return found
        random = np.random.default_rng(seed)
        errors = [self._error(i) for i in range(2)]
        factors = np.column_stack([drawn_factors(error, draws, random) for error in errors])
        drawn = []
        for decode, prompts in factors:
            pools = tuple(replace(p, times=p.times.scaled(float(decode), float(prompts))) for p in self.pools)
            drawn.append(self._once(pools, requests, limits, router=router, seed=seed).summary())
        return replace(found, draws=tuple(drawn))

    def _error(self, phase: int) -> float:
        """Relative median error of decode steps (0) or prefill steps (1), with what serving adds."""
        own = max(pool.times.errors[phase] for pool in self.pools)
        return float(np.hypot(own, SERVING_ERROR["tpot_s"]))

    def _once(
        self, pools: Sequence[Pool], requests: Requests, limits: Limits, *, router: str, seed: int
    ) -> Outcome:
        fleet = Fleet(pools, requests, router=router, hand_over_s=self.hand_over, seed=seed)
        record = fleet.run()
        end = np.nanmax(record.last_s) if np.isfinite(record.last_s).any() else np.nan
        servers = tuple(
            {
                "role": server.rules.role, "steps": server.steps, "busy_share": server.busy_s / end if end > 0 else 0.0,
                "prompts_share": server.prompts_s / end if end > 0 else 0.0, "moments": server.moments.columns,
            }
            for server in fleet.servers
        )
        return Outcome(
            record=record, layout=self.layout, gpus=self.gpus, limits=limits, refused=len(fleet.refused),
            servers=servers, notes=self.notes,
        )


def priced_servers(
    model: ModelProfile, device: DeviceProfile, engine: EngineProfile, servers: Sequence[Servers], *, longest: int,
    options: Options = Options(), mtp_acceptance: float = 0.8, prefill_chunk: int | None = None,
    max_sequences: int | None = None, wait_steps: float = 0.0, balance_steps: int = 0,
    cache_tokens: float | None = None,
) -> PricedServers:
    """Lay servers out and price their steps. ``longest``: tokens of the longest request; of those
    longer than the model's positions, which servers refuse, none is priced."""
    pooled = len(servers) == 2
    engine = engine.in_pools() if pooled else engine
    undrafted = replace(options, mtp_depth=0)
    prefill = deploy(model, device, engine, servers[0].layout, "prefill", options=undrafted)
    decode = deploy(model, device, engine, servers[-1].layout, "decode", options=options)
    return deployed_servers(
        prefill, decode, [one.count for one in servers], longest=longest, mtp_acceptance=mtp_acceptance,
        prefill_chunk=prefill_chunk, max_sequences=max_sequences, wait_steps=wait_steps, balance_steps=balance_steps,
        cache_tokens=cache_tokens,
    )


def deployed_servers(
    prefill: Deployment, decode: Deployment, counts: Sequence[int], *, longest: int, mtp_acceptance: float = 0.8,
    prefill_chunk: int | None = None, max_sequences: int | None = None, wait_steps: float = 0.0,
    balance_steps: int = 0, cache_tokens: float | None = None,
) -> PricedServers:
    """:func:`priced_servers` of deployments that are there: ``counts`` servers that run both phases, or that read
    prompts and that write replies."""
    pooled = len(counts) == 2
    of = (prefill, decode) if pooled else (decode,)
    servers = [Servers(one.layout, count) for one, count in zip(of, counts, strict=True)]
    roles: tuple[Role, ...] = ("prefill", "decode") if pooled else ("both",)
    longest = min(longest, decode.model.max_positions or longest)
    pools, deployed = [], []
    for one, role in zip(servers, roles, strict=True):
        phases = (prefill if role != "decode" else None), (decode if role != "prefill" else None)
        own = prefill if role == "prefill" else decode
        rules = rules_of(
            own, role, mtp_acceptance=mtp_acceptance, chunk_tokens=prefill_chunk, max_sequences=max_sequences,
            wait_steps=wait_steps, balance_steps=balance_steps, cache_tokens=cache_tokens, longest=longest,
        )
        times = step_times(
            *phases, most_sequences=rules.most_sequences, chunk_tokens=rules.chunk_tokens, longest=longest
        )
        pools.append(Pool(rules, times, one.count))
        deployed.append(own)
    gpus = sum(one.count * one.layout.world_size for one in servers)
    return PricedServers(
        pools=tuple(pools), layout=" > ".join(map(str, servers)), gpus=gpus,
        hand_over=_hand_over(deployed, servers) if pooled else None, notes=(),
    )


def _hand_over(deployed: Sequence[Deployment], servers: Sequence[Servers]) -> Callable[[int], float]:
    """Seconds of a prompt's cache on its way, by its tokens: a line, told by two lengths."""
    first, second = deployed
    workers = sum(one.count for one in servers)
    at = [float(hand_over_s(first, second.layout.world_size, workers, tokens)) for tokens in (1024, 2048)]
    each = (at[1] - at[0]) / 1024
    fixed = at[0] - 1024 * each + first.engine.hand_over_s
    return lambda tokens: fixed + each * tokens
