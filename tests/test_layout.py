"""Layout rules, collectives of a plan, and what the whole step obeys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tensorcast.cost.routing import Routing
from tensorcast.cost.stages import stage_layers
from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.layout import Layout, check
from tensorcast.deploy.options import Options
from tensorcast.deploy.plan.plan import Collective
from tensorcast.errors import InputError
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.trace.cache import traced


def _deploy(
    model: str, layout: Layout, phase: str = "decode", device: str = "h200", engine: str = "vllm", **options: Any
) -> Deployment:
    parts = load_model(model), load_device(device), load_engine(engine)
    return deploy(*parts, layout, phase, options=Options(**options))


@pytest.mark.parametrize(
    ("layout", "rule"),
    [
        (Layout(8, 4, 1, 4), "world size"),
        (Layout(3, 3), "heads per rank"),
        (Layout(8, 4, 2, 3), "expert ranks"),
        (Layout(256, 1, 256, 256), "experts per rank"),
        (Layout(64, 1, 64, 1), ""),
        (Layout(4096, 8, 512, 128), ""),
        (Layout(128, 1, 1, 1, 128), "pipeline stages"),
        (Layout(8192, 32, 256, 128), "interconnect reach"),
    ],
)
def test_illegal_layouts_name_the_rule(layout: Layout, rule: str) -> None:
    facts = traced(load_model("qwen3-30b-a3b"), "decode").facts
    if not rule:
        check(layout, facts, load_device("h200"))
        return
    with pytest.raises(InputError, match=f"breaks rule '{rule}'") as caught:
        check(layout, facts, load_device("h200"))
    assert "\n" not in str(caught.value)


def test_expert_width_must_divide() -> None:
    with pytest.raises(InputError, match="expert width 768 does not divide"):
        check(Layout(512, 1, 512, 1), traced(load_model("qwen3-30b-a3b"), "decode").facts, load_device("h200"))


def test_dense_models_refuse_ep() -> None:
    with pytest.raises(InputError, match="has no experts"):
        _deploy("llama-3.1-8b", Layout(8, 8, 1, 8))


@pytest.mark.parametrize(("layers", "pp", "sizes"), [(61, 4, [16, 15, 15, 15]), (5, 5, [1] * 5), (8, 1, [8])])
def test_stages_are_contiguous_and_even(layers: int, pp: int, sizes: list[int]) -> None:
    slices = stage_layers(layers, pp)
    assert [s.stop - s.start for s in slices] == sizes
    assert slices[0].start == 0 and slices[-1].stop == layers


def _collectives(deployment: Deployment) -> list[tuple[str, str, float, int]]:
    """(op, group, bytes per token or sequence, calls)."""
    price = deployment.step.price(1.0, 1.0, 0.0)
    return [
        (row.row.op, row.row.group, float(row.row.scale), int(n))
        for row, n in price.calls
        if isinstance(row.row, Collective)
    ]


def test_tensor_parallel_layers_reduce_twice() -> None:
    """Qwen3-30B at tp8 (etp8): embedding, attention and experts reduced, logits gathered. 48 layers, hidden 2048."""
    assert sorted(_collectives(_deploy("qwen3-30b-a3b", Layout(8, 8)))) == sorted(
        [
            ("all_reduce", "tp", 2 * 2048.0, 1),
            ("all_reduce", "tp", 2 * 2048.0, 48),
            ("all_reduce", "tp", 2 * 2048.0, 48),
            ("all_gather", "tp", 2 * 151936.0, 1),
        ]
    )


def test_expert_parallel_without_dp_needs_no_exchange() -> None:
    """Every rank holds all tokens: one sum of the local experts' results, as with sharded experts."""
    assert sorted(_collectives(_deploy("qwen3-30b-a3b", Layout(8, 8, 1, 8)))) == sorted(
        _collectives(_deploy("qwen3-30b-a3b", Layout(8, 8, 1, 1)))
    )


