"""A rank of a class that works one width out from another, against counts by hand and against narrower configs."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tensorcast.cost.memory import kv_bytes_per_token
from tensorcast.errors import InputError
from tensorcast.modeling.build import build
from tensorcast.modeling.config import hf_config, narrow
from tensorcast.modeling.cut import divided, widen
from tensorcast.profiles.model import ModelProfile
from tensorcast.trace.forward import record_step
from tensorcast.trace.table import OpTable
from tensorcast.trace.tracer import trace

TP = 2
SIZES = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 192, "vocab_size": 512, "max_position_embeddings": 256,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_expand": 2, "mamba_n_groups": 1}


def profile(model_type: str, **config: Any) -> ModelProfile:
    config = {"model_type": model_type, **SIZES, **config}
    return ModelProfile(name=model_type, hf_id="x", description="", sources={}, config=config)


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"text_config": {**SIZES, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}},
    "qwen2_vl": {"text_config": {**SIZES, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}},
    "mllama": {"text_config": {**SIZES, "cross_attention_layers": [1], "pad_token_id": 0}},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "stablelm": {},
    "bitnet": {},
    "helium": {"head_dim": 16},
    "opt": {"ffn_dim": 192, "word_embed_proj_dim": 128},
    "gpt_neox": {},
    "gpt2": {"n_inner": 192},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 8,
                         "num_experts_per_tok": 2, "shared_intermediate_size": 96},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2,
              "num_experts": 8, "num_experts_per_tok": 2, "mamba_d_state": 16, "mamba_dt_rank": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, "num_experts": 8,
                 "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "mamba2": {"num_heads": 8, "head_dim": 32, "state_size": 16, "n_groups": 2, "expand": 2},
}  # fmt: skip

WHOLE = ("embed_tokens", "norm", "gate.weight", "router", "positions", "bias", "wpe", "mamba.in_proj",
         "mamba.conv1d", "ln_")  # fmt: skip
"""Weights that a rank may not hold 1 / TP of: embeddings (8 more rows in Llama-3.2-Vision), norms of the stream,
routers, positions, and in projections of a scan whose B and C, of one group, are every rank's."""


@functools.cache
def tables(family: str, phase: Any = "decode") -> tuple[OpTable, OpTable]:
    one = profile(family, **FAMILIES[family])
    whole = trace(one, phase)
    return whole, trace(one, phase, TP, whole)


def multiply_adds(table: OpTable) -> float:
    """Of a token in all matrices but routers and those of experts."""
    ops = [op for op in table.ops if op.name in ("mm", "addmm") and not any(w in op.module for w in ("gate", "router"))]
    ops = [op for op in ops if "mamba.in_proj" not in op.module]
    sizes = [(op.inputs[op.name == "addmm"].dims[-1].coef * op.outputs[0].dims[-1].coef, op) for op in ops]
    return sum(size * table.count(op) for size, op in sizes)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_holds_its_part_of_every_matrix(family: str) -> None:
    _, shard = tables(family)
    for param in shard.params:
        if param.role != "experts" and len(param.shape) > 1 and not any(word in param.name for word in WHOLE):
            assert param.numel * TP == param.full_numel, param.name
        if param.name.endswith(("input_layernorm.weight", "final_layernorm.weight")):
            assert param.numel == param.full_numel == SIZES["hidden_size"], param.name


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_share_the_flops_of_linear_layers(family: str) -> None:
    whole, shard = tables(family)
    assert multiply_adds(shard) * TP == pytest.approx(multiply_adds(whole))


@pytest.mark.parametrize(
    ("family", "sums"),
    [("qwen2_5_vl", 4), ("stablelm", 4), ("gpt_neox", 4), ("opt", 4), ("gpt2", 4), ("helium", 4), ("mamba2", 2)],
)
def test_partial_sums_are_added_up_after_attention_and_after_the_mlp(family: str, sums: int) -> None:
    """Two all-reduces a layer, as Megatron has (1909.08053), one where a layer is one mixer; and the embedding's."""
    _, shard = tables(family)
    rows = [op for op in shard.ops if op.shard == "row" and op.kind >= 0 and op.name in ("mm", "addmm")]
    assert sum(shard.count(op) for op in rows) == sums


def test_norms_over_all_heads_are_reduced_over_ranks() -> None:
    _, shard = tables("olmoe")
    norms = [op for op in shard.ops if op.shard == "row" and op.name == "mean"]
    assert [op.module.rpartition(".")[2] for op in norms] == ["q_norm", "k_norm"]
    held = {param.name.rpartition("self_attn.")[2]: param.numel for param in shard.params if "self_attn" in param.name}
    assert held["q_norm.weight"] == 128 // TP
    assert held["k_norm.weight"] == 64 // TP


@pytest.mark.parametrize("family", ["qwen2_5_vl", "olmoe", "bamba", "lfm2_moe"])
def test_prefill_is_cut_as_well(family: str) -> None:
    whole, shard = tables(family, "prefill")
    assert multiply_adds(shard) * TP == pytest.approx(multiply_adds(whole))


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("llama", {}), ("qwen3", {"head_dim": 16}),
        ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}),
    ],
)  # fmt: skip
def test_both_ways_to_a_rank_agree_where_both_lead_there(model_type: str, more: dict[str, Any]) -> None:
    config = hf_config(profile(model_type, **more))
    model, whole, narrower = (build(one) for one in (divided(config, TP), config, narrow(config, TP)))
    widen(model, whole, lambda one: record_step(one, config, batch=3, new=7, past=0, recurrent_state=False))
    expected = {name: tuple(param.shape) for name, param in narrower.named_parameters()}
    expected |= {name: tuple(p.shape) for name, p in whole.named_parameters() if p.dim() == 3}  # experts stay whole
    assert {name: tuple(param.shape) for name, param in model.named_parameters()} == expected


