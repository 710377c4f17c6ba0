"""A description's names looked up in a config: sizes, and which part each layer has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_origin

from tensorcast.errors import InputError
from tensorcast.profiles.network.description import Layers, NgramTables, Part
from tensorcast.profiles.sourced import Frozen

WORDS = ("kind", "layers", "source", "residual", "tables", "ends", "rows")
"""Fields of a description that are no size."""


def looked_up(config: dict[str, Any], words: str) -> Any:
    """What ``words`` lead to in ``config``: a field, a product of fields and numbers; None where one is not said."""
    factors = [int(word) if word.isdigit() else _field(config, word) for word in words.split(" * ")]
    if len(factors) == 1:
        return factors[0]
    product = 1.0
    for factor in factors:
        if not isinstance(factor, int | float):
            return None
        product *= factor
    return int(product) if product.is_integer() else product


def _field(config: dict[str, Any], path: str) -> Any:
    found: Any = config
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def sizes(part: Frozen, config: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of a part of a description as numbers and flags, by name.

    ``where``: its place, for the line of :class:`InputError` that says which of its fields cannot be a size.
    """
    found: dict[str, Any] = {}
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if name in WORDS or isinstance(value, tuple | Layers) or field.annotation == Layers | None:
            continue
        if isinstance(value, str) and get_origin(field.annotation) is not Literal:
            said = looked_up(config, value)
            if said is None and field.is_required():
                raise InputError(f"network.{where}{name}: config.json does not say {value}")
            value = field.default if said is None else said
        flag = isinstance(field.default, bool)
        number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not flag and get_origin(field.annotation) is not Literal and not number:
            raise InputError(f"network.{where}{name} = {value!r}: must be a whole number")
        if field.is_required() and value == 0:
            raise InputError(f"network.{where}{name} = 0: must be at least 1")
        found[name] = bool(value) if flag else value
    return found


def layers_of(part: Frozen, count: int, config: dict[str, Any], where: str) -> dict[str, set[int]]:
    """The layers that each of a part's own fields names beside its ``layers``, by field. Raises :class:`InputError`."""
    every = type(part).model_fields.items()
    named = [name for name, field in every if name != "layers" and field.annotation == Layers | None]
    said = {name: getattr(part, name) for name in named}
    return {
        name: set() if one is None else named_layers(one, count, config, where + name) for name, one in said.items()
    }


def listed_rows(said: NgramTables, layers: set[int], config: dict[str, Any]) -> dict[int, int]:
    """Rows of each table, by layer. Raises :class:`InputError`."""
    rows = looked_up(config, said.rows)
    if not isinstance(rows, list) or len(rows) != len(layers) or not all(isinstance(n, int) and n > 0 for n in rows):
        raise InputError(f"network.tables.rows: {said.rows} in config.json lists no rows for {len(layers)} tables")
    return dict(zip(sorted(layers), rows, strict=True))


def part_of_layers(parts: Sequence[Part], count: int, config: dict[str, Any], where: str) -> list[int]:
    """Which of ``parts`` each of ``count`` layers has: the first that names it. Raises :class:`InputError`."""
    named = [named_layers(part.layers, count, config, f"{where}[{i}].layers") for i, part in enumerate(parts)]
    found = []
    for layer in range(count):
        own = next((i for i, layers in enumerate(named) if layer in layers), None)
        if own is None:
            raise InputError(f"network.{where}: layer {layer} of {count} has none: the last part may leave layers out")
        found.append(own)
    return found


def named_layers(said: Layers | None, count: int, config: dict[str, Any], where: str) -> set[int]:
    """The numbers of the layers that ``said`` names; of nothing said all. Raises :class:`InputError`."""
    if said is None:
        return set(range(count))
    if said.listed is not None:
        numbers = looked_up(config, said.listed)
        if isinstance(numbers, str):  # as Step-3 writes them: "4,5,6"
            numbers = [int(word) if word.strip().isdigit() else word for word in numbers.split(",")]
        numbers = [numbers] if isinstance(numbers, int) and numbers < count else numbers
        if not isinstance(numbers, list) or any(not isinstance(one, int) for one in numbers):
            raise InputError(f"network.{where}: {said.listed} in config.json is no list of numbers of layers")
        return {number - said.counted_from for number in numbers}
    if said.types is not None:
        words = looked_up(config, said.types)
        if not isinstance(words, list) or len(words) < count:
            raise InputError(f"network.{where}: {said.types} in config.json has no word for each of {count} layers")
        return {layer for layer in range(count) if words[layer] == said.word}
    if said.below is not None:
        return set(range(_number(said.below, config)))
    if said.since is not None:
        found = looked_up(config, said.since) if isinstance(said.since, str) else said.since
        first = max(found, default=count) if isinstance(found, list) else found
        return set() if not isinstance(first, int) or first < 0 else set(range(first, count))
    every, at = _number(said.every or 0, config), _number(said.at, config)
    return {layer for layer in range(count) if every and layer % every == at % every}


def _number(said: int | str, config: dict[str, Any]) -> int:
    value = looked_up(config, said) if isinstance(said, str) else said
    return value if isinstance(value, int) else 0
