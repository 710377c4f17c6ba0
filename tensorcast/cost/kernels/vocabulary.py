"""The vocabulary of kernel shapes: families, their sizes, the tables' names and dtypes, bytes per element."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tensorcast.cost.work import Array, Precision

Columns = dict[str, Array]
"""Sizes by name, one float per call."""

UNRELATED: Array = np.sqrt([2.0, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53]) % 1.0 + 0.5
"""Weights that no whole numbers relate (roots of primes), so that combinations of sizes have sums of their own."""

SIZES = {
    "gemm": ("m", "n", "k", "batch"),
    "grouped_gemm": (
        "tokens", "hidden", "inter", "topk", "experts", "slots", "moe_tp", "moe_ep", "gated", "skew",
    ),
    "attention_prefill": ("batch", "new", "past", "q_heads", "kv_heads", "head_dim", "window", "kv_bytes"),
    "attention_decode": ("batch", "new", "past", "q_heads", "kv_heads", "head_dim", "window", "kv_bytes"),
    "mla_prefill": ("batch", "new", "past", "q_heads", "kv_bytes"),
    "mla_decode": ("batch", "new", "past", "q_heads", "kv_bytes"),
    "mla_prefill_module": ("batch", "new", "past", "q_heads", "kv_bytes"),
    "mla_decode_module": ("batch", "new", "past", "q_heads", "kv_bytes"),
    "linear_prefill": ("batch", "new", "heads", "key_heads", "head_dim", "state_bytes"),
    "linear_decode": ("batch", "new", "heads", "key_heads", "head_dim", "state_bytes"),
    "conv_prefill": ("batch", "new", "channels", "width"),
    "conv_decode": ("batch", "new", "channels", "width"),
    "quantize": ("m", "k"),
    "all_reduce": ("ranks", "payload_bytes"),
    "all_gather": ("ranks", "payload_bytes"),
    "reduce_scatter": ("ranks", "payload_bytes"),
    "all_to_all": ("ranks", "payload_bytes"),
    "moe_exchange": ("tokens", "hidden", "topk", "experts", "ranks", "nodes", "sms", "copy_bytes"),
}
"""The sizes that say how large the work of one call is, per family. ``skew``: 0 balanced routing, -1 uniform, else the
exponent of a power law."""

ALIASES = {
    "moe": "grouped_gemm", "experts": "grouped_gemm", "wideep_moe": "grouped_gemm",
    "wideep_context_moe": "grouped_gemm", "wideep_generation_moe": "grouped_gemm", "moe_context": "grouped_gemm",
    "moe_generation": "grouped_gemm", "wideep_moe_eplb": "grouped_gemm",
    "context_attention": "attention_prefill", "generation_attention": "attention_decode",
    "context_mla": "mla_prefill", "generation_mla": "mla_decode", "mla_context": "mla_prefill",
    "mla_generation": "mla_decode", "mla_context_module": "mla_prefill_module",
    "mla_generation_module": "mla_decode_module", "wideep_context_mla": "mla_prefill_module",
    "wideep_generation_mla": "mla_decode_module", "mla_bmm": "gemm", "bmm": "gemm", "mla_gen_pre": "gemm",
    "mla_gen_post": "gemm", "scale_matrix": "quantize", "custom_allreduce": "all_reduce", "allreduce": "all_reduce",
    "alltoall": "all_to_all", "deepep_ll": "moe_exchange", "deepep_normal": "moe_exchange",
    "wideep_deepep_ll": "moe_exchange", "wideep_deepep_normal": "moe_exchange", "moe_a2a": "moe_exchange",
    "trtllm_alltoall": "moe_exchange",
}
"""The tables' names of the families; ``nccl`` says which collective in ``op_name``."""

DTYPE = {
    "bfloat16": "bf16", "float16": "bf16", "half": "bf16", "fp16": "bf16", "sq": "int8", "int8_wo": "w8a16",
    "int4_wo": "w4a16", "w4a16_mxfp4": "mxfp4", "w4a8_mxfp4_mxfp8": "w4a8", "fp4": "nvfp4", "default": "bf16",
}
"""Names of the tables in our words; ``sq`` is SmoothQuant W8A8, ``_wo`` weight-only."""

