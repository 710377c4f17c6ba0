"""Custom ops: schema, fake kernel and real kernel agree (opcheck), and the real ones compute what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_blocks import block_of

from tensorcast import ops  # noqa: F401
from tensorcast.ops import library

TC = torch.ops.tensor_cast


def _routing(tokens: int, experts: int, k: int) -> torch.Tensor:
    return (
        torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])
        if tokens
        else torch.empty((0, k), dtype=torch.long)
    )


def _collective_cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Groups of one rank (many ranks: test_moe_layer.py); counts are balanced, as the fake kernels assume."""
    rows, counts = torch.randn(12, 8), torch.full((4,), 3)
    return {
        "all_reduce": (TC.all_reduce.default, (rows, "g", 1)),
        "all_gather": (TC.all_gather.default, (rows, "g", 1)),
        "reduce_scatter": (TC.reduce_scatter.default, (rows, "g", 1)),
        "gather_rows": (TC.gather_rows.default, (rows, "g", 1)),
        "scatter_rows": (TC.scatter_rows.default, (rows, torch.tensor([12]), "g", 1)),
        "dispatch_rows": (TC.dispatch_rows.default, (rows, counts, [4], 0, "g")),
        "combine_rows": (TC.combine_rows.default, (rows, counts, counts.view(1, 4), [4], "g")),
        "to_expert_major": (TC.to_expert_major.default, (rows, torch.full((2, 2), 3))),
        "to_rank_major": (TC.to_rank_major.default, (rows, torch.full((2, 2), 3))),
        "slice_experts": (TC.slice_experts.default, (rows, counts, 1, 2)),
        "place_experts": (TC.place_experts.default, (rows[:6], counts, 1, 12)),
    }


def _cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    x, index = torch.randn(6, 8), _routing(6, 4, 2)
    rows, counts = TC.init_routing_v2(x, index), TC.expert_counts(index, 4)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
    return {
        "moe_gating_top_k_softmax": (TC.moe_gating_top_k_softmax.default, (torch.randn(6, 4), 2)),
        "moe_gating_grouped_top_k": (
            TC.moe_gating_grouped_top_k.default,
            (torch.randn(6, 16), torch.randn(16), 4, 4, 2, True, True, 2.5),
        ),
        "init_routing_v2": (TC.init_routing_v2.default, (x, index)),
        "unpermute_tokens": (TC.unpermute_tokens.default, (rows, index)),
        "expert_counts": (TC.expert_counts.default, (index, 4)),
        "grouped_matmul": (TC.grouped_matmul.default, (rows, torch.randn(4, 16, 8), counts)),
        "grouped_matmul, bias": (TC.grouped_matmul.default, (rows, torch.randn(4, 16, 8), counts, torch.randn(4, 16))),
        "grouped_matmul, transposed": (TC.grouped_matmul.default, (rows, torch.randn(4, 8, 16), counts, None, True)),
        "attention": (TC.attention.default, (q, k, v, 0, 0.3, True, 3, 0, 0, 0, 0, torch.randn(4))),
        "kv_cache_write": (TC.kv_cache_write.default, (k, v, "kv")),
        "kv_cache_read": (TC.kv_cache_read.default, (torch.randn(2, 5, 8), 0)),
        **_collective_cases(),
    }


