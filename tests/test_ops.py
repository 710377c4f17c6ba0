"""Custom ops: schema, fake kernel and real kernel agree (opcheck), and the real ones compute what they say."""

from __future__ import annotations

import itertools
import os
import secrets
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_blocks import block_of
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tensorcast import ops  # noqa: F401
from tensorcast.ops import library
from tensorcast.ops.moe import align_counts, aligned_rows
from tensorcast.ops.quantized import FORMATS, quantize_weight

TC = torch.ops.tensor_cast

SEED = int(os.environ.get("TENSORCAST_TEST_SEED") or secrets.randbelow(2**31))
"""Of opcheck's inputs: new in every run; a failure prints it, and the variable repeats it."""


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


def _layout_cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Layouts of the experts' rows and the matmuls on them; expert 2 has no rows."""
    rows, counts, bias = torch.randn(9, 8), torch.tensor([4, 1, 0, 4]), torch.randn(4, 16)
    held = TC.to_capacity(rows, counts, 5)
    weight, transposed = torch.randn(4, 16, 8), torch.randn(4, 8, 16)
    return {
        "align_rows": (TC.align_rows.default, (rows, counts, 4)),
        "unalign_rows": (TC.unalign_rows.default, (TC.align_rows(rows, counts, 4), counts, 9, 4)),
        "to_capacity": (TC.to_capacity.default, (rows, counts, 5)),
        "from_capacity": (TC.from_capacity.default, (held, counts, 9)),
        "low_latency_dispatch": (TC.low_latency_dispatch.default, (rows, counts, [4], 0, 5, "g")),
        "low_latency_combine": (
            TC.low_latency_combine.default,
            (held, counts, counts.view(1, 4), [4], 5, 9, "g"),
        ),
        "grouped_matmul": (TC.grouped_matmul.default, (rows, weight, counts)),
        "grouped_matmul, bias": (TC.grouped_matmul.default, (rows, weight, counts, bias)),
        "grouped_matmul, transposed": (TC.grouped_matmul.default, (rows, transposed, counts, None, True)),
        "grouped_matmul, odd sizes": (TC.grouped_matmul.default, (rows[:, :7], weight[:, :5, :7], counts)),
        "batched_matmul": (TC.batched_matmul.default, (rows, weight, counts, bias)),
        "batched_matmul, transposed": (TC.batched_matmul.default, (rows, transposed, counts, None, True)),
        "grouped_outer": (TC.grouped_outer.default, (rows, torch.randn(9, 16), counts)),
        "masked_grouped_matmul": (TC.masked_grouped_matmul.default, (held, weight, counts, bias)),
        "masked_grouped_matmul, transposed": (
            TC.masked_grouped_matmul.default,
            (held, transposed, counts, None, True),
        ),
    }


def _quantized_cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    rows, counts, bias = torch.randn(9, 144), torch.tensor([4, 1, 0, 4]), torch.randn(4, 24)
    held, bf16 = TC.to_capacity(rows, counts, 5), torch.bfloat16
    cases: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    for scheme, kind in FORMATS.items():
        weight = quantize_weight(torch.randn(4, 24, 144), scheme)
        x, x_held = [rows.to(bf16)], [held.to(bf16)]
        if kind.activation is not None:
            cases[f"quantize_activation, {scheme}"] = (TC.quantize_activation.default, (rows, scheme))
            x, x_held = (TC.quantize_activation(t, scheme) for t in (rows, held))
            cases[f"dequantize_activation, {scheme}"] = (TC.dequantize_activation.default, (x, scheme, bf16))
        for form, operand in (("grouped", x), ("masked_grouped", x_held), ("batched", x)):
            op = getattr(TC, f"scaled_{form}_matmul").default
            cases[f"scaled_{form}_matmul, {scheme}"] = (op, (operand, weight, counts, scheme, bf16, bias))
    return cases


def cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    x, index = torch.randn(6, 8), _routing(6, 4, 2)
    rows = TC.init_routing_v2(x, index)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
    return {
        "moe_gating_top_k_softmax": (TC.moe_gating_top_k_softmax.default, (torch.randn(6, 4), 2)),
        "moe_gating_grouped_top_k": (
            TC.moe_gating_grouped_top_k.default,
            (torch.randn(6, 16), torch.randn(16), 4, 4, 2, True, True, 2.5),
        ),
        "moe_gating_grouped_top_k, softmax": (
            TC.moe_gating_grouped_top_k.default,
            (torch.randn(2, 3, 16), None, 4, 4, 2, False, False, 2.5),
        ),
        "init_routing_v2": (TC.init_routing_v2.default, (x, index)),
        "init_routing_v2, leading dimensions": (TC.init_routing_v2.default, (x.view(2, 3, 8), index.view(2, 3, 2))),
        "unpermute_tokens": (TC.unpermute_tokens.default, (rows, index)),
        "unpermute_tokens, leading dimensions": (TC.unpermute_tokens.default, (rows, index.view(2, 3, 2))),
        "unpermute_tokens, absent": (TC.unpermute_tokens.default, (rows, index.where(index > 0, -1))),
        "expert_counts": (TC.expert_counts.default, (index, 4)),
        "attention": (TC.attention.default, (q, k, v, 0, 0.3, True, 3, 0, 0, 0, 0, torch.randn(4))),
        "kv_cache_write": (TC.kv_cache_write.default, (k, v, "kv")),
        "kv_cache_read": (TC.kv_cache_read.default, (torch.randn(2, 5, 8), 0)),
        **_collective_cases(),
        **_layout_cases(),
        **_quantized_cases(),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_opcheck(name: str) -> None:
    print(f"repeat with TENSORCAST_TEST_SEED={SEED}")  # pytest shows it with a failure only
    torch.manual_seed(SEED)
    op, arguments = cases()[name]
    tensors = [t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor)]
    checks: tuple[str, ...] = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    if any(t.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu) for t in tensors):
        # torch's schema check compares values, which it cannot for these dtypes: the same by storage and bytes
        checks, before = checks[1:], [t.clone() for t in tensors]
        outputs = [t for t in tree_leaves(op(*arguments)) if isinstance(t, torch.Tensor)]
        assert all(torch.equal(_bytes(t), _bytes(old)) for t, old in zip(tensors, before, strict=True))
        assert not {t.untyped_storage().data_ptr() for t in outputs} & {t.untyped_storage().data_ptr() for t in tensors}
    torch.library.opcheck(op, arguments, test_utils=checks)


