"""Steps of many deployments priced one after another, their kernels' fitted models asked once for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from tensorcast.cost.formulas import Context
from tensorcast.cost.kernels.corrections import BatchedCorrections
from tensorcast.deploy.plan.plan import Collective, Row
from tensorcast.deploy.step.price import RowPrice, StepPrice
from tensorcast.deploy.step.row_prices import content_of
from tensorcast.deploy.step.step import Step
from tensorcast.trace.table import Op, OpTable, per_table

Asked = tuple[Step, Any, Any, Any]
"""A step, and the batch, new and cached tokens to price it at: numbers, or arrays that broadcast."""


class _Rehearsed(Step):
    """A step whose rows have already asked for their corrections at the one batch that it is priced at.

    Layers of several kinds have rows in common, which are priced once. Rows of drafted tokens, and experts that tokens
    pass in chunks, ask when they are priced.
    """

    def __init__(self, asked: Asked, later: BatchedCorrections) -> None:
        step, *self._asked = asked
        self.__dict__.update(step.__dict__)
        self._batches = super()._at(*self._asked)
        self._whole = at = self._batches.rows.whole
        self._names: dict[int, Any] = {}  # of the plan's rows, by identity: equal ones are priced once
        self._found: dict[Any, Any] = {}
        self._priced: dict[Any, RowPrice] = {}
        self.corrections: Any = later
        if not self.options.chunk_tokens:
            named = _named(self.table)
            for row in self.plan.rows:
                name = self._names[id(row)] = _name(row, named)
                if name in self._found:
                    continue
                if isinstance(row, Collective):
                    units = at.sizes.tokens if row.per == "token" else at.sizes.B
                    self._found[name] = super()._known_collective(row, units)
                else:
                    self._found[name] = list(super()._works(row, at))
        self.corrections = step.corrections

    def priced(self) -> StepPrice:
        """The price, once the corrections are there."""
        return self.price(*self._asked)

    def _at(self, batch: Any, new: Any, past: Any) -> Any:
        return self._batches

    def _one(self, row: Row, at: Context) -> RowPrice:
        name = self._names.get(id(row)) if at is self._whole else None
        if name is None:
            return super()._one(row, at)
        if name not in self._priced:
            self._priced[name] = super()._one(row, at)
            return self._priced[name]
        return replace(self._priced[name], row=row)

    def _works(self, op: Op, at: Context) -> Iterator[Any]:
        name = self._names.get(id(op))
        yield from super()._works(op, at) if name is None else self._found[name]

    def _known_collective(self, row: Collective, units: Any) -> Any:
        name = self._names.get(id(row))
        return super()._known_collective(row, units) if name is None else self._found[name]


@per_table
def _named(table: OpTable) -> dict[int, tuple[Op, Any]]:
    """Names of the table's ops by identity: the table's plans share most of their rows."""
    return {}


def _name(row: Row, named: dict[int, tuple[Op, Any]]) -> Any:
    """What is equal for rows of one price."""
    if isinstance(row, Collective):
        return row.op, row.group, row.ranks, row.extent, row.scale, row.per, *sorted(row.exchange.items())
    if id(row) not in named:
        named[id(row)] = row, (content_of(row), row.stage)
    return named[id(row)][1]


def prices(asked: Sequence[Asked]) -> Iterator[StepPrice]:
    """The price of each step, in order: as :meth:`Step.price` gives it."""
    laters: dict[int, BatchedCorrections] = {}
    rehearsed = []
    for one in asked:
        corrections = one[0].corrections
        later = laters.setdefault(id(corrections), BatchedCorrections(corrections))
        rehearsed.append(_Rehearsed(one, later))
    for later in laters.values():
        later.find()
    for step in rehearsed:
        yield step.priced()
