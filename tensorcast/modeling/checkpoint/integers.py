"""Formats of 2 to 8 bits with groups: GPTQ, AWQ, AutoRound, MLX and bitsandbytes."""

from __future__ import annotations

import re

from tensorcast.modeling.checkpoint.entries import REST, Entries, four_by_eight, integers, refuse
from tensorcast.modeling.module_rules import Rule, Rules, exclusions, part
from tensorcast.modeling.quantization import BF16, SCHEMES, Quantization

HARMLESS = (
    "sym", "desc_act", "damp_percent", "static_groups", "true_sequential", "version", "backend", "checkpoint_format",
    "is_marlin_format", "model_name_or_path", "model_file_base_name", "meta", "pack_dtype", "exllama_config", "dataset",
    "tokenizer", "use_cuda_fp16", "use_exllama", "max_input_length", "cache_block_outputs", "model_seqlen",
    "block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "pad_token_id", "do_fuse",
    "fuse_max_seq_len", "modules_to_fuse", "iters", "nsamples", "seqlen", "lr", "minmax_lr", "low_gpu_mem_usage",
    "enable_quanted_input", "enable_minmax_tuning", "amp", "autoround_version", "packing_format", "quant_block_list",
    "gradient_accumulate_steps", "scale_dtype", "dynamic_act", "supported_types", "to_quant_block_names",
    "batch_size_calib", "format", "act_dynamic", "act_sym", "act_group_size", "act_data_type", "super_bits",
    "super_group_size", "quantizer", "hyb", "lm_head", "zero_point", "static_kv_dtype", "transform_config",
)  # fmt: skip
"""Keys about how weights were found and are packed."""


def gptq(said: Entries, kv: str) -> Quantization:
    """GPTQ: ``dynamic`` patterns in order, ``-:`` leaves a module as it is; else what the lists of modules say.

    Source: vLLM 0.24.0, quantization/utils/gptq_utils.py (get_dynamic_override, is_layer_gptq_quantized); GPTQModel's
    README, section on dynamic quantisation.
    """
    said.known(*(key for key in HARMLESS if key not in ("lm_head", "block_name_to_quantize")))
    bits, group = said.number("bits", "w_bit", default=4), said.number("group_size", default=128)
    rules: list[Rule] = []
    for pattern, own in said.parts("dynamic").items():
        own.known(*HARMLESS)
        scheme = integers(own.number("bits", default=bits), own.number("group_size", default=group), "zp")
        kept = pattern.startswith("-:")
        rules.append(Rule(re.sub(r"^[-+]:", "", pattern), "match", "bf16" if kept else scheme))
    rules += exclusions(said.listed("modules_to_not_convert"))
    base = SCHEMES[integers(bits, group, "zp")]
    if only := said.listed("modules_in_block_to_quantize"):
        rules += [*(Rule(part(name), "search", base.name) for name in only), REST]
    head = base if said.get("lm_head") is True else BF16
    return Quantization(base, base, kv=kv, rules=Rules(tuple(rules)), lm_head=head)


def awq(said: Entries, kv: str) -> Quantization:
    """AWQ: modules whose names hold one of the listed parts stay as they are; experts by the name of all of them, so
    that Mixtral's ``gate`` is the router, and not half of each expert.

    Source: vLLM 0.24.0, quantization/auto_awq.py (from_config; is_layer_skipped with skip_with_substr, of experts for
    their prefix), AutoAWQ 0.2.9, utils/module.py (exclude_layers_to_not_quantize) and models/mixtral.py.
    """
    said.known(*(key for key in HARMLESS if key != "zero_point"))
    bits, group = said.number("bits", "w_bit", default=4), said.number("group_size", "q_group_size", default=128)
    scheme = SCHEMES[integers(bits, group, "zp" if said.get("zero_point", default=True) else "")]
    listed = [re.escape(name) for name in said.listed("modules_to_not_convert")]
    kept = [Rule(name, "search", "bf16", OTHERS) for name in listed]
    kept += [Rule(name + BEFORE_EXPERTS, "search", "bf16", ("experts",)) for name in listed]
    return Quantization(scheme, scheme, kv=kv, rules=Rules(tuple(kept)))


OTHERS = ("linear", "lm_head", "embedding")
"""All roles but that of experts."""

BEFORE_EXPERTS = r"(?=(?:.*\.)?\w*(?<=experts)(?:\.|$))"
"""What follows a part of the name that all experts have together, ``model.layers.3.mlp.experts``."""


