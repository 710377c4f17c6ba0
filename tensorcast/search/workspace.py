"""What a process keeps from question to question: a search that was asked before, or one that differs in its limits,
lengths or GPUs alone, makes again only what these change.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tensorcast.deploy.deployment import Deployment
from tensorcast.deploy.fleet import Fleet
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.step.asked_rows import Memo
from tensorcast.profiles.engine import EngineProfile

Made = TypeVar("Made")

MOST_DEPLOYMENTS, MOST_SIZES = 8192, 256
"""Deployments, and sizes of steps with their rows' prices, that are kept of one model, device and engine."""


@dataclass
class Recent(Generic[Made]):
    """The ``most`` things that were last asked for, each made once."""

    most: int
    _made: dict[Hashable, Made] = field(default_factory=dict)

    def of(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What ``make`` makes, or made when it was last asked for by this ``key``."""
        found = self._made.pop(key) if key in self._made else make()
        self._made[key] = found
        while len(self._made) > self.most:
            del self._made[next(iter(self._made))]
        return found


@dataclass
class Parts:
    """What variants of one model, device and engine are made of, and prices of their rows, whatever the load.

    ``fleets``: by phase and members' identities, with the members, kept alive by it. ``pools``: the same of the engine
    as it runs in pools, if it is another there.
    """

    memo: Memo = field(default_factory=Memo)
    deployments: dict[tuple[Layout, str, Options], Deployment] = field(default_factory=dict)
    fleets: dict[tuple[Hashable, ...], tuple[list[Deployment], Fleet]] = field(default_factory=dict)
    pools: tuple[EngineProfile, Parts] | None = None

    def trim(self) -> None:
        """Forget what is oldest, where a process has asked for more than is kept."""
        if len(self.deployments) > MOST_DEPLOYMENTS:
            self.deployments.clear()
            self.fleets.clear()
        while len(self.memo.plain) > MOST_SIZES:
            del self.memo.plain[next(iter(self.memo.plain))]


PARTS: Recent[tuple[object, Parts]] = Recent(6)
"""By model, device, engine and what options all variants share."""

PRICES: Recent[Any] = Recent(6)
"""Variants and their prices, by what they hang on of a task."""

RESULTS: Recent[Any] = Recent(12)
"""What searches found, by all of a task."""
