"""A stock transformers model on meta that speaks our ops."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tensorcast.errors import InputError
from tensorcast.modeling import attention  # noqa: F401  (registers the attention function)
from tensorcast.modeling.experts import NAME, adapt_experts


def build(config: PreTrainedConfig, *, dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> nn.Module:
    """The model of ``config`` with our experts and attention functions behind transformers' own interfaces.

    Raises :class:`InputError` when no causal language model of transformers takes the config.
    """
    with torch.device(device):
        try:
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=NAME)
        except ValueError as reason:
            line = str(reason).strip().splitlines()[0]
            raise InputError(
                f"model_type {config.model_type!r}: transformers builds no causal LM from it: {line}"
            ) from None
    model.eval().requires_grad_(False)
    if hasattr(model, "set_experts_implementation"):
        with contextlib.suppress(ValueError, KeyError):  # a model without decorated experts has nothing to set
            model.set_experts_implementation(NAME)
    adapt_experts(model)
    return model
