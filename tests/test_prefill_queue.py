"""The queue before a prefill worker, against a simulation of it prompt by prompt."""

from __future__ import annotations

import numpy as np
import pytest

from tensorcast.serving.prefill_costs import PrefillCosts


def line(per_step: float, fixed_s: float, prompt_s: float) -> PrefillCosts:
    """A worker whose steps take ``fixed_s`` and ``prompt_s`` per prompt; ``per_step`` ride together at most."""
    names = ("token_s", "expert_s", "late_s", "step_s", "error")
    given = {"per_step": np.array(per_step), "fixed_s": np.array(fixed_s), "prompt_s": np.array(prompt_s)}
    one_stage = dict.fromkeys(("stages", "passes"), np.array(1.0))
    return PrefillCosts(**given, **one_stage, **dict.fromkeys(names, np.array(0.0)), evidence={})


def simulated(per_step: float, fixed_s: float, prompt_s: float, rate: float, prompts: int = 200_000) -> float:
    """Mean seconds from arrival to the end of the step that a prompt rides in; arrivals are random."""
    drawn = np.cumsum(np.random.default_rng(1).exponential(1 / rate, prompts))
    arrivals = [*drawn.tolist(), np.inf]
    most, left_at, at, clock = int(max(per_step, 1)), 0.0, 0, 0.0
    while at < prompts:
        clock = max(clock, arrivals[at])
        riding = 1
        while riding < most and arrivals[at + riding] <= clock:
            riding += 1
        clock += (fixed_s + prompt_s * riding) / min(per_step, 1.0)
        left_at += riding * clock
        at += riding
    return (left_at - float(drawn.sum())) / prompts


@pytest.mark.parametrize("busy", [0.05, 0.3, 0.6, 0.8, 0.9])
@pytest.mark.parametrize(
    ("per_step", "fixed_s", "prompt_s"), [(1.0, 0.2, 0.0), (0.25, 0.2, 0.0), (4.0, 0.05, 0.05), (8.0, 0.01, 0.1)]
)
def test_prompts_wait_as_long_as_when_simulated(per_step: float, fixed_s: float, prompt_s: float, busy: float) -> None:
    worker = line(per_step, fixed_s, prompt_s)
    rate = busy * float(worker.most_per_s)
    service, queue = worker.at_rate(rate)
    # with one prompt per step the formula is exact; with more, prompts that came together also leave together
    assert float(service * (1 + queue)) == pytest.approx(
        simulated(per_step, fixed_s, prompt_s, rate), rel=0.03 if per_step <= 1 else 0.2
    )


def test_a_queue_that_grows_for_ever_is_infinite_and_no_sooner() -> None:
    """Prompts that share steps keep a worker busy all the time long before it is full."""
    worker = line(8.0, 0.1, 0.01)
    service, queue = worker.at_rate(np.array([0.2, 0.99, 1.0, 1.5]) * float(worker.most_per_s))
    assert np.isfinite(queue).tolist() == [True, True, False, False]
    assert queue[0] <= 0.6 and (np.diff(service) >= 0).all()
