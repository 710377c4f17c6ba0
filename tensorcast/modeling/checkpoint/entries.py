"""A quantisation entry of a config, read key by key, so that what nobody read can be said."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from tensorcast.errors import InputError
from tensorcast.modeling.module_rules import LAYERS, Rule
from tensorcast.modeling.quantization import CHOICES, GROUPS, SCHEMES

REST = Rule("", "every", "bf16", LAYERS)
"""What no other rule names is not quantised."""


class Entries:
    """The keys and values of a ``quantization_config``, or of a part of one called ``where``."""

    def __init__(self, values: dict[str, Any], where: str = "quantization_config") -> None:
        self.values, self.where = values, where
        self._read: set[str] = set()
        self._inner: list[Entries] = []

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of ``names`` that says something."""
        self._read.update(names)
        return next((self.values[name] for name in names if self.values.get(name) not in (None, [], {})), default)

    def listed(self, *names: str) -> list[str]:
        """Names of modules, as a list or as lists of lists. Raises :class:`InputError` where they are none."""
        value = self.get(*names, default=[])
        flat = [value] if isinstance(value, str) else _flat(value) if isinstance(value, list) else [None]
        if not all(isinstance(item, str) for item in flat):
            raise InputError(f"{self.where}: {names[0]} must list names of modules, got {str(value)[:60]}")
        return [str(item) for item in flat]

    def within(self, *names: str) -> dict[str, Any]:
        """An object by name. Raises :class:`InputError` where the value is none."""
        value = self.get(*names, default={})
        if not isinstance(value, dict):
            raise InputError(f"{self.where}: {names[0]} must be an object, got {str(value)[:60]}")
        return value

    def number(self, *names: str, default: int) -> int:
        """A whole number by name. Raises :class:`InputError` where the value is none."""
        value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{self.where}: {names[0]} = {value!r} must be a whole number")
        return value

    def known(self, *names: str) -> None:
        """Keys that change neither bytes nor arithmetic."""
        self._read.update(names)

    def skipped(self, inner: Entries) -> None:
        """What nobody read of a part counts as not read here, too."""
        if inner is not self:
            self._inner.append(inner)

    @property
    def unread(self) -> tuple[str, ...]:
        """Keys that say something and were not used."""
        silent: tuple[Any, ...] = (None, [], {}, "", False)
        own = (key for key, value in self.values.items() if key not in self._read and value not in silent)
        return (*own, *(key for inner in self._inner for key in inner.unread))


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    return [item for value in values for item in (_flat(value) if isinstance(value, list) else [value])]


def refuse(what: str, known: Iterable[str] = ()) -> NoReturn:
    """Raise :class:`InputError`: ``what`` is not known, and what is."""
    listed = f" (known: {', '.join(known)})" if known else ""
    raise InputError(f"quantization_config: {what} is not known{listed}; set --quant to one of {', '.join(CHOICES)}")


def integers(bits: int, group: int, beside: str = "") -> str:
    """The weight-only scheme of ``bits`` with a scale per ``group`` weights of a row (0 or less: per row)."""
    if (bits, group) == (4, 128) and beside in ("", "zp"):
        return "w4a16"
    if (bits, group, beside) == (8, 128, ""):
        return "w8a16"
    name = f"w{bits}a16" + (f"_g{group}{'_' * bool(beside)}{beside}" if group > 0 else "_channel")
    if name not in SCHEMES:
        refuse(f"{bits} bits in groups of {group}", (f"2, 3, 4, 5, 6, 8 bits; groups of {GROUPS}",))
    return name


def four_by_eight(group: int, activations: str) -> str:
    """4-bit weights with 8-bit activations: ``fp8`` or ``int8``."""
    if activations == "int8":
        return "w4a8_int8"
    name = "w4a8" if group == 128 else f"w4a8_g{group}" if group > 0 else "w4a8_channel"
    if name not in SCHEMES:
        refuse(f"4-bit weights with 8-bit activations in groups of {group}")
    return name


def is_fp8_cache(said: Any) -> bool:
    """Whether a cache's entry means fp8: ``FP8`` by name, or 8-bit floats with a scale that is stored."""
    if isinstance(said, dict):
        return (said.get("type"), said.get("num_bits")) == ("float", 8) and said.get("dynamic") is not True
    return str(said).lower() in ("fp8", "fp8_e4m3", "float8_e4m3fn")
