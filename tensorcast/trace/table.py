"""The op table: what one step does on one rank, with every size in closed form."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar

from tensorcast.profiles.facts import ModelFacts
from tensorcast.trace.dims import Dim, Sizes, product

Found = TypeVar("Found")
Rest = ParamSpec("Rest")


def per_table(function: Callable[Concatenate[OpTable, Rest], Found]) -> Callable[Concatenate[OpTable, Rest], Found]:
    """Remember what ``function`` finds in a table's ops and params for its other arguments.

    By identity: tables hold dicts. How many layers there are must not matter: tables that differ in no more share it.
    """
    found: dict[tuple[Hashable, ...], tuple[OpTable, Found]] = {}

    @functools.wraps(function)
    def remembered(table: OpTable, *rest: Rest.args, **named: Rest.kwargs) -> Found:
        key = (id(table.ops), id(table.params), *rest, *named.items())
        if key not in found:
            if len(found) >= 4096:
                found.pop(next(iter(found)))
            found[key] = table, function(table, *rest, **named)  # the table stays alive, so its ids stay its own
        return found[key][1]

    return remembered


STATEFUL = frozenset({"linear_attention", "ssm_scan"})
"""Ops whose fourth input, where there is one, and second output are a state that each sequence keeps."""

CACHING = STATEFUL | {"kv_cache_write", "attention", "causal_conv1d"}
"""Ops that tell what is kept of a sequence."""

EVERY_TOKEN = "every_token"
"""In the path of what runs on all tokens in a layer that else runs on the ends of prompts."""

MOST_OPS = 1 << 17
"""Rows of which is kept what was found of them."""


def per_op(function: Callable[[Op], Found]) -> Callable[[Op], Found]:
    """Remember what ``function`` finds of a row, by identity: tables of one model share most of theirs."""
    found: dict[int, tuple[Op, Found]] = {}

    @functools.wraps(function)
    def remembered(op: Op) -> Found:
        known = found.get(id(op))
        if known is None:
            if len(found) >= MOST_OPS:
                found.clear()
            known = found[id(op)] = op, function(op)  # the row stays alive, so that its id stays its own
        return known[1]

    return remembered


_shapes: dict[int, tuple[tuple[Dim, ...], int]] = {}
_numbers: dict[tuple[Dim, ...], int] = {}


def shape_number(dims: tuple[Dim, ...]) -> int:
    """A number for these sizes, by identity where they have been asked for: they are long to compare, and the tensors
    of a model share them."""
    known = _shapes.get(id(dims))
    if known is None:
        if len(_shapes) >= MOST_OPS:
            _shapes.clear()
        known = _shapes[id(dims)] = dims, _numbers.setdefault(dims, len(_numbers))  # which stay alive, as above
    return known[1]


DTYPE_BYTES: dict[str, float] = {
    "float32": 4,
    "float64": 8,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "complex64": 8,
    # Quantised activations with their scales: see modeling/quantization.py.
    "act_fp8": 1,
    "act_fp8_block": 1 + 4 / 128,
    "act_int8": 1,
    "act_nvfp4": 0.5 + 1 / 16,
    "act_mxfp8": 1 + 1 / 32,
    "mxfp8": 1 + 1 / 32,  # rows of tables, likewise
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One operand: logical shape, which dims are only expanded views (read once), dtype, identity of its storage."""

    dims: tuple[Dim, ...]
    dtype: str
    storage: int = -1
    weight: str = ""
    expanded: tuple[int, ...] = ()
    offset: int = 0

    def numel(self, sizes: Sizes) -> Any:
        """Elements that lie in memory: expanded dims count once."""
        value: Any = 1.0
        for dim in product(self.dims, self.expanded):
            value = value * dim.at(sizes)
        return value

    def bytes(self, sizes: Sizes) -> Any:
        """Bytes in the traced dtype."""
        return self.numel(sizes) * DTYPE_BYTES[self.dtype]

    def shape(self) -> str:
        return "[" + ", ".join(str(d) for d in self.dims) + "]"


