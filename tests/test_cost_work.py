"""Work counts against numbers counted by hand and by brute force."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorcast.cost import work

SIZES = st.integers(1, 60)


def pairs_by_hand(new: int, past: int, window: int, causal: bool) -> int:
    """Count (query, key) pairs one by one: query i sits at position past + i."""
    count = 0
    for position in range(past, past + new):
        for key in range(past + new):
            visible = key <= position if causal else True
            if window and causal and key <= position - window:
                visible = False
            count += visible
    return count


@settings(max_examples=200, deadline=None)
@given(new=SIZES, past=st.integers(0, 60), window=st.integers(0, 80))
def test_attended_pairs_equal_brute_force(new: int, past: int, window: int) -> None:
    assert work.attended_pairs(new, past, window) == pairs_by_hand(new, past, window, True)
    assert work.attended_pairs(new, past, causal=False) == pairs_by_hand(new, past, 0, False)


def test_gemm_by_hand() -> None:
    """[3,5] x [5,7] in bf16: 105 multiply-adds; 15 + 35 + 21 elements of two bytes."""
    found = work.gemm(3, 7, 5)
    assert found.flops == 210
    assert found.bytes == 2 * (15 + 35 + 21)
    batched = work.gemm(3, 7, 5, batch=4)
    assert (batched.flops, batched.bytes) == (840, 4 * 142)


def test_gemm_counts_scales_and_output_width() -> None:
    precision = work.Precision("nvfp4", "fp4", 0.5625, 0.5625, 2.0)
    assert work.gemm(16, 32, 64, precision).bytes == 0.5625 * (16 * 64 + 32 * 64) + 2 * 16 * 32


@given(m=st.integers(1, 5000), n=st.integers(1, 5000))
@settings(max_examples=100, deadline=None)
def test_every_tiling_covers_the_output(m: int, n: int) -> None:
    found = work.gemm(m, n, 64)
    for tiling in found.tilings:
        assert tiling.tiles * tiling.flops >= found.flops
        assert 0 < tiling.rate <= 1


def test_grouped_gemm_reads_weights_of_hit_experts_only() -> None:
    """10 rows on 3 experts, [n=8, k=16]: weights 3*8*16, inputs 10*16, outputs 10*8."""
    found = work.grouped_gemm(10, 3, 8, 16)
    assert found.flops == 2 * 10 * 8 * 16
    assert found.bytes == 2 * (3 * 8 * 16 + 10 * 16 + 10 * 8)
    aligned = work.grouped_gemm(10, 3, 8, 16, align=128)
    assert all(t.flops >= 2 * 128 * 64 * 16 for t in aligned.tilings)


def test_decode_attention_by_hand() -> None:
    """2 sequences, 4 heads on 1 KV head of width 8, 9 cached tokens and 1 new: 10 keys each."""
    found = work.attention(2, 1, 9, 4, 1, qk_dim=8, v_dim=8, decode=True)
    assert found.flops == 2 * 2 * 4 * 10 * (8 + 8)
    assert found.bytes == 2 * 10 * (8 + 8) * 2 + 2 * 4 * (8 + 8) * 2
    assert found.family == "attention_decode"


def test_decode_dtype_follows_the_cache() -> None:
    assert work.attention(1, 1, 9, 4, 1, qk_dim=8, v_dim=8, decode=True, kv_bytes=1.0).dtype == "fp8"
    assert work.attention(1, 1, 9, 4, 1, qk_dim=8, v_dim=8, decode=True).dtype == "bf16"
    assert work.attention(1, 9, 0, 4, 1, qk_dim=8, v_dim=8, kv_bytes=1.0).dtype == "bf16"
    narrow = work.mla(1, 1, 9, 4, latent=512, rope=64, nope=128, v_dim=128, decode=True, kv_bytes=656 / 576)
    assert narrow.dtype == "fp8"


def test_window_bounds_the_cache_read() -> None:
    full = work.attention(1, 1, 10_000, 8, 8, qk_dim=64, v_dim=64, decode=True)
    windowed = work.attention(1, 1, 10_000, 8, 8, qk_dim=64, v_dim=64, decode=True, window=128)
    assert windowed.bytes == pytest.approx(full.bytes * 128 / 10_001, rel=0.02)
    assert windowed.flops == 2 * 8 * 128 * 128


def test_mla_counts_match_deepseek_v3() -> None:
    """Per (query, key) pair of 128 heads: 278,528 FLOPs absorbed, 81,920 expanded (DeepSeek-V2 paper, section 2.1)."""
    absorbed = work.mla(1, 1, 99, 128, latent=512, rope=64, nope=128, v_dim=128, decode=True)
    assert absorbed.flops == 100 * 278_528
    expanded = work.mla(1, 50, 0, 128, latent=512, rope=64, nope=128, v_dim=128)
    assert expanded.flops == 50 * 51 / 2 * 81_920


def test_mla_decode_reads_one_latent_for_all_heads() -> None:
    few, many = (work.mla(1, 1, 4095, h, latent=512, rope=64, nope=128, v_dim=128, decode=True) for h in (1, 128))
    latent = 4096 * 576 * 2
    assert few.bytes - latent == pytest.approx((many.bytes - latent) / 128)


def test_sparse_mla_reads_what_was_selected() -> None:
    found = work.mla(1, 1, 100_000, 128, latent=512, rope=64, nope=128, v_dim=128, selected=2048, decode=True)
    assert found.flops == 2048 * 278_528


def test_arrays_equal_scalars() -> None:
    m, past = np.array([1, 17, 300]), np.array([0, 100, 5000])
    gemm = work.gemm(m, 4096, 512)
    attention = work.attention(m, 1, past, 32, 8, qk_dim=128, v_dim=128, decode=True, window=np.array([0, 64, 128]))
    for i, window in enumerate((0, 64, 128)):
        one = work.gemm(int(m[i]), 4096, 512)
        assert [np.asarray(of)[i] for of in (gemm.flops, gemm.bytes)] == [one.flops, one.bytes]
        single = work.attention(int(m[i]), 1, int(past[i]), 32, 8, qk_dim=128, v_dim=128, decode=True, window=window)
        assert [np.asarray(of)[i] for of in (attention.flops, attention.bytes)] == [single.flops, single.bytes]


def test_memory_is_reads_plus_writes() -> None:
    assert work.memory(100.0, 28.0).bytes == 128.0


def test_sparse_prompts_compute_padded_heads_and_every_selected_place() -> None:
    """FlashMLA's sparse kernel: at 16 heads as long as at 64, and a query that sees 100 tokens as long as one that sees
    2,048. H200, aiconfigurator-core 0.12.0, ``glm5_dsa_attn``: 2,048 queries of 64 heads take 957 us after no token and
    1,037 us after 2,048."""
    few, many = (
        work.mla(1, 2048, past, heads, latent=512, rope=64, nope=128, v_dim=128, selected=2048, least_heads=64.0)
        for past, heads in ((0, 16), (2048, 64))
    )
    assert few.family == many.family == "mla_sparse"
    assert few.issued_flops == many.issued_flops == 2 * 2048 * 2048 * 64 * (2 * 512 + 64)
    assert few.flops < many.flops / 4


def test_linear_attention_by_hand() -> None:
    """Two sequences of 100 tokens, 4 value and 2 key heads of 16 x 8: states read and written once, chunks in turn."""
    attend = partial(work.linear_attention, key_heads=2, k_dim=16, v_dim=8)
    found = attend(2, 100, 4, state_bytes=4, chunk=64)
    assert found.flops == 2 * 100 * 4 * (6 * 16 * 8 + 2 * 64 * 2 * (16 + 8))
    assert found.bytes == 2 * 2 * 100 * (2 * 2 * 16 + 2 * 4 * 8) + 2 * 4 * (2 * 4 * 16 * 8)
    (chain,) = found.tilings
    assert (chain.tiles, chain.depth) == (2 * 4, 2)
    narrow = attend(2, 1, 4, state_bytes=2, decode=True)
    wide = attend(2, 1, 4, state_bytes=4, decode=True)
    assert wide.bytes - narrow.bytes == 2 * 2 * (2 * 4 * 16 * 8)
    assert narrow.flops == 2 * 4 * 6 * 16 * 8 and narrow.family == "linear_decode"


def test_short_convolution_by_hand() -> None:
    found = work.short_convolution(2, 100, 32, 4)
    assert (found.flops, found.bytes) == (2 * 2 * 100 * 32 * 4, 2 * (2 * 2 * 100 * 32 + 32 * 4 + 2 * 32 * 4))
