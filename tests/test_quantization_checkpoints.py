"""What a checkpoint's entry says of every module, against a count of bytes module by module."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorcast.cost.memory import weight_bytes
from tensorcast.errors import InputError
from tensorcast.modeling.checkpoint.read import checkpoint, from_config
from tensorcast.modeling.quantization import SCHEMES, as_run, weight_only_here
from tensorcast.profiles.store import load_model
from tensorcast.trace.cache import traced
from tensorcast.trace.precision import by_precision

HIDDEN, WIDTH, EXPERTS, LAYERS, VOCABULARY = 64, 48, 4, 6, 256

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": HIDDEN,
    "moe_intermediate_size": WIDTH, "intermediate_size": WIDTH, "num_experts": EXPERTS, "num_experts_per_tok": 2,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip

ATTENTION = {"q_proj": 64 * 64, "k_proj": 32 * 64, "v_proj": 32 * 64, "o_proj": 64 * 64}
EXPERT = {name: EXPERTS * HIDDEN * WIDTH for name in ("gate_proj", "up_proj", "down_proj")}

BF16 = SCHEMES["bf16"].weight_bytes
FIXED = BF16 * (2 * VOCABULARY * HIDDEN + HIDDEN + LAYERS * (EXPERTS * HIDDEN + 2 * HIDDEN + 2 * 16))
"""Embedding, head, norms and routers."""

MODULES = {
    **{f"model.layers.{i}.self_attn.{name}": size for i in range(LAYERS) for name, size in ATTENTION.items()},
    **{f"model.layers.{i}.mlp.experts.0.{name}": size for i in range(LAYERS) for name, size in EXPERT.items()},
}
"""Quantisable weights by the name that a checkpoint has for their module, the first expert's for all."""


