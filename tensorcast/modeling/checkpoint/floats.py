"""Formats of floating-point numbers: fp8 releases, MXFP4 experts of gpt-oss, and AMD's Quark."""

from __future__ import annotations

from typing import Any

from tensorcast.modeling.checkpoint import modelopt
from tensorcast.modeling.checkpoint.entries import Entries, four_by_eight, has_fp8_cache, integers, refuse
from tensorcast.modeling.module_rules import Rule, Rules, exclusions, glob
from tensorcast.modeling.quantization import BF16, SCHEMES, Quantization

EXPERT_DTYPES = {"fp4": "mxfp4", "mxfp4": "mxfp4", "nvfp4": "nvfp4"}
"""``expert_dtype`` of a config (DeepSeek-V4) and our scheme; ``fp8`` is that of the rest."""


def _block(said: Entries) -> tuple[Any, list[Any]]:
    """What is said of a block of scales, and its two sides; none of what is no list."""
    block = said.get("weight_block_size")
    return block, list(block) if isinstance(block, list | tuple) else []


def fp8(said: Entries, kv: str, expert_dtype: str = "") -> Quantization:
    """8-bit floats for all but the listed modules; experts may have an algorithm of their own.

    Source: vLLM 0.24.0, quantization/fp8.py and fbgemm_fp8.py (from_config: ``ignored_layers``, else
    ``modules_to_not_convert``; ``store_dtype``).
    """
    said.known("activation_scheme", "fmt", "scale_fmt", "activation_scale_ub", "producer", "dequantize")
    block, sides = _block(said)
    base = SCHEMES["fp8_block" if block else "fp8"]
    if sides == [32, 32] and said.get("scale_fmt") == "ue8m0":
        # a scale serves 32 rows, over which engines spread it as they load (vLLM 0.33.0, deepseek_v41/quant_config.py)
        base = SCHEMES["mxfp8"]
    elif block and sides != [128, 128]:
        refuse(f"weight_block_size={block}", ("[128, 128]", "[32, 32] of scale_fmt ue8m0"))
    experts = str(said.get("store_dtype", "expert_dtype", default=expert_dtype)).lower()
    own = SCHEMES[EXPERT_DTYPES[experts]] if experts in EXPERT_DTYPES else base
    group = said.number("group_size", default=16)
    if algo := said.get("moe_quant_algo"):
        own = SCHEMES[modelopt.algorithm(str(algo), group)]
        said.known("quant_algo", "ignore")  # of the experts' algorithm; what it leaves is in fp8 as the rest
        modelopt.pass_over_groups(said)
    rules = (*modelopt.layers(said, group), *exclusions(said.listed("ignored_layers", "modules_to_not_convert")))
    kv = "fp8" if has_fp8_cache(said) else kv
    return Quantization(base, own, kv=kv, rules=Rules(rules))


WHOLE = {
    "mxfp8": ("mxfp8", "mxfp8"), "w8a8-fp8": ("fp8", "fp8"), "w8a8-int8": ("int8", "int8"),
    "blockwise-int8": ("int8_block", "int8_block"), "w4afp8": ("fp8_block", "w4a8"),
}
"""Schemes of matmuls and of experts by a method that has no other. Sources: vLLM 0.33.0, quantization/modelopt.py
(ModelOptMxFp8Config: MiniMax's mark); SGLang 0.5.23, quantization/w8a8_fp8.py, w8a8_int8.py, blockwise_int8.py and
w4afp8.py (from_config; W4AFp8MoEMethod: groups of 128)."""


def whole(said: Entries, kv: str) -> Quantization:
    """Methods that say all by their name, but for the modules that they leave."""
    said.known("activation_scheme", "linear_activation_scheme", "moe_activation_scheme", "fmt", "scale_fmt")
    method = str(said.get("quant_method")).lower().replace("_", "-")
    (block, sides), group = _block(said), said.number("group_size", default=128)
    if block and sides != ([1, 32] if method == "mxfp8" else [128, 128]):
        refuse(f"weight_block_size={block} of {method}")
    if method == "w4afp8" and group != 128:
        refuse(f"group_size={group} of {method}", ("128",))
    linear, experts = (SCHEMES[name] for name in WHOLE[method])
    rules = exclusions(said.listed("ignored_layers", "modules_to_not_convert"))
    return Quantization(linear, experts, kv="fp8" if has_fp8_cache(said) else kv, rules=Rules(tuple(rules)))


