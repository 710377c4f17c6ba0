"""Formats of floating-point numbers: fp8 releases, MXFP4 experts of gpt-oss, and AMD's Quark."""

from __future__ import annotations

from typing import Any

from tensorcast.modeling.checkpoint import modelopt
from tensorcast.modeling.checkpoint.entries import Entries, four_by_eight, integers, is_fp8_cache, refuse
from tensorcast.modeling.module_rules import Rule, Rules, exclusions, glob
from tensorcast.modeling.quantization import BF16, SCHEMES, Quantization

EXPERT_DTYPES = {"fp4": "mxfp4", "mxfp4": "mxfp4", "nvfp4": "nvfp4"}
"""``expert_dtype`` of a config (DeepSeek-V4) and our scheme; ``fp8`` is that of the rest."""


def fp8(said: Entries, kv: str, expert_dtype: str = "") -> Quantization:
    """8-bit floats for all but the listed modules; experts may have an algorithm of their own.

    Source: vLLM 0.24.0, quantization/fp8.py and fbgemm_fp8.py (from_config: ``ignored_layers``, else
    ``modules_to_not_convert``; ``store_dtype``).
    """
    said.known("activation_scheme", "fmt", "scale_fmt", "activation_scale_ub", "producer", "dequantize")
    block = said.get("weight_block_size")
    base = SCHEMES["fp8_block" if block else "fp8"]
    if block and list(block) != [128, 128]:
        refuse(f"weight_block_size={block}", ("[128, 128]",))
    experts = str(said.get("store_dtype", default=expert_dtype)).lower()
    own = SCHEMES[EXPERT_DTYPES[experts]] if experts in EXPERT_DTYPES else base
    group = said.number("group_size", default=16)
    if algo := said.get("moe_quant_algo"):
        own = SCHEMES[modelopt.algorithm(str(algo), group)]
        said.known("quant_algo", "config_groups")  # of the experts, as their own key says
    rules = (*modelopt.layers(said, group), *exclusions(said.listed("ignored_layers", "modules_to_not_convert")))
    kv = "fp8" if is_fp8_cache(said.get("kv_cache_quant_algo")) else kv
    return Quantization(base, own, kv=kv, rules=Rules(rules))


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
    own = said.within("layer_quant_config")
    cached = Entries(said.within("export"), "quantization_config: export").listed("kv_cache_group")
    cache = said.within("kv_cache_quant_config")
    rules = exclusions(said.listed("exclude"))
    for pattern, values in own.items():
        if isinstance(values, dict) and pattern not in cached:
            rules.append(Rule(glob(pattern), "match", _quark_scheme(values)))
    by_type = said.within("layer_type_quant_config")
    every = by_type.get("Linear") or by_type.get("nn.Linear") or said.get("global_quant_config", default={})
    scheme = SCHEMES[_quark_scheme(every)]
    kept = [spec.get("output_tensors") or {} for name, spec in (*own.items(), *cache.items()) if isinstance(spec, dict)]
    narrow = [spec for spec in kept if isinstance(spec, dict) and str(spec.get("dtype", "")).startswith("fp8")]
    kv = "fp8" if (cached or cache) and (narrow or not any(kept)) else kv
    return Quantization(scheme, scheme, kv=kv, rules=Rules(tuple(rules)))


def _quark_scheme(spec: dict[str, Any]) -> str:
    weight, inputs = spec.get("weight"), spec.get("input_tensors")
    parts = [part for part in (weight if isinstance(weight, list) else [weight]) if isinstance(part, dict)]
    acts = [part for part in (inputs if isinstance(inputs, list) else [inputs]) if isinstance(part, dict)]
    if not parts:
        return "bf16"
    last, act = parts[-1], str(acts[0].get("dtype", "")) if acts else ""
    dtype, group = str(last.get("dtype", "")), int(last.get("group_size") or 0)
    if len(parts) == 2 and parts[0].get("dtype") == "fp4":  # its scales' own scale is the second part
        dtype, group = "fp4", int(parts[0].get("group_size") or 0)
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


def _eight(dtype: str) -> str:
    return "fp8" if dtype.startswith("fp8") else "int8"