def by_hand(scheme_of: Callable[[str], str]) -> float:
    return FIXED + sum(size * SCHEMES[scheme_of(name)].weight_bytes for name, size in MODULES.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def table(folder: Path) -> Any:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return traced(load_model(folder), "decode")


def counted(table: Any, entry: dict[str, Any], key: str = "quantization_config") -> float:
    quantization = from_config({**CONFIG, key: entry})
    return float(weight_bytes(by_precision(table, quantization), quantization))


FP8 = {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"},
       "input_activations": {"type": "float", "num_bits": 8, "strategy": "token", "dynamic": True}}  # fmt: skip
NVFP4 = {"weights": {"type": "float", "num_bits": 4, "strategy": "tensor_group", "group_size": 16},
         "input_activations": {"type": "float", "num_bits": 4, "group_size": 16, "dynamic": "local"}}  # fmt: skip


def integer(bits: int, group: int) -> dict[str, Any]:
    return {"weights": {"type": "int", "num_bits": bits, "strategy": "group", "group_size": group}}


def compressed(*groups: dict[str, Any], ignore: tuple[str, ...] = ("lm_head",), **more: Any) -> dict[str, Any]:
    named = {f"group_{i}": group for i, group in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "config_groups": named, "ignore": list(ignore), **more}


def experts_else(scheme: str, other: str = "bf16") -> Callable[[str], str]:
    return lambda name: scheme if "experts" in name else other


CASES: list[tuple[dict[str, Any], Callable[[str], str]]] = [
    (compressed(FP8 | {"targets": ["re:.*self_attn.*"]}, NVFP4 | {"targets": ["re:.*experts.*"]}),
     experts_else("nvfp4", "fp8")),
    (compressed(NVFP4 | {"targets": ["re:.*experts.*"]}, FP8 | {"targets": ["re:.*self_attn.*"]}),
     experts_else("nvfp4", "fp8")),
    (compressed(integer(4, 64) | {"targets": [r"re:.*mlp\.experts\..*"]}), experts_else("w4a16_g64")),
    (compressed(integer(8, 32) | {"targets": ["Linear"]}), lambda name: "w8a16_g32"),
    (compressed(integer(4, 16) | {"targets": ["Linear"]}, ignore=("re:.*layers.1.*",)),
     lambda name: "bf16" if ".layers.1." in name else "w4a16_g16"),
    (compressed({**NVFP4, "input_activations": None, "targets": ["Linear"]}), lambda name: "w4a16_nvfp4"),
    ({"quant_method": "fbgemm_fp8",
      "modules_to_not_convert": ["model.layers.0.self_attn.q_proj", "model.layers.5.mlp"]},
     lambda name: "bf16" if name == "model.layers.0.self_attn.q_proj" or ".layers.5.mlp" in name else "fp8"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": ["model.layers.1"]},
     lambda name: "bf16" if ".layers.1." in name else "fp8_block"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128,
      "dynamic": {"-:.*self_attn.*": {}, r"+:.*layers\.[01]\..*": {"bits": 8, "group_size": 32}}},
     lambda name: "bf16" if "self_attn" in name else "w8a16_g32_zp" if re.search("layers.[01]", name) else "w4a16"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 64, "modules_in_block_to_quantize": [["self_attn.q_proj"]]},
     lambda name: "w4a16_g64_zp" if name.endswith("q_proj") else "bf16"),
    ({"quant_method": "awq_marlin", "bits": 4, "group_size": 64, "modules_to_not_convert": ["self_attn", "layers.1"]},
     lambda name: "bf16" if "self_attn" in name or ".layers.1." in name else "w4a16_g64_zp"),
    # AutoAWQ's own lists: of Mixtral (models/mixtral.py), where experts are one module; parts of names, digits as well
    *(({"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": [name]}, scheme_of)
      for name, scheme_of in [
          ("gate", lambda name: "w4a16"), ("mlp.gate", lambda name: "w4a16"), ("experts.0.up", lambda name: "w4a16"),
          ("mlp", lambda name: "bf16" if "experts" in name else "w4a16"),
          ("4.mlp.exp", lambda name: "bf16" if "layers.4.mlp.experts" in name else "w4a16"),
          ("yers.2", lambda name: "bf16" if ".layers.2." in name else "w4a16"), ("v_pr", lambda name: (
              "bf16" if name.endswith("v_proj") else "w4a16"))]),
    ({"quant_method": "intel/auto-round", "bits": 4, "group_size": 128, "extra_config": {
        "model.layers.2.self_attn.o_proj": {"bits": 16}, r".*layers\.3\.mlp.*": {"bits": 8, "group_size": 64}}},
     lambda name: "bf16" if name.endswith("2.self_attn.o_proj") else "w8a16_g64_zp" if "3.mlp" in name else "w4a16"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["lm_head", "model.layers.1*", "*.q_proj"]},
     lambda name: "bf16" if ".layers.1." in name or "q_proj" in name else "nvfp4"),
    ({"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": {
        **{f"model.layers.{i}.mlp.experts": {"quant_algo": "NVFP4"} for i in range(LAYERS)},
        "model.layers.4.self_attn.k_proj": {"quant_algo": "MXFP8"}}}, "producer": {"name": "modelopt"}},
     lambda name: "nvfp4" if "experts" in name else "mxfp8" if name.endswith("4.self_attn.k_proj") else "bf16"),
    ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {
        "model.layers.*.mlp.experts*": {"quant_algo": "NVFP4"}, "model.layers.1.self_attn.*": {"quant_algo": "FP8"}}},
     lambda name: "nvfp4" if "experts" in name else "fp8" if ".layers.1." in name else "bf16"),
    # of MiniMax (vLLM 0.33.0, quantization/__init__.py) and of SGLang 0.5.23 (quantization/)
    ({"quant_method": "mxfp8", "weight_block_size": [1, 32], "ignored_layers": ["model.layers.0.self_attn"]},
     lambda name: "bf16" if "layers.0.self_attn" in name else "mxfp8"),
    ({"quant_method": "w8a8_int8"}, lambda name: "int8"),
    ({"quant_method": "w8a8_fp8"}, lambda name: "fp8"),
    ({"quant_method": "blockwise_int8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
     lambda name: "int8_block"),
    ({"quant_method": "w4afp8", "moe_activation_scheme": "static"}, experts_else("w4a8", "fp8_block")),
    ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ", "group_size": 128, "ignore": ["*self_attn*"]},
     experts_else("w4a8")),
    ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, lambda name: "fp8_block"),
    ({"quant_method": "quark", "global_quant_config": {
        "weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32}, "input_tensors": {"dtype": "fp4"}},
      "exclude": ["lm_head"], "layer_quant_config": {"*self_attn*": {
          "weight": {"dtype": "fp8_e4m3"}, "input_tensors": {"dtype": "fp8_e4m3"}}}, "export": {"kv_cache_group": []}},
     experts_else("mxfp4", "fp8")),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["o_proj"]},
     lambda name: "bf16" if name.endswith("o_proj") else "w4a16_nf4"),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "scheme_of"), CASES)
