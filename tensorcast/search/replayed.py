"""The best layouts of a comparison, each under a real trace: who keeps the limits for how many requests."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensorcast.errors import InputError
from tensorcast.scheduling.capacity import at_the_limit
from tensorcast.scheduling.outcome import Limits, Outcome
from tensorcast.scheduling.replay import PricedServers, deployed_servers
from tensorcast.scheduling.requests import Requests

if TYPE_CHECKING:
    import pandas as pd

    from tensorcast.search.compare import Comparison

GOODPUT = "goodput_requests_per_s_per_gpu"
"""Requests per second and GPU that keep the limits; without limits all do."""


KEPT_UP = 0.05
"""Goodput that layouts may differ by and still have kept up: a trace ends with the last reply, sooner or later."""


@dataclass(frozen=True, kw_only=True)
class ReplayedCandidate:
    """A candidate's row of a comparison and its replay; or the ``problem`` that kept it from being replayed."""

    row: dict[str, Any]
    outcome: Outcome | None = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class ReplayedComparison:
    """Candidates by what they deliver under ``requests``, the best first; those that could not be replayed last.

    ``per``: what goodput is held against, GPUs, or US dollars where the comparison asks for cost.
    """

    requests: Requests
    limits: Limits
    per: str
    candidates: tuple[ReplayedCandidate, ...]

    def frame(self) -> pd.DataFrame:
        """A row per candidate: what was compared, and the numbers of :meth:`Outcome.summary` beside them."""
        import pandas as pd

        kept = ("candidate", "device", "mode", "layout", "prefill_layout", "replicas", "prefill_workers",
                "decode_workers", "gpus", "tokens_per_s_per_gpu")  # fmt: skip
        records = []
        for one in self.candidates:
            said = one.outcome.summary() if one.outcome is not None else {}
            records.append({**{k: one.row[k] for k in kept}, **said, "problem": one.problem})
        return pd.DataFrame(records)


def replay_best(
    found: Comparison, requests: Requests, *, top: int = 8, percentile: float | None = None,
    router: str = "least_work", seed: int = 0,
    told: Callable[[str], None] = lambda candidate: None,
) -> ReplayedComparison:
    """Replay ``requests`` on the ``top`` layouts of a comparison, each as its best candidate, and rank them anew.

    The comparison's limits are those of every single request here. With a ``percentile`` each layout gets the requests
    as fast as leaves so many percent of them within the limits; else all come as they are, and where every layout keeps
    up the one with the shorter times per token comes first. ``told`` is called before each with its name. Raises
    :class:`InputError` where none can be replayed.
    """
    if top < 1:
        raise InputError(f"layouts to replay = {top}: at least 1")
    limits = Limits(ttft_s=found.targets[0], tpot_s=found.targets[1])
    longest = int((requests.input_len + requests.output_len).max())
    replayed = []
    for row in found.families.head(top).to_dict("records"):
        own = {str(key): value for key, value in row.items()}
        told(str(own["candidate"]))
        try:
            servers, sent = _servers(found, own, longest), requests
            if percentile is not None:
                sent = at_the_limit(servers, requests, limits, share=percentile / 100, router=router, seed=seed)
            outcome = servers.run(sent, limits=limits, router=router, seed=seed)
            replayed.append(ReplayedCandidate(row=own, outcome=outcome))
        except InputError as error:
            replayed.append(ReplayedCandidate(row=own, problem=str(error)))
    if all(one.outcome is None for one in replayed):
        raise InputError(f"no layout can be replayed: {replayed[0].problem}")
    per_dollar = found.objective == "cost" and all(one.row["cost_per_million_tokens"] > 0 for one in replayed)
    score = _per_dollar if per_dollar else _per_gpu
    enough = -math.inf if percentile is not None else (1 - KEPT_UP) * max(map(score, replayed))

    def place(one: ReplayedCandidate) -> tuple[bool, float]:
        kept_up = percentile is None and score(one) >= enough
        return not kept_up, _tpot(one) if kept_up else -score(one)

    order = sorted(replayed, key=place)
    return ReplayedComparison(
        requests=requests, limits=limits, per="USD" if per_dollar else "GPU", candidates=tuple(order)
    )


def _servers(found: Comparison, row: dict[str, Any], longest: int) -> PricedServers:
    prefill, decode = found.deployments(row["candidate"])
    counts = [int(row["replicas"])]
    if row["mode"] == "disaggregated":
        counts = [int(row["replicas"] * row[f"{role}_workers"]) for role in ("prefill", "decode")]
    chunk = row["chunk_tokens"]
    return deployed_servers(
        prefill, decode, counts, longest=longest, prefill_chunk=None if math.isnan(chunk) else int(chunk),
        mtp_acceptance=float(found.behind[row["candidate"]][0].load.mtp_acceptance),
    )


def _tpot(one: ReplayedCandidate) -> float:
    return math.inf if one.outcome is None else one.outcome.summary()["tpot_p99_s"]


def _per_gpu(one: ReplayedCandidate) -> float:
    return -math.inf if one.outcome is None else one.outcome.summary()[GOODPUT]


def _per_dollar(one: ReplayedCandidate) -> float:
    """Requests within the limits per US dollar of the servers' time."""
    row = one.row
    per_hour = row["cost_per_million_tokens"] * row["output_tokens_per_s"] * 3600 / 1e6  # of all its GPUs
    return -math.inf if one.outcome is None else one.outcome.summary()["goodput_requests_per_s"] * 3600 / per_hour
