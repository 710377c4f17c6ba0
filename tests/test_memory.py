"""Memory against published figures and hand counts."""

from __future__ import annotations

import numpy as np
import pytest

from tensorcast.cost.activations import activation_bytes
from tensorcast.cost.memory import (
    cache_bytes,
    kv_bytes_per_token,
    low_latency_buffer_bytes,
    weight_bytes,
)
from tensorcast.cost.work import Size
from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.layout import Layout
from tensorcast.modeling.checkpoint.read import from_config
from tensorcast.modeling.quantization import Quantization, as_run
from tensorcast.profiles.facts import ModelFacts
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.trace.cache import traced
from tensorcast.trace.dims import Dim, Sizes
from tensorcast.trace.precision import by_precision
from tensorcast.trace.table import Op, OpTable, Tensor

# Bytes per token over all layers. DeepSeek-V3: arXiv 2505.09343, table 1 (70.272 KB). The others by the formula
# 2 * layers * kv_heads * head_dim * 2 bytes from the models' own configs.
BF16 = {
    "deepseek-v3": 70_272,
    "kimi-k2": 61 * (512 + 64) * 2,
    "qwen3-235b-a22b": 2 * 94 * 4 * 128 * 2,
    "qwen3-30b-a3b": 2 * 48 * 4 * 128 * 2,
    "mixtral-8x7b": 2 * 32 * 8 * 128 * 2,
    "gpt-oss-120b": 2 * 36 * 8 * 64 * 2,
    "llama-3.1-70b": 2 * 80 * 8 * 128 * 2,
    "qwen3.5-397b-a17b": 2 * 15 * 2 * 256 * 2,  # 15 of 60 layers are full attention
    "nemotron-3-nano-30b-a3b": 2 * 6 * 2 * 128 * 2,  # 6 of 52 are attention
    "glm-5": 78 * ((512 + 64) * 2 + 128 + 4),  # the indexer's keys in fp8 with one scale
}


@pytest.mark.parametrize("name", list(BF16))
def test_kv_bytes_per_token(name: str) -> None:
    assert kv_bytes_per_token(traced(load_model(name), "decode")) == BF16[name]


def test_fp8_latent_cache_holds_scales_only_where_attention_is_sparse_on_hopper() -> None:
    """Plain: 512 + 64 bytes. FlashMLA's sparse layout: 512 fp8 values, 4 fp32 scales, 64 bf16 rope values; and 132
    bytes of the indexer's keys."""

    def per_token(model: str, architecture: str) -> float:
        table = traced(load_model(model), "decode")
        return kv_bytes_per_token(by_precision(table, as_run(Quantization(), {"bf16"}, architecture)), "fp8")

    assert per_token("deepseek-v3", "Hopper") == per_token("deepseek-v3", "Blackwell") == 61 * 576
    assert per_token("deepseek-v3.2", "Hopper") == 61 * (656 + 132)
    assert per_token("deepseek-v3.2", "Blackwell") == 61 * (576 + 132)


def test_profiles_that_state_a_cache_size_agree_with_the_trace() -> None:
    from tensorcast.profiles.store import list_models

    for name in list_models():
        profile = load_model(name)
        if profile.kv_bytes_per_token is not None:
            assert kv_bytes_per_token(traced(profile, "decode")) == pytest.approx(float(profile.kv_bytes_per_token)), (
                name
            )


def test_windows_cap_the_cache() -> None:
    """gpt-oss-20b: 12 of 24 layers keep 128 tokens only. Llama-4: 3 of 4 layers keep a chunk of 8192."""
    per_layer = 2 * 8 * 64 * 2
    table = traced(load_model("gpt-oss-20b"), "decode")
    assert cache_bytes(table, "bf16", 3, 5000) == 3 * per_layer * (12 * 128 + 12 * 5000)
    scout = traced(load_model("llama-4-scout"), "decode")
    assert cache_bytes(scout, "bf16", 1, 10_000) == 2 * 8 * 128 * 2 * (36 * 8192 + 12 * 10_000)


