"""What 'best' means: a score and an order that agree, and that agree with what the words say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tensorcast.serving.objective import OBJECTIVES

BEST = {
    "tokens_per_gpu": lambda row: row["tokens_per_s_per_gpu"],
    "latency": lambda row: -row["request_s"],
    "cost": lambda row: -row["cost_per_million_tokens"],
    "gpus": lambda row: (-row["gpus"], row["tokens_per_s_per_gpu"]),
    "throughput": lambda row: row["output_tokens_per_s"],
    "users": lambda row: row["concurrency"],
}
"""What each objective looks at, told apart from its declaration."""


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    random = np.random.default_rng(3)
    return pd.DataFrame({
        "tokens_per_s_per_gpu": random.uniform(10, 9000, 200),
        "request_s": random.uniform(0.5, 90, 200),
        "cost_per_million_tokens": random.uniform(0.1, 30, 200),
        "gpus": random.integers(1, 6, 200) * 8,
        "output_tokens_per_s": random.uniform(100, 90000, 200),
        "concurrency": random.uniform(1, 4000, 200),
        "meets": random.random(200) < 0.4,
    })


@pytest.mark.parametrize("name", OBJECTIVES)
def test_score_and_order_agree(name: str, frame: pd.DataFrame) -> None:
    """Of what meets the limits the first has the best score, and is what a look at every row says."""
    objective = OBJECTIVES[name]
    assert objective.name == name
    ranked = frame.iloc[objective.order(frame)]
    assert list(ranked["meets"]) == sorted(frame["meets"], reverse=True)
    for meets, rows in ranked.groupby("meets", sort=False):
        scores = objective.score(rows)
        assert (np.diff(scores) <= 0).all(), meets
        assert rows.index[0] == max(rows.to_dict("index").items(), key=lambda item: BEST[name](item[1]))[0]


def test_equal_values_are_told_apart_by_tokens_per_gpu(frame: pd.DataFrame) -> None:
    alike = frame.assign(request_s=4.0, meets=True)
    ranked = alike.iloc[OBJECTIVES["latency"].order(alike)]
    assert ranked["tokens_per_s_per_gpu"].is_monotonic_decreasing
