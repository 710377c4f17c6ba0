"""Attention over compressed and over chosen entries: what transformers' own masks let queries see, counted by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from tensorcast.cost.formulas import Context, work_of
from tensorcast.cost.memory import cache_bytes, cache_entries, kv_bytes_per_token
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.store import load_model
from tensorcast.trace.cache import traced
from tensorcast.trace.dims import Sizes
from tensorcast.trace.table import Op, OpTable
from tensorcast.trace.tracer import Phase

WINDOW, RATIOS, PICKED = 8, (4, 16), 3

POOLS: dict[str, Any] = {
    "model_type": "glm5_next_text", "num_hidden_layers": 8, "hidden_size": 4096, "num_attention_heads": 64,
    "num_key_value_heads": 64, "intermediate_size": 12288, "moe_intermediate_size": 2048, "n_routed_experts": 288,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "vocab_size": 154880, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 256, "qk_rope_head_dim": 0, "v_head_dim": 256, "index_topk": 2048, "index_head_dim": 128,
    "index_n_heads": 32, "index_kpool": 16, "linear_num_heads": 64, "linear_head_dim": 128,
}  # fmt: skip
"""The first eight layers of GLM-5.3-Flash by its class in transformers: the fourth and the eighth have a cache."""

QWEN4: dict[str, Any] = {
    "model_type": "qwen4_exp_text", "num_hidden_layers": 8, "hidden_size": 2048, "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 248320, "moe_intermediate_size": 512, "eos_token_id": 1,
    "shared_expert_intermediate_size": 512, "num_experts": 512, "num_experts_per_tok": 10, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "indexer_n_heads": 8, "indexer_kv_heads": 1, "indexer_head_dim": 128,
    "indexer_budget": 2048, "indexer_compress_ratio": 4, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]},
}  # fmt: skip
"""Eight layers at the sizes of Qwen4's class in transformers, with an indexer."""

WRITTEN = {"glm-5.3-flash": POOLS, "qwen4": QWEN4}


@cache
def table_of(model: str, phase: Phase) -> OpTable:
    if model not in WRITTEN:
        return traced(load_model(model), phase)
    return traced(ModelProfile(name=model, hf_id="x", description="", sources={}, config=WRITTEN[model]), phase)


def rows(model: str, phase: Phase, name: str) -> list[Op]:
    return [op for op in table_of(model, phase).ops if op.name == name]


def seen(position: int, window: int, ratio: int, picked: int) -> int:
    """Entries that one query sees: its window's, and of the whole groups of ``ratio`` tokens up to it all or some."""
    groups = (position + 1) // ratio
    return min(position + 1, window) + (min(groups, picked) if picked else groups)


def flops(op: Op, new: int, past: int, batch: int = 1, decode: bool = False) -> float:
    at = Context(Sizes(B=float(batch), S=float(new), P=float(past)), decode=decode)
    return float(sum(work.flops for work in work_of(op, at)))


@pytest.mark.parametrize("tokens", [32, 61])
def test_masks_of_transformers_let_as_much_through(tokens: int) -> None:
    """The class's own attention, run: entries with any weight, per head and query (sinks take a share of their own)."""
    torch.manual_seed(0)
    config = DeepseekV4Config(  # type: ignore[call-arg]
        vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        head_dim=16, q_lora_rank=16, o_lora_rank=8, o_groups=1, index_n_heads=2, index_head_dim=16, index_topk=PICKED,
        sliding_window=WINDOW, n_routed_experts=4, num_experts_per_tok=2, num_hash_layers=0,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        compress_rates={"compressed_sparse_attention": RATIOS[0], "heavily_compressed_attention": RATIOS[1]},
        attn_implementation="eager",
    )
    model = DeepseekV4ForCausalLM(config).eval()
    with torch.no_grad():
        weights = model(torch.arange(tokens)[None] % 64, output_attentions=True).attentions
    expected = [(1, 0, 0), (1, RATIOS[0], PICKED), (1, RATIOS[1], 0)]
    for layer, (_, ratio, picked) in zip(weights, expected, strict=True):
        counted = (layer[0, 0] > 0).sum(-1).tolist()
        assert counted == [seen(p, WINDOW, ratio or tokens + 1, picked) for p in range(tokens)]


