"""How an op enters the ``tensor_cast`` namespace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tensorcast.ops.gradients import GRADIENTS, refused

NAMESPACE = "tensor_cast"
_library = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str, *, fake: Callable[..., Any], real: Callable[..., Any] | None) -> None:
    """Register ``tensor_cast::<schema>`` with its fake kernel and, unless it is only ever traced, its real one.

    Its gradient is in :data:`tensorcast.ops.gradients.GRADIENTS`; without one, its backward pass is an error. Python
    kernels repeat the schema's defaults: the dispatcher drops arguments that equal them.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if real is not None:
        _library.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    setup, backward = GRADIENTS.get(name) or refused(name)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup, lib=_library)
