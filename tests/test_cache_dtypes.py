"""The dtype of a cache that nobody asked for: what the engine's release takes for the model and the device."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

import tensorcast as tc
from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.layout import parse_layout
from tensorcast.deploy.options import Options
from tensorcast.launch.launch import launch
from tensorcast.profiles.store import load_device, load_engine, load_model

# By hand from the releases: vLLM's model_executor/models/config.py and layers/attention/mla_attention.py, SGLang's
# server_args.py, from 0.5.23 arg_groups/overrides.py.
UNASKED = [
    ("vllm==0.10.2", "deepseek-v3.2", "h200", "bf16"), ("vllm==0.11.0", "deepseek-v3.2", "h200", "fp8"),
    ("vllm==0.12.0", "deepseek-v3.2", "b200", "bf16"), ("vllm==0.24.0", "deepseek-v3.2", "rtx-pro-6000", "fp8"),
    ("vllm==0.24.0", "glm-5.2", "b200", "bf16"), ("vllm", "glm-5.2", "b200", "fp8"),
    ("vllm", "glm-5.2", "h200", "bf16"), ("vllm", "deepseek-v3.2", "b200", "bf16"),
    ("sglang", "glm-5.2", "b200", "fp8"), ("sglang", "glm-5.2", "h200", "bf16"),
    ("sglang==0.5.9", "glm-5", "gb300", "fp8"), ("sglang==0.5.8", "glm-5", "gb300", "bf16"),
    ("sglang==0.5.8", "deepseek-v3.2", "b300", "fp8"), ("sglang==0.5.6.post2", "deepseek-v3.2", "b200", "fp8"),
    ("sglang", "deepseek-v3", "b200", "bf16"), ("trtllm", "deepseek-v3.2", "b200", "bf16"),
]  # fmt: skip
LAYOUT = parse_layout("tp8-dp2-ep16")


def kept(engine: str, model: str, device: str, asked: str | None = None) -> str:
    return deploy(
        load_model(model), load_device(device), load_engine(engine), LAYOUT, "decode", options=Options(kv_dtype=asked)
    ).quantization.kv


@pytest.mark.parametrize(("engine", "model", "device", "expected"), UNASKED)
def test_steps_are_priced_with_it(engine: str, model: str, device: str, expected: str) -> None:
    assert kept(engine, model, device) == expected
    assert kept(engine, model, device, "bf16") == "bf16" and kept(engine, model, device, "fp8") == "fp8"


@pytest.mark.parametrize(
    ("engine", "device", "asked", "flag"),
    [
        ("vllm", "b200", None, "fp8"), ("vllm", "b200", "bf16", "bfloat16"), ("vllm", "h200", None, "auto"),
        ("vllm", "h200", "bf16", "auto"), ("vllm==0.24.0", "b200", "bf16", "auto"),
        ("sglang", "b200", None, "fp8_e4m3"), ("sglang", "b200", "bf16", "bf16"), ("sglang", "h200", None, "bf16"),
    ],
)
def test_commands_say_it(engine: str, device: str, asked: str | None, flag: str) -> None:
    """vLLM takes bfloat16 only where it would keep FP8 by itself (vllm 0.33.0, config/cache.py)."""
    sizes: dict[str, Any] = {"batch": 8, "input_len": 2048, "output_len": 256, "device": load_device(device)}
    found = launch(engine, load_model("glm-5.2"), parse_layout("tp8"), Options(kv_dtype=asked), **sizes)
    command = shlex.split(found.commands[0].replace("\\\n", ""))
    assert command[command.index("--kv-cache-dtype") + 1] == flag


def test_a_search_takes_it_too() -> None:
    asked: dict[str, Any] = {"world_size": 8, "input_len": 4000, "output_len": 500, "layouts": ["tp8"]}
    for device, expected in (("b200", "fp8"), ("h200", "bf16")):
        found = tc.compare("glm-5.2", device=device, engine="sglang", **asked).candidates
        assert set(found["kv_dtype"]) == {expected}
