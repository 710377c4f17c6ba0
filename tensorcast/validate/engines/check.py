"""What a released engine declares beside what our profile and launch table say of that release, line by line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorcast.deploy.engine_limits import DEEPEP_RANKS, VOCABULARY_UNIT
from tensorcast.errors import InputError, unknown_name
from tensorcast.files import write_atomically
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.kernels import TritonTiles
from tensorcast.profiles.launch import LaunchTable, load_launch_table
from tensorcast.profiles.store import load_engine
from tensorcast.validate.engines import sglang_arguments, sglang_facts, vllm_arguments, vllm_facts
from tensorcast.validate.engines.arguments import Argument, Declared, spellings
from tensorcast.validate.engines.source import Source

READERS: dict[str, tuple[Callable[[Source], Declared], Callable[[Source], dict[str, Any]]]] = {
    "vllm": (vllm_arguments.read_arguments, vllm_facts.read_facts),
    "sglang": (sglang_arguments.read_arguments, sglang_facts.read_facts),
}
"""Engines whose wheels hold Python that says it all."""


@dataclass(frozen=True)
class Read:
    """What was read of a release: its arguments, and the constants that our profile copies, by the profile's field."""

    engine: str
    release: str
    arguments: Declared
    facts: dict[str, Any]

    def write(self, path: Path) -> None:
        """Keep it, names and values only."""
        content = {
            "engine": self.engine, "release": self.release, "facts": _plain(self.facts),
            "arguments": {name: one.record() for name, one in sorted(self.arguments.items())},
        }  # fmt: skip
        lines = json.dumps(content, sort_keys=True, separators=(",", ":"))
        write_atomically(path, lines.replace('},"', '},\n"') + "\n")

    @classmethod
    def kept(cls, path: Path) -> Read:
        content = json.loads(path.read_text(encoding="utf-8"))
        arguments = {name: Argument.of(record) for name, record in content["arguments"].items()}
        return cls(content["engine"], content["release"], arguments, content["facts"])


def read(engine: str, release: str, path: Path) -> Read:
    """A release from its wheel, or from a folder that holds its package."""
    if engine not in READERS:
        raise unknown_name("engine to read", engine, READERS)
    source, (arguments, facts) = Source(path), READERS[engine]
    return Read(engine, release, arguments(source), facts(source))


def differences(found: Read) -> list[str]:
    """What differs from our profile and launch table of the same release (of the newest, where that was not read)."""
    known = load_engine(found.engine).releases
    release = found.release if found.release in known else known[0]
    profile = load_engine(f"{found.engine}=={release}")
    ours = _plain({"vllm": _of_vllm, "sglang": _of_sglang, "trtllm": lambda _: {}}[found.engine](profile))
    theirs = _plain(found.facts)
    said = [] if release == found.release else [f"no rules of {found.release}: held to those of {release}"]
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            said += _told(name, theirs.get(name), ours.get(name))
    try:
        table = load_launch_table(found.engine, release)
    except InputError:  # a release that is priced and not launched
        return said
    return [*said, *_of_flags(table, found.arguments, "config" if found.engine == "trtllm" else "command")]


def _told(name: str, theirs: Any, ours: Any) -> Iterator[str]:
    """A line per value that differs; mappings by their keys, lists by what one of them lacks."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys(), key=str):
            if theirs.get(key) != ours.get(key):
                yield from _told(f"{name}.{key}", theirs.get(key), ours.get(key))
    elif isinstance(theirs, list) and isinstance(ours, list) and all(isinstance(one, str) for one in [*theirs, *ours]):
        more, gone = sorted(set(theirs) - set(ours)), sorted(set(ours) - set(theirs))
        yield f"{name}: the release has {', '.join(more) or 'nothing'} more, the profile {', '.join(gone) or 'nothing'}"
    else:
        yield f"{name}: the release has {json.dumps(theirs)}, the profile {json.dumps(ours)}"


FREE_TEXT = ("moe_config.load_balancer", "speculative_config.speculative_model")
"""Keys of TensorRT-LLM's file whose values are any text, which its manifest leaves out."""


def _of_flags(table: LaunchTable, declared: Declared, place: str) -> Iterator[str]:
    known = spellings(declared)
    for name, entry in table.flags.items():
        if entry.place != place:
            continue
        if place == "config" and (
            entry.flag.startswith(FREE_TEXT) or any(one.startswith(f"{entry.flag}.") for one in known)
        ):
            continue
        one = known.get(entry.flag)
        if one is None:
            yield f"launch {name}: no {entry.flag}"
            continue
        if (entry.takes == "nothing") != (one.takes == "nothing"):
            yield f"launch {name}: {entry.flag} takes {one.takes}, the table says {entry.takes}"
        if one.deprecated:
            yield f"launch {name}: {entry.flag} is deprecated: {one.deprecated}"
        for value in entry.values.values():
            if one.choices and value not in one.choices:
                yield f"launch {name}: {entry.flag} has no {value}"


def _plain(content: Any) -> Any:
    """As JSON keeps it: keys are text, tuples lists; whole numbers are whole, and sets of names in order."""
    if isinstance(content, dict):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple | set | frozenset):
        items = [_plain(one) for one in content]
        return sorted(items) if items and all(isinstance(one, str) for one in items) else items
    if isinstance(content, float) and content.is_integer():
        return int(content)
    return content


