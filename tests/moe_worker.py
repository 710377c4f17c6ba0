"""One rank of the distributed MoE tests: runs every layout of its world size, reports the error of its tokens."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from moe_blocks import block_of

from tensorcast.modeling.moe.groups import MoEGroups
from tensorcast.modeling.moe.layer import MoELayer, MoEOptions, ParallelMoELayer
from tensorcast.modeling.moe.placement import Placement, eplb, round_robin
from tensorcast.ops.collectives import bind_group

TOKENS = (5, 0, 13, 2)
"""Of each data-parallel rank: unequal, and one with none."""

LAYOUTS: dict[int, list[tuple[int, int, int, str]]] = {  # world size -> (tp, dp, ep, exchange)
    2: [
        (2, 1, 1, "all_to_all"),
        (2, 1, 2, "all_to_all"),
        (1, 2, 2, "all_to_all"),
        (1, 2, 1, "allgather_reducescatter"),
        (1, 2, 2, "allgather_reducescatter"),
    ],
    4: [
        (4, 1, 4, "all_to_all"),
        (2, 2, 4, "all_to_all"),
        (1, 4, 4, "all_to_all"),
        (1, 4, 2, "allgather_reducescatter"),
        (2, 2, 1, "allgather_reducescatter"),
        (4, 1, 2, "all_to_all"),
    ],
}


def run(rank: int, world: int, families: list[str], address: str, queue: Any) -> None:
    """Entry point of a spawned rank."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=world)
    try:
        for family in families:
            block = block_of(family)
            for tp, dp, ep, exchange in LAYOUTS[world]:
                for after in (False, True):
                    name = f"{family} tp{tp} dp{dp} ep{ep} {exchange} route_after={after}"
                    queue.put((name, rank, _error(block, rank, (tp, dp, ep), exchange, after)))
            experts = block.experts.down_proj.shape[0]
            for kind, placement in placements(experts, world).items():
                name = f"{family} dp{world} ep{world} {kind}"
                queue.put((name, rank, _error(block, rank, (1, world, world), "all_to_all", False, placement)))
    finally:
        dist.destroy_process_group()


def placements(experts: int, ranks: int) -> dict[str, Placement]:
    """Round robin, and EPLB with replicas for counts that fall off steeply."""
    counts = [100.0 / (1 + expert) for expert in range(experts)]
    return {"round_robin": round_robin(experts, ranks), "eplb": eplb(counts, ranks, redundant=ranks)}


def _error(
    block: Any, rank: int, sizes: tuple[int, int, int], exchange: str, after: bool, placement: Placement | None = None
) -> float:
    """Largest relative error of this rank's output against the stock block on the same tokens."""
    groups = MoEGroups.of(*sizes, rank)
    groups.bind(dist)
    chunk = 4 if after else 0
    options = MoEOptions(exchange, after, chunk, max_tokens=max(TOKENS), enable_shared_expert_tp=after)  # type: ignore[arg-type]
    layer = ParallelMoELayer(MoELayer(block), groups, options, placement)
    generator = torch.Generator().manual_seed(100 + groups.dp.rank)  # tp ranks hold the same tokens
    x = torch.randn(1, TOKENS[groups.dp.rank], 64, generator=generator)
    with torch.no_grad():
        found = layer(x)
        expected = block(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    for name in ("tp", "dp", "ep", "etp"):
        bind_group(name, None)
    if x.shape[1] == 0:
        return 0.0 if found.shape == x.shape else float("inf")
    return float((found - expected.reshape(found.shape)).abs().max() / expected.abs().max())
