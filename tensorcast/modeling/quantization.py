"""Which arithmetic and which bytes per weight each matmul has: as its checkpoint stores it, or as the user sets it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from tensorcast.errors import InputError, unknown_name
from tensorcast.modeling.module_rules import NO_RULES, Rules, exclusions, module_names


@dataclass(frozen=True)
class Scheme:
    """Bytes per element of a quantised matmul's operands, scales included.

    ``kernel``: the kernels' name for it; group sizes differ in bytes, not in arithmetic. ``lacking``: the scheme that
    runs instead where the device has no ``arithmetic`` of that name (weights are unpacked to bf16). ``block``: outputs
    and inputs of a weight that share a scale, and so stay together when it is cut.
    """

    name: str
    weight_bytes: float
    activation_bytes: float = 2.0
    kernel: str = ""
    arithmetic: str = "bf16"
    lacking: str = ""
    block: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if not self.kernel:
            object.__setattr__(self, "kernel", self.name)

    @property
    def quantizes_activation(self) -> bool:
        return self.activation_bytes < 2.0

    @property
    def group(self) -> int:
        """Weights of a row that share a scale; 0 where a row or a tensor does."""
        return self.block[1] if self.block[1] > 1 else {"mxfp4": 32}.get(self.name, 0)


GROUPS = (16, 32, 64, 128, 256)
"""Weights that share a scale, in formats that let the author choose."""

SCALE, BLOCKS = 2.0, 4 / 128**2
"""Bytes of a group's fp16 scale; of an fp32 scale, per element of a 128 x 128 block."""


def weight_only(bits: int, group: int, beside: str = "") -> Scheme:
    """Integers of ``bits`` with one scale per ``group`` of a row (0: per row), multiplied in bf16.

    ``beside``: ``zp`` for a zero point of as many bits per group (GPTQ, AWQ), ``bias`` for one of 16 bits (MLX).
    """
    name = f"w{bits}a16" + (f"_g{group}" if group else "_channel") + (f"_{beside}" if beside else "")
    extra = {"": 0.0, "zp": bits / 8, "bias": 2.0}[beside]
    size = bits / 8 + ((SCALE + extra) / group if group else 0.0)
    return Scheme(name, size, kernel="w4a16" if bits <= 4 else "w8a16", block=(1, max(group, 1)))


_PLAIN = (
    Scheme("bf16", 2.0),
    Scheme("fp8", 1.0, 1.0, arithmetic="fp8", lacking="w8a16_fp8"),
    Scheme(
        "fp8_block", 1.0 + BLOCKS, 1.0 + 4 / 128, arithmetic="fp8", lacking="w8a16_fp8_block", block=(128, 128)
    ),
    Scheme("int8", 1.0, 1.0, arithmetic="int8"),
    Scheme("w4a16", 0.5 + SCALE / 128 + 0.5 / 128, block=(1, 128)),
    Scheme("w4a16_g32", 0.5 + SCALE / 32, kernel="w4a16", block=(1, 32)),
    Scheme("mxfp4", 0.5 + 1 / 32),
    Scheme("nvfp4", 0.5 + 1 / 16, 0.5 + 1 / 16, arithmetic="fp4", lacking="w4a16_nvfp4", block=(1, 16)),
    Scheme("w4a16_nvfp4", 0.5 + 1 / 16, block=(1, 16)),
    Scheme("w8a16", 1.0 + SCALE / 128, block=(1, 128)),
    Scheme("w4a8", 0.5 + SCALE / 128, 1.0, arithmetic="fp8", lacking="w4a16", block=(1, 128)),
    Scheme(
        "mxfp8", 1.0 + 1 / 32, 1.0 + 1 / 32, kernel="fp8", arithmetic="fp4", lacking="w8a16_mxfp8", block=(1, 32)
    ),
)

CHOICES = tuple(scheme.name for scheme in _PLAIN)
"""Schemes by the names that messages list; group sizes and zero points make more."""

