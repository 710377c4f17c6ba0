"""The model that is traced also runs: its logits equal transformers' own eager logits, fresh weights and inputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import SMALL
from moe_blocks import randomize
from transformers import AutoModelForCausalLM

from tensorcast.errors import InputError
from tensorcast.modeling.build import build
from tensorcast.modeling.config import hf_config
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.store import list_models, load_model
from tensorcast.trace.cache import traced

RUNS = ["deepseek_v3", "mixtral", "qwen3_moe", "gpt_oss", "llama4_text", "ernie4_5_moe", "minimax_m2", "llama"]


def _config(family: str) -> Any:
    return hf_config(ModelProfile(name=family, hf_id=family, description="d", sources={}, config=SMALL[family]))


@pytest.mark.parametrize("family", RUNS)
def test_rewritten_model_equals_eager(family: str) -> None:
    torch.manual_seed(3)
    config = _config(family)
    stock = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    randomize(stock)
    ours = build(config, dtype=torch.float32, device="cpu")
    renamed = {
        k.replace(".router.", ".gate.").replace(".shared_expert.", ".shared_experts.")
        if family == "llama4_text"
        else k: v
        for k, v in stock.state_dict().items()
    }
    ours.load_state_dict(renamed)
    for (_, a), (_, b) in zip(stock.named_buffers(), ours.named_buffers(), strict=True):
        b.copy_(a)
    ids = torch.randint(0, 512, (2, 24))
    with torch.no_grad():
        expected, found = stock(ids, use_cache=False).logits, ours(ids, use_cache=False).logits
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.parametrize("name", list_models())
def test_parameter_counts_match_the_published_ones(name: str) -> None:
    """Within 1 %, or within the rounding of the published figure, under the publisher's own convention."""
    profile = load_model(name)
    table = traced(profile, "decode")
    if profile.total_params is not None:
        missing = float(profile.total_params.not_built)
        published, rounding = float(profile.total_params), profile.total_params.precision
        assert abs(table.total_params() + missing - published) <= max(0.01 * published, rounding)
    if profile.active_params is not None:
        counted = table.active_params(profile.active_params.counts_embedding, profile.active_params.counts_head)
        published, rounding = float(profile.active_params), profile.active_params.precision
        assert abs(counted + profile.active_params.not_built - published) <= max(0.01 * published, rounding)


def test_unknown_model_type_is_one_clear_line() -> None:
    with pytest.raises(InputError, match="transformers rejects config") as caught:
        _config_of({"model_type": "no_such_model", "hidden_size": 8})
    assert "\n" not in str(caught.value)


def _config_of(config: dict[str, Any]) -> Any:
    return hf_config(ModelProfile(name="x", hf_id="x", description="d", sources={}, config=config))


def test_a_type_known_by_its_architecture_only_builds_the_stock_class() -> None:
    """Kimi-K2's config.json names a model_type of its own and DeepSeek-V3's class."""
    config = {**SMALL["deepseek_v3"], "model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}
    assert type(build(_config_of(config))).__name__ == "DeepseekV3ForCausalLM"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "bert is an encoder"),
        ({"model_type": "xlm-roberta", "architectures": ["XLMRobertaForSequenceClassification"]}, "is an encoder"),
        ({"model_type": "whisper"}, "whisper is an encoder and a decoder"),
        ({"model_type": "bart"}, "bart is an encoder and a decoder"),
        ({"model_type": "t5"}, "t5 is an encoder and a decoder"),
        (
            {**SMALL["llama"], "architectures": ["LlamaForSequenceClassification"]},
            "architectures: LlamaForSequenceClassification does not generate text",
        ),
    ],
)
def test_what_makes_no_text_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"model x: .*{message}") as caught:
        hf_config(ModelProfile(name="x", hf_id="x", description="d", sources={}, config=config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("architectures", [None, ["LlamaForCausalLM"], ["LlamaModel"], ["LlamaOfTheirOwnForCausalLM"]])
def test_decoders_pass_also_with_remote_code(architectures: list[str] | None) -> None:
    config = {**SMALL["llama"], "architectures": architectures}
    assert hf_config(ModelProfile(name="x", hf_id="x", description="d", sources={}, config=config)).num_hidden_layers


def test_a_bert_that_decodes_is_a_decoder() -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512}
    config = {"model_type": "bert", "is_decoder": True, "architectures": ["BertLMHeadModel"], **sizes}
    config["intermediate_size"] = 96
    assert hf_config(ModelProfile(name="x", hf_id="x", description="d", sources={}, config=config)).is_decoder
