"""Schemes read from Hugging Face configs, set by users, and counted in bytes."""

from __future__ import annotations

from typing import Any

import pytest

from tensorcast.cost.memory import weight_bytes
from tensorcast.errors import InputError
from tensorcast.modeling.checkpoint.read import from_config
from tensorcast.modeling.quantization import SCHEMES, Quantization, override
from tensorcast.profiles.store import load_model
from tensorcast.trace.cache import traced
from tensorcast.trace.dims import Sizes
from tensorcast.trace.precision import apply_quantization

PUBLISHED = [
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block"),
    ({"quant_method": "fp8"}, "fp8"),
    ({"quant_method": "awq", "bits": 4}, "w4a16"),
    ({"quant_method": "gptq", "bits": 4}, "w4a16"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
    ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
    (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "group_0": {
                    "weights": {"type": "int", "num_bits": 8},
                    "input_activations": {"type": "int", "num_bits": 8},
                }
            },
        },
        "int8",
    ),
    (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 4, "group_size": 128}}},
        },
        "w4a16",
    ),
    (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 4, "group_size": 32}}},
        },
        "w4a16_g32",
    ),
    (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "group_0": {
                    "weights": {"type": "float", "num_bits": 4, "group_size": 16},
                    "input_activations": {"type": "float", "num_bits": 4, "group_size": 16},
                }
            },
        },
        "nvfp4",
    ),
    (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "group_0": {
                    "weights": {"type": "float", "num_bits": 8, "strategy": "block"},
                    "input_activations": {"type": "float", "num_bits": 8, "group_size": 128},
                }
            },
        },
        "fp8_block",
    ),
]


@pytest.mark.parametrize(("said", "scheme"), PUBLISHED)
def test_published_quantisation_configs_are_read(said: dict[str, Any], scheme: str) -> None:
    found = from_config({"quantization_config": said})
    assert (found.linear.name, found.experts.name) == (scheme, scheme)


def test_gpt_oss_is_mxfp4_in_its_experts_only() -> None:
    profile = load_model("gpt-oss-20b")
    quantization, table = from_config(profile.config), traced(profile, "decode")
    schemes = {p.role: quantization.scheme(p.name, p.role, p.stored).name for p in table.params}
    assert schemes == {"embedding": "bf16", "lm_head": "bf16", "linear": "bf16", "experts": "mxfp4", "other": "bf16"}
    # Published checkpoint sizes: 12.8 GiB (20b) and 60.8 GiB (120b), gpt-oss model card, arXiv 2508.10925, table 1
    assert weight_bytes(table, quantization) / 2**30 == pytest.approx(12.8, rel=0.01)
    large = load_model("gpt-oss-120b")
    assert weight_bytes(traced(large, "decode"), from_config(large.config)) / 2**30 == pytest.approx(60.8, rel=0.01)


def test_ignored_modules_stay_bf16() -> None:
    quantization = Quantization(
        SCHEMES["fp8"],
        SCHEMES["fp8"],
        ("lm_head", "model.layers.*.self_attn", "re:.*mlp\\.gate$", "shared_expert_gate"),
    )

    def scheme(name: str, role: str = "linear") -> str:
        return quantization.scheme(name, role).name

    assert scheme("model.layers.3.self_attn.q_proj.weight") == "bf16"
    assert scheme("model.layers.3.mlp.gate.weight") == "bf16"
    assert scheme("model.layers.3.mlp.gate_proj.weight") == "fp8"
    assert scheme("model.layers.3.mlp.shared_expert_gate.weight") == "bf16"
    assert scheme("model.layers.3.mlp.experts.gate_up_proj", "experts") == "fp8"
    assert scheme("model.embed_tokens.weight", "embedding") == "bf16"


def test_overrides_set_parts() -> None:
    base = from_config({"quantization_config": {"quant_method": "fp8"}})
    assert override(base, "experts=nvfp4,kv=fp8").describe() == "linear=fp8,experts=nvfp4,kv=fp8"
    assert override(base, "bf16").describe() == "linear=bf16,experts=bf16,kv=bf16"
    assert override(base, None) == base


@pytest.mark.parametrize("text", ["fp9", "kv=int3", "router=fp8", "linear="])
def test_bad_overrides_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        override(Quantization(), text)


def test_unknown_method_says_what_to_do() -> None:
    with pytest.raises(InputError, match="set --quant to one of"):
        from_config({"quantization_config": {"quant_method": "magic"}})


def test_scales_count_in_bytes() -> None:
    """By hand: 128x128 blocks with fp32 scales; 32 weights share 1 byte; 16 weights share 1 byte."""
    assert SCHEMES["fp8_block"].weight_bytes * 128 * 128 == 128 * 128 + 4
    assert SCHEMES["mxfp4"].weight_bytes * 32 == 17
    assert SCHEMES["nvfp4"].weight_bytes * 16 == 9
    assert SCHEMES["fp8_block"].activation_bytes * 128 == 128 + 4


def test_quantised_tables_quantise_each_activation_once() -> None:
    profile = load_model("qwen3-30b-a3b-fp8")
    table = apply_quantization(traced(profile, "decode"), from_config(profile.config))
    made = [op for op in table.ops if op.name == "quantize_activation"]
    # attention in, attention out, routed tokens, experts' middle: the router and the head stay bf16
    assert len(made) == 4
    sizes = Sizes(B=7.0, S=1.0, P=9.0, R=56.0, E=128.0)
    for op in made:
        assert op.outputs[0].bytes(sizes) == pytest.approx(op.inputs[0].numel(sizes) * (1 + 4 / 128))
    schemes = {
        op.weights[0].split(".")[-2 if "proj" in op.weights[0] else -1]: op.attrs["scheme"]
        for op in table.ops
        if "scheme" in op.attrs and op.weights
    }
    assert "bf16" in schemes.values() and "fp8_block" in schemes.values()


def test_bf16_tables_have_no_quantising_kernels() -> None:
    profile = load_model("qwen3-30b-a3b")
    table = apply_quantization(traced(profile, "decode"), from_config(profile.config))
    assert all(op.name != "quantize_activation" for op in table.ops)
