"""ModelOpt: one algorithm for all modules but some, or one per module; nested under ``quantization`` in older files."""

from __future__ import annotations

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
from tensorcast.modeling.module_rules import Rule, Rules, exclusions
from tensorcast.modeling.quantization import SCHEMES, Quantization

ALGORITHMS = {
    "FP8": "fp8", "FP8_PER_CHANNEL_PER_TOKEN": "fp8", "FP8_PB_WO": "fp8_block", "FP8_PB_REAL": "fp8_block",
    "NVFP4": "nvfp4", "NVFP4_AWQ": "nvfp4", "NVFP4_SVDQUANT": "nvfp4", "W4A16_NVFP4": "w4a16_nvfp4",
    "MXFP8": "mxfp8", "MXFP4": "mxfp4", "W4A8_MXFP4_FP8": "mxfp4", "W4A8_MXFP4_MXFP8": "mxfp4",
    "W8A8_SQ_PER_CHANNEL": "int8", "INT8_SQ": "int8", "W8A16": "w8a16_channel", "W4A16": "w4a16_channel",
}  # fmt: skip
"""``quant_algo`` and our scheme. Engines run FP8_PB_WO, whose weights alone the checkpoint quantises, with activations
in fp8 (vLLM 0.24.0, quantization/modelopt.py, ModelOptFp8PbWoLinearMethod)."""

GROUPED = ("W4A16_AWQ", "INT4_AWQ", "W4A8_AWQ")


def algorithm(name: str, group: int, stated: Any = None) -> str:
    """Our scheme of a ``quant_algo``. Raises :class:`InputError` that names it where it is not known.

    ``group``: of algorithms that let the author choose; ``stated``: what stands beside the algorithm itself.
    """
    algo = name.upper()
    if algo in ALGORITHMS and (fixed := SCHEMES[ALGORITHMS[algo]].group) and stated not in (None, fixed):
        refuse(f"quant_algo={name!r} in groups of {stated}", (f"groups of {fixed}",))
    if algo in ("W4A16_AWQ", "INT4_AWQ"):
        return integers(4, group)
    if algo == "W4A8_AWQ":
        return four_by_eight(group, "fp8")
    if algo not in ALGORITHMS:
        refuse(f"quant_algo={name!r}", (*ALGORITHMS, *GROUPED, "MIXED_PRECISION"))
    return ALGORITHMS[algo]


def read(said: Entries, kv: str) -> Quantization:
    """Source: vLLM 0.24.0, quantization/modelopt.py (from_config, is_layer_excluded, ModelOptMixedPrecisionConfig)."""
    inner = said.part("quantization") if said.values.get("quantization") else said
    said.known("version")
    for one in (said, inner):
        if isinstance(one.values.get("producer"), dict):
            one.part("producer").known("name", "version")
        one.known("producer")
    algo = str(inner.get("quant_algo", default=""))
    group = inner.number("group_size", default=128)
    kept = exclusions([*inner.listed("exclude_modules", "ignore")])
    kv = "fp8" if has_fp8_cache(inner) or has_fp8_cache(said) else kv
    by_layer = layers(inner, group)
    inner.known(*ABOUT_AWQ)
    pass_over_groups(inner)
    if algo.upper() == "MIXED_PRECISION":
        if not by_layer:
            refuse("quant_algo='MIXED_PRECISION' without quantized_layers")
        found = Quantization(kv=kv, rules=Rules((*by_layer, *kept, REST)))
    elif algo.upper() in ("", "NONE"):
        if "quant_algo" not in inner.values:
            refuse(f"quant_method={said.values.get('quant_method')!r} without quant_algo", ALGORITHMS)
        found = Quantization(kv=kv)
    else:
        scheme = SCHEMES[algorithm(algo, group, inner.get("group_size"))]
        found = Quantization(scheme, scheme, kv=kv, rules=Rules((*by_layer, *kept)))
    return found


ABOUT_AWQ = ("has_zero_point", "pre_quant_scale")


def pass_over_groups(said: Entries) -> None:
    """``config_groups`` of ModelOpt repeat what its other keys say: what they say beside that is not read."""
    for group in said.parts("config_groups").values():
        group.known("targets", "format")
        for name in ("weights", "input_activations"):
            group.part(name).known("type", "num_bits", *ABOUT_NUMBERS)


def layers(said: Entries, group: int) -> list[Rule]:
    """A rule for each module of ``quantized_layers``."""
    found = []
    for module, entry in said.parts("quantized_layers").items():
        entry.known(*ABOUT_AWQ)
        algo = entry.get("quant_algo") or refuse("a module without quant_algo", where=entry.where)
        scheme = algorithm(str(algo), entry.number("group_size", default=group), entry.get("group_size"))
        found += exclusions([module], scheme)  # by name or glob
    return found
