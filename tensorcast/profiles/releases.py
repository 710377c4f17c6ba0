"""Releases that are known by name alone and keep parts of a model in bf16: their quantisation entry, in short."""

from __future__ import annotations

import re
from typing import Any

from tensorcast.profiles.memory import is_latent


def release_entry(name: str, config: dict[str, Any]) -> tuple[dict[str, Any], str] | None:
    """The ``quantization_config`` of a release and a word on it; None for those of which nothing is known.

    ``config`` is that of the model in its own precision. Sources: Meta's list of modules in its FP8 release of
    Llama-3.1-405B (https://github.com/vllm-project/vllm/issues/6746); hf_quant_config.json of nvidia/
    DeepSeek-V3-0324-NVFP4 and config.json of nvidia/Kimi-K2.5-NVFP4, as https://github.com/ai-dynamo/aiconfigurator
    keeps them; for ``v2`` the card of nvidia/DeepSeek-R1-0528-FP4-v2.
    """
    owner, _, model = name.casefold().rpartition("/")
    layers = (config.get("text_config") or config).get("num_hidden_layers") or 0
    if owner == "meta-llama" and "405b" in model and "fp8" in model:
        kept = ["re:.*self_attn.*", "model.layers.0.mlp", f"model.layers.{layers - 1}.mlp", "lm_head"]
        meta = {"quant_method": "fbgemm_fp8", "modules_to_not_convert": kept}
        return meta, "in fp8, attention and the first and last layer's MLP in bf16, as Meta stores it"
    if owner == "nvidia" and re.search(r"fp4(-v\d)?$", model) and is_latent(config):
        second = model.endswith("-v2")
        kept = ["lm_head", r"re:.*self_attn\.(?!o_proj)" if second else "*self_attn*"]
        entry: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": kept}
        said = "attention but for its output projection" if second else "attention"
        if "kimi-k2.5" in model:
            kept += ["model.layers.0*", "*shared_experts*"]
            entry["kv_cache_quant_algo"] = "FP8"
            said = "attention, shared experts and the first layer"
        return entry, f"in nvfp4, {said} in bf16, as NVIDIA stores models with latent attention"
    return None
