"""Where the MoE layer's work lies: phases, exchanges, external shared experts, odd widths, whole models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import MOE_ONLY
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_blocks import MOE, block_of, error, model_of, output_of
from torch import Tensor, nn

from tensorcast.errors import InputError
from tensorcast.modeling.moe.apply import apply_moe
from tensorcast.modeling.moe.experts import FusedMoEBase
from tensorcast.modeling.moe.fused import FusedMoETensorCast
from tensorcast.modeling.moe.groups import MoEGroups
from tensorcast.modeling.moe.layer import MoELayer
from tensorcast.modeling.moe.parallel import MoEOptions, ParallelMoELayer
from tensorcast.modeling.moe.phase import PHASES, in_phase
from tensorcast.modeling.moe.placement import eplb, linear, physical_choice, with_external
from tensorcast.modeling.moe.rounding import with_hidden
from tensorcast.modeling.quantization import rounded_hidden
from tensorcast.trace.record import Call, Recorder

TC = torch.ops.tensor_cast
EXCHANGES = frozenset("dispatch_rows combine_rows low_latency_dispatch low_latency_combine".split())


def trace(block: nn.Module, groups: MoEGroups, tokens: int, phase: Any = None, **said: Any) -> list[Call]:
    """Ops of one rank's layer on meta."""
    layer = ParallelMoELayer(MoELayer(block.to("meta")), groups, MoEOptions(**said))
    recorder = Recorder(layer)
    with torch.no_grad(), recorder:
        layer(torch.empty(1, tokens, 64, device="meta"), phase=phase)
    return recorder.calls


def rows_of(calls: list[Call], name: str) -> list[tuple[int, ...]]:
    """Shapes of the first input of every op of this name."""
    return [call.inputs[0].shape for call in calls if call.name == name]


# --- external shared experts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "shared", "routed"),
    [(0, 24, None), (1, 24, None), (2, None, 36), (5, None, 36), (6, None, 24), (7, None, 24)],
)
def test_external_shared_experts_by_hand(rank: int, shared: int | None, routed: int | None) -> None:
    """Two of eight ranks hold the shared expert; 6 tokens a rank, 4 of 16 experts, which lie 3 3 3 3 2 2.

    All 48 tokens visit one of the two: 24 each. Of 48 * 4 rows a rank gets 3/16 or 2/16.
    """
    groups = MoEGroups.of(1, 8, 8, rank)
    calls = trace(block_of("deepseek_v3"), groups, 6, external_shared_experts=2)
    assert rows_of(calls, "dispatch_rows") == [(6 * 5, 64)]  # one choice more
    assert [call.outputs[0].shape for call in calls if call.name == "combine_rows"] == [(6 * 5, 64)]
    matmuls = rows_of(calls, "grouped_matmul")
    if routed is not None:
        assert [shape[0] for shape in matmuls] == [routed, routed]
        assert not [shape for shape in rows_of(calls, "mm") if shape != (6, 64)]  # nothing but the router
    else:
        assert matmuls == []
        assert sorted(rows_of(calls, "mm"))[-3:] == [(shared, 48), (shared, 64), (shared, 64)]


def test_one_token_per_rank_does_not_pile_up_on_an_external_rank() -> None:
    """16 ranks, 8 of them external, one token each: two tokens per shared expert, whatever the source."""
    calls = trace(block_of("deepseek_v3"), MoEGroups.of(1, 16, 16, 3), 1, external_shared_experts=8)
    assert max(shape[0] for shape in rows_of(calls, "mm")) == 2
    placement = with_external(linear(16, 8), 8)
    column = np.full((1, 1), 16)
    visited = [int(physical_choice(column, placement, first_token=source)[0, 0]) for source in range(16)]
    assert sorted(visited) == sorted([*range(8)] * 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 4), st.integers(0, 40), st.integers(0, 9))
