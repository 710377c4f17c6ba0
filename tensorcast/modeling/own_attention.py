"""Attention that a class multiplies out in code of its own (GPT-J, Falcon, BLOOM's ALiBi), as the one op.

transformers lets most classes' attention be replaced by a function; older ones multiply queries by keys, add biases
and masks, take the softmax and multiply by values. While tracing, what comes of cached keys is followed from call to
call, and the product with the values becomes attention over all that is cached.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tensorcast.modeling.attention import TraceCache, attention_forward

TC = torch.ops.tensor_cast
PRODUCTS = frozenset("matmul __matmul__ bmm baddbmm".split())
ON_SCORES = frozenset(
    "add __add__ __radd__ add_ sub __sub__ mul __mul__ __rmul__ mul_ div __truediv__ div_ where masked_fill"
    " masked_fill_ softmax dropout float to type type_as clamp tanh max maximum".split()
)
"""What a class does to scores and weights before they meet the values: the kernel's own work, in no other shape."""
VIEWS = frozenset(
    "view reshape transpose permute unsqueeze squeeze expand flatten swapaxes contiguous __getitem__".split()
)
PRECISION = frozenset("float to type type_as".split())
"""Of cached keys and values: a kernel reads them as they are."""


def attends_by_itself(layers: nn.Module) -> bool:
    """Whether no module of a model's ``layers`` asks transformers for its attention function."""
    seen: set[type[nn.Module]] = set()
    for module in layers.modules():  # most often the first layer tells, of many
        if type(module) not in seen and "ALL_ATTENTION_FUNCTIONS" in _names(type(module)):
            return False
        seen.add(type(module))
    return True


def _names(kind: type[nn.Module]) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code.co_names if code else ()


class _Role(NamedTuple):
    """What a tensor is: ``keys`` and ``values`` as cached, or ``scores`` of some queries on keys."""

    name: str
    keys: Tensor
    values: Tensor
    queries: Tensor | None = None


class OwnAttention(TorchFunctionMode):
    """Inside, products with keys and values that were written to ``cache`` are the package's attention.

    ``kv_heads``: of the config; a class that repeats heads before it caches them (Falcon) keeps more than engines do.
    """

    def __init__(self, cache: TraceCache, kv_heads: int = 0) -> None:
        super().__init__()
        self._kv_heads = kv_heads
        self._roles: dict[int, tuple[Tensor, _Role]] = {}  # the tensors stay alive, so their ids stay their own
        cache.written = self._written

    def _written(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Both as tensors of their own: a fused projection's may be one object."""
        found = keys.view_as(keys), values.view_as(values)
        own = slice(self._kv_heads or None)
        kept = keys[:, own], values[:, own]
        TC.kv_cache_write(*kept, "kv")
        for tensor, name in zip(found, ("keys", "values"), strict=True):
            self._roles[id(tensor)] = tensor, _Role(name, *kept)
        return found

    def _role(self, tensor: Any) -> _Role | None:
        return self._roles[id(tensor)][1] if isinstance(tensor, Tensor) and id(tensor) in self._roles else None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = [(t, role) for t in tree_leaves((args, kwargs)) if (role := self._role(t)) is not None]
        name = getattr(func, "__name__", "")
        if not known:
            return func(*args, **(kwargs or {}))
        tensor, role = known[0]
        if name in PRODUCTS:
            operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            if (product := self._product({role.name: (t, role) for t, role in known}, operands)) is not None:
                return product
        if name in (ON_SCORES if role.name == "scores" else PRECISION):
            return tensor
        out = func(*args, **(kwargs or {}))
        if name in VIEWS and isinstance(out, Tensor):
            self._roles[id(out)] = out, role
        return out

    def _product(self, known: dict[str, tuple[Tensor, _Role]], operands: list[Tensor]) -> Tensor | None:
        if "scores" in known and "values" in known:
            return _attention(*known["scores"])
        if "keys" not in known:
            return None
        keys, role = known["keys"]
        # before the keys, or after them as the last one
        queries = operands[next(i for i, t in enumerate(operands) if t is keys) - 1]
        scores = queries.new_empty((*queries.shape[:-1], keys.shape[-1]))
        self._roles[id(scores)] = scores, role._replace(name="scores", queries=queries)
        return scores


def _attention(scores: Tensor, role: _Role) -> Tensor:
    """Of the scores' queries, in the shape that the product of the weights with the values has."""
    assert role.queries is not None
    batch, _, new, width = role.keys.shape
    queries = role.queries.reshape(batch, -1, new, width).to(role.values.dtype)
    layer: Any = _Layer()
    out, _ = attention_forward(layer, queries, role.keys, role.values)
    return out.transpose(1, 2).reshape(*scores.shape[:-1], out.shape[-1])


class _Layer:
    """What attention is told of the module that calls it: one with a cache, causal."""

    layer_idx, config = 0, None