def _field(profile: EngineProfile, name: str) -> Any:
    """A field by its dotted name; None where a part of it is not there."""
    value: Any = profile
    for part in name.split("."):
        value = None if value is None else getattr(value, part)
    return value


def _tiles(tiles: TritonTiles | None) -> dict[str, Any]:
    return {} if tiles is None else dict(tiles.tuned)


def _of_vllm(profile: EngineProfile) -> dict[str, Any]:
    names = (
        "step_tokens.from_mib", "scheduler.most_sequences", "scheduler.block_tokens", "scheduler.blocks_found",
        "prefill_graphs.max_tokens",
        "prefill_graphs.device_max_tokens", "prefill_graphs.class_max_tokens", "halved_steps.decode_tokens",
        "halved_steps.prefill_tokens", "lifted_rules",
    )  # fmt: skip
    rule, values = profile.allreduce_norm, load_launch_table("vllm").flags["all2all"].values
    sliced = profile.sliced_blocks.exchanges if profile.sliced_blocks else ()
    libraries = profile.experts.libraries if profile.experts else ()
    fused = rule.max_bytes if rule else {}
    return {
        **{name: _field(profile, name) for name in names},
        "memory_fraction": float(profile.memory_fraction),
        "scheduler.queue": [_field(profile, f"scheduler.queue_{name}") for name in ("weight", "from_used")],
        "shared_expert_stream_tokens": float(profile.shared_expert_stream_tokens or 0),
        "allreduce_norm.hopper": fused.get("hopper", {}),
        "allreduce_norm.blackwell": {**fused.get("blackwell", {}), **_wide(profile, "gb200")},
        "allreduce_norm.b300": rule.device_max_bytes.get("gb300", {}) if rule else {},
        "uncompiled.architectures": profile.uncompiled.architectures if profile.uncompiled else (),
        "halved_steps.exchanges": [values["high_throughput"], values["low_latency"], NOT_PRICED["dbo"]],
        "sliced_blocks.exchanges": [*(values[one] for one in sliced), *UNKNOWN_EXCHANGES.get(profile.version, ())],
        "deepep_ranks": sorted(DEEPEP_RANKS), "vocabulary_unit": VOCABULARY_UNIT,
        "kernels.humming_before_marlin": [90] if any("humming" in one.kernels for one in libraries) else [],
        "lacking.sparse_latents": sorted({int(one) for one in _runs_on(profile, "sparse attention kernels")}),
        "lacking.fp8_cache": round(10 * min(_runs_on(profile, "cache kernels"))),
        "experts.triton.tuned": _tiles(profile.experts.triton if profile.experts else None),
    }


CAPABILITIES = {"volta": 7.0, "ampere": 8.0, "ada": 8.9, "hopper": 9.0, "blackwell": 10.0, "blackwell (rtx)": 12.0}
"""Least compute capability of NVIDIA's architectures."""


def _runs_on(profile: EngineProfile, rule: str) -> list[float]:
    """Compute capabilities of those that no entry of a rule names."""
    lacking = {device for one in profile.lacking if one.rule == rule for device in one.devices}
    return [capability for name, capability in CAPABILITIES.items() if name not in lacking]


NOT_PRICED = {"dbo": "nixl_ep"}
"""Exchanges that engines have and nothing here prices."""

_ELSEWHERE = ("mori_high_throughput", "mori_low_latency", "nixl_ep")
UNKNOWN_EXCHANGES = {
    "0.24.0": _ELSEWHERE,
    "0.33.0": (*_ELSEWHERE, "deepep_v2", "flashinfer_nvlink_one_sided", "passthrough"),
}
"""The same among those that slice tokens, by release."""


def _wide(profile: EngineProfile, device: str) -> dict[int, int]:
    """Ranks beyond a node, where NVLink joins nodes."""
    rule = profile.allreduce_norm
    own = rule.device_max_bytes.get(device, {}) if rule else {}
    return {ranks: size for ranks, size in own.items() if ranks > 8}


def _of_sglang(profile: EngineProfile) -> dict[str, Any]:
    terms = (*sglang_facts.TERMS, "by_role", "exchange_mib", "exchange_prefill_graphs_mib")
    vision = ("factor", "slope", "least", "most", "not_architectures")
    reply, tokens = _field(profile, "scheduler.expected_reply"), profile.step_tokens
    return {
        "memory_fraction": float(profile.memory_fraction),
        **{f"reserve.{name}": _field(profile, f"reserve.{name}") for name in terms},
        **{f"reserve.vision.{name}": _field(profile, f"reserve.vision.{name}") for name in vision},
        **{name: _field(profile, name) for name in ("step_tokens.from_mib", "scheduler.prompt_tokens", "lifted_rules",
           "prefill_graphs.latent_max_tokens", "prefill_graphs.ranges", "prefill_graphs.seeing")},
        "allreduce_norm.models": _field(profile, "allreduce_norm.models"),
        "step_tokens.buffered": tokens.buffered["low_latency"] if tokens else 0,
        "step_tokens.exchanges": tokens.exchanges["low_latency"] if tokens else 0,
        "scheduler.expected_reply": [
            reply.first, round(reply.least / reply.first, 6), reply.steps, reply.most_tokens, reply.spare_steps
        ],
        **{f"scheduler.expected_reply.{name}": getattr(reply, name)
           for name in ("rank_factor", "fixed_whole", "windows_ask_again")},
        "experts.triton.tuned": _tiles(profile.experts.triton if profile.experts else None),
    }  # fmt: skip