PRECISION = {
    "bf16": Precision(),
    "fp8": Precision("fp8", "fp8", 1.0, 1.0),
    "fp8_block": Precision("fp8_block", "fp8", 1.0 + 4 / 128**2, 1.0 + 4 / 128),
    "int8": Precision("int8", "int8", 1.0, 1.0),
    "nvfp4": Precision("nvfp4", "fp4", 0.5 + 1 / 16, 0.5 + 1 / 16),
    "w8a16": Precision("w8a16", "bf16", 1.0, 2.0),
    "w4a16": Precision("w4a16", "bf16", 0.5 + 2 / 128, 2.0),
    "w4a16_nvfp4": Precision("w4a16_nvfp4", "bf16", 0.5 + 1 / 16, 2.0),
    "mxfp4": Precision("mxfp4", "bf16", 0.5 + 1 / 32, 2.0),
    "w4a8": Precision("w4a8", "fp8", 0.5 + 1 / 32, 1.0 + 1 / 32),
    "w4a4": Precision("w4a4", "fp4", 0.5 + 1 / 32, 0.5 + 1 / 32),
}
"""Bytes per element with scales: 128 x 128 blocks (fp8_block), 16 (nvfp4), 32 (mx), 128 (int4, usual group size)."""

ALIKE = 0.07
"""Relative difference of stored bytes up to which two dtypes are stored alike."""


def alike(one: str, other: str) -> bool:
    """Whether two dtypes compute in the same arithmetic and store about as many bytes: FP8 with and without blocks."""
    mine, its = PRECISION.get(one), PRECISION.get(other)
    return mine is not None and its is not None and mine.compute == its.compute and all(
        abs(getattr(mine, name) / getattr(its, name) - 1.0) < ALIKE for name in ("weight_bytes", "activation_bytes")
    )


SOURCES = ("marlin", "modular", "trtllm_moe", "_trtllm_", "triton", "cutlass", "nongated", "deepgemm", "min_latency")
"""Libraries whose grouped GEMM an engine may run, as the tables' ``kernel_source`` names them (``min_latency``:
TensorRT-LLM's generated kernels for Blackwell)."""


def source_of(kernel: str) -> float:
    """Which of :data:`SOURCES` a table's ``kernel_source`` names, counted from one; 0 where it names none."""
    return next((float(i) for i, name in enumerate(SOURCES, 1) if name in kernel), 0.0)


NON_GATED = [(1024, 2688, 22, 512), (2048, 5120, 22, 512), (8192, 5120, 22, 512), (2688, 1856, 6, 128),
             (4096, 2688, 22, 512)]
"""(hidden, inter, top-k, experts) of Nemotron models, whose experts have no gate; one engine's tables say so."""

NOPE, LATENT, V_DIM = 128, 512, 128
"""Head sizes of MLA in the tables (DeepSeek-V3)."""


COPY_BYTES = {"bf16": 2.0, "fp8": 1.0 + 4 / 128, "fp8_block": 1.0 + 4 / 128, "nvfp4": 0.5 + 1 / 16}
"""Bytes per element that an exchange sends, scales included."""


CODE = UNRELATED[:8]
"""Weights that give every combination of sizes a number of its own."""


class Lookup:
    """The last column of a ``table`` by the sizes in the others; of two rows with the same the first."""

    def __init__(self, table: Array) -> None:
        self.table = table
        codes = table[:, :-1] @ CODE[: table.shape[1] - 1]
        order = np.argsort(codes, kind="stable")
        self._codes, self._found = codes[order], table[order, -1]

    def at(self, sizes: Sequence[Array]) -> Array:
        """Of each call; NaN where no row is of its ``sizes``."""
        mine = sum((w * size for w, size in zip(CODE, sizes, strict=False)), np.zeros(1))
        place = np.minimum(np.searchsorted(self._codes, mine - 1e-7), len(self._codes) - 1)
        return np.where(np.abs(self._codes[place] - mine) < 1e-6, self._found[place], np.nan)