def test_every_module_is_stored_as_its_own_entry_says(
    table: Any, entry: dict[str, Any], scheme_of: Callable[[str], str]
) -> None:
    assert counted(table, entry) == pytest.approx(by_hand(scheme_of), rel=1e-12)


def test_the_older_key_of_compressed_tensors_is_read(table: Any) -> None:
    entry = compressed(FP8 | {"targets": ["Linear"]})
    assert counted(table, entry, "compression_config") == counted(table, entry)


def test_mlx_counts_scales_and_biases_of_head_and_embedding_too(table: Any) -> None:
    entry = {"group_size": 64, "bits": 4, "model.layers.1.self_attn.q_proj": {"group_size": 64, "bits": 8},
             "model.layers.2.self_attn.q_proj": False}  # fmt: skip
    schemes = {"model.layers.1.self_attn.q_proj": "w8a16_g64_bias", "model.layers.2.self_attn.q_proj": "bf16"}
    narrow = SCHEMES["w4a16_g64_bias"].weight_bytes
    assert narrow == 0.5 + 2 * 2 / 64
    expected = by_hand(lambda name: schemes.get(name, "w4a16_g64_bias")) - 2 * VOCABULARY * HIDDEN * (BF16 - narrow)
    assert counted(table, entry, "quantization") == pytest.approx(expected, rel=1e-12)


EIGHT, FOUR = {"quant_algo": "FP8"}, {"quant_algo": "NVFP4"}


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(MODULES)), st.sampled_from([EIGHT, FOUR])), st.randoms())
def test_random_lists_of_modules_add_up(table: Any, layers: dict[str, dict[str, str]], random: Any) -> None:
    """Experts' first matmul holds two modules of a checkpoint, which engines want alike: so are these."""
    for name in [name for name in layers if name.endswith("experts.0.up_proj")]:
        layers[name.replace("up_proj", "gate_proj")] = layers[name]
    for name in [name for name in layers if name.endswith("experts.0.gate_proj")]:
        layers[name.replace("gate_proj", "up_proj")] = layers[name]
    names = list(layers)
    random.shuffle(names)
    entry = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION",
             "quantized_layers": {name: layers[name] for name in names} or {"nowhere": EIGHT}}  # fmt: skip
    algorithms = {"FP8": "fp8", "NVFP4": "nvfp4"}
    expected = by_hand(lambda name: algorithms[layers[name]["quant_algo"]] if name in layers else "bf16")
    assert counted(table, entry) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(0, LAYERS - 1)), st.sets(st.sampled_from(sorted(ATTENTION))))
def test_random_exclusions_add_up(table: Any, layers: set[int], projections: set[str]) -> None:
    kept = [f"model.layers.{i}.mlp.experts" for i in layers] + [f"re:.*self_attn\\.{name}$" for name in projections]

    def scheme_of(name: str) -> str:
        excluded = int(name.split(".")[2]) in layers if "experts" in name else name.split(".")[-1] in projections
        return "bf16" if excluded else "fp8"

    entry = {"quant_method": "fp8", "modules_to_not_convert": kept}
    assert counted(table, entry) == pytest.approx(by_hand(scheme_of), rel=1e-12)


def test_split_layers_keep_every_row_and_parameter(table: Any) -> None:
    quantization = from_config({**CONFIG, "quantization_config": CASES[6][0]})
    split = by_precision(table, quantization)
    assert split.total_params() == table.total_params()
    assert sorted(split.layer_kinds.count(kind) for kind in set(split.layer_kinds)) == [1, 1, LAYERS - 2]
    for name in {op.name for op in table.ops}:
        before, after = (sum(one.count(op) for op in one.ops if op.name == name) for one in (table, split))
        assert before == after, name


