"""Quantised experts: real tensors of each scheme, activations quantised on the way, and matmuls on them.

A quantised tensor is a list: values, scale, and for some schemes a third part (zero points, or the scales' own scale).
A matmul's result is that of the dequantised operands. Real kernels run torch's scaled grouped GEMM where the device
has it for the scheme, else they dequantise: to fp32 on the CPU, to the output's dtype on other devices.
Symbols: R rows, E experts, C capacity, N and K output and input width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tensorcast.errors import InputError, unknown_name
from tensorcast.ops.library import define
from tensorcast.ops.moe import MATMULS, finish_grouped, finish_masked

Values = Literal["e4m3", "int8", "int4", "uint4", "e2m1"]

LARGEST: dict[Values, float] = {"e4m3": 448.0, "int8": 127.0, "int4": 7.0, "uint4": 15.0, "e2m1": 6.0}
"""Largest magnitude of each kind of value (int4 is symmetric here, uint4 counts from its zero point)."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of 4-bit floats by code; the code's top bit is the sign (OCP Microscaling Formats v1.0, table 5)."""


@dataclass(frozen=True)
class Format:
    """How a scheme stores weights ``[N,K]``, and activations if it quantises them.

    ``block``: rows and columns that share a scale, 0 for all of them. ``activation``: columns of one row that share a
    scale, 0 for all; None: activations keep their dtype. 4-bit values are packed in pairs along K, low half first.
    """

    values: Values
    block: tuple[int, int]
    scale: torch.dtype = torch.float32
    activation: int | None = None

    @property
    def packed(self) -> bool:
        return self.values in ("int4", "uint4", "e2m1")

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored values; pairs of 4-bit values are plain bytes."""
        return torch.float8_e4m3fn if self.values == "e4m3" else torch.int8 if self.values == "int8" else torch.uint8

    @property
    def scaled_scales(self) -> bool:
        """Scales narrow enough to need an fp32 scale of their own: per matrix of weights, per row of activations."""
        return self.scale == torch.float8_e4m3fn


FORMATS: dict[str, Format] = {
    "fp8": Format("e4m3", (1, 0), activation=0),
    "fp8_block": Format("e4m3", (128, 128), activation=128),
    "w8a16_fp8": Format("e4m3", (1, 0)),
    "w8a16_fp8_block": Format("e4m3", (128, 128)),
    "int8": Format("int8", (1, 0), activation=0),
    "w4a16": Format("uint4", (1, 128), torch.float16),
    "w4a16_g32": Format("int4", (1, 32), torch.float16),
    "mxfp4": Format("e2m1", (1, 32), torch.float8_e8m0fnu),
    "nvfp4": Format("e2m1", (1, 16), torch.float8_e4m3fn, activation=16),
    "w4a16_nvfp4": Format("e2m1", (1, 16), torch.float8_e4m3fn),
}
"""By scheme name; the weight-only forms are what a device without the arithmetic runs. Sources:
DeepSeek-V3 (arXiv 2412.19437, section 3.3) for 128x128 weight blocks and 1x128 activation groups; AWQ (arXiv
2306.00978) for groups of 128 with zero points; OCP Microscaling Formats v1.0 for MXFP4; NVIDIA's Blackwell
documentation for NVFP4."""


def format_of(scheme: str) -> Format:
    """The scheme's format. Raises :class:`InputError` if there is none of that name."""
    if scheme not in FORMATS:
        raise unknown_name("quantisation scheme", scheme, FORMATS)
    return FORMATS[scheme]


def parts_of(scheme: str) -> tuple[str, ...]:
    """What the tensors of a quantised weight are: ``("values", "scale")`` and perhaps ``zero`` or ``outer_scale``."""
    kind = format_of(scheme)
    third = ("zero",) if kind.values == "uint4" else ("outer_scale",) if kind.scaled_scales else ()
    return ("values", "scale", *third)


def quantize_weight(weight: Tensor, scheme: str, per_tensor: bool = False) -> list[Tensor]:
    """``[...,N,K]`` floats -> values, scale and perhaps a third part. ``per_tensor``: one scale per matrix (fp8, int8).

    Rounds to nearest with the largest magnitude of a block at the format's largest; scales that are powers of two are
    rounded up, so nothing saturates. Raises :class:`InputError` for an odd K of a 4-bit scheme.
    """
    kind = format_of(scheme)
    if per_tensor and kind.block != (1, 0):
        raise InputError(f"per_tensor with scheme {scheme!r}: only fp8 and int8 have one scale per matrix")
    block = (0, 0) if per_tensor else kind.block
    if weight.dim() < 3 or weight.is_meta:
        return _quantize(weight, kind, block, outer=(-2, -1))
    # matrix by matrix: the fp32 steps on a whole layer's experts at once would not fit beside them
    each = [quantize_weight(matrix, scheme, per_tensor) for matrix in weight]
    return [torch.stack(parts) for parts in zip(*each, strict=True)]


