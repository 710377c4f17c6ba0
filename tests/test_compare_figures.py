"""Figures of a comparison: what making them takes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

import tensorcast as tc
from tensorcast.report.compare.choices import View
from tensorcast.report.compare.files import charts


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
