"""compressed-tensors: groups of modules by ``targets``, each with the numbers of its weights and activations."""

from __future__ import annotations

import re
from typing import Any

from tensorcast.modeling.checkpoint.entries import (
    ABOUT_NUMBERS,
    REST,
    Entries,
    four_by_eight,
    has_fp8_cache,
    integers,
    refuse,
)
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
    for group in said.parts("config_groups").values():
        group.known("format")
        scheme = scheme_of(group.part("weights"), group.part("input_activations"))
        for target in group.listed("targets") or ["Linear"]:
            if target.startswith("re:"):
                named.append(Rule(target[3:], "match", scheme))
            elif CLASSES.match(target):
                roles = ("experts",) if re.search("moe|expert", target.lower()) else LAYERS
                classes.append(Rule("", "every", scheme, roles))
            else:
                named.append(Rule(target, "module", scheme))
    if not named and not classes:
        for name, group in said.part("config_groups").values.items():  # a preset of the tool's by its name
            refuse(f"config_groups.{name} = {str(group)[:40]}, which is no object with weights,")
        refuse(f"quant_method='compressed-tensors' without config_groups (format={said.values.get('format')!r})")
    if has_fp8_cache(said):
        kv = "fp8"
    rules = (*exclusions(said.listed("ignore")), *named, *classes, REST)
    return Quantization(kv=kv, rules=Rules(rules))


def scheme_of(said: Entries, activations: Entries) -> str:
    """The scheme of one group by its ``weights`` and ``input_activations`` (empty: weight only)."""
    kind, bits, strategy = said.get("type"), said.get("num_bits"), said.get("strategy")
    group, block = said.number("group_size", default=-1), said.get("block_structure")
    for one in (said, activations):
        one.known(*ABOUT_NUMBERS)
    if block not in (None, [128, 128], "128x128"):
        refuse(f"block_structure={block}", ("[128, 128]",))
    activations.known("block_structure")
    act = bool(activations.values)
    act_kind = f"{'fp' if activations.get('type') == 'float' else 'int'}{activations.get('num_bits')}" if act else ""
    if kind == "float" and bits == 8:
        return _eight_bit_floats(strategy, group, act)
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
        f"a group with weights of type={kind!r}, num_bits={bits!r}, group_size={said.get('group_size')!r} and "
        f"activations of {act_kind or 'bf16'}",
        where=said.where,
    )


def _eight_bit_floats(strategy: Any, group: int, activations: bool) -> str:
    if group == 32:
        return "mxfp8" if activations else "w8a16_mxfp8"
    block = "_block" if strategy == "block" or group == 128 else ""
    return f"fp8{block}" if activations else f"w8a16_fp8{block}"
