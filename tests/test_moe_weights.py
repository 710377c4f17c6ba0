"""Checkpoints' tensors loaded shard by shard, against experts stacked whole; weights moved to another placement."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_blocks import block_of, error, model_of, output_of
from torch import Tensor

from tensorcast.errors import InputError
from tensorcast.modeling.moe.backends import BACKENDS, all_backends, register_backend
from tensorcast.modeling.moe.experts import FusedMoEBase
from tensorcast.modeling.moe.fused import FusedMoETensorCast
from tensorcast.modeling.moe.groups import MoEGroups
from tensorcast.modeling.moe.implementations import use_backend
from tensorcast.modeling.moe.kernels import run_experts
from tensorcast.modeling.moe.parallel import MoEOptions
from tensorcast.modeling.moe.placement import Placement, eplb, linear, round_robin
from tensorcast.modeling.moe.rewrite import rewrite
from tensorcast.modeling.moe.weights.loading import ExpertLoader, expert_map, load_experts, make_expert_params_mapping
from tensorcast.modeling.moe.weights.rearrange import moves, rearrange
from tensorcast.ops.quantized import dequantize_weight, parts_of, quantize_weight

PLACEMENTS = {
    "linear": lambda ranks: linear(8, ranks),
    "round_robin": lambda ranks: round_robin(8, ranks),
    "eplb": lambda ranks: eplb([9.0, 1, 1, 1, 5, 1, 1, 1], ranks, redundant=ranks),
}


def _experts(family: str, hidden: int = 128, inner: int = 512) -> Any:
    """Stacked experts with widths that every format divides."""
    experts = block_of(family).experts
    generator = torch.Generator().manual_seed(1)
    for name, parameter in list(experts.named_parameters()):
        up = name.startswith("gate_up")
        rows, columns = (2 * inner, hidden) if up else (hidden, inner)
        sizes = (rows,) if name.endswith("bias") else (columns, rows) if experts.is_transposed else (rows, columns)
        setattr(experts, name, torch.nn.Parameter(torch.randn(8, *sizes, generator=generator).to(parameter.dtype)))
    return experts


def _checkpoint(experts: Any, scheme: str) -> list[tuple[str, Tensor]]:
    """One file's tensors: an expert's projections apart, in linear layers' orientation, quantised one by one."""
    words = {"values": "weight", "scale": "weight_scale", "zero": "weight_zero_point", "outer_scale": "weight_scale_2"}
    found = []
    for e in range(8):
        up = experts.gate_up_proj[e].t() if experts.is_transposed else experts.gate_up_proj[e]
        down = experts.down_proj[e].t() if experts.is_transposed else experts.down_proj[e]
        gate, top = up.chunk(2) if experts.is_concatenated else (up[::2], up[1::2])
        for name, weight in (("gate_proj", gate), ("up_proj", top), ("down_proj", down)):
            parts = [weight] if scheme == "bf16" else quantize_weight(weight, scheme)
            kinds = ("values",) if scheme == "bf16" else parts_of(scheme)
            start = f"model.layers.3.mlp.experts.{e}.{name}"
            found += [(f"{start}.{words[kind]}", part) for kind, part in zip(kinds, parts, strict=True)]
        if experts.has_bias:
            bias = experts.gate_up_proj_bias[e]
            halves = bias.chunk(2) if experts.is_concatenated else (bias[::2], bias[1::2])
            for name, one in zip(("gate_proj", "up_proj"), halves, strict=True):
                found.append((f"model.layers.3.mlp.experts.{e}.{name}.bias", one))
            found.append((f"model.layers.3.mlp.experts.{e}.down_proj.bias", experts.down_proj_bias[e]))
    return found