SPECIAL = re.compile(r"[*+?^$()\[\]{}|\\]")
"""What makes a name in AutoRound's list a regular expression."""


def auto_round(said: Entries, kv: str) -> Quantization:
    """AutoRound: an entry of ``extra_config`` changes what it names, by name before by expression.

    Source: vLLM 0.24.0, quantization/inc/config_parser.py (INCConfigParser).
    """
    said.known(*(key for key in HARMLESS if key != "block_name_to_quantize"))
    base = _rounded(said)
    named, patterns = list[Rule](), list[Rule]()
    for name, own in said.parts("extra_config", behind=said).items():
        own.known(*HARMLESS)
        rule = Rule(name, "search" if SPECIAL.search(name) else "module", _rounded(own))
        (patterns if rule.how == "search" else named).append(rule)
    rules = [*named, *patterns]
    blocks = [name.strip() for text in said.listed("block_name_to_quantize") for name in text.split(",")]
    if blocks:
        rules += [*(Rule(re.escape(name), "match", base) for name in blocks), REST]
    scheme = SCHEMES[base]
    return Quantization(scheme, scheme, kv=kv, rules=Rules(tuple(rules)))


def _rounded(said: Entries) -> str:
    bits, group = said.number("bits", default=4), said.number("group_size", default=128)
    kind = str(said.get("data_type", default="int"))
    act_bits = said.number("act_bits", default=16)
    if bits >= 16:
        return "bf16"
    if kind.startswith("mx_fp"):
        return "mxfp4" if bits == 4 else "mxfp8" if act_bits == 8 else "w8a16_mxfp8"
    if kind.startswith("nv_fp"):
        return "nvfp4" if act_bits == 4 else "w4a16_nvfp4"
    if kind.startswith("fp") and bits == 8:
        return "fp8" if act_bits == 8 else "w8a16_fp8"
    if kind not in ("int", "int_sym", "int_asym_dq", "int_sym_dq"):
        refuse(f"data_type={kind!r} with bits={bits}", ("int", "mx_fp", "nv_fp", "fp"))
    if act_bits >= 16:
        return integers(bits, group, "zp")
    return "int8" if bits == 8 else four_by_eight(group, "int8")


def mlx(said: Entries, kv: str) -> Quantization:
    """MLX: head and embedding too; an entry under a module's name changes it, false leaves it as it is.

    Source: mlx-lm 0.28, mlx_lm/utils.py (quantize_model, load_model): affine groups hold a scale and a bias of 16 bits.
    """
    said.known("quant_method", "version")
    base = _affine(said)
    rules = []
    for name, own in said.values.items():
        if not isinstance(own, dict | bool):
            continue
        said.known(name)
        changed = said.part(name, behind=said) if isinstance(own, dict) else said
        rules.append(Rule(name, "module", "bf16" if own is False else _affine(changed)))
    scheme = SCHEMES[base]
    return Quantization(scheme, scheme, kv=kv, rules=Rules(tuple(rules)), lm_head=scheme, embedding=scheme)


def _affine(said: Entries) -> str:
    mode = str(said.get("mode", default="affine"))
    bits, group = said.number("bits", default=4), said.number("group_size", default=64)
    if mode in ("mxfp4", "nvfp4", "mxfp8"):
        return {"mxfp4": "mxfp4", "nvfp4": "w4a16_nvfp4", "mxfp8": "w8a16_mxfp8"}[mode]
    if mode != "affine":
        refuse(f"mode={mode!r} of MLX", ("affine", "mxfp4", "nvfp4", "mxfp8"))
    return integers(bits, group, "bias")


def bitsandbytes(said: Entries, kv: str) -> Quantization:
    """bitsandbytes: NF4 or FP4 in blocks of 64, or LLM.int8(). Source: vLLM 0.24.0, quantization/bitsandbytes.py."""
    said.known(
        "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_quant_type", "llm_int8_threshold",
        "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "_load_in_4bit", "_load_in_8bit",
    )  # fmt: skip
    double = bool(said.get("bnb_4bit_use_double_quant", default=False))
    four = bool(said.get("load_in_4bit", default=False)) or not said.get("load_in_8bit", default=False)
    name = ("w4a16_nf4_double" if double else "w4a16_nf4") if four else "int8"
    kept = exclusions(said.listed("llm_int8_skip_modules"))
    return Quantization(SCHEMES[name], SCHEMES[name], kv=kv, rules=Rules(tuple(kept)))

