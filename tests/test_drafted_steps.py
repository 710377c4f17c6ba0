"""What a step that drafts does beside its kernels over tokens: recurrent states and the host's work, by hand from
released source."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tensorcast.cost import work
from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.layout import parse_layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.step.step import Step
from tensorcast.profiles.store import load_device, load_engine, load_model

STATE = 64 * 128 * 128  # numbers of a layer's states: Qwen3.5-397B-A17B, 64 value heads of 128 x 128
LAYERS = 45  # of 60, three in four


def step(engine: str, depth: int, model: str = "qwen3.5-397b-a17b", layout: str = "tp4", **options: Any) -> Step:
    parts = load_model(model), load_device("b200"), load_engine(engine), parse_layout(layout)
    return deploy(*parts, "decode", options=Options(mtp_depth=depth, **options)).step


def row_bytes(of: Step, name: str, batch: float) -> float:
    price = of.price(batch, 1.0, 1000.0)
    return sum(
        float(np.max(row.bytes)) * float(np.max(n)) for row, n in price.calls
        if name in (getattr(row.row, "name", ""), row.row.module)
    )


@pytest.mark.parametrize("new", [1, 2, 4])
def test_a_verified_token_leaves_a_state(new: int) -> None:
    """One state is read, and one written after every token, as the kernels' loops have it."""
    found = work.linear_attention(8, new, 16, key_heads=4, k_dim=128, v_dim=128, state_bytes=2, decode=True)
    tokens = 2 * 8 * new * (2 * 4 * 128 + 2 * 16 * 128)
    assert found.bytes == tokens + (1 + new) * 2 * 8 * 16 * 128 * 128
    prompt = work.linear_attention(8, new, 16, key_heads=4, k_dim=128, v_dim=128, state_bytes=2)
    assert prompt.bytes == tokens + 2 * 2 * 8 * 16 * 128 * 128  # no token of a prompt is refused


@pytest.mark.parametrize("engine", ["vllm", "sglang", "sglang==0.5.9", "trtllm"])
@pytest.mark.parametrize("model", ["qwen3.5-397b-a17b", "nemotron-3-nano-30b-a3b"])
def test_steps_of_hybrids_write_a_state_per_token(engine: str, model: str) -> None:
    """With drafts that a look-up makes, as deep a step differs in nothing but tokens: 3 states more for 3 tokens."""
    name = "linear_attention" if model.startswith("qwen") else "ssm_scan"
    one, four = (
        row_bytes(step(engine, depth, model, "tp2", speculative_method="ngram", state_dtype="float32"), name, 8.0)
        for depth in (0, 3)
    )
    ops = [op for op in step(engine, 0, model, "tp2", state_dtype="float32").table.ops if op.name == name]
    kinds = step(engine, 0, model, "tp2").table.layer_kinds
    states = sum(
        4 * 8 * kinds.count(op.kind) * np.prod([dim.coef for dim in op.outputs[1].dims[1:]]) for op in ops
    )
    assert one > 2 * states  # read and written
    assert four == pytest.approx(4 * (one - 2 * states) + 5 * states)


@pytest.mark.parametrize(
    ("engine", "moved"),
    [("sglang", 2), ("sglang==0.5.14", 2), ("sglang==0.5.12", 2), ("sglang==0.5.10.post1", 2), ("sglang==0.5.9", 8.3),
     ("sglang==0.5.6.post2", 8.3), ("vllm", 0), ("vllm==0.24.0", 0)],
)  # fmt: skip
def test_accepted_states_are_copied_once_a_step(engine: str, moved: float) -> None:
    """SGLang keeps a step's states apart and copies one of each sequence back; vLLM points to it instead."""
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        by_hand = moved * size * 16 * LAYERS * STATE / 4  # 16 sequences, four ranks
        for depth in (1, 3):
            assert row_bytes(step(engine, depth, state_dtype=dtype), "accepted_states", 16.0) == pytest.approx(by_hand)
    assert row_bytes(step(engine, 0), "accepted_states", 16.0) == 0
    assert row_bytes(step(engine, 3, speculative_method="eagle3"), "accepted_states", 16.0) > 0 or not moved


def test_models_without_states_copy_none() -> None:
    assert row_bytes(step("sglang==0.5.9", 1, "deepseek-v3", "tp8"), "accepted_states", 16.0) == 0