def _of_checkpoint(experts: Any, e: int, name: str, scheme: str) -> Tensor:
    """A stacked projection as the checkpoint's tensors say, ``[N,K]``: gate and up each with scales of their own."""
    weight = getattr(experts, name)[e].t() if experts.is_transposed else getattr(experts, name)[e]
    if scheme == "bf16":
        return weight.detach()
    if name == "down_proj":
        return dequantize_weight(quantize_weight(weight, scheme), scheme, torch.float32)
    halves = list(weight.chunk(2)) if experts.is_concatenated else [weight[::2], weight[1::2]]
    halves = [dequantize_weight(quantize_weight(half, scheme), scheme, torch.float32) for half in halves]
    return torch.cat(halves) if experts.is_concatenated else torch.stack(halves, 1).flatten(0, 1)


def _blank(stage: FusedMoETensorCast) -> FusedMoETensorCast:
    """The same stage with weights of its own that hold nothing."""
    stage = copy.deepcopy(stage)
    with torch.no_grad():
        for parameter in stage.local.parameters():
            parameter.view(torch.uint8).zero_()
    return stage


@pytest.mark.parametrize("scheme", ["bf16", "fp8", "fp8_block", "int8", "w4a16", "w4a16_g32", "mxfp4"])
@pytest.mark.parametrize(("family", "placement"), [("qwen3_moe", "eplb"), ("gpt_oss", "round_robin")])
def test_shards_loaded_one_by_one_are_the_experts_stacked_whole(family: str, placement: str, scheme: str) -> None:
    """On every rank of ep 2 x etp 2: what slicing the experts as one rank holds them all gives."""
    experts, placed = _experts(family), PLACEMENTS[placement](2)
    if family == "gpt_oss" and scheme == "fp8_block":  # a block of interleaved rows is of gate and up, with one scale
        with pytest.raises(InputError, match="gate and up interleaved, with one scale for a block of both"):
            stage = FusedMoETensorCast(experts, MoEGroups(), linear(8, 1), scheme=scheme)
            load_experts(ExpertLoader(stage), _checkpoint(experts, scheme), make_expert_params_mapping(linear(8, 1)))
        return
    for rank in range(4):
        groups = MoEGroups.of(2, 2, 2, rank)
        stage = _blank(FusedMoETensorCast(experts, groups, placed, scheme=scheme))
        loader = ExpertLoader(stage)
        strange = load_experts(
            loader, [("model.layers.3.mlp.gate.weight", torch.ones(1)), *_checkpoint(experts, scheme)],
            make_expert_params_mapping(placed),
        )  # fmt: skip
        assert strange == ["model.layers.3.mlp.gate.weight"] and loader.missing() == []
        held = [placed.physical_to_logical[slot] for slot in placed.slots(groups.ep.rank)]
        local: Any = stage.local
        for e, mine in zip(held, range(len(held)), strict=True):
            for name in ("gate_up_proj", "down_proj"):
                expected, cut = _of_checkpoint(experts, e, name, scheme), groups.etp
                if name == "down_proj":
                    expected = expected.chunk(cut.size, 1)[cut.rank]
                elif experts.is_concatenated:
                    expected = torch.cat([half.chunk(cut.size)[cut.rank] for half in expected.chunk(2)])
                else:
                    expected = expected.chunk(cut.size)[cut.rank]
                parts = [getattr(local, name + suffix)[mine] for suffix in local._suffixes]
                if scheme == "bf16":
                    found = parts[0].t() if experts.is_transposed else parts[0]
                else:
                    found = dequantize_weight(parts, scheme, torch.float32)
                rows, columns = expected.shape  # beyond them lies what kernels need in width
                assert torch.equal(found[:rows, :columns], expected), f"rank {rank}, expert {e}: {name}"
                assert not found[rows:].any() and not found[:, columns:].any()


