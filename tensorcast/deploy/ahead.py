"""Steps of many deployments priced one after another, their kernels' fitted models asked once for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tensorcast.cost.formulas import Context
from tensorcast.cost.predict.later import Later
from tensorcast.deploy.plan import Collective
from tensorcast.deploy.step import Step, StepPrice
from tensorcast.trace.table import Op

Asked = tuple[Step, Any, Any, Any]
"""A step, and the batch, new and cached tokens to price it at: numbers, or arrays that broadcast."""


class _Rehearsed(Step):
    """A step whose rows have already asked for their corrections at the one batch that it is priced at.

    Rows of drafted tokens, and experts that tokens pass in chunks, ask when they are priced.
    """

    def __init__(self, asked: Asked, later: Later) -> None:
        step, *self._asked = asked
        self.__dict__.update(step.__dict__)
        self._found: dict[int, Any] = {}  # by identity of the plan's rows
        self._sizes = super()._at(*self._asked)
        at = self._sizes[1].whole
        self.corrections: Any = later
        if not self.options.chunk_tokens:
            for row in self.plan.rows:
                if isinstance(row, Collective):
                    units = at.sizes.tokens if row.per == "token" else at.sizes.B
                    self._found[id(row)] = super()._known_collective(row, units)
                else:
                    self._found[id(row)] = list(super()._works(row, at))
        self.corrections = step.corrections

    def priced(self) -> StepPrice:
        """The price, once the corrections are there."""
        return self.price(*self._asked)

    def _at(self, batch: Any, new: Any, past: Any) -> Any:
        return self._sizes

    def _works(self, op: Op, at: Context) -> Iterator[Any]:
        yield from self._found[id(op)] if id(op) in self._found else super()._works(op, at)

    def _known_collective(self, row: Collective, units: Any) -> Any:
        return self._found[id(row)] if id(row) in self._found else super()._known_collective(row, units)


def prices(asked: Sequence[Asked]) -> Iterator[StepPrice]:
    """The price of each step, in order: as :meth:`Step.price` gives it."""
    laters: dict[int, Later] = {}
    rehearsed = []
    for one in asked:
        corrections = one[0].corrections
        later = laters.setdefault(id(corrections), Later(corrections))
        rehearsed.append(_Rehearsed(one, later))
    for later in laters.values():
        later.find()
    for step in rehearsed:
        yield step.priced()
