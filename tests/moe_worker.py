"""One rank of the distributed MoE tests: runs every layout of its world size, reports the error of its tokens."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from moe_blocks import block_of

from tensorcast.modeling.moe.groups import MoEGroups
from tensorcast.modeling.moe.layer import MoELayer, MoEOptions, ParallelMoELayer
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
                    queue.put((name, rank, _error(block, rank, tp, dp, ep, exchange, after)))
    finally:
        dist.destroy_process_group()


def _error(block: Any, rank: int, tp: int, dp: int, ep: int, exchange: str, after: bool) -> float:
    """Largest relative error of this rank's output against the stock block on the same tokens."""
    groups = MoEGroups.of(tp, dp, ep, rank)
    groups.bind(dist)
    layer = ParallelMoELayer(MoELayer(block), groups, MoEOptions(exchange, after, chunk_tokens=4 if tp > 1 else 0))  # type: ignore[arg-type]
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
