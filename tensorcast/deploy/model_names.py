"""Models as people write them: ``nvidia/DeepSeek-R1-0528-FP4-v2`` is a shipped profile and a precision."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass

from tensorcast.errors import InputError
from tensorcast.modeling.quantization import Quantization
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.store import list_models, load_model

SCHEME_OF = {
    "bf16": "bf16", "bfloat16": "bf16", "fp16": "bf16", "float16": "bf16", "half": "bf16", "auto": "", "default": "",
    "fp8": "fp8", "fp8_block": "fp8_block", "fp8_static": "fp8", "fp8_ootb": "fp8", "float8": "fp8", "fp8_e4m3": "fp8",
    "mxfp8": "mxfp8", "fp4": "nvfp4", "nvfp4": "nvfp4", "modelopt_fp4": "nvfp4", "nvfp4a16": "w4a16_nvfp4",
    "mxfp4": "mxfp4", "w4a16_mxfp4": "mxfp4", "w8a16": "w8a16", "8bit": "w8a16", "8bits": "w8a16", "int8": "int8",
    "int8_wo": "int8", "w8a8": "int8", "int4": "w4a16", "int4_wo": "w4a16", "w4a16": "w4a16", "4bit": "w4a16",
    "4bits": "w4a16", "awq": "w4a16", "gptq": "w4a16",
}  # fmt: skip
"""Precisions as people write them, and our scheme."""

_SUFFIX = (
    r"-(instruct|chat|base|hf|it|preview|(?:mx)?fp8|(?:nv)?fp4(?:a16|-v\d)?|mxfp4|bf16|int4|int8|awq|gptq|dynamic|static|block"
    r"|pertensor|kv|(?:quantized\.)?w\da\d+|v0\.\d|\d{4}|[48]bits?|bnb|unsloth|auto-?round)$"
)


BITS = {"bf16": 16, "fp8": 8, "fp8_block": 8, "mxfp8": 8, "int8": 8, "nvfp4": 4, "mxfp4": 4, "w4a16": 4, "w4a16_g32": 4,
        "w8a16": 8, "w4a16_nvfp4": 4}  # fmt: skip
INTEGER = ("int8", "w4a16", "w4a16_g32", "w8a16")


@dataclass(frozen=True)
class Named:
    """What a name stands for: a profile, and of a checkpoint that has none of its own the precision in its name."""

    profile: ModelProfile
    near: bool
    precision: str

    @functools.cached_property
    def _stored(self) -> Quantization:
        from tensorcast.modeling.checkpoint.read import checkpoint  # of names that are no profile's alone

        return checkpoint(self.profile)

    def quant(self, linear: str | None, experts: str | None) -> str | None:
        """Precisions that are keys of :data:`SCHEME_OF` as an option; None for those that the profile ships in.

        A model that ships in as many bits, integers or floats alike, runs as shipped: block scales, layers in bf16.
        """
        native = (self._stored.experts if self.profile.num_experts else self._stored.linear).name
        parts = []
        for part, said in (("linear", linear), ("experts", experts)):
            scheme = SCHEME_OF[said.lower()] if said else ""
            if scheme and (BITS[scheme], scheme in INTEGER) != (BITS.get(native), native in INTEGER):
                parts.append(f"{part}={scheme}")
        return ",".join(parts) or None


@functools.lru_cache(maxsize=256)
def understand(name: str) -> Named:
    """The profile of a name, path or alias; failing that, the shipped one of the same name but for owner, fine-tuning
    and precision. Raises :class:`InputError` with the known names."""
    try:
        return Named(load_model(name), False, "")
    except InputError:
        near = _nearest(name)
        if near is None:
            raise
        return Named(load_model(near), True, named_precision(name))


def named_model(name: str) -> tuple[ModelProfile, str]:
    """The profile that a command's ``name`` stands for, stored as the name says, and a line on what was understood.

    The line is empty where the name is a profile's own. A path must be there.
    """
    if name.startswith((".", "~", os.sep)) or os.path.exists(name):
        return load_model(name), ""
    named = understand(name)
    profile = load_model(named.profile.name if named.near else name)  # one's own, to keep
    if not named.near:
        return profile, ""
    from tensorcast.modeling.checkpoint.released import released

    if (found := released(name)) is not None:
        config = {**profile.config, **found.sizes, "quantization_config": found.entry}
        as_released = {"hf_id": name, "config": config, "quantization": None, "kv_dtype": "bf16"}
        return profile.model_copy(update=as_released), f"{name} is read as {profile.name}; stored {found.said}"
    stored = named.quant(named.precision, named.precision)
    said = f"; stored in {SCHEME_OF[named.precision]}, as the name says" if stored else ", as it ships"
    changed = {"hf_id": name} | ({"quantization": stored} if stored else {})
    return profile.model_copy(update=changed), f"{name} is read as {profile.name}{said}"


def _nearest(name: str) -> str | None:
    """A shipped model of the same name but for owner, fine-tuning and precision."""

    def stem(text: str) -> str:
        text = text.rstrip("/").rpartition("/")[2].casefold().replace("_", "-").replace("meta-llama-3", "llama-3")
        while (short := re.sub(_SUFFIX, "", text)) != text:
            text = short
        return text

    def stems(model: str) -> set[str]:
        try:
            profile = load_model(model)
        except InputError:  # one's own, broken: whoever names it is told
            return set()
        return {stem(text) for text in (model, profile.hf_id, *profile.aliases)}

    wanted = stem(name)
    return min((model for model in list_models() if wanted in stems(model)), key=len, default=None)


def named_precision(name: str) -> str:
    """Precision that a model's name ends in, as in ``Qwen3-235B-A22B-NVFP4``; empty where it names none."""
    words = [word for word in re.split(r"[-_./]", name.casefold()) if word in SCHEME_OF or word == "block"]
    methods = {"awq", "gptq"} & {*words}  # of 4 bits, unless the name says of how many
    said = next((word for word in words if word not in ("block", *methods)), next(iter(methods), ""))
    if methods and said in ("int8", "8bit", "8bits"):
        return "w8a16"
    # Qwen's own FP8 releases scale 128x128 blocks, as DeepSeek's do; all others scale tensors, channels or tokens
    qwen = name.casefold().startswith("qwen/") and "static" not in name.casefold()
    blocks = said == "fp8" and ("block" in words or qwen)
    return "fp8_block" if blocks else said