@pytest.mark.parametrize("method", ["mtp", "eagle3", "ngram", "dflash"])
def test_copies_are_in_the_steps_time(method: str) -> None:
    """The step without them is as much shorter as they take."""
    whole = step("sglang==0.5.9", 3, speculative_method=method)
    engine = whole.pricer.engine.model_copy(update={"state_copies": None})
    parts = load_model("qwen3.5-397b-a17b"), load_device("b200"), engine, parse_layout("tp4")
    without = deploy(*parts, "decode", options=Options(mtp_depth=3, speculative_method=method)).step
    batch = np.array([1.0, 16.0, 256.0])
    price = whole.price(batch, 1.0, 1000.0)
    copies = sum(row.seconds * n for row, n in price.calls if row.row.module == "accepted_states")
    assert np.asarray(price.seconds - without.seconds(batch, 1.0, 1000.0)) == pytest.approx(copies)
    assert np.all(copies > 0)


# srt/environ.py: SGLANG_ENABLE_SPEC_V2 = EnvBool(False)
SERIAL = ["0.5.6.post2", "0.5.8", "0.5.9", "0.5.10.post1"]
AHEAD = ["0.5.12", "0.5.14", "0.5.23"]  # EnvBool(True), later no such variable


@pytest.mark.parametrize(("release", "waits"), [(one, True) for one in SERIAL] + [(one, False) for one in AHEAD])
@pytest.mark.parametrize("batch", [1.0, 64.0])
def test_the_gpu_waits_for_the_host_where_drafts_do_not_overlap(release: str, waits: bool, batch: float) -> None:
    """By the rule of _handle_speculative_decoding (server_args.py), with SGLANG_ENABLE_SPEC_V2 unset."""
    whole = step(f"sglang=={release}", 3, "deepseek-v3", "tp8")
    parts = load_model("deepseek-v3"), load_device("b200"), parse_layout("tp8")
    asked = whole.pricer.engine.drafting("mtp", overlaps=True)
    ahead = deploy(parts[0], parts[1], asked, parts[2], "decode", options=Options(mtp_depth=3)).step
    one, other = (of.price(batch, 1.0, 1000.0) for of in (whole, ahead))
    longer = float(np.asarray(one.seconds - other.seconds).item())
    assert longer == pytest.approx(1.3e-3 + 130e-6 * batch if waits else 0.0)
    assert float(np.asarray(one.request_overhead_s - other.request_overhead_s).item()) == pytest.approx(
        130e-6 * batch if waits else 0.0
    )
    none = [step(f"sglang=={release}", 0, "deepseek-v3", "tp8").price(batch, 1.0, 1000.0).overhead_s, other.overhead_s]
    assert float(np.asarray(none[0]).item()) < float(np.asarray(none[1]).item())  # a drafting layer's own passes


@pytest.mark.parametrize(
    ("release", "method", "waits"),
    [("0.5.12", "ngram", True), ("0.5.12", "dflash", True), ("0.5.12", "eagle3", False), ("0.5.14", "ngram", False),
     ("0.5.9", "eagle3", True), ("0.5.9", "ngram", True)],
)  # fmt: skip
def test_what_drafts_decides(release: str, method: str, waits: bool) -> None:
    """0.5.12 switches its scheduler off for DFLASH and NGRAM alone (server_args.py), 0.5.14 for neither."""
    engine = load_engine(f"sglang=={release}")
    rule = engine.serial_drafts
    assert (rule is not None and method in rule.methods) == waits
    assert engine.drafting(method).arrival_wait_steps == (1.0 if waits else engine.arrival_wait_steps)
    assert engine.drafting(method, overlaps=True).arrival_wait_steps == engine.arrival_wait_steps == 2.0


def test_models_with_several_drafting_layers_always_overlap() -> None:
    """0.5.9 sets SGLANG_ENABLE_SPEC_V2 for MiMoV2FlashForCausalLM and Step3p5ForCausalLM by itself."""
    engine = load_engine("sglang==0.5.9")
    for name in ("MiMoV2FlashForCausalLM", "Step3p5ForCausalLM"):
        assert engine.drafts_of({"architectures": [name]}).serial_drafts is None
    assert engine.drafts_of({"architectures": ["DeepseekV3ForCausalLM"]}) is engine


@pytest.mark.parametrize(
    ("release", "plain", "drafting"),
    [("0.5.9", 0, 0), ("0.5.10.post1", 8192, 0), ("0.5.12", 8192, 8192), ("0.5.14", 8192, 8192)],
)
def test_prompts_are_captured_beside_drafts_from_0_5_12_on(release: str, plain: int, drafting: int) -> None:
    """server_args.py, _handle_piecewise_cuda_graph: 0.5.10.post1 lists speculative decoding among what forbids it."""
    engine, device = load_engine(f"sglang=={release}"), load_device("h200")
    config = load_model("qwen3-235b-a22b").config
    assert engine.prefill_graph_tokens(device, 1, 1, config) == plain
    assert engine.drafting("mtp").prefill_graph_tokens(device, 1, 1, config) == drafting
    latent = load_model("deepseek-v3").config
    assert engine.prefill_graph_tokens(device, 1, 1, latent) == min(plain, 2048)
