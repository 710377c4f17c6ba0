"""Prompts that wait for others: held to TensorRT-LLM's counters, told step by step."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduling import RULES, TIMES, plane

from tensorcast.errors import InputError
from tensorcast.predict.predict import predict
from tensorcast.predict.run_columns import Run, canonical_columns, read_run
from tensorcast.scheduling.fleet import Fleet, Pool
from tensorcast.scheduling.requests import Requests
from tensorcast.scheduling.rules import Waits
from tensorcast.scheduling.step_times import DecodeTimes, PromptTimes

DECODE_S, PROMPTS_S, CHUNK = 0.01, 0.05, 1000
TIMED = replace(
    TIMES, decode=DecodeTimes(own=plane(DECODE_S), shared=plane(0.0), attention=plane(0.0)),
    prompts=PromptTimes(own=plane(PROMPTS_S), shared=plane(0.0), attention=plane(0.0), least=0.0),
)  # fmt: skip


class Told:
    """First and last tokens of requests, by the counters of release 1.1.0 (_torch/pyexecutor/py_executor.py).

    Every decode step takes :data:`DECODE_S`, every one with prompts :data:`PROMPTS_S`.
    """

    def __init__(self, requests: Requests, ranks: int, waits: Waits) -> None:
        self.requests, self.waits = requests, waits
        self.waiting: list[list[int]] = [[] for _ in range(ranks)]
        self.running: list[dict[int, int]] = [{} for _ in range(ranks)]
        self.first, self.last = [0.0] * len(requests), [0.0] * len(requests)
        self.coming, self.now, self.waited, self.gathered = 0, 0.0, 0, 0
        while self.coming < len(requests) or any(self.waiting) or any(self.running):
            self.step()

    def arrive(self, until: float) -> None:
        """Whoever comes by then stands in the queue of the rank with the fewest requests."""
        while self.coming < len(self.requests) and self.requests.arrival_s[self.coming] <= until:
            loads = [len(a) + len(b) for a, b in zip(self.waiting, self.running, strict=True)]
            self.waiting[loads.index(min(loads))].append(self.coming)
            self.coming += 1

    def lets_in(self) -> bool:
        return self.enough() if len(self.waiting) == 1 else self.balanced()

    def enough(self) -> bool:
        waiting, running = self.waiting[0], self.running[0]
        if not waiting or not running:
            return True
        tokens = len(running)
        for one in waiting:
            if tokens + self.requests.input_len[one] > CHUNK:
                break
            tokens += int(self.requests.input_len[one])
        goes = self.gathered >= self.waits.batch_wait_steps or tokens >= self.waits.batch_wait_share * CHUNK
        self.gathered = 0 if goes else self.gathered + 1
        return goes

    def balanced(self) -> bool:
        writing = all(self.running)
        if not all(self.waiting):
            self.waited += 1
            goes = self.waited >= self.waits.balance_steps or not writing
            self.waited = 0 if goes else self.waited
            return goes
        self.waited = 0
        if not writing:
            return True
        goes = self.gathered >= self.waits.batching_steps
        self.gathered = 0 if goes else self.gathered + 1
        return goes

    def read(self, waiting: list[int], running: dict[int, int]) -> list[int]:
        """Prompts that fit whole into the rank's step, in order."""
        found, room = [], CHUNK - len(running)
        while waiting and self.requests.input_len[waiting[0]] <= room:
            room -= int(self.requests.input_len[waiting[0]])
            found.append(waiting.pop(0))
        return found

    def step(self) -> None:
        self.arrive(self.now)
        if not any(self.waiting) and not any(self.running):
            self.now = float(self.requests.arrival_s[self.coming])
            return
        goes = self.lets_in()
        read = [self.read(*one) if goes else [] for one in zip(self.waiting, self.running, strict=True)]
        end = self.now + (PROMPTS_S if any(read) else DECODE_S)
        for running, some in zip(self.running, read, strict=True):  # those that are read are here, not waiting
            running |= {one: int(self.requests.output_len[one]) for one in some}
        self.arrive(end - 1e-9)
        for running, some in zip(self.running, read, strict=True):
            for one in list(running):
                self.first[one] = end if one in some else self.first[one]
                running[one] -= 1
                if not running[one]:
                    self.last[one] = end
                    del running[one]
        self.now = end


