"""Stock MoE blocks with fresh random weights, run by transformers' own eager code."""

from __future__ import annotations

from typing import Any

import torch
from families import SMALL
from transformers import AutoModelForCausalLM

from tensorcast.modeling.config import hf_config
from tensorcast.modeling.experts import is_stacked
from tensorcast.profiles.model import ModelProfile

MOE = [name for name in SMALL if name != "llama"]


def randomize(model: Any) -> Any:
    """Fresh random weights and correction biases; experts run by transformers' eager loop."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.normal_(0.0, 0.05)
    return model


def block_of(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The last MoE block of a small model of the family."""
    config = hf_config(ModelProfile(name=family, hf_id=family, description="d", sources={}, config=SMALL[family]))
    torch.manual_seed(seed)
    model = randomize(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    return [m for m in model.modules() if any(is_stacked(child) for child in m.children())][-1].to(dtype)
