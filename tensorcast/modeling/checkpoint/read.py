"""How a checkpoint is stored: what its config's quantisation entry says, in the words of the tool that wrote it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tensorcast.errors import InputError
from tensorcast.modeling.checkpoint import compressed_tensors, floats, integers, modelopt
from tensorcast.modeling.checkpoint.entries import Entries, refuse
from tensorcast.modeling.quantization import BF16, Quantization, Scheme, override
from tensorcast.profiles.beside_config import KEYS
from tensorcast.profiles.config_values import text_of
from tensorcast.profiles.model import ModelProfile

Reader = Callable[[Entries, str], Quantization]

READERS: dict[str, Reader] = {
    "awq": integers.awq, "awq-marlin": integers.awq, "auto-awq": integers.awq,
    "gptq": integers.gptq, "gptq-marlin": integers.gptq, "auto-gptq": integers.gptq,
    "auto-round": integers.auto_round, "intel/auto-round": integers.auto_round, "inc": integers.auto_round,
    "bitsandbytes": integers.bitsandbytes, "mlx": integers.mlx,
    "compressed-tensors": compressed_tensors.read,
    "modelopt": modelopt.read, "modelopt-fp4": modelopt.read, "modelopt-mixed": modelopt.read,
    "modelopt-mxfp8": modelopt.read, "modelopt-fp8": modelopt.read,
    "mxfp4": floats.mxfp4, "gpt-oss-mxfp4": floats.mxfp4, "quark": floats.quark,
    "fp8": floats.fp8, "fbgemm-fp8": floats.fp8, "deepseek-v4-fp8": floats.fp8,
    **dict.fromkeys(floats.WHOLE, floats.whole),
}  # fmt: skip
"""By ``quant_method``, with the names that engines give them."""


COMPRESSED_CACHE = "fp8"
"""In what engines keep keys and values that a network compresses (DeepSeek-V4) unless told otherwise (vLLM 0.33.0,
models/deepseek_v4/attention.py; SGLang 0.5.23, arg_groups/overrides.py)."""


def from_config(config: dict[str, Any], kv: str = "bf16") -> Quantization:
    """What a Hugging Face config says of its weights and cache. Raises :class:`InputError` on what is not known.

    Source of the order of keys: vLLM 0.24.0, config/model.py (_parse_quant_hf_config).
    """
    places = (config, text_of(config))
    if any(places[1].get("compress_ratios") or ()):
        kv = COMPRESSED_CACHE
    key, said = next(((key, place[key]) for key in KEYS for place in places if place.get(key)), ("", None))
    if not key:
        return Quantization(kv=kv)
    if key == "quantize":
        refuse(f"quantize={said!r} (msModelSlim's mark)")
    if not isinstance(said, dict):
        raise InputError(f"{key} {said!r}: must be an object with quant_method")
    entries = Entries(said, root=key)
    method = _method(entries, key)
    if method not in READERS:
        bits = said.get("bits", said.get("w_bit"))
        algo = f", quant_algo={said['quant_algo']!r}" if said.get("quant_algo") else ""
        refuse(f"quant_method={said.get('quant_method', '')!r} (bits={bits}{algo})", READERS)
    if READERS[method] is floats.fp8:
        found = floats.fp8(entries, kv, str(config.get("expert_dtype") or places[1].get("expert_dtype") or ""))
    else:
        found = READERS[method](entries, kv)
    return replace(_told(found, places[1]), unread=entries.unread, method=method)


def _method(said: Entries, key: str) -> str:
    """The tool that wrote an entry; those that do not say so are known by their keys."""
    method = str(said.get("quant_method", default="")).lower().replace("_", "-")
    if method:
        return method
    producer = said.values.get("producer")
    if "quant_algo" in said.values or "quantization" in said.values or isinstance(producer, dict):
        return "modelopt"
    if "config_groups" in said.values:
        return "compressed-tensors"
    if "global_quant_config" in said.values:
        return "quark"
    plain = key == "quantization" or len(said.values) <= 3 or any("." in name for name in said.values)
    if plain and {"bits", "group_size"} <= set(said.values):
        return "mlx"
    return ""


PROBES = {
    "experts": tuple(f"{block}.experts.0.{name}" for block in ("mlp", "block_sparse_moe", "ffn", "mixer")
                     for name in ("gate_proj", "up_proj", "w1")),
    "linear": ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "linear_attn.out_proj", "mixer.in_proj"),
}
"""Usual names of modules."""


def _told(found: Quantization, text: dict[str, Any]) -> Quantization:
    """``found`` with the schemes that most of its layers have as those of its roles, where rules say all.

    Only what is said of a checkpoint hangs on them: every module that has a name is found by it.
    """
    if not any(rule.how == "every" for rule in found.rules.entries):
        return found
    layers = text.get("num_hidden_layers")
    middle = layers // 2 if isinstance(layers, int) else 0

    def usual(role: str) -> Scheme:
        names = (f"model.layers.{middle + at}.{name}.weight" for name in PROBES[role] for at in (0, 1))
        quantised = [scheme for scheme in (found.scheme(name, role) for name in names) if scheme != BF16]
        return max(quantised, key=quantised.count, default=BF16)

    return replace(found, linear=usual("linear"), experts=usual("experts"))


_read: dict[int, tuple[ModelProfile, Quantization]] = {}


def checkpoint(model: ModelProfile) -> Quantization:
    """How a model is stored as shipped: in the schemes that its profile says, else as its config does."""
    if id(model) not in _read:
        if len(_read) >= 64:
            _read.pop(next(iter(_read)))
        _read[id(model)] = model, _stored(model)  # the model stays alive, so that its id stays its own
    return _read[id(model)][1]


def _stored(model: ModelProfile) -> Quantization:
    try:
        found = from_config(model.config, model.kv_dtype)
    except InputError:
        if not model.quantization:
            raise
        found = Quantization(kv=model.kv_dtype)
    return override(found, model.quantization)


