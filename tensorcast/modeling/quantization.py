"""Which arithmetic and which bytes per weight each matmul has: read from a Hugging Face config, or set by the user."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, replace
from typing import Any

from tensorcast.errors import InputError, unknown_name
from tensorcast.profiles.model import ModelProfile


@dataclass(frozen=True)
class Scheme:
    """Bytes per element of a quantised matmul's operands, scales included.

    Sources: FP8 128x128 blocks with fp32 scales and 1x128 activation groups, DeepSeek-V3 (arXiv 2412.19437) section
    3.3; MXFP4 and MXFP8 blocks of 32 with one 8-bit exponent, OCP Microscaling Formats v1.0; NVFP4 blocks of 16 with an
    fp8 scale, NVIDIA Blackwell documentation; W4A16 groups of 128 with an fp16 scale and zero point, AWQ (2306.00978),
    ``_g32`` groups of 32 with a scale only (compressed-tensors checkpoints such as Kimi-K2-Thinking).
    """

    name: str
    weight_bytes: float
    activation_bytes: float = 2.0

    @property
    def kernel(self) -> str:
        """The kernels' name for it: group sizes differ in bytes, not in arithmetic."""
        return self.name.partition("_g")[0]

    @property
    def quantizes_activation(self) -> bool:
        return self.activation_bytes < 2.0


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("bf16", 2.0),
        Scheme("fp8", 1.0, 1.0),
        Scheme("fp8_block", 1.0 + 4 / 128**2, 1.0 + 4 / 128),
        Scheme("int8", 1.0, 1.0),
        Scheme("w4a16", 0.5 + 2 / 128 + 0.5 / 128),
        Scheme("w4a16_g32", 0.5 + 2 / 32),
        Scheme("mxfp4", 0.5 + 1 / 32),
        Scheme("nvfp4", 0.5 + 1 / 16, 0.5 + 1 / 16),
    )
}
KV_DTYPES = ("bf16", "fp8")


@dataclass(frozen=True)
class Quantization:
    """Scheme of linears and of routed experts, module patterns that stay bf16, and the KV cache's dtype."""

    linear: Scheme = SCHEMES["bf16"]
    experts: Scheme = SCHEMES["bf16"]
    ignore: tuple[str, ...] = ()
    kv: str = "bf16"

    def scheme(self, weight: str, role: str) -> Scheme:
        """Scheme of one weight by its full name and role; embeddings, routers and norms are never quantised."""
        if role not in ("linear", "experts"):
            return SCHEMES["bf16"]
        if any(_matches(pattern, weight) for pattern in self.ignore):
            return SCHEMES["bf16"]
        return self.experts if role == "experts" else self.linear

    def describe(self) -> str:
        return f"linear={self.linear.name},experts={self.experts.name},kv={self.kv}"


def _matches(pattern: str, weight: str) -> bool:
    """A pattern names a module: exactly, as a parent, as a glob, as ``re:...``, or by its last part."""
    module = re.sub(r"\.(weight|bias)$", "", weight)
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    pattern = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", pattern)
    parents = (pattern, pattern + ".*", "*." + pattern, "*." + pattern + ".*")
    return any(fnmatch.fnmatchcase(module, p) for p in parents)


def from_config(config: dict[str, Any], kv: str = "bf16") -> Quantization:
    """What ``quantization_config`` of a Hugging Face config says. Raises :class:`InputError` on an unknown method."""
    text = config.get("text_config") or {}
    said = config.get("quantization_config") or text.get("quantization_config")
    if not said:
        return Quantization(kv=kv)
    if not isinstance(said, dict):
        raise InputError(f"quantization_config {said!r}: must be an object with quant_method")
    method = str(said.get("quant_method", said.get("quant_algo", ""))).lower()
    ignore = tuple(
        said.get("modules_to_not_convert")
        or said.get("ignore")
        or said.get("exclude_modules")
        or said.get("ignored_layers")
        or ()
    )
    name = _scheme_name(method, said)
    scheme = SCHEMES[name]
    if name == "mxfp4" and method == "mxfp4":  # gpt-oss: the format is defined for its experts only
        return Quantization(SCHEMES["bf16"], scheme, ignore, kv)
    experts = {"fp4": "mxfp4", "fp8": name}.get(str(config.get("expert_dtype", "")), name)
    return Quantization(scheme, SCHEMES[experts], ignore, kv)


def checkpoint(model: ModelProfile) -> Quantization:
    """How a model is stored as shipped: in the schemes that its profile says, else as its config does."""
    try:
        found = from_config(model.config, model.kv_dtype)
    except InputError:
        if not model.quantization:
            raise
        found = Quantization(kv=model.kv_dtype)
    return override(found, model.quantization)


def _scheme_name(method: str, said: dict[str, Any]) -> str:
    bits = said.get("bits", said.get("w_bit"))
    if method == "fp8" or method == "fbgemm_fp8":
        return "fp8_block" if said.get("weight_block_size") else "fp8"
    if method in ("awq", "gptq", "auto-round") and bits in (4, None):
        return "w4a16"
    if method == "mxfp4":
        return "mxfp4"
    if method == "modelopt":
        algo = str(said.get("quant_algo", "")).upper()
        if algo in ("FP8", "NVFP4"):
            return algo.lower()
    if method == "compressed-tensors":
        for group in (said.get("config_groups") or {}).values():
            return _compressed(group)
    raise InputError(
        f"quantization_config: quant_method={method!r} (bits={bits}) is not known; "
        f"set --quant to one of {', '.join(SCHEMES)}"
    )


def _compressed(group: dict[str, Any]) -> str:
    weights = group.get("weights") or {}
    kind, bits = weights.get("type"), weights.get("num_bits")
    if kind == "float" and bits == 8:
        return "fp8_block" if weights.get("strategy") == "block" else "fp8"
    if kind == "float" and bits == 4:
        return "nvfp4" if weights.get("group_size") == 16 else "mxfp4"
    if kind == "int" and bits == 8 and group.get("input_activations"):
        return "int8"
    if kind == "int" and bits == 4:
        return "w4a16_g32" if weights.get("group_size") == 32 else "w4a16"
    raise InputError(f"quantization_config: weights of type={kind!r}, num_bits={bits!r} are not known")


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
            raise unknown_name("quantization scheme", value, SCHEMES)
        if key not in ("", "linear", "experts"):
            raise InputError(f"--quant {item!r}: the part before '=' must be linear, experts or kv")
        scheme = SCHEMES[value]
        base = replace(
            base,
            linear=scheme if key in ("", "linear") else base.linear,
            experts=scheme if key in ("", "experts") else base.experts,
        )
    return base


HIDDEN_MULTIPLES = {"mxfp4": 256}
"""Multiple of the hidden size by quantisation scheme. vLLM (``mxfp4_round_up_hidden_size_and_intermediate_size``) pads
to 256 for its Marlin and FlashInfer TRT-LLM kernels; FlashInfer's CUTLASS kernels need 128 only."""


def rounded_hidden(hidden: int, scheme: str, multiple: int = 0) -> int:
    """Hidden size that the experts' weights, their rows and the exchange have: 2880 in MXFP4 becomes 3072.

    ``multiple``: of the kernel at hand (0: as :data:`HIDDEN_MULTIPLES` says, 1 for schemes that it does not name).
    """
    multiple = multiple or HIDDEN_MULTIPLES.get(scheme, 1)
    return -(-hidden // multiple) * multiple
