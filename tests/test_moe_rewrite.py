"""Blocks rewritten in place against the models they come from, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import census
import pytest
import torch
from moe_blocks import block_of, census_model, error, model_of
from rewriting import NAMED, NOT_REWRITTEN
from torch import Tensor, nn

from tensorcast.errors import InputError
from tensorcast.modeling.build import causal_lm
from tensorcast.modeling.config import hf_config
from tensorcast.modeling.moe.apply import apply_moe, moe_blocks
from tensorcast.modeling.moe.groups import MoEGroups
from tensorcast.modeling.moe.layer import MoELayer
from tensorcast.modeling.moe.parallel import MoEOptions, ParallelMoELayer
from tensorcast.modeling.moe.reading.probe import BOUND, difference, probe_rows, small_twin
from tensorcast.modeling.moe.rewrite import CalledExperts, prove, rewrite
from tensorcast.profiles.model import MoEFields
from tensorcast.profiles.store import list_models, load_model
from tensorcast.validate.run import cut

RUNNING = [family for family in census.families() if family not in {*NOT_REWRITTEN, *NAMED}]


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(input_ids=ids)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("family", [*(f for f in RUNNING if f != "minimax_m3_vl"), *NAMED])  # it needs longer prompts
def test_every_familys_model_gives_the_same_logits(family: str) -> None:
    model, ids = census_model(family), torch.randint(0, 512, (2, 9))
    expected, untouched = logits(model, ids), copy.deepcopy(model)
    paths = apply_moe(model, name=family, fields=NAMED.get(family, MoEFields()))
    assert len(paths) == len(list(census.experts_modules(family))) or family in ("dbrx", "ernie4_5_vl_moe", *NAMED)
    found = error(logits(model, ids), expected)
    # Some models amplify rounding: muse_spark's own fp32 logits are 3e-6 off those it gives in float64.
    assert found < 1e-6 or found < 2 * error(expected, logits(untouched.double(), ids).float())


@pytest.mark.parametrize("family", RUNNING[:: max(1, len(RUNNING) // 8)])
def test_bf16_stays_within_its_rounding(family: str) -> None:
    """Blocks alone: a whole model in bf16 routes other tokens elsewhere."""
    model = census_model(family).to(torch.bfloat16)
    path, block = list(moe_blocks(model))[-1]
    if prove(block).kept:
        pytest.skip("its own code runs around the experts; those are in the fp32 test")
    x = torch.randn(2, 9, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = block(x)
        expected = expected[0] if isinstance(expected, tuple) else expected
        found = rewrite(block)(x)
    found = found[0] if isinstance(found, tuple) else found
    assert error(found.float(), expected.float().reshape(found.shape)) < 2e-2, path


@pytest.mark.parametrize("family", NAMED)
def test_families_that_need_names_say_so_in_a_line(family: str) -> None:
    with pytest.raises(InputError, match=r"no block with experts; name them in moe\.experts") as caught:
        apply_moe(census_model(family), name=family)
    assert "\n" not in str(caught.value)


class _Expert(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12, bias=bias), nn.Linear(8, 12, bias=bias)
        self.down_proj, self.act_fn = nn.Linear(12, 8, bias=bias), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class _Scaled(_Expert):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-1, 1)) * 1.7


class _Block(nn.Module):
    """Weights are always renormalised, which no attribute says."""

    def __init__(self, experts: list[nn.Module], scale: float = 1.0) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, len(experts), bias=False), nn.ModuleList(experts)
        self.top_k, self.scale = 2, scale

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 8)
        weights, index = self.gate(flat).softmax(-1).topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        rows = [
            sum(w * self.experts[int(e)](t) for w, e in zip(ws, es, strict=True))
            for t, ws, es in zip(flat, weights, index, strict=True)
        ]
        return torch.stack(rows).view_as(x) * self.scale


class _Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.mlp = block

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(x)
        return out


@pytest.mark.parametrize("expert", [lambda: _Expert(True), lambda: _Expert(False), lambda: _Scaled(False)])
def test_lists_of_experts_do_what_their_forward_does(expert: Any) -> None:
    """Biases, clamps and scales, and a renormalisation that nothing names."""
    torch.manual_seed(1)
    model, x = _Model(_Block([expert() for _ in range(6)])), torch.randn(9, 8) * 3
    with torch.no_grad():
        expected = model(x)
        apply_moe(model)
        assert error(model(x), expected) < 1e-6


def test_a_scale_in_the_block_is_refused_until_it_is_named() -> None:
    torch.manual_seed(2)
    block = _Block([_Expert(False) for _ in range(6)], scale=2.5)
    with pytest.raises(InputError, match=r"it differs from its own forward by .* of the largest value"):
        apply_moe(_Model(copy.deepcopy(block)))
    model, x = _Model(block), torch.randn(9, 8)
    with torch.no_grad():
        expected = model(x)
        apply_moe(model, fields=MoEFields(routed_scale="scale"))
        assert error(model(x), expected) < 1e-6


def test_a_kept_block_says_what_it_cannot_do() -> None:
    """Gemma-4's decoder layer is the block: its own code runs, and its shared MLP cannot move to other ranks."""
    model = census_model("gemma4")
    with pytest.raises(InputError, match="enable_shared_expert_tp needs a block that is read by its fields"):
        apply_moe(model, options=MoEOptions(enable_shared_expert_tp=True))
    apply_moe(model)
    assert any(isinstance(m, CalledExperts) for m in model.modules())