@pytest.mark.parametrize("name", list(_cases()))
def test_opcheck(name: str) -> None:
    torch.manual_seed(sum(map(ord, name)))
    op, arguments = _cases()[name]
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_every_op_with_a_real_kernel_is_checked() -> None:
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith(library.NAMESPACE)
    }
    trace_only = {"linear_attention", "ssm_scan", "causal_conv1d"}
    assert registered == {name.split(",")[0] for name in _cases()} | trace_only


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 30), experts=st.integers(1, 12), k=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_permute_and_unpermute_are_inverse_and_ordered(tokens: int, experts: int, k: int, seed: int) -> None:
    torch.manual_seed(seed)
    k = min(k, experts)
    index, x = _routing(tokens, experts, k), torch.randn(tokens, 3)
    rows = TC.init_routing_v2(x, index)
    flat, order = index.reshape(-1).sort(stable=True)
    assert torch.equal(rows, x[order // k])
    assert torch.equal(TC.expert_counts(index, experts), torch.bincount(flat, minlength=experts))
    assert torch.equal(TC.unpermute_tokens(rows, index), x[:, None].expand(-1, k, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_matmul_equals_a_loop_over_experts(dtype: torch.dtype, transposed: bool) -> None:
    torch.manual_seed(1)
    counts = torch.tensor([0, 7, 1, 0, 24])  # experts without rows included
    x, weight, bias = (
        torch.randn(32, 16, dtype=dtype),
        torch.randn(5, 24, 16, dtype=dtype),
        torch.randn(5, 24, dtype=dtype),
    )
    given_weight = weight.transpose(1, 2).contiguous() if transposed else weight
    out = TC.grouped_matmul(x, given_weight, counts, bias, transposed)
    start = 0
    for expert, n in enumerate(counts.tolist()):
        expected = x[start : start + n] @ weight[expert].T + bias[expert]
        torch.testing.assert_close(
            out[start : start + n], expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2
        )
        start += n


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("past", [0, 4])
def test_attention_equals_sdpa(window: int, past: int) -> None:
    torch.manual_seed(2)
    new, total = 5, 5 + past
    q, k, v = torch.randn(2, 4, new, 8), torch.randn(2, 2, total, 8), torch.randn(2, 2, total, 6)
    at, key = torch.arange(past, total)[:, None], torch.arange(total)[None]
    seen = key <= at
    if window:
        seen &= at - key < window
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3, enable_gqa=True)
    found = TC.attention(q, k, v, past, 0.3, True, window)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_attention_refuses_keys_of_another_length() -> None:
    with pytest.raises(ValueError, match="keys hold 5 tokens, expected past"):
        TC.attention(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), 3)


@settings(max_examples=30, deadline=None)
@given(ranks=st.integers(1, 4), experts=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_rank_major_and_expert_major_are_inverse(ranks: int, experts: int, seed: int) -> None:
    torch.manual_seed(seed)
    sources = torch.randint(0, 4, (ranks, experts))
    ids = torch.arange(experts).repeat(ranks).repeat_interleave(sources.reshape(-1))
    rows = torch.stack([ids.float(), torch.arange(len(ids)).float()], dim=1)
    ordered = TC.to_expert_major(rows, sources)
    assert (ordered[:, 0].diff() >= 0).all()
    assert torch.equal(TC.to_rank_major(ordered, sources), rows)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "minimax_m2"])
def test_grouped_gating_equals_the_routers_of_transformers(family: str) -> None:
    block = block_of(family)
    gate, x = block.gate, torch.randn(40, 64)
    config: Any = getattr(block, "config", None)
    with torch.no_grad():
        if family == "minimax_m2":
            _, weights, indices = gate(x, block.e_score_correction_bias)
            bias, groups, chosen, scale = block.e_score_correction_bias, 1, 1, 1.0
        else:
            _, weights, indices = gate(x)
            bias, groups, chosen = gate.e_score_correction_bias, config.n_group, config.topk_group
            scale = config.routed_scaling_factor
        logits = torch.nn.functional.linear(x, gate.weight)
        found = TC.moe_gating_grouped_top_k(logits, bias, gate.top_k, groups, chosen, True, True, scale)
    dense = [torch.zeros_like(logits).scatter(-1, i, w) for w, i in ((weights, indices), found)]
    torch.testing.assert_close(dense[1], dense[0], rtol=1e-5, atol=1e-6)


def test_unbound_groups_say_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="group 'tp' of 2 ranks is not bound"):
        TC.all_reduce(torch.randn(3), "tp", 2)


def test_trace_only_ops_refuse_real_tensors() -> None:
    with pytest.raises(NotImplementedError):
        TC.causal_conv1d(torch.randn(1, 2, 3), torch.randn(2, 2), None)
