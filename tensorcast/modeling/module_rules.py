"""Rules that name modules of a checkpoint: by name, glob or regular expression, the first that matches wins.

Modules have other names in a checkpoint than in a class: a multimodal model puts ``language_model`` before them, and
experts that one tensor holds here are a module each there. A weight is asked for under all names that it may have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from itertools import groupby
from typing import Literal, NamedTuple

from tensorcast.errors import InputError

How = Literal["module", "match", "search", "every"]

LAYERS = ("linear", "experts")
"""Roles that a rule without a name speaks for."""


class Rule(NamedTuple):
    """``scheme`` for the modules that ``pattern`` names.

    ``module``: a run of dotted parts anywhere in the name, so the module itself and all beneath it; ``match`` and
    ``search``: a regular expression, from the name's start or anywhere; ``every``: all.
    """

    pattern: str
    how: How
    scheme: str
    roles: tuple[str, ...] = (*LAYERS, "lm_head", "embedding")


@dataclass(frozen=True)
class Rules:
    """Rules in order. Among neighbouring rules that name modules the longest name wins."""

    entries: tuple[Rule, ...] = ()

    @cached_property
    def _steps(self) -> list[_Step]:
        return [
            _Step(how, roles, tuple(rules))
            for (how, roles), rules in groupby(self.entries, lambda rule: (rule.how, rule.roles))
        ]

    @cached_property
    def _found(self) -> dict[tuple[tuple[str, ...], str], str | None]:
        return {}

    def find(self, names: tuple[str, ...], role: str) -> str | None:
        """The scheme of the first rule that matches one of a weight's ``names``; None if none does."""
        key = names, role
        if key not in self._found:
            steps = (step.find(names) for step in self._steps if role in step.roles)
            self._found[key] = next((scheme for scheme in steps if scheme), None)
        return self._found[key]

    def with_schemes(self, instead: Mapping[str, str]) -> Rules:
        """The same modules, in other schemes by name."""
        if all(instead[rule.scheme] == rule.scheme for rule in self.entries):
            return self
        return Rules(tuple(rule._replace(scheme=instead[rule.scheme]) for rule in self.entries))


NO_RULES = Rules()


@dataclass(frozen=True, eq=False)
class _Step:
    """Neighbouring rules of one kind: names are looked up, patterns tried one after another."""

    how: How
    roles: tuple[str, ...]
    rules: tuple[Rule, ...]

    @cached_property
    def _modules(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for rule in self.rules:
            found.setdefault(_bare(rule.pattern), rule.scheme)
        return found

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_compiled(rule.pattern), rule.scheme) for rule in self.rules]

    def find(self, names: tuple[str, ...]) -> str | None:
        if self.how == "every":
            return self.rules[0].scheme
        if self.how == "module":
            runs = (run for name in names[:: len(WRAPPERS)] for run in _runs(name))
            longest = max((run for run in runs if run in self._modules), key=len, default=None)
            return None if longest is None else self._modules[longest]
        for pattern, scheme in self._patterns:
            tried = pattern.match if self.how == "match" else pattern.search
            if any(tried(name) for name in names):
                return scheme
        return None


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as reason:
        raise InputError(f"quantization_config: {pattern!r} is no regular expression: {reason}") from None


WRAPPERS = ("", "model.", "language_model.model.", "model.language_model.", "language_model.")
"""What stands before a module of the language model; the bare name is the first."""

_WRAPPED = re.compile(r"^(?:(?:model|language_model)\.)+")


def _bare(name: str) -> str:
    return _WRAPPED.sub("", name.strip("."))


def _runs(name: str) -> Iterator[str]:
    parts = name.split(".")
    for start in range(len(parts)):
        for end in range(start + 1, len(parts) + 1):
            yield ".".join(parts[start:end])


EXPERT = {
    "gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",), "up_proj": ("up_proj",),
    "gate_proj": ("gate_proj",),
}  # fmt: skip
"""Modules of one expert by the tensor that holds those of all."""


def module_names(weight: str, role: str, stored: Iterable[str] = ()) -> tuple[str, ...]:
    """All names under which a checkpoint may know the module of ``weight``: every one under every wrapper.

    ``stored``: names that are known, of the first expert where there are several.
    """
    own = re.sub(r"\.(weight|bias)$", "", weight)
    names = [own, *stored]
    if role == "experts":
        block, _, leaf = own.rpartition(".")
        names += [block, *(f"{block}.0.{part}" for part in EXPERT.get(leaf, (leaf,)))]
    return tuple(wrapper + bare for bare in dict.fromkeys(map(_bare, names)) for wrapper in WRAPPERS)


def exclusions(patterns: Iterable[str], scheme: str = "bf16") -> list[Rule]:
    """Rules for lists of modules that stay as they are: names or parts of them, globs, ``re:`` expressions."""
    return [_excluded(pattern, scheme) for pattern in patterns]


def _excluded(pattern: str, scheme: str) -> Rule:
    if pattern.startswith("re:"):
        return Rule(pattern[3:], "match", scheme)
    if any(sign in pattern for sign in "*?["):
        return Rule(glob(pattern), "match", scheme)
    return Rule(pattern, "module", scheme)


def glob(pattern: str) -> str:
    """A glob as a regular expression for a module or one above it. ``layers.1*`` does not mean layer 10.

    ModelOpt writes ``PATH*`` for the tree below PATH (vLLM 0.24.0, quantization/modelopt.py, apply_vllm_mapper).
    """
    tree = pattern.removesuffix("*")
    if tree != pattern and tree[-1:].isdigit():
        return translate(tree).removesuffix(r"\Z").removesuffix(r"\z") + r"(?!\d)"
    return translate(pattern).removesuffix(r"\Z").removesuffix(r"\z") + r"(?:\..*)?$"


def part(text: str) -> str:
    """A regular expression for names that ``text`` is a part of; one that ends in a number means that number."""
    return re.escape(text) + (r"(?!\d)" if text[-1:].isdigit() else "")
