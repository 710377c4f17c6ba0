"""What the busiest expert-parallel rank has to do, in one layer or in each of several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from tensorcast.cost.work import Array, Size


class LayerPoints(NamedTuple):
    """Loads of groups of layers, the last axis: rows and hit experts of the busiest rank, and how many times the mean
    it receives: ``copies`` of tokens one by one, or one per token (``ranks``), the busiest node likewise (``nodes``).
    ``weights``: the part of all layers in each group; of several cases in pipeline stages, that of each case's."""

    rows: Array
    hit: Array
    copies: Array
    ranks: Array
    nodes: Array
    weights: Array

    def each(self, change: Callable[[Array], Array]) -> LayerPoints:
        """The same with every load changed."""
        rows, hit, copies, ranks, nodes = map(change, self[:5])
        return LayerPoints(rows, hit, copies, ranks, nodes, self.weights)


@dataclass(frozen=True)
class RankLoad:
    """Work of the busiest expert-parallel rank in one MoE layer: (token, choice) rows and experts with at least one.

    ``points``: where layers differ, their loads; the numbers are then means over layers.
    """

    rows: Size
    hit: Size
    mean_rows: Size
    points: LayerPoints | None = None
