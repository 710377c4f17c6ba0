"""A search of a few variants alone: what a page shows while a slider moves, before all of them are searched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from tensorcast.parallel import uncollected
from tensorcast.search.axes import EXCHANGES
from tensorcast.search.candidate_table import NONE, Candidates, candidates_of
from tensorcast.search.search import SearchResult, worth_showing
from tensorcast.search.search_task import SearchTask
from tensorcast.search.space import Variant, space
from tensorcast.search.variant_prices import VariantPrices
from tensorcast.search.workspace import CURRENT, Parts

MOST_PRICED = 8
"""Sets of priced variants that are kept."""

MOST_FIRST = 12
"""Variants that stand for all where none is known."""

FEW = 4
"""Variants that are no answer by themselves."""

_priced: dict[Hashable, tuple[SearchTask, VariantPrices]] = {}


@uncollected()
def search_again(task: SearchTask, known: Sequence[Variant] = ()) -> SearchResult:
    """Candidates of the ``known`` variants that go into the task's GPUs, and of :func:`first_variants` where few do."""
    workspace = CURRENT.get()
    workspace.trim()
    tried = tuple(v for v in known if task.gpus % v.layout.world_size == 0)
    if len(tried) < FEW:
        tried = tuple(dict.fromkeys((*tried, *first_variants(task))))
    if not tried:
        return SearchResult(NONE, [], Counter(), 0)
    shared = id(task.model), id(task.device), id(task.engine), task.base
    key = *shared, task.load, task.axes.chunk_tokens, tried
    if key not in _priced:
        while len(_priced) >= MOST_PRICED:
            del _priced[next(iter(_priced))]
        _, parts = workspace.parts.setdefault(shared, (task, Parts()))
        _priced[key] = task, VariantPrices(task.scenario, list(tried), task.axes.chunk_tokens, parts)
    prices = _priced[key][1]
    points, examined = worth_showing(task, prices, Counter())
    tables, behind = [], []
    for mode, kept_points in points.items():
        tables.append(candidates_of(task, prices, mode, kept_points))
        prefill = kept_points.columns.get("prefill", kept_points.variant).astype(int)
        behind += [(tried[p], tried[d]) for p, d in zip(prefill, kept_points.variant, strict=True)]
    return SearchResult(Candidates.joined(tables) if tables else NONE, behind, Counter(), examined)


def first_variants(task: SearchTask) -> list[Variant]:
    """At most :data:`MOST_FIRST` variants that differ much: of each layout the plainest with each exchange, layouts
    without pipeline stages and with whole experts first, the largest servers first."""
    plainest: dict[Hashable, Variant] = {}
    for variant in space(task, Counter()):
        plainest.setdefault((variant.layout, variant.decode.all2all), variant)
    exchanges = [kinds["decode"] for kinds in EXCHANGES.values()]

    def order(variant: Variant) -> tuple[int, int, int, int]:
        layout = variant.layout
        whole_experts = layout.ep not in (1, layout.stage_ranks)
        return layout.pp, int(whole_experts), -layout.world_size, exchanges.index(variant.decode.all2all)

    return sorted(plainest.values(), key=order)[:MOST_FIRST]