def test_recurrent_state_does_not_grow_with_length() -> None:
    """Qwen3.5-35B: 30 linear layers with a [32, 128, 128] fp32 state and a 3-token conv state of 8192 channels."""
    table = traced(load_model("qwen3.5-35b-a3b"), "decode")
    short, long = (cache_bytes(table, "bf16", 2, length) for length in (100, 1100))
    assert long - short == 2 * 1000 * 2 * 10 * 2 * 256 * 2
    state = 30 * (32 * 128 * 128 * 4 + 8192 * 3 * 2)
    assert short == 2 * (state + 100 * 2 * 10 * 2 * 256 * 2)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_states_are_cache_and_neither_activations_nor_copied(phase: str) -> None:
    """Qwen3.5-35B: 2 MB of state a sequence and layer. Activations of 8,192 tokens of one token each are 12,288 wide at
    most beside them: below 1 GB, where states of as many sequences take 17 GB."""
    table = traced(load_model("qwen3.5-35b-a3b"), phase)
    assert activation_bytes(table, Sizes(B=8192.0, S=1.0, P=0.0)) < 8192 * 248_320 * 4 + 1e9
    states = {t.storage for op in table.ops if op.name == "linear_attention" for t in (*op.inputs[3:], *op.outputs[1:])}
    users = {op.name for op in table.ops if any(t.storage in states for t in (*op.inputs, *op.outputs))}
    assert users == {"linear_attention"}


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (1, 8), (4, 4), (8, 8)])
def test_weights_per_rank_by_hand(tp: int, ep: int) -> None:
    """Qwen3-30B-A3B in bf16: experts split over ep, attention and vocabulary over tp, norms and router replicated."""
    table = traced(load_model("qwen3-30b-a3b"), "decode", tp)
    layers, hidden, heads, kv, head, experts, width, vocabulary = 48, 2048, 32, 4, 128, 128, 768, 151936
    routed = 3 * experts // ep * width * hidden
    attention = 2 * heads // tp * head * hidden + 2 * max(1, kv // tp) * head * hidden
    small = 2 * hidden + 2 * head + experts * hidden
    by_hand = 2 * (layers * (routed + attention + small) + 2 * -(-vocabulary // tp) * hidden + hidden)
    assert weight_bytes(table, from_config({}), ep) == by_hand


def test_pipeline_stages_add_up_to_the_whole() -> None:
    table, quantization = traced(load_model("deepseek-v3"), "decode"), from_config({})
    whole = weight_bytes(table, quantization)
    parts = [
        weight_bytes(table, quantization, 1, 1, s, first=i == 0, last=i == 1)
        for i, s in enumerate((slice(0, 31), slice(31, 61)))
    ]
    norm = 7168 * 2  # the final norm is counted on both; it is 14 kB of 1.3 TB
    assert sum(parts) == pytest.approx(whole + norm)


def test_deepseek_v3_checkpoint_size() -> None:
    """The FP8 checkpoint without its multi-token-prediction layer holds 671 GB and a little for bf16 embeddings."""
    profile = load_model("deepseek-v3")
    size = weight_bytes(traced(profile, "decode"), from_config(profile.config))
    bf16 = 2 * 129280 * 7168  # embedding and head, one byte more each
    assert size == pytest.approx(671.0e9 + bf16, rel=0.002)


def test_low_latency_buffer_matches_deepep() -> None:
    """DeepEP's size hint at 128 tokens, hidden 7168, 256 experts: 2 * 2 * 256 * 128 messages of 14,352 bytes."""
    assert low_latency_buffer_bytes(128, 7168, 256) == pytest.approx(2 * 2 * 256 * 128 * 14_352, rel=0.01)


def test_peak_of_activations_by_hand() -> None:
    """a -> b -> c: b and its input live together, then b and c; an early result that is read last stays alive."""

    def tensor(name: int, width: int) -> Tensor:
        return Tensor((Dim(1, B=1), Dim(width)), "bfloat16", name)

    a, b, c, d = tensor(0, 10), tensor(1, 100), tensor(2, 20), tensor(3, 5)
    ops = (Op("x", "m", 0, (a,), (b,)), Op("x", "m", 0, (b,), (c,)), Op("x", "m", 0, (c, a), (d,)))
    table = OpTable(
        model="t", phase="decode", tp=1, ops=ops, layer_kinds=(0,), kind_names=("0",), params=(), facts=ModelFacts()
    )
    assert activation_bytes(table, Sizes(B=3.0, S=1.0, P=0.0)) == 2 * 3 * (10 + 100 + 20)


@pytest.mark.parametrize("pp", [1, 2, 4])
def test_what_is_left_for_the_cache_is_told_without_it(pp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one stage; of several the fullest one hangs on it."""
    profiles = load_model("deepseek-v3"), load_device("h200-sxm"), load_engine("vllm")
    found, steps = deploy(*profiles, Layout(16, 4, 4 // pp, 16 // pp, pp), "decode"), list[Size]()
    batches = np.array([1.0, 64.0])
    budget, held = found.memory(batches, 1, 4096).cache_budget, Deployment.held

    def counted(self: Deployment, sequences: Size, length: Size) -> tuple[Size, Size]:
        steps.append(length)
        return held(self, sequences, length)

    monkeypatch.setattr(Deployment, "held", counted)
    assert np.array_equal(found.cache_budget(batches, 1, 4096), budget)
    assert len(steps) == (pp > 1)
