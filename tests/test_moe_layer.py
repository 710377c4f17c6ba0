"""The rewritten MoE layer against transformers' own blocks: one process, many processes, and as traced."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from families import MOE_ONLY
from moe_blocks import MOE, block_of, error, output_of
from moe_worker import DRAWN, SEED, TOKENS, cases, run
from torch import Tensor, nn

from tensorcast.errors import InputError
from tensorcast.modeling.moe.backends import BACKENDS
from tensorcast.modeling.moe.fused import FusedMoETensorCast
from tensorcast.modeling.moe.groups import MoEGroups
from tensorcast.modeling.moe.layer import MoELayer
from tensorcast.modeling.moe.parallel import MoEOptions, ParallelMoELayer
from tensorcast.modeling.moe.phase import PHASES
from tensorcast.modeling.moe.placement import linear
from tensorcast.modeling.moe.reading.wrapper import ExpertWrapper
from tensorcast.profiles.model import MoEFields
from tensorcast.trace.record import Recorder

FAMILIES = [*MOE, *MOE_ONLY]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=["fp32", "bf16"])
def test_rewritten_block_equals_eager_on_every_backend(family: str, dtype: torch.dtype, bound: float) -> None:
    """bf16 keeps 8 bits: both run the same products, summed in another order."""
    block, x = block_of(family, dtype), torch.randn(2, 17, 64, dtype=dtype)
    with torch.no_grad():
        expected = output_of(block, x).float()
        for backend in BACKENDS:
            assert error(MoELayer(block, backend=backend)(x).float(), expected) < bound, backend
        for phase in PHASES:
            layer = ParallelMoELayer(MoELayer(block), MoEGroups())
            assert error(layer(x, phase=phase).float(), expected) < bound, phase


def test_hash_routing_of_deepseek_v4() -> None:
    """Its first blocks look experts up by token id."""
    block, x, ids = block_of("deepseek_v4", at=0), torch.randn(2, 9, 64), torch.randint(0, 512, (2, 9))
    with torch.no_grad():
        expected = output_of(block, x, ids)
        for layer in (MoELayer(block), ParallelMoELayer(MoELayer(block), MoEGroups())):
            assert error(layer(x, ids), expected) < 1e-5
    with pytest.raises(InputError, match="pass input_ids"):
        MoELayer(block)(x)


@pytest.mark.parametrize("world", [2, 4])
def test_real_ranks_equal_one_process(world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo, unequal tokens per rank, one rank with none: every layout, exchange, placement, phase and kind of block.

    The balanced cases also run as traced: the same ops, shapes and bytes sent as the meta trace of the same rank.
    """
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # ranks are forked from a server that imports once
    seed = os.environ.get(SEED) or str(secrets.randbelow(2**31))
    monkeypatch.setenv(SEED, seed)
    mp.get_context("forkserver").set_forkserver_preload(["moe_worker"])
    address = tmp_path / "rendezvous"
    mp.start_processes(run, (world, str(address)), nprocs=world, start_method="forkserver")
    wrong: list[Any] = []
    expected = len(list(cases(world))) + DRAWN
    for rank in range(world):
        results = json.loads(Path(f"{address}.{rank}.json").read_text())
        assert len(results) == expected
        wrong += [(rank, *result) for result in results if not result[1] < 1 or result[2]]
    assert not wrong, f"{SEED}={seed}\n" + "\n".join(map(str, wrong))
    assert 0 in TOKENS[:world]


def _traced(layer: ParallelMoELayer, tokens: int) -> list[tuple[str, tuple[Any, ...]]]:
    recorder = Recorder(layer)
    with torch.no_grad(), recorder:
        layer(torch.empty(1, tokens, 64, device="meta"))
    return [(c.name, tuple(t.shape for t in (*c.inputs, *c.outputs))) for c in recorder.calls]


@pytest.mark.parametrize(("tp", "dp", "ep"), [(1, 32, 32), (8, 4, 32), (8, 1, 8), (4, 4, 1)])
def test_one_rank_of_any_world_traces_on_meta(tp: int, dp: int, ep: int) -> None:
    """No process group anywhere: 32 ranks' worth of layout on one meta tensor; every rank traces the same shapes."""
    block = block_of("qwen3_moe").to("meta")
    exchange = "all_to_all" if ep == tp * dp else "allgather_reducescatter"
    if ep > 16:  # the small block has 16 experts
        ep, dp = 16, 16 // tp
    traces = []
    for rank in (0, tp * dp - 1):
        groups = MoEGroups.of(tp, dp, ep, rank)
        traces.append(_traced(ParallelMoELayer(MoELayer(block), groups, MoEOptions(exchange)), 24))  # type: ignore[arg-type]
    assert traces[0] == traces[1]
    sizes = {name: shapes for name, shapes in traces[0]}
    experts = 16 // ep
    rows = 24 * 4 // tp if exchange == "all_to_all" and dp > 1 else 24 * dp * 4 // ep
    grouped = sizes["grouped_matmul"]
    assert grouped[0][0] == rows and grouped[1][0] == experts


