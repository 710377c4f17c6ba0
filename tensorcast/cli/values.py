"""What is typed: values as text (times, lists of names and numbers, prices, layouts), options by other names."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tensorcast.errors import InputError

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}

OTHERS_CALL: dict[str, tuple[str, ...]] = {
    "--world-size": ("gpus", "num-gpus", "gpu-count", "total-gpus", "num-devices"),
    "--device": ("gpu", "gpu-type", "system", "hardware", "system-name"),
    "--input-len": ("isl", "input-length", "random-input-len", "prompt-len", "max-input-len"),
    "--output-len": ("osl", "output-length", "random-output-len", "max-output-len"),
    "--batch": ("batch-size", "bs"),
    "--max-sequences": ("max-num-seqs", "max-running-requests", "max-batch-size"),
    "--users": ("concurrency", "max-concurrency", "num-users"),
    "--request-rate": ("rate", "qps"),
    "--rate": ("request-rate", "qps"),
    "--requests": ("num-prompts", "num-requests"),
    "--engine": ("backend", "backend-name", "framework"),
    "--quant": ("quantization", "precision", "dtype"),
    "--kv-dtype": ("kv-cache-dtype",),
    "--layout": ("tp", "ep", "dp", "pp"),
    "--layouts": ("tp", "ep", "dp", "pp", "layout"),
    "--tp": ("tp-size", "tensor-parallel-size"),
    "--ep": ("ep-size", "expert-parallel-size", "enable-expert-parallel"),
    "--dp": ("dp-size", "data-parallel-size", "enable-dp-attention"),
    "--pp": ("pp-size", "pipeline-parallel-size"),
    "--chunk-tokens": ("max-num-batched-tokens", "chunked-prefill-size", "max-num-tokens", "prefill-chunk"),
    "--prefill-chunk": ("max-num-batched-tokens", "chunked-prefill-size", "max-num-tokens", "chunk-tokens"),
    "--out": ("output", "output-dir", "save-dir"),
}
"""By option of ours, the names that it has elsewhere, without the dashes: in vLLM's and SGLang's servers and serving
benchmarks (vllm 0.33.0, sglang 0.5.23), in other estimators, and in our own commands that call it otherwise."""


def duration(flag: str, text: str | None) -> float | None:
    """``2s``, ``50ms`` or ``1.5 s`` in seconds. Raises :class:`InputError` on anything else, a bare number as well:
    50 may be meant as milliseconds."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+\.?\d*(?:e-?\d+)?|\.\d+)\s*(us|ms|s|min|)\s*", text.lower())
    if not found or not 0 < float(found[1]) < math.inf:
        raise InputError(f"{flag} {text!r}: must be a time, such as 2s, 50ms or 0.05s")
    number, unit = found.groups()
    if not unit:
        raise InputError(f"{flag} {text!r}: a time needs its unit: {number}ms or {number}s")
    return float(number) * _UNITS[unit]


def check_beside(other: str, there: bool, given: Mapping[str, Any]) -> None:
    """Raise :class:`InputError` where an option is ``given`` (None, False: not) that is about another alone, which is
    not ``there``."""
    for flag, value in given.items():
        if not there and value is not None and value is not False:
            said = "" if value is True else f" {value:g}" if isinstance(value, float) else f" {value}"
            raise InputError(f"{flag}{said}: is about {other}, and none is given")


