"""A sample of the census of model types (``make census`` counts all), and what it found, counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import census_page
import model_types
import new_types
import pytest

from tensorcast.cost.memory import cache_bytes, kv_bytes_per_token
from tensorcast.errors import InputError
from tensorcast.profiles.model import ModelProfile
from tensorcast.trace.table import OpTable
from tensorcast.trace.tracer import Phase, trace

SAMPLE = ("gpt2", "gpt_bigcode", "internvl", "qwen3_vl_moe", "youtu", "bloom", "doge", "dory")
"""Fused QKV, one KV head, wrappers with another tie than their text, MLA, ALiBi, a matrix cut in both dimensions, and
layers of one kind of which some run twice, in a file that counts blocks (from transformers 5.24 on)."""


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_type_is_counted_as_its_class_and_its_config_say(kind: str) -> None:
    if kind not in model_types.text_types():
        pytest.skip(f"this transformers has no {kind}")
    words = [verdict.word for verdict in model_types.judged(model_types.of_type(kind))]
    assert words[0] == "right"
    assert set(words) <= {"right", "none"}, words  # none: heads that do not divide


def test_what_takes_too_long_is_refused_as_that() -> None:
    """Of CPU time: no clock of the machine's load decides."""
    words = model_types.judged(model_types.of_type("gpt2"), seconds=1e-6)
    assert [(one.tp, one.word) for one in words] == [(tp, "refused") for tp in census_page.RANKS]
    assert all(one.reason.startswith("time") for one in words)


def test_configs_of_one_shape_are_counted_once_and_each_ones_precision_read() -> None:
    plain = model_types.of_type("gpt2")
    known, odd = (
        plain._replace(name=name, config=plain.config | {"quantization_config": {"quant_method": name}})
        for name in ("fp8", "hqq")
    )
    assert model_types.same_shapes(iter([plain, known, odd])) == [[plain, known, odd]]
    verdicts = model_types.judged_alike([plain, known, odd])
    assert [one.word for one in verdicts if one.tp == 1] == ["right", "right", "refused"]
    assert "hqq" in verdicts[-3].reason


def test_what_a_stop_left_is_not_counted_again(tmp_path: Path) -> None:
    gone = model_types.Entry("none", {"model_type": "no_such_type"}, "public")
    first = model_types.kept(tmp_path, "code", [gone])
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text().replace("no_such_type", "another"))
    assert model_types.kept(tmp_path, "code", [gone]) != first
    assert model_types.kept(tmp_path, "other code", [gone]) == first


def test_the_page_says_what_is_right_and_what_is_not() -> None:
    verdict = census_page.Verdict("a", "types", 1, "right", params=10, cache=2.0)
    text = census_page.page([verdict, verdict._replace(entry="b", word="refused", reason="time"),
                             verdict._replace(entry="c", word="whole", reason="left"),
                             verdict._replace(entry="d", word="none", reason="an encoder")])  # fmt: skip
    assert "| all | 1 | 1 | 1 | 1 | 0 | 33.3 % | 1 |" in text
    assert "| b | 1 | time |" in text and "| a | 10 | 2 |" in text


def test_most_types_are_there() -> None:
    assert len(model_types.text_types()) >= 150


def test_types_of_a_wheel_are_read_in_its_lists_and_counted_where_they_are_first() -> None:
    source = """
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES: OrderedDict = OrderedDict([("old", "Old"), ("see_text", "SeeText")])
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES = OrderedDict([("see", "See")] + [("more", ("A", "B"))])
MODEL_FOR_CTC_MAPPING_NAMES = OrderedDict([("hear", "Hear")])
"""
    now = new_types.listed(source)
    assert now == {"old", "see", "see_text", "more"}
    assert new_types.new_in([now | {"newest"}, now, {"old"}]) == [["newest"], ["more", "see"]]


