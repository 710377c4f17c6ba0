"""Where every layer's experts and their copies lie, by the name of a policy or as a file of an engine says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tensorcast.cost.work import Array
from tensorcast.errors import InputError, unknown_name
from tensorcast.modeling.moe.balancing.published_eplb import Ints, choose_nodes, published_eplb
from tensorcast.modeling.moe.placement import Placement, check_slots, eplb, linear, round_robin

NAMES = ("linear", "round_robin", "eplb", "eplb_global", "balanced", "trivial")

IDLE = -1
"""A slot that holds a copy to which no token is sent."""


def place_layers(
    policy: str, counts: Array, ranks: int, redundant: int = 0, *, nodes: int = 1, groups: int = 1
) -> tuple[Ints, tuple[int, ...]]:
    """The expert in each slot, ``[layers, slots]`` or ``[1, slots]`` for all, and slots of each rank.

    ``policy``: ``linear``, ``round_robin``, ``eplb`` (as published, by ``counts [layers, experts]``), ``eplb_global``
    (the same over all ranks at once, groups or not), ``balanced`` (``eplb``, improved), ``trivial`` or the path of a
    placement (:func:`read_placement`). ``trivial`` is what SGLang 0.5.14 does with ``--ep-num-redundant-experts``
    alone: in order, and copies are sent nothing, as logical ids are taken for physical ones
    (``srt/eplb/expert_location_dispatch.py`` without an ``ep_dispatch_algorithm``, which ``server_args.py`` sets for
    EPLB or a given location only).
    """
    experts = counts.shape[1]
    if policy == "trivial":
        total = check_slots(experts, ranks, redundant)
        slots = np.arange(total)
        return np.where(slots < experts, slots, IDLE)[None], (total // ranks,) * ranks
    if policy in ("linear", "round_robin"):
        if redundant and policy == "round_robin":
            raise InputError(f"--redundant-experts {redundant}: round_robin places no copies; use --placement eplb")
        one = linear(experts, ranks, redundant) if policy == "linear" else round_robin(experts, ranks)
        return np.array([one.physical_to_logical]), one.experts_per_rank
    if policy in ("eplb", "eplb_global"):
        check_slots(experts, ranks, redundant)
        kept = choose_nodes(groups, nodes, ranks) if policy == "eplb" else 1
        if (experts + redundant) % kept:
            kept = 1
        placed = published_eplb(counts, experts + redundant, ranks, nodes=kept, groups=groups if kept > 1 else 1)
        return placed, ((experts + redundant) // ranks,) * ranks
    if policy == "balanced":
        kept = choose_nodes(groups, nodes, ranks)
        every = [eplb(row, ranks, redundant, kept, groups if kept > 1 else 1) for row in counts]
        return np.array([one.physical_to_logical for one in every]), every[0].experts_per_rank
    if Path(policy).is_file():
        placed = read_placement(Path(policy), experts)
        if placed.shape[1] % ranks or (redundant and placed.shape[1] != experts + redundant):
            raise InputError(
                f"--placement {policy}: {placed.shape[1]} slots for {experts} experts and {redundant} copies on "
                f"{ranks} ranks"
            )
        return placed, (placed.shape[1] // ranks,) * ranks
    raise unknown_name("--placement", policy, NAMES)


def rank_loads(counts: Array, placed: Ints, experts_per_rank: tuple[int, ...]) -> Array:
    """Load of each rank over the mean, ``[layers, ranks]``, when copies of an expert share its ``counts`` evenly."""
    layers, experts = counts.shape
    placed = np.broadcast_to(placed, (layers, placed.shape[1]))
    copies = np.zeros((layers, experts))
    np.add.at(copies, (np.arange(layers)[:, None], placed), placed >= 0)
    share = np.where(placed < 0, 0.0, np.take_along_axis(counts / copies, placed, axis=1))
    owner = np.repeat(np.arange(len(experts_per_rank)), experts_per_rank)
    found = np.zeros((layers, len(experts_per_rank)))
    np.add.at(found, (np.arange(layers)[:, None], owner[None]), share)
    return found / found.mean(axis=1, keepdims=True)


def balanced_by(
    policy: str, popularity: Array, ranks: int, redundant: int, *, nodes: int, groups: int
) -> Placement:
    """One layer's placement by a policy that knows its popularity."""
    placed, per_rank = place_layers(policy, popularity[None], ranks, redundant, nodes=nodes, groups=groups)
    return Placement(len(popularity), ranks, tuple(placed[0].tolist()), per_rank)


def read_placement(path: Path, experts: int) -> Ints:
    """``[layers, slots]`` of a file as engines take it.

    SGLang 0.5.14 ``--init-expert-location FILE.json``: ``physical_to_logical_map`` of all layers, dense ones too
    (``srt/eplb/expert_location.py``); TensorRT-LLM's ``moe_load_balancer`` YAML: ``initial_global_assignments`` by
    layer (``examples/wide_ep/ep_load_balancer/generate_eplb_config.py``). Raises :class:`InputError`.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        held = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, UnicodeDecodeError) as reason:
        raise InputError(f"--placement {path}: cannot be read ({str(reason).splitlines()[0]})") from None
    names = {"physical_to_logical_map", "initial_global_assignments"} & set(held if isinstance(held, dict) else ())
    if not names:
        raise InputError(f"--placement {path}: needs physical_to_logical_map or initial_global_assignments")
    rows = held[names.pop()]
    if isinstance(rows, dict):
        rows = [rows[layer] for layer in sorted(rows, key=int)]
    try:
        placed: NDArray[np.int64] = np.array(rows, dtype=np.int64)
    except (TypeError, ValueError):
        raise InputError(f"--placement {path}: must be as many experts in every layer") from None
    if placed.ndim != 2 or not placed.size or placed.min() < 0 or placed.max() >= experts:
        raise InputError(f"--placement {path}: must be [layers, slots] of experts 0 to {experts - 1}")
    for layer, row in enumerate(placed):
        if missing := set(range(experts)) - set(row.tolist()):
            raise InputError(f"--placement {path}: expert {min(missing)} of layer {layer} is on no rank")
    return placed
