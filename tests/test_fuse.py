"""Fusion passes: what serving engines run as one kernel, found without knowing the model."""

from __future__ import annotations

import random

import pytest
from families import SMALL

from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.store import load_engine, load_model
from tensorcast.trace.cache import traced
from tensorcast.trace.dims import Dim, Sizes
from tensorcast.trace.fuse import BARRIERS, fold, fuse, pointwise_runs
from tensorcast.trace.table import Op, OpTable, Tensor
from tensorcast.trace.tracer import trace

ENGINE = ("merged_gemm", "pointwise")
SIZES = Sizes(B=5.0, S=1.0, P=300.0, R=40.0, E=16.0)


def _layer(table: OpTable, kind: int) -> list[Op]:
    return [op for op in table.ops if op.kind == kind]


def _small(family: str, phase: str = "decode") -> OpTable:
    profile = ModelProfile(name=family, hf_id=family, description="d", sources={}, config=SMALL[family])
    return trace(profile, phase)  # type: ignore[arg-type]


def test_a_deepseek_layer_becomes_an_engines_kernels() -> None:
    raw = traced(load_model("deepseek-v3"), "decode")
    fused = fuse(raw, ENGINE)
    assert len(_layer(raw, 1)) > 80
    assert len(_layer(fused, 1)) <= 24
    modules = {op.module.rpartition(".")[2]: op for op in _layer(fused, 1) if op.name == "mm"}
    assert {"q_a_proj+kv_a_proj_with_mqa", "q_b_proj", "o_proj", "gate", "gate_proj+up_proj", "down_proj"} == set(
        modules
    )


def test_a_qwen_layer_merges_qkv_and_keeps_two_norms_fused_with_adds() -> None:
    fused = fuse(traced(load_model("qwen3-30b-a3b"), "decode"), ENGINE)
    layer = _layer(fused, 0)
    assert len(layer) <= 15
    qkv = next(op for op in layer if "q_proj" in op.module)
    assert [t.dims[-1] for t in qkv.outputs] == [Dim(4096), Dim(512), Dim(512)]
    labels = [op.attrs["label"] for op in layer if op.name == "pointwise"]
    assert sum(label.startswith("add+rms_norm") for label in labels) >= 2


@pytest.mark.parametrize("family", list(SMALL))
def test_matmul_work_and_cache_writes_survive_fusion(family: str) -> None:
    """Fusing changes no FLOP: the same multiply-adds, attention rows and cache bytes as the eager view, per kind."""
    raw = _small(family)
    fused = fuse(raw, ENGINE)

    def work(table: OpTable) -> dict[tuple[str, int], float]:
        total: dict[tuple[str, int], float] = {}
        for op in table.ops:
            if op.name in ("mm", "addmm", "mla_absorb", "grouped_matmul"):
                x = next(t for t in op.inputs if not t.weight and len(t.dims) > 1)
                n = sum(t.dims[-1].at(SIZES) for t in op.outputs)
                amount = float(x.numel(SIZES) * n)
            elif op.name in ("attention", "kv_cache_write", "linear_attention"):
                amount = float(sum(t.numel(SIZES) for t in op.inputs if not t.weight))
            else:
                continue
            name = "matmul" if op.name in ("mm", "addmm") else op.name
            total[name, op.kind] = total.get((name, op.kind), 0.0) + amount
        return total

    assert work(fused) == pytest.approx(work(raw))


@pytest.mark.parametrize("family", list(SMALL))
def test_fused_traffic_is_less_than_eager_but_not_nothing(family: str) -> None:
    raw = _small(family)

    def traffic(table: OpTable) -> float:
        return float(
            sum(
                t.bytes(SIZES)
                for op in table.ops
                if op.name not in BARRIERS
                for t in (*op.inputs, *op.outputs)
                if not t.weight
            )
        )

    fused = traffic(fuse(raw, ENGINE))
    assert 0 < fused < 0.7 * traffic(raw)


def _tensor(name: int, width: int = 8, weight: str = "") -> Tensor:
    return Tensor((Dim(1, B=1), Dim(width)), "bfloat16", name, weight)


def test_parameter_only_ops_are_folded_and_stay_parameters() -> None:
    cast = Op("_to_copy", "m", 0, (_tensor(0, weight="w"),), (_tensor(1),))
    use = Op("mm", "m", 0, (_tensor(2), _tensor(1)), (_tensor(3),))
    folded = fold([cast, use])
    assert [op.name for op in folded] == ["mm"]
    assert folded[0].inputs[1].weight == "w"


def test_intermediates_of_a_run_cost_nothing_and_results_are_written_once() -> None:
    a, b, c, d = (_tensor(i) for i in range(4))
    ops = [
        Op("mul", "m", 0, (a,), (b,)),
        Op("add", "m", 0, (b, a), (c,)),
        Op("mm", "m", 0, (c, _tensor(9, weight="w")), (d,)),
    ]
    run, matmul = pointwise_runs(ops)
    assert (run.inputs, run.outputs, run.parts) == ((a,), (c,), ("mul", "add"))
    assert matmul.name == "mm"


