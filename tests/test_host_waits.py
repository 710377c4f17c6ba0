"""Steps that are launched kernel by kernel wait for the host; models with states whose schedule plans no step ahead."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import tensorcast as tc
from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options
from tensorcast.predict.predict import predict
from tensorcast.profiles.store import load_device, load_engine, load_model

TP8 = Layout(8, 8)


def _deploy(model: str, device: str, engine: str, phase: str = "prefill", layout: Layout = TP8) -> Deployment:
    return deploy(load_model(model), load_device(device), load_engine(engine), layout, phase, options=Options())


@pytest.mark.parametrize("device", ["h100", "h200"])
def test_a_prompt_of_one_token_takes_what_was_measured(device: str) -> None:
    """DeepSeek-V3 under SGLang of October 2025, without graphs of prompts: 82.6 ms (sglang#12160)."""
    ranks = 8 if device == "h200" else 16
    found = tc.simulate(
        "deepseek-v3", device=device, world_size=ranks, tp=ranks, engine="sglang==0.5.6.post2", phase="prefill",
        batch=1, input_len=1,
    )
    assert found.price.seconds == pytest.approx(82.6e-3, rel=0.05)
    assert found.price.host_s > 0.5 * found.price.seconds
    assert any("wait for the host" in note for note in found.notes)


def test_prompts_take_as_long_until_the_device_is_the_slower() -> None:
    """As DeepSeek-R1's first tokens under SGLang on 16 H100 do (tenstorrent/tt-inference-server#356)."""
    step = _deploy("deepseek-r1", "h100", "sglang==0.5.6.post2", layout=Layout(16, 16)).step
    few, more, many = (step.price(1.0, new, 0.0) for new in (128.0, 1024.0, 32_768.0))
    assert few.seconds == pytest.approx(more.seconds) and many.seconds > 2 * more.seconds
    assert few.host_s > more.host_s > many.host_s == 0.0


@pytest.mark.parametrize("model", ["deepseek-v3", "qwen3-235b-a22b", "qwen3.5-397b-a17b", "kimi-k3"])
def test_a_step_is_no_shorter_than_its_launches(model: str) -> None:
    step = _deploy(model, "b200", "sglang==0.5.9", layout=Layout(8, 8, 1, 8)).step
    launch_s, recipe = float(step.pricer.engine.host_launch_s or 0.0), step.recipe(False)
    layers = step.table.layer_kinds
    launches = sum(count * (layers.count(place) if place >= 0 else 1) for place, count in recipe.launches.items())
    few, many = (step.price(1.0, new, 0.0) for new in (1.0, 100_000.0))
    assert few.seconds == pytest.approx(launches * launch_s + few.overhead_s - few.host_s, rel=1e-6)
    assert many.host_s == 0.0
    both = step.price(np.ones(2), np.array([1.0, 100_000.0]), np.zeros(2))
    assert np.asarray(both.seconds) == pytest.approx([few.seconds, many.seconds], rel=1e-9)


def test_what_is_replayed_from_a_graph_waits_for_nobody() -> None:
    decode = _deploy("deepseek-v3", "h200", "sglang", "decode").step
    assert decode.price(8.0, 1.0, 1000.0).host_s == 0.0
    # graphs of prompts are the default since, up to so many tokens
    before, since = (_deploy("qwen3-235b-a22b-fp8", "h200", f"sglang=={release}", layout=Layout(8, 8, 1, 8)).step
                     for release in ("0.5.9", "0.5.14"))
    assert since.price(1.0, 512.0, 0.0).host_s == 0.0 < before.price(1.0, 512.0, 0.0).host_s


@pytest.mark.parametrize(
    ("release", "dtype", "kernels"),
    [("0.5.6.post2", "bf16", "triton"), ("0.5.8", "bf16", "flashinfer_trtllm_moe"),
     ("0.5.6.post2", "fp8_block", "flashinfer_trtllm_moe")],
)
def test_experts_of_qwen3_on_blackwell_by_release(release: str, dtype: str, kernels: str) -> None:
    """srt/server_args.py of 0.5.6.post2 asks for fp8, that of 0.5.8 for fp8 or none."""
    experts = load_engine(f"sglang=={release}").experts
    assert experts is not None
    assert experts.library("blackwell", dtype, {"architectures": ["Qwen3MoeForCausalLM"]}, False) == kernels


@pytest.mark.parametrize(
    ("engine", "model", "serial"),
    [("sglang==0.5.9", "qwen3-next-80b-a3b", True), ("sglang==0.5.12", "nemotron-3-nano-30b-a3b", True),
     ("sglang==0.5.14", "qwen3-next-80b-a3b", False), ("sglang==0.5.9", "qwen3-30b-a3b", False),
     ("vllm", "qwen3-next-80b-a3b", False)],
)
def test_networks_with_states_are_scheduled_a_step_at_a_time(engine: str, model: str, serial: bool) -> None:
    """While SGLang keeps beginnings of prompts, to 0.5.12 (mamba no_buffer switches the overlap scheduler off)."""
    layout, profile = Layout(4, 4), load_engine(engine)
    made = [
        deploy(load_model(model), load_device("h100"), one, layout, "decode", options=Options())
        for one in (profile, profile.without_prefix_cache())
    ]
    kept, bare = (one.step.price(8.0, 1.0, 500.0).seconds for one in made)
    assert kept - bare == pytest.approx(0.68e-3 if serial else 0.0, abs=1e-9)


def test_first_tokens_of_one_user_are_those_of_a_warm_server() -> None:
    """What was fitted to public records holds first requests that wait for kernels to be compiled; others' do not."""
    profile = load_engine("sglang==0.5.9")
    assert profile.first_token_s(1000) == pytest.approx(33e-3)
    assert profile.fitted is not None and profile.fitted.first_token_s is not None
    recorded = profile.in_records().first_token_s(np.array([0.0, 1000.0]))
    each = profile.fitted.prompt_token_s
    assert recorded == pytest.approx(profile.fitted.first_token_s + each * np.array([0.0, 1000.0]))
    vllm = load_engine("vllm")
    assert vllm.in_records() is vllm


def test_a_record_of_a_run_and_the_same_run_in_other_columns() -> None:
    sizes = {"model": "qwen3-235b-a22b-fp8", "isl": "1000", "osl": "1000", "concurrency": "1", "engine": "sglang"}
    plain = {**sizes, "device": "h200", "release": "0.5.9", "tp": "8", "ep": "8", "prefix_cache": "off"}
    record = {
        "model_path": sizes["model"], "system": "h200_sxm", "backend": "sglang", "backend_version": "0.5.9",
        "isl": "1000", "osl": "1000", "concurrency": "1", "tp_size": "8", "attention_dp_size": "1", "moe_tp_size": "1",
        "moe_ep_size": "8", "precision": "fp8", "mode": "agg", "length_ratio": "1.0",
    }
    engine = load_engine("sglang==0.5.9")
    own, others = (float(predict(pd.DataFrame([row]))["ttft_s"].iloc[0]) for row in (plain, record))
    assert others - own == pytest.approx(engine.in_records().first_token_s(1000) - engine.first_token_s(1000), abs=5e-3)