def test_shared_experts_ride_on_the_blocks_reduction() -> None:
    """DeepSeek-V3 at tp8: 61 attention sums, 3 dense MLP sums, 58 MoE sums; no extra one for the shared expert."""
    reduced = [row for row in _collectives(_deploy("deepseek-v3", Layout(8, 8))) if row[0] == "all_reduce"]
    assert sum(calls for *_, calls in reduced) == 1 + 61 + 3 + 58


@pytest.mark.parametrize("kind", ["low_latency", "high_throughput"])
def test_data_parallel_experts_exchange_copies(kind: str) -> None:
    """DeepSeek-V3 EP32: dispatch 8 fp8 copies with scales, combine 8 bf16 copies, 58 layers."""
    found = _collectives(_deploy("deepseek-v3", Layout(32, 1, 32, 32), all2all=kind))
    assert found == [
        ("all_to_all", "ep", pytest.approx(8 * 7168 * (1 + 4 / 128)), 58),
        ("all_to_all", "ep", 8 * 2 * 7168.0, 58),
    ]


def test_gather_and_scatter_move_every_token_to_every_rank() -> None:
    found = _collectives(_deploy("deepseek-v3", Layout(32, 1, 32, 32), all2all="allgather_reducescatter"))
    assert found == [
        ("all_gather", "dp", pytest.approx(32 * 7168 * (1 + 4 / 128)), 58),
        ("reduce_scatter", "dp", 32 * 2 * 7168.0, 58),
    ]


@pytest.mark.parametrize(
    ("engine", "phase", "moved"),
    [("sglang==0.5.8", "prefill", ("all_reduce", "all_reduce")),
     ("sglang==0.5.14", "prefill", ("all_reduce", "reduce_scatter")),
     ("sglang==0.5.8", "decode", ("all_gather", "reduce_scatter"))],
)  # fmt: skip
def test_sglang_gathers_tokens_as_they_come_by_a_sum(engine: str, phase: str, moved: tuple[str, str]) -> None:
    """dp_attention.py: _dp_gather_via_all_reduce of bf16 where prompts are read (SUM_LEN), whose results are summed,
    too, until moe/utils.py has should_use_dp_reduce_scatterv; captured decode steps pad (MAX_LEN)."""
    made = _deploy("deepseek-v3", Layout(8, 1, 8, 8), phase, engine=engine, all2all="allgather_reducescatter")
    assert _collectives(made) == [(op, "dp", 8 * 2 * 7168.0, 58) for op in moved]


def test_norms_join_no_sum_that_gathers() -> None:
    options = {"all2all": "allgather_reducescatter", "allreduce_fusion": "on"}
    plan = _deploy("deepseek-v3", Layout(8, 1, 8, 8), "prefill", engine="sglang==0.5.8", **options).step.plan
    assert not any("joined_tokens" in row.attrs for row in plan.rows if not isinstance(row, Collective))
    plan = _deploy("deepseek-v3", Layout(8, 8, 1, 8), "prefill", engine="sglang==0.5.8", **options).step.plan
    assert any("joined_tokens" in row.attrs for row in plan.rows if not isinstance(row, Collective))


def test_tokens_are_sent_once_per_tp_group() -> None:
    found = _collectives(_deploy("deepseek-v3", Layout(32, 4, 8, 32), all2all="low_latency"))
    assert ("all_to_all", "ep", 8 * 2 * 7168.0 / 4, 58) in found
    assert ("all_gather", "tp", 2 * 7168.0, 58) in found


def test_exchange_kinds_need_whole_experts() -> None:
    with pytest.raises(InputError, match="needs whole experts on every rank"):
        _deploy("deepseek-v3", Layout(32, 1, 32, 8), all2all="low_latency")


def test_dispatch_dtype_can_be_set() -> None:
    found = _collectives(_deploy("deepseek-v3", Layout(32, 1, 32, 32), all2all="low_latency", dispatch="bf16"))
    assert found[0][2] == 8 * 2 * 7168.0


