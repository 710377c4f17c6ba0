"""Values that no model can have are one line that names field and value, before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tensorcast.errors import InputError
from tensorcast.profiles.config_values import DEEPEST, check_values
from tensorcast.profiles.store import list_models, load_model

MOE = {
    "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 128, "num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 96,
    "moe_intermediate_size": 32,
}  # fmt: skip


def load(folder: Path, text: str) -> Any:
    (folder / "config.json").write_text(text, encoding="utf-8")
    return load_model(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_experts": -8}, "num_experts = -8: must be at least 0"),
        ({"num_experts": 10**9}, "num_experts = 1000000000: must be at most 16384"),
        ({"num_experts": True}, "num_experts = True: must be a whole number"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok = 0: must be at least 1"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9: must be at most the 8 experts"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size = 0: must be at least 1"),
        ({"num_key_value_heads": 8}, "num_key_value_heads = 8: must divide the 4 attention heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3: must divide the 4 attention heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads = 0: must be at least 1"),
        ({"num_hidden_layers": 100_000}, "num_hidden_layers = 100000: must be at most 1024"),
        ({"hidden_size": "64"}, "hidden_size = '64': must be a whole number"),
        ({"hidden_size": 64.0}, "hidden_size = 64.0: must be a whole number"),
        ({"vocab_size": float("nan")}, "vocab_size = nan: must be a whole number"),
        ({"vocab_size": float("inf")}, "vocab_size = inf: must be a whole number"),
        ({"head_dim": 0}, "head_dim = 0: must be at least 1"),
        ({"n_group": 3, "topk_group": 1}, "n_group = 3"),
        ({"n_group": 4, "topk_group": 5}, "topk_group = 5"),
        ({"n_group": 4, "topk_group": 0}, "topk_group = 0"),
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "num_experts_per_tok = 3: must be at most 2, the"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step = 0: must be at least 1"),
        ({"kv_lora_rank": 16, "q_lora_rank": 0}, "q_lora_rank = 0: must be at least 1, or null"),
        ({"kv_lora_rank": 0, "qk_rope_head_dim": 8}, "kv_lora_rank = 0: must be at least 1"),
        ({"kv_lora_rank": 16, "v_head_dim": 0}, "v_head_dim = 0: must be at least 1, for kv_lora_rank = 16"),
        ({"rope_scaling": {"type": "yarn", "factor": float("inf")}}, "rope_scaling.factor = inf"),
        ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn': must be an object"),
        ({"text_config": "x"}, "text_config = 'x': must be an object"),
        ({"text_config": {"num_experts": -1}}, "text_config.num_experts = -1"),
        ({"text_config": {"model_type": []}}, "text_config.model_type = \\[\\]: must be a word"),
        ({"torch_dtype": []}, "torch_dtype = \\[\\]: must be a word, such as bfloat16"),
        ({"dtype": float("nan")}, "dtype = nan: must be a word"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": float("nan")}},
         "rope_scaling.original_max_position_embeddings = nan: must be a number above 0"),
        ({"architectures": [1]}, "architectures = \\[1\\]: must be a list of class names"),
        ({"num_experts": 10**400}, "num_experts = a number of more than 30 digits"),
    ],
)
def test_impossible_values_are_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        load(tmp_path, json.dumps({**MOE, **change}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", ['{"a":' * 2000 + "1" + "}" * 2000, "[" * 100_000 + "]" * 100_000, "9" * 5000],
    ids=["objects", "lists", "digits"],
)
def test_what_json_cannot_hold_is_one_line(tmp_path: Path, value: str) -> None:
    with pytest.raises(InputError, match=r"config\.json: cannot be read") as caught:
        load(tmp_path, json.dumps(MOE)[:-1] + f', "more": {value}' + "}")
    assert "\n" not in str(caught.value)


def test_nesting_that_json_reads_is_refused_before_it_is_copied(tmp_path: Path) -> None:
    deep = '{"a":' * (DEEPEST + 1) + "1" + "}" * (DEEPEST + 1)
    with pytest.raises(InputError, match="levels of nesting"):
        load(tmp_path, json.dumps(MOE)[:-1] + f', "more": {deep}' + "}")


@pytest.mark.parametrize(
    "change",
    [
        {"num_experts": 0, "num_experts_per_tok": 0},  # dense, of a class for both
        {"n_group": 1, "topk_group": 4},  # one group: not picked from (Ling)
        {"kv_lora_rank": 16, "head_dim": 0, "num_key_value_heads": 8},  # latent attention has no KV heads
        {"time_step_limit": [0.0, float("inf")], "sliding_window": -1},
        {"kv_lora_rank": 0, "qk_rope_head_dim": 64, "use_mla": False},  # widths that are not used
        {"rope_scaling": None, "n_group": None, "num_key_value_heads": None},
    ],
)
def test_what_released_files_hold_is_let_through(tmp_path: Path, change: dict[str, Any]) -> None:
    assert load(tmp_path, json.dumps({**MOE, **change})).config["hidden_size"] == 64


def test_every_shipped_model_has_possible_values() -> None:
    assert all(load_model(name).config for name in list_models())


def test_a_profiles_type_is_a_word() -> None:
    with pytest.raises(ValueError, match=r"^model_type = {}: must be a word, such as qwen3_moe$"):
        check_values({**MOE, "model_type": {}})