def test_a_width_that_does_not_divide_is_named() -> None:
    with pytest.raises(InputError, match="tp=5: num_attention_heads=8 does not divide"):
        divided(hf_config(profile("stablelm")), 5)


def held(table: OpTable, name: str) -> list[int]:
    """A rank's part of the weights so called, of each kind of layer."""
    return [param.numel for param in table.params if param.name.endswith(name)]


def test_a_rank_has_one_kv_head_where_layers_have_several_times_as_many() -> None:
    """MiMo-V2-Flash: 4 KV heads, 8 in windowed layers. Of 8 ranks each holds one, keys of 16 and values of 8 wide."""
    config = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "v_head_dim": 8,
              "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
              "layer_types": ["full_attention", "sliding_attention"]}  # fmt: skip
    one = profile("mimo_v2_flash", **config)
    whole = trace(one, "decode")
    for tp, heads in ((2, [2, 4]), (4, [1, 2]), (8, [1, 1])):
        shard = trace(one, "decode", tp, whole)
        assert held(shard, "k_proj.weight") == [n * 16 * 128 for n in heads]
        assert held(shard, "v_proj.weight") == [n * 8 * 128 for n in heads]
        assert kv_bytes_per_token(shard) == sum(heads) * (16 + 8) * 2


def test_a_matrix_of_cut_inputs_and_cut_outputs_gives_partial_sums() -> None:
    """Doge's of all KV heads' values, a number a head: [4, 4 x 16], of which a rank holds the columns of its values."""
    one = profile("doge")
    whole = trace(one, "decode")
    shard = trace(one, "decode", TP, whole)
    assert held(whole, "dt_proj.weight") == [4 * 64]
    assert held(shard, "dt_proj.weight") == [4 * 64 // TP]
    (row,) = [op for op in shard.ops if any(name.endswith("dt_proj.weight") for name in op.weights)]
    assert row.shard == "row"


def test_a_matrix_from_the_stream_into_the_stream_is_whole() -> None:
    """ModernBERT-decoder's dense layer before the head: its outputs meet the norm of the stream."""
    one = profile("modernbert-decoder", num_key_value_heads=8)
    shard = trace(one, "decode", TP)
    assert held(shard, "lm_head.dense.weight") == [128 * 128]
    assert set(held(shard, "attn.q_proj.weight")) == {128 * 128 // TP}


def test_positions_that_are_added_to_the_stream_are_whole() -> None:
    config = {"model_type": "ctrl", "n_embd": 64, "n_layer": 2, "n_head": 4, "dff": 96, "vocab_size": 512}
    one = ModelProfile(name="ctrl", hf_id="x", description="", sources={}, config=config)
    shard = trace(one, "decode", TP)
    assert held(shard, "Wq.weight") == [64 * 64 // TP]
    assert held(shard, "ffn.0.weight") == [64 * 96 // TP]


def test_layers_whose_latents_differ_are_each_cut_by_their_own_widths() -> None:
    """dots3-note: windowed layers have half the heads, twice the latent and wider keys than the others."""
    config = {
        "num_key_value_heads": 8, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 32,
        "q_lora_rank": 24, "head_dim": 24, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
        "swa_kv_lora_rank": 64, "swa_q_lora_rank": 24, "swa_qk_nope_head_dim": 24, "swa_v_head_dim": 16,
        "swa_head_dim": 32, "layer_types": ["indexed_attention", "sliding_attention"], "n_routed_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_experts_intermediate_size": 48,
        "index_topk": 16, "index_head_dim": 16, "index_n_heads": 4,
    }  # fmt: skip
    one = profile("dots3_note_text", **config)
    shard = trace(one, "decode", TP)
    heads = {"layers.0": 8 * (16 + 16) * 32, "layers.1": 4 * (24 + 16) * 64}
    found = {name: p.numel for p in shard.params for name in heads if f"{name}.self_attn.kv_b_proj" in p.name}
    assert found == {name: numel // TP for name, numel in heads.items()}
    assert sum(op.name == "mla_absorb" for op in shard.ops) == 2


def test_heads_that_run_one_after_another_are_fewer_on_a_rank() -> None:
    """Zamba's class scans its Mamba heads in a loop: two of four are left to each of two ranks."""
    config = {"layer_types": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4, "n_mamba_heads": 4, "mamba_expand": 2,
              "mamba_d_state": 16, "mamba_dt_rank": 8, "attention_hidden_size": 256,
              "num_key_value_heads": 8}  # fmt: skip
    one = profile("zamba", **config)
    whole = trace(one, "decode")
    shard = trace(one, "decode", TP, whole)
    scans = [sum(table.count(op) for op in table.ops if op.name == "ssm_scan") for table in (whole, shard)]
    assert scans == [4 * 4, 4 * 4 // TP]
    assert {op.shard for op in shard.ops if op.module.endswith("mamba.out_proj")} == {"row"}