def test_one_scale_per_tensor_eight_values_to_an_int32_and_transposed() -> None:
    experts, placed = _experts("qwen3_moe"), linear(8, 1)
    stage = _blank(FusedMoETensorCast(experts, MoEGroups(), placed, scheme="fp8"))
    loader, weight = ExpertLoader(stage), torch.randn(512, 128)
    values, scale = quantize_weight(weight, "fp8", per_tensor=True)
    assert loader.load(values, shard="w3", expert=2) and loader.load(scale, shard="w3", expert=2, part="scale")
    local: Any = stage.local
    assert torch.equal(local.gate_up_proj[2, 512:].view(torch.uint8), values.view(torch.uint8))
    assert (local.gate_up_proj_scale[2, 512:] == scale).all() and (local.gate_up_proj_scale[2, :512] == 0).all()
    assert "values of w1, slot 2" in loader.missing() and "values of w3, slot 2" not in loader.missing()
    stage = _blank(FusedMoETensorCast(experts, MoEGroups(), placed, scheme="w4a16_g32"))
    (pairs, _), local = quantize_weight(weight, "w4a16_g32"), stage.local
    ExpertLoader(stage).load(pairs.view(torch.int32), shard="w1", expert=0)
    assert torch.equal(local.gate_up_proj[0, :512], pairs)
    plain = _blank(FusedMoETensorCast(experts, MoEGroups(), placed))
    ExpertLoader(plain).load(weight.t(), shard="w1", expert=7, transposed=True)
    assert torch.equal(plain.local.gate_up_proj[7, :512], weight)  # type: ignore[index]


def test_tensors_that_do_not_fit_are_one_line() -> None:
    experts = _experts("qwen3_moe")
    loader = ExpertLoader(FusedMoETensorCast(experts, MoEGroups.of(1, 2, 2, 1), scheme="nvfp4"))
    assert not loader.load(torch.zeros(512, 64), shard="w1", expert=0)  # rank 0's
    for said, message in (
        ({"weight": torch.zeros(512, 63), "shard": "w1", "expert": 4}, r"shape \[512, 63\] does not fit \[512, 64\]"),
        ({"weight": torch.zeros(1), "shard": "w1", "expert": 9}, "expert 9: the placement has 8"),
        ({"weight": torch.zeros(1), "shard": "w1", "expert": 4, "part": "zero"}, "have values, scale, outer_scale"),
    ):
        with pytest.raises(InputError, match=message):
            loader.load(**said)  # type: ignore[arg-type]
    loader.load(torch.full((1, 1), 2.0), shard="w1", expert=4, part="outer_scale")
    with pytest.raises(InputError, match="different outer scales"):
        loader.load(torch.full((1, 1), 3.0), shard="w3", expert=4, part="outer_scale")
    with pytest.raises(InputError, match="'g_idx' is none of weight"):
        load_experts(loader, [("experts.4.up_proj.g_idx", torch.ones(1))], make_expert_params_mapping(linear(8, 2)))


@given(st.data())
@settings(max_examples=60)
def test_maps_and_moves_of_any_two_placements(data: st.DataObject) -> None:
    """Every slot is filled once, with its expert, from home where the rank has it; maps say -1 for others' experts."""
    experts, ranks = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    redundant = data.draw(st.integers(max(0, ranks - experts), 6))
    counts = data.draw(st.lists(st.floats(0, 100), min_size=experts, max_size=experts))
    before = linear(experts, ranks, redundant)
    more = -(experts + redundant) % ranks
    after = eplb(counts, ranks, redundant + more)
    for rank in range(ranks):
        local = expert_map(before, rank)
        assert [int(s) for s in torch.nonzero(local >= 0)] == list(before.slots(rank))
    every = moves(before, after)
    for to in range(ranks):
        filled = {place: (giver, slot) for giver in range(ranks) for slot, place in every[giver][to]}
        assert sorted(filled) == list(range(after.experts_per_rank[to]))
        for place, (giver, slot) in filled.items():
            wanted = after.physical_to_logical[after.slots(to).start + place]
            assert before.physical_to_logical[before.slots(giver).start + slot] == wanted
            held = {before.physical_to_logical[s] for s in before.slots(to)}
            assert (giver == to) == (wanted in held)


