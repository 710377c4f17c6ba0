"""One rank of the distributed MoE tests: runs every case of its world size, reports the error of its tokens."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest import mock

import census
import torch
import torch.distributed as dist
from moe_blocks import block_of, census_model, error, output_of
from rewriting import NAMED, NOT_REWRITTEN
from torch import Tensor

from tensorcast.modeling.moe.apply import moe_blocks
from tensorcast.modeling.moe.experts import count_of
from tensorcast.modeling.moe.groups import MoEGroups
from tensorcast.modeling.moe.layer import MoELayer, RoutedExperts
from tensorcast.modeling.moe.parallel import MoEOptions, ParallelMoELayer
from tensorcast.modeling.moe.phase import in_phase
from tensorcast.modeling.moe.placement import Placement, eplb, linear, round_robin
from tensorcast.modeling.moe.reading.fields import at, holds_experts
from tensorcast.modeling.moe.reading.wrapper import ExpertWrapper
from tensorcast.modeling.moe.rewrite import CalledExperts, prove, rewrite
from tensorcast.modeling.moe.weights.rearrange import rearrange
from tensorcast.trace.record import Call, Recorder

TOKENS = (5, 0, 13, 2)
"""Of each data-parallel rank: unequal, and one with none."""

EVEN_TOKENS = 8
"""Of each rank where routing is balanced: every expert gets as many rows, as a trace assumes."""


@dataclass(frozen=True)
class Case:
    """A layout (tp, dp, ep), a block and what the layer chooses; ``balanced``: held against its meta trace instead."""

    sizes: tuple[int, int, int]
    family: str
    exchange: str = "all_to_all"
    options: dict[str, Any] = field(default_factory=dict)
    placement: str = ""
    phase: str = ""
    balanced: bool = False
    bound: float = 1e-5
    drawn: bool = False
    later: str = ""
    """The placement that weights move to before the layer is called."""


LAYOUTS: dict[int, list[tuple[int, int, int, str]]] = {  # world size -> (tp, dp, ep, exchange)
    2: [
        (2, 1, 1, "all_to_all"),
        (2, 1, 2, "all_to_all"),
        (1, 2, 2, "all_to_all"),
        (1, 2, 1, "allgather_reducescatter"),
        (1, 2, 2, "allgather_reducescatter"),
        (1, 2, 2, "low_latency"),
    ],
    4: [
        (4, 1, 4, "all_to_all"),
        (2, 2, 4, "all_to_all"),
        (2, 2, 2, "all_to_all"),  # experts cut over tp, exchanged over dp
        (1, 4, 4, "all_to_all"),
        (1, 4, 2, "allgather_reducescatter"),
        (2, 2, 1, "allgather_reducescatter"),
        (4, 1, 2, "all_to_all"),
        (2, 2, 4, "low_latency"),
        (2, 2, 2, "low_latency"),
    ],
}
DRAWN = 5
"""Families that every run draws anew for each number of ranks, among all that can be rewritten."""
SEED = "TENSORCAST_TEST_SEED"
FAMILIES = ("deepseek_v3", "gpt_oss", "llama4_text", "qwen2_moe")
"""Grouped sigmoid routing; biases and clamps; weights on the input; a gated shared expert."""


def cases(world: int) -> Iterator[Case]:
    """Every kind of layout, placement, exchange and phase of this world size."""
    chunked = {"route_after_dp_transform": True, "chunk_tokens": 4, "enable_shared_expert_tp": True}
    for tp, dp, ep, exchange in LAYOUTS[world]:
        for family in FAMILIES:
            yield Case((tp, dp, ep), family, exchange)
            yield Case((tp, dp, ep), family, exchange, chunked)
        yield Case((tp, dp, ep), "nemotron_h", exchange)
        yield Case((tp, dp, ep), "longcat_flash", exchange)
        external = {"external_shared_experts": 1 if ep < 4 else 2}
        if ep > 1:
            yield Case((tp, dp, ep), "deepseek_v3", exchange, external)
            yield Case((tp, dp, ep), "qwen2_moe", exchange, {**external, "chunk_tokens": 4})
            yield Case((tp, dp, ep), "llama4_text", exchange, external, "eplb")
            yield Case((tp, dp, ep), "gpt_oss", exchange, {}, "eplb")
            yield Case((tp, dp, ep), "mixtral", exchange, {}, "round_robin")
        else:
            fused = {"fuse_shared_experts": True}
            yield Case((tp, dp, ep), "deepseek_v3", exchange, fused)
            yield Case((tp, dp, ep), "qwen3_next", exchange, {**fused, "chunk_tokens": 4})
            yield Case((tp, dp, ep), "llama4_text", exchange, fused, balanced=True)
        yield Case((tp, dp, ep), "qwen2_moe", exchange, {"backend": "masked"}, phase="decode")
        phases = {"exchange": "all_to_all", "decode_exchange": "low_latency"}
        for phase in ("prefill", "decode"):
            if exchange == "all_to_all":
                yield Case((tp, dp, ep), "deepseek_v3", options=phases, phase=phase)
        for options in ({}, {"enable_shared_expert_tp": True}, external if ep > 1 else {}):
            yield Case((tp, dp, ep), "deepseek_v3", exchange, options, balanced=True)
        yield Case((tp, dp, ep), "deepseek_v3", exchange, {}, phase="decode", balanced=True)
    every = (1, world, world)
    for exchange in ("all_to_all", "low_latency"):  # FP8 keeps 3 bits of mantissa
        for sent in ({"dispatch": "fp8_block"}, {"combine": "fp8_block"}, {"dispatch": "fp8", "combine": "int8"}):
            yield Case(every, "deepseek_v3", exchange, sent, bound=0.05)
            yield Case(every, "deepseek_v3", exchange, sent, balanced=True)
        narrow = {"dispatch": "nvfp4", "combine": "nvfp4"}  # 1 bit of mantissa, and scales in FP8 that travel too
        yield Case(every, "deepseek_v3", exchange, narrow, bound=0.25)
        yield Case(every, "deepseek_v3", exchange, narrow, balanced=True)
    for placement in ("round_robin", "eplb", "uneven"):
        yield Case(every, "deepseek_v3", placement=placement)
        yield Case(every, "deepseek_v3", later=placement)
        yield Case(every, "gpt_oss", placement=placement, later="linear")
    yield Case((2, world // 2, world), "deepseek_v3", options={"scheme": "w8a16_fp8"}, later="eplb", bound=0.05)
    split = (world, 1, world)
    for exchange in ("all_to_all", "low_latency"):
        yield Case(split, "deepseek_v3", exchange, {"split_tokens_over_tp": True})
        yield Case(split, "qwen2_moe", exchange, {"split_tokens_over_tp": True, "external_shared_experts": 1})
        yield Case(split, "deepseek_v3", exchange, {"split_tokens_over_tp": True}, balanced=True)
    yield Case((2, world // 2, world), "deepseek_v3", options={"sequence_parallel": True, "split_tokens_over_tp": True})


def drawn(world: int) -> list[Case]:
    """Any family's block as :func:`rewrite` puts it on ranks, in a layout and placement drawn with it."""
    chance = random.Random(f"{os.environ[SEED]} {world}")
    found = []
    for family in chance.sample([f for f in census.families() if f not in {*NOT_REWRITTEN, *NAMED}], DRAWN):
        # whole experts: some families' cannot be cut over ranks (a norm after them, code of their own)
        tp, dp, ep, exchange = chance.choice([one for one in LAYOUTS[world] if one[0] * one[1] == one[2]])
        placement = chance.choice(["", "eplb"] if ep > 1 else [""])
        options = {"route_after_dp_transform": chance.random() < 0.5, "chunk_tokens": chance.choice([0, 4])}
        # sums in another order: weights and tokens are fixed, at most 9e-7 was seen (jamba), on one kind of processor
        found.append(Case((tp, dp, ep), family, exchange, options, placement, bound=1e-6, drawn=True))
    return found


