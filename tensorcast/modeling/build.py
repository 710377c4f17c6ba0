"""A stock transformers model on meta that speaks our ops."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tensorcast.errors import InputError
from tensorcast.modeling import attention  # registers the attention function
from tensorcast.modeling.config import field
from tensorcast.modeling.custom import CustomConfig, CustomLM
from tensorcast.modeling.described.config import DescribedConfig
from tensorcast.modeling.described.model import DescribedLM
from tensorcast.modeling.experts import NAME, adapt_experts
from tensorcast.modeling.layer_forms import shape_layers
from tensorcast.modeling.moe.apply import check_blocks
from tensorcast.profiles.model import MoEFields


class TextWithHead(nn.Module):
    """The text model of a multimodal family under an output head: what its conditional-generation class computes."""

    def __init__(self, model: Any, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.lm_head = nn.Linear(field(config, "hidden_size"), field(config, "vocab_size"), bias=False, dtype=dtype)
        if getattr(config, "tie_word_embeddings", False):
            self.lm_head.weight = model.get_input_embeddings().weight

    def forward(
        self, input_ids: Tensor, logits_to_keep: int = 0, past_key_values: Any = None, **inputs: Any
    ) -> Tensor:
        """``[B,S]`` token ids -> logits of the last ``logits_to_keep`` positions (0: of all)."""
        inputs[attention.cache_argument(self.model.forward)] = past_key_values
        hidden = self.model(input_ids=input_ids, **inputs)[0]
        return self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)


def _text_classes(config: PreTrainedConfig) -> list[type[PreTrainedModel]]:
    """Decoders in the config's own modeling file that take exactly this config, those with a head first."""
    try:
        file = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    except ImportError:
        return []
    found = [
        value
        for value in vars(file).values()
        if inspect.isclass(value)
        and issubclass(value, PreTrainedModel)
        and getattr(value, "config_class", None) is type(config)
        and value.__name__.endswith(("ForCausalLM", "Model"))
        and "input_ids" in inspect.signature(value.forward).parameters
        and attention.cache_argument(value.forward)
    ]
    return sorted(found, key=lambda c: not c.__name__.endswith("ForCausalLM"))


def _causal(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """The causal LM that an auto class lists; one that knows no other attention than its own keeps it."""
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=NAME)
    except KeyError as reason:
        if reason.args != (NAME,):
            raise
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    model.config._attn_implementation = NAME  # so that no masks are built
    return model


def causal_lm(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """transformers' causal LM of ``config``, or for a text config that no auto class lists, its decoder and a head.

    Of a network that its profile describes, the model that it describes.
    """
    if isinstance(config, DescribedConfig):
        return DescribedLM(config, NAME).to(dtype)
    try:
        return _causal(config, dtype)
    except ValueError as reason:
        line = str(reason).strip().splitlines()[0]
        listed = type(config) in AutoModelForCausalLM._model_mapping  # then it is the config that is wrong
        decoders = [] if listed or getattr(config, "is_encoder_decoder", False) else _text_classes(config)
        if not decoders:
            raise InputError(
                f"model_type {config.model_type!r}: transformers builds no causal LM from it: {line}"
            ) from None
    model = decoders[0]._from_config(config, dtype=dtype, attn_implementation=NAME)
    return model if hasattr(model, "lm_head") else TextWithHead(model, config, dtype)


def build(
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "meta",
    fields: MoEFields = MoEFields(),
    name: str = "",
) -> nn.Module:
    """The model of ``config`` with our experts and attention functions behind transformers' own interfaces.

    ``fields``: what the profile says of its MoE blocks; every name is checked against them. Raises
    :class:`InputError` when transformers has no decoder with a language-model head for the config.
    """
    if isinstance(config, CustomConfig):
        return build_custom(config, dtype, device)
    try:
        with torch.device(device):
            model = causal_lm(config, dtype)
    # a config class that lacks what its own model reads (DBRX); values that only the class itself finds wrong
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as reason:
        if isinstance(reason, InputError):
            raise
        problem = f"transformers' class fails with its config or our attention function: {reason}"
        raise InputError(f"model_type {config.model_type!r}: {' '.join(problem.split())[:300]}") from None
    if forms := getattr(config, "layer_forms", ()):
        shape_layers(model.get_decoder().layers, forms)
    check_blocks(model, fields, name or config.model_type)
    model.eval().requires_grad_(False)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and hasattr(part, "set_experts_implementation"):
            with contextlib.suppress(ValueError, KeyError):  # a model without decorated experts has nothing to set
                part.set_experts_implementation(NAME)
            break
    adapt_experts(model)
    return model


def build_custom(config: CustomConfig, dtype: torch.dtype, device: str) -> nn.Module:
    """A user's model with our attention, and our MoE layer in the place of its blocks."""
    with torch.device(device):
        model = CustomLM(config).to(dtype)
    model.eval().requires_grad_(False)
    model.set_attn_implementation(NAME)
    model.set_experts_implementation(NAME)
    return model
