"""Kernels that no measured table holds, by the few times that public reports give of them."""

from __future__ import annotations

from functools import partial

from tensorcast.cost.evidence import Evidence
from tensorcast.profiles.device import DeviceProfile, KernelConstants

DATASHEET_ERROR = 0.4
"""Median relative error to state of fractions of a datasheet, and of laws that one or two reported times say: a plain
roofline is 80 % off on the measured devices, the assumed fractions 25 %, but those devices chose them, and kernels of
other vendors differ more."""

TRITON_INT4 = {"vllm": 1.16e9, "sglang": 3.0e9}
"""Bytes of INT4 experts that a processor of AMD's reads a second in Triton's kernel (``fused_moe_kernel_gptq_awq``) at
the tiles that an engine takes where it ships none, as on CDNA 3. Kimi-K2.5 at tp 8 on MI355X takes 0.18 ms and 4.0 us
for each expert that is hit at SGLang's, 16 x 32 x 64 up to as many tokens as experts (sgl-project/sglang#22208); tuned
ones take 0.44 of that (sgl-project/sglang#34460: 40 % of decode steps, of which it is 71 %), and vLLM's defaults, 64 x
64 x 32 from 41 tokens on (0.18.0, fused_moe.py), five to seven times as long as tuned (vllm-project/vllm#35093)."""

TRITON_INT4_FLOPS, TRITON_INT4_LAUNCH_S = 0.24e12, 9e-5
"""FLOP/s of a processor there: 10 to 13 us for 64 rows of an expert at 64 x 64 x 32 (the same); and its least time."""

ONE_TILE_STEP_S, ONE_TILE_LAUNCH_S, ONE_TILE_ERROR = 1.67e-8, 2.5e-6, 0.1
"""AITER's FP8 GEMM in Triton with weights in blocks at its only tile for CDNA 3: seconds per step of depth and beside.
SGLang 0.5.9 on MI325X took 123, 34, 30, 122 and 39 us for [64, 7168] x [7168, 2112], 2048 x 7168, 1536 x 3072, 7168 x
4608 and 2304 x 7168 (SemiAnalysisAI/InferenceX#863); before it was tuned the first took 129 to 117 us at 64 to 256 rows
(ROCm/aiter#1232). CDNA 4 had that tile alone, too, until April 2026, but at what speed no public figure says."""

ROUTED_STEP_S, ROUTED_LAUNCH_S, ROUTED_COMPUTE, ROUTED_MEMORY = 2.57e-8, 1.2e-5, 0.6, 0.85
"""MXFP4 experts of OpenAI's Triton kernels on CDNA 3, which unpack them for want of that arithmetic: a token's four
experts of gpt-oss-20b, 3,072 deep and 6,144 wide, take 79 us in tiles of 32 x 256 by 128 on MI300X (ROCm/triton#970;
Triton 3.7.1 takes 119). The rest as assumed of any device."""

FP32_STEP_S, FP32_LAUNCH_S, FP32_ERROR = 1.02e-8, 1e-6, 0.25
"""GEMMs of FP32 on NVIDIA's, which run without matrix units unless TF32 was asked for: [M, 6144] x [6144, 256] takes
7.5 us for a row, 17 to 22 for 4 to 16, 63 for 32 to 64 and 111 for 1,024 on GB200 (vllm-project/vllm#47973)."""