def test_two_halves_of_a_tensor_are_two_reads_a_whole_and_its_half_is_one() -> None:
    whole = _tensor(0, 8)
    first, second = (Tensor((Dim(1, B=1), Dim(4)), "bfloat16", 0, "", (), offset) for offset in (0, 4))
    make = Op("mm", "m", 0, (_tensor(7), _tensor(8, weight="w")), (whole,))
    halves = [
        make,
        Op("silu", "m", 0, (first,), (_tensor(1, 4),)),
        Op("mul", "m", 0, (_tensor(1, 4), second), (_tensor(2, 4),)),
    ]
    assert len(pointwise_runs(halves)[1].inputs) == 2
    mixed = [make, Op("silu", "m", 0, (whole,), (_tensor(1),)), Op("mul", "m", 0, (first, _tensor(1)), (_tensor(2),))]
    assert pointwise_runs(mixed)[1].inputs == (whole,)


def test_independent_chains_share_a_kernel_dependent_ones_do_not() -> None:
    x, w = _tensor(0), _tensor(9, weight="w")
    ops = [
        Op("mm", "m", 0, (x, w), (_tensor(1), _tensor(2))),
        Op("mul", "m", 0, (_tensor(1),), (_tensor(3),)),
        Op("mm", "m", 0, (_tensor(3), w), (_tensor(4),)),
        Op("mul", "m", 0, (_tensor(2),), (_tensor(5),)),  # needs only the first matmul: joins the first run
        Op("mul", "m", 0, (_tensor(4),), (_tensor(6),)),  # needs the second: a run of its own
    ]
    assert [len(op.parts) for op in pointwise_runs(ops) if op.name == "pointwise"] == [2, 1]


def test_in_place_writes_are_not_moved_before_earlier_reads() -> None:
    a, w = _tensor(0), _tensor(9, weight="w")
    ops = [
        Op("mul", "m", 0, (a,), (_tensor(1),)),
        Op("mm", "m", 0, (a, w), (_tensor(2),)),  # reads a
        Op("add_", "m", 0, (_tensor(1),), (a,)),  # then overwrites it
    ]
    names = [op.name for op in pointwise_runs(ops)]
    assert names == ["pointwise", "mm", "pointwise"]


def test_random_tables_keep_every_dependency() -> None:
    """Whatever the order of fused rows: each storage is written before it is read, as in the unfused table."""
    for seed in range(50):
        generator = random.Random(seed)
        ops: list[Op] = []
        for i in range(1, 40):
            reads = tuple(_tensor(generator.randrange(i)) for _ in range(generator.randint(1, 2)))
            barrier = generator.random() < 0.3
            ops.append(Op("bmm" if barrier else "mul", "m", 0, reads, (_tensor(i),)))
        written = {0}
        for op in pointwise_runs(ops):
            assert {t.storage for t in op.inputs} <= written
            written |= {t.storage for t in op.outputs}


def test_no_fusion_is_the_eager_view() -> None:
    table = _small("mixtral")
    assert fuse(table, ()) is table


PACKED = {"in_proj_qkv+in_proj_z", "in_proj_b+in_proj_a"}


@pytest.mark.parametrize(
    ("engine", "projections"),
    [
        ("vllm", PACKED), ("sglang", PACKED), ("trtllm", PACKED),
        ("sglang==0.5.9", {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"}),
    ],
)  # fmt: skip
def test_a_gated_delta_layer_keeps_the_gemms_that_engines_run_apart(engine: str, projections: set[str]) -> None:
    """Engines pack q, k, v and z into one projection, b and a into another, and gate a shared expert by itself; SGLang
    0.5.9 ran each projection by itself (models/qwen3_5.py)."""
    profile = load_engine(engine)
    assert profile.own_gemms is not None
    raw = traced(load_model("qwen3.5-35b-a3b"), "decode")
    fused = fuse(raw, profile.fusions, profile.own_gemms.groups)
    leaves = {op.module.split(".", 1)[1].rpartition(".")[2] for op in _layer(fused, 0) if op.name == "mm"}
    assert leaves >= {*projections, "gate", "shared_expert_gate", "gate_proj+up_proj"}
    together = fuse(raw, profile.fusions)
    assert len([op for op in _layer(fused, 0) if op.name == "mm"]) == len(projections) + len(
        [op for op in _layer(together, 0) if op.name == "mm"]
    )


def test_norms_by_one_plus_the_weight_may_run_op_by_op() -> None:
    """SGLang 0.5.9 on ROCm (layers/layernorm.py, GemmaRMSNorm.forward_native): ten kernels, the weight's two among
    them; of a model whose norms add nothing to their weights no row is another."""
    raw = traced(load_model("qwen3.5-397b-a17b"), "decode")
    own = [op.parts for op in fuse(raw, (*ENGINE, "eager_norms")).ops if op.module.endswith("post_attention_layernorm")]
    assert all(len(parts) == 1 for parts in own)
    names = [parts[0] for parts in own if parts]
    assert [names.count(name) for name in ("pow", "mean", "rsqrt", "add", "mul", "_to_copy")] == [2, 2, 2, 4, 4, 6]
    plain = traced(load_model("qwen3-30b-a3b"), "decode")
    assert fuse(plain, (*ENGINE, "eager_norms")).ops == fuse(plain, ENGINE).ops