@given(new=st.integers(1, 3000), past=st.integers(0, 20_000), batch=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("kind", [0, 1])
def test_prompts_of_deepseek_v4_count_what_queries_see(kind: int, new: int, past: int, batch: int) -> None:
    """A query and an entry of 512 numbers, key and value at once, for each of 64 heads: 2048 FLOPs."""
    ratio, picked = ((128, 0), (4, 512))[kind]
    op = next(o for o in rows("deepseek-v4-flash", "prefill", "attention") if o.attrs.get("compress") == ratio)
    assert op.attrs["picked"] == picked and op.attrs["window"] == 128
    pairs = sum(seen(p, 128, ratio, picked) for p in range(past, past + new))
    # groups are counted as they grow, not in whole ones: at most one more per query
    assert batch * 64 * 2048 * pairs <= flops(op, new, past, batch) <= batch * 64 * 2048 * (pairs + new)


@pytest.mark.parametrize(("past", "entries"), [(127, 128 + 32), (4095, 128 + 512), (8191, 128 + 512)])
def test_decode_of_deepseek_v4_reads_its_window_and_what_was_picked(past: int, entries: int) -> None:
    op = next(o for o in rows("deepseek-v4-flash", "decode", "attention") if o.attrs.get("picked"))
    assert flops(op, 1, past, 7, decode=True) == pytest.approx(7 * 64 * 2048 * entries)
    (work,) = work_of(op, Context(Sizes(B=7.0, S=1.0, P=float(past)), kv_bytes=1.0))
    assert work.bytes == pytest.approx(7 * (584 * entries + 64 * 2048))


@pytest.mark.parametrize(("model", "ratio", "heads"), [("deepseek-v4-flash", 4, 64), ("minimax-m3", 1, 4),
                                                     ("glm-5.3-flash", 16, 32), ("qwen4", 4, 8)])  # fmt: skip
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_indexers_score_every_key(model: str, ratio: int, heads: int, phase: Phase) -> None:
    new, past = (1, 6000) if phase == "decode" else (700, 6000)
    (*_, op) = rows(model, phase, "sparse_indexer")
    pairs = sum((p + 1) / ratio for p in range(past, past + new))
    assert flops(op, new, past, 3, phase == "decode") == pytest.approx(3 * pairs * heads * 128 * 2)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("model", ["deepseek-v4-flash", "minimax-m3", *WRITTEN])
def test_no_mask_and_no_product_of_all_queries_and_keys_is_left(model: str, phase: Phase) -> None:
    """Beside the two kernels nothing grows with queries times keys."""
    table = table_of(model, phase)
    small, large = Sizes(B=1.0, S=1024.0, P=0.0), Sizes(B=1.0, S=2048.0, P=0.0)
    for op in table.ops:
        if ".self_attn" in op.module and op.name not in ("attention", "sparse_indexer"):
            for tensor in (*op.inputs, *op.outputs):
                if not tensor.weight and (few := float(tensor.numel(small))) > 4096:
                    assert float(tensor.numel(large)) <= 2.01 * few, f"{op.name} {op.module}"


def test_minimax_m3_reads_sixteen_blocks() -> None:
    op = next(o for o in rows("minimax-m3", "decode", "attention") if o.attrs["selected"])
    for past, keys in ((1023, 1024), (100_000, 2048)):
        assert flops(op, 1, past, decode=True) == pytest.approx(4 * 64 * 128 * keys)


def test_minimax_m3_keeps_keys_of_its_indexer() -> None:
    """4 heads of 128 numbers, keys and values, in 60 layers; a key of 128 in bf16 in the 57 that choose."""
    table = traced(load_model("minimax-m3"), "decode")
    per_token = [0.0, 0.0]
    for entry in cache_entries(table, "bf16"):
        per_token[entry.per_token < 1000] += entry.per_token * table.layer_kinds.count(entry.kind)
    assert per_token == [60 * 2 * 4 * 128 * 2, 57 * 128 * 2]
    kept = [entry.per_token for entry in cache_entries(table, "fp8") if entry.per_token < 1000]
    assert kept == [256.0]  # the engine keeps these in bf16


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_glm_reads_tokens_and_keeps_a_key_for_sixteen(phase: Phase) -> None:
    """Two layers with 512 numbers a token, and a key of 128 bytes and a scale for a pool; of the last pool keys and
    gates of 128 in bf16. Six layers keep 64 states of 128 x 128 in fp32 and three convolved rows of 3 x 64 x 128."""
    table = table_of("glm-5.3-flash", phase)
    assert kv_bytes_per_token(table) == 2 * (2 * 512 + 132 / 16)
    held = cache_bytes(table, "bf16", 1.0, 0.0)
    assert held == 2 * 16 * 2 * 128 * 2 + 6 * (64 * 128 * 128 * 4 + 3 * 3 * 64 * 128 * 2)
    (attention,) = rows("glm-5.3-flash", phase, "attention")
    assert attention.attrs["selected"] == 2048 and table.layer_kinds.count(attention.kind) == 2
    assert [op.module for op in rows("glm-5.3-flash", phase, "mla_absorb")] == [f"{attention.module}.kv_b_proj"]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_qwen4_reads_tokens_and_keeps_a_key_for_four(phase: Phase) -> None:
    """Two layers with keys and values of 2 heads of 256, and a key of 128 in bf16 for four tokens."""
    table = table_of("qwen4", phase)
    assert kv_bytes_per_token(table) == 2 * (2 * 2 * 256 * 2 + 128 * 2 / 4)
    own = {op.kind: 2.0 * 4 * 128 for op in rows("qwen4", phase, "kv_cache_write") if op.attrs["kind"] != "kv"}
    assert {e.kind: e.per_sequence for e in cache_entries(table, "bf16") if e.per_token == 64.0} == own
    (attention,) = rows("qwen4", phase, "attention")
    assert attention.attrs["selected"] == 2048 and table.layer_kinds.count(attention.kind) == 2


def test_longer_contexts_never_cost_less() -> None:
    for op in rows("deepseek-v4-flash", "decode", "attention"):
        at = Context(Sizes(B=4.0, S=1.0, P=np.arange(0.0, 40_000.0, 37.0)))
        assert all(np.all(np.diff(np.broadcast_to(w.bytes, 1082)) >= 0) for w in work_of(op, at))
