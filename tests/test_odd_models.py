"""Local models that do not go all the way: each says so in a line, and what can be compared is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from families import SMALL

import tensorcast as tc
from tensorcast.deploy.plan.remarks import uncut
from tensorcast.profiles.store import list_models, load_model
from tensorcast.trace.cache import traced

LOAD: dict[str, Any] = {"device": "h100", "world_size": 2, "input_len": 256, "output_len": 32, "ttft_s": 2, "tpot_s": 1}
NEOX = {
    "model_type": "gpt_neox", "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "intermediate_size": 2048, "vocab_size": 1024, "max_position_embeddings": 2048,
}  # fmt: skip
OPT = {
    "model_type": "opt", "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "ffn_dim": 2048,
    "vocab_size": 1024, "max_position_embeddings": 2048, "word_embed_proj_dim": 512,
}  # fmt: skip
MAMBA = {
    "model_type": "mamba2", "hidden_size": 512, "num_hidden_layers": 2, "num_heads": 16, "head_dim": 64, "n_groups": 2,
    "state_size": 64, "vocab_size": 1024, "time_step_limit": [0.0, {"__float__": "Infinity"}],
}  # fmt: skip


def folder(tmp_path: Path, config: dict[str, Any]) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_a_rank_that_cannot_be_traced_is_pruned_and_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor parallelism here, all the rest is compared."""

    def refused(*_: Any) -> None:
        raise tc.InputError("no")

    monkeypatch.setattr("tensorcast.trace.tracer._trace_shard", refused)
    config = {key: value for key, value in SMALL["olmoe"].items() if key != "head_dim"} | {"vocab_size": 776}
    found = tc.compare(folder(tmp_path, config), **LOAD)
    assert set(found.candidates["tp"]) == {1} and {1, 2} <= set(found.candidates["dp"])
    assert found.pruned["layouts"]["widths of a rank"] == 2  # tp2, with its experts cut or dealt out


def test_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    """As ``save_pretrained`` of transformers 5 writes them."""
    assert load_model(folder(tmp_path, MAMBA)).config["time_step_limit"] == [0.0, math.inf]


def test_a_model_without_attention_has_no_heads_to_divide(tmp_path: Path) -> None:
    model = folder(tmp_path, MAMBA)
    assert tc.simulate(model, device="h100", context=64).step_s > 0
    assert tc.compare(model, **LOAD).best is not None


def test_a_class_with_attention_of_its_own_is_priced(tmp_path: Path) -> None:
    config = {**NEOX, "model_type": "falcon", "num_kv_heads": 8, "new_decoder_architecture": True}
    found = tc.simulate(folder(tmp_path, config), device="h100", context=64)
    assert found.step_s > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1: must be at least 1"),
        ({"vocab_size": 0}, "vocab_size = 0: must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0: must be at least 1"),
        ({"num_experts_per_tok": 800}, "num_experts_per_tok = 800: must be at most the"),
        ({"hidden_size": "wide"}, "hidden_size = 'wide': must be a whole number"),
        ({"quantization_config": "fp8"}, "quantization_config 'fp8': must be an object"),
        ({"quantization_config": {"quant_method": "odd"}}, "quant_method='odd' .* is not known .*; set quant to one"),
    ],
)
def test_configs_that_make_no_sense_are_one_line(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(tc.InputError, match=message) as caught:
        tc.simulate(folder(tmp_path, {**SMALL["qwen3_moe"], **fields}), device="h100", context=64)
    assert "\n" not in str(caught.value)


def test_an_unknown_quantisation_can_be_set_by_hand(tmp_path: Path) -> None:
    config = SMALL["qwen3_moe"]
    odd = folder(tmp_path, {**config, "quantization_config": {"quant_method": "odd"}})
    by_hand = tc.simulate(odd, device="h100", context=64, quant="fp8")
    (tmp_path / "plain").mkdir()
    plain = tc.simulate(folder(tmp_path / "plain", config), device="h100", context=64, quant="fp8")
    assert by_hand.step_s == plain.step_s and by_hand.memory.weights == plain.memory.weights


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("count\n", "counts must be"),
        ("count\na\nb\n", "counts must be numbers"),
        ("expert,count\n0,1\n0,x\n", "counts must be numbers"),
        ("expert,count\n0,1\n", r"^routing \S+: 1 counts a layer, but the model has"),
        (None, "no such file; give an SGLang dump"),
    ],
)
def test_expert_counts_that_are_none(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "counts.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(tc.InputError, match=message):
        tc.simulate("qwen3-30b-a3b", device="h100", routing=str(path))


@pytest.mark.parametrize(
    ("config", "largest"),
    [(NEOX, "attention.query_key_value, attention.dense"), (OPT, "self_attn.k_proj, self_attn.v_proj")],
)
def test_matrices_that_are_not_cut_are_spoken_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], largest: str
) -> None:
    """Both derive their attention's widths from the hidden size. By hand: 4 H^2 of 4 H^2 + 8 H^2 stay whole, were it
    not for their being cut another way."""
    assert not [note for note in tc.simulate(folder(tmp_path, config), device="h100", world_size=2, context=64).notes
                if "tensor-parallel" in note]  # fmt: skip
    monkeypatch.setattr("tensorcast.trace.tracer.mixers_whole", lambda *_: False)
    model = folder(tmp_path, {**config, "vocab_size": 776})
    run = tc.simulate(model, device="h100", world_size=2, context=64)
    said = [note for note in run.notes if "whole on every tensor-parallel GPU" in note]
    assert said and said[0].startswith(f"33 % of the linear weights ({largest}, ...)")
    assert not [note for note in tc.simulate(model, device="h100", context=64).notes if "tensor-parallel" in note]
    assert [note for note in tc.compare(model, **LOAD).notes if note == said[0]]


@pytest.mark.parametrize("name", [name for name in list_models() if name in ("deepseek-v3", "qwen3-30b-a3b", "glm-5")])
def test_shipped_models_are_cut(name: str) -> None:
    assert not uncut(traced(load_model(name), "decode", 2))
