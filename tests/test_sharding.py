"""Sharding found by comparing traces, against the tensor-parallel plans that transformers ships and hand arithmetic."""

from __future__ import annotations

import re

import pytest
from families import SMALL

from tensorcast.errors import InputError
from tensorcast.modeling.config import hf_config, narrow
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.store import list_models, load_model
from tensorcast.trace.cache import traced
from tensorcast.trace.dims import Sizes
from tensorcast.trace.tracer import trace

OTHER_CHOICE = {
    # transformers splits this output and gathers it; engines (vLLM, SGLang) run it row-parallel, as found here
    "layers.*.linear_attn.out_proj",
}


def _plan_style(plan: str) -> str:
    if "row" in plan:
        return "row"
    return "replicated" if plan in ("mla_kv_a_proj", "replicated_with_grad_allreduce") else "column"


def test_sharding_agrees_with_the_plans_of_transformers() -> None:
    compared = 0
    profiles = [load_model(name) for name in list_models()]
    structures = {(p.config["model_type"], p.active_params is None): p.name for p in profiles}  # one of each
    copies = {"qwen2", "mistral", "qwen3_vl", "qwen3_vl_moe"}  # of llama, qwen3, qwen3_moe, as far as plans go
    for name in (name for (kind, _), name in structures.items() if kind not in copies):
        profile = load_model(name)
        plan = dict(getattr(hf_config(profile), "base_model_tp_plan", None) or {})
        for op in traced(profile, "decode", 2).ops if plan else ():
            for weight in op.weights if op.shard not in ("", "experts") else ():
                module = re.sub(r"\.\d+\.", ".*.", weight.rpartition(".")[0].removeprefix("model."))
                if module in plan and module not in OTHER_CHOICE:
                    assert op.shard == _plan_style(plan[module]), f"{name} {module}: {op.shard}, plan {plan[module]}"
                    compared += 1
    assert compared > 120


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "deepseek-v3", "llama-3.1-8b"])
def test_matmul_work_of_all_ranks_adds_up(name: str, tp: int) -> None:
    """Column- and row-parallel matmuls: tp ranks together do exactly the unsharded FLOPs; replicated ones tp times."""
    profile, sizes = load_model(name), Sizes(B=3.0, S=5.0, P=7.0, R=11.0, E=2.0)
    whole, shard = traced(profile, "prefill", 1), traced(profile, "prefill", tp)
    for a, b in zip(whole.ops, shard.ops, strict=True):
        if b.shard not in ("row", "column", "replicated") or a.name not in ("mm", "mla_expand"):
            continue
        products = [op.inputs[0].numel(sizes) * op.outputs[0].dims[-1].coef for op in (a, b)]
        assert products[1] * (1 if b.shard == "replicated" else tp) == products[0], b.module


def test_parameters_of_all_ranks_add_up() -> None:
    """Every sharded weight is a 1/tp slice, so summing ranks gives the model (KV heads divide here)."""
    profile = load_model("qwen3-30b-a3b")
    whole, shard = traced(profile, "decode", 1), traced(profile, "decode", 4)
    for a, b in zip(whole.params, shard.params, strict=True):
        assert a.full_numel == b.full_numel == a.numel
        assert b.role == "experts" or b.numel * 4 == a.numel or b.numel == a.numel, a.name


def test_key_value_heads_are_replicated_when_ranks_outnumber_them() -> None:
    config = narrow(hf_config(load_model("qwen3-235b-a22b")), 16)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 1)


def test_a_width_that_does_not_divide_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"tp=3: .*=4.* divide"):
        narrow(hf_config(ModelProfile(name="m", hf_id="m", description="d", sources={}, config=SMALL["mixtral"])), 3)


def test_norm_over_a_sharded_width_is_reduced() -> None:
    """MiniMax-M2 normalises all heads together: under tp its mean needs a sum over ranks, one number per token."""
    profile = ModelProfile(name="m", hf_id="m", description="d", sources={}, config=SMALL["minimax_m2"])
    reduced = [op for op in trace(profile, "decode", 2).ops if op.name == "mean" and op.shard == "row"]
    assert len(reduced) == 2  # q_norm and k_norm of the one layer kind
    assert all("norm" in op.module for op in reduced)


def test_one_head_per_rank_is_still_sharded() -> None:
    """With one head left reshapes become views, so copies vanish from the trace: the rest still pairs up."""
    profile = ModelProfile(name="m", hf_id="m", description="d", sources={}, config=SMALL["qwen3_next"])
    table = trace(profile, "decode", 4)
    assert len(table.ops) != len(trace(profile, "decode", 1).ops)
    styles = {op.module.rpartition(".")[2]: op.shard for op in table.ops if op.name == "mm"}
    assert (styles["q_proj"], styles["o_proj"], styles["out_proj"]) == ("column", "row", "row")
