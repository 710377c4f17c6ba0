"""Every backend as an experts implementation of transformers, so that a stock model runs on it by name.

``model.set_experts_implementation("tensor_cast_masked")`` after importing this module. Experts keep their own weights;
blocks, gates and shared experts stay transformers'. For exchanges, placements and quantised experts use ``apply_moe``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface

from tensorcast.errors import InputError
from tensorcast.modeling.experts import routed_experts
from tensorcast.modeling.moe.backends import all_backends

PREFIX = "tensor_cast_"


def experts_forward(
    self: Any, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *_: Any, backend: str, **__: Any
) -> Tensor:
    """``x [T,H]``, indices and weights ``[T,k]`` -> ``[T,H]`` on an experts module of transformers.

    Under transformers' own expert parallelism ids of other ranks' experts lie at the number of local ones; their
    weights are zero and their rows are left out.
    """
    index = torch.where(top_k_index < self.down_proj.shape[0], top_k_index, -1)
    return routed_experts(self, x, index, top_k_weights, backend=backend)


def register_implementations() -> list[str]:
    """Register ``tensor_cast_<backend>`` for every backend there is; returns the names.

    Importing this module does so once; call it again after ``register_backend``.
    """
    names = [PREFIX + backend for backend in all_backends()]
    for name, backend in zip(names, all_backends(), strict=True):
        ExpertsInterface.register(name, partial(experts_forward, backend=backend))
    return names


def use_backend(model: Any, backend: str) -> None:
    """Run a stock transformers model's experts on one of our backends.

    Raises :class:`InputError` for an unknown backend, or where the model's experts are outside transformers' interface
    (``apply_moe`` takes those).
    """
    names = register_implementations()
    if not any(hasattr(module, "has_post_expert_norm") for module in model.modules()):
        # transformers takes the name without a word where no experts would hear it (Llama-4 in 5.23)
        raise InputError(f"{type(model).__name__}: its experts are outside transformers' interface; use apply_moe")
    if PREFIX + backend not in names:
        raise InputError(f"unknown experts backend {backend!r}: choose one of {', '.join(all_backends())}")
    try:
        model.set_experts_implementation(PREFIX + backend)
    except (AttributeError, ValueError) as reason:
        raise InputError(f"{type(model).__name__}: its experts take no implementation by name: {reason}") from None


register_implementations()
