"""Layer and step level: the rewritten model for real, its decoder layers end to end, and the whole step where it fits.

The same modules that are traced run here on random weights. First transformers' own eager layer runs, then the model is
put on the package's experts and attention in place, and every kind of layer is compared on the same input.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.cache_utils import DynamicCache

from tensorcast.deploy.workload import Workload
from tensorcast.measure.operands import Unsupported
from tensorcast.measure.timing import time_calls
from tensorcast.modeling import attention  # registers the attention function
from tensorcast.modeling.attention import past_length
from tensorcast.modeling.custom import CustomConfig, CustomLM
from tensorcast.modeling.described.config import DescribedConfig
from tensorcast.modeling.described.model import DescribedLM
from tensorcast.modeling.experts import NAME, adapt_experts
from tensorcast.trace.layers import decoder_layers

CHECK_TOKENS = 24
"""Tokens of the comparison with transformers' eager layer."""


@dataclass(frozen=True)
class Checked:
    """Rewritten against transformers' eager layer: largest difference relative to the largest output."""

    kind: str
    layer: int
    dtype: str
    relative_error: float


def stock_model(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' causal LM with fresh random weights, all eager. Raises :class:`Unsupported` where there is none."""
    if isinstance(config, CustomConfig | DescribedConfig):
        with torch.device(device):
            own = CustomLM(config) if isinstance(config, CustomConfig) else DescribedLM(config)
        return own.to(dtype).eval().requires_grad_(False)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="eager")
    except ValueError as reason:
        raise Unsupported(str(reason).strip().splitlines()[0][:160]) from None
    model.eval().requires_grad_(False)
    with contextlib.suppress(ValueError, KeyError, AttributeError):
        model.set_experts_implementation("eager")
    return model


def rewrite(model: Any) -> Any:
    """Put the model's attention and experts on the package's ops, in place, weights and all."""
    model.set_attn_implementation(NAME)
    with contextlib.suppress(ValueError, KeyError, AttributeError):  # no decorated experts: adapted below
        model.set_experts_implementation(NAME)
    adapt_experts(model)
    return model


@contextlib.contextmanager
def _seen(layers: Sequence[nn.Module]) -> Iterator[dict[int, tuple[Any, Any, Any]]]:
    """Inside, what each layer is called with and returns, by its index."""
    found: dict[int, tuple[Any, Any, Any]] = {}

    def hook(i: int) -> Any:
        def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            found[i] = (args, kwargs, out)

        return after

    hooks = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield found
    finally:
        for one in hooks:
            one.remove()


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def check_layers(model: Any, config: PreTrainedConfig, kinds: Sequence[int], names: Sequence[str]) -> list[Checked]:
    """Run ``model`` eager, rewrite it, and compare one layer of each kind on the very input that the eager one had."""
    _, layers = decoder_layers(model)
    parameter = next(model.parameters())
    generator = torch.Generator(device=parameter.device).manual_seed(0)
    ids = torch.randint(
        0, config.vocab_size, (1, CHECK_TOKENS), device=parameter.device, generator=generator
    )
    with torch.inference_mode(), _seen(list(layers)) as seen:
        model(input_ids=ids, use_cache=False)
    rewrite(model)
    _, layers = decoder_layers(model)
    found = []
    for kind, name in enumerate(names):
        i = list(kinds).index(kind)
        args, kwargs, expected = seen[i]
        with torch.inference_mode(), past_length(0):
            out = layers[i](*args, **{**kwargs, **({"attention_mask": None} if "attention_mask" in kwargs else {})})
        wanted = _first(expected).float()
        # what the layer adds to its input is what it computes
        added = wanted - (args[0] if args else kwargs["hidden_states"]).float()
        off = float((_first(out).float() - wanted).abs().max() / added.abs().max())
        found.append(Checked(name, i, str(parameter.dtype).removeprefix("torch."), off))
    return found


class RunCache(DynamicCache):
    """A cache that already holds ``past`` random tokens and takes the new ones into their place, call after call."""

    past_len = 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        held: dict[int, tuple[Tensor, Tensor]] = self.__dict__.setdefault("held", {})
        if layer_idx not in held:
            held[layer_idx] = tuple(self._whole(new) for new in (key_states, value_states))  # type: ignore[assignment]
        for whole, new in zip(held[layer_idx], (key_states, value_states), strict=True):
            whole[..., self.past_len :, :] = new
        return held[layer_idx]

    def _whole(self, new: Tensor) -> Tensor:
        shape = (*new.shape[:-2], self.past_len + new.shape[-2], new.shape[-1])
        return torch.randn(shape, dtype=torch.float32, device=new.device).to(new.dtype)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past_len

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.past_len + query_length, 0


@dataclass(frozen=True)
class TimedLayer:
    """End to end seconds of one layer kind (``kind`` -1: the whole step of the model as cut)."""

    kind: int
    workload: Workload
    timing: Any
    problem: str = ""


def time_layers(
    model: Any, config: PreTrainedConfig, workload: Workload, kinds: Sequence[int], effort: float
) -> Iterator[TimedLayer]:
    """Each layer kind of a rewritten model, and its whole step, at one workload."""
    device = next(model.parameters()).device
    _, layers = decoder_layers(model)
    cache = RunCache(config=config)
    cache.past_len = workload.context
    new = workload.input_len
    inputs: dict[str, Any] = {
        "input_ids": torch.randint(0, config.vocab_size, (workload.batch, new), device=device),
        "position_ids": torch.arange(workload.context, workload.context + new, device=device)[None],
        attention.cache_argument(type(model).forward): cache, "use_cache": True,
    }
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        inputs["logits_to_keep"] = 1
    try:
        with torch.inference_mode(), past_length(workload.context):
            with _seen(list(layers)) as seen:
                model(**inputs)
            alone = not isinstance(config, CustomConfig)  # its layers find the cache only inside the model's own call
            for kind in sorted(set(kinds)) if alone else ():
                i = list(kinds).index(kind)
                args, kwargs, _ = seen[i]
                yield TimedLayer(kind, workload, time_calls([partial(layers[i], *args, **kwargs)], device, effort))
            yield TimedLayer(-1, workload, time_calls([partial(model, **inputs)], device, effort))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, KeyError) as reason:
        line = (str(reason).strip() or type(reason).__name__).splitlines()[0][:160]
        yield TimedLayer(-1, workload, None, line)
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
