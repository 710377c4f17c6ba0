"""Released files of types that transformers does not have, against the totals that their hubs publish."""

from __future__ import annotations

from typing import Any

import public_configs
import pytest
import torch
from parameter_formula import parameters
from transformers import CONFIG_MAPPING, LlamaConfig, LlamaForCausalLM

from tensorcast.cost.memory import kv_bytes_per_token
from tensorcast.errors import InputError
from tensorcast.modeling.build import build
from tensorcast.modeling.config import hf_config
from tensorcast.modeling.foreign_types import FOREIGN_TYPES, as_stock
from tensorcast.profiles.model import ModelProfile
from tensorcast.trace.tracer import trace

PUBLIC = {one.name: one.config for one in public_configs.load()}

PUBLISHED = {
    "internlm2_7b": 7_737_708_544, "internlm": 7_321_948_160, "baichuan2_7b": 7_505_973_248,
    "exaone_7.8b": 7_818_448_896, "qwen_7b": 7_721_324_544, "qwen": 1_836_828_672, "THUDM/chatglm3-6b": 6_243_584_000,
    "THUDM/glm-4-9b": 9_399_951_360, "phi-1_5": 1_418_270_720, "phi-2": 2_779_683_840,
    "minicpm_2b_sft_bf16": 2_724_880_896, "deepseek": 16_375_728_128, "orion": 14_498_703_360,
}  # fmt: skip
"""Totals of the releases' safetensors files on huggingface.co."""


def profile(config: dict[str, Any]) -> ModelProfile:
    return ModelProfile(name="x", hf_id="x", description="", sources={}, config=config)


