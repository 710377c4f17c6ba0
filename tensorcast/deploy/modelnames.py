"""Models as tables of runs write them: ``nvidia/DeepSeek-R1-0528-FP4-v2`` is a shipped profile and a precision."""

from __future__ import annotations

import functools
import re
from typing import Any

from tensorcast.errors import InputError

SCHEME_OF = {
    "bf16": "bf16", "bfloat16": "bf16", "fp16": "bf16", "float16": "bf16", "half": "bf16", "auto": "", "default": "",
    "fp8": "fp8", "fp8_block": "fp8_block", "fp8_static": "fp8", "fp8_ootb": "fp8", "float8": "fp8", "fp8_e4m3": "fp8",
    "fp4": "nvfp4", "nvfp4": "nvfp4", "mxfp4": "mxfp4", "w4a16_mxfp4": "mxfp4",
    "int8": "int8", "int8_wo": "int8", "w8a8": "int8", "int4": "w4a16", "int4_wo": "w4a16", "w4a16": "w4a16",
    "awq": "w4a16", "gptq": "w4a16",
}  # fmt: skip
"""Precisions as people write them, and our scheme."""

_SUFFIX = re.compile(
    r"-(instruct|chat|base|hf|it|preview|fp8|(?:nv)?fp4(?:-v\d)?|mxfp4|bf16|int4|int8|awq|gptq|dynamic|static|block"
    r"|pertensor|kv|(?:quantized\.)?w\da\d+|v0\.\d|\d{4})$"
)


def model_facts(name: str, assumed: list[str]) -> tuple[str, dict[str, Any]]:
    """Profile name of a model and what reading a row needs of it: whether it has experts, its own precision."""
    profile, facts = _model_facts(name)
    if profile.casefold() != name.casefold() and facts["near"]:
        assumed.append(f"model {profile}")
    return profile, facts


@functools.lru_cache(maxsize=256)
def _model_facts(name: str) -> tuple[str, dict[str, Any]]:
    from tensorcast.modeling.quantization import checkpoint
    from tensorcast.profiles import load_model

    try:
        found, named, near, model = name, "", False, load_model(name)
    except InputError:
        (found, named), near = _nearest(name), True
        model = load_model(found)
    text = model.config.get("text_config") or model.config
    keys = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
    experts = next((text[key] for key in keys if text.get(key)), 0)
    quantization = checkpoint(model)
    own = {"linear": quantization.linear.name, "experts": quantization.experts.name}
    facts = {"num_experts": experts, "own": own, "near": near, "named": named, "positions": model.max_positions}
    return found if near else name, facts


def _nearest(name: str) -> tuple[str, str]:
    """A shipped model of the same name but for owner, fine-tuning and precision, and the precision that ``name`` says
    (empty: none); else the error that says so."""
    from tensorcast.profiles import list_models, load_model

    def stem(text: str) -> str:
        text = text.rstrip("/").rpartition("/")[2].casefold().replace("_", "-").replace("meta-llama-3", "llama-3")
        while (short := _SUFFIX.sub("", text)) != text:
            text = short
        return text

    def stems(model: str) -> set[str]:
        profile = load_model(model)
        return {stem(text) for text in (model, profile.hf_id, *profile.aliases)}

    wanted = stem(name)
    same = [model for model in list_models() if wanted in stems(model)]
    if not same:
        load_model(name)  # raises, with the known names
    return min(same, key=len), _named_precision(name)


def _named_precision(name: str) -> str:
    """Precision that a model's name ends in, as in ``Qwen3-235B-A22B-NVFP4``; empty where it names none."""
    words = [word for word in re.split(r"[-_./]", name.casefold()) if word in SCHEME_OF or word == "block"]
    said = next((word for word in words if word != "block"), "")
    # Qwen's own FP8 releases scale 128x128 blocks, as DeepSeek's do; all others scale tensors, channels or tokens
    qwen = name.casefold().startswith("qwen/") and "static" not in name.casefold()
    blocks = said == "fp8" and ("block" in words or qwen)
    return "fp8_block" if blocks else said