def test_pipeline_hands_on_between_stages() -> None:
    found = _collectives(_deploy("qwen3-30b-a3b", Layout(16, 8, 1, 8, 2)))
    assert ("send_recv", "pp", 2 * 2 * 2048.0, 1) in found


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("deepseek-v3", Layout(32, 1, 32, 32)),
        ("qwen3-30b-a3b", Layout(8, 4, 2, 8)),
        ("gpt-oss-20b", Layout(2, 2)),
        ("llama-3.1-8b", Layout(2, 2)),
        ("llama-4-scout", Layout(8, 2, 4, 8)),
        ("qwen3.5-35b-a3b", Layout(4, 4)),
        ("glm-5", Layout(16, 1, 16, 16)),
    ],
)
@pytest.mark.parametrize("routing", ["balanced", "uniform", "zipf:0.8"])
def test_arrays_price_like_single_points_and_grow(model: str, layout: Layout, routing: str) -> None:
    if model == "llama-3.1-8b" and routing != "uniform":
        pytest.skip("a dense model has no experts to route to")
    step = _deploy(model, layout, routing=routing).step
    generator = np.random.default_rng(5)
    batch, past = generator.integers(1, 300, 20).astype(float), generator.integers(1, 30_000, 20).astype(float)
    together = step.seconds(batch, 1.0, past)
    alone = [float(step.seconds(float(b), 1.0, float(p))) for b, p in zip(batch, past, strict=True)]
    np.testing.assert_allclose(together, alone, rtol=1e-12)
    lengths = step.seconds(64.0, 1.0, np.array([64.0, 1024.0, 16384.0, 131072.0]))
    assert (np.diff(lengths) >= 0).all()
    assert step.seconds(512.0, 1.0, 4096.0) > step.seconds(8.0, 1.0, 4096.0)


def test_prefill_of_twice_the_tokens_takes_longer_but_not_four_times() -> None:
    step = _deploy("qwen3-30b-a3b", Layout(1), "prefill").step
    one, two = float(step.seconds(1.0, 2048.0, 0.0)), float(step.seconds(1.0, 4096.0, 0.0))
    assert 1.3 * one < two < 3 * one


def test_pipeline_bubble() -> None:
    """Prefill of m micro-batches over pp stages takes m + pp - 1 turns of the slowest stage."""
    step = _deploy("llama-3.1-8b", Layout(2, 1, 1, 1, 2), "prefill").step
    price = step.price(2.0, 2048.0, 0.0)
    assert price.micro_batches == 2
    layers, sums = step.table.layer_kinds, {"in": 0.0, "start": 0.0, "end": 0.0, "hop": 0.0}
    assert len(set(layers)) == 1  # so each stage has half of every layer's seconds
    for row, n in price.calls:
        place = "in" if row.row.kind >= 0 else "hop" if isinstance(row.row, Collective) else "end"
        if getattr(row.row, "name", "") == "embedding" or row.row.module.startswith(("embed", "rotary")):
            place = "start"
        elif isinstance(row.row, Collective) and row.row.op != "send_recv" and row.row.kind < 0:
            place = "end"
        sums[place] += float(row.seconds) * int(n)
    stage_s = [sums["in"] / 2 + sums["start"] + sums["hop"], sums["in"] / 2 + sums["end"]]
    assert float(price.seconds) - float(price.overhead_s) == pytest.approx(3 * max(stage_s))


def test_skewed_routing_costs_more() -> None:
    times = [
        float(_deploy("deepseek-v3", Layout(32, 1, 32, 32), routing=r).step.seconds(128.0, 1.0, 4096.0))
        for r in ("balanced", "uniform", "zipf:0.6", "zipf:1")
    ]
    assert times == sorted(times) and times[-1] > 1.2 * times[0]


def test_routing_is_parsed_once_per_name() -> None:
    assert Routing.parse("zipf:0.5").exponent == 0.5
