"""A deployment and requests in, what every request met out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.options import Options
from tensorcast.errors import InputError
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.model import ModelProfile
from tensorcast.scheduling.fleet import Fleet, Pool, Watch
from tensorcast.scheduling.outcome import Limits, Outcome, drawn_factors
from tensorcast.scheduling.pools import Change, Servers, check_changes
from tensorcast.scheduling.requests import Requests
from tensorcast.scheduling.rules import NO_WAITS, Waits, rules_of
from tensorcast.scheduling.server import Server
from tensorcast.scheduling.step_times import step_times
from tensorcast.serving.hand_over import hand_over_s
from tensorcast.serving.interval import POOLS_ERROR, SERVING_ERROR
from tensorcast.trace.cache import whole_model

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, kw_only=True)
class PricedServers:
    """Everything of a replay but its requests, priced once: pools with their rules and step times, and the GPUs of a
    server of each."""

    pools: tuple[Pool, ...]
    layout: str
    gpus_each: tuple[int, ...]

    def run(
        self, requests: Requests, *, limits: Limits = Limits(), router: str = "least_work", seed: int = 0,
        draws: int = 0, changes: Sequence[Change] = (), watch: Watch | None = None,
    ) -> Outcome:
        """Replay ``requests``; with ``draws`` also under step times as far off as theirs may be. ``changes``: servers
        lost or added meanwhile. ``watch``: see :meth:`Fleet.run`."""
        if draws < 0:
            raise InputError(f"--draws {draws}: must be at least 0")
        check_changes([pool.count for pool in self.pools], changes)

        def once(pools: Sequence[Pool]) -> Outcome:
            fleet = Fleet(pools, requests, router=router, seed=seed, changes=changes)
            fleet.run(watch)
            return self._outcome(fleet, limits)

        found = self._checked(once(self.pools))
        if not draws or found.stopped:
            return found
        random = np.random.default_rng(seed)
        errors = [self._error(i) for i in range(2)]
        factors = np.column_stack([drawn_factors(error, draws, random) for error in errors])
        drawn: list[dict[str, float]] = []
        for decode, prompts in factors:
            one = once([replace(p, times=p.times.scaled(float(decode), float(prompts))) for p in self.pools])
            if one.stopped:
                return replace(found, draws=tuple(drawn), stopped=True)
            drawn.append(one.summary())
        return replace(found, draws=tuple(drawn))

    def means(self, requests: Requests) -> dict[str, float]:
        """What users meet in the mean (:meth:`Outcome.means`), in a replay that looks at nothing else."""
        fleet = Fleet(self.pools, requests, tells=False)
        fleet.run()
        return self._checked(self._outcome(fleet, Limits())).means()

    def _checked(self, found: Outcome) -> Outcome:
        """Raises :class:`InputError` where no request is served, as all are too long."""
        requests = found.record.requests
        if not found.served and found.refused == len(requests):
            shortest = int((requests.input_len + requests.output_len).min())
            most = min(pool.rules.most_tokens for pool in self.pools)
            raise InputError(
                f"requests: none can be served: the shortest has {shortest} tokens with its reply, {self.layout} takes "
                f"{most:.0f} at most (the model's positions, or a rank's cache)"
            )
        return found

    def _error(self, phase: int) -> float:
        """Relative median error of decode steps (0) or prefill steps (1), with what serving adds."""
        own = max(pool.times.errors[phase] for pool in self.pools)
        beside = POOLS_ERROR if any(pool.rules.role != "both" for pool in self.pools) else SERVING_ERROR
        return float(np.hypot(own, beside["tpot_s"]))

    def _outcome(self, fleet: Fleet, limits: Limits) -> Outcome:
        record = fleet.record
        end = float(np.nanmax(record.last_s)) if np.isfinite(record.last_s).any() else np.nan
        there = [max(min(server.lost_s, end) - server.from_s, 0.0) for server in fleet.servers]
        held = sum(self.gpus_each[server.pool] * seconds for server, seconds in zip(fleet.servers, there, strict=True))
        gpus = sum(each * pool.count for each, pool in zip(self.gpus_each, self.pools, strict=True))
        return Outcome(
            record=record, layout=self.layout, gpus=held / end if fleet.changes and end > 0 else gpus, limits=limits,
            refused=len(fleet.refused), stopped=fleet.stopped,
            servers=tuple(self._said(server, end) for server in fleet.servers),
        )

    def _said(self, server: Server, end_s: float) -> dict[str, Any]:
        # one whose prompts nobody takes over works on after the last token that reached a user
        seconds = float(min(server.lost_s, np.fmax(end_s, server.idle_from_s)) - server.from_s)
        busy, prompts = (took / seconds if seconds > 0 else 0.0 for took in (server.busy_s, server.prompts_s))
        return {
            "role": server.rules.role, "steps": server.steps, "busy_share": busy, "prompts_share": prompts,
            "from_s": server.from_s,
            "lost_s": None if np.isinf(server.lost_s) else server.lost_s, "pool": server.pool,
            "moments": server.moments.columns,
        }


@dataclass(frozen=True)
class Part:
    """A pool with what its servers run: prompts, replies or both."""

    servers: Servers
    prefill: Deployment | None
    decode: Deployment | None

    @property
    def own(self) -> Deployment:
        """By whose memory and rules the servers go."""
        found = self.prefill if self.servers.role == "prefill" else self.decode
        assert found is not None
        return found


def priced_servers(
    model: ModelProfile, device: DeviceProfile, engine: EngineProfile, servers: Sequence[Servers], *, longest: int,
    options: Options = Options(), **settings: Unpack[Settings],
) -> PricedServers:
    """Lay servers out and price their steps. ``longest``: tokens of the longest request; of those
    longer than the model's positions, which servers refuse, none is priced. Raises :class:`InputError` for a rate of
    handing over that no pool has."""
    apart = any(one.role != "both" for one in servers)
    if options.hand_over_gbs is not None and not apart:
        raise InputError(
            f"--hand-over-gbs {options.hand_over_gbs:g}: no cache is handed over where servers read and write; ask for "
            "pools, as --layout 'tp2 > tp4'"
        )
    engine = engine.in_pools() if apart else engine
    undrafted = replace(options, mtp_depth=0)
    experts = whole_model(model, "decode", options.quant).facts.num_experts
    parts = []
    for one in [each.each_alone(experts) for each in servers]:
        where = one.device or device
        prefill, decode = (
            None if one.role == other else deploy(model, where, engine, one.layout, phase, options=asked)
            for phase, other, asked in (("prefill", "decode", undrafted), ("decode", "prefill", options))
        )
        parts.append(Part(one, prefill, decode))
    return _priced(parts, longest, settings)


def deployed_servers(
    prefill: Deployment, decode: Deployment, counts: Sequence[int], *, longest: int, **settings: Unpack[Settings]
) -> PricedServers:
    """:func:`priced_servers` of deployments that are there: ``counts`` servers that run both phases, or that read
    prompts and that write replies."""
    if len(counts) == 1:
        parts = [Part(Servers(decode.layout, counts[0]), prefill, decode)]
    else:
        own, other = (None, None) if prefill.device is decode.device else (prefill.device, decode.device)
        parts = [
            Part(Servers(prefill.layout, counts[0], "prefill", own), prefill, None),
            Part(Servers(decode.layout, counts[1], "decode", other), None, decode),
        ]
    return _priced(parts, longest, settings)


class Settings(TypedDict, total=False):
    """How servers are run, as of :func:`tensorcast.scheduling.rules.rules_of`, per data-parallel rank."""

    mtp_acceptance: float | str
    chunk_tokens: int | None
    max_sequences: int | None
    look_steps: float
    waits: Waits
    cache_tokens: float | None
    graph_sizes: Sequence[int]


def _priced(parts: Sequence[Part], longest: int, settings: Settings) -> PricedServers:
    longest = min(longest, parts[-1].own.model.max_positions or longest)
    pools = []
    for part in parts:
        rules = rules_of(part.own, part.servers.role, longest=longest, **settings)
        times = step_times(
            part.prefill, part.decode, most_sequences=rules.most_sequences, chunk_tokens=rules.chunk_tokens,
            longest=longest, graph_sizes=rules.graph_sizes,
        )
        hand_over = _hand_over(part, parts) if part.servers.role == "prefill" else None
        meeting_s = part.own.engine.hand_over_s if hand_over else 0.0
        pools.append(Pool(rules, times, part.servers.count, hand_over, meeting_s))
    waits = settings.get("waits", NO_WAITS)
    if waits.asked and not any(pool.rules.role == "both" and waits.any(pool.rules.ranks) for pool in pools):
        raise InputError(
            f"{waits.asked}: prompts wait beside replies: balance_steps where servers have several data-parallel "
            "ranks, batch_wait_steps where they have one; here nobody would"
        )
    phases = [[str(part.servers) for part in parts if (part.servers.role == "decode") == second] for second in (0, 1)]
    return PricedServers(
        pools=tuple(pools), layout=" > ".join(" & ".join(phase) for phase in phases if phase),
        gpus_each=tuple(part.servers.layout.world_size for part in parts),
    )


def _hand_over(part: Part, parts: Sequence[Part]) -> Callable[[int], float]:
    """Seconds that a prompt's cache keeps a link, by its tokens: a line, told by two lengths."""
    sender, workers = part.own, sum(one.servers.count for one in parts)
    receivers = [one for one in parts if one.servers.role == "decode"]
    largest = max(one.servers.layout.world_size for one in receivers)
    # the slowest way to any of them
    at = [
        max(float(hand_over_s(sender, largest, workers, tokens, one.own.device)) for one in receivers)
        for tokens in (1024, 2048)
    ]
    each = (at[1] - at[0]) / 1024
    fixed = at[0] - 1024 * each
    return lambda tokens: fixed + each * tokens
