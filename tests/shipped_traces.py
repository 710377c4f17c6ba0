"""The traces that ship with the package; `make traces` is ``python tests/shipped_traces.py [NAME ...]``.

Every shipped model, both phases, every tensor-parallel size that its heads divide over, and its vision tower so where
it has one; packs that say the same already are left as they are.
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
from tensorcast.profiles.vision.said import sees
from tensorcast.trace.cache import digests, tower_digest
from tensorcast.trace.stored import from_json, packed, to_json, unpacked
from tensorcast.trace.table import OpTable, Tensor
from tensorcast.trace.tracer import trace
from tensorcast.trace.vision.tracer import trace_tower

PHASES = ("prefill", "decode")
MOST = 128
"""Largest tensor-parallel size that is shipped."""


def pack_of(name: str, phase: str) -> Path:
    """Of a model's language model, or of its vision tower (``encode``)."""
    folder = profile_roots()[-1] / "traces"
    return (folder / "vision" if phase == "encode" else folder) / f"{name}.json.xz"


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
        if phase == "encode":
            return trace_tower(load_model(name), tp)
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


def fresh_tower(name: str) -> dict[str, OpTable | str]:
    """Traces of a model's vision tower by name, made now."""
    profile, found = load_model(name), dict[str, OpTable | str]()
    whole = trace_tower(profile)
    for tp in (tp for tp in range(1, whole.facts.heads + 1) if whole.facts.heads % tp == 0):
        try:
            found[f"encode-tp{tp}"] = trace_tower(profile, tp, whole)
        except InputError as problem:
            found[f"encode-tp{tp}"] = str(problem)
    return found


def shipped(name: str, table: str) -> OpTable | str | None:
    """A shipped trace, the problem in its place, or None."""
    profile, phase = load_model(name), table.partition("-")[0]
    line = unpacked(pack_of(name, phase), digests(profile, phase)[0]).get(table)
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
    """Make a model's packs; its name, how many bytes they have, and whether one changed."""
    profile = load_model(name)
    packs = [(pack_of(name, "decode"), digests(profile)[0], fresh)]
    if sees(profile):
        packs.append((pack_of(name, "encode"), tower_digest(profile), fresh_tower))
    size, any_changed = 0, False
    for path, key, made in packs:
        found = made(name)
        changed = not all(same(table, shipped(name, key)) for key, table in found.items())
        if changed:
            write_atomically(path, packed(key, found))
        size, any_changed = size + path.stat().st_size, any_changed or changed
    return name, size, any_changed


def main(names: list[str]) -> None:
    every = list_models()
    for path in () if names else (profile_roots()[-1] / "traces").rglob("*.json.xz"):
        if path.name.removesuffix(".json.xz") not in every:
            path.unlink()
    with ProcessPoolExecutor(2) as pool:
        for name, size, changed in pool.map(make, names or every):
            print(f"{name:32} {size:8,} bytes  {'made' if changed else 'as it was'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