def split_names(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def listed_names(flag: str, text: str) -> list[str]:
    found = list(dict.fromkeys(split_names(text)))
    if not found:
        raise InputError(f"{flag} {text!r}: must be one name or several with commas between")
    return found


def whole_numbers(flag: str, text: str, least: int | None = None) -> list[int]:
    """``8`` or ``8,16,32`` as numbers. Raises :class:`InputError` on anything else, or a number under ``least``."""
    try:
        found = list(dict.fromkeys(int(part) for part in split_names(text)))
    except ValueError:
        found = []
    if not found or (least is not None and min(found) < least):
        at_least = "" if least is None else f" of at least {least}"
        raise InputError(f"{flag} {text!r}: must be whole numbers{at_least}, such as 8 or 8,16,32")
    return found


def numbers(flag: str, text: str) -> list[float]:
    """``8`` or ``0.5,2,inf``. Raises :class:`InputError` on anything else, or what is not above 0."""
    try:
        found = list(dict.fromkeys(float(part) for part in split_names(text)))
    except ValueError:
        found = []
    if not found or not min(found) > 0:
        raise InputError(f"{flag} {text!r}: must be numbers of more than 0, such as 8 or 0.5,2,8")
    return found


def device_prices(text: str) -> dict[str, float]:
    prices = {}
    for part in split_names(text):
        name, _, value = part.partition("=")
        try:
            if not name:
                raise ValueError
            prices[name] = float(value)
        except ValueError:
            raise InputError(f"--price {part!r}: must be DEVICE=USD per GPU hour, as in H200=2.5") from None
    return prices


def layouts_of(text: str) -> list[str]:
    """Layouts typed with commas between, or those of a file."""
    from tensorcast.deploy.layout import parse_layout

    if Path(text).exists() or text.lower().endswith((".yaml", ".yml")) or "/" in text:
        return read_layouts(Path(text))
    found = listed_names("--layouts", text)
    for word in found:
        try:
            parse_layout(word)
        except InputError as reason:
            raise InputError(f"--layouts {text}: {reason}") from None
    return found


def config_words(path: str, known: Collection[str], given: Collection[str]) -> list[str]:
    """A saved question as it would be typed: the model, then flags and values; those ``given`` anew are left out.

    ``known``: the command's long flags. Raises :class:`InputError` on anything else.
    """
    import yaml

    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as reason:
        raise InputError(f"--config {path}: cannot be read: {reason.strerror or reason}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as reason:
        raise InputError(f"--config {path}: not YAML: {' '.join(str(reason).split())[:120]}") from None
    if not isinstance(document, dict):
        raise InputError(f"--config {path}: must be options by name, such as world-size: 8")
    words = [] if "model" in given or "model" not in document else [str(document["model"])]
    for key, value in document.items():
        flag = f"--{key}"
        if key == "model" or flag in given or value in (None, False):
            continue
        if flag not in known:
            raise InputError(f"--config {path}: {key!r} is no option of this command")
        if isinstance(value, dict):
            value = [f"{name}={one}" for name, one in value.items()]
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += [flag] if value is True else [flag, text]
    return words


def read_layouts(path: Path) -> list[str]:
    """Layouts of a YAML file: a list (or ``layouts:`` with one) of words such as ``tp8-ep8`` or of sizes by name."""
    import yaml

    from tensorcast.deploy.layout import parse_layout

    try:
        document: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as reason:
        raise InputError(f"--layouts {path}: cannot be read: {reason.strerror or reason}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as reason:
        raise InputError(f"--layouts {path}: not YAML: {' '.join(str(reason).split())[:120]}") from None
    listed = document.get("layouts") if isinstance(document, dict) else document
    if isinstance(document, dict) and (others := [key for key in document if key != "layouts"]):
        raise InputError(f"--layouts {path}: {others[0]!r} is not known; it must be a list, or layouts: with one")
    if not isinstance(listed, list) or not listed:
        raise InputError(f"--layouts {path}: must be a list of layouts, such as [tp8, tp8-ep8]")
    words = ["-".join(f"{k}{v}" for k, v in one.items()) if isinstance(one, dict) else str(one) for one in listed]
    for word in words:
        try:
            sizes = parse_layout(word)
        except InputError as reason:
            raise InputError(f"--layouts {path}: {reason}") from None
        if min(sizes.tp, sizes.dp, sizes.ep, sizes.pp) < 1:
            raise InputError(f"--layouts {path}: layout {word!r}: sizes must be at least 1")
    return words


def ours(typed: str, known: Collection[str]) -> str | None:
    """The one of a command's options (``known``) that ``typed``, which is none of them, means elsewhere, or None.

    A name that says a degree of parallelism, as ``--tensor-parallel-size``, means the layout where layouts are written
    whole.
    """
    if typed in known:
        return None
    name = typed.lstrip("-").replace("_", "-").lower()
    means = [option for option, names in OTHERS_CALL.items() if name in names]
    means += [whole for degree in means if degree[2:] in OTHERS_CALL["--layout"] for whole in ("--layout", "--layouts")]
    return next((option for option in means if option in known), None)