def test_external_ranks_come_first_and_share_tokens(experts: int, ranks: int, n: int, tokens: int, source: int) -> None:
    ranks = min(ranks, experts)
    routed = linear(experts, ranks)
    placement = with_external(routed, n)
    assert [tuple(placement.physical_to_logical[s] for s in placement.slots(rank)) for rank in range(n)] == [
        (experts,)
    ] * n
    for rank in range(ranks):  # the others hold what they held
        held = [placement.physical_to_logical[s] for s in placement.slots(n + rank)]
        assert held == [routed.physical_to_logical[s] for s in routed.slots(rank)]
    visited = physical_choice(np.full((tokens, 1), experts), placement, source).ravel()
    share = np.bincount(visited, minlength=n)[:n]
    assert share.sum() == tokens and share.max() - share.min() <= 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_expected_rows_of_all_ranks_are_the_rows_sent(data: st.DataObject) -> None:
    """Balanced routing: what the ranks expect adds up to what they send, up to rounding to whole rows."""
    experts, zero = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 4))
    routed_ranks, n = data.draw(st.integers(1, experts)), 0 if zero else data.draw(st.integers(0, 3))
    chosen, tokens = data.draw(st.integers(1, experts)) + (n > 0), data.draw(st.integers(0, 20))
    placement = linear(experts, routed_ranks, data.draw(st.integers(0, 5)))
    placement = with_external(placement, n) if n else placement
    ranks = routed_ranks + n
    source: Any = nn.Module()
    source.down_proj = torch.empty(experts, 4, 8, device="meta")
    source.gate_up_proj, source.has_gate = torch.empty(experts, 16, 4, device="meta"), True
    source.has_bias = source.is_transposed = False
    external = nn.Identity() if n else None
    expected = [
        FusedMoETensorCast(
            source, MoEGroups.of(1, ranks, ranks, rank), placement, external=external, zero_experts=zero
        ).expected_rows(tokens, chosen, ranks)
        for rank in range(ranks)
    ]
    stay = ranks * tokens * chosen * zero / (experts + zero)
    assert -1e-9 <= sum(expected) - (ranks * tokens * chosen - stay) < ranks


# --- phases ---------------------------------------------------------------------------------------------------------


class _Drafting(nn.Module):
    """A model with a draft (multi-token prediction) block behind it."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.model, self.draft = model_of(family), nn.ModuleDict({"mlp": block_of(family, seed=1)})

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.model.model(ids).last_hidden_state
        return output_of(self.draft["mlp"], hidden)


@pytest.mark.parametrize("family", [*MOE, *MOE_ONLY])
def test_the_phase_reaches_every_block_of_a_model(family: str) -> None:
    """Shared experts and the draft block too; outputs stay the stock model's. Prefill contiguous, decode masked."""
    model, ids = _Drafting(family), torch.randint(0, 512, (2, 9))
    with torch.no_grad():
        expected = model(ids)
        paths = apply_moe(model)
        assert "draft.mlp" in paths and len(paths) > 1
        for phase, op in zip(PHASES, ("align_rows", "to_capacity"), strict=True):
            recorder = Recorder(model)
            with in_phase(phase), recorder:
                assert error(model(ids), expected) < 1e-4  # float32 through all layers
            found = [call.module for call in recorder.calls if call.name in ("align_rows", "to_capacity")]
            assert [call.name for call in recorder.calls if call.name == op] == [op] * len(paths)
            assert len(found) == len(paths) == len(set(found))


def test_backends_by_sub_config() -> None:
    """As transformers' dict: the empty key for the rest of the model."""
    model, ids = model_of("olmoe"), torch.randint(0, 512, (1, 5))
    apply_moe(model, options=MoEOptions(backend={"text_config": "masked", "": "batched_mm"}), part="text_config")
    recorder = Recorder(model)
    with torch.no_grad(), in_phase("prefill"), recorder:
        model(ids)
    matmuls = {call.name for call in recorder.calls if call.name.endswith(("grouped_matmul", "batched_matmul"))}
    assert matmuls == {"masked_grouped_matmul"}