def test_weights_that_a_rank_does_not_hold_are_let_go() -> None:
    model: Any = model_of("qwen3_moe")
    apply_moe(model, groups=MoEGroups.of(1, 4, 4, 1))
    held = [name for name, _ in model.named_parameters() if "layers.0" in name and "gate_up_proj" in name]
    assert held == ["model.layers.0.mlp.layer.experts.local.gate_up_proj"]


def test_a_width_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="experts of width 48 do not divide over etp = 5"):
        ParallelMoELayer(MoELayer(block_of("qwen3_moe")), MoEGroups.of(5, 1, 1))


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "nemotron_h", "llama4_text"])
def test_a_twin_of_wide_blocks_is_narrow_and_computes(family: str) -> None:
    """On meta at any width: what is compared is small, and the block itself untouched."""
    block = block_of(family).to("meta")
    shapes = {name: p.shape for name, p in block.named_parameters()}
    twin = small_twin(block)
    assert all(not p.is_meta and p.dtype == torch.float32 for p in twin.parameters())
    assert {name: p.shape for name, p in block.named_parameters()} == shapes
    with torch.no_grad():
        out = twin(probe_rows(64).view(2, 6, 64))
    out = out[0] if isinstance(out, tuple) else out
    assert bool(out.isfinite().all())


def test_difference_sees_what_is_not_finite_or_of_another_shape() -> None:
    x = torch.randn(3, 4)
    assert difference(x, x) == 0 and difference(x * 1.1, x) > BOUND
    assert difference(x.nan_to_num() * float("nan"), x) == float("inf") == difference(x[:2], x)


STATED = [name for name in list_models() if load_model(name).moe != MoEFields()]


@pytest.mark.parametrize("name", STATED)
def test_shipped_profiles_say_what_their_blocks_do(name: str) -> None:
    """At full width on meta: proved equal, and every rank of tp8-ep8 builds its share."""
    profile = cut(load_model(name), 4)
    with torch.device("meta"):
        model = causal_lm(hf_config(profile), torch.bfloat16)
    block = list(moe_blocks(model, profile.moe))[-1][1]
    proof = prove(block, profile.moe, name)
    assert bool(proof.kept) == bool(profile.moe.keep_block)
    experts = getattr(block, str(profile.moe.experts))
    for rank in range(8):
        own = copy.copy(block)
        own._modules = dict(block._modules)
        layer = rewrite(own, MoEGroups.of(8, 1, 8, rank), fields=profile.moe, model=name)
        held: Any = (layer.experts if proof.kept else layer).layer.experts.local  # type: ignore[union-attr]
        assert held.down_proj.shape[0] == experts.down_proj.shape[0] // 8


def test_at_least_five_profiles_state_what_cannot_be_seen() -> None:
    assert len(STATED) >= 5


def test_hash_routing_needs_a_gate_of_token_ids() -> None:
    with pytest.raises(InputError, match=r"moe\.routing = 'hash', but its gate 'gate' takes no input_ids"):
        MoELayer(block_of("mixtral"), MoEFields(routing="hash"))


def test_a_width_that_is_a_multiple_of_the_number_of_experts_becomes_small() -> None:
    """Widths of 256 and 512 beside 128 experts: only the number of experts stays."""
    block = nn.Module()
    block.gate = nn.Linear(512, 128, bias=False, device="meta")
    block.up = nn.Parameter(torch.empty(128, 512, 512, device="meta"))
    block.down = nn.Parameter(torch.empty(128, 512, 256, device="meta"))
    twin = small_twin(block)
    assert twin.gate.weight.shape[0] == twin.up.shape[0] == twin.down.shape[0] == 128
    assert max(twin.up.shape[1:]) <= 128 and twin.up.shape[1] == 2 * twin.down.shape[2]
