"""Public runs of models with linear attention at more users than their states have room for: `make cookbook`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import tensorcast as tc
from tensorcast.predict.predict import predict
from tensorcast.profiles.store import load_engine

RUNS = Path(__file__).resolve().parent.parent / "benchmarks" / "cookbook_runs.csv"


@pytest.mark.parametrize("device", ["h200", "b200", "b300"])
def test_as_many_run_as_have_states(device: str) -> None:
    """Little's law: time per token times tokens/s is how many write their reply. The rest of the places read prompts:
    of replies that begin and end together about a fifth, as public runs have it."""
    runs = pd.read_csv(RUNS, dtype=str, keep_default_na=False)
    found = predict(runs[runs["device"] == device])
    assert (found["problem"] == "").all() and len(found) >= 8
    numbers = {str(name): found[name].astype(float) for name in found if str(name).endswith("_s")}
    writing = numbers["measured_tpot_s"] * numbers["measured_output_tokens_per_s"]
    assert (writing / found["mean_batch"].astype(float)).between(0.57, 0.85).all()
    for name, share in (("tpot_s", 0.06), ("output_tokens_per_s", 0.12)):
        assert (numbers[name] / numbers[f"measured_{name}"] - 1).abs().median() < share


def test_weights_that_are_unpacked_make_prompts_longer() -> None:
    """The cookbook's cells of one user on a B200: a prompt of 8,192 tokens of nvidia/Qwen3.6-27B-NVFP4, whose MLPs run
    in Marlin's kernels, takes 966 ms, in bf16 402."""
    rows = {"device": "b200", "engine": "sglang", "release": "0.5.15", "isl": 8192, "osl": 1024, "concurrency": 1,
            "attention_kernels": "trtllm"}  # fmt: skip
    found = predict(pd.DataFrame([{**rows, "model": name} for name in ("nvidia/Qwen3.6-27B-NVFP4", "qwen3.5-27b")]))
    assert "stored MLPs and head in nvfp4 weights alone" in found["assumed"][0]
    prompts = found["ttft_s"].astype(float) - load_engine("sglang").first_token_s(8192)
    assert prompts[0] == pytest.approx(0.966, rel=0.2) and prompts[1] == pytest.approx(0.402, rel=0.1)


@pytest.mark.parametrize(
    ("model", "engine"),
    [("qwen3-next-80b-a3b", "sglang"), ("qwen3-next-80b-a3b", "vllm"), ("gpt-oss-120b", "sglang"),
     ("deepseek-v4-flash", "vllm")],
)  # fmt: skip
def test_candidates_of_a_search_fit_their_gpus(model: str, engine: str) -> None:
    """Of one pool and of two, whose servers keep fewer copies of states: memory that is told is there."""
    found = tc.compare(
        model, device="h200", engine=engine, world_size=4, input_len=4096, output_len=1024, ttft_s=5.0, tpot_s=0.05
    ).candidates
    assert set(found["mode"]) == {"aggregated", "disaggregated"}
    assert (found["memory_bytes"] <= found["capacity_bytes"]).all()