def dequantize_weight(parts: list[Tensor], scheme: str, dtype: torch.dtype) -> Tensor:
    """``[...,N,K]`` in ``dtype`` from what :func:`quantize_weight` gave."""
    kind = format_of(scheme)
    if parts[0].dim() < 3:
        return _dequantize(parts, kind, kind.block).to(dtype)
    return torch.stack([dequantize_weight(list(own), scheme, dtype) for own in zip(*parts, strict=True)])


def _quantize(x: Tensor, kind: Format, block: tuple[int, int], outer: tuple[int, ...]) -> list[Tensor]:
    if kind.packed and x.shape[-1] % 2:
        raise InputError(f"width {x.shape[-1]}: 4-bit values are packed in pairs, so it must be even")
    wide, largest, third = x.float().contiguous(), LARGEST[kind.values], []
    if kind.scaled_scales:
        third = [_positive(wide.abs().amax(outer, keepdim=True)) / (largest * LARGEST["e4m3"])]
        wide = wide / third[0]
    if kind.values == "uint4":
        low, high = (_of_blocks(wide, block, f) for f in (torch.amin, torch.amax))  # edges are padded with zeros, so
        scale = _rounded(_positive(high.clamp(min=0.0) - low.clamp(max=0.0)) / largest, kind.scale)  # both hold zero
        zero = (-low.clamp(max=0.0) / scale.float()).round().clamp(0.0, largest)
        third = [_pack(F.pad(zero, (0, zero.shape[-1] % 2)).to(torch.uint8))]
        wide = wide + _spread(zero * scale.float(), x.shape, block)
    else:
        scale = _rounded(_positive(_of_blocks(wide.abs(), block, torch.amax)) / largest, kind.scale)
    steps = _spread(scale.float(), x.shape, block)
    return [_encode(wide / steps.masked_fill(steps == 0, float("inf")), kind), scale, *third]


def _dequantize(parts: list[Tensor], kind: Format, block: tuple[int, int]) -> Tensor:
    values = _decode(parts[0], kind)
    if kind.values == "uint4":
        zero = _unpack(parts[2])[..., : parts[1].shape[-1]].float()
        values = values - _spread(zero, values.shape, block)
    out = values * _spread(parts[1].float(), values.shape, block)
    return out * parts[2] if kind.scaled_scales else out


def _of_blocks(x: Tensor, block: tuple[int, int], reduce: Callable[..., Tensor]) -> Tensor:
    """One number per block of the last two dimensions; ragged edges are filled up with zeros."""
    rows, columns = (size or whole for size, whole in zip(block, x.shape[-2:], strict=True))
    padded = F.pad(x, (0, -x.shape[-1] % columns, 0, -x.shape[-2] % rows))
    counts = padded.shape[-2] // rows, padded.shape[-1] // columns
    return reduce(padded.unflatten(-1, (counts[1], columns)).unflatten(-3, (counts[0], rows)), (-3, -1))