def test_counted_loads_balance_the_next_placement() -> None:
    """Counters of a running layer, handed to EPLB: the same output from experts that lie better."""
    block, x = block_of("qwen3_moe"), torch.randn(1, 200, 64)
    block.gate.weight.data[:3] += 0.2 * x.mean((0, 1)) / x.mean((0, 1)).norm()  # a few experts are in fashion
    layer = ParallelMoELayer(MoELayer(block), MoEGroups(), MoEOptions(count_loads=True))
    with torch.no_grad():
        layer(x)
        counts = layer.experts.loads.clone()
        assert torch.equal(counts, layer.layer.route(x[0])[0].flatten().bincount(minlength=16))
        layer(x[:, :0])
        assert torch.equal(layer.experts.loads, counts)
    better = eplb(counts.numpy(), 4, 4)
    assert better.balancedness(counts.numpy()) > linear(16, 4).balancedness(counts.numpy())
    with pytest.raises(InputError, match="not counted: set count_loads"):
        _ = ParallelMoELayer(MoELayer(block), MoEGroups()).experts.loads


def test_models_without_experts_are_refused() -> None:
    with pytest.raises(InputError, match="no block with experts"):
        apply_moe(model_of("llama"))


@pytest.mark.parametrize(
    ("phase", "ops"),
    [
        ("prefill", {"dispatch_rows", "combine_rows"}),
        ("decode", {"low_latency_dispatch", "low_latency_combine"}),
        (None, {"dispatch_rows", "combine_rows"}),
    ],
)
@pytest.mark.parametrize("tokens", [6, 0])
def test_phase_picks_the_exchange_even_without_tokens(phase: Any, ops: set[str], tokens: int) -> None:
    calls = trace(
        block_of("qwen2_moe"), MoEGroups.of(2, 4, 8, 5), tokens, phase, decode_exchange="low_latency", max_tokens=10
    )
    assert {call.name for call in calls} & EXCHANGES == ops
    masked = rows_of(calls, "masked_grouped_matmul")
    if phase == "decode":  # 8 ranks of at most 10 / tp tokens
        assert masked == [(1, 40, 64), (1, 40, 48)]


def test_low_latency_refuses_more_rows_than_its_capacity() -> None:
    rows, counts = torch.randn(5, 4), torch.tensor([1, 4])
    laid, sources = TC.low_latency_dispatch(rows, counts, [2], 0, 4, "g")
    assert laid.shape == (2, 4, 4) and torch.equal(laid[0, :1], rows[:1]) and not laid[0, 1:].any()
    assert torch.equal(TC.low_latency_combine(laid, counts, sources, [2], 4, 5, "g"), rows)
    with pytest.raises(ValueError, match="low_latency_dispatch: expert 1 has 4 rows, more than its capacity of 3"):
        TC.low_latency_dispatch(rows, counts, [2], 0, 3, "g")


@pytest.mark.parametrize("exchange", ["all_to_all", "low_latency"])
@pytest.mark.parametrize("scheme", ["fp8", "fp8_block", "int8", "nvfp4"])
def test_rows_come_back_rounded_once(exchange: Any, scheme: str) -> None:
    """Each (token, choice) row is quantised on its own before its weight: the sum is that of the rounded rows."""
    layer, x = MoELayer(block_of("mixtral")), torch.randn(7, 64)
    plain, rounding = (FusedMoETensorCast(layer.stacked, MoEGroups(), combine=c) for c in ("bf16", scheme))
    with torch.no_grad():
        indices, weights = layer.route(x)
        each = [
            plain(x, indices[:, [k]], torch.ones(7, 1), exchange=exchange, capacity=7) for k in range(indices.shape[1])
        ]
        rounded = [TC.dequantize_activation(TC.quantize_activation(t, scheme), scheme, t.dtype) for t in each]
        expected = sum(w * t for w, t in zip(weights.T.unsqueeze(-1), rounded, strict=True))
        found = rounding(x, indices, weights, exchange=exchange, capacity=7)
        exact = plain(x, indices, weights, exchange=exchange, capacity=7)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert 1e-4 < error(found, exact) < 0.2


