"""The traces that ship with the package; `make traces` is ``python tests/shipped_traces.py [NAME ...]``.

Every shipped model, both phases, every tensor-parallel size that its heads divide over; packs that say the same already
are left as they are.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from tensorcast.errors import InputError
from tensorcast.files import write_atomically
from tensorcast.profiles.facts import ModelFacts
from tensorcast.profiles.store import list_models, load_model, profile_roots
from tensorcast.trace.cache import digests
from tensorcast.trace.stored import from_json, packed, to_json, unpacked
from tensorcast.trace.table import OpTable, Tensor
from tensorcast.trace.tracer import trace

PHASES = ("prefill", "decode")
MOST = 128
"""Largest tensor-parallel size that is shipped."""


def pack_of(name: str) -> Path:
    return profile_roots()[-1] / "traces" / f"{name}.json.xz"


def sizes(facts: ModelFacts) -> list[int]:
    """Tensor-parallel sizes that a layout may have: :func:`tensorcast.deploy.layout.broken_rules`."""
    kv = facts.kv_heads
    return [
        tp for tp in range(1, min(facts.heads or 1, MOST) + 1)
        if facts.heads % tp == 0 and (not kv or kv % tp == 0 or tp % kv == 0)
    ]  # fmt: skip


def fresh_one(name: str, phase: str, tp: int) -> OpTable | str:
    """One trace of a model, or what is wrong with it, made now."""
    try:
        return trace(load_model(name), phase, tp)  # type: ignore[arg-type]
    except InputError as problem:
        return str(problem)


def fresh(name: str) -> dict[str, OpTable | str]:
    """Traces of a model by name, or what is wrong with them, made now."""
    profile = load_model(name)
    found: dict[str, OpTable | str] = {}
    for phase in PHASES:
        whole = trace(profile, phase)  # type: ignore[arg-type]
        found[f"{phase}-tp1"] = whole
        for tp in sizes(whole.facts)[1:]:
            try:
                found[f"{phase}-tp{tp}"] = trace(profile, phase, tp, whole)  # type: ignore[arg-type]
            except InputError as problem:
                found[f"{phase}-tp{tp}"] = str(problem)
    return found


def shipped(name: str, table: str) -> OpTable | str | None:
    """A shipped trace, the problem in its place, or None."""
    line = unpacked(pack_of(name), digests(load_model(name))[0]).get(table)
    data = {} if line is None else json.loads(line)
    return from_json(data)[0] if "ops" in data else data.get("problem")


def same(one: OpTable | str | None, other: OpTable | str | None) -> bool:
    """Whether two traces say the same: the same rows of what the same rows made, whichever of two independent ones came
    first (Gemma's and Laguna's classes make their rotary tables in the order of a set of words)."""
    if isinstance(one, OpTable) and isinstance(other, OpTable):
        alike = {**to_json(replace(one, ops=())), "made": _dataflow(one)}
        return alike == {**to_json(replace(other, ops=())), "made": _dataflow(other)}
    return one == other


def _dataflow(table: OpTable) -> Counter[str]:
    """Digests of the rows, each of what it does and of the rows that made what it reads."""
    made: dict[int, str] = {}
    found = Counter[str]()
    for op in table.ops:
        reads = [(_said(t), "" if t.weight else made.get(t.storage, "")) for t in op.inputs]
        row = [op.name, op.module, op.kind, reads, [_said(t) for t in op.outputs], op.stage, op.shard, op.parts]
        digest = hashlib.sha256(repr([*row, sorted(op.attrs.items())]).encode()).hexdigest()
        made.update((t.storage, digest) for t in op.outputs)
        found[digest] += 1
    return found


def _said(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dims, tensor.dtype, tensor.weight, tensor.expanded, tensor.offset


def make(name: str) -> tuple[str, int, bool]:
    """Make a model's pack; its name, how many bytes it has, and whether it changed."""
    found = fresh(name)
    path = pack_of(name)
    changed = not all(same(table, shipped(name, key)) for key, table in found.items())
    if changed:
        write_atomically(path, packed(digests(load_model(name))[0], found))
    return name, path.stat().st_size, changed


def main(names: list[str]) -> None:
    every = list_models()
    for path in () if names else (profile_roots()[-1] / "traces").glob("*.json.xz"):
        if path.name.removesuffix(".json.xz") not in every:
            path.unlink()
    with ProcessPoolExecutor(2) as pool:
        for name, size, changed in pool.map(make, names or every):
            print(f"{name:32} {size:8,} bytes  {'made' if changed else 'as it was'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
