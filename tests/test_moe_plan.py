"""The layer that runs and the rows that are priced: the same collectives, the same bytes, the same expert shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SMALL
from moe_blocks import block_of

from tensorcast.api import simulate
from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.plan.plan import Collective
from tensorcast.errors import InputError
from tensorcast.modeling.moe.groups import MoEGroups
from tensorcast.modeling.moe.layer import MoELayer
from tensorcast.modeling.moe.parallel import MoEOptions, ParallelMoELayer
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.trace.moe import blocks_of
from tensorcast.trace.record import Recorder
from tensorcast.trace.table import Op

TOKENS, HIDDEN = 24, 64


def _moved_by_layer(family: str, layout: Layout, exchange: str, split: bool) -> dict[str, float]:
    """Bytes of token rows per collective of the traced layer, in the plan's units, in bf16."""
    block = block_of(family).to("meta").to(torch.bfloat16)
    groups = MoEGroups.of(layout.tp, layout.dp, layout.ep, 0)
    options = MoEOptions(exchange, split_tokens_over_tp=split)  # type: ignore[arg-type]
    layer = ParallelMoELayer(MoELayer(block), groups, options)
    recorder = Recorder(layer)
    with torch.no_grad(), recorder:
        layer(torch.empty(1, TOKENS, HIDDEN, device="meta", dtype=torch.bfloat16))
    moved: dict[str, float] = {}
    for call in recorder.calls:
        sent, got = call.inputs[0].shape, call.outputs[0].shape
        if sent[-1] != HIDDEN:
            continue  # routing indices and weights ride along with gathered tokens; they are not priced
        rows = {
            "dispatch_rows": sent,
            "combine_rows": sent,
            "all_reduce": sent,
            "gather_rows": got,
            "scatter_rows": sent,
            "all_gather": got,
        }.get(call.name)
        if rows is not None:
            moved[call.name] = moved.get(call.name, 0.0) + 2.0 * rows[0] * rows[1]
    return moved


def _moved_by_plan(folder: Path, layout: Layout, all2all: str, split: bool) -> dict[str, float]:
    deployment = deploy(
        load_model(str(folder)), load_device("h200"), load_engine("vllm"), layout, "decode",
        options=Options(all2all=all2all, split_tokens_over_tp=split),
    )  # fmt: skip
    moved: dict[str, float] = {}
    for row in deployment.step.plan.rows:
        if isinstance(row, Collective) and row.label in ("dispatch", "combine", "experts", "tokens split over tp"):
            moved[f"{row.op} {row.label}"] = float(row.scale) * TOKENS
    return moved


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize(
    ("layout", "exchange", "same"),
    [
        (Layout(4, 4), "all_to_all", {"all_reduce": "all_reduce experts"}),
        (Layout(4, 4, 1, 4), "all_to_all", {"all_reduce": "all_reduce experts"}),
        (Layout(4, 4, 1, 4), "all_to_all",  # its slice of the tokens travels
         {"dispatch_rows": "all_to_all dispatch", "combine_rows": "all_to_all combine",
          "all_gather": "all_gather tokens split over tp"}),
        (Layout(4, 1, 4, 4), "all_to_all",
         {"dispatch_rows": "all_to_all dispatch", "combine_rows": "all_to_all combine"}),
        (Layout(8, 2, 4, 8), "all_to_all",
         {"dispatch_rows": "all_to_all dispatch", "combine_rows": "all_to_all combine",
          "all_gather": "all_gather tokens split over tp"}),
        (Layout(4, 1, 4, 1), "allgather_reducescatter",
         {"gather_rows": "all_gather dispatch", "scatter_rows": "reduce_scatter combine"}),
        (Layout(4, 2, 2, 4), "allgather_reducescatter",
         {"gather_rows": "all_gather dispatch", "scatter_rows": "reduce_scatter combine",
          "all_reduce": "all_reduce experts"}),
    ],
)  # fmt: skip
def test_layer_moves_what_the_plan_prices(
    family: str, layout: Layout, exchange: str, same: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL[family]))
    split = layout.dp == 1 and "dispatch_rows" in same
    layer = _moved_by_layer(family, layout, exchange, split)
    plan = _moved_by_plan(tmp_path, layout, "direct" if exchange == "all_to_all" else exchange, split)
    assert set(layer) == set(same)
    for traced, priced in same.items():
        assert layer[traced] == plan[priced], f"{traced} against {priced}"
    assert set(plan) == set(same.values())


