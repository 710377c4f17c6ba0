"""From the page's state, text by key as its address has it, to a question; and from a question to the command that asks
the same. Names alone are taken: what would read a file of this machine is refused unless it was named at the start.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tensorcast.api import device_profile
from tensorcast.cost.recordings.named import PREFIX, shipped
from tensorcast.deploy.model_names import named_model
from tensorcast.deploy.options import SERVED_ROUTING
from tensorcast.errors import InputError, unknown_name
from tensorcast.explore.fields import PLACEMENTS, Field, fields
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.report.question import command as written
from tensorcast.search.search_task import SearchTask, search_tasks

State = Mapping[str, str]

LONGEST_VALUE = 400
"""Characters of a value: several devices or a list of layouts."""

MOST_SIZES = 6
MOST_DEVICES = 6
"""Searches of one question: a page waits for all of them."""


@lru_cache(maxsize=1)
def _fields() -> dict[str, Field]:
    return {field.key: field for field in fields()}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A state, read: names, and arguments of :func:`tensorcast.search.search_task.search_tasks`."""

    state: dict[str, str]
    model: str
    devices: tuple[str, ...]
    engines: tuple[str, ...]
    sizes: tuple[int, ...]
    asked: dict[str, Any]

    def tasks(self) -> list[SearchTask]:
        """Raises :class:`InputError`, one line, on what cannot be."""
        profile, _ = named_model(self.model)
        devices = [device_profile(name) for name in self.devices]
        replies = device_profile(self.asked["decode_device"]) if self.asked["decode_device"] else None
        prices = self.asked["prices"]
        if isinstance(prices, float):
            given = {device.name: prices for device in (*devices, *filter(None, [replies]))}
        else:
            given = {device_profile(name).name: usd for name, usd in prices.items()}
        return search_tasks(
            profile, devices, [load_engine(name) for name in self.engines], self.sizes,
            **self.asked | {"prices": given, "decode_device": replies},
        )


def question(state: State, named: Collection[str] = ()) -> Question:
    """The question of ``state``. ``named``: paths that whoever started the page gave, and may be read.

    Raises :class:`InputError`, one line that names the field, on anything that cannot be.
    """
    full = with_defaults(state)
    model = _known("model", full["model"], named)
    devices, engines = (_names(full, key, named) for key in ("device", "engine"))
    if len(devices) > MOST_DEVICES:
        raise InputError(f"--device {full['device']}: at most {MOST_DEVICES} at once")
    sizes = _wholes("--world-size", full["world_size"])
    if len(sizes) > MOST_SIZES:
        raise InputError(f"--world-size {full['world_size']}: at most {MOST_SIZES} at once")
    length = _whole("--input-len", full["input_len"])
    share = _number("cached share", full["cached"], most=99) or 0.0
    asked = {
        "input_len": length, "output_len": _whole("--output-len", full["output_len"]),
        "prefix_cached": round(length * share / 100),
        "mtp_acceptance": _acceptance(full["mtp_acceptance"] or "0.8"),
        "speculative_method": full["speculative_method"] or "mtp",
        "draft_model": _known("draft_model", full["draft_model"], named) if full["draft_model"] else None,
        **{f"{name}_s": _seconds(f"--{name}", full[f"{name}_ms"]) for name in ("ttft", "tpot")},
        "objective": full["objective"], "modes": _names(full, "mode", ()),
        "layouts": tuple(_listed(full["layouts"])) or None,
        "request_rate": _number("--request-rate", full["request_rate"], above=0),
        "users": _whole("--users", full["users"]) if full["users"] else None,
        "budget": _number("--budget", full["budget"], above=0),
        "decode_device": _known("decode_device", full["decode_device"], named) if full["decode_device"] else None,
        "decode_gpus": _whole("--decode-world-size", full["decode_world_size"]) if full["decode_world_size"] else None,
        "confidence": _number("--confidence", full["confidence"], most=1),
        "prices": _prices(full["price"]), "quant": full["quant"] or None, "state_dtype": full["state_dtype"] or None,
        "routing": _routing(full["routing"] or SERVED_ROUTING, named),
        "placement": _placement(full["placement"] or "linear", named), "pp_partition": full["pp_partition"] or None,
        **{name: full[name] or "engine" for name in ("experts_kernels", "attention_kernels")},
        "searched": {
            "kv_dtype": _listed(full["kv_dtype"]), "exchange": _listed(full["all2all"]),
            "dispatch": _listed(full["dispatch"]), "combine": _listed(full["combine"]),
            "mtp_depth": _wholes("--mtp", full["mtp_depth"], 0) if full["mtp_depth"] else None,
            "dcp": _wholes("--dcp", full["dcp"]) if full["dcp"] else None,
            "pcp": _wholes("--pcp", full["pcp"]) if full["pcp"] else None,
            "chunk_tokens": _wholes("--chunk-tokens", full["chunk_tokens"]) if full["chunk_tokens"] else None,
        },
    }  # fmt: skip
    return Question(state=full, model=model, devices=devices, engines=engines, sizes=sizes, asked=asked)


def with_defaults(state: State) -> dict[str, str]:
    """Every field's value, those left out at their defaults; unknown keys and over-long values are refused."""
    known = _fields()
    for key, value in state.items():
        if key not in known:
            raise unknown_name("field", key, known)
        if not isinstance(value, str) or len(value) > LONGEST_VALUE:
            raise InputError(f"{key}: must be text of at most {LONGEST_VALUE} characters")
    return {key: state.get(key, field.default).strip() for key, field in known.items()}