def run(rank: int, world: int, address: str) -> None:
    """Entry point of a rank; writes (case, error over the bound, difference from the trace) beside ``address``."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=world)
    found: list[tuple[str, float, str]] = []
    blocks = {family: block_of(family) for family in {case.family for case in cases(world)}}
    every = [*cases(world), *drawn(world)]
    try:
        for sizes, group in groupby(sorted(every, key=lambda case: case.sizes), key=lambda case: case.sizes):
            tp, dp, ep = sizes
            groups = MoEGroups.of(tp, dp, ep, rank)
            groups.bind(dist)
            for case in group:
                measure = _traced_and_run if case.balanced else _error
                block = list(moe_blocks(census_model(case.family)))[-1][1] if case.drawn else blocks[case.family]
                found.append((str(case), *measure(block, groups, case)))
        Path(f"{address}.{rank}.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


def _options(case: Case, tokens: int) -> MoEOptions:
    said = {"exchange": case.exchange, "max_tokens": tokens, **case.options}
    if case.sizes[1] > 1:
        said.pop("split_tokens_over_tp", None)
    return MoEOptions(**said)


def _placed(kind: str, experts: int, ranks: int) -> Placement | None:
    """EPLB with replicas for counts that fall off steeply; ``uneven``: one more copy than divides over the ranks."""
    redundant = -experts % ranks or ranks
    counts = [100.0 / (1 + expert) for expert in range(experts)]
    return {
        "": lambda: None,
        "linear": lambda: linear(experts, ranks),
        "round_robin": lambda: round_robin(experts, ranks),
        "eplb": lambda: eplb(counts, ranks, redundant),
        "uneven": lambda: linear(experts, ranks, redundant + 1),
    }[kind]()


def _error(block: Any, groups: MoEGroups, case: Case) -> tuple[float, str]:
    """Largest relative error of this rank's output against the stock block on the same tokens."""
    options = _options(case, max(TOKENS))
    ranks = groups.ep.size - options.external_shared_experts
    experts = next(c for n, c in block.named_children() if holds_experts(c, n))
    placement = _placed(case.placement, count_of(ExpertWrapper(experts).stacked()), ranks)
    if case.drawn:
        stock, layer = copy.deepcopy(block), rewrite(block, groups, options, placement, model=case.family)
    else:
        stock, layer = block, ParallelMoELayer(MoELayer(block), groups, options, placement)
    if case.later:
        moved = _placed(case.later, stock.experts.down_proj.shape[0], ranks)
        rearrange(layer.experts, moved)  # type: ignore[arg-type]
    # tp ranks hold the same tokens, unless the sequence is cut over them
    source = groups.dp.rank * groups.tp.size + groups.tp.rank if options.sequence_parallel else groups.dp.rank
    x = torch.randn(1, TOKENS[source], 64, generator=torch.Generator().manual_seed(100 + source))
    kept = prove(stock, model=case.family).kept if case.drawn else ""
    with torch.no_grad(), in_phase(case.phase) if case.phase else nullcontext():  # type: ignore[arg-type]
        if kept:
            # experts of some families take less than the block's states
            rows = x[..., : RoutedExperts(copy.deepcopy(at(stock, kept))).expert_hidden]
            found, expected = (_called(at(one, kept), rows) for one in (layer, stock))
        else:
            found = layer(x)
            found = found[0] if isinstance(found, tuple) else found
            expected = output_of(stock, x) if x.numel() else x
    return error(found.reshape(expected.shape), expected) / case.bound, ""