def _matmul(
    device: str, rows: tuple[int, ...], weight: tuple[int, ...], counts: int, *, bias: tuple[int, ...] | None = None,
    transposed: bool = False, form: str = "",
) -> torch.Tensor:  # fmt: skip
    x, w = (torch.randn(shape, device=device) for shape in (rows, weight))
    added = None if bias is None else torch.randn(bias, device=device)
    count = torch.ones(counts, dtype=torch.long, device=device)
    out: torch.Tensor = getattr(TC, f"{form}grouped_matmul")(
        x, w, count, added, transposed
    )
    return out


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: TC.moe_gating_top_k_softmax(torch.randn(3, 4, device=d), 5), "k = 5 of 4 experts"),
        (lambda d: TC.moe_gating_top_k_softmax(torch.randn(3, 4, device=d), 0), "k = 0 of 4 experts"),
        (lambda d: TC.moe_gating_grouped_top_k(torch.randn(3, 4, device=d), None, 5), "k = 5 of 4 experts"),
        (
            lambda d: TC.init_routing_v2(torch.randn(3, 8, device=d), torch.zeros(4, 2, dtype=torch.long, device=d)),
            "all but their last dimension must be the same",
        ),
        (
            lambda d: TC.unpermute_tokens(torch.randn(7, 8, device=d), torch.zeros(4, 2, dtype=torch.long, device=d)),
            r"must be \[8, H\], one row per choice",
        ),
        (lambda d: TC.init_routing_v2(torch.randn(3, 8, device=d), torch.zeros(3, 2, device=d)), "must be whole"),
        (lambda d: TC.unpermute_tokens(torch.randn(6, 8, device=d), torch.zeros(3, 2, device=d)), "must be whole"),
        (lambda d: TC.expert_counts(torch.zeros(3, 2, device=d), 4), "must be whole numbers"),
        (lambda d: _matmul(d, (6, 9), (4, 5, 8), 4), r"rows \[6, 9\], weight \[4, 5, 8\]"),
        (lambda d: _matmul(d, (6, 8), (4, 5, 8), 3), r"counts \[3\]: must be \[R,K\]"),
        (lambda d: _matmul(d, (6, 8), (4, 5, 8), 4, bias=(4, 8)), r"bias \[4, 8\]: must be"),
        (lambda d: _matmul(d, (6, 5), (4, 8, 5), 4, transposed=True), r"\[E,K,N\]"),
        (lambda d: _matmul(d, (3, 6, 8), (4, 5, 8), 4, form="masked_"), r"rows \[3, 6, 8\]"),
    ],
)
def test_wrong_sizes_are_errors_with_and_without_data(device: str, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(device)


def test_expert_ids_out_of_range_are_errors() -> None:
    for wrong in (4, -2):
        with pytest.raises(ValueError, match="must be below 4, or -1"):
            TC.expert_counts(torch.tensor([[0, wrong]]), 4)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_absent_experts_are_left_out(tokens: int, seed: int) -> None:
    """Id -1, as an expert map gives experts of other ranks: the sum over all ranks is what one rank computes."""
    torch.manual_seed(seed)
    index, x, weight = _routing(tokens, 6, 3), torch.randn(tokens, 8), torch.randn(6, 8, 8)

    def run(ids: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        counts = TC.expert_counts(ids, len(held))
        out = TC.grouped_matmul(TC.init_routing_v2(x, ids), held, counts)
        return TC.unpermute_tokens(out, ids)

    parts = []
    for own in ([0, 3, 4], [1, 2, 5]):
        expert_map = torch.full((6,), -1).index_put((torch.tensor(own),), torch.arange(3))
        parts.append(run(expert_map[index], weight[own]))
    torch.testing.assert_close(parts[0] + parts[1], run(index, weight), rtol=1e-5, atol=1e-5)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def test_every_op_with_a_real_kernel_is_checked() -> None:
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith(library.NAMESPACE)
    }
    trace_only = {"linear_attention", "ssm_scan", "causal_conv1d"}
    assert registered == {name.split(",")[0] for name in cases()} | trace_only


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
@pytest.mark.parametrize(("n", "k"), [(24, 16), (5, 7)])  # the second is no whole number of 16 bytes
def test_expert_matmuls_equal_a_loop_over_experts(dtype: torch.dtype, transposed: bool, n: int, k: int) -> None:
    torch.manual_seed(1)
    counts, capacity = torch.tensor([0, 7, 1, 0, 24]), 25  # experts without rows included
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((32, k), (5, n, k), (5, n)))
    expected = torch.cat(
        [rows @ weight[expert].T + bias[expert] for expert, rows in enumerate(x.split(counts.tolist()))]
    )
    given_weight = weight.transpose(1, 2).contiguous() if transposed else weight
    held = TC.masked_grouped_matmul(TC.to_capacity(x, counts, capacity), given_weight, counts, bias, transposed)
    found = {
        "grouped": TC.grouped_matmul(x, given_weight, counts, bias, transposed),
        "batched": TC.batched_matmul(x, given_weight, counts, bias, transposed),
        "masked": TC.from_capacity(held, counts, 32),
        "aligned": TC.unalign_rows(
            TC.grouped_matmul(TC.align_rows(x, counts, 4), given_weight, align_counts(counts, 4), bias, transposed),
            counts,
            32,
            4,
        ),
    }
    for name, out in found.items():
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        assert out.shape == expected.shape, name
        assert torch.allclose(out, expected, rtol=tolerance, atol=tolerance), name
    assert all((held[expert, n:] == 0).all() for expert, n in enumerate(counts.tolist()))


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=7), block=st.integers(1, 8), more=st.integers(0, 3))
def test_layouts_hold_every_row_once_and_come_back(counts: list[int], block: int, more: int) -> None:
    rows = torch.arange(1.0, sum(counts) * 2 + 1).view(-1, 2)
    given, parts = torch.tensor(counts), rows.split(counts)
    aligned = TC.align_rows(rows, given, block)
    filled = torch.cat([torch.cat([p, p.new_zeros(-len(p) % block, 2)]) for p in parts])
    assert torch.equal(aligned[: len(filled)], filled) and not aligned[len(filled) :].any()
    assert len(filled) <= len(aligned) <= len(rows) + len(counts) * (block - 1)
    assert torch.equal(align_counts(given, block), torch.tensor([-(-n // block) * block for n in counts]))
    assert torch.equal(TC.unalign_rows(aligned, given, len(rows), block), rows)
    held = TC.to_capacity(rows, given, max(counts) + more)
    for expert, part in enumerate(parts):
        assert torch.equal(held[expert, : len(part)], part) and not held[expert, len(part) :].any()
    assert torch.equal(TC.from_capacity(held, given, len(rows)), rows)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 12), experts=st.integers(1, 4), block=st.integers(1, 4))
def test_aligned_layout_is_as_long_as_the_worst_counts_need(rows: int, experts: int, block: int) -> None:
    """Brute force over all ways to give the rows to the experts."""
    splits = (c for c in itertools.product(range(rows + 1), repeat=experts) if sum(c) == rows)
    worst = max(sum(-(-n // block) * block for n in counts) for counts in splits)
    assert aligned_rows(rows, experts, block) == worst


def test_an_expert_over_its_capacity_is_an_error() -> None:
    with pytest.raises(ValueError, match="expert 1 has 5 rows, more than its capacity of 4"):
        TC.to_capacity(torch.randn(8, 2), torch.tensor([3, 5]), 4)


def test_flops_of_expert_matmuls_are_counted() -> None:
    """As multiply-adds of every row that the layout computes, times two."""
    counts, rows, weight = torch.tensor([2, 3]), torch.randn(5, 32), torch.randn(2, 48, 32)
    quantized = quantize_weight(weight, "mxfp4")
    calls: dict[int, Any] = {
        5: lambda: TC.grouped_matmul(rows, weight, counts),
        2 * 4: lambda: TC.masked_grouped_matmul(TC.to_capacity(rows, counts, 4), weight, counts),
        2 * 8: lambda: TC.grouped_matmul(TC.align_rows(rows, counts, 8), weight, align_counts(counts, 8)),
    }
    for computed, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == 2 * computed * 48 * 32
    with FlopCounterMode(display=False) as counter:
        TC.scaled_batched_matmul([rows], quantized, counts, "mxfp4", torch.float32)
    assert counter.get_total_flops() == 2 * 5 * 48 * 32


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


@pytest.mark.parametrize(
    "code",
    [
        "import tensorcast, torch",
        "import torch, tensorcast",
        "import importlib.util, tensorcast; importlib.util.find_spec('torch'); import torch",  # only asks first
        "import tensorcast.trace.tracer, torch",
    ],
)
def test_importing_the_package_registers_the_ops(code: str) -> None:
    """In either order, and without loading torch itself."""
    late = code.startswith("import tensorcast, torch")
    check = "import tensorcast, sys; assert 'torch' not in sys.modules\n" if late else ""
    check += f"{code}\nassert torch.ops.tensor_cast.moe_gating_top_k_softmax.default"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)
