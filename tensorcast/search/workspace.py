"""What a process keeps from question to question: a search that was asked before, or one that differs in its limits,
lengths or GPUs alone, makes again only what these change.

Profiles are known by identity (:func:`tensorcast.profiles.kept.same`); whatever is kept has what it belongs to beside
it, so that ids stay its own.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tensorcast.deploy.deployment import Deployment
from tensorcast.deploy.fleet import Fleet
from tensorcast.deploy.step.asked_rows import Memo


@dataclass
class Parts:
    """What is priced of one model, device and engine, whatever the load.

    ``fleets``: by phase and members.
    """

    memo: Memo = field(default_factory=partial(Memo, most=256))
    fleets: dict[Hashable, Fleet] = field(default_factory=dict)


DEPLOYMENTS: dict[Hashable, tuple[object, Deployment]] = {}
"""By model, device, engine, layout, phase and options."""

PARTS: dict[Hashable, tuple[object, Parts]] = {}
"""By model, device, engine and what options all variants share."""

PRICES: dict[Hashable, Any] = {}
"""Variants and their prices, by what they hang on of a task."""

RESULTS: dict[Hashable, Any] = {}
"""What searches found, by all of a task."""

MOST: tuple[tuple[dict[Hashable, Any], int], ...] = ((DEPLOYMENTS, 4096), (PARTS, 8), (PRICES, 8), (RESULTS, 8))
"""How many of each are kept when a question begins: what was made last."""

MOST_FLEETS = 256
"""Of one model, device and engine."""
