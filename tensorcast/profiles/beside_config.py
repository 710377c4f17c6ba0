"""What lies beside a ``config.json`` and belongs to it: files in which tools say how they quantised the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tensorcast.errors import InputError
from tensorcast.profiles.config_values import text_of

KEYS = ("quantization_config", "compression_config", "quantization", "quantize")
"""Keys of a config that hold the entry: transformers' own, older compressed-tensors', MLX's and msModelSlim's."""

METHODS = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files, and who wrote those that do not say so. Source: vLLM 0.24.0, transformers_utils/config.py (get_config reads
ModelOpt's where the config has no entry), quantization/auto_gptq.py and auto_awq.py (get_config_filenames)."""

MODEL_SLIM = "quant_model_description.json"


def with_quantization(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``config`` with the quantisation entry of a file in its folder, where it has none of its own.

    Raises :class:`InputError`, one line, where such a file is not readable.
    """
    if any(place.get(key) for place in (config, text_of(config)) for key in KEYS):
        return config
    for name, method in METHODS.items():
        path = folder / name
        if path.is_file():
            return {**config, "quantization_config": {"quant_method": method, **_object(path)}}
    return {**config, "quantize": MODEL_SLIM} if (folder / MODEL_SLIM).is_file() else config


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: must be an object, this is a {type(found).__name__}")
    return found