@pytest.mark.parametrize(
    ("entry", "kv"),
    [
        (compressed(FP8 | {"targets": ["Linear"]}, kv_cache_scheme={"num_bits": 8, "type": "float"}), "fp8"),
        (compressed(FP8 | {"targets": ["Linear"]}, kv_cache_scheme=None), "bf16"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, "fp8"),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8",
          "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": None}, "bf16"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "INT8"}, "bf16"),
        ({"quant_method": "fp8"}, "bf16"),
    ],
)  # fmt: skip
def test_the_cache_has_the_precision_that_the_checkpoint_gives_it(entry: dict[str, Any], kv: str) -> None:
    assert from_config({**CONFIG, "quantization_config": entry}).kv == kv


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP3_MAGIC"}}, "FP3_MAGIC"),
        ({"quantization_config": {"quant_method": "hqq", "nbits": 4}}, "hqq"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": -1}}, "weight_block_size=-1"),
        ({"quantization_config": {"quant_method": "mxfp8", "weight_block_size": True}}, "weight_block_size=True"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}}, "quantized_layers"),
        ({"quantize": "w8a8_dynamic"}, "w8a8_dynamic"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 48}}, "groups of 48"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": -7}}, "group_size = -7"),
        ({"quantization_config": {"quant_algo": "NVFP4", "group_size": 32}}, "groups of 32"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {
            "model.layers.0.mlp.experts": {"quant_algo": "MXFP8", "group_size": 64}}}}, "groups of 64"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}}},
         "config_groups.W4A16 = ['Linear']"),
        ({"quantization_config": {"global_quant_config": {"weight": {"dtype": "fp6"}}}}, "fp6"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "dynamic": {"-:(": {}}}}, "regular expression"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_its_name(config: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=re.escape(word)):
        from_config({**CONFIG, **config}).scheme("model.layers.0.self_attn.q_proj.weight", "linear")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in an entry an object stands that says something."""
    if isinstance(value, dict) and value:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


WITH_CACHE = compressed(
    FP8 | {"targets": ["Linear"]},
    kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True},
)
METHODS: list[dict[str, Any]] = [
    *(entry for entry, _ in CASES), WITH_CACHE, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    {"quant_method": "modelopt", "quant_algo": "NVFP4", "config_groups": {"group_0": {**NVFP4, "targets": ["Linear"]}},
     "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}},
    {"quant_method": "fp8", "moe_quant_algo": "NVFP4", "group_size": 16, "config_groups": {"group_0": NVFP4},
     "quantized_layers": {"layers.0.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16}}},
    {"quant_method": "quark", "global_quant_config": {
        "weight": [{"dtype": "fp4", "group_size": 16}, {"dtype": "fp8_e4m3"}],
        "input_tensors": [{"dtype": "fp4", "group_size": 16}]},
     "kv_cache_quant_config": {"*k_proj": {"output_tensors": {"dtype": "fp8_e4m3", "is_dynamic": False}}},
     "layer_type_quant_config": {"nn.Linear": {"weight": {"dtype": "int8"}}},
     "export": {"kv_cache_group": ["*k_proj"]}},
    {"quant_method": "mlx", "bits": 4, "group_size": 64, "model.layers.0.mlp": {"bits": 8, "group_size": 64}},
]  # fmt: skip
EVERY_PLACE = [(entry, place) for entry in METHODS for place in places(entry)]


@pytest.mark.parametrize(("entry", "place"), EVERY_PLACE)
@pytest.mark.parametrize("value", [7, "rotated", {"rotation": "hadamard"}], ids=["number", "word", "object"])
def test_a_key_that_is_not_known_is_said_wherever_it_stands(
    entry: dict[str, Any], place: tuple[Any, ...], value: Any
) -> None:
    """By its name in what is not used, or in one line where the value cannot be the module's that it would name."""
    entry = copy.deepcopy(entry)
    inner = entry
    for key in place:
        inner = inner[key]
    assert not any("spinning" in key for key in from_config({**CONFIG, "quantization_config": entry}).unread)
    inner["spinning"] = value
    try:
        found = from_config({**CONFIG, "quantization_config": entry}).unread
    except InputError as refusal:
        found = (str(refusal),)
    assert any("spinning" in key for key in found), found


@pytest.mark.parametrize("entry", METHODS)
def test_what_methods_write_is_used(entry: dict[str, Any]) -> None:
    assert from_config({**CONFIG, "quantization_config": entry}).unread == ()


