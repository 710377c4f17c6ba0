"""What a process keeps from question to question: a search that was asked before, or one that differs in its limits,
lengths or GPUs alone, makes again only what these change.

Profiles are known by identity (:func:`tensorcast.profiles.kept.same`); whatever is kept has what it belongs to beside
it, so that ids stay its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tensorcast.deploy.deployment import Deployment
from tensorcast.deploy.fleet import Fleet
from tensorcast.deploy.step.asked_rows import Memo
from tensorcast.errors import InputError


@dataclass
class Parts:
    """What is priced of one model, device and engine, whatever the load.

    ``fleets``: by phase and members; ``spaces``: variants to try, and how many layouts fell away by which rule, by what
    is searched; ``structures``: variants by what they share, and what tables say of each, by identity of their list.
    """

    memo: Memo = field(default_factory=partial(Memo, most=40))
    fleets: dict[Hashable, Fleet] = field(default_factory=dict)
    spaces: dict[Hashable, tuple[list[Any], Counter[str]]] = field(default_factory=dict)
    structures: dict[int, tuple[object, Any]] = field(default_factory=dict)


@dataclass(eq=False)
class Workspace:
    """What questions share: variants and their prices, and what was found.

    A process has one of its own, which all questions use. Those that are asked ``with`` another one use that, so that a
    sweep keeps as many ``questions`` as it goes through, and its memory is free when it is dropped. An answer is the
    same whatever is kept. Worker processes (``jobs``) keep for themselves.

    >>> import tensorcast as tc
    >>> asked = {"device": "h200", "world_size": 32, "input_len": 4096, "output_len": 1024}
    >>> with tc.Workspace(questions=50):  # priced once; then only the limits are new
    ...     best = [tc.compare("deepseek-v3", **asked, tpot_s=0.01 * i).best for i in range(2, 11)]  # doctest: +SKIP
    """

    questions: int = 8
    deployments: dict[Hashable, tuple[object, Deployment]] = field(default_factory=dict, repr=False)
    """By model, device, engine, layout, phase and options."""
    parts: dict[Hashable, tuple[object, Parts]] = field(default_factory=dict, repr=False)
    """By model, device, engine and what options all variants share."""
    prices: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    """Variants and their prices, by what they hang on of a task."""
    results: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    """What searches found, by all of a task."""
    contenders: dict[Hashable, tuple[object, Any]] = field(default_factory=dict, repr=False)
    """What the kernels of the best layouts take, by deployment, batch, new and cached tokens."""
    _before: list[Workspace] = field(default_factory=list, repr=False)

    def trim(self) -> None:
        """Keep what was made last."""
        questions = (self.prices, self.questions), (self.results, self.questions)
        for kept, number in ((self.deployments, 4096), (self.contenders, 512), (self.parts, 8), *questions):
            while len(kept) > number:
                del kept[next(iter(kept))]
        for _, parts in [*self.parts.values()][:-MOST_ROUTED]:
            parts.memo.routed.clear()

    def clear(self) -> None:
        """Forget everything."""
        for kept in (self.deployments, self.contenders, self.parts, self.prices, self.results):
            kept.clear()

    def __enter__(self) -> Workspace:
        if self.questions < 1:
            raise InputError(f"questions = {self.questions}: a workspace keeps at least 1")
        self._before.append(CURRENT.get())
        CURRENT.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        CURRENT.set(self._before.pop())


OWN = Workspace()
"""The process's."""

CURRENT: ContextVar[Workspace] = ContextVar("workspace", default=OWN)
"""What questions use now."""

MOST_FLEETS, MOST_SPACES = 256, 16
"""Of one model, device and engine."""

MOST_ROUTED = 2
"""Models, devices and engines whose rows that depend on the expert load are kept: these take most memory."""