def built(config: dict[str, Any]) -> Any:
    return hf_config(profile(config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_with_code_of_its_own_is_its_stock_type(name: str) -> None:
    config = built(PUBLIC[name])
    assert config.model_type == FOREIGN_TYPES[PUBLIC[name]["model_type"]].stock
    assert parameters(config.to_dict()) == PUBLISHED[name]


def test_sizes_are_worked_out_of_what_the_file_says() -> None:
    kind, values = as_stock("phi-msft", {"n_embd": 64, "n_head": 4, "n_layer": 2})
    assert (kind, values["intermediate_size"], values["hidden_size"]) == ("phi", 256, 64)
    assert as_stock("qwen", {"intermediate_size": 96})[1]["intermediate_size"] == 48
    assert "hidden_size" not in as_stock("phi-msft", {"n_head": 4})[1]
    assert as_stock("llama", {"n_embd": 64}) == ("llama", {"n_embd": 64})


def test_a_type_may_be_another_network_where_its_file_says_so() -> None:
    """MiniCPM-MoE: 40 layers of 8 experts as wide as MiniCPM-2B's MLP. DeepSeek-VL2-tiny: heads of 128, no latents."""
    experts = built(PUBLIC["minicpm-moe-8x2b"])
    layer = 4 * 2304**2 + 8 * 3 * 2304 * 5760 + 8 * 2304 + 2 * 2304
    assert (experts.model_type, experts.num_local_experts) == ("mixtral", 8)
    assert parameters(experts.to_dict()) == 40 * layer + 122_753 * 2304 + 2304
    tiny = built(PUBLIC["deepseek_vl2_tiny"])
    layer = 4 * 1280**2 + 64 * 1280 + (64 + 2) * 3 * 1280 * 896 + 2 * 1280
    first = 4 * 1280**2 + 3 * 1280 * 6848 + 2 * 1280
    assert (tiny.model_type, tiny.head_dim) == ("glm4_moe", 128)
    assert parameters(tiny.to_dict()) == 11 * layer + first + 2 * 129_280 * 1280 + 1280
    assert as_stock("deepseek_v2", {"use_mla": True})[0] == "deepseek_v2"


PUZZLE: dict[str, Any] = {
    "model_type": "nemotron-nas", "architectures": ["DeciLMForCausalLM"], "hidden_size": 256, "vocab_size": 512,
    "num_attention_heads": 8, "num_hidden_layers": 4, "max_position_embeddings": 512, "intermediate_size": None,
    "num_key_value_heads": None, "block_configs": [
        {"attention": {"n_heads_in_group": 4, "no_op": False}, "ffn": {"ffn_mult": 3.0, "no_op": False}},
        {"attention": {"n_heads_in_group": None, "no_op": True}, "ffn": {"ffn_mult": 1.0, "no_op": False}},
        {"attention": {"n_heads_in_group": 2, "no_op": False}, "ffn": {"ffn_mult": None, "no_op": True}},
        {"attention": {"n_heads_in_group": 4, "no_op": False}, "ffn": {"ffn_mult": 3.0, "no_op": False}},
    ],
}  # fmt: skip
"""Layers of three forms: 2 KV heads and an MLP of 512, an MLP of 256 alone, attention alone with 4."""


def test_layers_that_differ_are_each_as_their_file_says() -> None:
    """NVIDIA's Nemotron-Super of 49.9 billion parameters, with attention in 49 of 80 layers."""
    public = profile(PUBLIC["nvidia/Llama-3_3-Nemotron-Super-49B-v1"])
    table = trace(public, "decode")
    assert table.total_params() == parameters(public.config) == 49_867_145_216
    assert kv_bytes_per_token(table) == 49 * 2 * 8 * 128 * 2
    small = trace(profile(PUZZLE), "prefill")
    assert small.total_params() == parameters(PUZZLE) and small.layer_kinds == (0, 1, 2, 0)
    half = trace(profile(PUZZLE), "prefill", 2, small)
    assert kv_bytes_per_token(half) == kv_bytes_per_token(small) / 2 == (2 + 4 + 2) / 2 * 2 * 32 * 2


def test_parts_that_a_layer_lacks_add_nothing_to_the_stream() -> None:
    """Logits of stock Llama with the same weights: what is missing is 0 there, heads that share keys have copies."""
    torch.manual_seed(0)
    model = build(built(PUZZLE), dtype=torch.float32, device="cpu")
    stock = LlamaForCausalLM(LlamaConfig(
        hidden_size=256, vocab_size=512, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=4,
        intermediate_size=512, max_position_embeddings=512, attn_implementation="eager",
    )).eval()  # type: ignore[call-arg]  # fmt: skip
    theirs = dict(stock.named_parameters())
    for name, param in theirs.items():
        param.data.fill_(float("norm" in name))
    for name, param in model.named_parameters():
        param.data = torch.randn(param.shape) / 16
        whole = theirs[name].data
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            whole.copy_(param.data.view(-1, 32, 256).repeat_interleave(128 // len(param), 0).reshape(128, 256))
        else:
            whole[tuple(slice(size) for size in param.shape)] = param.data
    ids = torch.arange(24).reshape(2, 12) * 7 % 512
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [("attention", {"replace_with_linear": True}, "replace_with_linear = True is not known"),
     ("attention", {"n_heads_in_group": None}, "each needs attention.n_heads_in_group"),
     ("ffn", {"ffn_mult": None}, "each needs")],
)  # fmt: skip
def test_blocks_that_are_not_known_are_refused(part: str, change: dict[str, Any], said: str) -> None:
    *first, last = PUZZLE["block_configs"]
    with pytest.raises(InputError, match=said):
        built(PUZZLE | {"block_configs": [*first, last | {part: last[part] | change}]})


def test_every_layer_has_a_block() -> None:
    with pytest.raises(InputError, match="a block for each of num_hidden_layers = 5"):
        built(PUZZLE | {"num_hidden_layers": 5})


def test_what_a_stock_type_lacks_is_refused() -> None:
    """Experts in a stream of their own of Kimi-K3; KV heads that only a default says."""
    with pytest.raises(InputError, match="routed_expert_hidden_size"):
        built(PUBLIC["moonshotai/Kimi-K3"])
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
    with pytest.raises(InputError, match="num_key_value_heads"):
        built({"model_type": "qwen2", "vocab_size": 512, **sizes})


def test_a_size_that_the_class_works_out_is_no_part_that_it_lacks() -> None:
    """Zamba2 writes twice the stream's width as that of attention, Mamba its inner width."""
    for kind, field in (("zamba2", "attention_hidden_size"), ("mamba", "intermediate_size")):
        values = CONFIG_MAPPING[kind]().to_dict()
        assert field in values
        assert built({"model_type": kind, **values}).model_type == kind


def test_most_public_files_are_kept() -> None:
    assert len(PUBLIC) >= 150