@pytest.mark.parametrize(
    ("layout", "split"),
    [
        (Layout(1), False), (Layout(4, 4, 1, 4), False), (Layout(4, 4, 1, 4), True), (Layout(4, 1, 4, 4), False),
        (Layout(4, 4), False), (Layout(8, 2, 4, 2), False),
    ],
)  # fmt: skip
def test_layer_runs_the_expert_shapes_that_the_plan_prices(layout: Layout, split: bool, tmp_path: Path) -> None:
    """Rows, experts and widths of the grouped matmuls on one rank, balanced routing."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL["mixtral"]))
    exchange = "all_to_all" if layout.dp > 1 and layout.etp == 1 else "allgather_reducescatter"
    block = block_of("mixtral").to("meta")
    groups = MoEGroups.of(layout.tp, layout.dp, layout.ep, 0)
    recorder = Recorder(block)
    options = MoEOptions("all_to_all" if split else exchange, split_tokens_over_tp=split)  # type: ignore[arg-type]
    layer = ParallelMoELayer(MoELayer(block), groups, options)
    with torch.no_grad(), recorder:
        layer(torch.empty(1, TOKENS, HIDDEN, device="meta"))
    traced = [tuple(t.shape for t in call.inputs[:2]) for call in recorder.calls if call.name == "grouped_matmul"]
    asked = Options(all2all="direct", split_tokens_over_tp=True) if split else Options()
    deployment = deploy(
        load_model(str(tmp_path)), load_device("h200"), load_engine("vllm"), layout, "decode", options=asked
    )
    context: Any = deployment.step.sizes.context(float(TOKENS), 1.0, 10.0)
    priced = [
        tuple(tuple(int(d.at(context.sizes)) for d in t.dims) for t in row.inputs[:2])
        for row in deployment.step.plan.rows
        if isinstance(row, Op) and row.name == "grouped_matmul"
    ]
    assert traced == priced


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    ("layout", "exchange"),
    [
        (Layout(4, 1, 4, 4), "all_to_all"), (Layout(4, 2, 2, 4), "all_to_all"), (Layout(8, 2, 4, 8), "all_to_all"),
        (Layout(4, 4, 1, 4), "all_to_all"), (Layout(4, 2, 2, 4), "allgather_reducescatter"),
    ],
)  # fmt: skip
def test_layer_works_on_the_tokens_that_the_plan_prices(
    later: bool, layout: Layout, exchange: str, tmp_path: Path
) -> None:
    """Tokens of the router, of what is permuted and summed, of the shared expert and its gate."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL["qwen2_moe"]))
    split, travels = layout.dp == 1, exchange == "all_to_all"
    block = block_of("qwen2_moe").to("meta").to(torch.bfloat16)
    asked = MoEOptions(exchange, split_tokens_over_tp=split, route_after_dp_transform=later)  # type: ignore[arg-type]
    layer = ParallelMoELayer(MoELayer(block), MoEGroups.of(layout.tp, layout.dp, layout.ep, 0), asked)
    recorder = Recorder(layer)
    with torch.no_grad(), recorder:
        layer(torch.empty(1, TOKENS, HIDDEN, device="meta", dtype=torch.bfloat16))
    deployment = deploy(
        load_model(str(tmp_path)), load_device("h200"), load_engine("eager"), layout, "decode", options=Options(
            all2all="direct" if travels else exchange, split_tokens_over_tp=split, route_after_dp_transform=later,
            shared_expert_tp=False, fusion="none",
        ),
    )  # fmt: skip
    sizes = deployment.step.sizes.context(float(TOKENS), 1.0, 10.0).sizes
    rows = [row for row in deployment.step.plan.rows if isinstance(row, Op)]
    blocks = blocks_of(rows)
    priced = [
        (row.name, [[int(d.at(sizes)) for d in t.dims] for t in row.inputs]) for row in rows
        if row.kind == max(blocks) and row.module.startswith(blocks[row.kind])
    ]
    traced = [(call.name, [list(t.shape) for t in call.inputs]) for call in recorder.calls]
    names = ["mm", "init_routing_v2", "unpermute_tokens"] if travels else ["mm"]
    for name in names:
        # of the permute and its inverse the tokens; the rows on their way are those of the experts
        first = slice(0, 1) if name == "init_routing_v2" else slice(None)
        ours, theirs = (
            [shapes[-1] if name == "unpermute_tokens" else shapes for n, shapes in calls if n == name][first]
            for calls in (priced, traced)
        )
        assert sorted(map(str, ours)) == sorted(map(str, theirs)), name


