"""compressed-tensors: groups of modules by ``targets``, each with the numbers of its weights and activations."""

from __future__ import annotations

import re
from typing import Any

from tensorcast.modeling.checkpoint.entries import REST, Entries, four_by_eight, integers, is_fp8_cache, refuse
from tensorcast.modeling.module_rules import LAYERS, Rule, Rules, exclusions
from tensorcast.modeling.quantization import Quantization

CLASSES = re.compile(r"^[A-Z]\w*$")
"""Targets that name a class (``Linear``, ``FusedMoE``) and not a module."""


def read(said: Entries, kv: str) -> Quantization:
    """Modules of ``ignore`` stay as they are, then targets that are names speak, then classes; the rest is plain.

    Source: vLLM 0.24.0, quantization/compressed_tensors/utils.py (should_ignore_layer, find_matched_target) and
    compressed_tensors.py (_get_scheme_from_parts).
    """
    said.known("quantization_status", "global_compression_ratio", "version", "format")
    named: list[Rule] = []
    classes: list[Rule] = []
    for name, values in said.within("config_groups").items():
        group = Entries(values if isinstance(values, dict) else {}, f"quantization_config: config_groups.{name}")
        scheme = scheme_of(group.within("weights"), group.get("input_activations"))
        for target in group.listed("targets") or ["Linear"]:
            if target.startswith("re:"):
                named.append(Rule(target[3:], "match", scheme))
            elif CLASSES.match(target):
                roles = ("experts",) if re.search("moe|expert", target.lower()) else LAYERS
                classes.append(Rule("", "every", scheme, roles))
            else:
                named.append(Rule(target, "module", scheme))
    if not named and not classes:
        refuse(f"quant_method='compressed-tensors' without config_groups (format={said.values.get('format')!r})")
    if is_fp8_cache(said.get("kv_cache_scheme")):
        kv = "fp8"
    rules = (*exclusions(said.listed("ignore")), *named, *classes, REST)
    return Quantization(kv=kv, rules=Rules(rules))


def scheme_of(weights: dict[str, Any], activations: Any) -> str:
    """The scheme of one group by its ``weights`` and ``input_activations`` (None: weight only)."""
    said = Entries(weights, "quantization_config: weights")
    kind, bits, strategy = said.get("type"), said.get("num_bits"), said.get("strategy")
    group = said.number("group_size", default=-1)
    act = activations if isinstance(activations, dict) else {}
    act_kind = f"{'fp' if act.get('type') == 'float' else 'int'}{act.get('num_bits')}" if act else ""
    if kind == "float" and bits == 8:
        return _eight_bit_floats(strategy, group, bool(act))
    if kind == "float" and bits == 4 and group in (16, 32):
        return "mxfp4" if group == 32 else "nvfp4" if act else "w4a16_nvfp4"
    if kind == "int" and isinstance(bits, int) and bits <= 8:
        if not act:
            return integers(bits, group)
        if bits == 8 and act_kind == "int8":
            return "int8"
        if bits == 4 and act_kind in ("fp8", "int8"):
            return four_by_eight(group, act_kind)
    refuse(
        f"a group with weights of type={kind!r}, num_bits={bits!r}, group_size={weights.get('group_size')!r} and "
        f"activations of {act_kind or 'bf16'}"
    )


def _eight_bit_floats(strategy: Any, group: int, activations: bool) -> str:
    if group == 32:
        return "mxfp8" if activations else "w8a16_mxfp8"
    block = "_block" if strategy == "block" or group == 128 else ""
    return f"fp8{block}" if activations else f"w8a16_fp8{block}"