SCHEMES = {
    scheme.name: scheme
    for scheme in (
        *(weight_only(bits, group, beside) for bits in (2, 3, 4, 5, 6, 8) for group in (0, *GROUPS)
          for beside in ("", "zp", "bias") if group or not beside),
        *_PLAIN,
        *(Scheme(f"w4a8_g{group}", 0.5 + SCALE / group, 1.0, "w4a8", "fp8", f"w4a16_g{group}", (1, group))
          for group in GROUPS),
        Scheme("w4a8_channel", 0.5, 1.0, "w4a8", "fp8", "w4a16_channel"),
        Scheme("w4a8_int8", 0.5 + SCALE / 128, 1.0, "int8", "int8", "w4a16", (1, 128)),
        Scheme("int8_block", 1.0 + BLOCKS, 1.0 + 4 / 128, "int8", "int8", block=(128, 128)),
        Scheme("w8a16_fp8", 1.0, kernel="w8a16"),
        Scheme("w8a16_fp8_block", 1.0 + BLOCKS, kernel="w8a16", block=(128, 128)),
        Scheme("w8a16_mxfp8", 1.0 + 1 / 32, kernel="w8a16", block=(1, 32)),
        Scheme("w4a16_nf4", 0.5 + 4 / 64, kernel="w4a16"),
        Scheme("w4a16_nf4_double", 0.5 + 1 / 64 + 4 / (64 * 256), kernel="w4a16"),
    )
}
"""By name. Sources: FP8 128x128 blocks with fp32 scales and 1x128 activation groups, DeepSeek-V3 (arXiv 2412.19437)
section 3.3; MXFP4 and MXFP8 blocks of 32 with one 8-bit exponent, OCP Microscaling Formats v1.0; NVFP4 blocks of 16
with an fp8 scale, NVIDIA Blackwell documentation; W4A16 groups of 128 with an fp16 scale and zero point, AWQ
(2306.00978), ``_g32`` groups of 32 with a scale only (compressed-tensors checkpoints such as Kimi-K2-Thinking); NF4
blocks of 64 with an fp32 scale, or an 8-bit one and fp32 per 256 of these, QLoRA (2305.14314) section 3. What takes
the place of NVFP4, MXFP8 and FP8 on devices without: vLLM 0.24.0, model_executor/layers/quantization/utils/
marlin_utils_fp4.py and marlin_utils_fp8.py (weight-only Marlin kernels)."""

BF16 = SCHEMES["bf16"]
KV_DTYPES = ("bf16", "fp8")
ROLES = ("linear", "experts", "lm_head", "embedding")


@dataclass(frozen=True)
class Quantization:
    """The scheme of every weight, and the KV cache's dtype.

    ``rules`` name modules, those of ``ignore`` first, which stay bf16; where none speaks a weight has the scheme of its
    role. ``asked``: roles whose scheme the user set; there rules only say what is quantised at all. ``unread``: keys of
    the checkpoint's entry that nothing here used. ``scaled_latents``: a sparse latent cache in fp8 holds scales.
    ``method``: the entry's ``quant_method``.
    ``by_weight``: names of schemes by weight, instead of rules (:meth:`of_weights`).
    """

    linear: Scheme = BF16
    experts: Scheme = BF16
    ignore: tuple[str, ...] = ()
    kv: str = "bf16"
    rules: Rules = NO_RULES
    lm_head: Scheme = BF16
    embedding: Scheme = BF16
    asked: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    scaled_latents: bool = False
    method: str = ""
    by_weight: Mapping[str, str] = field(default_factory=dict, hash=False)

    @cached_property
    def _every_rule(self) -> Rules:
        return Rules((*exclusions(self.ignore), *self.rules.entries)) if self.ignore else self.rules

    @cached_property
    def in_blocks(self) -> bool:
        """Whether several elements of any weight share a scale."""
        named = (SCHEMES[rule.scheme] for rule in self.rules.entries)
        return any(scheme.block != (1, 1) for scheme in (self.linear, self.experts, *named))

    @property
    def by_name(self) -> bool:
        """Whether layers of one structure may differ."""
        return bool(self._every_rule.entries)

    def scheme(self, weight: str, role: str, stored: tuple[str, ...] = ()) -> Scheme:
        """Scheme of one weight by its full name and role; routers and norms are never quantised.

        ``stored``: the modules that hold it in a checkpoint, where they have other names.
        """
        if role not in ROLES:
            return BF16
        if weight in self.by_weight:
            return SCHEMES[self.by_weight[weight]]
        named = self._every_rule.find(module_names(weight, role, stored), role) if self.by_name else None
        if named is None or (role in self.asked and named != "bf16"):
            return {"linear": self.linear, "experts": self.experts, "lm_head": self.lm_head}.get(role, self.embedding)
        return SCHEMES[named]

    def of_weights(self, weights: Iterable[tuple[str, str, tuple[str, ...]]]) -> Quantization:
        """The same of these weights (name, role and stored names of each), without rules."""
        schemes = {name: self.scheme(name, role, stored).name for name, role, stored in weights if role in ROLES}
        return replace(self, ignore=(), rules=NO_RULES, by_weight=schemes)

    def describe(self) -> str:
        return f"linear={self.linear.name},experts={self.experts.name},kv={self.kv}"


