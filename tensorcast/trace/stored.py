"""Op tables as JSON: every size and every tensor is written once, whatever number of rows and tables it stands in. What
is read of many models has each word once, too.

A *pack* is what ships of a model: the tables of both phases at every tensor-parallel size, or why there is none,
compressed together, since they differ in little (``profiles/traces/``).
"""

from __future__ import annotations

import functools
import json
import lzma
from collections.abc import Hashable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from sys import intern
from typing import Any

from tensorcast.profiles.facts import ModelFacts
from tensorcast.trace.dims import Dim
from tensorcast.trace.table import Op, OpTable, Param, Tensor

FORMAT = 3
"""Version of the stored form; part of the trace cache's key."""


def to_json(*tables: OpTable) -> dict[str, Any]:
    """The tables in plain lists; the later ones differ from the first in their ops alone."""
    dims: dict[Dim, int] = {}
    tensors: dict[Tensor, int] = {}

    def number(t: Tensor) -> int:
        for dim in t.dims:
            dims.setdefault(dim, len(dims))
        return tensors.setdefault(t, len(tensors))

    ops = [[_row(op, list(map(number, op.inputs)), list(map(number, op.outputs))) for op in table.ops]
           for table in tables]  # fmt: skip
    first = tables[0]
    return {
        "ops": ops,
        "tensors": [
            [[dims[dim] for dim in t.dims], t.dtype, t.storage, t.weight, t.expanded, t.offset] for t in tensors
        ],
        "dims": list(dims),
        "params": [[getattr(p, name) for name in Param.__slots__] for p in first.params],
        "facts": asdict(first.facts),
        "table": [first.model, first.phase, first.tp, first.layer_kinds, first.kind_names],
    }


def _row(op: Op, inputs: list[int], outputs: list[int]) -> list[Any]:
    sizes = {name: value for name, value in op.attrs.items() if isinstance(value, Dim)}
    plain = {name: value for name, value in op.attrs.items() if name not in sizes}
    return [op.name, op.module, op.kind, inputs, outputs, plain, sizes, op.stage, op.shard, op.parts]


def from_json(data: dict[str, Any]) -> list[OpTable]:
    """Tables from what :func:`to_json` made of them. Raises what comes of data that is none."""
    dims = [Dim(*one) for one in data["dims"]]
    shapes: dict[tuple[int, ...], tuple[Dim, ...]] = {}  # one object for all tensors of the same sizes
    for own, *_ in data["tensors"]:
        if tuple(own) not in shapes:
            shapes[tuple(own)] = tuple([dims[i] for i in own])
    tensors = [
        Tensor(shapes[tuple(own)], intern(dtype), storage, intern(weight), tuple(expanded), offset)
        for own, dtype, storage, weight, expanded, offset in data["tensors"]
    ]
    params = tuple([
        Param(
            intern(name), intern(module), kind, numel, full_numel, intern(dtype), intern(role), tuple(shape),
            tuple(map(intern, stored)),
        )
        for name, module, kind, numel, full_numel, dtype, role, shape, stored in data["params"]
    ])
    facts = ModelFacts.stored(data["facts"])
    model, phase, tp, layer_kinds, kind_names = data["table"]
    tables = []
    for rows in data["ops"]:
        ops = tuple([
            Op(
                intern(name), intern(module), kind, tuple([tensors[i] for i in inputs]),
                tuple([tensors[i] for i in outputs]),
                plain | {size: Dim(*dim) for size, dim in sizes.items()} if sizes else plain, intern(stage),
                intern(shard), tuple(map(intern, parts)),
            )
            for name, module, kind, inputs, outputs, plain, sizes, stage, shard, parts in rows
        ])  # fmt: skip
        tables.append(OpTable(
            model=model, phase=phase, tp=tp, ops=ops, layer_kinds=tuple(layer_kinds), kind_names=tuple(kind_names),
            params=params, facts=facts,
        ))  # fmt: skip
    return tables


Variant = tuple[OpTable, ...]
"""Tables that differ from the first in their ops alone."""


