"""What servers there are, as it is written: ``2 x tp8 > dp8-ep8``, and who is lost or added when."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tensorcast.deploy.layout import Layout, one_server, parse_layout
from tensorcast.errors import InputError
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.store import load_device
from tensorcast.scheduling.rules import Role

SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
"""Units in which a change's moment is written."""

RIGHT = "must be a time and how many more or fewer, such as 600s -1 or 15min +2"
"""What a change must be."""


@dataclass(frozen=True)
class Servers:
    """``count`` equal servers of one layout, which read prompts, write replies, or do both; on ``device``, or on that
    which is asked for; ``named``: as that is written."""

    layout: Layout
    count: int = 1
    role: Role = "both"
    device: DeviceProfile | None = None
    named: str = field(default="", compare=False)

    def each_alone(self, num_experts: int) -> Servers:
        """The same with every server by itself: data-parallel ranks of a dense model are servers of their own."""
        layout, ranks = one_server(self.layout, num_experts)
        return replace(self, layout=layout, count=self.count * ranks) if ranks > 1 else self

    def __str__(self) -> str:
        said = str(self.layout) + (f"@{self.device.name}" if self.device else "")
        return f"{self.count} x {said}" if self.count > 1 else said


@dataclass(frozen=True)
class Change:
    """From ``when_s`` on, ``count`` servers more of a pool (by its place, 0 the first), or fewer where negative."""

    when_s: float
    count: int
    pool: int = 0


def parse_servers(text: str) -> tuple[Servers, ...]:
    """``tp8-ep8``, ``4 x tp8-ep8``, or, prompts read by other servers, ``2 x tp8-ep8 > 1 x dp8-ep8`` (also ``+``).

    Pools beside one another, which the router takes from alike, have ``&`` between: ``4 x tp8 & 2 x tp4@h100``, with
    another device behind ``@``. Where they run may follow, as a comparison writes it: ``2 x tp8 on 16 h200-sxm under
    vllm``.
    """
    parts = re.split(r"\s*[>+]\s*", re.split(r"\s+(?:on|under)\s+", text.strip())[0])
    if len(parts) > 2:
        raise InputError(f"layout {text!r}: at most two phases, prefill > decode")
    roles: tuple[Role, ...] = ("prefill", "decode") if len(parts) == 2 else ("both",)
    return tuple(
        _pool(text, one, role) for part, role in zip(parts, roles, strict=True) for one in part.split("&")
    )


def filling(text: str, world_size: int) -> str:
    """Servers as they are written; one alone as often as it fills ``world_size`` GPUs. Raises :class:`InputError` where
    there are not so many."""
    servers = parse_servers(text)
    gpus = sum(one.count * one.layout.world_size for one in servers)
    if gpus > world_size:
        raise InputError(f"layout {text!r}: has {gpus} GPUs, more than --world-size {world_size}")
    if len(servers) > 1 or servers[0].count > 1 or world_size % gpus:
        return text
    return str(replace(servers[0], count=world_size // gpus))


def layout_for(phase: str, text: str, world_size: int, device: DeviceProfile) -> Layout:
    """The layout that serves ``phase`` in a deployment: of pools that phase's, of several servers one.

    ``world_size``: GPUs in all that a layout by itself must take. Raises :class:`InputError` where it is said to run on
    another device than ``device``.
    """
    servers = parse_servers(text)
    one = servers[0] if phase == "prefill" else servers[-1]
    if one.device is not None and one.device.name != device.name:
        raise InputError(f"layout {text!r}: its {phase} runs on {one.device.name}; ask on --device {one.named}")
    return one.layout if len(servers) > 1 or one.count > 1 else parse_layout(str(one.layout), world_size)


def _pool(text: str, part: str, role: Role) -> Servers:
    part = re.sub(r"^(\S+)\s+x(\d+)$", r"\2 x \1", part.strip())  # as predict writes replicas
    count, rest = re.fullmatch(r"(?:(\d+)\s*x\s*)?(.*)", part, re.DOTALL).groups()  # type: ignore[union-attr]
    if count is not None and int(count) < 1:
        raise InputError(f"layout {text!r}: {count} servers: at least 1")
    layout, at, device = rest.partition("@")
    if not layout.strip():
        raise InputError(f"layout {text!r}: a layout is missing beside one of its signs, > or &, or before @")
    named = device.strip()
    return Servers(parse_layout(layout.strip()), int(count or 1), role, load_device(named) if at else None, named)


def parse_changes(text: str, pools: int) -> tuple[Change, ...]:
    """``600s -1, 15min +2``; of several pools, which: ``600s -1 of 2`` is one less of the second; empty for none.

    Raises :class:`InputError` on anything else.
    """
    found = []
    for part in filter(None, (one.strip() for one in text.split(","))):
        said = re.fullmatch(r"(\d+\.?\d*)\s*(s|min|h)\s+([+-]\d+)(?:\s+of\s+(\d+))?", part)
        if not said or not int(said[3]):
            raise InputError(f"--workers {part!r}: {RIGHT}")
        if said[4] is None and pools > 1:
            raise InputError(f"--workers {part!r}: of which of the {pools} pools? such as {part} of 1")
        pool = int(said[4] or 1)
        if not 1 <= pool <= pools:
            raise InputError(f"--workers {part!r}: there is no pool {pool}; pools are counted from 1 to {pools}")
        found.append(Change(float(said[1]) * SECONDS[said[2]], int(said[3]), pool - 1))
    return tuple(sorted(found, key=lambda change: change.when_s))


def check_changes(counts: Sequence[int], changes: Sequence[Change]) -> None:
    """Raise :class:`InputError` where a change takes away more servers of a pool than it has."""
    left = list(counts)
    for change in sorted(changes, key=lambda one: one.when_s):
        if not 0 <= change.pool < len(left):
            raise InputError(f"--workers: there is no pool {change.pool + 1}; pools are counted from 1 to {len(left)}")
        left[change.pool] += change.count
        if left[change.pool] < 0:
            raise InputError(
                f"--workers: {-change.count} servers fewer at {change.when_s:g} s, but pool {change.pool + 1} has "
                f"{left[change.pool] - change.count} by then"
            )
