"""Figures of a comparison: what making them takes, and how marks and labels are placed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tensorcast as tc
from tensorcast.report.compare import fronts
from tensorcast.report.compare.choices import View
from tensorcast.report.compare.figures import places, spread
from tensorcast.report.compare.files import charts
from tensorcast.search.candidate_table import Candidates


def test_a_figure_is_laid_out_once_and_drawn_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    counts: Counter[str] = Counter()
    compared = tc.compare("qwen3-8b", device="h200", world_size=1, input_len=512, output_len=64)
    for kind, name in ((Figure, "draw"), (ConstrainedLayoutEngine, "execute")):
        plain = getattr(kind, name)

        def counted(self: Any, *args: Any, plain: Any = plain, name: str = name) -> Any:
            counts[name] += 1
            return plain(self, *args)

        monkeypatch.setattr(kind, name, counted)
    drawn = charts(View(compared))
    assert counts == {"draw": len(drawn), "execute": len(drawn)}


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=30))
def test_envelope_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    user, gpu = np.array(points, dtype=float).T
    kept = fronts.envelope(Candidates({"tokens_per_s_per_user": user, "tokens_per_s_per_gpu": gpu}))
    best = {p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)}
    assert set(zip(kept["tokens_per_s_per_user"], kept["tokens_per_s_per_gpu"], strict=True)) == best


@given(st.lists(st.floats(0, 100), min_size=1, max_size=9), st.floats(0.5, 8))
def test_labels_are_moved_apart_in_order(positions: list[float], gap: float) -> None:
    placed = spread(positions, gap)
    ordered = [placed[i] for i in sorted(range(len(positions)), key=lambda i: positions[i])]
    assert all(b - a >= 0.95 * gap for a, b in zip(ordered, ordered[1:], strict=False))


@given(st.floats(1e-3, 1e12), st.floats(2.5, 1e5))
def test_ticks_lie_inside(low: float, ratio: float) -> None:
    ticks, labels = places([low, low * ratio])
    assert ticks and len(ticks) == len(set(labels))
    assert all(low / 1.06 <= tick <= low * ratio * 1.06 for tick in ticks)
