"""Arguments that an engine's server takes: what a release declares of each, and a parser that is made of that."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from tensorcast.errors import InputError

KINDS: dict[str, Callable[[str], Any]] = {
    "str": str, "int": int, "float": float, "json": json.loads, "number": lambda text: int(float(text)),
}
"""What a value is read as; ``number``: also as people write it."""


TAKES = {"None": "value", "*": "+", "?": "?", "+": "+"}
"""``nargs`` as it is written, in our words; a number stands for several."""


@dataclass(frozen=True)
class Argument:
    """One argument. ``takes``: a value, nothing, one or none (``?``), or several (``+``)."""

    takes: str = "value"
    kind: str = "str"
    also: tuple[str, ...] = ()
    choices: tuple[Any, ...] = ()
    deprecated: str = ""

    def record(self) -> dict[str, Any]:
        """Plain data, without what is as usual."""
        usual = asdict(Argument())
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items() if value != usual[name]
        }  # fmt: skip

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Argument:
        said: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
        }
        return cls(**said)


Declared = dict[str, Argument]
"""By the name that a release declares first; other spellings are in ``also``."""


def spellings(declared: Declared) -> dict[str, Argument]:
    """Every spelling of every argument."""
    return {name: one for first, one in declared.items() for name in (first, *one.also)}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parser_of(declared: Declared, positional: str = "") -> argparse.ArgumentParser:
    """A parser that takes what the engine's own takes. ``positional``: a word that stands without a name."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    if positional:
        parser.add_argument(positional)
    for name, one in declared.items():
        if one.takes == "nothing":
            parser.add_argument(name, *one.also, action="store_true")
            continue
        nargs = {"value": None, "?": "?", "+": "+"}[one.takes]
        parser.add_argument(
            name, *one.also, type=KINDS[one.kind], nargs=nargs, choices=list(one.choices) or None, default=None
        )
    return parser


def refused(command: str, program: tuple[str, ...], parser: argparse.ArgumentParser) -> str:
    """Why the parser does not take a shell ``command`` of this program; empty if it does."""
    words = shlex.split(command.replace("\\\n", " "))
    while words and "=" in words[0] and not words[0].startswith("-"):  # environment
        words = words[1:]
    if tuple(words[: len(program)]) != program:
        return f"the command begins with {' '.join(words[: len(program)])}, not {' '.join(program)}"
    try:
        parser.parse_args(words[len(program) :])
    except InputError as error:
        return str(error)
    return ""


def deprecated_in(command: str, declared: Declared) -> dict[str, str]:
    """Deprecated arguments of a command, and what the release says of them."""
    known = spellings(declared)
    words = shlex.split(command.replace("\\\n", " "))
    return {word: known[word].deprecated for word in words if word in known and known[word].deprecated}
