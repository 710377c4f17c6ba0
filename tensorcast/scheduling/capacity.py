"""How many requests per second a deployment takes before too many of them break a limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tensorcast.errors import InputError
from tensorcast.scheduling.outcome import Limits, Outcome
from tensorcast.scheduling.pools import Change
from tensorcast.scheduling.replay import PricedServers
from tensorcast.scheduling.requests import Requests

CLOSE = 1.01
"""How near the rate that still keeps the limits and the one that does not must be."""

AHEAD = 1.15
"""How much faster requests may come than they are served for a rate to count as kept up: the last replies take time."""

SLOWEST = 1e-4
"""The least rate that is tried, as a part of what the servers finish when all requests come at once."""


def at_the_limit(
    priced: PricedServers, requests: Requests, limits: Limits, *, share: float, router: str = "least_work",
    seed: int = 0, changes: Sequence[Change] = (), asked: str = "--find-rate",
) -> Requests:
    """``requests``, sent at the largest rate at which ``share`` of them keep ``limits``, to 1 %.

    By bisection: the share is taken to fall with the rate. Raises :class:`InputError` where requests come all at once,
    no limit is given, or the slowest rate breaks it; ``asked``: what it then says that this was asked by.
    """
    if not 0 < share <= 1:
        raise InputError(f"--percentile {100 * share:g}: must be more than 0 and at most 100")
    if all(limit is None for limit in vars(limits).values()):
        raise InputError(f"{asked}: needs a limit: --ttft, --tpot or --e2e")
    if requests.users is not None:
        raise InputError(f"{asked}: --users in a closed loop send as fast as they are served; leave one of both out")
    own = requests.rate
    if not np.isfinite(own):
        raise InputError(f"{asked}: the requests all come at once, and cannot be sent faster or slower")

    def kept(rate: float) -> float:
        return run(requests.scaled(rate=rate / own)).within_limits

    def run(sent: Requests) -> Outcome:
        return priced.run(sent, limits=limits, router=router, seed=seed, changes=changes)

    together = run(replace(requests, arrival_s=np.zeros(len(requests))))
    high = len(requests) / together.seconds if together.served else own
    low = high * SLOWEST
    slow = run(requests.scaled(rate=low / own))
    if slow.within_limits < share:
        too_long = f"; {slow.refused:,} of {len(requests):,} are longer than any server takes" if slow.refused else ""
        raise InputError(
            f"{asked}: even at {low:.3g} requests/s only {100 * slow.within_limits:.1f} % of the requests keep the "
            f"limits, {100 * share:g} % are asked for{too_long}"
        )
    while kept(high) >= share:  # all at once is not the fastest way of serving them
        low, high = high, 2 * high
        if high > 1e6 * own and high > 1e9:
            raise InputError(f"{asked}: no rate breaks the limits")
    while high / low > CLOSE:
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if kept(middle) >= share else (low, middle)
    return requests.scaled(rate=low / own)


def too_few(found: Outcome) -> str:
    """Where requests came faster than they were served, what a found rate is not; empty where it holds for longer."""
    requests, served = found.record.requests, found.served / found.seconds if found.served else 0.0
    if requests.rate <= AHEAD * served:
        return ""
    return (
        f"{len(requests):,} requests at {requests.rate:.3g} per second are served at {served:.3g}: they are too few to "
        "tell a rate that can be kept up; with more of them (-r, --requests) it is lower"
    )