def override(base: Quantization, text: str | None) -> Quantization:
    """``base`` changed by ``fp8_block`` or ``linear=bf16,experts=mxfp4,kv=fp8``. Raises :class:`InputError`."""
    if not text:
        return base
    for item in text.split(","):
        key, _, value = item.rpartition("=")
        if key == "kv":
            if value not in KV_DTYPES:
                raise InputError(f"--quant kv={value!r}: choose one of {', '.join(KV_DTYPES)}")
            base = replace(base, kv=value)
            continue
        if value not in SCHEMES:
            raise unknown_name("quantization scheme", value, CHOICES)
        if key not in ("", "linear", "experts"):
            raise InputError(f"--quant {item!r}: the part before '=' must be linear, experts or kv")
        scheme, roles = SCHEMES[value], (key,) if key else ("linear", "experts")
        base = replace(
            base,
            linear=scheme if "linear" in roles else base.linear,
            experts=scheme if "experts" in roles else base.experts,
            asked=(*base.asked, *roles),
        )
    return base


def as_run(stored: Quantization, arithmetic: Container[str], architecture: str) -> Quantization:
    """How a device with the ``arithmetic`` of its profile runs a checkpoint: what it lacks is unpacked to bf16."""
    linear, experts, lm_head = (_run(one, arithmetic) for one in (stored.linear, stored.experts, stored.lm_head))
    rules = stored.rules.with_schemes({name: _run(scheme, arithmetic).name for name, scheme in SCHEMES.items()})
    return replace(
        stored, linear=linear, experts=experts, lm_head=lm_head, rules=rules,
        scaled_latents=scales_latents(architecture),
    )


def _run(scheme: Scheme, arithmetic: Container[str]) -> Scheme:
    return SCHEMES[scheme.lacking] if scheme.lacking and scheme.arithmetic not in arithmetic else scheme


def runs_as(stored: Quantization, arithmetic: Container[str]) -> tuple[str, ...]:
    """What the schemes of weights that are known one by one (:meth:`Quantization.of_weights`) run as, in the order of
    the schemes' names."""
    return tuple([_run(SCHEMES[name], arithmetic).name for name in sorted({*stored.by_weight.values()})])


def scales_latents(architecture: str) -> bool:
    """Whether a sparse latent cache in fp8 holds scales.

    On Hopper only: vLLM 0.24.0 chooses fp8_ds_mla for FlashMLA's sparse kernels
    (model_executor/layers/attention/mla_attention.py), all other latent caches in fp8 are plain.
    """
    return architecture == "Hopper"


def weight_only_here(stored: Quantization, arithmetic: Container[str]) -> str:
    """Schemes of a checkpoint that run in bf16 on a device with this ``arithmetic``; empty if none."""
    rules = (rule.scheme for rule in stored.rules.entries)
    names = {stored.linear.name, stored.experts.name, *rules, *stored.by_weight.values()}
    found = (SCHEMES[name] for name in sorted(names))
    return ", ".join(one.name for one in found if one.lacking and one.arithmetic not in arithmetic)


def mxfp4_padding(architecture: str) -> tuple[int, int]:
    """Multiples that engines pad the hidden size and a rank's width of MXFP4 experts to, by device architecture.

    Source: vLLM 0.24.0, fused_moe/oracle/mxfp4.py (mxfp4_round_up_hidden_size_and_intermediate_size): 256 and 256 for
    TensorRT-LLM's kernels (Blackwell) and on ROCm, 256 and 128 for Marlin, a width of 64 for Triton (Hopper), where
    64.4 GiB of gpt-oss-120b (https://github.com/vllm-project/vllm/issues/33155) show a hidden size padded to 256.
    """
    hidden = HIDDEN_MULTIPLES["mxfp4"]
    if architecture == "Blackwell" or architecture.startswith("CDNA"):
        return hidden, 256
    return hidden, 64 if architecture == "Hopper" else 128


def padded(size: Any, multiple: int) -> Any:
    """By how much a size (above zero, or an array of such) grows when it is padded to a multiple."""
    return -(-size // multiple) * multiple / size


HIDDEN_MULTIPLES = {"mxfp4": 256}
"""Multiple of the hidden size by quantisation scheme. vLLM (``mxfp4_round_up_hidden_size_and_intermediate_size``) pads
to 256 for its Marlin and FlashInfer TRT-LLM kernels; FlashInfer's CUTLASS kernels need 128 only."""


def rounded_hidden(hidden: int, scheme: str, multiple: int = 0) -> int:
    """Hidden size that the experts' weights, their rows and the exchange have: 2880 in MXFP4 becomes 3072.

    ``multiple``: of the kernel at hand (0: as :data:`HIDDEN_MULTIPLES` says, 1 for schemes that it does not name).
    """
    multiple = multiple or HIDDEN_MULTIPLES.get(scheme, 1)
    return -(-hidden // multiple) * multiple
