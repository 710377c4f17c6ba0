"""Many replays: layouts, rates and seeds, in one process, in several, or on a Dask cluster."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorcast.deploy.options import Options
from tensorcast.errors import InputError
from tensorcast.parallel import as_done
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.model import ModelProfile
from tensorcast.scheduling.capacity import at_the_limit
from tensorcast.scheduling.outcome import Limits
from tensorcast.scheduling.pools import parse_changes, parse_servers
from tensorcast.scheduling.replay import PricedServers, Settings, priced_servers
from tensorcast.scheduling.requests import Requests

if TYPE_CHECKING:
    import pandas as pd

KEPT = 4
"""Layouts whose prices a process keeps for its next replays of them."""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """Requests with what tells them from the others of a sweep: their rate and seed, by column."""

    requests: Requests
    said: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ReplayTask:
    """One replay of a sweep. ``sweep``: a name of its own for each sweep, under which prices are kept; ``longest``:
    tokens of the longest request of all."""

    model: ModelProfile
    device: DeviceProfile
    engine: EngineProfile
    layout: str
    sent: Sent
    options: Options
    settings: Settings
    limits: Limits
    router: str
    seed: int
    changes: str
    share: float | None
    usd_per_gpu_hour: float = 0.0
    longest: int = 0
    sweep: str = ""

    def priced(self) -> PricedServers:
        """The servers' rules and step times, kept from one replay to the next."""
        key = (self.sweep, self.layout, self.longest)
        if key not in _priced:
            while len(_priced) >= KEPT:
                del _priced[next(iter(_priced))]
            _priced[key] = priced_servers(
                self.model, self.device, self.engine, parse_servers(self.layout), longest=self.longest,
                options=self.options, **self.settings,
            )
        return _priced[key]


_priced: dict[tuple[str, str, int], PricedServers] = {}


def every_replay(layouts: Sequence[str], sent: Sequence[Sent], seed: int, alike: ReplayTask) -> list[ReplayTask]:
    """Each of ``layouts`` under each of ``sent``, all else as in ``alike``. What cannot be read is said at once."""
    for layout in layouts:
        servers = parse_servers(layout)
        parse_changes(alike.changes, len(servers))
    longest = max(int((one.requests.input_len + one.requests.output_len).max()) for one in sent)
    shared = replace(alike, longest=longest, sweep=uuid.uuid4().hex)
    return [
        replace(shared, layout=layout, sent=one, seed=int(one.said.get("seed", seed)))
        for layout in layouts for one in sent
    ]  # fmt: skip


def replayed_row(task: ReplayTask) -> dict[str, Any]:
    """A sweep's row: layout, rate and seed, the numbers of :meth:`Outcome.summary`, or the problem."""
    row = {"layout": task.layout, **task.sent.said, "problem": ""}
    if task.model.stated_facts.num_experts:
        row["routing"] = task.options.routing
    try:
        priced = task.priced()
        row["layout"] = priced.layout
        changes = parse_changes(task.changes, len(priced.pools))
        requests = task.sent.requests
        if task.share is not None:
            requests = at_the_limit(
                priced, requests, task.limits, share=task.share, router=task.router, seed=task.seed, changes=changes
            )
            row["rate"] = requests.rate
        found = priced.run(requests, limits=task.limits, router=task.router, seed=task.seed, changes=changes)
    except InputError as error:
        return {**row, "problem": str(error)}
    return {**row, "gpus": found.gpus, **replace(found, usd_per_gpu_hour=task.usd_per_gpu_hour).summary()}


def replay_all(
    tasks: Sequence[ReplayTask], *, jobs: int = 1, executor: str | None = None,
    done: Callable[[int], None] | None = None, keep: bool = False,
) -> pd.DataFrame:
    """A row per task, in order, replayed in ``jobs`` processes or on a cluster; a worker that dies costs time alone.

    ``done`` is told how many are there, as they come. With ``keep`` Ctrl-C ends the sweep with the rows that are there:
    ``attrs["stopped"]`` of the frame then is true.
    """
    import pandas as pd

    rows: dict[int, dict[str, Any]] = {}
    stopped = False
    try:
        for place, row in as_done(replayed_row, tasks, jobs, executor):
            rows[place] = row
            if done is not None:
                done(len(rows))
    except KeyboardInterrupt:
        if not keep:
            raise
        stopped = True
    frame = pd.DataFrame([rows[place] for place in sorted(rows)])
    frame.attrs["stopped"] = stopped
    if len(rows) and all(row["problem"] for row in rows.values()):
        raise InputError(next(iter(rows.values()))["problem"])
    return frame


def sent_at(requests: Requests, rates: Sequence[float]) -> list[Sent]:
    """``requests``, stretched to each of ``rates`` per second; as they are without."""
    if not rates:
        return [Sent(requests=requests)]
    own = requests.rate
    if not np.isfinite(own) and not all(map(np.isinf, rates)):
        raise InputError("--rate: the requests of this trace all come at once, and cannot be stretched to a rate")
    found = []
    for rate in rates:
        if not rate > 0:
            raise InputError(f"--rate {rate:g}: must be more than 0 requests per second")
        together = replace(requests, arrival_s=np.zeros(len(requests)))
        sent = together if np.isinf(rate) else requests.scaled(rate=rate / own)
        found.append(Sent(requests=sent, said={"rate": rate}))
    return found