PAGED_READ, PAGED_LAUNCH_S, PAGED_ERROR = 10.6e9, 1.5e-5, 0.25
"""Decode's attention on AMD: bytes of cache that a processor reads a second in AITER's kernel, and the least time of it
and its reduction. 64 query heads of 128 over 8 in a BF16 cache take 23 us for a sequence of 1,024 tokens, 31 for 8, 99
for 64 and 325 for 256 of them, and 111, 816 and 3,190 us for 8, 64 and 256 of 8,192 on MI355X
(facebookexperimental/triton#2040, beside a kernel of its own): 2.7 TB/s where there is work for all. A newer one, in
Gluon, is compared in #2281 there with 4.0 TB/s for 8 of 8,192; which release of an engine runs it is not known here."""
MLA_DECODE = {  # architecture, cache: shares of the peak and of the memory's speed, least seconds
    ("cdna 4", "bf16"): (0.35, 0.74, 1.8e-5), ("cdna 4", "fp8"): (0.23, 0.64, 1.8e-5),
    ("cdna 3", "bf16"): (0.28, 0.58, 1.8e-5), ("cdna 3", "fp8"): (0.145, 0.45, 1.8e-5),
}  # fmt: skip
"""Latent attention of decode in AITER's assembly. MI355X, 32 heads: 16, 64 and 128 sequences of 4,096 take 35, 76 and
131 us in BF16, 27, 49 and 78 in FP8, 128 of 131,072 3,246 in BF16 (ROCm/aiter#5456); 128 heads in FP8: 64, 128 and
256 of 23,333 take 404, 724 and 1,422 (ROCm/aiter#3072); how quick products of BF16 are is assumed. CDNA 3, FP8: 64
heads reach 367 TFLOP/s on MI300X for 128 of 32,768 (ROCm/aiter#3188), 16 heads take 67 us for 64 requests of 1,024
tokens in and out on MI325X (SemiAnalysisAI/InferenceX#863); in BF16 as many tokens a second are assumed."""

PAGED = (("attention_decode", "bf16"), ("attention_decode", "fp8"))


def reported_constants(
    device: DeviceProfile, family: str, dtype: str, engine: str, kernel: str, *, peak_flops: float
) -> tuple[KernelConstants, Evidence] | None:
    """Constants of a kernel that is known by reports alone; None of any other. ``kernel``: one of
    :class:`~tensorcast.profiles.kernels.GemmRule`; ``peak_flops`` of the arithmetic that ``dtype`` runs in."""
    made = partial(KernelConstants, family=family, dtype=dtype, engine=engine)
    if kernel == "one_tile":
        return made(
            compute_efficiency=1.0, memory_efficiency=0.8, launch_s=ONE_TILE_LAUNCH_S, step_s=ONE_TILE_STEP_S,
            smoothing=4.0, median_error=ONE_TILE_ERROR,
        ), "calibrated"  # fmt: skip
    if kernel == "routed_tiles":
        return made(
            compute_efficiency=ROUTED_COMPUTE, memory_efficiency=ROUTED_MEMORY, launch_s=ROUTED_LAUNCH_S,
            step_s=ROUTED_STEP_S, median_error=DATASHEET_ERROR,
        ), "datasheet"  # fmt: skip
    if kernel == "fp32":
        return made(
            compute_efficiency=0.6, memory_efficiency=0.8, launch_s=FP32_LAUNCH_S, step_s=FP32_STEP_S, smoothing=4.0,
            median_error=FP32_ERROR,
        ), "calibrated"  # fmt: skip
    known = device.calibration.kernels if device.calibration else ()
    if any((c.family, c.dtype) == (family, dtype) for c in known):  # its own were timed
        return None
    if family == "mla_decode" and (found := MLA_DECODE.get((device.architecture.lower(), dtype))) is not None:
        compute, memory, launch_s = found
        return made(
            compute_efficiency=compute, memory_efficiency=memory, launch_s=launch_s, smoothing=4.0,
            median_error=PAGED_ERROR,
        ), "datasheet"  # fmt: skip
    if device.vendor != "AMD" or (family, dtype) not in (("grouped_gemm", "w4a16"), *PAGED):
        return None
    if family == "attention_decode":
        return made(
            compute_efficiency=0.6,
            memory_efficiency=min(1.0, PAGED_READ * device.processors / float(device.memory_bandwidth_bytes_per_s)),
            launch_s=PAGED_LAUNCH_S, median_error=PAGED_ERROR,
        ), "datasheet"  # fmt: skip
    read = TRITON_INT4.get(engine, TRITON_INT4["vllm"]) * device.processors
    return made(
        compute_efficiency=min(1.0, TRITON_INT4_FLOPS * device.processors / peak_flops),
        memory_efficiency=min(1.0, read / float(device.memory_bandwidth_bytes_per_s)),
        launch_s=TRITON_INT4_LAUNCH_S, median_error=DATASHEET_ERROR,
    ), "datasheet"  # fmt: skip