def test_engines_slice_tokens_before_the_router(tmp_path: Path) -> None:
    """vLLM 0.24.0 (config/parallel.py; models/mixtral.py has no such slice) and SGLang 0.5.14 (communicator.py)."""
    layout, found = Layout(4, 2, 2, 4), {}
    for family, engine, all2all in (
        ("deepseek_v3", "vllm", "auto"), ("mixtral", "vllm", "auto"), ("deepseek_v3", "sglang", "high_throughput"),
        ("deepseek_v3", "sglang", "allgather_reducescatter"),
    ):  # fmt: skip
        name = "DeepseekV3ForCausalLM" if family == "deepseek_v3" else "MixtralForCausalLM"
        (tmp_path / "config.json").write_text(json.dumps({**SMALL[family], "architectures": [name]}))
        deployment = deploy(
            load_model(str(tmp_path)), load_device("h200"), load_engine(engine), layout, "decode",
            options=Options(all2all=all2all, fusion="none"),
        )  # fmt: skip
        rows = deployment.step.plan.rows
        kind = max(row.kind for row in rows)
        gate = next(row for row in rows if isinstance(row, Op) and row.module.endswith(".gate") and row.name == "mm")
        moved = [
            (row.op, row.group, row.scale) for row in rows if isinstance(row, Collective) and row.kind == kind
        ]
        shared = {row.shard for row in rows if isinstance(row, Op) and "shared_experts.down" in row.module}
        found[family, engine, all2all] = float(gate.inputs[0].dims[0].coef), shared, moved
    state = 2.0 * HIDDEN  # bytes of a token in bf16
    assert found["deepseek_v3", "vllm", "auto"] == (0.5, {"replicated"}, [
        ("all_reduce", "tp", state), ("all_gather", "ep", 2 * state), ("reduce_scatter", "ep", 2 * state),
        ("all_gather", "tp", state),
    ])  # fmt: skip
    assert found["mixtral", "vllm", "auto"] == (1.0, set(), [
        ("all_reduce", "tp", state), ("all_gather", "dp", 2 * state), ("reduce_scatter", "dp", 2 * state),
        ("all_reduce", "tp", state),
    ])  # fmt: skip
    sliced, shared, moved = found["deepseek_v3", "sglang", "high_throughput"]
    assert (sliced, shared) == (0.5, {"replicated"})
    assert [(op, group) for op, group, _ in moved] == [
        ("reduce_scatter", "tp"), ("all_to_all", "ep"), ("all_to_all", "ep"), ("all_gather", "tp"),
    ]  # fmt: skip
    assert found["deepseek_v3", "sglang", "allgather_reducescatter"][0] == 1.0


