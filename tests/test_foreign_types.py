"""Released files of types that transformers does not have, against the totals that their hubs publish."""

from __future__ import annotations

from typing import Any

import public_configs
import pytest
from parameter_formula import parameters
from transformers import CONFIG_MAPPING

from tensorcast.errors import InputError
from tensorcast.modeling.config import hf_config
from tensorcast.modeling.foreign_types import FOREIGN_TYPES, as_stock
from tensorcast.profiles.model import ModelProfile

PUBLIC = {one.name: one.config for one in public_configs.load()}

PUBLISHED = {
    "internlm2_7b": 7_737_708_544, "internlm": 7_321_948_160, "baichuan2_7b": 7_505_973_248,
    "exaone_7.8b": 7_818_448_896, "qwen_7b": 7_721_324_544, "qwen": 1_836_828_672, "THUDM/chatglm3-6b": 6_243_584_000,
    "THUDM/glm-4-9b": 9_399_951_360, "phi-1_5": 1_418_270_720, "phi-2": 2_779_683_840,
    "minicpm_2b_sft_bf16": 2_724_880_896, "deepseek": 16_375_728_128, "orion": 14_498_703_360,
}  # fmt: skip
"""Totals of the releases' safetensors files on huggingface.co."""


def built(config: dict[str, Any]) -> Any:
    return hf_config(ModelProfile(name="x", hf_id="x", description="", sources={}, config=config))


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
