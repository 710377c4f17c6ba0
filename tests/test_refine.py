"""Candidates stand on prices of their own batch, and no batch that was left out does better: by pricing all of them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from one_deployment import OnePrefill

import tensorcast as tc
from tensorcast.deploy.deployment import Deployment
from tensorcast.deploy.step.sizes import COARSE, GRID
from tensorcast.search.candidate_arrays import number_within
from tensorcast.search.candidates import PREFILL_BUSY
from tensorcast.search.compare import Comparison
from tensorcast.search.search_task import SearchTask
from tensorcast.search.space import Variant, space
from tensorcast.serving.capacity import sequences_that_fit
from tensorcast.serving.curves import decode_columns, unevenly
from tensorcast.serving.full_cache import FullCache, starts_over
from tensorcast.serving.hand_over import hand_over_s
from tensorcast.serving.prefill_costs import PrefillCosts, cut_prompts
from tensorcast.serving.steady_state import Aggregated, Disaggregated
from tensorcast.serving.traffic import Traffic


class Exact:
    """Decode steps of one deployment, each priced at the very batch asked for."""

    def __init__(self, decode: Deployment, context: float, least: float) -> None:
        self.decode, self.context, self.least = decode, context, least

    def at(self, column: str, batch: Any) -> Any:
        batch = unevenly(np.asarray(batch, dtype=float), self.decode.layout.pp, self.least)
        values = decode_columns(self.decode.step.price(batch.ravel(), 1.0, self.context))[column]
        return np.broadcast_to(values, batch.ravel().shape).reshape(batch.shape)


def costs_of(one: OnePrefill) -> PrefillCosts:
    """One deployment's prefill costs, for any number of batches."""
    numbers = {name: np.array(value) for name, value in vars(one).items() if name != "evidence"}
    return PrefillCosts(**numbers, evidence={kind: np.array(share) for kind, share in one.evidence.items()})


def served(
    decode: Deployment, prefill: Deployment, load: Traffic, chunk: int, batch: Any, *,
    workers: tuple[int, int] | None, unasked_chunk: int = 0,
) -> tuple[Any, Any]:
    """(users, what they meet) at exact prices; ``workers`` (prefill, decode): of pools."""
    one = decode.layout
    given: dict[str, Any] = {
        "traffic": load, "engine": decode.engine, "depth": decode.options.mtp_depth,
        "decoding": Exact(decode, float(load.context), 0.0 if load.input_len > (unasked_chunk or chunk) else 5.0),
        "prompts": costs_of(OnePrefill.of(prefill, load, chunk)),
    }  # fmt: skip
    if workers is None:
        full, cut = None, cut_prompts(load, chunk)
        room = sequences_that_fit(prefill, decode, cut, load.input_len, load.output_len)
        if starts_over(decode.engine) and room < decode.most_sequences:
            full = FullCache.of(load, room, load.decode_steps(decode.options.mtp_depth))
        model: Any = Aggregated(**given, decode_ranks=one.dp, full=full)
        users = model.at(batch).concurrency
    else:
        x, y = workers
        hand_over = hand_over_s(prefill, one.world_size, x + y, int(load.input_len))
        model = Disaggregated(
            **given, decode_ranks=y * one.dp, prefill_ranks=x * prefill.layout.dp, hand_over_s=hand_over
        )
        with np.errstate(invalid="ignore", over="ignore"):
            users, _ = model.closed_loop(batch)
    with np.errstate(invalid="ignore", over="ignore"):
        return users, model.metrics(batch, users)


QUESTIONS: list[dict[str, Any]] = [
    {"model": "qwen3-30b-a3b", "device": "h100", "world_size": 8, "input_len": 3000, "output_len": 300, "tpot_s": 0.02},
    {"model": "deepseek-v3", "device": "h200", "world_size": 32, "input_len": 4096, "output_len": 1024, "ttft_s": 2.0,
     "tpot_s": 0.05, "layouts": ["tp1-dp8-ep8", "tp2-dp4-ep8", "tp1-dp8-ep8-pp2", "tp1-dp32-ep32"]},
    {"model": "gpt-oss-120b", "device": "b200", "world_size": 4, "input_len": 9000, "output_len": 200, "ttft_s": 1.5,
     "engine": "trtllm"},
    {"model": "llama-3.1-8b", "device": "h100", "world_size": 4, "input_len": 700, "output_len": 900,
     "engine": "sglang"},
    {"model": "glm-4.5-air", "device": "h200", "world_size": 8, "input_len": 2000, "output_len": 500, "tpot_s": 0.025,
     "objective": "gpus", "request_rate": 8.0, "mtp_depth": [0, 1]},
]  # fmt: skip


