"""A quantisation entry of a config, read key by key, so that what nobody read can be said."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from tensorcast.errors import InputError
from tensorcast.modeling.module_rules import LAYERS, Rule
from tensorcast.modeling.quantization import CHOICES, GROUPS, SCHEMES

ROOT = "quantization_config"
SILENT: tuple[Any, ...] = (None, [], {}, "")
"""Values that say nothing."""

REST = Rule("", "every", "bf16", LAYERS)
"""What no other rule names is not quantised."""


class Entries:
    """The keys and values of a ``quantization_config``, or of the part of one under ``path``.

    What an entry does not say, ``behind`` says, if there is one.
    """

    def __init__(
        self, values: dict[str, Any], path: str = "", *, root: str = ROOT, behind: Entries | None = None
    ) -> None:
        self.values, self.behind = values, behind
        self._path, self._root = path, root
        self._read: set[str] = set()
        self._parts: dict[str, Entries] = {}

    @property
    def where(self) -> str:
        """What an error calls this part."""
        return self._root + (f": {self._path}" if self._path else "")

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of ``names`` that says something."""
        self._read.update(names)
        if self.behind is not None:
            default = self.behind.get(*names, default=default)
        return next((self.values[name] for name in names if self.values.get(name) not in SILENT), default)

    def listed(self, *names: str) -> list[str]:
        """Names of modules, as a list or as lists of lists. Raises :class:`InputError` where they are none."""
        value = self.get(*names, default=[])
        flat = [value] if isinstance(value, str) else _flat(value) if isinstance(value, list) else [None]
        if not all(isinstance(item, str) for item in flat):
            raise InputError(f"{self.where}: {names[0]} must list names of modules, got {str(value)[:60]}")
        return [str(item) for item in flat]

    def part(self, name: str, behind: Entries | None = None) -> Entries:
        """An object by name, empty if there is none. Raises :class:`InputError` where the value is none."""
        value = self.values.get(name)
        if value not in SILENT and not isinstance(value, dict):
            raise InputError(f"{self.where}: {name} must be an object, got {str(value)[:60]}")
        self._read.add(name)
        path = f"{self._path}.{name}" if self._path else name
        return self._parts.setdefault(name, Entries(value or {}, path, root=self._root, behind=behind))

    def parts(self, name: str, behind: Entries | None = None) -> dict[str, Entries]:
        """The objects that an object holds, by name; what in it is none is not read."""
        whole = self.part(name)
        return {key: whole.part(key, behind) for key, value in whole.values.items() if isinstance(value, dict)}

    def listed_parts(self, name: str) -> list[Entries]:
        """The objects that a list holds."""
        numbered = {str(i): one for i, one in enumerate(self.values[name])}
        whole = Entries(numbered, f"{self._path}.{name}", root=self._root)
        self._read.add(name)
        self._parts.setdefault(name, whole)
        return [whole.part(key) for key in whole.values]

    def number(self, *names: str, default: int) -> int:
        """A whole number by name. Raises :class:`InputError` where the value is none."""
        value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{self.where}: {names[0]} = {value!r} must be a whole number")
        return value

    def known(self, *names: str) -> None:
        """Keys that change neither bytes nor arithmetic."""
        self._read.update(names)

    @property
    def unread(self) -> tuple[str, ...]:
        """Keys that say something and were not used, by their path."""
        prefix = f"{self._path}." if self._path else ""
        said = (key for key, value in self.values.items() if value not in SILENT and value is not False)
        own = (f"{prefix}{key}" for key in said if key not in self._read)
        return (*own, *(path for inner in self._parts.values() for path in inner.unread))


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    return [item for value in values for item in (_flat(value) if isinstance(value, list) else [value])]


def refuse(what: str, known: Iterable[str] = (), where: str = ROOT) -> NoReturn:
    """Raise :class:`InputError`: ``what`` is not known, and what is."""
    listed = f" (known: {', '.join(known)})" if known else ""
    raise InputError(f"{where}: {what} is not known{listed}; set --quant to one of {', '.join(CHOICES)}")


def integers(bits: int, group: int, beside: str = "") -> str:
    """The weight-only scheme of ``bits`` with a scale per ``group`` weights of a row (0 or -1: per row)."""
    if group < -1:
        refuse(f"group_size = {group}", ("-1, a scale per row, or as many weights as share one",))
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


def has_fp8_cache(said: Entries) -> bool:
    """Whether an entry's own on the cache means fp8: ``FP8`` by name, or 8-bit floats with a scale that is stored.

    Anything else (integers, 4 bits) stays unread, so that a note names it.
    """
    for key in ("kv_cache_quant_algo", "kv_cache_scheme"):
        one = said.values.get(key)
        if isinstance(one, dict) and (one.get("type"), one.get("num_bits")) == ("float", 8):
            said.part(key).known("type", "num_bits", *ABOUT_NUMBERS)
            if one.get("dynamic") is not True:
                return True
        elif str(one).lower() in ("fp8", "fp8_e4m3", "float8_e4m3fn"):
            said.known(key)
            return True
    return False


ABOUT_NUMBERS = (
    "symmetric", "dynamic", "observer", "observer_kwargs", "actorder", "scale_dtype", "zp_dtype", "strategy",
    "group_size",
)  # fmt: skip
"""Keys on the numbers of a format that change neither bytes nor arithmetic, or that others say as well."""
