"""Runs that say how their requests came, each replayed through its engine's scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tensorcast.errors import InputError
from tensorcast.predict.arrivals import BLOCK, as_sent
from tensorcast.predict.run_columns import Run
from tensorcast.predict.serve_runs import engine_of, load_engine_once, load_profiles
from tensorcast.profiles.engine import EngineProfile
from tensorcast.scheduling.outcome import Outcome
from tensorcast.scheduling.pools import Servers
from tensorcast.scheduling.replay import PricedServers, priced_servers
from tensorcast.scheduling.requests import Requests
from tensorcast.serving.interval import served_interval, unserved
from tensorcast.serving.traffic import steps_between_looks


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """Means of a replay, seconds and tokens per second of all GPUs; or the ``problem``.

    ``factors``: by metric, what four in five true values lie within. ``batch``: decoding sequences per rank.
    """

    ttft_s: float = 0.0
    tpot_s: float = 0.0
    output_tokens_per_s: float = 0.0
    batch: float = 0.0
    error: float = 0.0
    factors: dict[str, float] | None = None
    problem: str = ""


def replay_runs(runs: Sequence[Run], engine: Callable[[str], EngineProfile] | None = None) -> list[Replayed]:
    """What users of each of ``runs`` meet; a run that cannot be says why. Equal deployments are priced once."""
    priced: Priced = {}
    return [_replayed(run, priced, engine or load_engine_once) for run in runs]


Priced = dict[tuple[Any, ...], PricedServers | InputError]
"""Servers by what decides about their prices, or why there are none."""


def outcome_of(run: Run) -> tuple[PricedServers, Outcome]:
    """What happens to every request of a ``run``, and its servers. Raises :class:`InputError` where it cannot be
    served."""
    servers, requests = _asked(run, {}, load_engine_once)
    return servers, servers.run(requests)


def _asked(
    run: Run, priced: Priced, engine: Callable[[str], EngineProfile]
) -> tuple[PricedServers, Requests]:
    """Servers of a ``run``, which are put into ``priced``, and what they are sent."""
    assert run.arrivals is not None
    scheduler = engine(run.served_by).scheduler
    size = BLOCK if scheduler is None else scheduler.block_tokens
    requests = run.arrivals.requests(
        run.isl, run.osl, length_ratio=run.length_ratio, rounds=run.rounds, prefix_cached=run.prefix_cached,
        block_tokens=size,
    )
    requests = as_sent(requests, run.arrivals, (run.isl, run.osl), run.length_ratio, size)
    longest = 1 << int(requests.input_len.max() + requests.output_len.max() - 1).bit_length()  # tables that rows share
    key = (
        run.model, run.device, run.served_by, run.mode, run.frontend, run.prefix_cache, run.record,
        run.draft_overlap, run.layout, run.options, run.mtp_acceptance, run.chunk_tokens, run.max_sequences,
        run.arrivals.graph_sizes, run.arrivals.waits, run.wait_steps, longest,
    )
    if key not in priced:
        priced[key] = _priced(run, engine, longest)
    servers = priced[key]
    if isinstance(servers, InputError):
        raise servers
    return servers, requests


def _replayed(run: Run, priced: Priced, engine: Callable[[str], EngineProfile]) -> Replayed:
    try:
        servers, requests = _asked(run, priced, engine)
        said = servers.means(requests)
    except InputError as error:
        return Replayed(problem=str(error))
    times = [pool.times.errors for pool in servers.pools]
    decode, prompts = (max(errors[phase] for errors in times) for phase in (0, 1))
    share, pools = said["ttft_mean_s"] / said["request_mean_s"], run.mode == "disaggregated"
    profile = engine(run.served_by)
    new = unserved(profile, *(one.name for one in load_profiles(run)))
    factors = served_interval(prompts, decode, share, engine=profile, pools=pools, new=new)
    return Replayed(
        ttft_s=said["ttft_mean_s"], tpot_s=said["tpot_mean_s"], output_tokens_per_s=said["output_tokens_per_s"],
        batch=_batch(said, run), error=decode, factors={name: float(value) for name, value in factors.items()},
    )


def _batch(said: dict[str, float], run: Run) -> float:
    """Sequences that decode at a moment, per rank, over the whole run: Little's law."""
    decoding_s = max(said["request_mean_s"] - said["ttft_mean_s"], 0.0)
    return said["requests_per_s"] * decoding_s / (run.decode.dp * run.workers[1] * run.replicas)


def _priced(run: Run, engine: Callable[[str], EngineProfile], longest: int) -> PricedServers | InputError:
    assert run.arrivals is not None
    try:
        profile = engine_of(run, engine(run.served_by))
        servers: tuple[Servers, ...] = (Servers(run.decode, run.replicas),)
        if run.mode == "disaggregated":
            servers = (
                Servers(run.prefill, run.workers[0], "prefill"), Servers(run.decode, run.workers[1], "decode")
            )
        model, device = load_profiles(run)
        return priced_servers(
            model, device, profile, servers, longest=longest, options=run.options,
            mtp_acceptance=run.mtp_acceptance, chunk_tokens=run.chunk_tokens,
            max_sequences=run.max_sequences, look_steps=steps_between_looks(run.wait_steps),
            waits=run.arrivals.waits, graph_sizes=run.arrivals.graph_sizes,
        )
    except InputError as error:
        return error
