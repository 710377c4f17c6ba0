"""Requests replayed from Python, one fleet or many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tensorcast.api.deployments import device_profile, noted
from tensorcast.arguments import python_names

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Unpack

    from tensorcast.deploy.option_types import DeploymentOptions
    from tensorcast.scheduling.fleet import Watch
    from tensorcast.scheduling.outcome import Outcome
    from tensorcast.scheduling.pools import Change
    from tensorcast.scheduling.requests import Requests
    from tensorcast.scheduling.rules import Waits
    from tensorcast.scheduling.sweep import Sent


@python_names
def replay(
    model: str,
    *,
    device: str,
    layout: str,
    requests: Requests,
    engine: str = "vllm",
    router: str = "least_work",
    ttft_s: float | None = None,
    tpot_s: float | None = None,
    request_s: float | None = None,
    find_rate: bool = False,
    percentile: float = 99.0,
    prefill_chunk: int | None = None,
    max_sequences: int | None = None,
    graph_sizes: Sequence[int] = (),
    mtp_acceptance: float | str = 0.8,
    waits: Waits | None = None,
    draws: int = 0,
    seed: int = 0,
    workers: str = "",
    usd_per_gpu_hour: float = 0.0,
    watch: Watch | None = None,
    **options: Unpack[DeploymentOptions],
) -> Outcome:
    """Replay ``requests`` one by one through the engine's scheduler, on the prices of :func:`simulate`.

    ``layout`` is one server's, such as ``tp8-ep8``, several (``4 x tp8-ep8``), or two pools, prompts read by the first
    (``2 x tp8 > dp8-ep8``); pools beside one another have ``&`` between, another device is behind ``@``:
    ``2 x tp8 & 4 x tp4@h100``. ``requests`` come from :func:`tensorcast.scheduling.trace_files.read_trace`, or are
    drawn, by ``drawn`` and ``sessions`` of :mod:`tensorcast.scheduling.requests`. ``workers``: servers lost and added
    meanwhile, ``600s -1, 15min +2``, of the second pool ``600s -1 of 2``. ``router``: ``least_work``, ``round_robin``,
    ``power_of_two`` or ``prefix_aware``. ``ttft_s``, ``tpot_s``, ``request_s`` are the longest times that users accept;
    with ``find_rate`` the requests are sent as fast as leaves ``percentile`` percent of them within.
    ``prefill_chunk``, ``max_sequences``: new tokens and sequences of a step, per data-parallel rank, the engine's own
    if not given; ``graph_sizes``: sequences that decode steps are padded to. ``waits``: steps that prompts wait for
    others (TensorRT-LLM's ``attention_dp_config`` and ``batch_wait``). ``draws`` replays under other step times give
    80 % bands; ``usd_per_gpu_hour`` gives cost. ``watch`` is told how many requests are finished by which second;
    Ctrl-C then leaves these. ``options``: those of :func:`simulate`; ``routing`` is typical unless said.

    >>> import tensorcast as tc
    >>> from tensorcast.scheduling.requests import Length, drawn
    >>> found = tc.replay("qwen3-235b-a22b", device="h200", layout="tp8-ep8",
    ...                   requests=drawn(1000, Length(2000, 0.5), Length(300, 0.5), rate=4.0))  # doctest: +SKIP
    >>> found.summary()["ttft_p99_s"], found.per_request().head()  # doctest: +SKIP
    """
    from tensorcast.cost.routing import SAID
    from tensorcast.deploy.model_names import named_model
    from tensorcast.deploy.options import served_options
    from tensorcast.profiles.store import load_engine
    from tensorcast.scheduling.capacity import at_the_limit, too_few
    from tensorcast.scheduling.outcome import Limits
    from tensorcast.scheduling.pools import parse_changes, parse_servers
    from tensorcast.scheduling.replay import priced_servers
    from tensorcast.scheduling.rules import Waits

    limits = Limits(ttft_s=ttft_s, tpot_s=tpot_s, request_s=request_s)
    (profile, read_as), servers = named_model(model), parse_servers(layout)
    chosen = served_options(options, profile)
    changes = parse_changes(workers, len(servers))
    priced = priced_servers(
        profile, device_profile(device), load_engine(engine), servers,
        longest=int((requests.input_len + requests.output_len).max()), options=chosen,
        mtp_acceptance=mtp_acceptance, chunk_tokens=prefill_chunk, max_sequences=max_sequences,
        waits=waits or Waits(), graph_sizes=graph_sizes,
    )
    if find_rate:
        share = percentile / 100
        requests = at_the_limit(priced, requests, limits, share=share, router=router, seed=seed, changes=changes)
    found = priced.run(requests, limits=limits, router=router, seed=seed, draws=draws, changes=changes, watch=watch)
    spread = SAID[chosen.routing] if profile.stated_facts.num_experts else ""
    short = too_few(found) if find_rate else ""
    most = f"{requests.rate:.3g} requests per second is the largest rate at which {percentile:g} % keep the limits"
    return noted(
        replace(found, usd_per_gpu_hour=usd_per_gpu_hour), read_as, most if find_rate else "", spread, short,
        _too_late(found, changes, workers)
    )


def _too_late(found: Outcome, changes: Sequence[Change], workers: str) -> str:
    """What is said of ``changes`` of servers after the last reply; empty where there are none."""
    ended = found.record.last_s[found.record.last_s > 0]
    last_s = float(ended.max()) if len(ended) else 0.0
    late = [one.when_s for one in changes if one.when_s >= last_s]
    if not late or not len(ended):
        return ""
    return f"workers {workers!r}: nothing changes from {late[0]:g} s on, as the last reply ends at {last_s:.4g} s"


@python_names
def replay_sweep(
    model: str, *, device: str, layouts: Sequence[str], requests: Requests | Sequence[Sent],
    rates: Sequence[float] = (), engine: str = "vllm", router: str = "least_work", ttft_s: float | None = None,
    tpot_s: float | None = None, request_s: float | None = None, find_rate: bool = False, percentile: float = 99.0,
    prefill_chunk: int | None = None, max_sequences: int | None = None, graph_sizes: Sequence[int] = (),
    mtp_acceptance: float | str = 0.8, waits: Waits | None = None, seed: int = 0, workers: str = "",
    usd_per_gpu_hour: float = 0.0, jobs: int = 1,
    executor: str | None = None, done: Callable[[int], None] | None = None, keep: bool = False,
    **options: Unpack[DeploymentOptions],
) -> pd.DataFrame:
    """Every one of ``layouts`` under every one of ``requests``: a row each, with the numbers of a replay's summary.

    ``requests``: one set, stretched to each of ``rates`` per second where given, or several with what tells them apart.
    What cannot be replayed says so in ``problem``. ``jobs`` processes, or ``executor="dask:ADDRESS"``, replay them.
    ``done`` is told how many there are; with ``keep`` Ctrl-C leaves them. The rest: :func:`replay`.
    """
    from tensorcast.deploy.model_names import named_model
    from tensorcast.deploy.options import served_options
    from tensorcast.profiles.store import load_engine
    from tensorcast.scheduling.outcome import Limits
    from tensorcast.scheduling.rules import Waits
    from tensorcast.scheduling.sweep import ReplayTask, every_replay, replay_all, sent_at

    profile = named_model(model)[0]
    sent = list(requests) if isinstance(requests, Sequence) else sent_at(requests, rates)
    tasks = every_replay(
        layouts, sent, seed, ReplayTask(
            model=profile, device=device_profile(device), engine=load_engine(engine), layout="",
            sent=sent[0], options=served_options(options, profile), router=router, seed=seed,
            limits=Limits(ttft_s=ttft_s, tpot_s=tpot_s, request_s=request_s), changes=workers,
            share=percentile / 100 if find_rate else None, usd_per_gpu_hour=usd_per_gpu_hour,
            settings={"mtp_acceptance": mtp_acceptance, "chunk_tokens": prefill_chunk, "max_sequences": max_sequences,
                      "waits": waits or Waits(), "graph_sizes": graph_sizes},
        ),
    )  # fmt: skip
    return replay_all(tasks, jobs=jobs, executor=executor, done=done, keep=keep)
