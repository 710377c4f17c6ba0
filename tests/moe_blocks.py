"""Stock MoE blocks with fresh random weights, run by transformers' own eager code."""

from __future__ import annotations

from typing import Any

import census
import torch
from families import MOE_ONLY, SMALL
from torch import Tensor
from transformers import AutoModelForCausalLM

from tensorcast.modeling.build import TextWithHead, _text_classes
from tensorcast.modeling.config import hf_config
from tensorcast.modeling.moe.apply import moe_blocks
from tensorcast.profiles.model import ModelProfile

MOE = [name for name in SMALL if name != "llama"]


def randomize(model: Any) -> Any:
    """Fresh random weights, correction biases and hash tables; experts run by transformers' eager loop."""
    for module in model.modules():  # a text model inside a wrapper holds the switch itself
        if hasattr(module, "set_experts_implementation"):
            module.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.normal_(0.0, 0.05)
            if name.endswith("tid2eid"):
                buffer.copy_(torch.rand(len(buffer), 16).argsort(-1)[:, : buffer.shape[1]])
    return model


def census_model(family: str) -> Any:
    """The small model of any family that the census lists, as transformers runs it, with random weights."""
    config = hf_config(census.profile(family))
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    except ValueError:
        model = _text_classes(config)[0]._from_config(config, dtype=torch.float32, attn_implementation="eager")
        model = model if hasattr(model, "lm_head") else TextWithHead(model, config, torch.float32)
    return randomize(model.eval())


def model_of(family: str, seed: int = 0) -> Any:
    """A small model of the family."""
    said = {**SMALL, **MOE_ONLY}[family]
    config = hf_config(ModelProfile(name=family, hf_id=family, description="d", sources={}, config=said))
    torch.manual_seed(seed)
    return randomize(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())


def block_of(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, at: int = -1) -> Any:
    """A MoE block of a small model of the family, the last one unless ``at`` says another."""
    return list(moe_blocks(model_of(family, seed)))[at][1].to(dtype)


def output_of(block: Any, x: Tensor, *more: Any) -> Tensor:
    """What the stock block returns for ``x``, without its router's logits."""
    out = block(x, *more)
    out = out[0] if isinstance(out, tuple) else out
    return out.reshape(x.shape)


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value; 0 for no values of the same shape."""
    if not expected.numel():
        return 0.0 if found.shape == expected.shape else float("inf")
    return float((found - expected).abs().max() / expected.abs().max())
