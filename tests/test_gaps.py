"""Gaps between tokens, and what others' prompts take of replies: they make up the time from first to last tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduling import RULES, TIMES, asked

from tensorcast.scheduling.fleet import Fleet, Pool
from tensorcast.scheduling.record import GAPS_S
from tensorcast.scheduling.requests import Requests


@settings(max_examples=60)
@given(
    requests=asked(), alone=st.booleans(), ranks=st.sampled_from([1, 2, 4]), wait=st.booleans(),
    count=st.integers(1, 2), chunk=st.sampled_from([64, 512]),
)  # fmt: skip
def test_gaps_make_up_the_replies(
    *, requests: Requests, alone: bool, ranks: int, wait: bool, count: int, chunk: int
) -> None:
    """Of all replies together, to the width of a class; also of those that stand still while their rank reads, and
    others do not."""
    rules = replace(RULES, alone=alone, ranks=ranks, ranks_wait=alone and wait, chunk_tokens=chunk)
    record = Fleet([Pool(rules, replace(TIMES, alone=alone), count)], requests).run()
    written = float((record.last_s - record.first_s).sum())
    counts = np.array(record.gaps[: len(GAPS_S)])
    assert np.all(counts >= 0) and record.gaps[-1] == 0
    assert counts.sum() == (requests.output_len - 1).sum()
    high, low = float(counts @ GAPS_S), float(counts @ np.append(0.0, GAPS_S[:-1]))
    assert low - 1e-9 <= written <= high + 1e-9
    assert np.all(record.others_s >= -1e-9) and np.all(record.others_s <= record.last_s - record.first_s + 1e-9)


def test_a_rank_that_reads_takes_time_from_its_own_replies_alone() -> None:
    """Two ranks under SGLang: one reads a long prompt, of the other's reply a step is as long as reading takes."""
    requests = Requests(
        arrival_s=np.array([0.0, 0.0, 0.2]), input_len=np.array([10, 10, 5000]), output_len=np.array([100, 100, 2])
    )
    rules = replace(RULES, alone=True, ranks=2, chunk_tokens=1000)
    record = Fleet([Pool(rules, replace(TIMES, alone=True), 1)], requests).run()
    each = TIMES.own([(1000, 2000)], 0, 0.0)
    stands, goes_on = sorted(record.others_s[:2], reverse=True)
    assert stands == pytest.approx(5 * each, rel=0.05)
    assert goes_on == pytest.approx(5 * (each - TIMES.decoding(1, 30, 1)), rel=0.08)
