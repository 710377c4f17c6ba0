"""One row: kernel or collective, with its fitted correction."""

from __future__ import annotations

from typing import Any

from tensorcast.trace.table import Op

_numbers: dict[tuple[Any, ...], int] = {}


def content_of(op: Op) -> int:
    """A number for all that an op's price depends on, beside the sizes: equal ops of any layer or table share it."""
    tensors = [[(t.dims, t.dtype, bool(t.weight), t.expanded) for t in some] for some in (op.inputs, op.outputs)]
    changes = sorted((name, str(value)) for name, value in op.attrs.items())
    key = (op.name, *map(tuple, tensors), tuple(changes))
    return _numbers.setdefault(key, len(_numbers))


EXCHANGE_SMS = 20.0
"""Processors that DeepEP's two-stage kernels take by default (github.com/deepseek-ai/DeepEP at 189df34,
deep_ep/buffers/legacy.py, ``Buffer.num_sms``)."""