def field_of(line: str) -> str:
    """Key of the field that an error line is about; empty where it names none."""
    known = _fields()
    for key, field in known.items():
        begins = [field.key, field.flag, f"unknown {field.key}", f"unknown {field.flag}"]
        if any(begin and re.match(rf"{re.escape(begin)}(?![\w-])", line) for begin in begins):
            return key
    words = {"layout": "layouts", "cached share": "cached", "unknown quant": "quant"}
    words |= {f"{name}: release": "engine" for name in known["engine"].choices}
    return next((key for word, key in words.items() if line.startswith(word)), "")


def arguments(asked: Question) -> dict[str, str]:
    """The question by the command line's flags, but for what is as unasked."""
    known, state = _fields(), asked.state
    found = {}
    for key, field in known.items():
        value = state[key]
        if not field.flag or not value or (value == field.default and key not in ALWAYS):
            continue
        found[field.flag.removeprefix("--")] = value
    found["ttft"], found["tpot"] = (f"{state[f'{name}_ms']}ms" if state[f"{name}_ms"] else "" for name in LIMITED)
    found["prefix-cached"] = str(asked.asked["prefix_cached"] or "")
    if found.get("layouts"):
        found["layouts"] = ",".join(_listed(found["layouts"]))
    if isinstance(asked.asked["prices"], float):
        paid = dict.fromkeys((*asked.devices, *filter(None, [asked.asked["decode_device"]])))
        found["price"] = ",".join(f"{name}={asked.asked['prices']:g}" for name in paid)
    return {name: value for name, value in found.items() if value}


ALWAYS = ("model", "device", "world_size", "input_len", "output_len")
LIMITED = ("ttft", "tpot")


def command(asked: Question) -> str:
    """The shell command that asks the same."""
    return written(arguments(asked))


def _listed(text: str) -> list[str]:
    return [part for part in re.split(r"[,\s]+", text) if part]


def _names(state: State, key: str, named: Collection[str]) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(_known(key, name, named) for name in _listed(state[key])))
    if not found:
        raise InputError(f"{_fields()[key].flag} {state[key]!r}: must be one name or several with commas between")
    return found


_LOADED: dict[str, Callable[[str], Any]] = {
    "model": load_model, "device": load_device, "decode_device": load_device, "engine": load_engine,
    "draft_model": load_model,
}


def _known(key: str, name: str, named: Collection[str]) -> str:
    """A field's name as it is listed, an alias resolved. No file is looked for that ``named`` does not have."""
    choices = _fields()[key].choices
    if name in choices or name in named:
        return name
    plain = re.fullmatch(r"\w[\w.-]*(==[\w.]+)?", name) and not name.lower().endswith((".yaml", ".yml", ".json"))
    if key not in _LOADED or not plain or Path(name.partition("==")[0]).exists():
        raise unknown_name(key, name, choices)
    found: str = _LOADED[key](name).name
    return name if "==" in name else found


def _whole(name: str, text: str, least: int = 1) -> int:
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < least:
        raise InputError(f"{name} {text!r}: must be a whole number of at least {least}")
    return int(text)


def _wholes(name: str, text: str, least: int = 1) -> tuple[int, ...]:
    found = tuple(dict.fromkeys(_whole(name, part, least) for part in _listed(text)))
    if not found:
        raise InputError(f"{name} {text!r}: must be whole numbers of at least {least}, such as 8 or 8,16,32")
    return found


def _number(name: str, text: str, *, above: float | None = None, most: float = math.inf) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    low = value > above if above is not None else value >= 0
    if not (low and value <= most and math.isfinite(value)):
        floor = f"more than {above:g}" if above is not None else "at least 0"
        ceiling = f" and at most {most:g}" if most < math.inf else ""
        raise InputError(f"{name} {text!r}: must be a number of {floor}{ceiling}")
    return value


def _acceptance(text: str) -> float | str:
    """A chance, or the name of a task as it is."""
    return text if re.fullmatch(r"[a-z][\w-]*", text) else _number("--mtp-acceptance", text, most=1) or 0.0


def _seconds(flag: str, text: str) -> float | None:
    value = _number(flag, text, above=0)
    return None if value is None else value / 1e3


def _prices(text: str) -> float | dict[str, float]:
    if not text:
        return {}
    if "=" not in text:
        price = _number("--price", text, above=0)
        assert price is not None
        return price
    found = {}
    for part in _listed(text):
        name, _, value = part.partition("=")
        if name not in _fields()["device"].choices:
            raise InputError(f"--price {part!r}: must be a price, or DEVICE=USD per GPU hour, as in h200-sxm=2.5")
        found[name] = _number("--price", value, above=0) or 0.0
    return found


def _routing(text: str, named: Collection[str]) -> str:
    recorded = text.removeprefix(PREFIX) in shipped() if text.startswith(PREFIX) else False
    law = re.fullmatch(r"[a-z]+(:[\d.]+)?", text) and "recorded" not in text
    if text in named or recorded or law:
        return text
    raise InputError(
        f"--routing {text!r}: the page takes a law, or a recording by name: "
        f"{', '.join(PREFIX + name for name in shipped())}"
    )


def _placement(text: str, named: Collection[str]) -> str:
    if text in named or text in PLACEMENTS:
        return text
    raise unknown_name("placement", text, PLACEMENTS)


def own_names(model: str, device: str, engine: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """The page's names of what was given at the start, aliases resolved, and those that only whoever starts may give:
    files of their own, and checkpoints by name."""
    named: list[str] = []

    def taken(key: str, given: str, name: str, said: str = "") -> str:
        if name in _fields()[key].choices and not said and not Path(given.partition("==")[0]).exists():
            return given if "==" in given else name
        named.append(given)
        return given

    profile, said = named_model(model)
    found = {
        "model": taken("model", model, profile.name, said),
        "device": ",".join(taken("device", one, device_profile(one).name) for one in _listed(device)),
        "engine": taken("engine", engine, load_engine(engine).name),
    }
    return found, tuple(named)
