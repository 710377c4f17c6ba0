"""Quantised tensors against independent arithmetic: nearest values by brute force, scales, bytes, matmuls."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorcast import ops
from tensorcast.errors import InputError
from tensorcast.modeling.quantization import SCHEMES
from tensorcast.ops import quantized
from tensorcast.ops.quantized import FORMATS, dequantize_weight, parts_of, quantize_weight

TC = torch.ops.tensor_cast

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # by hand: two exponent bits (bias 1), one mantissa bit, no infinity
E4M3 = [m * 2.0**e for e in range(-6, 9) for m in (1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875)][:-1]
E4M3 = [n * 2.0**-9 for n in range(8)] + E4M3  # subnormals first; the last code of all is NaN: 448 is the largest
VALUES: dict[str, list[float]] = {
    "e2m1": sorted({s * v for v in E2M1 for s in (-1, 1)}),
    "e4m3": sorted({s * v for v in E4M3 for s in (-1, 1)}),
    "int8": [float(n) for n in range(-127, 128)],
    "int4": [float(n) for n in range(-8, 8)],
    "uint4": [float(n) for n in range(16)],
}


def _nearest(x: torch.Tensor, values: list[float]) -> torch.Tensor:
    """Distance of each element to the nearest value."""
    table = torch.tensor(values, dtype=torch.float64)
    return (x.double().unsqueeze(-1) - table).abs().amin(-1)


def _scales(parts: list[torch.Tensor], scheme: str, shape: torch.Size, block: tuple[int, int]) -> torch.Tensor:
    """The scale of each element, looked up one by one."""
    whole = parts[1].double() * (parts[2].double() if FORMATS[scheme].scaled_scales else 1.0)
    out = torch.empty(shape, dtype=torch.float64)
    for n, k in itertools.product(range(shape[-2]), range(shape[-1])):
        out[..., n, k] = whole[..., n // (block[0] or shape[-2]), k // (block[1] or shape[-1])]
    return out


def test_schemes_of_the_profiles_are_all_here() -> None:
    assert set(FORMATS) < set(SCHEMES) - {"bf16"}  # the others are priced, not run
    for name, kind in FORMATS.items():
        assert SCHEMES[name].quantizes_activation == (kind.activation is not None)


def test_values_enumerated_by_hand_come_back_exactly() -> None:
    for scheme, kind in FORMATS.items():
        values = [v for v in VALUES[kind.values] if v != -8]  # int4's extra code lies outside its scale
        rows = torch.tensor(values)
        rows = torch.nn.functional.pad(rows, (0, -len(rows) % (kind.block[1] or 2)))
        weight = (rows * 0.25)[None, None]  # the largest is among them, so the scale is a power of two
        found = dequantize_weight(quantize_weight(weight, scheme), scheme, torch.float32)
        torch.testing.assert_close(found, weight, rtol=1e-6 * kind.scaled_scales, atol=0, msg=scheme)


def test_two_nibbles_share_a_byte_low_half_first() -> None:
    """-6 is code 15, 0.5 code 1, 3 code 5, of four-bit floats; the scale is 1, stored as the exponent's bias."""
    weight = torch.zeros(1, 1, 32)
    weight[0, 0, :4] = torch.tensor([-6.0, 0.5, 3.0, 0.0])
    values, scale = quantize_weight(weight, "mxfp4")
    assert values[0, 0, :2].tolist() == [15 + 16 * 1, 5]
    assert scale.dtype == torch.float8_e8m0fnu and scale.view(torch.uint8).item() == 127


def test_ties_of_four_bit_floats_go_to_the_even_code() -> None:
    middles = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    weight = torch.zeros(1, 1, 32)
    weight[0, 0, :8] = torch.tensor([6.0, *middles])
    found = dequantize_weight(quantize_weight(weight, "mxfp4"), "mxfp4", torch.float32)
    assert found[0, 0, 1:8].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


