"""Attention that a class multiplies out itself: what comes out of the one op, and its sizes by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tensorcast.cost.memory import kv_bytes_per_token
from tensorcast.modeling.attention import TraceCache, past_length
from tensorcast.modeling.own_attention import OwnAttention, attends_by_itself
from tensorcast.profiles.model import ModelProfile
from tensorcast.trace.dims import Sizes
from tensorcast.trace.tracer import Phase, trace

WIDTH, LAYERS, HEADS, VOCABULARY = 64, 2, 4, 512
KINDS: dict[str, dict[str, Any]] = {
    "gptj": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "rotary_dim": 8, "n_inner": 96},
    "codegen": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "rotary_dim": 8, "n_inner": 96},
    "gpt_neox_japanese": {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS},
    "falcon": {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_kv_heads": 2,
               "new_decoder_architecture": True, "alibi": False},
    "bloom": {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
    "mpt": {"d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS},
    "gpt_neo": {"hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": HEADS,
                "attention_types": [[["global", "local"], 1]]},
}  # fmt: skip
KV_HEADS = {"falcon": 2}
OF_PLAIN_SCORES = ("gpt_neox_japanese",)
"""Whose scores have neither a bias of positions nor a scale of their own, which sizes do not hang on. (transformers
5.24 hands those of GPT-J and CodeGen to an attention function.)"""


@pytest.mark.parametrize("kind", OF_PLAIN_SCORES)
def test_the_op_gives_what_the_class_gives(kind: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **KINDS[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert attends_by_itself(model)
    tokens = torch.randint(0, VOCABULARY, (2, 9))
    cache = TraceCache(config=config)
    with torch.no_grad(), past_length(0):
        right = model(tokens, use_cache=False).logits
        with OwnAttention(cache):
            ours = model(tokens, past_key_values=cache).logits
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_one_op_over_all_that_is_cached(kind: str, phase: Phase) -> None:
    config = {"model_type": kind, "vocab_size": VOCABULARY, **KINDS[kind]}
    table = trace(ModelProfile(name=kind, hf_id="x", description="", sources={}, config=config), phase)
    rows = [op for op in table.ops if op.name == "attention"]
    assert sum(table.count(op) for op in rows) == LAYERS
    sizes = Sizes(B=3.0, S=1.0 if phase == "decode" else 50.0, P=100.0)
    for op in rows:
        shape = [dim.at(sizes) for dim in op.inputs[0].dims]
        assert shape == [3, HEADS, sizes.S, WIDTH // HEADS]
        assert op.attrs["past"].at(sizes) == 100
    assert not [op for op in table.ops if op.kind >= 0 and op.name in ("bmm", "baddbmm", "_softmax")]
    assert kv_bytes_per_token(table) == LAYERS * 2 * KV_HEADS.get(kind, HEADS) * (WIDTH // HEADS) * 2


def test_a_class_that_asks_for_an_attention_function_is_left_to_it() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", num_hidden_layers=1))
    assert not attends_by_itself(model)
