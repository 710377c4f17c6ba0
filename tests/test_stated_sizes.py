"""What a file says is what is built: sizes that a class drops or makes up are refused or said."""

from __future__ import annotations

from typing import Any

import pytest

from tensorcast.errors import InputError
from tensorcast.modeling.config import hf_config
from tensorcast.profiles.model import ModelProfile
from tensorcast.trace.tracer import Phase, trace

SIZES = {
    "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 160, "vocab_size": 512,
}  # fmt: skip
EXPERTS = {"num_experts": 10, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LATENT: dict[str, Any] = {
    "model_type": "deepseek_v3", "q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 48, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
} | {name: size for name, size in SIZES.items() if name != "head_dim"} | {"num_key_value_heads": 6}  # fmt: skip


def profile(model_type: str, **config: Any) -> ModelProfile:
    config = {"model_type": model_type, **config}
    return ModelProfile(name="x", hf_id="x", description="", sources={}, config=config)


@pytest.mark.parametrize(
    ("model_type", "more"),
    [("gemma3", {}), ("mistral3", {}), ("qwen3_vl_moe", EXPERTS), ("qwen3_5_moe", EXPERTS), ("qwen3_vl", {})],
)
def test_flat_sizes_under_a_wrapper_type_are_those_of_its_text_model(model_type: str, more: dict[str, Any]) -> None:
    built = hf_config(profile(model_type, **SIZES, **more))
    for name, size in {**SIZES, **more}.items():
        assert getattr(built, name) == size, name


@pytest.mark.parametrize(
    ("model_type", "config", "said"),
    [
        ("step3p7", SIZES | {"num_experts": 10, "num_experts_per_tok": 2}, "num_experts = 10 in config.json, 288 in"),
        ("llama", {"num_layers": 8, "n_head": 6, "hidden_dim": 96, "vocab_size": 512},
         "does not say num_hidden_layers, hidden_size, num_attention_heads"),
        ("qwen3_moe", {}, "does not say num_hidden_layers, hidden_size, num_attention_heads, vocab_size"),
        ("qwen2", SIZES | EXPERTS, "num_experts = 10 in config.json, no such size in"),
        ("mixtral", SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "n_layer": 9}, ""),
    ],
)  # fmt: skip
def test_sizes_that_the_class_does_not_take_are_refused(model_type: str, config: dict[str, Any], said: str) -> None:
    if not said:  # a second name of a size that the class does take is nobody's
        assert hf_config(profile(model_type, **config)).num_hidden_layers == 3
        return
    with pytest.raises(InputError, match=said):
        hf_config(profile(model_type, **config))


def test_experts_that_a_file_does_not_count_are_not_made_up() -> None:
    with pytest.raises(InputError, match="does not say num_experts, num_experts_per_tok, and the model has experts"):
        trace(profile("qwen3_moe", **SIZES), "decode")


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_has_the_widths_that_its_file_says(model_type: str) -> None:
    """Queries of DeepSeek-V2-Lite come from the stream (null), not from the 1,536 of its class's default."""
    config = {**LATENT, "model_type": model_type}
    assert hf_config(profile(**config)).q_lora_rank is None
    assert hf_config(profile(**config | {"q_lora_rank": 24})).q_lora_rank == 24
    for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        unsaid = {field: value for field, value in config.items() if field != name}
        with pytest.raises(InputError, match=rf"config.json does not say {name} \(model_type '{model_type}'\)"):
            hf_config(profile(**unsaid))


def test_experts_that_a_class_has_no_field_for_are_not_left_out() -> None:
    """Shared ones of a Qwen3-MoE file; every second layer of DeepSeek's, whose class in transformers has all."""
    with pytest.raises(InputError, match=r"n_shared_experts = 1 in config\.json, and transformers' class has no such"):
        trace(profile("qwen3_moe", **SIZES, **EXPERTS, n_shared_experts=1), "decode")
    with pytest.raises(InputError, match=r"moe_layer_freq = 2 in config\.json: experts in 1 layers, .* class has 2"):
        trace(profile(**LATENT, moe_layer_freq=2), "decode")
    assert trace(profile(**LATENT, moe_layer_freq=1), "decode").facts.shared_experts


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_no_shared_expert_is_no_operation(phase: Phase) -> None:
    """0 in the file: a matrix without elements does nothing, and the rest is as it was."""
    with_one, none = (trace(profile(**LATENT | {"n_shared_experts": n}), phase) for n in (1, 0))
    assert with_one.total_params() - none.total_params() == 2 * 3 * SIZES["hidden_size"] * 48
    assert not any("shared" in op.module for op in none.ops)
    assert sum(none.count(op) for op in none.ops if op.name == "grouped_matmul") == 4
    assert all(dim.coef for op in none.ops for t in op.outputs for dim in t.dims)


