"""Few users of long prompts, against a loop that is played step by step."""

from __future__ import annotations

import numpy as np
import pytest
from test_serving import PER_SEQUENCE_S, PLAIN_S, model_of, solved

CHUNK_S, CHUNKS = 0.4, 4
"""Seconds that a chunk of a long prompt adds to its step, and chunks of one."""


def simulated_long_prompts(users: int, output_len: int, rounds: int = 300) -> float:
    """Requests per second of a closed loop whose long prompts are read a chunk at a time, beside all replies."""
    random = np.random.default_rng(0)
    left, line, clock, done = [0] * users, list(range(users)), 0.0, 0
    chunk = CHUNKS
    while done < rounds:
        clock += PLAIN_S + PER_SEQUENCE_S * sum(n > 0 for n in left) + (CHUNK_S if line else 0.0)
        ends = [user for user in range(users) if left[user] == 1]
        left = [max(n - 1, 0) for n in left]
        done += len(ends)
        if line and (chunk := chunk - 1) == 0:
            left[line.pop(0)], chunk = int(random.integers(output_len // 2, output_len * 3 // 2 + 1)), CHUNKS
        line += ends
    return done / clock


@pytest.mark.parametrize("output_len", [50, 200, 1000])
@pytest.mark.parametrize("users", [1, 2, 3, 5, 8, 20])
def test_few_users_of_long_prompts_agree_with_a_simulated_loop(users: int, output_len: int) -> None:
    """Two users' prompts, which take longer than their replies, never come twice as fast as they are read."""
    one = model_of(users, output_len, spread=0.5, alone=False)
    one.prompts.per_step, one.prompts.prompt_s = 1 / CHUNKS, 0.0
    one.prompts.fixed_s = CHUNK_S + PLAIN_S + PER_SEQUENCE_S * users
    one.prompts.most_per_s = 1 / (CHUNKS * one.prompts.fixed_s)
    found = solved(one, users).output_tokens_per_s / (output_len + 1)
    assert found == pytest.approx(simulated_long_prompts(users, output_len), rel=0.08)
    assert found <= 1.01 * one.prompts.most_per_s