@pytest.fixture(scope="module", params=range(len(QUESTIONS)), ids=[asked["model"] for asked in QUESTIONS])
def found(request: pytest.FixtureRequest) -> Comparison:
    asked = dict(QUESTIONS[request.param])
    return tc.compare(asked.pop("model"), **asked)


def test_every_candidate_is_what_a_fresh_pricing_at_its_batch_gives(found: Comparison) -> None:
    """The best, the runner-up, the best of all layouts, and random others."""
    frame = found.candidates
    named = [row["candidate"] for row in (found.best, found.runner_up) if row]
    some = frame["candidate"].sample(min(len(frame), 12), random_state=0)
    for name in dict.fromkeys([*named, *found.families["candidate"].head(5), *some]):
        row = frame[frame["candidate"] == name].iloc[0]
        prefill, decode = found.deployments(name)
        pools = row["mode"] == "disaggregated"
        workers = (int(row["prefill_workers"]), int(row["decode_workers"])) if pools else None
        chunk = found.tasks[0].scenario.own_chunk if pools else int(row["chunk_tokens"])
        load = found.behind[name][0].load
        users, alone = served(
            decode, prefill, load, chunk, np.array(float(row["batch"])), workers=workers,
            unasked_chunk=found.tasks[0].scenario.own_chunk,
        )  # fmt: skip
        assert row["concurrency"] == pytest.approx(float(users) * row["replicas"], rel=1e-9)
        for column in ("ttft_s", "tpot_s", "request_s", "decode_step_s", "exposed_comm_s", "hidden_comm_s"):
            assert row[column] == pytest.approx(float(getattr(alone, column)), rel=1e-9), (name, column)
        assert row["output_tokens_per_s"] == pytest.approx(alone.output_tokens_per_s * row["replicas"], rel=1e-9)
        assert row["batch"] == int(row["batch"]) <= row["largest_batch"]
        if row["meets"]:
            for limit, value in zip(found.targets, (alone.ttft_s, alone.tpot_s), strict=True):
                assert limit is None or value <= limit * (1 + 1e-9)


LAYOUTS = ("tp1-dp4-ep4", "tp4-dp1", "tp2-dp1", "tp2-dp2-ep4")


@pytest.mark.parametrize(
    ("asked", "layouts"),
    [({"engine": engine, "ttft_s": ttft_s, "tpot_s": tpot_s}, LAYOUTS) for engine, ttft_s, tpot_s in (
        ("vllm", None, 0.010), ("sglang", None, 0.0137), ("vllm", 0.4, None), ("sglang", 0.7, 0.03),
        ("vllm", 0.12, 0.009), ("sglang", 20.0, None),
    )] + [  # steps jump before the largest batch in time: between priced ones, below one, beyond 512
        ({"device": "h200", "engine": "sglang", "tpot_s": 0.02, "input_len": 4000, "output_len": 1000}, LAYOUTS[1:3]),
        ({"model": "gpt-oss-120b", "device": "b200", "engine": "trtllm", "ttft_s": 0.3, "tpot_s": 0.015,
          "input_len": 200, "output_len": 1000}, LAYOUTS[2:3]),
        ({"engine": "vllm", "ttft_s": 1.0, "tpot_s": 0.05, "input_len": 200, "output_len": 1000}, LAYOUTS[1::2]),
    ],
    ids=str,
)  # fmt: skip
def test_no_batch_that_is_not_shown_does_better(asked: dict[str, Any], layouts: tuple[str, ...]) -> None:
    """Layouts on 4 GPUs, one server for both phases or pools: every whole batch that fits, priced one by one."""
    narrow: dict[str, Any] = {"all2all": ["allgather_reducescatter"], "dispatch": ["bf16"], "chunk_tokens": [2048]}
    usual: dict[str, Any] = {"model": "qwen3-30b-a3b", "device": "h100", "input_len": 1500, "output_len": 250}
    found = tc.compare(**usual | asked | narrow, world_size=4, layouts=list(layouts))
    assert found.best is not None
    task = found.tasks[0]
    tried = space(task, Counter())
    assert {str(v.layout) for v in tried} == set(layouts)
    best = max(one for decode in tried for one in (_alone(task, decode), *_pooled(task, tried, decode)))
    assert best * (1 - 1e-9) <= max(found.candidates.loc[found.candidates["meets"], "tokens_per_s_per_gpu"])


