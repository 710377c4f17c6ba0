"""What a process keeps from question to question: a search that was asked before, or one that differs in its limits,
lengths or GPUs alone, makes again only what these change.

Profiles are known by identity (:func:`tensorcast.profiles.kept.same`); whatever is kept has what it belongs to beside
it, so that ids stay its own.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from tensorcast.deploy.deployment import Deployment
from tensorcast.deploy.fleet import Fleet
from tensorcast.deploy.step.asked_rows import Memo

Made = TypeVar("Made")


class Recent(dict[Hashable, Made]):
    """The ``most`` things that were made last, by what they were made of."""

    most = 256

    def __setitem__(self, key: Hashable, made: Made) -> None:
        super().__setitem__(key, made)
        if len(self) > self.most:
            del self[next(iter(self))]


@dataclass
class Parts:
    """What is priced of one model, device and engine, whatever the load.

    ``fleets``: by phase and members' identities, with the members, kept alive by it.
    """

    memo: Memo = field(default_factory=partial(Memo, most=256))
    fleets: Recent[tuple[list[Deployment], Fleet]] = field(default_factory=Recent)


DEPLOYMENTS: Recent[tuple[object, Deployment]] = Recent()
"""By model, device, engine, layout, phase and options."""
DEPLOYMENTS.most = 4096

PARTS: Recent[tuple[object, Parts]] = Recent()
"""By model, device, engine and what options all variants share."""

PRICES: Recent[Any] = Recent()
"""Variants and their prices, by what they hang on of a task."""

RESULTS: Recent[Any] = Recent()
"""What searches found, by all of a task."""
PARTS.most = PRICES.most = RESULTS.most = 8