def _spread(blocks: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """The blocks' numbers at each of their elements, to broadcast against ``[...,N,K]``."""
    for dim in (-2, -1):
        if blocks.shape[dim] not in (1, shape[dim]):
            blocks = blocks.repeat_interleave(block[dim], dim).narrow(dim, 0, shape[dim])
    return blocks


def _positive(x: Tensor) -> Tensor:
    """A block of zeros may have any scale."""
    return torch.where(x > 0, x, 1.0)


def _rounded(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As stored. Powers of two are rounded up (nothing saturates), others to nearest."""
    if dtype != torch.float8_e8m0fnu:
        return scale.to(dtype)
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [1/2, 1)
    exponent = (exponent - (mantissa == 0.5).to(exponent.dtype)).clamp(-127, 127)
    return (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def _encode(x: Tensor, kind: Format) -> Tensor:
    """Values in units of their scale, rounded to nearest (ties to even) and stored."""
    largest = LARGEST[kind.values]
    if kind.values == "e2m1":
        return _pack(_e2m1_codes(x))
    if kind.values == "e4m3":
        return x.clamp(-largest, largest).to(torch.float8_e4m3fn)
    if kind.values == "int8":
        return x.round().clamp(-largest, largest).to(torch.int8)
    if kind.values == "int4":
        return _pack((x.round().clamp(-largest - 1, largest) + 8).to(torch.uint8))
    return _pack(x.round().clamp(0.0, largest).to(torch.uint8))


def _decode(values: Tensor, kind: Format) -> Tensor:
    """Stored values as floats, in units of their scale."""
    if not kind.packed:
        return values.float()
    codes = _unpack(values)
    if kind.values == "e2m1":
        both = torch.tensor((*E2M1, *(-value for value in E2M1)), device=values.device)
        return both[codes.int()]
    return codes.float() - (8.0 if kind.values == "int4" else 0.0)


def _e2m1_codes(x: Tensor) -> Tensor:
    """Codes of the nearest 4-bit floats; a tie goes to the even code."""
    middles = torch.tensor([(a + b) / 2 for a, b in zip(E2M1, E2M1[1:], strict=False)], device=x.device)
    up = torch.arange(len(middles), device=x.device) % 2 == 1  # from an odd code a tie goes up: a bound just below it
    bounds = torch.where(up, torch.nextafter(middles, torch.zeros_like(middles)), middles)
    return (torch.bucketize(x.abs(), bounds) + 8 * (x < 0)).to(torch.uint8)


def _pack(codes: Tensor) -> Tensor:
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _unpack(pairs: Tensor) -> Tensor:
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)


def _activation_block(scheme: str) -> tuple[Format, tuple[int, int]]:
    kind = format_of(scheme)
    if kind.activation is None:
        raise InputError(f"scheme {scheme!r} keeps activations as they are: nothing to quantise")
    return kind, (1, kind.activation)


def _quantize_activation(x: Tensor, scheme: str) -> list[Tensor]:
    kind, block = _activation_block(scheme)
    return _quantize(x, kind, block, outer=(-1,))


def _quantize_activation_fake(x: Tensor, scheme: str) -> list[Tensor]:
    kind, (_, columns) = _activation_block(scheme)
    *rows, width = x.shape
    parts = [
        x.new_empty((*rows, width // 2 if kind.packed else width), dtype=kind.dtype),
        x.new_empty((*rows, (width + columns - 1) // columns if columns else 1), dtype=kind.scale),
    ]
    return [*parts, x.new_empty((*rows, 1), dtype=torch.float32)] if kind.scaled_scales else parts


# x [...,K] -> values [...,K] (4-bit: [...,K/2]) and scale, one per row or per group of columns; nvfp4: and each row's
# fp32 scale of its scales.
define(
    "quantize_activation(Tensor x, str scheme) -> Tensor[]",
    real=_quantize_activation,
    fake=_quantize_activation_fake,
)


def _dequantize_activation(x: list[Tensor], scheme: str, dtype: torch.dtype) -> Tensor:
    return _dequantize(x, *_activation_block(scheme)).to(dtype)


define(
    "dequantize_activation(Tensor[] x, str scheme, ScalarType dtype) -> Tensor",
    real=_dequantize_activation,
    fake=lambda x, scheme, dtype: x[0].new_empty(
        (*x[0].shape[:-1], x[0].shape[-1] * (2 if format_of(scheme).packed else 1)), dtype=dtype
    ),
)


def _runs_scaled(x: Tensor, weight: Tensor, scheme: str, dtype: torch.dtype) -> bool:
    """Whether torch's scaled grouped GEMM takes the operands: fp8 with a scale per row, on Hopper or Blackwell."""
    if scheme != "fp8" or not x.is_cuda or dtype != torch.bfloat16:
        return False
    aligned = all(size % 16 == 0 for size in weight.shape[1:])
    return aligned and torch.cuda.get_device_capability(x.device) in ((9, 0), (10, 0))


def scaled_grouped_mm(x: list[Tensor], weight: list[Tensor], counts: Tensor, dtype: torch.dtype) -> Tensor:
    """torch's fp8 grouped GEMM: x ``[R,K]`` ordered by expert, or ``[E,C,K]``; a scale per row on both sides."""
    rows = weight[1].expand(*weight[0].shape[:2], 1).squeeze(-1).contiguous()  # of one scale per matrix: N copies
    offsets = counts.cumsum(0).to(torch.int32) if x[0].dim() == 2 else None
    stacked = weight[0].transpose(-2, -1)
    return torch._scaled_grouped_mm(x[0], stacked, x[1].squeeze(-1), rows, offs=offsets, out_dtype=dtype)


def _scaled(form: str) -> Callable[..., Tensor]:
    """The quantised kernel of one form of the experts' matmul."""
    plain = MATMULS[form][0]
    finish = {"grouped_matmul": finish_grouped, "masked_grouped_matmul": finish_masked}.get(form)

    def kernel(
        x: list[Tensor],
        weight: list[Tensor],
        counts: Tensor,
        scheme: str,
        dtype: torch.dtype,
        bias: Tensor | None = None,
    ) -> Tensor:
        if finish is not None and _runs_scaled(x[0], weight[0], scheme, dtype):
            return finish(scaled_grouped_mm(x, weight, counts, dtype), counts, bias)
        wide = torch.float32 if x[0].device.type == "cpu" else dtype
        quantized = format_of(scheme).activation is not None
        rows = _dequantize_activation(x, scheme, wide) if quantized else x[0].to(wide)
        out = plain(rows, dequantize_weight(weight, scheme, wide), counts, None if bias is None else bias.to(wide))
        return out.to(dtype)

    return kernel


def _scaled_fake(
    x: list[Tensor], weight: list[Tensor], counts: Tensor, scheme: str, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    return x[0].new_empty((*x[0].shape[:-1], weight[0].shape[1]), dtype=dtype)


for _form in MATMULS:
    # x: [values, scale, ...] as quantize_activation gives, or one plain tensor where the scheme keeps activations;
    # weight: as quantize_weight gives, values [E,N,K]; otherwise as the plain form. Out in dtype.
    define(
        f"scaled_{_form}(Tensor[] x, Tensor[] weight, Tensor counts, str scheme, ScalarType dtype, "
        "Tensor? bias=None) -> Tensor",
        real=_scaled(_form),
        fake=_scaled_fake,
    )