@pytest.mark.parametrize("scheme", FORMATS)
@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 140), k=st.integers(1, 100), spread=st.floats(-4, 4), seed=st.integers(0, 10**6))
def test_every_weight_is_at_its_nearest_value(scheme: str, n: int, k: int, spread: float, seed: int) -> None:
    """By brute force over the format's values; shapes that fill no block are included."""
    torch.manual_seed(seed)
    kind, n, k = FORMATS[scheme], min(n, 140 if scheme == "fp8_block" else 4), 2 * k
    weight = torch.randn(2, n, k) * 10.0**spread
    weight[1, : n // 2] = 0.0
    parts = quantize_weight(weight, scheme)
    assert [len(parts), *parts[0].shape] == [len(parts_of(scheme)), 2, n, k // 2 if kind.packed else k]
    found, step = dequantize_weight(parts, scheme, torch.float64), _scales(parts, scheme, weight.shape, kind.block)
    if kind.values == "uint4":
        # at most half a step off; the zero point is itself rounded, so an end of the range may be another half off
        assert ((found - weight).abs() <= 1.01 * step).all()
        assert ((found - weight).abs() <= 0.51 * step).float().mean() > 0.85
        return
    units = weight.double() / step.clamp(min=1e-300)
    inside = units.clamp(min(VALUES[kind.values]), max(VALUES[kind.values]))  # a scale rounded down cuts a little off
    assert (units.abs() <= max(VALUES[kind.values]) * (1 + 1 / 14)).all()
    off = (found / step.clamp(min=1e-300) - inside).abs()
    assert torch.allclose(off, _nearest(inside, VALUES[kind.values]), rtol=1e-5, atol=1e-5 * max(VALUES[kind.values]))


def test_powers_of_two_as_scales_never_saturate() -> None:
    weight = torch.rand(1, 64, 256) * torch.logspace(-30, 30, 64)[None, :, None]
    scale = quantize_weight(weight, "mxfp4")[1].float()
    units = weight.unflatten(-1, (-1, 32)).amax(-1) / scale
    assert (units <= 6).all() and (units > 3 * (1 - 1e-6)).all()  # a smaller power of two would


def test_bytes_per_weight_are_those_that_are_priced() -> None:
    for scheme in FORMATS:
        parts = quantize_weight(torch.randn(1, 256, 512), scheme)
        bytes_ = sum(t.numel() * t.element_size() for t in parts)
        # one scale per row: not worth a rate of its own
        per_row = 256 * 4 if scheme in ("fp8", "w8a16_fp8", "int8") else 0
        outer = 4 if scheme in ("nvfp4", "w4a16_nvfp4") else 0
        assert bytes_ - per_row - outer == pytest.approx(SCHEMES[scheme].weight_bytes * 256 * 512), scheme


@pytest.mark.parametrize("scheme", FORMATS)
def test_shapes_on_meta_are_the_real_ones(scheme: str) -> None:
    weight = torch.randn(2, 130, 96)
    real, meta = quantize_weight(weight, scheme), quantize_weight(weight.to("meta"), scheme)
    assert [(t.shape, t.dtype, t.stride()) for t in real] == [(t.shape, t.dtype, t.stride()) for t in meta]


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_one_scale_per_matrix(scheme: str) -> None:
    weight = torch.randn(3, 8, 16)
    parts = quantize_weight(weight, scheme, per_tensor=True)
    assert parts[1].shape == (3, 1, 1)
    largest = weight.abs().amax((-2, -1), keepdim=True)
    assert torch.allclose(dequantize_weight(parts, scheme, torch.float32), weight, atol=float(largest.max()) / 16)
    with pytest.raises(InputError, match="per_tensor with scheme 'mxfp4'"):
        quantize_weight(weight, "mxfp4", per_tensor=True)


@pytest.mark.parametrize("scheme", [name for name, kind in FORMATS.items() if kind.activation is not None])
def test_each_row_of_an_activation_is_quantised_by_itself(scheme: str) -> None:
    """A row's result does not depend on its neighbours, is near the row, and quantising it again changes nothing."""
    torch.manual_seed(3)
    x = torch.randn(6, 160) * torch.logspace(-3, 3, 6)[:, None]
    parts = TC.quantize_activation(x, scheme)
    found = TC.dequantize_activation(parts, scheme, torch.float32)
    alone = [TC.dequantize_activation(TC.quantize_activation(row, scheme), scheme, torch.float32) for row in x.split(1)]
    assert torch.equal(found, torch.cat(alone))
    kind = FORMATS[scheme]
    values, step = VALUES[kind.values], _scales(parts, scheme, x.shape, (1, kind.activation or 0))
    gap = max(b - a for a, b in zip(values, values[1:], strict=False))
    assert ((found - x).abs() <= 0.5001 * gap * step).all()
    again = TC.dequantize_activation(TC.quantize_activation(found, scheme), scheme, torch.float32)
    torch.testing.assert_close(again, found, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matmuls_equal_those_of_dequantised_operands(scheme: str, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    counts, rows, bias = torch.tensor([3, 0, 6]), torch.randn(9, 160).to(dtype), torch.randn(3, 40).to(dtype)
    weight = quantize_weight(torch.randn(3, 40, 160), scheme)
    x = [rows]
    if FORMATS[scheme].activation is not None:
        x = TC.quantize_activation(rows, scheme)
        rows = TC.dequantize_activation(x, scheme, torch.float32)
    wide = dequantize_weight(weight, scheme, torch.float64)
    expected = torch.cat([r.double() @ wide[e].T + bias[e].double() for e, r in enumerate(rows.split(counts.tolist()))])
    held = [TC.to_capacity(part, counts, 7) for part in x]
    masked = TC.scaled_masked_grouped_matmul(held, weight, counts, scheme, dtype, bias)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # the result itself is rounded to 8 bits
    for found in (
        TC.scaled_grouped_matmul(x, weight, counts, scheme, dtype, bias),
        TC.scaled_batched_matmul(x, weight, counts, scheme, dtype, bias),
        TC.from_capacity(masked, counts, 9),
    ):
        assert found.dtype == dtype
        assert ((found - expected).abs().max() / expected.abs().max()) < tolerance


def test_integer_matmul_is_exact() -> None:
    """torch's own int8 GEMM accumulates in int32: the same number, times both scales."""
    torch.manual_seed(5)
    x, weight = TC.quantize_activation(torch.randn(20, 64), "int8"), quantize_weight(torch.randn(1, 32, 64), "int8")
    exact = torch._int_mm(x[0], weight[0][0].t()) * x[1] * weight[1][0].t()
    found = TC.scaled_grouped_matmul(x, weight, torch.tensor([20]), "int8", torch.float32)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["rows", "capacity"])
def test_operands_fit_torchs_scaled_grouped_gemm(layout: str) -> None:
    """Where a device has it, fp8 runs on it: dtypes, strides and scales as its own shape check wants them."""
    x, counts = torch.randn(64, 128), torch.tensor([20, 0, 44])
    parts: list[Any] = TC.quantize_activation(x, "fp8")
    if layout == "capacity":
        parts = [TC.to_capacity(part, counts, 64) for part in parts]
    for per_tensor in (False, True):
        weight = quantize_weight(torch.randn(3, 32, 128), "fp8", per_tensor)
        arguments = [t.to("meta") for t in (*parts, *weight, counts)]
        out = quantized.scaled_grouped_mm(arguments[:2], arguments[2:4], arguments[4], torch.bfloat16)
        assert out.shape == (*parts[0].shape[:-1], 32) and out.dtype == torch.bfloat16


def test_unknown_schemes_and_odd_widths_are_named() -> None:
    assert ops.quantized is quantized
    with pytest.raises(InputError, match="unknown quantisation scheme 'fp9': did you mean fp8"):
        quantize_weight(torch.randn(2, 4), "fp9")
    with pytest.raises(InputError, match="width 7: 4-bit values are packed in pairs"):
        quantize_weight(torch.randn(2, 7), "mxfp4")
    with pytest.raises(InputError, match="'mxfp4' keeps activations as they are"):
        TC.quantize_activation(torch.randn(2, 32), "mxfp4")