@dataclass(frozen=True, slots=True)
class Op:
    """One row. ``kind``: the layer kind it belongs to (-1: outside the layers); ``stage``: its place in a MoE block."""

    name: str
    module: str
    kind: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    stage: str = ""
    shard: str = ""
    parts: tuple[str, ...] = ()

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(t.weight for t in self.inputs if t.weight)

    def but(self, **changes: Any) -> Op:
        """The row with these fields, several times quicker than ``dataclasses.replace``: tables have many rows."""
        return Op(*(changes.get(name, getattr(self, name)) for name in self.__slots__))


@per_op
def _with_attrs(op: Op) -> dict[tuple[str, Hashable], Op]:
    return {}


def with_attr(op: Op, name: str, value: Hashable) -> Op:
    """The row with another attribute: one object for all that ask, so that plans share it."""
    known = _with_attrs(op)
    if (name, value) not in known:
        known[name, value] = op.but(attrs={**op.attrs, name: value})
    return known[name, value]


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of one layer kind (or outside the layers): this rank's elements and the whole model's."""

    name: str
    module: str
    kind: int
    numel: int
    full_numel: int
    dtype: str
    role: str
    """``linear``, ``experts``, ``embedding``, ``lm_head``, ``tables`` (of rows that a token's neighbours name) or
    ``other``."""
    shape: tuple[int, ...] = ()
    stored: tuple[str, ...] = ()
    """Modules of a checkpoint that hold it, where their names are not its own; of experts those of the first."""


@dataclass(frozen=True)
class OpTable:
    """A step of one phase at one tensor-parallel size."""

    model: str
    phase: str
    tp: int
    ops: tuple[Op, ...]
    layer_kinds: tuple[int, ...]
    kind_names: tuple[str, ...]
    params: tuple[Param, ...]
    facts: ModelFacts

    def count(self, op: Op | Param, layers: slice = slice(None)) -> int:
        """How often a row runs in one step: layers of its kind, or once."""
        return self.layer_kinds[layers].count(op.kind) if op.kind >= 0 else 1

    @property
    def ends(self) -> frozenset[int]:
        """Kinds of the layers that are needed for the ends of prompts alone."""
        return frozenset(self.layer_kinds[self.facts.ends_from :]) if self.facts.ends_tokens else frozenset()

    def total_params(self) -> int:
        """Parameters of the whole model (tied weights once)."""
        return sum(p.full_numel * self.count(p) for p in self.params)

    def active_params(self, with_embedding: bool = True, with_head: bool = True) -> int:
        """Parameters that one token uses: ``top_k`` of the experts; embedding and head counted or not, as published."""
        share = self.facts.top_k / max(self.facts.num_experts, 1)
        total = 0.0
        for p in self.params:
            if p.role == "tables":  # of which a token reads a few rows
                continue
            if p.role == "embedding" and not (with_embedding or (self.facts.tied_embedding and with_head)):
                continue
            if p.role == "lm_head" and not with_head:
                continue
            total += p.full_numel * self.count(p) * (share if p.role == "experts" else 1)
        return math.floor(total)


@per_table
def has_states(table: OpTable) -> bool:
    """Whether its layers keep a state of each sequence."""
    return any(op.name in STATEFUL for op in table.ops)


def layer_ranges(indices: list[int]) -> str:
    """Layer numbers for people: ``3-60``, ``0-34:2``, ``0,5,7``."""

    def runs() -> Iterator[str]:
        i = 0
        while i < len(indices):
            step = indices[i + 1] - indices[i] if i + 1 < len(indices) else 1
            j = i
            while j + 1 < len(indices) and indices[j + 1] - indices[j] == step:
                j += 1
            long_enough = j - i >= 2 or (step == 1 and j > i)
            if long_enough:
                yield f"{indices[i]}-{indices[j]}" + (f":{step}" if step > 1 else "")
                i = j + 1
            else:
                yield str(indices[i])
                i += 1

    text = ",".join(runs())
    return text if len(text) <= 24 else f"{indices[0]}..{indices[-1]} x{len(indices)}"
