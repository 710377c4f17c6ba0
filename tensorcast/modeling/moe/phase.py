"""Which phase a forward pass is in: said once around the model's call, seen by every MoE layer inside it.

An argument would have to pass through every layer between; the context also reaches shared experts, draft (multi-token
prediction) blocks and the forward of a rank without tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from tensorcast.errors import InputError
from tensorcast.modeling.moe.backends import Phase

PHASES: tuple[Phase, ...] = ("prefill", "decode")
_current: ContextVar[Phase | None] = ContextVar("moe_phase", default=None)
_of_process: Phase | None = None
"""The same for torch.compile, which cannot read a context variable but guards on a global: one graph per phase."""


@contextmanager
def in_phase(phase: Phase) -> Iterator[None]:
    """Every MoE layer called inside runs as this phase asks. Raises :class:`InputError` on another word."""
    global _of_process
    token, before = _current.set(checked(phase)), _of_process
    _of_process = phase
    try:
        yield
    finally:
        _current.reset(token)
        _of_process = before


def current_phase() -> Phase | None:
    """The phase of the innermost :func:`in_phase` (in compiled code, of any thread); None outside."""
    return _of_process if torch.compiler.is_compiling() else _current.get()


def checked(phase: Phase) -> Phase:
    """``phase`` itself, if it is one."""
    if phase not in PHASES:
        raise InputError(f"phase {phase!r}: must be {' or '.join(PHASES)}")
    return phase
