"""Pipelines: stages whose layers are stated, wherever layouts are priced, and hosts that no schedule hides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

import tensorcast as tc
from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.step.pipeline_stages import serial_rounds
from tensorcast.errors import InputError
from tensorcast.predict.predict import predict
from tensorcast.profiles.store import load_device, load_engine, load_model

UNEVEN = "20,6,5,5"
"""Of Qwen3-8B's 36 layers: the first stage holds the others up."""


def compared(*layouts: str, **asked: Any) -> dict[str, Any]:
    """The best of these layouts."""
    best = tc.compare(
        "qwen3-8b", device="h100", world_size=8, input_len=1024, output_len=256, modes=("aggregated",),
        layouts=layouts, **asked,
    ).best  # fmt: skip
    assert best is not None
    return best


def test_stated_stages_are_of_layouts_with_as_many() -> None:
    """A comparison holds the others to what they were."""
    even, uneven = compared("tp2-pp4"), compared("tp2-pp4", pp_partition=UNEVEN)
    assert uneven["tokens_per_s_per_gpu"] < 0.75 * even["tokens_per_s_per_gpu"]
    other = compared("tp4-pp2")
    assert compared("tp4-pp2", "tp2-pp4")["layout"] != other["layout"]
    best = compared("tp4-pp2", "tp2-pp4", pp_partition=UNEVEN)
    assert [best[name] for name in ("layout", "tokens_per_s_per_gpu", "batch")] == [
        other[name] for name in ("layout", "tokens_per_s_per_gpu", "batch")
    ]


@pytest.mark.parametrize(
    ("stages", "said"),
    [("20,6,5", "add up to 36 layers"), ("12,12,12", "no layout has as many"), ("20;16", "whole numbers")],
)
def test_stages_that_no_layout_has_are_one_line(stages: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        compared("tp2-pp4", "tp4-pp2", pp_partition=stages)


def told(rows: list[dict[str, Any]]) -> list[dict[Any, Any]]:
    return predict(pd.DataFrame(rows).astype(object).fillna("")).to_dict("records")


def test_rows_of_a_table_state_their_stages() -> None:
    """One row a layout; the one with other stages is priced as it says, a pool without as many as it was."""
    row = {"model": "qwen3-8b", "device": "h100", "isl": 1024, "osl": 256, "concurrency": 16}
    one = row | {"tp": 2, "pp": 4}
    pools = row | {"mode": "disagg", "prefill_tp": 2, "decode_tp": 2, "decode_pp": 4, "prefill_workers": 1,
                   "decode_workers": 1}  # fmt: skip
    stated = [one | {"pp_partition": UNEVEN}, pools | {"pp_partition": UNEVEN}]
    even, even_pools, uneven, uneven_pools = told([one, pools, *stated])
    assert uneven["tpot_s"] > 1.3 * even["tpot_s"]
    assert uneven_pools["tpot_s"] > 1.3 * even_pools["tpot_s"]
    assert uneven_pools["ttft_s"] == pytest.approx(even_pools["ttft_s"], rel=0.2)  # its prompts' pool has no stages
    (wrong,) = told([one | {"pp_partition": "20,6,5,6"}])
    assert "add up to 36 layers" in wrong["problem"]


def round_s(pp: int, stage_s: float, host_s: float, rounds: int = 40, *, drafts: bool = False) -> float:
    """Seconds in which ``pp`` micro-batches pass all stages in SGLang's loop (0.5.23, event_loop_pp), event by event:
    the first stage launches a micro-batch, then waits for the oldest one's tokens, reads them and plans its next step;
    with ``drafts`` to check it waits first. A stage runs what the one before handed on, in order."""
    free = [0.0] * pp  # when each stage's GPU is idle again
    done = dict[int, float]()  # when the last stage sampled for a launch
    host = 0.0
    for launch in range(rounds * pp):
        at = host
        for stage in range(pp):
            at = free[stage] = max(at, free[stage]) + stage_s
        done[launch] = at
        oldest = launch - pp + 1 + drafts  # what is asked for before the next launch
        if oldest >= 0:
            host = max(host, done[oldest]) + host_s
    return (done[rounds * pp - 1] - done[(rounds - 12) * pp - 1]) / 12  # whole cycles of 1, 3 or 4 launches


@pytest.mark.parametrize("pp", [2, 4])
def test_a_pipeline_waits_for_its_host_once_a_round(pp: int) -> None:
    """Under SGLang, as its loop runs event by event; vLLM keeps a batch more in flight, a single stage overlaps."""
    model, device, engine = load_model("qwen3-8b"), load_device("h100"), load_engine("sglang")
    assert engine.serial_pipeline is not None
    wait = float(engine.serial_pipeline.step_s)
    without = engine.model_copy(update={"serial_pipeline": None})
    layout = Layout(2 * pp, 2, 1, 1, pp)
    ours, hidden = (
        float(deploy(model, device, one, layout, "decode").step.seconds(64, 1, 1000)) for one in (engine, without)
    )
    stage_s = 2e-3
    assert round_s(pp, stage_s, 0.0) == pytest.approx(pp * stage_s)
    assert ours - hidden == pytest.approx(round_s(pp, stage_s, wait) - pp * stage_s)
    drafted = round_s(pp, stage_s, 0.0, drafts=True)
    assert serial_rounds(engine.serial_pipeline, pp, pp, 1)[0] * stage_s == pytest.approx(drafted)
    single = replace(layout, world_size=2, pp=1)
    assert float(deploy(model, device, engine, single, "decode").step.seconds(64, 1, 1000)) == float(
        deploy(model, device, without, single, "decode").step.seconds(64, 1, 1000)
    )
    assert load_engine("vllm").serial_pipeline is None


def test_no_pool_of_replies_drafts_in_a_pipeline_of_sglang() -> None:
    """0.5.23, arg_groups/validation_hook.py (check_pipeline_parallel_compat); vLLM's do."""
    for engine, drafts in (("sglang", False), ("vllm", True)):
        found = tc.compare(
            "deepseek-v3", device="h200", world_size=32, input_len=1024, output_len=256, engine=engine,
            modes=("disaggregated",), layouts=("tp8-pp2",), mtp_depth=(0, 1),
        )  # fmt: skip
        assert bool((found.candidates["mtp_depth"] > 0).any()) == drafts, engine
