"""Few users of long prompts, and requests that are looked for rarely, against loops that are played step by step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_serving import FIXED_S, PER_SEQUENCE_S, PLAIN_S, PROMPT_S, model_of, solved

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


def simulated_looks(users: int, output_len: int, interval: int, rounds: int = 40) -> tuple[float, float]:
    """Mean seconds to the first token and per token of a closed loop whose prompts run alone and whose scheduler looks
    for requests once in ``interval`` decode steps, and after prompts, as SGLang's does (scheduler_recv_skipper.py: a
    decode step counts 1, another 1000)."""
    random = np.random.default_rng(3)
    count = interval
    left, begun, came = [int(n) for n in random.integers(1, output_len, users)], [0.0] * users, dict[int, float]()
    clock, firsts, tokens = 0.0, list[float](), list[float]()
    line = list[int]()
    while len(tokens) < rounds * users:
        if count >= interval:
            line, count = [*line, *(user for user in came if user not in line)], 0
        if line:
            some, line = line[:8], line[8:]
            clock += FIXED_S + PROMPT_S * len(some)
            for user in some:
                firsts.append(clock - came.pop(user))
                left[user], begun[user] = int(random.integers(output_len * 9 // 10, output_len * 11 // 10 + 1)), clock
            count += 1000
            continue
        going = [user for user in range(users) if left[user]]
        clock += PLAIN_S + PER_SEQUENCE_S * len(going)
        count += 1
        for user in going:
            left[user] -= 1
            if not left[user]:
                came[user] = clock
                tokens.append((clock - begun[user]) / output_len)
    half = len(firsts) // 2
    return float(np.mean(firsts[half:])), float(np.mean(tokens[half:]))


@pytest.mark.parametrize("interval", [10, 30])
@pytest.mark.parametrize(("users", "output_len"), [(4, 400), (16, 400), (64, 400), (32, 1500)])
def test_requests_that_are_looked_for_rarely_agree_with_a_simulated_loop(
    users: int, output_len: int, interval: int
) -> None:
    one = model_of(users, output_len, spread=0.1, alone=True)
    one = replace(one, engine=one.engine.model_copy(update={"arrival_wait_steps": 0.0}))
    rare = solved(replace(one, traffic=replace(one.traffic, wait_steps=interval / 2)), users)
    ttft, tpot = simulated_looks(users, output_len, interval)
    assert rare.ttft_s == pytest.approx(ttft, rel=0.3)
    assert rare.tpot_s == pytest.approx(tpot, rel=0.06)