def _called(experts: Any, x: Tensor) -> Tensor:
    """Experts alone, with a routing, where the block's own code stays around them."""
    flat = x.flatten(0, 1)
    chance = torch.Generator().manual_seed(9)
    index = torch.rand((len(flat), 8), generator=chance).argsort(-1)[:, :2]
    if not len(flat) and not isinstance(experts, CalledExperts):  # stock experts may not take no rows
        return flat
    out: Tensor = experts(flat, index, torch.rand(index.shape, generator=chance))
    return out


def _balanced(gate: Any, x: Tensor, k: int, ids: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Experts in turn: over 8 tokens with 4 choices each of 16 experts gets two rows."""
    turn = torch.arange(x.shape[0] * k, device=x.device).view(-1, k) % 16
    return turn, torch.full((x.shape[0], k), 1 / k, device=x.device)


def _traced_and_run(block: Any, groups: MoEGroups, case: Case) -> tuple[float, str]:
    """The real layer under the recorder against the meta trace of this rank: ops, shapes and bytes sent."""
    options = _options(case, EVEN_TOKENS)
    real, sent = _recorded(block, groups, options, case.phase, "cpu")
    traced, _ = _recorded(copy.deepcopy(block).to("meta"), groups, options, case.phase, "meta")
    ran, expected = ([_shapes(call) for call in calls] for calls in (real, traced))
    for mine, theirs in zip(ran, expected, strict=False):
        if mine != theirs:
            return 0.0, f"ran {mine}, traced {theirs}"
    if len(ran) != len(expected):
        return 0.0, f"ran {len(ran)} ops, traced {len(expected)}"
    stated = sum(bytes_sent(call) for call in traced)
    return 0.0, "" if sent == stated else f"sent {sent} bytes, traced {stated}"


def _recorded(block: Any, groups: MoEGroups, options: MoEOptions, phase: str, device: str) -> tuple[list[Call], int]:
    layer = ParallelMoELayer(MoELayer(block, router=_balanced), groups, options)
    recorder, x = Recorder(layer), torch.zeros(1, EVEN_TOKENS, 64, device=device)
    with torch.no_grad(), in_phase(phase) if phase else nullcontext(), counting() as sent, recorder:  # type: ignore[arg-type]
        layer(x)
    return recorder.calls, sum(sent)


def _shapes(call: Call) -> tuple[str, Any, Any]:
    return call.name, [t.shape for t in call.inputs], [t.shape for t in call.outputs]


ITEM_BYTES = {"float32": 4, "uint8": 1}


def bytes_sent(call: Call) -> int:
    """What a traced collective hands to the network for all ranks together, this one included; rows only."""
    rows = call.inputs[0] if call.inputs else None
    if rows is None or rows.dtype not in ITEM_BYTES or call.attrs.get("size") == 1:
        return 0
    factor = {
        "all_reduce": 1.0,
        "all_gather": 1.0,
        "scatter_rows": 1.0,
        "dispatch_rows": 1.0,
        "combine_rows": 1.0,
        "gather_rows": call.attrs.get("size", 1),
    }.get(call.name, 0.0)
    elements = factor * rows.shape[0] * rows.shape[-1]
    if call.name == "low_latency_dispatch":  # every expert's capacity, filled or not
        elements = call.inputs[1].shape[0] * call.attrs["capacity"] * rows.shape[-1]
    if call.name == "low_latency_combine":
        elements = rows.shape[0] * rows.shape[1] * rows.shape[-1]
    return int(ITEM_BYTES[rows.dtype] * elements)


@contextmanager
def counting() -> Iterator[list[int]]:
    """Bytes of rows that torch.distributed is given to send; indices and counts ride along unpriced."""
    sent: list[int] = []

    def spy(name: str, argument: int) -> Any:
        real = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if args[argument].dtype != torch.int64:
                sent.append(args[argument].numel() * args[argument].element_size())
            return real(*args, **kwargs)

        return mock.patch.object(dist, name, call)

    with spy("all_reduce", 0), spy("all_gather", 1), spy("all_to_all_single", 1):
        yield sent