def test_keys_that_nobody_used_are_kept_by_name() -> None:
    entry = {"quant_method": "fp8", "activation_scheme": "dynamic", "rotation": "hadamard", "nothing": None}
    assert from_config({**CONFIG, "quantization_config": entry}).unread == ("rotation",)


@pytest.mark.parametrize(
    ("name", "content", "scheme"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["*attn*"]}}, "nvfp4"),
        ("quantize_config.json", {"bits": 8, "group_size": 128}, "w8a16_g128_zp"),
    ],
)
def test_files_beside_the_config_are_read(tmp_path: Path, name: str, content: Any, scheme: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_text(json.dumps(content))
    for place in (tmp_path, tmp_path / "config.json"):
        assert checkpoint(load_model(place)).experts.name == scheme
    (tmp_path / name).write_text("{")
    with pytest.raises(InputError, match=name):
        load_model(tmp_path)


def test_a_config_of_its_own_comes_before_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {"quant_method": "fp8"}}))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert checkpoint(load_model(tmp_path)).experts.name == "fp8"


def test_what_a_device_lacks_runs_weight_only() -> None:
    stored = from_config({**CONFIG, "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}})
    hopper, blackwell = {"bf16", "fp8", "int8"}, {"bf16", "fp8", "fp4"}
    assert as_run(stored, hopper, "Hopper").experts == SCHEMES["w4a16_nvfp4"]
    assert SCHEMES["w4a16_nvfp4"].weight_bytes == SCHEMES["nvfp4"].weight_bytes
    assert not as_run(stored, hopper, "Hopper").experts.quantizes_activation
    assert as_run(stored, blackwell, "Blackwell").experts == stored.experts
    assert weight_only_here(stored, hopper) == "nvfp4" and not weight_only_here(stored, blackwell)


MIXTRAL = {**CONFIG, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": EXPERTS}


def test_modules_are_known_by_the_names_that_their_checkpoint_has(tmp_path: Path) -> None:
    """Mixtral's experts are block_sparse_moe.experts.N.w1 to w3 there, and one tensor for all in its class."""
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    table = traced(load_model(tmp_path), "decode")
    entry = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {
        f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}": {"quant_algo": "NVFP4"}
        for i in range(2) for e in range(EXPERTS) for w in ("w1", "w2", "w3")}}  # fmt: skip
    plain, mixed = (from_config({**MIXTRAL, **some}) for some in ({}, {"quantization_config": entry}))
    saved = weight_bytes(table, plain) - weight_bytes(by_precision(table, mixed), mixed)
    assert saved == pytest.approx(2 * sum(EXPERT.values()) * (BF16 - SCHEMES["nvfp4"].weight_bytes), rel=1e-9)


@pytest.mark.parametrize("entry", [
    compressed(FP8 | {"targets": ["Linear"]}, kv_cache_scheme={"num_bits": 8, "type": "int"}),
    compressed(FP8 | {"targets": ["Linear"]}, kv_cache_scheme={"num_bits": 4, "type": "float"}),
    {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "NVFP4"},
])  # fmt: skip
def test_a_cache_of_another_precision_is_said_not_to_be_used(entry: dict[str, Any]) -> None:
    found = from_config({**CONFIG, "quantization_config": entry})
    assert found.kv == "bf16"
    assert any(path.startswith("kv_cache_") for path in found.unread)


def test_a_block_may_be_written_as_a_word() -> None:
    weights = {"type": "float", "num_bits": 8, "strategy": "block"}
    schemes = [
        from_config({**CONFIG, "quantization_config": compressed({
            "weights": {**weights, "block_structure": block}, "input_activations": FP8["input_activations"],
            "targets": ["Linear"],
        })}).linear
        for block in ([128, 128], "128x128")
    ]  # fmt: skip
    assert schemes[0] == schemes[1] == SCHEMES["fp8_block"]


def test_compressed_caches_are_kept_in_fp8() -> None:
    """DeepSeek-V4, whatever its weights are in (vLLM 0.33.0 and SGLang 0.5.23 set it so)."""
    plain = {"model_type": "deepseek_v4", "compress_ratios": [0, 4, 128]}
    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    assert [from_config(one).kv for one in (plain, {**plain, **fp8}, {"text_config": plain})] == ["fp8"] * 3
    assert from_config({"model_type": "deepseek_v4", "compress_ratios": [0, 0]}).kv == "bf16"
