"""One rank of ``test_expert_rows.py``: a MoE layer sends recorded choices; the rows that it receives are counted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from moe_blocks import block_of
from torch import Tensor

from tensorcast.modeling.moe.groups import MoEGroups
from tensorcast.modeling.moe.layer import MoELayer
from tensorcast.modeling.moe.parallel import MoEOptions, ParallelMoELayer
from tensorcast.modeling.moe.placement import Placement, eplb, linear, round_robin

EXPERTS, TOP_K, RANKS = 16, 4, 4
TOKENS = (40, 7, 64, 0)
"""Of each data-parallel rank: unequal, and one with none."""


def choices() -> list[np.ndarray]:
    """Experts of every token of each rank, ``[T, k]``: popularity falls off steeply, as in recordings."""
    rng = np.random.default_rng(4)
    weights = np.log(1.0 / np.arange(1, EXPERTS + 1))
    return [(weights + rng.gumbel(size=(tokens, EXPERTS))).argsort(1)[:, -TOP_K:] for tokens in TOKENS]


def counts() -> np.ndarray:
    """What a recorder of these choices writes, ``[E]``."""
    return np.bincount(np.concatenate([one.ravel() for one in choices()]), minlength=EXPERTS)


def placements() -> dict[str, Placement]:
    """By name; copies share an expert's tokens in turn."""
    return {
        "linear": linear(EXPERTS, RANKS), "round_robin": round_robin(EXPERTS, RANKS),
        "eplb": eplb(counts().astype(float), RANKS), "copies": eplb(counts().astype(float), RANKS, 8),
    }


def run(rank: int, address: str) -> None:
    """Entry point of a rank; writes rows received by placement and exchange beside ``address``."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=RANKS)
    chosen = torch.tensor(choices()[rank])

    def recorded(gate: Any, x: Tensor, k: int, ids: Any, layer: int) -> tuple[Tensor, Tensor]:
        return chosen, torch.full(chosen.shape, 1.0 / TOP_K)

    found = {}
    try:
        groups = MoEGroups.of(1, RANKS, RANKS, rank)
        groups.bind(dist)
        for name, placement in placements().items():
            options = MoEOptions("all_to_all", count_loads=True)
            layer = ParallelMoELayer(MoELayer(block_of("deepseek_v3"), router=recorded), groups, options, placement)
            rows: list[int] = []
            local: Any = layer.experts.local
            local.register_forward_pre_hook(lambda _, given, rows=rows: rows.append(given[0].shape[0]))
            with torch.no_grad():
                layer(torch.zeros(1, TOKENS[rank], 64))
            found[name] = [sum(rows), *layer.experts.loads.tolist()]
        Path(f"{address}.{rank}.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()
