"""What of the MoE layer torch.compile and torch.export take: every backend, dtype and mode, on one rank and on two.

``python tests/moe_compile.py`` prints the table of docs/moe.md, inductor included (minutes).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from moe_blocks import block_of, error, output_of
from torch import Tensor, nn

from tensorcast.modeling.moe.backends import BACKENDS
from tensorcast.modeling.moe.groups import MoEGroups
from tensorcast.modeling.moe.parallel import MoEOptions
from tensorcast.modeling.moe.rewrite import rewrite

COMPILED = [backend for backend in BACKENDS if backend != "eager"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BOUNDS = {"fp32": 1e-6, "bf16": 2e-2, "fp16": 2e-3}
"""Largest difference from the stock block, relative to its largest value: the rounding of the dtype."""
FAMILY = "qwen2_moe"
"""With a gated shared expert."""
SHAPES = ((2, 9), (3, 17), (1, 1))
"""Batches and tokens that one compiled layer runs on, one after the other."""


def compiled(layer: nn.Module, mode: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The layer in one graph, batch and tokens dynamic. ``mode``: export, or a backend of torch.compile."""
    if mode == "export":
        b, s = torch.export.Dim("b"), torch.export.Dim("s")
        program = torch.export.export(layer, (torch.randn(2, 9, 64, dtype=dtype),), dynamic_shapes=({0: b, 1: s},))
        found: Callable[[Tensor], Tensor] = program.module()
        return found
    return torch.compile(layer, fullgraph=True, dynamic=True, backend=mode)


def worst(backend: str, dtype: str, mode: str) -> float:
    """Largest error over the shapes, over the dtype's bound: below 1 the stock block's own output."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block, kind = block_of(FAMILY, DTYPES[dtype]), DTYPES[dtype]
    errors = []
    with torch.no_grad():
        run = compiled(rewrite(block, options=MoEOptions(backend=backend)), mode, kind)
        for b, s in SHAPES[:2] if mode == "export" else SHAPES:  # an exported program keeps 1 apart from many
            x = torch.randn(b, s, 64, dtype=kind)
            errors.append(error(run(x).float(), output_of(block, x).float()))
    return max(errors) / BOUNDS[dtype]


RankCase = tuple[int, int, int, str, str, str]
RANK_CASES: list[RankCase] = [
    *((1, 2, 2, "all_to_all", backend, dtype) for backend in COMPILED for dtype in DTYPES),
    (1, 2, 2, "low_latency", "masked", "fp32"), (1, 2, 2, "allgather_reducescatter", "grouped_mm", "fp32"),
    (2, 1, 1, "all_to_all", "grouped_mm", "fp32"), (2, 1, 2, "all_to_all", "grouped_mm", "fp32"),
]  # fmt: skip
"""tp, dp, ep, exchange, backend, dtype on two ranks."""
HEAD = "| backend | dtype | one graph | two ranks | export | inductor |\n|---|---|---|---|---|---|"


def rank(me: int, address: str, cases: Sequence[RankCase]) -> None:
    """Entry point of a rank: its errors over the bound in every case, as JSON beside ``address``."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=me, world_size=2)
    found = []
    try:
        for tp, dp, ep, exchange, backend, dtype in cases:
            torch._dynamo.reset()
            groups, kind = MoEGroups.of(tp, dp, ep, me), DTYPES[dtype]
            groups.bind(dist)
            block = block_of(FAMILY, kind)
            said: Any = {"exchange": exchange, "backend": backend, "max_tokens": 16}
            with torch.no_grad():
                run = compiled(rewrite(block, groups, MoEOptions(**said)), "aot_eager", kind)
                for tokens in (5, 7):
                    generator = torch.Generator().manual_seed(tokens + groups.dp.rank)
                    x = torch.randn(1, tokens + 3 * groups.dp.rank, 64, generator=generator).to(kind)
                    found.append(error(run(x).float(), output_of(block, x).float()) / BOUNDS[dtype])
        Path(f"{address}.{me}.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


def two_ranks(folder: Path, cases: Sequence[RankCase] = RANK_CASES) -> list[float]:
    """Worst error over the bound of every case."""
    address = str(folder / "ranks")
    mp.get_context("forkserver").set_forkserver_preload(["moe_compile"])  # torch is imported once
    mp.start_processes(rank, (address, cases), nprocs=2, start_method="forkserver")
    ranks = [json.loads(Path(f"{address}.{me}.json").read_text()) for me in range(2)]
    worst_of = [max(pair) for pair in zip(*ranks, strict=True)]
    return [max(worst_of[2 * i : 2 * i + 2]) for i in range(len(cases))]


def main() -> None:
    """Print the table; a cell is ``yes``, or what stands against it."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = dict(zip(RANK_CASES, two_ranks(Path(folder)), strict=True))
    print(HEAD)
    for backend, dtype in product(COMPILED, DTYPES):
        cells = [worst(backend, dtype, mode) for mode in ("aot_eager", "export", "inductor")]
        cells.insert(1, pairs[1, 2, 2, "all_to_all", backend, dtype])
        said = ("yes" if cell < 1 else f"off by {cell:.1f}" for cell in cells)
        print(f"| `{backend}` | {dtype} | {' | '.join(said)} |")


if __name__ == "__main__":
    main()