def test_sizes_said_twice_are_those_of_the_language_model() -> None:
    built = hf_config(profile("gemma3", text_config=SIZES, num_hidden_layers=12, hidden_size=96))
    assert built.num_hidden_layers == 3
    assert built.remarks[-1].endswith("num_hidden_layers = 12, not 3: the language model's own is priced")


def test_a_size_beside_the_core_that_rests_on_a_default_is_said() -> None:
    built = hf_config(profile("mixtral", **SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}))
    assert built.remarks == ()
    less = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    less |= {"num_attention_heads": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    built = hf_config(profile("mixtral", **less))
    assert built.remarks == ("not in config.json, so transformers' defaults of mixtral: num_key_value_heads = 8",)


def test_a_text_models_type_around_a_text_part_is_that_part() -> None:
    """Ministral-3's file, as some tools write it: the type of the text model, and its sizes under text_config."""
    whole = profile("ministral3", text_config={"model_type": "ministral3", **SIZES}, vision_config={"hidden_size": 8},
                    architectures=["Mistral3ForConditionalGeneration"])  # fmt: skip
    built = hf_config(whole)
    assert {name: getattr(built, name) for name in SIZES} == SIZES
    assert built.remarks == ("priced as its language model; not counted: vision_config",)


def test_layers_that_share_keys_and_values_are_not_counted_as_others() -> None:
    """Hunyuan-Large's cla_share_factor of 2 halves the cache, and half of the layers have queries alone."""
    config = {**SIZES, "attention_head_dim": 16, "num_experts": 4, "moe_topk": 2, "cla_share_factor": 2}
    with pytest.raises(InputError, match="use_cla = True: layers that share keys and values are none of transformers'"):
        hf_config(profile("hunyuan_v1_moe", **config, use_cla=True))
    assert hf_config(profile("hunyuan_v1_moe", **config, use_cla=False)).num_hidden_layers == 3


def test_an_activation_in_a_word_is_as_good_as_its_object() -> None:
    """DBRX's ffn_act_fn, an object of its name in the released file."""
    config = {"d_model": 96, "n_layers": 2, "n_heads": 6, "vocab_size": 512, "attn_config": {"kv_n_heads": 2}}
    experts = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}
    for act in ("silu", {"name": "silu"}):
        built = hf_config(profile("dbrx", **config, ffn_config={**experts, "ffn_act_fn": act}))
        assert built.ffn_config.ffn_act_fn == {"name": "silu"}


def test_a_text_part_that_rests_on_defaults_says_which() -> None:
    """As LLaVA's and Gemma-3's released files do."""
    vision = {"model_type": "siglip_vision_model"}
    built = hf_config(profile("gemma3", text_config={"num_hidden_layers": 3, "hidden_size": 96}, vision_config=vision))
    assert built.hidden_size == 96
    assert "vision_config" in built.remarks[0]
    assert "num_attention_heads = 8" in built.remarks[1]


@pytest.mark.parametrize(("wrapper", "part"), [("kimi_vl", "text_config"), ("internvl_chat", "llm_config")])
def test_a_wrapper_that_transformers_lacks_is_its_text_model(wrapper: str, part: str) -> None:
    whole = profile(wrapper, **{part: LATENT}, vision_config={"hidden_size": 8}, architectures=["SomeVLModel"])
    inner = trace(profile(**LATENT), "decode")
    table = trace(whole, "decode")
    assert table.total_params() == inner.total_params()
    assert whole.num_experts == 8
    assert table.facts.remarks == ("priced as its language model; not counted: vision_config",)


def test_a_wrapper_around_a_type_that_is_not_known_is_refused() -> None:
    with pytest.raises(InputError, match="has no such type: did you mean"):
        hf_config(profile("deepseek_vl9", text_config={"model_type": "nobody_knows", **SIZES}))


@pytest.mark.parametrize(
    ("model_type", "architecture", "wrong"),
    [
        ("git", "Grok1ForCausalLM", True), ("llama", "MistralForCausalLM", True), ("llama", "LlamaForCausalLM", False),
        ("llama", "LLaMAForCausalLM", False), ("qwen3_moe", "Qwen3MoeCustomForCausalLM", False),
    ],
)  # fmt: skip
def test_an_architecture_of_another_type_is_not_built(model_type: str, architecture: str, wrong: bool) -> None:
    config = profile(model_type, **SIZES, **(EXPERTS if "moe" in model_type else {}), architectures=[architecture])
    if wrong:
        with pytest.raises(InputError, match=f"{architecture} is none of transformers' classes of model_type"):
            hf_config(config)
    else:
        assert hf_config(config).hidden_size == 96