class Variants:
    """What is made of one trace in many forms, which differ in little: every row is here once, however many tables have
    it, and what is the same in two forms is one object. Tables are put together when they are first asked for."""

    def __init__(self) -> None:
        self.forms: dict[str, int] = {}
        """By what is asked for, the number of the variant."""
        self.asked: dict[Hashable, Variant] = {}
        """What this process has found, by other words for a form."""
        self._heads: list[OpTable] = []
        """Tables without rows."""
        self._ops: list[Op] = []
        self._each: list[tuple[int, tuple[tuple[int, ...], ...]]] = []
        """Of each variant its head, and the places of the rows of its tables."""
        self._numbers: dict[Hashable, int] = {}
        """Of heads, rows and variants, by all that they say; of those that were read once something is added."""
        self._rows: dict[tuple[int, ...], tuple[Op, ...]] = {}
        self._made: dict[int, Variant] = {}

    def find(self, form: str) -> Variant | None:
        """The tables of a form, if they are here."""
        number = self.forms.get(form)
        if number is None:
            return None
        if number not in self._made:
            head, tables = self._each[number]
            for rows in tables:
                if rows not in self._rows:
                    self._rows[rows] = tuple([self._ops[i] for i in rows])
            self._made[number] = tuple([replace(self._heads[head], ops=self._rows[rows]) for rows in tables])
        return self._made[number]

    def add(self, form: str, tables: Variant) -> None:
        """Have ``tables`` found under a form."""
        if not self._numbers:
            for known in (self._heads, self._ops, self._each):
                for i, one in enumerate(known):
                    self._numbers[_said(one)] = i
        rows = tuple([tuple([self._number(op, self._ops) for op in table.ops]) for table in tables])
        one = self._number(replace(tables[0], ops=()), self._heads), rows
        self.forms[form] = self._number(one, self._each)

    def _number(self, one: Any, among: list[Any]) -> int:
        said = _said(one)
        if said not in self._numbers:
            self._numbers[said] = len(among)
            among.append(one)
        return self._numbers[said]

    def to_json(self) -> dict[str, Any]:
        """In plain lists; the rows of all are those of the first head."""
        first, *others = self._heads
        heads = [to_json(replace(first, ops=tuple(self._ops))), *map(to_json, others)]
        return {"heads": heads, "each": self._each, "forms": self.forms}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Variants:
        """What :meth:`to_json` wrote. Raises what comes of data that is none."""
        found = cls()
        heads = [from_json(one)[0] for one in data["heads"]]
        found._ops, found._heads = list(heads[0].ops), [replace(head, ops=()) for head in heads]
        found._each = [(head, tuple(map(tuple, tables))) for head, tables in data["each"]]
        found.forms = dict(data["forms"])
        return found


def _said(one: Any) -> Hashable:
    """All that a row says, whose attributes are no part of a hash; anything else itself."""
    if not isinstance(one, Op):
        return one
    return (*(getattr(one, name) for name in Op.__slots__ if name != "attrs"), repr(sorted(one.attrs.items())))


def packed(key: str, tables: Mapping[str, OpTable | str]) -> bytes:
    """A pack. ``tables``: by name, or the message of the error that there is instead; ``key``: what they are traces
    of."""
    lines = [json.dumps({"format": FORMAT, "key": key, "tables": list(tables)})]
    for table in tables.values():
        said = {"problem": table} if isinstance(table, str) else to_json(table)
        lines.append(json.dumps(said, separators=(",", ":")))
    return lzma.compress("\n".join(lines).encode(), preset=9)


@functools.lru_cache(maxsize=64)
def unpacked(pack: Path, key: str) -> dict[str, str]:
    """Tables of a pack by name, each as :func:`to_json` writes it or with a ``problem`` instead; none where there is no
    pack, or one of another ``key``."""
    try:
        head, *lines = lzma.decompress(pack.read_bytes()).decode().split("\n")
    except OSError:
        return {}
    said = json.loads(head)
    return dict(zip(said["tables"], lines, strict=True)) if (said["format"], said["key"]) == (FORMAT, key) else {}
