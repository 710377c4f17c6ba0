"""Op tables as JSON: every size and every tensor is written once, whatever number of rows and tables it stands in.

A *pack* is what ships of a model: the tables of both phases at every tensor-parallel size, or why there is none,
compressed together, since they differ in little (``profiles/traces/``).
"""

from __future__ import annotations

import functools
import json
import lzma
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
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
    tensors = [
        Tensor(tuple([dims[i] for i in own]), dtype, storage, weight, tuple(expanded), offset)
        for own, dtype, storage, weight, expanded, offset in data["tensors"]
    ]
    params = tuple([
        Param(name, module, kind, numel, full_numel, dtype, role, tuple(shape), tuple(stored))
        for name, module, kind, numel, full_numel, dtype, role, shape, stored in data["params"]
    ])
    facts = ModelFacts.stored(data["facts"])
    model, phase, tp, layer_kinds, kind_names = data["table"]
    tables = []
    for rows in data["ops"]:
        ops = tuple([
            Op(
                name, module, kind, tuple([tensors[i] for i in inputs]), tuple([tensors[i] for i in outputs]),
                plain | {size: Dim(*dim) for size, dim in sizes.items()} if sizes else plain, stage, shard,
                tuple(parts),
            )
            for name, module, kind, inputs, outputs, plain, sizes, stage, shard, parts in rows
        ])  # fmt: skip
        tables.append(OpTable(
            model=model, phase=phase, tp=tp, ops=ops, layer_kinds=tuple(layer_kinds), kind_names=tuple(kind_names),
            params=params, facts=facts,
        ))  # fmt: skip
    return tables


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