@pytest.mark.parametrize(("family", "architecture"), [
    ("glm4_moe", "Glm4MoeForCausalLM"), ("qwen3_next", "Qwen3NextForCausalLM"),
])  # fmt: skip
@pytest.mark.parametrize("layout", [Layout(1), Layout(4, 4), Layout(4, 2, 2, 1)])
def test_a_shared_expert_among_the_routed_ones_is_priced_as_it_runs(
    family: str, architecture: str, layout: Layout, tmp_path: Path
) -> None:
    """The layer's permute, grouped GEMMs and sum against those of SGLang's rows: one expert and one choice more."""
    config = {**SMALL[family], "architectures": [architecture]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    block = block_of(family).to("meta")
    groups = MoEGroups.of(layout.tp, layout.dp, layout.ep, 0)
    layer = ParallelMoELayer(
        MoELayer(block), groups, MoEOptions("allgather_reducescatter", fuse_shared_experts=True)
    )
    recorder = Recorder(layer)
    with torch.no_grad(), recorder:
        layer(torch.empty(1, TOKENS, HIDDEN, device="meta"))
    model, device, engine = load_model(str(tmp_path)), load_device("h200"), load_engine("sglang")
    found, apart = (
        deploy(model, device, engine, layout, "decode", options=Options(shared_experts_fusion=fused))
        for fused in (True, False)
    )
    context: Any = found.step.sizes.context(float(TOKENS), 1.0, 10.0)

    def priced(name: str, inputs: int, one: Any) -> list[tuple[tuple[int, ...], ...]]:
        rows = [row for row in one.step.plan.rows if isinstance(row, Op) and row.name == name]
        kind = max(row.kind for row in rows)
        return [
            tuple(tuple(int(d.at(context.sizes)) for d in t.dims) for t in row.inputs[:inputs])
            for row in rows if row.kind == kind
        ]  # fmt: skip

    def traced(name: str, inputs: int) -> list[tuple[tuple[int, ...], ...]]:
        calls = [call for call in recorder.calls if call.name == name]
        return [tuple(tuple(t.shape) for t in call.inputs[:inputs]) for call in calls]

    assert traced("grouped_matmul", 3) == priced("grouped_matmul", 3, found)
    moved = layout.dp  # gathered tokens are priced on a rank's own (docs/moe.md)
    (ids,) = {shapes[1] for shapes in traced("unpermute_tokens", 2)}
    (fused,) = (row for row in found.step.plan.rows if isinstance(row, Op) and row.name == "init_routing_v2"
                and row.kind == max(r.kind for r in found.step.plan.rows))  # fmt: skip
    assert ids == (TOKENS * moved, SMALL[family]["num_experts_per_tok"] + 1)
    assert [int(d.at(context.sizes)) for d in fused.inputs[1].dims] == [ids[0] // moved, ids[1]]
    names = {row.module for row in found.step.plan.rows if isinstance(row, Op) and "shared_expert" in row.module}
    assert all(name.endswith("shared_expert_gate") for name in names)
    assert bool(names) == (family == "qwen3_next")
    assert any("down_proj" in row.module and "shared_expert" in row.module for row in apart.step.plan.rows)
    # of one server as many bytes either way; data-parallel ranks cut the fused one over all of them
    held, alone = (float(one.held(1.0, 1)[0]) for one in (found, apart))
    blocks = blocks_of(found.step.table.ops)
    shared = 2.0 * 3 * HIDDEN * 48 * sum(layout.tp for k in found.raw.layer_kinds if k in blocks)
    assert alone - held == pytest.approx(shared / layout.tp**2 * (1 - 1 / layout.dp))


def test_a_shared_expert_of_another_size_or_precision_runs_apart(tmp_path: Path) -> None:
    """Whatever its class: SGLang fuses one shared expert, as wide as a routed one."""
    config = {**SMALL["glm4_moe"], "architectures": ["Glm4MoeForCausalLM"]}
    for change, quant, fused in (
        ({}, None, 1), ({"n_shared_experts": 2}, None, 0), ({}, "linear=bf16,experts=fp8", 0), ({}, "fp8", 1),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        model = load_model(str(tmp_path))
        one = deploy(
            model, load_device("h200"), load_engine("sglang"), Layout(2, 2), "decode", options=Options(quant=quant)
        )
        assert one.raw.facts.fused_experts == fused, (change, quant)


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        (Layout(4, 1, 4, 4), {"all2all": "direct"}, "is for dp = 1 and ep = tp > 1, not tp1-dp4-ep4"),
        (Layout(4, 4), {"all2all": "direct"}, "needs whole experts on every rank"),
        (Layout(4, 4, 1, 2), {}, "is for dp = 1 and ep = tp > 1, not tp4-dp1-ep2"),
        (Layout(4, 4, 1, 4), {}, "tokens must travel; use --all2all high_throughput"),
    ],
)
def test_tokens_are_split_only_where_the_layer_splits_them(
    layout: Layout, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL["mixtral"]))
    with pytest.raises(InputError, match=message):
        deploy(
            load_model(str(tmp_path)), load_device("h200"), load_engine("vllm"), layout, "decode",
            options=Options(split_tokens_over_tp=True, **options),
        )  # fmt: skip


def test_fewer_tokens_than_ranks_are_not_split() -> None:
    """The layer works on them whole, and simulate says so."""
    asked: dict[str, Any] = {"device": "h200", "world_size": 8, "ep": 8, "all2all": "low_latency"}
    with pytest.raises(InputError, match="4 tokens do not reach all tp = 8 ranks"):
        simulate("qwen3-30b-a3b", tp=8, batch=4, split_tokens_over_tp=True, **asked)
    split = simulate("qwen3-30b-a3b", tp=8, batch=64, split_tokens_over_tp=True, **asked)
    assert split.totals()["all2all"] == "low_latency"
    assert simulate("qwen3-30b-a3b", tp=8, batch=64, **asked).totals()["all2all"] == "none"