def test_moe_types_of_the_last_releases_are_counted_by_what_is_right() -> None:
    """Of those kept: the last two releases' MoE types are all there, one that fails is told with its reason."""
    last = [kind for release in new_types.load()[:2] for kind in release.types]
    rows = [census_page.Verdict(kind, "types", 1, "right", params=10, experts=2) for kind in last]
    rows[0] = rows[0]._replace(word="wrong", reason="11 in the class")
    text = census_page.page(rows)
    assert f"the last two releases' {len(last) - 1} of {len(last)}." in text
    assert f"| {last[0]} | 2 | 10 | 0 | wrong: 11 in the class |" in text


def test_a_table_that_counts_otherwise_is_found() -> None:
    table = of(model_type="gpt2", n_embd=64, n_layer=2, n_head=4, vocab_size=512)
    held, cache = table.total_params(), 2 * 2.0 * 2 * 64
    assert model_types.problem(table, held, cache) == ""
    assert "parameters" in model_types.problem(table, held + 1, cache)
    assert "cache" in model_types.problem(table, held, cache / 2)


def of(*, phase: Phase = "decode", **config: Any) -> OpTable:
    return trace(ModelProfile(name="x", hf_id="x", description="", sources={}, config=config), phase)


def test_keys_and_values_of_one_projection_are_two() -> None:
    """GPT-2 caches parts of one projection, without rotary embedding: keys and values of width x 2 bytes a layer."""
    table = of(model_type="gpt2", n_embd=64, n_layer=3, n_head=4, vocab_size=512)
    assert kv_bytes_per_token(table) == 3 * 2 * 64 * 2


def test_layers_that_run_again_are_held_once_and_cache_each_time() -> None:
    """HRM: two stacks of 2 layers, the lower one 2 x 3 times, the upper one 2 times."""
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
                             "head_dim": 16, "intermediate_size": 96, "vocab_size": 512}  # fmt: skip
    table = of(model_type="hrm_text", **sizes, num_layers_per_stack=2, H_cycles=2, L_cycles=3, num_hidden_layers=16)
    layers = sum(table.count(p) for p in table.params if p.name.endswith("self_attn.k_proj.weight"))
    assert layers == 4
    assert cache_bytes(table, "bf16", 1.0, 10.0) == 10 * 16 * 2 * 64 * 2


def test_keys_of_as_many_heads_as_queries_are_cut_like_them() -> None:
    """A config without a number of KV heads: a rank of two has half of the keys, not one head."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 96, "vocab_size": 512}
    config = {"model_type": "hrm_text", **sizes, "num_layers_per_stack": 1, "H_cycles": 1, "L_cycles": 1}
    profile = ModelProfile(name="x", hf_id="x", description="", sources={}, config=config | {"num_hidden_layers": 2})
    keys = [p for p in trace(profile, "decode", 2).params if p.name.endswith("k_proj.weight")]
    assert keys and all(p.numel == p.full_numel / 2 for p in keys)


@pytest.mark.parametrize(
    "config", [{"model_type": "openai-gpt", "n_layer": 2}, {"model_type": "xlstm"}, {"model_type": "rwkv"},
               {"model_type": "recurrent_gemma", "num_hidden_layers": 3}]
)
def test_a_class_without_a_cache_that_is_seen_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="keeps no cache that can be counted"):
        of(**model_types.of_type(config["model_type"]).config | config)


@pytest.mark.parametrize("tied", [True, False])
def test_the_tie_of_the_head_is_that_of_the_part_around_the_text(tied: bool) -> None:
    text = {"model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
            "num_key_value_heads": 4, "intermediate_size": 96, "vocab_size": 512,
            "tie_word_embeddings": not tied}  # fmt: skip
    table = of(model_type="llava", text_config=text, tie_word_embeddings=tied)
    assert sum(p.full_numel for p in table.params if p.kind < 0) == (1 if tied else 2) * 512 * 64 + 64


def test_a_flat_file_under_a_wrappers_type_keeps_its_tie() -> None:
    """Qwen2-VL's published file: the text model's sizes and its tie lie beside the vision tower."""
    entry = next(one for one in model_types.entries() if one.name == "qwen2_vl_2b")
    found = model_types.judged(entry)  # 12 heads do not divide by 8
    assert [one.word for one in found] == ["right", "right", "none"] and found[0].params == 1_543_714_304