def mxfp4(said: Entries, kv: str) -> Quantization:
    """gpt-oss: the format is defined for its experts only."""
    kept = exclusions(said.listed("modules_to_not_convert"))
    return Quantization(BF16, SCHEMES["mxfp4"], kv=kv, rules=Rules(tuple(kept)))


def quark(said: Entries, kv: str) -> Quantization:
    """Quark: what a layer's own entry says, else what holds for all, but for the excluded.

    Source: vLLM 0.24.0, quantization/quark/quark.py (from_config, _find_matched_config); github.com/ROCm/ATOM,
    atom/quant_spec.py.
    """
    said.known("algo_config", "quant_mode", "softmax_quant_spec", "version", "quant_mode", "log_severity_level")
    export = said.part("export")
    export.known("weight_format", "pack_method", "weight_merge_groups", "min_kv_scale")
    cached, cache = export.listed("kv_cache_group"), said.parts("kv_cache_quant_config")
    rules = exclusions(said.listed("exclude"))
    own = said.parts("layer_quant_config")
    of_layers = {pattern: _quark_scheme(spec) for pattern, spec in own.items()}
    rules += [Rule(glob(pattern), "match", name) for pattern, name in of_layers.items() if pattern not in cached]
    by_type, every = said.parts("layer_type_quant_config"), said.part("global_quant_config")
    schemes = [_quark_scheme(spec) for name, spec in by_type.items() if name in ("Linear", "nn.Linear")]
    scheme = SCHEMES[(*schemes, _quark_scheme(every))[0]]
    kept = [_numbers(spec, "output_tensors") for spec in (*own.values(), *cache.values())]
    narrow = [one for one in kept if any(str(part.get("dtype")).startswith("fp8") for part in one)]
    for spec in cache.values():
        _quark_scheme(spec)
    kv = "fp8" if (cached or cache) and (narrow or not any(kept)) else kv
    return Quantization(scheme, scheme, kv=kv, rules=Rules(tuple(rules)))


def _quark_scheme(spec: Entries) -> str:
    parts, acts = _numbers(spec, "weight"), _numbers(spec, "input_tensors")
    spec.known("target_device")
    if not parts:
        return "bf16"
    last, act = parts[-1], str(acts[0].get("dtype", default="")) if acts else ""
    dtype, group = str(last.get("dtype", default="")), last.number("group_size", default=0)
    scaled_twice = len(parts) == 2 and parts[0].get("dtype") == "fp4"  # its scales' own scale is the second part
    if scaled_twice:
        dtype, group = "fp4", parts[0].number("group_size", default=0)
    if dtype in ("mx", "mxfp4", "fp4") and group in (16, 32):
        return "mxfp4" if group == 32 else "nvfp4" if act else "w4a16_nvfp4"
    if dtype in ("fp8_e4m3", "mxfp8"):
        block = "_block" if group == 128 or "block" in str(last.get("qscheme")) else ""
        wide = "mxfp8" if group == 32 else f"fp8{block}"
        return wide if act else f"w8a16_{wide}"
    if dtype in ("int4", "uint4"):
        return integers(4, group, "zp" if dtype == "uint4" else "") if not act else four_by_eight(group, _eight(act))
    if dtype in ("int8", "uint8"):
        return "int8" if act else integers(8, group)
    refuse(f"dtype={dtype!r} with qscheme={last.get('qscheme')!r} of quark", ("fp4", "fp8_e4m3", "int4", "int8"))


def _numbers(spec: Entries, name: str) -> list[Entries]:
    """What ``weight`` or ``input_tensors`` says of its numbers: one object, or one after another in a list."""
    value = spec.values.get(name)
    found = spec.listed_parts(name) if isinstance(value, list) else [spec.part(name)] if value else []
    for one in found:
        one.known("qscheme", "group_size", "dtype", *ABOUT_QUARK_NUMBERS)
    return found


ABOUT_QUARK_NUMBERS = (
    "ch_axis", "is_dynamic", "observer_cls", "symmetric", "round_method", "scale_type", "scale_format", "block_size",
    "scale_calculation_mode", "mx_element_dtype", "is_scale_quant", "zero_point_type",
)  # fmt: skip


def _eight(dtype: str) -> str:
    return "fp8" if dtype.startswith("fp8") else "int8"