def _most(task: SearchTask, users: Any, at: Any, size: int, more: Any = True) -> float:
    """Tokens/s per GPU of the best batch that keeps within the limits."""
    limits = [(task.ttft_s, at.ttft_s), (task.tpot_s, at.tpot_s)]
    holds = np.isfinite(users) & more & np.all([value <= (limit or np.inf) for limit, value in limits], axis=0)
    return float(np.where(holds, at.output_tokens_per_s / size, 0.0).max())


def _alone(task: SearchTask, variant: Variant) -> float:
    load, scenario = task.load, task.scenario
    prefill = scenario.deployment(variant.layout, "prefill", variant.prefill)
    decode = scenario.deployment(variant.layout, "decode", variant.decode)
    cut = cut_prompts(load, 2048)
    fits = sequences_that_fit(prefill, decode, cut, load.input_len, load.output_len)
    batch = np.arange(1.0, min(float(fits), 8192) + 1)
    return _most(task, *served(decode, prefill, load, 2048, batch, workers=None), variant.layout.world_size)


def _pooled(task: SearchTask, tried: list[Variant], variant: Variant) -> Iterator[float]:
    load, scenario = task.load, replace(task.scenario, engine=task.engine.in_pools())
    decode = scenario.deployment(variant.layout, "decode", variant.decode)
    fits = sequences_that_fit(decode, decode, None, load.input_len, load.output_len)
    batch = np.arange(1.0, min(float(fits), 8192) + 1)
    for other in tried:
        prefill = scenario.deployment(other.layout, "prefill", other.prefill)
        line = OnePrefill.of(prefill, load, scenario.own_chunk)
        for x, y in itertools.product((1, 2, 3), repeat=2):
            size = x * other.layout.world_size + y * variant.layout.world_size
            if size <= task.gpus:
                users, at = served(decode, prefill, load, scenario.own_chunk, batch, workers=(x, y))
                prompts = batch * decode.layout.dp * y / (load.output_len - 1) / at.decode_step_s
                keeps_up = prompts <= PREFILL_BUSY * x * prefill.layout.dp * float(line.most_per_s)
                yield _most(task, users, at, size, keeps_up)


@given(arrays(float, (3, 9), elements=st.integers(0, 9).map(float)), st.lists(
    st.tuples(st.integers(0, 2), st.integers(-1, 10).map(float)), min_size=1, max_size=8))  # fmt: skip
def test_how_many_of_a_row_are_within_its_limit(values: np.ndarray, asked: list[tuple[int, float]]) -> None:
    ascending, (rows, limits) = np.sort(values, axis=1), zip(*asked, strict=True)
    expected = [sum(value <= limit for value in ascending[row]) for row, limit in asked]
    assert number_within(ascending, np.array(rows), np.array(limits)).tolist() == expected


def test_the_grid_of_a_search_is_part_of_the_grid_of_all_curves() -> None:
    assert np.isin(COARSE, GRID).all() and (np.diff(GRID) > 0).all()
    assert np.isin(2.0 ** np.arange(-6, 24), COARSE).all()
    assert np.isin(np.arange(1, 33), GRID).all() and (GRID[GRID >= 1] % 1 == 0).all()
    within = (GRID >= 64) & (GRID <= 512)
    assert (np.diff(GRID[within]) / GRID[within][:-1]).max() <= 1 / 16