@st.composite
def sent(draw: st.DrawFn) -> Requests:
    count = draw(st.integers(1, 30))
    # at times that no step ends at, as none of these is a fraction
    gaps = [0.01 / math.pi * draw(st.integers(0, 200)) for _ in range(count)]
    every = st.lists(st.integers(1, 60), min_size=count, max_size=count)
    prompts = st.lists(st.integers(1, 900), min_size=count, max_size=count)
    return Requests(
        arrival_s=np.cumsum(gaps) + 1e-3 / math.pi * np.arange(1, count + 1), input_len=np.array(draw(prompts)),
        output_len=np.array(draw(every)), users=None,
    )  # fmt: skip


@settings(max_examples=60)
@given(
    requests=sent(), ranks=st.integers(1, 4), most=st.integers(1, 25), gather=st.integers(0, 4),
    share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
)  # fmt: skip
def test_prompts_are_let_in_as_the_counters_say(
    requests: Requests, ranks: int, most: int, gather: int, share: float
) -> None:
    waits = Waits(balance_steps=most, batching_steps=gather, batch_wait_steps=most, batch_wait_share=share)
    rules = replace(
        RULES, ranks=ranks, chunk_tokens=CHUNK, splits=False, reserves_reply=True, lag=0, first_token_s=0.0, waits=waits
    )
    record = Fleet([Pool(rules, TIMED, 1)], requests).run()
    told = Told(requests, ranks, waits)
    assert record.first_s == pytest.approx(told.first, abs=1e-6)
    assert record.last_s == pytest.approx(told.last, abs=1e-6)


ROW = {
    "model_path": "deepseek-ai/DeepSeek-R1", "system": "h200_sxm", "backend": "trtllm",
    "backend_version": "1.1.0rc2.post2", "precision": "fp8", "mode": "agg", "isl": 1024, "osl": 1024,
    "tp_size": 1, "attention_dp_size": 8, "moe_ep_size": 8, "concurrency": 128,
}  # fmt: skip


def read(**changes: object) -> Run:
    row = {**ROW, **changes}
    ours = canonical_columns(row)
    return read_run({ours[name]: value for name, value in row.items() if name in ours}, frozenset(row))


def test_a_record_waits_as_it_was_launched() -> None:
    """InferenceX 11c2dbe12fcb, benchmarks/dsr1_fp8_h200_trt_slurm.sh: enable_balance and timeout_iters."""

    def waits(**changes: object) -> Waits | None:
        arrivals = read(**changes).arrivals
        return None if arrivals is None else arrivals.waits

    assert waits() == Waits(balance_steps=60)
    assert any("balance_steps 60" in said for said in read().assumed)
    assert waits(tp_size=8, attention_dp_size=1) is None  # one rank has none to wait for
    # a cell of the row's own comes first
    assert waits(balance_steps=7, batching_steps=3) == Waits(balance_steps=7, batching_steps=3)
    assert waits(adp_timeout_iters=7) == Waits(balance_steps=7)


def test_prompts_together_leave_replies_alone_and_come_later() -> None:
    told = {**ROW, "isl": 8192, "concurrency": 64}
    found = predict(pd.DataFrame([told | {"balance_steps": steps} for steps in (1, 60)]))
    assert found["problem"].tolist() == ["", ""]
    assert found["tpot_s"][1] < 0.8 * found["tpot_s"][0]
    assert found["ttft_s"][1] > 1.5 * found["ttft_s"][0]


def test_bad_waits_are_named() -> None:
    with pytest.raises(InputError, match="balance_steps -1"):
        Waits(balance_steps=-1)
    with pytest.raises(InputError, match="batch_wait_steps -2"):
        Waits(batch_wait_steps=-2)
    with pytest.raises(InputError, match=r"batch_wait_share 1\.5"):
        Waits(batch_wait_share=1.5)
