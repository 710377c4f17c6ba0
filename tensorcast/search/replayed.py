"""The best layouts of a comparison, each under a real trace: who keeps the limits for how many requests."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
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

TOP = 12
"""Layouts that are replayed unasked."""

KEPT_UP = 0.05
"""Goodput that layouts may differ by and still have kept up: a trace ends with the last reply, sooner or later."""


@dataclass(frozen=True, kw_only=True)
class ReplayedCandidate:
    """A candidate's row of a comparison and its replay, with the ``numbers`` of its summary; or the ``problem`` that
    kept it from being replayed."""

    row: dict[str, Any]
    outcome: Outcome | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class ReplayedComparison:
    """Candidates by what they deliver under ``requests``, the best first; those that could not be replayed last.

    ``per``: what goodput is held against, GPUs, or US dollars where the comparison asks for cost. ``fastest``: each had
    the requests as fast as it takes them.
    """

    requests: Requests
    limits: Limits
    per: str
    candidates: tuple[ReplayedCandidate, ...]
    fastest: bool = False

    def frame(self) -> pd.DataFrame:
        """A row per candidate: what was compared, and the numbers of :meth:`Outcome.summary` beside them."""
        import pandas as pd

        kept = ("candidate", "device", "mode", "layout", "prefill_layout", "replicas", "prefill_workers",
                "decode_workers", "gpus", "tokens_per_s_per_gpu")  # fmt: skip
        return pd.DataFrame([
            {**{name: one.row[name] for name in kept}, **one.numbers, "problem": one.problem} for one in self.candidates
        ])


def replay_best(
    found: Comparison, requests: Requests, *, top: int = TOP, percentile: float | None = None,
    router: str = "least_work", seed: int = 0,
) -> ReplayedComparison:
    """Replay ``requests`` on ``top`` layouts of a comparison, each as its best candidate, and rank them anew.

    The comparison's order is that of mean lengths at a steady load; what a trace's longest prompts and its bursts ask
    for may be another way of reading prompts. So half of the layouts are the best ones of as many ways, and the others
    the next ones of the way that did best so far.

    The comparison's limits are those of every single request here. With a ``percentile`` each layout gets the requests
    as fast as leaves so many percent of them within the limits; else all come as they are, and where every layout keeps
    up the one with the shorter times per token comes first. Raises :class:`InputError` where none can be replayed.
    """
    if top < 1:
        raise InputError(f"layouts to replay = {top}: at least 1")
    limits = Limits(ttft_s=found.targets[0], tpot_s=found.targets[1])
    longest = int((requests.input_len + requests.output_len).max())
    rows = [{str(key): value for key, value in row.items()} for row in found.families.to_dict("records")]
    per_dollar = found.objective == "cost" and all(row["cost_per_million_tokens"] > 0 for row in rows)
    score = _per_dollar if per_dollar else _per_gpu

    def run(row: dict[str, Any]) -> ReplayedCandidate:
        try:
            servers, sent = _servers(found, row, longest), requests
            if percentile is not None:
                sent = at_the_limit(
                    servers, requests, limits, share=percentile / 100, router=router, seed=seed, asked="--percentile"
                )
            outcome = servers.run(sent, limits=limits, router=router, seed=seed)
        except InputError as error:
            return ReplayedCandidate(row=row, problem=str(error))
        return ReplayedCandidate(row=row, outcome=outcome, numbers=outcome.summary())

    ways = _ways(rows)
    begun = ways[: (top + 1) // 2]
    replayed = [[run(way[0])] for way in begun]
    for _ in range(min(top, len(rows)) - len(begun)):
        left = [i for i, way in enumerate(begun) if len(replayed[i]) < len(way)]
        if left:
            best = max(left, key=lambda i: max(map(score, replayed[i])))
            replayed[best].append(run(begun[best][len(replayed[best])]))
        else:
            replayed.append([run(ways[len(begun)][0])])
            begun = ways[: len(begun) + 1]
    every = [one for way in replayed for one in way]
    if all(one.outcome is None for one in every):
        raise InputError(f"no layout can be replayed: {every[0].problem}")
    # each at the largest rate of its own is told from the others by that rate alone
    enough = math.inf if percentile is not None else (1 - KEPT_UP) * max(map(score, every))

    def place(one: ReplayedCandidate) -> tuple[bool, float]:
        late = score(one) < enough
        return late, -score(one) if late else one.numbers["tpot_p99_s"]

    return ReplayedComparison(
        requests=requests, limits=limits, per="USD" if per_dollar else "GPU",
        candidates=tuple(sorted(every, key=place)), fastest=percentile is not None,
    )


def _ways(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Layouts by how they read prompts: by which pool, or beside replies over how many GPUs; the best first, of each
    and of all."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        pooled = row["mode"] == "disaggregated"
        found.setdefault((row["device"], row["prefill_layout"] if pooled else row["tp"]), []).append(row)
    return list(found.values())


def _servers(found: Comparison, row: dict[str, Any], longest: int) -> PricedServers:
    prefill, decode = found.deployments(row["candidate"])
    counts = [int(row["replicas"])]
    if row["mode"] == "disaggregated":
        counts = [int(row["replicas"] * row[f"{role}_workers"]) for role in ("prefill", "decode")]
    chunk = row["chunk_tokens"]
    return deployed_servers(
        prefill, decode, counts, longest=longest, chunk_tokens=None if math.isnan(chunk) else int(chunk),
        mtp_acceptance=float(found.behind[row["candidate"]][0].load.mtp_acceptance),
    )


def _per_gpu(one: ReplayedCandidate) -> float:
    return one.numbers.get(GOODPUT, -math.inf)


def _per_dollar(one: ReplayedCandidate) -> float:
    """Requests within the limits per US dollar of the servers' time."""
    return float(one.numbers.get("goodput_requests_per_s", -math.inf) * 3600 / one.row["usd_per_hour"])