@pytest.mark.parametrize(("tokens", "split"), [(3, False), (4, True), (9, True)])
def test_tokens_are_split_over_tp_from_tp_tokens_on(tokens: int, split: bool) -> None:
    calls = trace(block_of("qwen2_moe"), MoEGroups.of(4, 1, 4, 1), tokens, split_tokens_over_tp=True)
    names = {call.name for call in calls}
    assert ("dispatch_rows" in names) == split and ("all_reduce" in names) != split
    if split:
        own = -(-tokens // 4)
        assert rows_of(calls, "dispatch_rows") == [(own * 2, 64)]
        assert rows_of(calls, "all_gather") == [(own, 64)]


# --- narrower, wider and zero experts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "exchange", "collectives"),
    [
        ((1, 4, 4), "all_to_all", {"dispatch_rows", "combine_rows"}),
        ((1, 4, 4), "allgather_reducescatter", {"scatter_rows"}),
        ((4, 1, 1), "all_to_all", {"all_reduce"}),
    ],
)
def test_latent_experts_move_the_smaller_hidden_size(
    sizes: tuple[int, int, int], exchange: Any, collectives: set[str]
) -> None:
    calls = trace(block_of("nemotron_h"), MoEGroups.of(*sizes), 8, exchange=exchange)
    for name in collectives:
        assert {shape[-1] for shape in rows_of(calls, name)} == {32}
    assert 64 not in {shape[-1] for shape in rows_of(calls, "gather_rows")}


def test_zero_experts_stay_at_home() -> None:
    """16 experts and 8 that return their input: a third of the choices is not sent."""
    calls = trace(block_of("longcat_flash"), MoEGroups.of(1, 4, 4), 6)
    assert rows_of(calls, "dispatch_rows") == [(6 * 4 * 16 // 24, 64)]


@pytest.mark.parametrize(("hidden", "scheme", "multiple", "rounded"), [
    (2880, "mxfp4", 0, 3072), (2880, "mxfp4", 128, 2944), (2880, "bf16", 0, 2880), (4096, "mxfp4", 0, 4096),
])  # fmt: skip
def test_rounded_hidden(hidden: int, scheme: str, multiple: int, rounded: int) -> None:
    """gpt-oss is 2880 wide; vLLM runs it in MXFP4 at 3072."""
    assert rounded_hidden(hidden, scheme, multiple) == rounded


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "nemotron_h", "mixtral"])
def test_wider_experts_are_the_same_function(family: str) -> None:
    """Biases, transposed and not gated weights: columns beyond the model's are zero, in and out."""
    layer = MoELayer(block_of(family))
    hidden = layer.expert_hidden
    counts = torch.tensor([3] * 8)
    rows = torch.randn(24, hidden)
    with torch.no_grad():
        wide = FusedMoEBase(with_hidden(layer.stacked, hidden + 40), range(8))
        found = wide(nn.functional.pad(rows, (0, 40)), counts)
        expected = FusedMoEBase(layer.stacked, range(8))(rows, counts)
    torch.testing.assert_close(found[:, :hidden], expected)
    assert not found[:, hidden:].any()
    assert layer.expert_hidden == hidden  # the source is as it was


def test_mxfp4_layer_is_padded_and_still_the_layer() -> None:
    """MXFP4 weights of the width that the kernel wants; 4 bits keep the output within a quarter."""
    block, x = block_of("gpt_oss"), torch.randn(1, 12, 64)
    layer = ParallelMoELayer(MoELayer(block), MoEGroups(), MoEOptions(scheme="mxfp4"))
    local: Any = layer.experts.local
    assert layer.experts.width == 256 and local.gate_up_proj.shape[-1] == 256 // 2  # two values a byte
    with torch.no_grad():
        found, expected = layer(x), output_of(block, x)
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.25
    calls = trace(block, MoEGroups.of(1, 4, 4), 8, scheme="mxfp4")
    assert {shape[-1] for shape in rows_of(calls, "dispatch_rows")} == {256}
