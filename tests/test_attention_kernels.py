"""Whose attention kernels run: as releases of engines choose, and as they are asked for."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

import tensorcast as tc
from tensorcast.calibrate.engines.launches import launches
from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.layout import parse_layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.step.price import RowPrice
from tensorcast.errors import InputError
from tensorcast.launch.launch import launch
from tensorcast.predict.launch_records import POOLS
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.trace.table import Op


def attention_row(engine: str, model: str = "qwen3.5-27b", device: str = "b200", **asked: Any) -> RowPrice:
    """Of one layer, a prompt of 8,192 tokens on a rank of two."""
    made = deploy(
        load_model(model), load_device(device), load_engine(engine), parse_layout("tp2"), "prefill",
        options=Options(**asked),
    )  # fmt: skip
    rows = made.step.price(1.0, 8192.0, 0.0).rows
    return next(row for row in rows if isinstance(row.row, Op) and row.row.name == "attention")


def attention_s(*args: Any, **asked: Any) -> float:
    return float(attention_row(*args, **asked).seconds)


@pytest.mark.parametrize(("release", "model", "library"), [
    ("0.5.9", "qwen3.5-27b", "triton"), ("0.5.14", "qwen3-next-80b-a3b", "triton"), ("0.5.23", "qwen3.5-27b", "trtllm"),
    ("0.5.14", "nemotron-3-nano-30b-a3b", "flashinfer"), ("0.5.23", "nemotron-3-nano-30b-a3b", "trtllm"),
    ("0.5.6.post2", "nemotron-3-nano-30b-a3b", "trtllm"), ("0.5.9", "gpt-oss-120b", "trtllm"),
])  # fmt: skip
def test_releases_choose_by_model(release: str, model: str, library: str) -> None:
    """SM100: server_args.py of 0.5.6.post2 to 0.5.14, arg_groups/model_overrides/ of 0.5.23."""
    rules = load_engine(f"sglang=={release}").attention
    assert rules is not None
    config = load_model(model).config
    assert rules.library("Blackwell", config) == library
    assert rules.library("Hopper", config) == "flash_attention"
    assert rules.model_copy(update={"asked": "flashinfer"}).library("Hopper", config) == "flashinfer"


def test_a_prompt_takes_what_its_library_was_timed_at() -> None:
    """aiconfigurator-core 0.12.0, b200_sxm, SGLang 0.5.14: 8,192 tokens, 12 heads of 256 over two of keys, 2.240 ms by
    Triton's kernel, 0.459 by TensorRT-LLM's."""
    triton, usual = attention_s("sglang==0.5.14"), attention_s("sglang==0.5.23")
    assert triton == pytest.approx(2.240e-3, rel=0.05) and usual == pytest.approx(0.459e-3, rel=0.25)
    assert attention_s("sglang==0.5.9", attention_kernels="trtllm") == pytest.approx(usual, rel=1e-9)
    assert attention_s("sglang==0.5.23", attention_kernels="triton") == pytest.approx(triton, rel=1e-9)
    # the sibling's table has what vLLM's lacks
    assert attention_s("vllm", attention_kernels="triton") == pytest.approx(triton, rel=1e-9)


@pytest.mark.parametrize(("device", "least"), [("b200", 0.8), ("b300", 0.8), ("h200", 0.7)])
def test_prompts_over_a_cache_in_fp8_are_multiplied_in_it(device: str, least: float) -> None:
    """SGLang's FlashAttention 3 and TensorRT-LLM's kernels cast queries to it; in bf16 no table has them."""
    usual, cached = (attention_row("sglang", "qwen3-32b", device, kv_dtype=one) for one in ("bf16", "fp8"))
    assert least * float(usual.seconds) < float(cached.seconds) < float(usual.seconds)
    assert int(cached.level) == int(usual.level)


def test_a_library_that_no_table_timed_is_priced_as_the_usual_one_and_says_so() -> None:
    usual, asked = (attention_row("sglang", device="h200", attention_kernels=one) for one in ("engine", "triton"))
    assert float(asked.seconds) == float(usual.seconds)
    assert int(asked.level) < int(usual.level) and float(asked.error) > float(usual.error)


def test_latents_are_told_of_no_library_where_no_table_timed_it() -> None:
    rows = [attention_row("sglang", "deepseek-v2-lite", "h200", attention_kernels=one) for one in ("engine", "triton")]
    assert float(rows[0].seconds) == float(rows[1].seconds) and int(rows[0].level) == int(rows[1].level)


def latents_s(batch: float, past: float, **asked: Any) -> float:
    """Of one layer of GLM-4.7-Flash, whose 20 heads lie on one GPU, in a decode step."""
    made = deploy(
        load_model("glm-4.7-flash"), load_device("b200"), load_engine("sglang==0.5.8"), parse_layout("tp1"), "decode",
        options=Options(**asked),
    )  # fmt: skip
    rows = made.step.price(batch, 1.0, past).rows
    return float(next(row for row in rows if isinstance(row.row, Op) and row.row.name == "attention").seconds)


def test_triton_attends_to_latents_as_to_heads_of_keys() -> None:
    """aiconfigurator-core 0.12.0, b200_sxm, SGLang 0.5.14, Triton's kernel: up to 16 heads of 256 over one of keys in
    bf16 take 45 and 160 us for a sequence of 4,096 and 16,384 tokens, 96 us for 64 of 4,096. Over latents 2 * 512 + 64
    numbers of a token are read instead of 512, for 20 heads by two blocks."""
    long, short = (latents_s(1.0, past, attention_kernels="triton") for past in (16383.0, 4095.0))
    assert long - short == pytest.approx((160e-6 - 45e-6) * 1088 / 512, rel=0.15)
    many = latents_s(64.0, 4095.0, attention_kernels="triton")
    assert many == pytest.approx(2 * 96e-6 * 1088 / 512, rel=0.25)
    assert long - short > 5 * (latents_s(1.0, 16383.0) - latents_s(1.0, 4095.0))  # TensorRT-LLM's for latents
    rows = [attention_row("sglang==0.5.8", "glm-4.7-flash", attention_kernels=one) for one in ("engine", "triton")]
    assert float(rows[1].seconds) > 2 * float(rows[0].seconds) and int(rows[1].level) < 2


def command(engine: str, model: str, asked: str) -> str:
    found = launch(
        engine, load_model(model), parse_layout("tp8"), Options(attention_kernels=asked), device=load_device("b200"),
        batch=8, input_len=2048, output_len=512,
    )  # fmt: skip
    return "\n".join(found.commands)


def test_commands_ask_for_what_was_asked() -> None:
    assert "--attention-backend" not in command("sglang", "qwen3.5-397b-a17b", "engine")
    assert "--attention-backend trtllm_mha" in command("sglang", "qwen3.5-397b-a17b", "trtllm")
    assert "--attention-backend trtllm_mla" in command("sglang", "deepseek-v3", "trtllm")
    assert "--attention-backend TRITON_ATTN" in command("vllm", "qwen3-235b-a22b", "triton")
    assert "--attention-backend FLASHINFER_MLA" in command("vllm", "deepseek-v3", "flashinfer")
    with pytest.raises(InputError, match="vllm --attention-backend: no value for 'trtllm'; it knows triton, flash"):
        command("vllm", "qwen3-235b-a22b", "trtllm")
    with pytest.raises(InputError, match="--attention-kernels triton: trtllm is not asked for kernels of attention"):
        command("trtllm", "qwen3-235b-a22b", "triton")
    with pytest.raises(InputError, match="--attention-kernels 'fa3': must be engine or triton or trtllm"):
        attention_s("sglang", attention_kernels="fa3")


def test_an_explanation_names_the_kernels() -> None:
    def said(**asked: Any) -> str:
        return tc.explain(
            "qwen3.5-35b-a3b", device="b200", engine="sglang==0.5.14", world_size=4, layout="tp4-ep4", versus="tp4",
            phase="decode", batch=8, context=2048, **asked,
        ).notes[-1]

    assert said() == "attention by triton kernels, as sglang 0.5.14 chooses for it here"
    assert said(attention_kernels="flash_attention") == "attention by flash attention kernels, as asked"


def test_scripts_say_whose_attention_runs() -> None:
    """InferenceX: its scripts of Qwen3.5 on Blackwell ask for trtllm_mha, of DeepSeek-R1 for trtllm_mla."""
    base = {"engine": "sglang", "serving_model": "Qwen/Qwen3.5-397B-A17B", "hf_model": "", "device": "b200",
            "precision": "fp8", "mode": "agg", "role": "agg", "isl": 1024, "osl": 1024, "concurrency": 4, "tp": 4,
            "ep": 1, "dp_attn": 0, "max_num_tokens": 8192, "kv_cache_dtype": "", "other_options": "", "spec_depth": 0,
            "sched_recv_interval": None, "all2all_backend": None, "env_switches": None,
            **dict.fromkeys(POOLS)}  # fmt: skip
    asked = {"0.5.9": "trtllm_mha", "0.5.10.post1": "trtllm_mla", "0.5.12": None, "0.5.14": "triton"}
    found = launches(pd.DataFrame([
        {**base, "engine_release": release, "attention_backend": backend} for release, backend in asked.items()
    ]))  # fmt: skip
    assert dict(zip(found["release"], found["attention_kernels"], strict=True)) == {
        "0.5.9": "trtllm", "0.5.10.post1;0.5.12": "", "0.5.14": "triton",
    }  # fmt: skip