def test_one_token_per_rank_costs_one_token_per_rank() -> None:
    """The remainder does not pile up on rank 0: with one token and k = 4 each rank of EP16 gets 4 rows."""
    block = block_of("qwen3_moe").to("meta")
    layer = ParallelMoELayer(MoELayer(block), MoEGroups.of(1, 16, 16, 0))
    grouped = [shapes for name, shapes in _traced(layer, 1) if name == "grouped_matmul"]
    assert [shape[0][0] for shape in grouped] == [4, 4]


def test_what_is_traced_is_what_runs() -> None:
    """The real layer under the recorder and the meta trace of the same layout: same ops, same shapes."""
    block = block_of("deepseek_v3")
    real = ParallelMoELayer(MoELayer(block), MoEGroups())
    recorder, x = Recorder(real), torch.randn(1, 12, 64)
    with torch.no_grad(), recorder:
        real(x)
    ran = [(c.name, tuple(t.shape for t in (*c.inputs, *c.outputs))) for c in recorder.calls]
    assert _traced(ParallelMoELayer(MoELayer(block.to("meta")), MoEGroups()), 12) == ran


class _MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.down_proj, self.act_fn = nn.Linear(12, 8, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class _ListBlock(nn.Module):
    """An older block: a linear gate with raw logits and a ModuleList of MLPs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 6, bias=False), nn.ModuleList(_MLP() for _ in range(6))
        self.top_k, self.norm_topk_prob = 2, True

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.gate(x).softmax(-1).topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        rows = [
            sum(w * self.experts[int(e)](t) for w, e in zip(ws, es, strict=True))
            for t, ws, es in zip(x, weights, index, strict=True)
        ]
        return torch.stack(rows)


def test_raw_logits_and_module_lists() -> None:
    torch.manual_seed(4)
    block, x = _ListBlock(), torch.randn(9, 8)
    with torch.no_grad():
        assert error(MoELayer(block)(x), block(x)) < 1e-5


def test_expert_wrapper_has_one_face() -> None:
    torch.manual_seed(5)
    listed = ExpertWrapper(_ListBlock().experts)
    stacked = ExpertWrapper(listed.stacked())
    rows = torch.randn(4, 8)
    with torch.no_grad():
        for expert in range(6):
            torch.testing.assert_close(listed.call(expert, rows), stacked.call(expert, rows))
        torch.testing.assert_close(stacked.slice(2, 3).call(1, rows), listed.call(3, rows))
    assert len(listed) == len(stacked) == 6 and len(listed.slice(1, 2)) == 2
    empty = rows[:0]
    assert listed.call(0, empty) is empty and stacked.call(0, empty) is empty
    with pytest.raises(TypeError, match="expected a ModuleList"):
        ExpertWrapper(nn.Linear(2, 2))


def test_router_callable_gets_token_ids() -> None:
    """Hash routing: experts looked up by token id, no logits."""
    block = _ListBlock()
    table = torch.arange(100)[:, None] % 6 + torch.tensor([0, 1])

    def by_id(gate: Any, x: Tensor, k: int, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return table[ids] % 6, torch.full((x.shape[0], k), 0.5)

    ids, x = torch.tensor([3, 9, 50]), torch.randn(3, 8)
    with torch.no_grad():
        found = MoELayer(block, router=by_id)(x, ids)
        expected = torch.stack(
            [
                0.5 * (block.experts[i % 6](t) + block.experts[(i + 1) % 6](t))
                for i, t in zip(ids.tolist(), x, strict=True)
            ]
        )
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (MoEFields(gate="switch"), "moe.gate = 'switch', but its MoE block has"),
        (MoEFields(experts="mlps"), "moe.experts = 'mlps'"),
        (MoEFields(top_k="num_chosen"), r"field top_k \('num_chosen'\) is on neither"),
    ],
)
def test_profile_fields_that_do_not_exist_are_named(fields: MoEFields, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        MoELayer(_ListBlock(), fields, model="my-model")
    assert "my-model" in str(caught.value) and "\n" not in str(caught.value)


def _layer(block: Any, sizes: tuple[int, int, int], **said: Any) -> ParallelMoELayer:
    return ParallelMoELayer(MoELayer(block), MoEGroups.of(*sizes), MoEOptions(**said))


def test_blocks_that_cannot_be_are_refused() -> None:
    block: Any = _ListBlock()
    for wrong in (7, 0):
        block.top_k = wrong
        with pytest.raises(InputError, match=f"top_k = {wrong} of 6 experts"):
            MoELayer(block)
    dense: Any = nn.Module()
    dense.gate = nn.Linear(2, 2)
    with pytest.raises(InputError, match="has no experts"):
        MoELayer(dense)
    half = _ListBlock()
    half.to_latent = nn.Linear(8, 4)
    with pytest.raises(InputError, match="one latent projection, 'to_latent'; name both"):
        MoELayer(half)
    with pytest.raises(InputError, match="ep = 8 is more than the 6 experts"):
        FusedMoETensorCast(MoELayer(_ListBlock()).stacked, MoEGroups.of(1, 8, 8))
    with pytest.raises(InputError, match="placement of 6 experts on 3 ranks, but the layer has 6 experts and ep = 2"):
        ParallelMoELayer(MoELayer(_ListBlock()), MoEGroups.of(1, 2, 2), placement=linear(6, 3))
    with pytest.raises(InputError, match="does not divide"):
        MoEGroups.of(2, 2, 3)


@pytest.mark.parametrize(
    ("sizes", "said", "message"),
    [
        ((1, 2, 2), {"chunk_tokens": 4}, "needs max_tokens"),
        ((1, 2, 2), {"decode_exchange": "low_latency"}, "low_latency needs max_tokens"),
        ((1, 4, 2), {}, r"all_to_all with etp = 2: .* ep must be tp\*dp = 4 or dp = 4, not 2"),
        ((1, 2, 2), {"split_tokens_over_tp": True}, "split_tokens_over_tp is for dp = 1 and ep = tp"),
        ((2, 1, 2), {"sequence_parallel": True, "exchange": "allgather_reducescatter"}, "sequence_parallel needs rows"),
        ((1, 2, 2), {"external_shared_experts": 1}, "external_shared_experts = 1: model _ListBlock has no shared"),
        ((1, 2, 2), {"external_shared_experts": 2}, "= 2 leaves none of ep = 2 ranks for routed experts"),
        ((1, 2, 2), {"external_shared_experts": -1}, "= -1 leaves none"),
        ((1, 2, 2), {"backend": "triton"}, "unknown experts backend 'triton'"),
        ((1, 2, 2), {"dispatch": "w4a16"}, "dispatch = 'w4a16': this scheme keeps activations"),
        ((1, 2, 2), {"dispatch": "fp7"}, "fp7"),
        ((1, 2, 2), {"combine": "mxfp4"}, "combine = 'mxfp4': this scheme keeps activations"),
        ((1, 2, 2), {"combine": "logfmt10"}, "logfmt10"),
        ((1, 2, 2), {"backend": "foo=masked"}, "experts backend of 'foo'"),
        ((1, 2, 2), {"scheme": "fp7"}, "fp7"),
    ],
)
def test_options_that_cannot_be_are_refused(sizes: tuple[int, int, int], said: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        _layer(_ListBlock(), sizes, **said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("mixtral", (1, 1, 1), "it has no shared expert"),
        ("deepseek_v3", (2, 1, 2), "ep must be 1, with no placement and no external shared experts; here ep = 2"),
        ("qwen2_moe", (1, 1, 1), r"its shared expert's gate_up_proj is \(192, 64\), a routed one's \(96, 64\)"),
        ("nemotron_h", (1, 1, 1), "what its routed experts read"),
    ],
)
def test_shared_experts_that_are_not_like_the_routed_ones_are_not_fused(
    family: str, sizes: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(InputError, match=f"fuse_shared_experts: {message}"):
        _layer(block_of(family), sizes, fuse_shared_experts=True, exchange="allgather_reducescatter")


def test_a_shared_expert_with_another_activation_is_not_fused() -> None:
    block: Any = block_of("deepseek_v3")
    block.shared_experts.act_fn = nn.GELU()
    with pytest.raises(InputError, match="its shared expert computes something else"):
        _layer(block, (1, 1, 1), fuse_shared_experts=True)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next", "llama4_text", "glm4_moe"])
def test_a_shared_expert_among_the_routed_ones_on_every_backend(family: str) -> None:
    block, x = block_of(family), torch.randn(2, 17, 64)
    layer = _layer(block, (1, 1, 1), fuse_shared_experts=True)
    assert layer.experts.num_experts == MoELayer(block).num_experts + 1
    with torch.no_grad():
        expected = output_of(block, x)
        for backend in BACKENDS:
            fused = _layer(block, (1, 1, 1), fuse_shared_experts=True, backend=backend)
            assert error(fused(x), expected) < 1e-6, backend


def test_external_shared_experts_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="has latent or zero experts"):
        _layer(block_of("nemotron_h"), (1, 2, 2), external_shared_experts=1)
    with pytest.raises(InputError, match="ep = 16 less 1 external is more than the 8 routed experts"):
        _layer(block_of("qwen2_moe"), (1, 16, 16), external_shared_experts=1)
    layer, x = MoELayer(_ListBlock()), torch.randn(4, 8)
    with pytest.raises(InputError, match="phase 'warmup': must be prefill or decode"):
        layer(x, phase="warmup")
    with pytest.raises(InputError, match="4 tokens on a rank, more than max_tokens = 3"):
        _layer(_ListBlock(), (1, 1, 1), max_tokens=3)(x)
    with pytest.raises(InputError, match="for the masked backend; eager cannot"):
        _layer(_ListBlock(), (1, 2, 2), exchange="low_latency", max_tokens=4, backend="eager")(x)