@pytest.mark.parametrize("scheme", ["bf16", "w8a16_fp8_block"])
def test_one_rank_placed_anew_gives_the_same(scheme: str) -> None:
    experts, x = _experts("qwen3_moe"), torch.randn(9, 128)
    stage = FusedMoETensorCast(experts, MoEGroups(), linear(8, 1), scheme=scheme)
    indices, weights = torch.rand(9, 8).argsort(-1)[:, :3], torch.rand(9, 3)
    with torch.no_grad():
        expected = stage(x, indices, weights)
        assert rearrange(stage, eplb(np.arange(8.0), 1, redundant=4)) == 0 and stage.count == 12
        assert error(stage(x, indices, weights), expected) < 1e-6
    with pytest.raises(InputError, match="placement of 8 experts on 2 ranks, but the layer has 8 on 1"):
        rearrange(stage, linear(8, 2))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "glm4_moe"])
def test_a_stock_model_runs_on_every_backend_by_name(family: str) -> None:
    model, ids = model_of(family), torch.randint(0, 512, (2, 7))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for backend in BACKENDS:
            use_backend(model, backend)
            assert error(model(input_ids=ids).logits, expected) < 1e-6, backend


def test_experts_of_other_ranks_are_left_out_by_their_sentinel() -> None:
    """Transformers' expert parallelism marks them with the number of local experts."""
    experts = block_of("mixtral").experts
    from tensorcast.modeling.moe.implementations import experts_forward

    x, index, weights = torch.randn(5, 64), torch.tensor([[0, 8], [8, 8], [3, 8], [7, 1], [8, 2]]), torch.rand(5, 2)
    weights[index == 8] = 0.0
    with torch.no_grad():
        expected = experts(x, index.clamp(max=7), weights)
        for backend in BACKENDS:
            assert error(experts_forward(experts, x, index, weights, backend=backend), expected) < 1e-6


def test_models_outside_the_interface_are_refused() -> None:
    with pytest.raises(InputError, match="outside transformers' interface; use apply_moe"):
        use_backend(model_of("llama4_text"), "masked")
    with pytest.raises(InputError, match="unknown experts backend 'mask'"):
        use_backend(model_of("mixtral"), "mask")


def test_a_backend_of_ones_own_runs_is_proved_and_has_no_price(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorcast as tc
    from tensorcast.modeling.moe import backends

    name, calls = "twice_as_careful", []

    def run(rows: Tensor, counts: Tensor, **more: Any) -> Tensor:
        calls.append(rows.shape)
        return run_experts("grouped_mm", rows, counts, **more)

    monkeypatch.setattr(backends, "_OWN", {})
    register_backend(name, run)
    block, x = block_of("mixtral"), torch.randn(1, 5, 64)
    layer = rewrite(block, options=MoEOptions(backend=name))
    assert len(calls) > 0  # the proof on random rows held it against the stock block
    with torch.no_grad():
        assert error(layer(x), output_of(block, x)) < 1e-6
    assert name in all_backends()
    for taken, message in ((name, "there already"), ("masked", "there already"), ("my backend", "an identifier")):
        with pytest.raises(InputError, match=message):
            register_backend(taken, run)
    with pytest.raises(InputError, match=f"experts_backend {name}: registered by you; it runs, but has no price"):
        tc.simulate("qwen3-30b-a3b", device="h200", experts_backend=name)


def test_prompts_cut_over_ranks_are_data_parallel_ranks_to_the_layer() -> None:
    groups = MoEGroups.of(2, 2, 8, 5, pcp=2)
    assert (groups.dp.size, groups.dp.rank, groups.ep.size, groups.ep.rank) == (4, 2, 8, 5)
    assert isinstance(FusedMoETensorCast(_experts("qwen3_moe"), groups).local, FusedMoEBase)
    assert isinstance(linear(8, 8), Placement)
